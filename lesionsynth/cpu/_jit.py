"""How kernels are compiled; `lesionsynth._cache` tells how they are kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numba

from lesionsynth._cache import compiled


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls; it runs without the GIL.

    Its vectors and atomics are instructions of the processor, which Python cannot run: a call raises
    RuntimeError where ``NUMBA_DISABLE_JIT`` keeps Numba from compiling.
    """
    if not numba.config.DISABLE_JIT:
        return compiled(function)

    @wraps(function)
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "lesionsynth's CPU kernels must be compiled by Numba and cannot run as Python: unset "
            f"NUMBA_DISABLE_JIT, which is {numba.config.DISABLE_JIT}, before lesionsynth is imported"
        )

    return refuse


inner: Any = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compile a function that only kernels call; Python must not, it would crash. It becomes a part of them, and
needs neither wrappers nor a place on disk, half of the time that a small function takes to compile."""
