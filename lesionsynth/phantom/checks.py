"""Checks of what callers hand in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LEAST = 8
"""Smallest extent in voxels."""
MOST_VOXELS = 2**31 - 1
"""Largest volume: as the generator's."""
LEAST_SPACING, MOST_SPACING = 1e-3, 1e3
"""Bounds of a voxel's size in mm."""


def check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return three extents, or raise."""
    values = tuple(shape) if isinstance(shape, tuple | list | range | np.ndarray) else ()
    if len(values) != 3:
        raise ValueError(f"shape must be three integers (z, y, x), got {_shown(shape)}")
    if not all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in values):
        raise TypeError(f"shape must be three integers (z, y, x), got {_shown(shape)}")
    z, y, x = (int(n) for n in values)
    if min(z, y, x) < LEAST:
        raise ValueError(f"shape must be at least {LEAST} along every axis, got {_shown((z, y, x))}")
    if z * y * x > MOST_VOXELS:
        raise ValueError(f"shape must have fewer than 2**31 voxels, got {_shown((z, y, x))}")
    return z, y, x


def check_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    """Return three voxel sizes in mm, or raise."""
    values = tuple(spacing) if isinstance(spacing, tuple | list | np.ndarray) else ()
    numbers = [v for v in values if _is_number(v)]
    if len(numbers) != len(values) or not values:
        raise TypeError(f"spacing must be three numbers (z, y, x) in mm, got {_shown(spacing)}")
    if len(numbers) != 3 or not all(LEAST_SPACING <= v <= MOST_SPACING for v in numbers):
        raise ValueError(
            f"spacing must be three positive numbers (z, y, x) in mm, from {LEAST_SPACING:g} to "
            f"{MOST_SPACING:g}, got {_shown(spacing)}"
        )
    z, y, x = (float(v) for v in numbers)
    return z, y, x


def check_seed(seed: Any) -> None:
    """Raise unless `seed` is an integer >= 0."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {_shown(seed)}")


def check_number(name: str, value: Any, least: float, most: float, rule: str) -> float:
    """Return a number in [least, most], or raise."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {_shown(value)}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be {rule}, got {_shown(value)}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Show a value on one line, or its type where that is long."""
    long = isinstance(value, int) and abs(value) >= 10**40  # too long for repr, perhaps
    parts = value if isinstance(value, tuple) else ()
    text = "" if long or any(_shown(part) == "int" for part in parts) else " ".join(repr(value).split())
    return text if 0 < len(text) <= 100 else type(value).__name__
