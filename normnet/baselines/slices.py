"""Slices as the methods see them: windowed, the lungs alone, a square around them, shrunk (PAPER.md IV-C)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

import lesionsynth as ls
from normnet.baselines.config import BaselineConfig
from normnet.data import Volume

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Frame:
    """The square of a volume's slices that a method sees; the same in all of them.

    Attributes
    ----------
    rows, columns : (2,) ints
        First and after last; may reach beyond the slice, where it is 0.
    shape : (2,) ints
        Of a slice (Y, X).
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    shape: tuple[int, int]

    @classmethod
    def around(cls, mask: Mask, spacing: Sequence[float], field_mm: float) -> Frame:
        """Centre a square of side `field_mm` on the box of the lungs; the box's side where that is longer."""
        pixel = (float(spacing[1]), float(spacing[2]))
        rows, columns = _extent(mask, axis=1), _extent(mask, axis=2)
        widest = max((b - a) * p for (a, b), p in zip((rows, columns), pixel, strict=True))
        side = max(field_mm, widest)
        return cls(
            _centred(rows, side / pixel[0]),
            _centred(columns, side / pixel[1]),
            (mask.shape[1], mask.shape[2]),
        )

    def reduce(self, slices: npt.NDArray[np.float32], size: int) -> torch.Tensor:
        """Cut (n, Y, X) slices to the square and shrink them to (n, 1, size, size), smoothing as needed."""
        height, width = self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]
        square = np.zeros((len(slices), height, width), np.float32)
        inside, outside = self._overlap()
        square[:, *inside] = slices[:, *outside]
        image = torch.from_numpy(square)[:, None]
        return interpolate(image, (size, size), mode="bilinear", antialias=True, align_corners=False)

    def enlarge(self, maps: torch.Tensor) -> npt.NDArray[np.float32]:
        """Bring (n, 1, size, size) maps back to (n, Y, X), linearly; 0 outside the square."""
        shape = (self.rows[1] - self.rows[0], self.columns[1] - self.columns[0])
        square = interpolate(maps.cpu().float(), shape, mode="bilinear", align_corners=False)[:, 0].numpy()
        whole = np.zeros((len(square), *self.shape), np.float32)
        inside, outside = self._overlap()
        whole[:, *outside] = square[:, *inside]
        return whole

    def _overlap(self) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where square and slice overlap, in the square and in the slice."""
        pairs = []
        for (first, last), length in zip((self.rows, self.columns), self.shape, strict=True):
            low, high = max(first, 0), min(last, length)
            pairs.append((slice(low - first, high - first), slice(low, high)))
        return (pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1])


def windowed(hu: Any, mask: Mask, *, lungs_only: bool) -> npt.NDArray[np.float32]:
    """Scale HU to [0, 1] (PAPER.md IV-B.2) and keep the lungs, or everything."""
    image: npt.NDArray[np.float32] = ls.window_hu(hu)
    if lungs_only:
        image *= mask
    return image


def usable_slices(volume: Volume, min_lung_cm2: float) -> list[int]:
    """Return the slices within a volume's segments that show enough lung, at least one voxel."""
    _, height, width = volume.spacing
    area = volume.mask_counts * (height * width / 100)  # cm²
    inside = [z for first, last in volume.segments for z in range(first, last)]
    return [z for z in inside if area[z] >= min_lung_cm2 and area[z] > 0]


def training_slices(volumes: Sequence[Volume], config: BaselineConfig) -> torch.Tensor:
    """Return all usable slices, (n, 1, size, size) in half precision: half a HU, and half the memory.

    Raises
    ------
    ValueError
        There is none.
    """
    parts = []
    for volume in volumes:
        chosen = usable_slices(volume, config.min_lung_cm2)
        if not chosen:
            continue
        hu, mask = (np.asarray(array) for array in volume.slab(0, volume.shape[0]))
        frame = Frame.around(mask, volume.spacing, config.field_mm)
        images = windowed(hu[chosen], mask[chosen], lungs_only=config.lungs_only)
        parts.append(frame.reduce(images, config.size).half())
    if not parts:
        raise ValueError(
            f"data must hold slices with at least min_lung_cm2={config.min_lung_cm2:g} of lung, got none"
        )
    return torch.cat(parts)


def _extent(mask: Mask, axis: int) -> tuple[int, int]:
    others = tuple(other for other in range(3) if other != axis)
    places = np.flatnonzero(mask.any(axis=others))
    return int(places[0]), int(places[-1]) + 1


def _centred(extent: tuple[int, int], length: float) -> tuple[int, int]:
    side = max(1, round(length), extent[1] - extent[0])
    first = (extent[0] + extent[1] - side) // 2
    return first, first + side
