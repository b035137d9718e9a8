"""Compile CUDA C++ for the host, and launch its kernels on NumPy memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lesionsynth._cache import distrust

HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "random", "warps")
NAMES = re.compile(
    r'^(?:KERNEL|KERNEL_OF\(\w+\)|extern "C" __global__ void(?: __launch_bounds__\([^)]*\))?) (\w+)\(',
    re.MULTILINE,
)
FLAGS = (
    *("-std=c++20", "-O2", "-g1", "-shared", "-fPIC", "-x", "c++", "-w"),
    "-ffp-contract=off",  # as --fmad=false
    "-fno-strict-aliasing",
)
SANITIZER = (
    *("-fsanitize=address", "-fno-omit-frame-pointer"),
    "-fsanitize-sections=gpushared",  # shared memory too
    "--param=asan-use-after-return=0",  # it would move frames off the fibres' stacks
)
LIMIT_S = 300.0
_lock = threading.Lock()
"""Held by the launch under way: every program runs one at a time, and the timer is the process's."""


class ShimError(RuntimeError):
    """A kernel did what a GPU would not forgive, or does not compile."""


def compiler() -> str | None:
    """Path of g++, None where there is none; elsewhere than on Linux it may be another compiler."""
    return shutil.which("g++") if sys.platform == "linux" else None


def sanitizer_environment() -> dict[str, str] | None:
    """Environment of a process that may use programs with ``sanitize=True``; None where that is missing."""
    # The second because the first replaces functions of it.
    names = [library_path(name) for name in ("libasan.so", "libstdc++.so")]
    if not all(os.path.isabs(name) for name in names):
        return None
    options = {
        "LD_PRELOAD": " ".join(names),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # Python keeps memory to its end
        "PYTHONMALLOC": "malloc",
    }
    return {**os.environ, **options}


def library_path(name: str) -> str:
    """Absolute path of a library of the compiler; the name itself where it has none."""
    command = [compiler() or "g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class HostProgram:
    """A program compiled for the host, once for each text.

    Parameters
    ----------
    text : str
        CUDA C++ without includes. Kernels begin, at the start of a line, with ``KERNEL name(``,
        ``KERNEL_OF(n) name(`` or ``extern "C" __global__ void name(``.
    sanitize : bool
        With AddressSanitizer, which looks at shared memory too; the process must have been started in
        `sanitizer_environment`.
    portable : bool
        Switch fibres as on machines for which there is no assembly.

    Raises
    ------
    ShimError
        The text does not compile, or `sanitize` is asked for in another environment.
    """

    def __init__(self, text: str, *, sanitize: bool = False, portable: bool = False) -> None:
        if sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
            raise ShimError("AddressSanitizer must be loaded before Python: see sanitizer_environment")
        self.kernels = NAMES.findall(text)
        exports = "\n".join(f"SHIM_EXPORT({name})" for name in self.kernels)
        code = f'#include "gpushim.h"\n#line 1 "program.cu"\n{text}\n{exports}\n'
        flags = [*FLAGS, *instructions(), f"-I{HERE}", *(SANITIZER if sanitize else ())]
        flags += ["-DSHIM_UCONTEXT"] if portable else []
        self._library = ctypes.CDLL(str(compiled(code, flags)))
        self._sizes = {name: self._parameter_sizes(name) for name in self.kernels}

    def launch(
        self,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int,
        arguments: Sequence[Any],
        *,
        order: str = "forward",
        yield_percent: int = 0,
        seed: int = 1,
        limit_s: float = LIMIT_S,
    ) -> None:
        """Run a kernel.

        Parameters
        ----------
        kernel : str
            Name.
        grid : int or up to three ints
            Blocks.
        block : int
            Threads of a block.
        arguments : sequence of NumPy scalars
            Pointers are ``np.uint64``.
        order : {"forward", "reverse", "random", "warps"}
            Of blocks, and of threads between two barriers.
        yield_percent : int
            Chance that a thread gives way before and after an atomic, and in a fence.
        seed : int
            Of the random order and the yields.
        limit_s : float
            Processor time after which the launch is given up.

        Raises
        ------
        ShimError
            See gpushim.h; it names the kernel.
        """
        pointers, blocks, function, _values = self.prepared(f"{kernel}__launch", kernel, grid, arguments)
        function.argtypes = [
            *(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_int),
            *(ctypes.c_uint64, ctypes.c_uint, ctypes.c_int, ctypes.c_double),
        ]
        with _lock:
            error = function(
                blocks, block, pointers, len(arguments), seed, yield_percent, ORDERS.index(order), limit_s
            )
        if error:
            raise ShimError(f"{kernel}: {error.decode()}")

    def prepared(
        self, entry: str, kernel: str, grid: int | tuple[int, ...], arguments: Sequence[Any]
    ) -> tuple[Any, Any, Any, Any]:
        """Return addresses of arguments, the grid, an entry of the library, and what must stay till then."""
        sizes = [argument.nbytes for argument in arguments]
        if sizes != self._sizes[kernel]:
            raise ShimError(f"{kernel}: parameters have {self._sizes[kernel]} bytes, arguments {sizes}")
        values = [ctypes.create_string_buffer(argument.tobytes()) for argument in arguments]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(v) for v in values])
        extent = (grid,) if isinstance(grid, int) else grid
        blocks = (ctypes.c_uint * 3)(*extent, *(1,) * (3 - len(extent)))
        function = self._library[entry]
        function.restype = ctypes.c_char_p
        return pointers, blocks, function, values

    def _parameter_sizes(self, kernel: str) -> list[int]:
        sizes = (ctypes.c_int * max(1, count := self._library[f"{kernel}__count"]()))()
        self._library[f"{kernel}__sizes"](sizes)
        return list(sizes)[:count]


@cache
def instructions() -> tuple[str, ...]:
    """Fused multiply-add and float16 in hardware where it is there: else each is a call."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    flags = set(re.findall(r"\w+", "".join(re.findall(r"^flags\s*:(.*)$", text, re.MULTILINE)[:1])))
    return tuple(f"-m{name}" for name in ("fma", "f16c") if name in flags)


def compiled(code: str, flags: list[str]) -> Path:
    """Return the shared library of a text, from the folder of earlier ones where it is there."""
    gxx = compiler()
    assert gxx is not None
    header = (HERE / "gpushim.h").read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join([code, header, gxx, *flags]).encode()).hexdigest()[:24]
    folder = (
        Path(tempfile.gettempdir()) / f"lesionsynth-cuda-host-{os.getuid() if hasattr(os, 'getuid') else 0}"
    )
    folder.mkdir(mode=0o700, exist_ok=True)
    refused = distrust(folder.stat())
    if refused:
        raise ShimError(f"{folder} is not used to keep programs, since {refused}")
    library = folder / f"{key}.so"
    if not library.exists():
        handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        command = [gxx, *flags, "-o", name, "-"]
        # The compiler itself is not to run under a sanitizer that this process was started with.
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        made = subprocess.run(
            command, input=code, text=True, capture_output=True, check=False, env=environment
        )
        if made.returncode:
            os.unlink(name)
            raise ShimError(made.stderr)
        os.replace(name, library)  # another process may have been faster
    return library
