"""How kernels are compiled, and kept.

Everything is compiled at its first call and kept on disk, so a process compiles what none before it has.
Numba compares the time and size of a kernel's own file and does not look into what the kernel calls: after a
``git pull`` that changes another file it would run old code. Here a change of any file of this folder counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_FILES = sorted(Path(__file__).parent.glob("*.py"))
SOURCES = tuple((file.name, file.stat().st_mtime, file.stat().st_size) for file in _FILES)
"""Name, time and size of every file that a kernel may be made of."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls; it runs without the GIL."""
    compiled = numba.njit(nogil=True, cache=True)(function)
    cache = getattr(compiled._cache, "_cache_file", None)
    if cache is not None and hasattr(cache, "_source_stamp"):  # names of Numba's own; a test watches them
        cache._source_stamp = SOURCES
    return compiled


inner: Any = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compile a function that only kernels call; Python must not, it would crash. It becomes a part of them, and
needs neither wrappers nor a place on disk, half of the time that a small function takes to compile."""
