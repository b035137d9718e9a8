"""From healthy voxels to lesions (PAPER.md III-D, Fig. 4).

Letters are the paper's panels. The network answers for bright voxels only, so the lesions it leaves (4d) are
smoothed (4e) and then grown into the fainter tissue around them, as far as that is dense itself (4g).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import lesionsynth as ls
from normnet.config import PAPER_FULL_THRESHOLD, PAPER_THRESHOLD_HU, PostprocessConfig

Image = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

CHUNK = 48
"""Slices filtered at once: with the filters' margins, temporaries of a tenth of a long volume."""
FULL_SHARE = 0.75
"""Largest share of τ that a mean intensity must exceed to belong to a lesion (Fig. 4g), where the threshold
is not given: tissue that the network judges, at or above τ, must be able to pass with some fainter voxels in
it. For T = -700 HU that is 0.083, where phantom pneumonia and synthetic lesions are best (docs/results.md).
"""
EXACT = 2.0**40
"""Sums of multiples of 1 / EXACT below 1 have no rounding in float64, so that no order of summation, chunk or
device can change a mean."""


class Lesions(NamedTuple):
    """Lesion maps, (Z, Y, X), in the library and on the device of the input."""

    final: Any
    """After region growing."""
    core: Any
    """Fig. 4e inside 4g, before it (Table III, "w/o growing")."""


