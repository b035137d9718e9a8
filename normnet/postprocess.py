"""From healthy voxels to lesions (PAPER.md III-D, Fig. 4).

Letters are the paper's panels. The network answers for bright voxels only, so the lesions it leaves (4d) are
smoothed (4e) and then grown into the fainter tissue around them, as far as that is dense itself (4g).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import lesionsynth as ls
from normnet.config import PostprocessConfig

Image = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


class Lesions(NamedTuple):
    """Lesion maps, (Z, Y, X)."""

    final: Mask
    """After region growing."""
    core: Mask
    """Fig. 4e inside 4g, before it (Table III, "w/o growing")."""


def raw_lesions(image: Image, lung_mask: Mask, healthy: Mask, tau: float) -> tuple[Mask, Image]:
    """Return what is left of the lung without the healthy voxels.

    Parameters
    ----------
    image : (Z, Y, X) float32 array
        Windowed CT in [0, 1].
    lung_mask, healthy : (Z, Y, X) bool arrays
        Lungs with lesions; what the models voted healthy.
    tau : float
        Bright voxels are at or above it.

    Returns
    -------
    bright : bool array
        Fig. 4d: bright lung voxels that are not healthy.
    full : float32 array
        Fig. 4f: intensities of all lung voxels that are not healthy, 0 elsewhere.
    """
    left = lung_mask & ~healthy
    return left & (image >= np.float32(tau)), np.where(left, image, np.float32(0.0))


def postprocess(
    image: Image, lung_mask: Mask, healthy: Mask, config: PostprocessConfig | None = None
) -> Lesions:
    """Turn healthy voxels into lesions.

    Parameters
    ----------
    image : (Z, Y, X) float32 array
        Windowed CT in [0, 1].
    lung_mask : (Z, Y, X) bool array
        Lungs with lesions.
    healthy : (Z, Y, X) bool array
        What the models voted healthy.
    config : PostprocessConfig, optional
        Sizes and thresholds; the paper's where omitted.

    Returns
    -------
    Lesions
        Inside the lungs and inside 4g.

    Raises
    ------
    ValueError
        Shapes differ or are not 3-D, or `lung_mask` or `healthy` is not bool.

    Notes
    -----
    4e is where the mean of 4d over `bright_size` voxels exceeds `bright_threshold`, 4g the same of 4f. The
    filters see zeros outside the lung. Growing takes `growth_iterations` steps from 4e inside 4g and never
    crosses a gap in 4g.
    """
    config = config or PostprocessConfig()
    _check(image, lung_mask, healthy)
    final, core = np.zeros(image.shape, np.bool_), np.zeros(image.shape, np.bool_)
    box = _box(lung_mask, margin=max(config.bright_size, config.full_size))
    if box is None:
        return Lesions(final, core)
    image, lung_mask, healthy = image[box], lung_mask[box], healthy[box]
    bright, full = raw_lesions(image, lung_mask, healthy, ls.threshold(config.threshold_hu))
    seed = _smooth(bright.astype(np.float32), config.bright_size, config.bright_threshold)
    room = _smooth(full, config.full_size, config.full_threshold) & lung_mask
    seed &= room
    core[box] = final[box] = seed
    if config.growth_iterations:
        # ops.grow, as SciPy, takes 0 for "until nothing changes"
        steps = max(config.growth_iterations, 0)
        final[box] = ls.ops.grow(seed, room, iterations=steps, connectivity=config.connectivity)
    return Lesions(final, core)


def _smooth(volume: Image, size: int, threshold: float) -> Mask:
    """Where the mean filter exceeds the threshold; both float32."""
    return np.asarray(ls.ops.uniform_filter(volume, size) > np.float32(threshold))


def _box(mask: Mask, margin: int) -> tuple[slice, slice, slice] | None:
    """Bounding box with a margin, so that reflecting edges meet zeros as those of the whole volume would."""
    slices = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        if not used.size:
            return None
        slices.append(slice(max(int(used[0]) - margin, 0), int(used[-1]) + 1 + margin))
    return slices[0], slices[1], slices[2]


def _check(image: Image, lung_mask: Mask, healthy: Mask) -> None:
    if image.ndim != 3:
        raise ValueError(f"image must be (z, y, x), got shape {image.shape}")
    for name, mask in (("lung_mask", lung_mask), ("healthy", healthy)):
        if mask.shape != image.shape:
            raise ValueError(f"{name} must have the shape of image, {image.shape}, got {mask.shape}")
        if mask.dtype != np.bool_:
            raise ValueError(f"{name} must be bool, got {mask.dtype}")
