"""Bring a scan to the coarse grid on which the lung network sees a whole chest at one size."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from normnet.prepare.grid import IsoGrid
from normnet.prepare.lungs import AIR_HU, body_mask, coarse_grid
from normnet.prepare.morphology import Mask, Spacing, block_mean, component_sizes, opened

WINDOW = ((-1000.0, -150.0, 150.0, 800.0), (0.0, 0.4, 0.9, 1.0))
"""HU and what the lung network sees of them, linear in between: half of it is soft tissue, where
consolidation, heart and liver are to be told apart."""
ADULT_MM = 3.0
"""Voxel of an adult's chest: what is measured there in millimetres is so in an adult's."""
BODY_VOXELS = 90.0
"""Side of a square of the body's cross-section in voxels: what an adult has at 3 mm, a neonate at 0.9 mm."""
SMALLEST_MM, SMALL_MM, LARGEST_MM = 0.5, 2.0, 3.5
"""Voxels of the coarse grid: bounds, and below which a patient is small."""
HILUM_MM = 4.5
"""Vessels wider than twice this that hang on the mediastinum are hilum and no lung, in an adult."""
CHUNK = 32
"""Slices averaged at once."""


def chest_grid(hu: npt.NDArray[np.int16], spacing: Spacing) -> IsoGrid:
    """Choose the coarse grid of a scan: cubic voxels, of a size that follows the patient's.

    Parameters
    ----------
    hu : (Z, Y, X) int16 array
        Hounsfield units in LPS index order.
    spacing : (3,) floats
        Voxel size in mm, axis order z, y, x.

    Returns
    -------
    IsoGrid
        Covers the whole scan. Its voxels have the same share of the median cross-section of the body in every
        patient, between `SMALLEST_MM` and `LARGEST_MM`.
    """
    size = _body_mm(hu, spacing) / BODY_VOXELS
    if size < SMALL_MM:  # the wall of a small chest is thin for lengths that are an adult's
        z, y, x = (s * ADULT_MM / size for s in spacing)
        size = max(size, _body_mm(hu, (z, y, x)) / BODY_VOXELS * size / ADULT_MM)
    size = float(np.clip(size, SMALLEST_MM, LARGEST_MM))
    shape = (hu.shape[0], hu.shape[1], hu.shape[2])
    return IsoGrid.whole(shape, spacing, (size, size, size))


def _body_mm(hu: npt.NDArray[np.int16], spacing: Spacing) -> float:
    """Side of a square of the body's median cross-section in mm; of the slices', where no body is found."""
    factors, mm = coarse_grid(spacing)
    coarse = block_mean(hu, factors)
    areas = body_mask(coarse, mm).sum(axis=(1, 2))
    area = float(np.median(areas[areas > 0])) if areas.any() else float(np.prod(coarse.shape[1:]))
    return float(np.sqrt(area * mm[1] * mm[2]))


def window(hu: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale HU to what the lung network sees.

    Parameters
    ----------
    hu : float32 array
        Hounsfield units.

    Returns
    -------
    float32 array
        In [0, 1], by `WINDOW`; what is beyond it lies at its ends.
    """
    seen = np.zeros(hu.shape, np.float32)
    for (low, below), (high, above) in pairwise(zip(*WINDOW, strict=True)):
        seen += np.float32(above - below) * ((hu - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    return seen


def shrink(volume: npt.NDArray[np.generic], grid: IsoGrid) -> npt.NDArray[np.float32]:
    """Average a volume on the scan's grid to the coarse one.

    Parameters
    ----------
    volume : (Z, Y, X) array
        HU or a mask.
    grid : IsoGrid
        From `chest_grid`.

    Returns
    -------
    float32 array of shape ``grid.shape``
        Weighted by a triangle as wide as two coarse voxels, or interpolated where those are the smaller ones.
    """
    along_z, along_y, along_x = (
        _triangles(grid.source_positions(axis), n, grid.spacing[axis] / grid.source_spacing[axis])
        for axis, n in enumerate(volume.shape)
    )
    out = np.zeros(grid.shape, np.float32)
    for first in range(0, len(volume), CHUNK):
        part = volume[first : first + CHUNK].astype(np.float32) @ along_x.T
        part = along_y @ part
        out += np.tensordot(along_z[:, first : first + CHUNK], part, 1)
    return out


def without_hilum(
    hu: npt.NDArray[Any], right: Mask, left: Mask, most_ml: float = math.inf
) -> tuple[Mask, Mask]:
    """Take the large vessels at the mediastinum out of lungs.

    In a healthy lung they are the thick tissue between the middles of the two lungs that goes on outside.

    Parameters
    ----------
    hu : (z, y, x) array
        Scan on the coarse grid.
    right, left : (z, y, x) bool arrays
        Its lungs, neither empty.
    most_ml : float
        Pieces of more than so many ml of an adult are disease, and stay.

    Returns
    -------
    right, left : (z, y, x) bool arrays
        Parts of those given.
    """
    tissue, lungs = hu >= AIR_HU, right | left
    thick, count = ndimage.label(opened(tissue, HILUM_MM, (ADULT_MM,) * 3) & tissue)
    hanging = np.zeros(count + 1, bool)
    hanging[np.unique(thick[~lungs])] = True
    hanging[0] = False
    middles = sorted(float(np.nonzero(lung)[2].mean()) for lung in (right, left))
    medial = np.arange(hu.shape[2])
    hilum = hanging[thick] & (medial > middles[0]) & (medial < middles[1])
    pieces, count = ndimage.label(hilum & lungs)
    hilum &= (component_sizes(pieces, count) * ADULT_MM**3 / 1000 <= most_ml)[pieces]
    return right & ~hilum, left & ~hilum


def _triangles(positions: npt.NDArray[np.float64], n: int, ratio: float) -> npt.NDArray[np.float32]:
    """Weights (out, in); rows sum to 1."""
    away = np.abs(positions[:, None].clip(0, n - 1) - np.arange(n))
    weights = np.clip(1 - away / max(ratio, 1.0), 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)
