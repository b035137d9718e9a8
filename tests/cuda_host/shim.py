"""Compile CUDA C++ for the host, and launch its kernels on NumPy memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "random")
NAMES = re.compile(r"^(?:KERNEL|KERNEL_OF\(\d+\)) (\w+)\(", re.MULTILINE)
FLAGS = (
    "-std=c++20", "-O2", "-g1", "-shared", "-fPIC", "-x", "c++", "-w",
    "-ffp-contract=off",  # as --fmad=false
    "-fno-strict-aliasing",
)  # fmt: skip


class ShimError(RuntimeError):
    """A kernel did what a GPU would not forgive."""


def compiler() -> str | None:
    """Path of g++, None where there is none."""
    return shutil.which("g++")


class HostProgram:
    """A program compiled for the host, once for each text.

    Parameters
    ----------
    text : str
        CUDA C++ whose kernels begin with ``KERNEL name(`` or ``KERNEL_OF(n) name(``.
    sanitize : bool
        With AddressSanitizer; its library must be loaded before Python begins.
    """

    def __init__(self, text: str, *, sanitize: bool = False) -> None:
        self.kernels = NAMES.findall(text)
        exports = "\n".join(f"SHIM_EXPORT({name})" for name in self.kernels)
        code = f'#include "gpushim.h"\n#line 1 "program.cu"\n{text}\n{exports}\n'
        flags = [*FLAGS, f"-I{HERE}"]
        if platform.machine() in ("x86_64", "AMD64"):
            flags.append("-mfma")  # else fmaf is a library call
        if sanitize:
            flags += ["-fsanitize=address", "-fno-omit-frame-pointer"]
        self._library = ctypes.CDLL(str(_compiled(code, flags)))

    def launch(
        self,
        kernel: str,
        grid: int,
        block: int,
        arguments: tuple[Any, ...],
        *,
        order: str = "forward",
        yield_percent: int = 0,
        seed: int = 1,
    ) -> None:
        """Run a kernel on `grid` blocks of `block` threads; arguments are NumPy scalars."""
        function = self._library[f"{kernel}__launch"]
        function.restype = ctypes.c_char_p
        function.argtypes = [
            ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_int,
        ]  # fmt: skip
        values = [ctypes.create_string_buffer(argument.tobytes()) for argument in arguments]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(v) for v in values])
        error = function(grid, block, pointers, seed, yield_percent, ORDERS.index(order))
        if error:
            raise ShimError(f"{kernel}: {error.decode()}")


def _compiled(code: str, flags: list[str]) -> Path:
    """Return the shared library of a text, from the folder of earlier ones where it is there."""
    gxx = compiler()
    assert gxx is not None
    header = (HERE / "gpushim.h").read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join([code, header, gxx, *flags]).encode()).hexdigest()[:24]
    folder = (
        Path(tempfile.gettempdir()) / f"lesionsynth-cuda-host-{os.getuid() if hasattr(os, 'getuid') else 0}"
    )
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        made = subprocess.run(
            [gxx, *flags, "-o", name, "-"], input=code, text=True, capture_output=True, check=False
        )
        if made.returncode:
            os.unlink(name)
            raise ShimError(made.stderr)
        os.replace(name, library)  # another process may have been faster
    return library
