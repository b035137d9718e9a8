"""How kernels are compiled.

Everything is compiled at its first call and kept on disk, so a process compiles what no process before it
has. Numba does not look into the functions that a kernel calls: after an edit, delete the ``*.nbi`` files.
"""

from __future__ import annotations

from typing import Any

import numba

kernel: Any = numba.njit(nogil=True, cache=True)
"""A function that Python calls: it runs without the GIL."""

inner: Any = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""A function that only kernels call; Python must not, it would crash. It becomes a part of them, and needs
neither wrappers nor a place on
disk, which are half of the time that a small function takes to compile."""
