"""How kernels are compiled; `lesionsynth._cache` tells how they are kept."""

from __future__ import annotations

import os
from typing import Any

import numba
from numba.core.compiler_lock import global_compiler_lock

from lesionsynth._cache import compiled

if hasattr(os, "register_at_fork"):
    # A process that is forked while another thread compiles would wait for that thread, which it lacks.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


kernel = compiled
"""Compile a function that Python calls; it runs without the GIL. Its vectors and atomics are instructions of
the processor, which Python cannot run: see `lesionsynth._cache.NotCompiled`."""

inner: Any = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False)
"""Compile a function that only kernels call; Python must not, it would crash. It becomes a part of them, and
needs neither wrappers nor a place on disk, half of the time that a small function takes to compile.

It counts no references: a call would count those to every array of a job, up and down, with instructions that
make the threads wait for each other. So it makes no arrays, which Numba refuses, and returns none but to its
like: whoever counts would give up a reference that nobody has taken."""
maker: Any = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""The same for a function that makes or returns arrays; only kernels and its like call it."""
