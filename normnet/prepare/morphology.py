"""Morphology with balls in millimetres, mostly through distance transforms (any radius costs the same)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Spacing = tuple[float, float, float]


def within(mask: Mask, radius_mm: float, spacing: Spacing) -> Mask:
    """Dilate: voxels at most `radius_mm` from the mask."""
    if not mask.any():
        return mask.copy()
    near: Mask = ndimage.distance_transform_edt(~mask, sampling=spacing) <= radius_mm
    return near


def inside(mask: Mask, radius_mm: float, spacing: Spacing) -> Mask:
    """Erode: voxels of the mask more than `radius_mm` from its outside; beyond the volume is not outside."""
    if mask.all():
        return mask.copy()
    deep: Mask = ndimage.distance_transform_edt(mask, sampling=spacing) > radius_mm
    return deep


def opened(mask: Mask, radius_mm: float, spacing: Spacing) -> Mask:
    """Open with a ball: what is thinner than twice the radius vanishes."""
    return within(inside(mask, radius_mm, spacing), radius_mm, spacing)


def closed(mask: Mask, radius_mm: float, spacing: Spacing) -> Mask:
    """Close with a ball: gaps narrower than twice the radius are filled. Works in the mask's bounding box."""
    box = bounding_box(mask)
    if box is None:
        return mask.copy()
    pad = [int(np.ceil(radius_mm / s)) + 1 for s in spacing]
    tight = np.pad(mask[box], [(p, p) for p in pad])
    filled = inside(within(tight, radius_mm, spacing), radius_mm, spacing)
    out = mask.copy()
    out[box] |= filled[tuple(slice(p, n - p) for p, n in zip(pad, filled.shape, strict=True))]
    return out


def plane_dilated(mask: Mask, radius_mm: float, spacing: Spacing) -> Mask:
    """Dilate every axial slice with a disc; for small radii (the cost grows with the disc's area)."""
    out = mask.copy()
    for dy, dx in _disc(radius_mm, spacing):
        target, source = _shifted(dy, dx)
        out[target] |= mask[source]
    return out


def plane_eroded(mask: Mask, radius_mm: float, spacing: Spacing) -> Mask:
    """Erode every axial slice with a disc; beyond the slice is not outside."""
    out = mask.copy()
    for dy, dx in _disc(radius_mm, spacing):
        target, source = _shifted(dy, dx)
        out[target] &= mask[source]
    return out


def plane_opened(mask: Mask, radius_mm: float, spacing: Spacing) -> Mask:
    """Open every axial slice with a disc."""
    return plane_dilated(plane_eroded(mask, radius_mm, spacing), radius_mm, spacing)


def _disc(radius_mm: float, spacing: Spacing) -> list[tuple[int, int]]:
    ny, nx = int(radius_mm / spacing[1]), int(radius_mm / spacing[2])
    return [
        (dy, dx)
        for dy in range(-ny, ny + 1)
        for dx in range(-nx, nx + 1)
        if (dy or dx) and (dy * spacing[1]) ** 2 + (dx * spacing[2]) ** 2 <= radius_mm**2
    ]


