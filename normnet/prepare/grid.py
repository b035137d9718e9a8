"""Bring a CT to the working grid around its lungs, and results on that grid back to the input's own.

PAPER.md IV-B: one orientation, 0.8 x 0.8 x 1 mm, lungs centred and padded. Orientation is `lesionsynth.io`'s
part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lesionsynth.io import AIR_HU

Mask = npt.NDArray[np.bool_]
Spacing = tuple[float, float, float]
Index = tuple[int, int, int]
Taps = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]
CHUNK = 32
"""Slices interpolated at once."""


@dataclass(frozen=True)
class IsoGrid:
    """A window of the resampled volume.

    The resampled volume fills the same space as the input: voxel ``k`` of an axis lies at
    ``(k + 0.5) * spacing / source_spacing - 0.5`` of the input's voxels.

    Attributes
    ----------
    source_shape, source_spacing : 3-tuples
        The input's (z, y, x) shape and voxel size in mm.
    spacing : 3-tuple
        Voxel size of the working grid in mm.
    start, shape : 3-tuples of int
        First voxel of the window and its size; the window may reach beyond the volume (padding).
    """

    source_shape: Index
    source_spacing: Spacing
    spacing: Spacing
    start: Index
    shape: Index

    @classmethod
    def whole(cls, shape: Index, source_spacing: Spacing, spacing: Spacing) -> IsoGrid:
        """Cover the whole input."""
        lengths = [max(1, round(n * s / t)) for n, s, t in zip(shape, source_spacing, spacing, strict=True)]
        return cls(shape, source_spacing, spacing, (0, 0, 0), (lengths[0], lengths[1], lengths[2]))

    @classmethod
    def around(
        cls,
        mask: Mask,
        source_spacing: Spacing,
        spacing: Spacing,
        *,
        margin: int = 0,
        size: int | None = None,
    ) -> IsoGrid:
        """Cover a mask on the input's grid.

        Parameters
        ----------
        mask : (Z, Y, X) bool array
            The lungs on the input's grid.
        source_spacing, spacing : (3,) floats
            mm, of the input and of the working grid.
        margin : int
            Voxels of the working grid added on each side, as far as the input reaches in z.
        size : int, optional
            In-plane size: the mask's box is centred in a square of this many voxels, which pads or crops.

        Raises
        ------
        ValueError
            The mask is empty or not 3-D.
        """
        if mask.ndim != 3:
            raise ValueError(f"mask must be 3-D (z, y, x), got shape {mask.shape}")
        box = bounding_box(mask)
        if box is None:
            raise ValueError("mask must have at least one voxel, got an empty mask")
        shape = (mask.shape[0], mask.shape[1], mask.shape[2])
        full = cls.whole(shape, source_spacing, spacing)
        starts, lengths = [], []
        for axis, side in enumerate(box):
            ratio = source_spacing[axis] / spacing[axis]
            first, last = int(np.floor(side.start * ratio)) - margin, int(np.ceil(side.stop * ratio)) + margin
            if axis == 0:
                first, last = max(first, 0), min(last, full.shape[0])
            elif size is not None:
                first = (first + last) // 2 - size // 2
                last = first + size
            starts.append(first)
            lengths.append(max(last - first, 1))
        return cls(
            shape,
            source_spacing,
            spacing,
            (starts[0], starts[1], starts[2]),
            (lengths[0], lengths[1], lengths[2]),
        )

    def source_positions(self, axis: int) -> npt.NDArray[np.float64]:
        """Where the window's voxels lie along an axis, in voxels of the input."""
        k = np.arange(self.start[axis], self.start[axis] + self.shape[axis])
        ratio = self.spacing[axis] / self.source_spacing[axis]
        return np.asarray((k + 0.5) * ratio - 0.5, np.float64)

    def window_positions(self, axis: int) -> npt.NDArray[np.float64]:
        """Where the input's voxels lie along an axis, in voxels of the window."""
        i = np.arange(self.source_shape[axis])
        ratio = self.source_spacing[axis] / self.spacing[axis]
        return np.asarray((i + 0.5) * ratio - 0.5 - self.start[axis], np.float64)

    def to_iso(self, volume: npt.NDArray[Any], fill: float | None = None) -> npt.NDArray[Any]:
        """Resample from the input's grid: bool by the nearest voxel, numbers linearly.

        Parameters
        ----------
        volume : (Z, Y, X) array
            On the input's grid; HU (integers are rounded), floats or a mask.
        fill : float, optional
            Value outside the input; -1024 HU for integers, else zero.

        Returns
        -------
        array of shape `shape`
            Of the dtype of `volume`.

        Raises
        ------
        ValueError
            The shape is not `source_shape`.
        """
        _check_shape("volume", volume, self.source_shape)
        if fill is None:
            fill = AIR_HU if volume.dtype.kind == "i" else 0
        return _resample(volume, [self.source_positions(axis) for axis in range(3)], fill)

    def to_native(self, array: npt.NDArray[Any], fill: float = 0) -> npt.NDArray[Any]:
        """Bring an array on the window back to the input's grid; `fill` outside the window.

        bool by the nearest voxel, numbers linearly; shape and dtype rules as `to_iso`.
        """
        _check_shape("array", array, self.shape)
        return _resample(array, [self.window_positions(axis) for axis in range(3)], fill)