def raw_lesions(image: Any, lung_mask: Any, healthy: Any, tau: float) -> tuple[Any, Any]:
    """Return what is left of the lung without the healthy voxels.

    Parameters
    ----------
    image : (Z, Y, X) float32 array or tensor
        Windowed CT in [0, 1].
    lung_mask, healthy : (Z, Y, X) bool arrays or tensors
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
    bright = left & (image >= float(np.float32(tau)))  # as float32 compares, in both libraries
    return bright, _library(image).where(left, image, _library(image).zeros_like(image[:1, :1, :1]))


def postprocess(image: Any, lung_mask: Any, healthy: Any, config: PostprocessConfig | None = None) -> Lesions:
    """Turn healthy voxels into lesions.

    Parameters
    ----------
    image : (Z, Y, X) float32 array or tensor
        Windowed CT in [0, 1]; NumPy, or torch on the CPU or a CUDA device.
    lung_mask : (Z, Y, X) bool array or tensor
        Lungs with lesions.
    healthy : (Z, Y, X) bool array or tensor
        What the models voted healthy.
    config : PostprocessConfig, optional
        Sizes and thresholds; the paper's where omitted.

    Returns
    -------
    Lesions
        Inside the lungs and inside 4g; arrays of the kind that came in.

    Raises
    ------
    TypeError
        NumPy arrays and tensors are mixed, or there is another kind.
    ValueError
        Shapes or devices differ, shapes are not 3-D, or a dtype is not the one above.

    Notes
    -----
    4e is where the mean of 4d over `bright_size` voxels exceeds `bright_threshold`, 4g the same of 4f with
    `full_threshold`, or the paper's 0.15 where that is below `FULL_SHARE` of τ. The
    filters see zeros outside the lung. Growing takes `growth_iterations` steps from 4e inside 4g and never
    crosses a gap in 4g. Filters run in chunks of slices: besides the results there are two masks of the
    lungs' box, and what growing needs.
    """
    _check(image, lung_mask, healthy)
    return postprocess_slices(lambda first, last: image[first:last], lung_mask, healthy, config)


def postprocess_slices(
    read: Callable[[int, int], Any],
    lung_mask: Any,
    healthy: Any,
    config: PostprocessConfig | None = None,
    *,
    chunk: int = CHUNK,
) -> Lesions:
    """Do what `postprocess` does with an image that is made slice by slice.

    Parameters
    ----------
    read : callable
        ``read(first, last)`` gives the slices first ... last - 1 of `image`.
    lung_mask, healthy, config
        As in `postprocess`.
    chunk : int
        Slices filtered at once. It changes no voxel.

    Returns
    -------
    Lesions
    """
    config = config or PostprocessConfig()
    zeros_like = _library(lung_mask).zeros_like
    final, core = zeros_like(lung_mask), zeros_like(lung_mask)
    margin = max(config.bright_size, config.full_size)
    box = _box(lung_mask, margin)
    if box is None:
        return Lesions(final, core)
    seed, room = core[box], zeros_like(lung_mask[box])
    level = PAPER_THRESHOLD_HU if config.threshold_hu is None else config.threshold_hu
    tau = ls.threshold(level)
    full_threshold = config.full_threshold
    if full_threshold is None:
        full_threshold = min(PAPER_FULL_THRESHOLD, FULL_SHARE * tau)
    bottom, top = box[0].start, min(box[0].stop, lung_mask.shape[0])
    for first in range(bottom, top, chunk):
        last = min(first + chunk, top)
        # reflections at a chunk's ends stay within its margin; the box's own ends reflect zeros
        wide = slice(max(first - margin, bottom), min(last + margin, top))
        part = (wide, *box[1:])
        bright, full = raw_lesions(
            read(wide.start, wide.stop)[:, box[1], box[2]], lung_mask[part], healthy[part], tau
        )
        inner, at = slice(first - wide.start, last - wide.start), slice(first - bottom, last - bottom)
        dense = _smooth(_exact(full), config.full_size, full_threshold)[inner] & lung_mask[part][inner]
        room[at] = dense
        seed[at] = _smooth(bright, config.bright_size, config.bright_threshold)[inner] & dense
    if config.growth_iterations:
        # ops.grow, as SciPy, takes 0 for "until nothing changes"
        steps = max(config.growth_iterations, 0)
        final[box] = ls.ops.grow(seed, room, iterations=steps, connectivity=config.connectivity)
    else:
        final[box] = seed
    return Lesions(final, core)


def _smooth(volume: Any, size: int, threshold: float) -> Any:
    """Where the mean filter exceeds the threshold; both float32."""
    return ls.ops.uniform_filter(volume, size) > float(np.float32(threshold))


def _exact(image: Any) -> Any:
    """Round to multiples of 1 / `EXACT`, which moves values below 1.5e-5 alone (float32 has 24 bits)."""
    if isinstance(image, np.ndarray):
        return np.rint(image * np.float32(EXACT)) / np.float32(EXACT)
    return torch.round(image * EXACT) / EXACT


def _library(array: Any) -> Any:
    return torch if isinstance(array, torch.Tensor) else np


def _box(mask: Any, margin: int) -> tuple[slice, slice, slice] | None:
    """Bounding box with a margin, so that reflecting edges meet zeros as those of the whole volume would."""
    slices = []
    for along in (mask.any(2).any(1), mask.any(2).any(0), mask.any(1).any(0)):
        used = np.flatnonzero(along.cpu().numpy() if isinstance(along, torch.Tensor) else along)
        if not used.size:
            return None
        slices.append(slice(max(int(used[0]) - margin, 0), int(used[-1]) + 1 + margin))
    return slices[0], slices[1], slices[2]


def _check(image: Any, lung_mask: Any, healthy: Any) -> None:
    given = {"image": image, "lung_mask": lung_mask, "healthy": healthy}
    kind = torch.Tensor if isinstance(image, torch.Tensor) else np.ndarray
    for name, array in given.items():
        if not isinstance(array, kind):
            raise TypeError(
                f"image, lung_mask and healthy must all be NumPy arrays or all torch tensors, {name} is "
                f"{type(array).__name__}"
            )
        if isinstance(array, torch.Tensor) and array.device != image.device:
            raise ValueError(f"{name} must be on the device of image, {image.device}, got {array.device}")
    if image.ndim != 3:
        raise ValueError(f"image must be (z, y, x), got shape {tuple(image.shape)}")
    if image.dtype != _library(image).float32:
        raise ValueError(f"image must be float32, got {image.dtype}")
    for name, mask in (("lung_mask", lung_mask), ("healthy", healthy)):
        if mask.shape != image.shape:
            shape, got = tuple(image.shape), tuple(mask.shape)
            raise ValueError(f"{name} must have the shape of image, {shape}, got {got}")
        if mask.dtype not in (np.bool_, torch.bool):
            raise ValueError(f"{name} must be bool, got {mask.dtype}")
