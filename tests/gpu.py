"""Whether there is a GPU, and what to do with the tests that need one.

Tests marked ``gpu`` skip where there is none, and ``gpu(2)`` where there are fewer than two. With
REQUIRE_GPU=1 in the environment a GPU is expected: what would skip for want of one, or of a library, fails.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import pytest

from benchmarks.device_time import SPIN


@cache
def devices() -> int:
    """CUDA devices that CuPy sees."""
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # no CuPy, no driver, no device: whatever it is, there is no GPU
        return 0


def expected() -> bool:
    return os.environ.get("REQUIRE_GPU", "") not in ("", "0")


def wanted(item: pytest.Item) -> int:
    """Devices that a test needs."""
    marker = item.get_closest_marker("gpu")
    return 0 if marker is None else marker.args[0] if marker.args else 1


def skip_unless_there(item: pytest.Item) -> None:
    count = wanted(item)
    if count and devices() < count:
        pytest.skip(f"needs {count} CUDA device(s), and CuPy sees {devices()}")


def fail_if_skipped(report: Any, wanted: int) -> None:
    """Turn a skip into a failure where a GPU is expected; one GPU need not be two."""
    if report.skipped and not hasattr(report, "wasxfail") and wanted == 1 and expected():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"REQUIRE_GPU=1, and this did not run: {reason}"


def keep_busy(seconds: float, blocks: int = 1) -> None:
    """Occupy CuPy's current stream, and as many blocks of a thousand threads."""
    import cupy

    cupy.RawKernel(SPIN, "spin")((blocks,), (1024,), (np.int64(seconds * 1e9),))
