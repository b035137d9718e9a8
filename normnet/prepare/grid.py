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
        z, y, x = (max(1, round(n * s / t)) for n, s, t in zip(shape, source_spacing, spacing, strict=True))
        return cls(shape, source_spacing, spacing, (0, 0, 0), (z, y, x))

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
        """Cover a mask on the input's grid; a ValueError where it is empty or not 3-D.

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
        """
        if mask.ndim != 3:
            raise ValueError(f"mask must be 3-D (z, y, x), got shape {mask.shape}")
        boxes = ndimage.find_objects(mask.view(np.uint8))
        if not boxes:
            raise ValueError("mask must have at least one voxel, got an empty mask")
        full = cls.whole(mask.shape, source_spacing, spacing)
        sides = []
        for axis, side in enumerate(boxes[0]):
            ratio = source_spacing[axis] / spacing[axis]
            first, last = int(np.floor(side.start * ratio)) - margin, int(np.ceil(side.stop * ratio)) + margin
            if axis == 0:
                first, last = max(first, 0), min(last, full.shape[0])
            elif size is not None:
                first = (first + last) // 2 - size // 2
                last = first + size
            sides.append((first, max(last - first, 1)))
        start, shape = zip(*sides, strict=True)
        return cls(full.source_shape, source_spacing, spacing, start, shape)

    def source_positions(self, axis: int) -> npt.NDArray[np.float64]:
        """Where the window's voxels lie along an axis, in voxels of the input."""
        k = np.arange(self.start[axis], self.start[axis] + self.shape[axis])
        return np.asarray((k + 0.5) * (self.spacing[axis] / self.source_spacing[axis]) - 0.5)

    def window_positions(self, axis: int) -> npt.NDArray[np.float64]:
        """Where the input's voxels lie along an axis, in voxels of the window."""
        i, ratio = np.arange(self.source_shape[axis]), self.source_spacing[axis] / self.spacing[axis]
        return np.asarray((i + 0.5) * ratio - 0.5 - self.start[axis])

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
        """
        if volume.shape != self.source_shape:
            raise ValueError(f"volume must have shape {self.source_shape}, got {volume.shape}")
        if fill is None:
            fill = AIR_HU if volume.dtype.kind == "i" else 0
        return _resample(volume, [self.source_positions(axis) for axis in range(3)], fill)

    def to_native(self, array: npt.NDArray[Any], fill: float = 0) -> npt.NDArray[Any]:
        """Bring an array on the window back to the input's grid; `fill` outside the window.

        bool by the nearest voxel, numbers linearly; shape and dtype rules as `to_iso`.
        """
        if array.shape != self.shape:
            raise ValueError(f"array must have shape {self.shape}, got {array.shape}")
        return _resample(array, [self.window_positions(axis) for axis in range(3)], fill)


def _resample(
    volume: npt.NDArray[Any], positions: list[npt.NDArray[np.float64]], fill: float
) -> npt.NDArray[Any]:
    out = np.full([at.size for at in positions], fill, volume.dtype)
    # a voxel reaches half its width beyond its centre: farther out there is nothing
    known = [
        np.flatnonzero((at >= -0.5) & (at < n - 0.5)) for at, n in zip(positions, volume.shape, strict=True)
    ]
    if not all(k.size for k in known):
        return out
    cut = [at[k] for at, k in zip(positions, known, strict=True)]
    inside = out[tuple(slice(k[0], k[-1] + 1) for k in known)]
    if volume.dtype.kind == "b":
        # the epsilon settles ties downwards, whatever the rounding of the positions
        inside[...] = volume[np.ix_(*(np.ceil(at - 0.5 - 1e-9).astype(np.intp).clip(0) for at in cut))]
    else:
        for first in range(0, len(inside), CHUNK):  # no whole volume turns float32
            part = slice(first, first + CHUNK)
            values = linear(volume, [cut[0][part], *cut[1:]])
            inside[part] = values if volume.dtype.kind == "f" else np.rint(values, out=values)
    return out


def check_spacing(spacing: Spacing) -> None:
    """Raise `ValueError` unless these are voxel sizes."""
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing must be three positive lengths in mm, got {spacing}")


def linear(volume: npt.NDArray[Any], positions: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float32]:
    """Interpolate at ascending positions along each axis; what lies beyond an end has its value.

    SciPy's ``affine_transform`` and SimpleITK do the same, and take five times as long.
    """
    at = [where.clip(0, n - 1) for where, n in zip(positions, volume.shape, strict=True)]
    first = int(at[0][0])
    at[0] -= first
    out = volume[first : first + int(np.ceil(at[0][-1])) + 1]
    for axis in sorted(range(3), key=lambda a: at[a].size / out.shape[a]):  # what shrinks is done first
        low = at[axis].astype(np.intp)
        below = out.take(low, axis).astype(np.float32, copy=False)
        out = out.take(np.minimum(low + 1, out.shape[axis] - 1), axis).astype(np.float32, copy=False)
        out -= below
        out *= np.expand_dims((at[axis] - low).astype(np.float32), [a for a in range(3) if a != axis])
        out += below
    return out
