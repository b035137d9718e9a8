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

Mask = npt.NDArray[np.bool_]

CHUNK = 48
"""Slices filtered at once: temporaries are a tenth of a long volume."""
FULL_SHARE = 0.75
"""Limit of 4g, as a share of τ, where it is not given: what the network judges, at or above τ, must pass with
some fainter voxels in it. For T = -700 HU that is 0.083, where phantoms are best (docs/results.md)."""
EXACT = 2.0**40
"""Intensities are rounded to multiples of 1 / EXACT, which moves those below 1.5e-5 alone: their sums have no
rounding in float64, so that no chunk or device can change a mean."""


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
    image, lung_mask, healthy
        As in `postprocess`.
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
    lung_mask, healthy : (Z, Y, X) bool arrays or tensors
        Lungs with lesions; what the models voted healthy.
    config : PostprocessConfig, optional
        The paper's where omitted.

    Returns
    -------
    Lesions
        Inside the lungs and inside 4g.

    Raises
    ------
    TypeError
        NumPy arrays and tensors are mixed, or there is another kind.
    ValueError
        Shapes differ or are not 3-D, or a dtype is not the one above.

    Notes
    -----
    4e is where the mean of 4d over `bright_size` voxels exceeds `bright_threshold`, 4g the same of 4f with
    `full_threshold`, or the paper's 0.15 where that is below `FULL_SHARE` of τ. The filters see zeros outside
    the lung. Growing takes `growth_iterations` steps from 4e inside 4g and never crosses a gap in 4g.
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
    """
    config = config or PostprocessConfig()
    zeros_like = _library(lung_mask).zeros_like
    final, core = zeros_like(lung_mask), zeros_like(lung_mask)
    if not lung_mask.any():
        return Lesions(final, core)
    margin = max(config.bright_size, config.full_size)
    box = _box(lung_mask, margin)
    seed, room = core[box], zeros_like(lung_mask[box])
    tau = ls.threshold(PAPER_THRESHOLD_HU if config.threshold_hu is None else config.threshold_hu)
    full_threshold = config.full_threshold
    if full_threshold is None:
        full_threshold = min(PAPER_FULL_THRESHOLD, FULL_SHARE * tau)
    bottom, top = box[0].start, box[0].stop
    for first in range(bottom, top, chunk):
        last = min(first + chunk, top)
        # reflections at a chunk's ends stay within its margin; the box's own ends reflect zeros
        wide = slice(max(first - margin, bottom), min(last + margin, top))
        part = (wide, *box[1:])
        image, lungs = read(wide.start, wide.stop)[:, box[1], box[2]], lung_mask[part]
        bright, full = raw_lesions(image, lungs, healthy[part], tau)
        full = _library(full).round(full * EXACT) / EXACT
        inner, at = slice(first - wide.start, last - wide.start), slice(first - bottom, last - bottom)
        room[at] = (_smooth(full, config.full_size, full_threshold) & lungs)[inner]
        seed[at] = _smooth(bright, config.bright_size, config.bright_threshold)[inner] & room[at]
    final[box] = seed
    if steps := config.growth_iterations:  # ops.grow, as SciPy, takes 0 for "until nothing changes"
        final[box] = ls.ops.grow(seed, room, iterations=steps, connectivity=config.connectivity)
    return Lesions(final, core)


def _smooth(volume: Any, size: int, threshold: float) -> Any:
    """Where the mean filter exceeds the threshold; both float32."""
    return ls.ops.uniform_filter(volume, size) > float(np.float32(threshold))


def _library(array: Any) -> Any:
    return torch if isinstance(array, torch.Tensor) else np


def _box(mask: Any, margin: int) -> tuple[slice, slice, slice]:
    """Bounding box with a margin, so that reflecting edges meet zeros as those of the whole volume would."""
    sides = []
    for axis, along in enumerate((mask.any(2).any(1), mask.any(2).any(0), mask.any(1).any(0))):
        used = np.flatnonzero(along.tolist())  # of arrays and tensors alike
        sides.append(slice(max(used[0] - margin, 0), min(used[-1] + 1 + margin, mask.shape[axis])))
    return sides[0], sides[1], sides[2]


def _check(image: Any, lung_mask: Any, healthy: Any) -> None:
    kind = torch.Tensor if isinstance(image, torch.Tensor) else np.ndarray
    given = {"image": (image, "float32"), "lung_mask": (lung_mask, "bool"), "healthy": (healthy, "bool")}
    for name, (array, dtype) in given.items():
        if not isinstance(array, kind):
            rule = "image, lung_mask and healthy must all be NumPy arrays or all torch tensors"
            raise TypeError(f"{rule}, {name} is {type(array).__name__}")
        if image.ndim != 3:
            raise ValueError(f"image must be (z, y, x), got shape {tuple(image.shape)}")
        if array.shape != image.shape:
            shape, got = tuple(image.shape), tuple(array.shape)
            raise ValueError(f"{name} must have the shape of image, {shape}, got {got}")
        if str(array.dtype).removeprefix("torch.") != dtype:
            raise ValueError(f"{name} must be {dtype}, got {array.dtype}")
