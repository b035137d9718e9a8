"""HU to [0, 1] and the bright-tissue threshold (PAPER.md III-A)."""

from __future__ import annotations

from typing import Any

import numpy as np

from lesionsynth._dlpack import DLPACK_CUDA, DLPackArray, accept, device_kind, untraced
from lesionsynth.config import LEAST_HU, MOST_HU, Range
from lesionsynth.cuda.backend import check_cupy
from lesionsynth.strict import check_number, shown

HU_RANGE: Range = (-800.0, 100.0)
"""The paper's window."""


@untraced
def window_hu(hu: DLPackArray, hu_range: Range = HU_RANGE) -> Any:
    r"""Clip Hounsfield units to a window and scale them to [0, 1].

    Parameters
    ----------
    hu : array, any shape
        Hounsfield units, integer or float; NumPy or a DLPack object, on the CPU or a CUDA device. Never
        modified.
    hu_range : (2,) floats
        HU that become 0 and 1.

    Returns
    -------
    float32 array
        :math:`\mathrm{clip}((hu - low) / (high - low), 0, 1)`; the library of `hu`.

    Raises
    ------
    TypeError
        `hu` is no array of numbers, or `hu_range` holds something else.
    ValueError
        `hu_range` is not increasing, or too narrow.
    """
    low, high = _window(hu_range)
    if device_kind(hu) == DLPACK_CUDA:
        check_cupy("hu is on a CUDA device")
        from lesionsynth.cuda import ops as cuda_ops

        return cuda_ops.window_hu(hu, (low, high))
    values, restore = accept(hu, "hu")
    if values.dtype.kind not in "biuf":
        raise TypeError(f"hu must be bool, integer or float, got {values.dtype}")
    with np.errstate(over="ignore"):  # what is infinite in float32 is clipped
        scaled = values.astype(np.float32)
    least, most = np.float32(low), np.float32(high)
    np.clip(scaled, least, most, out=scaled)
    scaled -= least
    scaled /= most - least  # in float32, as the kernels do for int16
    return restore(scaled)


def threshold(hu: float = -500.0, hu_range: Range = HU_RANGE) -> float:
    """Return τ, the HU value `hu` on the [0, 1] scale of `window_hu`: 1/3 for -500 HU.

    Raises
    ------
    ValueError
        `hu_range` is not increasing or too narrow, or `hu` lies outside it.
    """
    low, high = _window(hu_range)
    hu = check_number("hu", hu, low, high, f"in hu_range ({low}, {high})")
    return (hu - low) / (high - low)


def _window(hu_range: Any) -> Range:
    """Return a window as Python's numbers, or say what is wrong with it."""
    try:
        low, high = hu_range
    except (TypeError, ValueError):
        raise ValueError(f"hu_range must be (low, high) with low < high, got {shown(hu_range)}") from None
    least, most = -MOST_HU, MOST_HU
    low, high = (check_number("hu_range", v, least, most, f"within {MOST_HU:g} HU") for v in (low, high))
    if not low < high:
        raise ValueError(f"hu_range must be (low, high) with low < high, got {shown(hu_range)}")
    if high - low < LEAST_HU:
        raise ValueError(f"hu_range must be at least {LEAST_HU:g} HU wide, got {shown(hu_range)}")
    return low, high
