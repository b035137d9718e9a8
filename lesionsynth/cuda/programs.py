"""Programs: CUDA C++ put together from the files of ``kernels/``.

A program is compiled once per image type; everything random is a run-time argument. No file includes
another, so NVRTC needs no headers, and the text compiles unchanged for the host (tests/cuda_host).
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from lesionsynth.cuda.records import BATCH, BLOB, ITEM, STATE

THREADS = 256
"""Threads of a block, of every kernel."""

OPTIONS = ("--std=c++17", "--fmad=false")
"""No contraction: a fused multiply-add is one where the source says so, as in the CPU twin. No fast-math."""

PROGRAMS = {
    "generator": (
        "philox.cuh",
        "lines.cuh",
        "read.cu",
        "shapes.cu",
        "schedule.cu",
        "merge.cu",
        "texture.cu",
        "soft.cu",
        "pair.cu",
    ),
    "ops": ("philox.cuh", "lines.cuh", "ops.cu", "label.cu", "edges.cu"),
}
"""Files of each program, in order; ``prelude.cuh`` comes first in all.

The kernels of ``ops`` name their types: it is compiled as for float32 alone, whatever it is given.
"""

IMAGES = {"float32": 0, "float16": 1, "bfloat16": 2, "int16": 3, "float64": 4}
"""Types of an image, and what ``IMAGE`` is in the source."""

_C_TYPES = {
    np.dtype(np.float64): "double",
    np.dtype(np.float32): "float",
    np.dtype(np.int64): "long long",
    np.dtype(np.uint64): "unsigned long long",
    np.dtype(np.int32): "int",
    np.dtype(np.uint32): "unsigned",
}


@cache
def source(program: str, image: str = "float32") -> str:
    """Return the text of a program for images of a type."""
    lines = [f"#define IMAGE {IMAGES[image]}", f"#define THREADS {THREADS}"]
    prelude, *rest = (read(name) for name in ("prelude.cuh", *PROGRAMS[program]))
    structs = [
        c_struct(name, kind)
        for name, kind in (("Blob", BLOB), ("State", STATE), ("Item", ITEM), ("Batch", BATCH))
    ]
    return "\n".join([*lines, prelude, *structs, *rest])


def c_struct(name: str, kind: np.dtype[Any]) -> str:
    """Write a structured dtype as C: the records have one definition, in `lesionsynth.cuda.records`."""
    members = []
    for field, (inner, *_) in (kind.fields or {}).items():
        base, shape = inner.subdtype or (inner, ())
        extents = "".join(f"[{n}]" for n in shape)
        members.append(f"    {_C_TYPES[base]} {field}{extents};")
    size = f'static_assert(sizeof({name}) == {kind.itemsize}, "{name}");'
    return "\n".join([f"struct {name} {{", *members, "};", size])


def read(name: str) -> str:
    """Return the text of a file of ``kernels/``."""
    text = files("lesionsynth.cuda").joinpath("kernels", name).read_text(encoding="utf-8")
    return f'#line 1 "{name}"\n{text}'


def kernels_of(text: str) -> list[str]:
    """Return the names of the kernels in a text."""
    return re.findall(r"^KERNEL(?:_OF\(\w+\))? (\w+)\(", text, re.MULTILINE)
