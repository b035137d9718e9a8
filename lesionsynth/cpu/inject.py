"""Stage 4: the pair (PAPER.md eq. 1 and 9), exactly.

A = max(H, B_j) in G_j and H elsewhere; GT = (H >= tau) & ~G.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lesionsynth.cpu._threads import parallel_for

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def base_pair(
    image: npt.NDArray[Any], labels: npt.NDArray[np.int32], tau: float, threads: int | None = None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Copy H and compute the target, refusing voxels outside [0, 1] on the way.

    Parameters
    ----------
    image : (z, y, x) float32 or float64 array
        Healthy image H.
    labels : (z, y, x) int32 array
        Lesions; 0 is background.
    tau : float
        Threshold, compared in the dtype of `image`.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    image : array
        A copy of H.
    target : (z, y, x) bool array
        GT.

    Raises
    ------
    ValueError
        A voxel is NaN, infinite or outside [0, 1].
    """
    out = np.empty(image.shape, dtype=image.dtype)
    target = np.empty(image.shape, dtype=np.bool_)
    bad = np.zeros(image.shape[0], dtype=np.int64)
    level = image.dtype.type(tau)
    parallel_for(
        image.shape[0],
        lambda lo, hi: _copy_and_threshold(image, labels, out, target, level, bad, lo, hi),
        threads,
    )
    if bad.any():
        _explain(image)
    return out, target


def inject(
    out: npt.NDArray[Any],
    texture: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int32],
    label: int,
    box: Box,
) -> None:
    """Put one lesion in: out = max(out, texture) where ``labels == label`` in `box`, in place (eq. 9)."""
    region = tuple(slice(a, b) for a, b in box)
    _maximum(out[region], texture, labels[region], label)


def lesion_box(labels: npt.NDArray[np.int32], label: int, within: Box) -> Box:
    """Return the tight bounding box of ``labels == label``, known to lie within a larger box."""
    bounds = np.array([[b, a] for a, b in within], dtype=np.int64)
    _tighten(labels, label, np.array([[a, b] for a, b in within], dtype=np.int64), bounds)
    (z0, z1), (y0, y1), (x0, x1) = bounds.tolist()
    return (z0, z1), (y0, y1), (x0, x1)


def _explain(image: npt.NDArray[Any]) -> None:
    finite = np.isfinite(image)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(f"image must be finite, got {image[where]} at voxel {where}")
    low, high = float(image.min()), float(image.max())
    hint = "; for Hounsfield units use lesionsynth.window_hu first" if low < -1.5 or high > 1.5 else ""
    raise ValueError(f"image must be in [0, 1], got values from {low:g} to {high:g}{hint}")


@numba.njit(nogil=True, cache=True)
def _copy_and_threshold(
    image: Any, labels: Any, out: Any, target: Any, level: Any, bad: Any, lo: int, hi: int
) -> None:
    _, height, width = image.shape
    for z in range(lo, hi):
        count = 0
        for y in range(height):
            for x in range(width):
                value = image[z, y, x]
                out[z, y, x] = value
                target[z, y, x] = (value >= level) & (labels[z, y, x] == 0)
                count += not ((value >= 0) & (value <= 1))  # NaN fails both
        bad[z] = count


@numba.njit(nogil=True, cache=True)
def _maximum(out: Any, texture: Any, labels: Any, label: int) -> None:
    depth, height, width = texture.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                if labels[z, y, x] == label and texture[z, y, x] > out[z, y, x]:
                    out[z, y, x] = texture[z, y, x]


@numba.njit(nogil=True, cache=True)
def _tighten(labels: Any, label: int, within: Any, bounds: Any) -> None:
    for z in range(within[0, 0], within[0, 1]):
        for y in range(within[1, 0], within[1, 1]):
            for x in range(within[2, 0], within[2, 1]):
                if labels[z, y, x] == label:
                    bounds[0, 0], bounds[0, 1] = min(bounds[0, 0], z), max(bounds[0, 1], z + 1)
                    bounds[1, 0], bounds[1, 1] = min(bounds[1, 0], y), max(bounds[1, 1], y + 1)
                    bounds[2, 0], bounds[2, 1] = min(bounds[2, 0], x), max(bounds[2, 1], x + 1)
