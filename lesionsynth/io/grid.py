"""Where the voxels of a file lie, and how its axes map to LPS order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Grid:
    """Where a file's voxels lie, and how its axes map to LPS order.

    Attributes
    ----------
    size, spacing, origin : 3-tuples
        Of the file, axis order (x, y, z) of the file; mm, LPS coordinates.
    direction : 9-tuple of floats
        ITK direction cosines, row-major.
    axes : 3-tuple of int
        ``file_array.transpose(axes)`` has its axes nearest to S, P, L.
    flips : 3-tuple of bool
        Axes (after the transposition) that run against S, P or L.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @classmethod
    def of(
        cls,
        size: Sequence[int],
        spacing: Sequence[float],
        origin: Sequence[float],
        direction: Sequence[float],
    ) -> Grid:
        """Work out the axis map of a file's geometry (oblique grids take the nearest axes)."""
        cosines = np.asarray(direction, float).reshape(3, 3)
        # column i: where file axis i (x, y, z) points; choose the assignment that keeps most of the cosines
        best = max(
            itertools.permutations(range(3)), key=lambda p: sum(abs(cosines[w, p[w]]) for w in range(3))
        )
        axes = tuple(2 - best[world] for world in (2, 1, 0))
        flips = tuple(bool(cosines[world, best[world]] < 0) for world in (2, 1, 0))
        return cls(
            _three(size, int),
            _three(spacing, float),
            _three(origin, float),
            tuple(float(v) for v in direction),
            (axes[0], axes[1], axes[2]),
            (flips[0], flips[1], flips[2]),
        )

    @property
    def lps_spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm in (z, y, x) LPS order."""
        return _three([self.spacing[2 - axis] for axis in self.axes], float)

    def to_lps(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Bring an array in the file's (z, y, x) order to LPS order (a contiguous copy)."""
        # always a copy: the array may be a view of a SimpleITK image that is about to be freed
        return np.array(array.transpose(self.axes)[self._flipped], order="C")

    def from_lps(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Inverse of `to_lps`."""
        return np.ascontiguousarray(self.as_stored(array))

    def as_stored(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """View an array in LPS order in that of the file."""
        return array[self._flipped].transpose(np.argsort(self.axes))

    @property
    def _flipped(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)

    def corners(self) -> npt.NDArray[np.float64]:
        """World positions (8, 3) in mm of the corner voxels, in LPS index order of the corners."""
        last = np.array(self.size, float) - 1
        ends = np.array(list(itertools.product((0.0, 1.0), repeat=3)))  # S, P, L: far end or near end
        index = np.empty_like(ends)
        for place, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            index[:, 2 - axis] = (1 - ends[:, place] if flip else ends[:, place]) * last[2 - axis]
        cosines = np.array(self.direction).reshape(3, 3)
        return np.asarray(np.array(self.origin) + (index * np.array(self.spacing)) @ cosines.T)


def _three(values: Sequence[Any], kind: Any) -> tuple[Any, Any, Any]:
    a, b, c = values
    return kind(a), kind(b), kind(c)
