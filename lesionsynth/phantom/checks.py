"""Checks of what callers hand in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LEAST = 8
"""Smallest extent in voxels."""


def check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return three extents, or raise."""
    values = tuple(shape) if isinstance(shape, Sequence | np.ndarray) else None
    if values is None or len(values) != 3:
        raise ValueError(f"shape must be three integers (z, y, x), got {shape!r}")
    if not all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in values):
        raise TypeError(f"shape must be three integers (z, y, x), got {shape!r}")
    if min(values) < LEAST:
        raise ValueError(f"shape must be at least {LEAST} along every axis, got {values}")
    return int(values[0]), int(values[1]), int(values[2])


def check_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    """Return three voxel sizes in mm, or raise."""
    try:
        values = tuple(float(v) for v in spacing)
    except TypeError:
        raise TypeError(f"spacing must be three numbers (z, y, x) in mm, got {spacing!r}") from None
    if len(values) != 3 or not all(math.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"spacing must be three positive numbers (z, y, x) in mm, got {spacing!r}")
    return values[0], values[1], values[2]


def check_seed(seed: Any) -> None:
    """Raise unless `seed` is an integer >= 0."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