def bounding_box(mask: Mask) -> tuple[slice, slice, slice] | None:
    """Smallest box around the mask, or None where it is empty."""
    boxes = ndimage.find_objects(mask.view(np.uint8))
    return (boxes[0][0], boxes[0][1], boxes[0][2]) if boxes else None


def _check_shape(name: str, array: npt.NDArray[Any], shape: Index) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def _resample(
    volume: npt.NDArray[Any], positions: list[npt.NDArray[np.float64]], fill: float
) -> npt.NDArray[Any]:
    out = np.full([p.size for p in positions], fill, volume.dtype)
    # a voxel reaches half its width beyond its centre: farther out there is nothing
    known = [(p >= -0.5) & (p < n - 0.5) for p, n in zip(positions, volume.shape, strict=True)]
    if not all(k.any() for k in known):
        return out
    cut = [p[k] for p, k in zip(positions, known, strict=True)]
    # what is known is one run along each axis
    inside = out[tuple(slice(int(np.argmax(k)), int(np.argmax(k)) + int(k.sum())) for k in known)]
    if volume.dtype.kind == "b":
        # the epsilon settles ties downwards, whatever the rounding of the positions
        nearest = [
            np.ceil(p - 0.5 - 1e-9).astype(np.intp).clip(0, n - 1)
            for p, n in zip(cut, volume.shape, strict=True)
        ]
        inside[...] = volume[np.ix_(*nearest)]
    else:
        _interpolate(volume, cut, inside)
    return out


def _interpolate(
    volume: npt.NDArray[Any], positions: list[npt.NDArray[np.float64]], out: npt.NDArray[Any]
) -> None:
    """Fill `out` linearly, integers rounded; in chunks of slices, so that no whole volume turns float32."""
    taps = [_taps(at, n) for at, n in zip(positions, volume.shape, strict=True)]
    order = sorted(range(3), key=lambda axis: positions[axis].size / volume.shape[axis])  # shrink first
    low, high, weight = taps[0]
    for first in range(0, len(out), CHUNK):
        part = slice(first, first + CHUNK)
        bottom, top = int(low[part].min()), int(high[part].max()) + 1
        here = [(low[part] - bottom, high[part] - bottom, weight[part]), *taps[1:]]
        values = _linear(volume[bottom:top], here, order)
        out[part] = np.rint(values, out=values) if volume.dtype.kind in "iu" else values


def _taps(positions: npt.NDArray[np.float64], n: int) -> Taps:
    """Neighbours of positions along an axis of n voxels, and the weight of the upper one."""
    at = positions.clip(0, n - 1)
    low = np.minimum(at.astype(np.intp), max(n - 2, 0))
    return low, np.minimum(low + 1, n - 1), (at - low).astype(np.float32)


def linear(volume: npt.NDArray[Any], positions: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float32]:
    """Interpolate a small volume at many positions along each axis; what lies beyond an end is its value."""
    taps = [_taps(at, n) for at, n in zip(positions, volume.shape, strict=True)]
    return _linear(volume, taps, [1, 2, 0])


def _linear(volume: npt.NDArray[Any], taps: list[Taps], order: list[int]) -> npt.NDArray[np.float32]:
    out = volume
    for axis in order:
        low, high, weight = taps[axis]
        below = np.take(out, low, axis).astype(np.float32, copy=False)
        above = np.take(out, high, axis).astype(np.float32, copy=False)
        above -= below
        above *= weight.reshape([-1 if a == axis else 1 for a in range(3)])
        above += below
        out = above
    return out.astype(np.float32, copy=False)
