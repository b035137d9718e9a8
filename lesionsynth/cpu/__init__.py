"""CPU twin: Numba kernels, one module per stage of DESIGN.md section 2."""

from __future__ import annotations

import os

_NAME = "NUMBA_NUM_THREADS"


def _import_numba() -> None:
    """Import Numba without a number of threads that it would die of, or warn of, in many lines.

    `lesionsynth.cpu.engine.threads.default_threads` tells of it in one, where it counts.
    """
    stated = os.environ.get(_NAME, "")
    if not stated.strip() or stated.strip().removeprefix("+").strip("0").isdecimal():
        return
    del os.environ[_NAME]
    try:
        import numba  # noqa: F401
    finally:
        os.environ[_NAME] = stated


_import_numba()