def _shifted(dy: int, dx: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    def pair(d: int) -> tuple[slice, slice]:
        return slice(max(-d, 0), -d if d > 0 else None), slice(max(d, 0), d if d < 0 else None)

    (ty, sy), (tx, sx) = pair(dy), pair(dx)
    return (slice(None), ty, tx), (slice(None), sy, sx)


def largest(mask: Mask) -> Mask:
    """Keep the largest component (faces connect); all False where there is none."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask.copy()
    sizes = component_sizes(labels, count)
    sizes[0] = 0
    kept: Mask = labels == int(sizes.argmax())
    return kept


def component_sizes(labels: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """Voxels of the labels 0 ... count; by slices, as counting a whole volume takes 8 bytes a voxel."""
    sizes = np.zeros(count + 1, np.int64)
    for first in range(0, len(labels), 32):
        sizes += np.bincount(labels[first : first + 32].ravel(), minlength=count + 1)
    return sizes


def fill_slices(mask: Mask, max_voxels: int | None = None) -> Mask:
    """Fill the holes of every axial slice; with `max_voxels`, only those of at most so many voxels."""
    # faces within the slice only: background that does not reach the slice's border is a hole
    plane = np.zeros((3, 3, 3), bool)
    plane[1] = ndimage.generate_binary_structure(2, 1)
    labels, count = ndimage.label(~mask, plane)
    stays = np.zeros(count + 1, bool)
    if max_voxels is not None:
        stays = component_sizes(labels, count) > max_voxels
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        stays[np.unique(edge)] = True
    stays[0] = False
    filled: Mask = ~stays[labels]
    return filled


def fill_enclosed(mask: Mask) -> Mask:
    """Fill what the mask encloses on all sides; the first and the last slice enclose nothing."""
    labels, count = ndimage.label(~mask)
    stays = np.zeros(count + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        stays[np.unique(edge)] = True
    stays[0] = False
    filled: Mask = ~stays[labels]
    return filled


def bounding_box(mask: Mask) -> tuple[slice, slice, slice] | None:
    """Smallest box around the mask, or None where it is empty."""
    spans = []
    for axes in ((1, 2), (0, 2), (0, 1)):
        used = np.flatnonzero(mask.any(axis=axes))
        if used.size == 0:
            return None
        spans.append(slice(int(used[0]), int(used[-1]) + 1))
    return spans[0], spans[1], spans[2]


def block_mean(volume: npt.NDArray[Any], factors: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Mean over blocks of `factors` voxels (z, y, x); the edge is repeated where the shape is no multiple."""
    out = np.empty([-(-n // f) for n, f in zip(volume.shape, factors, strict=True)], np.float32)
    for first in range(0, len(out), 16):  # by slices: sums along z alone would take the volume as floats
        last = first + 16
        out[first:last] = _block_mean(volume[first * factors[0] : last * factors[0]], factors)
    return out


def _block_mean(volume: npt.NDArray[Any], factors: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    out = np.pad(volume, [(0, -n % f) for n, f in zip(volume.shape, factors, strict=True)], mode="edge")
    for axis, factor in enumerate(factors):
        if factor > 1:
            shape = (*out.shape[:axis], out.shape[axis] // factor, factor, *out.shape[axis + 1 :])
            out = out.reshape(shape).mean(axis=axis + 1, dtype=np.float32)
    return out.astype(np.float32, copy=False)


def spread(
    coarse: npt.NDArray[np.float32],
    factors: tuple[int, int, int],
    shape: tuple[int, ...],
    slices: tuple[int, int] | None = None,
) -> npt.NDArray[np.float32]:
    """Bring a field on the grid of `block_mean` to the fine grid by linear interpolation.

    `shape` is that of the fine grid. With `slices`, only its slices first ... last - 1 are worked out.
    """
    low, high, weight = _taps(factors[0], coarse.shape[0], shape[0])
    first, last = slices or (0, shape[0])
    same = factors[0] == 1 and coarse.shape[0] == shape[0]
    bottom, top = (first, last) if same else (int(low[first]), int(high[last - 1]) + 1)
    out = coarse[bottom:top]
    for axis in (1, 2):  # in plane first: the slices in between are the larger array
        if factors[axis] > 1 or out.shape[axis] != shape[axis]:
            out = _stretch(out, axis, *_taps(factors[axis], out.shape[axis], shape[axis]))
    part = slice(first, last)
    return out if same else _stretch(out, 0, low[part] - bottom, high[part] - bottom, weight[part])


def _taps(
    factor: int, n: int, length: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Coarse neighbours of every fine voxel along an axis, and the weight of the upper one."""
    position = np.clip((np.arange(length) + 0.5) / factor - 0.5, 0, n - 1)
    low = np.minimum(position.astype(np.intp), max(n - 2, 0))
    return low, np.minimum(low + 1, n - 1), (position - low).astype(np.float32)


def _stretch(
    field: npt.NDArray[np.float32],
    axis: int,
    low: npt.NDArray[np.intp],
    high: npt.NDArray[np.intp],
    weight: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    below = np.take(field, low, axis)
    stretched: npt.NDArray[np.float32] = np.take(field, high, axis)
    stretched -= below  # in place: on the fine grid each of these is the largest array of a segmentation
    stretched *= weight.reshape([-1 if a == axis else 1 for a in range(field.ndim)])
    stretched += below
    return stretched
