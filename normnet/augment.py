"""Vary the healthy anatomy that lesions are put into: pose, size, mask, inflation, kernel, noise, HU.

The paper has 453 healthy volumes and no such step. A few volumes show few ways to breathe in, to lie and to
reconstruct; what a network has never seen healthy it calls a lesion. All of it happens to raw HU before there
are lesions, so that none of it tells the two apart.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

import lesionsynth as ls
from normnet.config import AugmentConfig

Array = Any
"""A NumPy array or a torch tensor."""

AUGMENT_STREAM, NOISE_STREAM = 65, 66
"""Philox streams of the draws and of the noise; see `normnet.data.SLAB_STREAM`."""
AIR = -1024
"""HU outside a volume."""
GRAIN = 0.7
"""Standard deviation in voxels of the filter that correlates the noise in plane, as a reconstruction does."""


class Variation:
    """What happens to one sample: a function of (seed, index).

    Parameters
    ----------
    config : AugmentConfig
        Bounds.
    seed, index : int
        Of the run and of the sample.
    """

    def __init__(self, config: AugmentConfig, seed: int, index: int) -> None:
        u = ls.ops.philox_uniform((1, 1, 9), seed, stream=AUGMENT_STREAM, sample=index).ravel().astype(float)
        signed = 2 * u - 1
        self.angle = math.radians(config.rotate) * float(signed[0])
        self.zoom = (1 + config.zoom) ** float(signed[1])
        self.deflation = config.deflation * float(u[2])
        self.dependent = config.dependent * float(u[3])
        self.blur = config.blur * float(u[4])
        self.noise = config.noise * float(u[5])
        self.offset = config.offset * float(signed[6])
        self.gain = config.gain * float(signed[7])
        self.border = int((2 * config.border + 1) * u[8]) - config.border
        self._seed, self._index = seed, index

    @property
    def moves(self) -> bool:
        """Whether the anatomy is turned or scaled."""
        return self.angle != 0 or self.zoom != 1

    def move(self, hu: Array, mask: Array, window: tuple[slice, slice]) -> tuple[Array, Array]:
        """Cut a window out of slices that are turned and scaled about its centre.

        Parameters
        ----------
        hu : (z, Y, X) int16 array or tensor
            Whole slices.
        mask : (z, Y, X) bool array or tensor
            Lungs.
        window : (rows, columns)
            In plane.

        Returns
        -------
        hu : (z, y, x) int16 array or tensor
            Linearly interpolated; `AIR` from outside the slices.
        mask : (z, y, x) bool array or tensor
            Of the nearest voxel.
        """
        sizes = [s.stop - s.start for s in window]
        middle = [(s.start + s.stop - 1) / 2 for s in window]
        cos, sin = math.cos(self.angle) / self.zoom, math.sin(self.angle) / self.zoom
        half = [(n - 1) / 2 for n in sizes]
        reach = (abs(cos) * half[0] + abs(sin) * half[1], abs(sin) * half[0] + abs(cos) * half[1])
        box = tuple(
            slice(max(math.floor(c - r) - 1, 0), min(math.ceil(c + r) + 2, n))
            for c, r, n in zip(middle, reach, mask.shape[1:], strict=True)
        )
        values, lungs = (torch.as_tensor(a[(slice(None), *box)]) for a in (hu, mask))
        y, x = (
            torch.arange(n, device=values.device, dtype=torch.float32) - h
            for n, h in zip(sizes, half, strict=True)
        )
        rows = cos * y[:, None] - sin * x[None, :] + (middle[0] - box[0].start)
        columns = sin * y[:, None] + cos * x[None, :] + (middle[1] - box[1].start)
        height, width = values.shape[1:]
        # grid_sample counts from -1 to 1 between the centres of the outer voxels, x before y
        grid = torch.stack([2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], dim=-1)
        moved = _sample(values.float() - AIR, grid, "bilinear") + AIR
        kept = _sample(lungs.float(), grid, "nearest") > 0.5
        return _as(hu, moved.round().to(torch.int16)), _as(mask, kept)

    def edge(self, mask: Array) -> Array:
        """Shrink or grow the lungs in plane, by squares.

        Parameters
        ----------
        mask : (z, y, x) bool array or tensor
            Lungs. Not modified.

        Returns
        -------
        (z, y, x) bool array or tensor
            `mask` itself where nothing would be left of it.
        """
        if not self.border:
            return mask
        size = 2 * abs(self.border) + 1
        lungs = torch.as_tensor(mask)
        part = (lungs if self.border > 0 else ~lungs).float()[:, None]
        reached = functional.max_pool2d(part, size, stride=1, padding=size // 2)[:, 0] > 0
        found = reached if self.border > 0 else ~reached
        return _as(mask, found) if found.any() else mask

    def change(self, hu: Array, mask: Array) -> Array:
        """Vary inflation, kernel, noise and calibration.

        Parameters
        ----------
        hu : (z, y, x) int16 array or tensor
            Hounsfield units. Not modified.
        mask : (z, y, x) bool array or tensor
            Lungs.

        Returns
        -------
        (z, y, x) int16 array or tensor

        Notes
        -----
        Less air in the lungs scales HU towards 0, water: ``hu (1 - k)``, where k grows towards the back, as
        in dependent lung. Vessels stay what they are.
        """
        values, lungs = torch.as_tensor(hu).float(), torch.as_tensor(mask)
        if self.deflation or self.dependent:
            k = self.deflation + self.dependent * self._depth(lungs)
            values = torch.where(lungs & (values < 0), values * (1 - k[:, None]), values)
        if self.blur > 0:
            values = torch.as_tensor(ls.ops.gaussian_filter(values, (0.0, self.blur, self.blur), threads=1))
        if self.noise > 0:
            values = values + self.noise * self._grain(values)
        if self.gain:
            values = (values + 1000.0) * (1 + self.gain) - 1000.0
        if self.offset:
            values = values + self.offset
        return _as(hu, values.round().clamp(AIR, 3071).to(torch.int16))

    @staticmethod
    def _depth(lungs: torch.Tensor) -> torch.Tensor:
        """0 at the front of the lungs to 1 at their back, for every row; steeper towards the back."""
        rows = torch.arange(lungs.shape[1], device=lungs.device, dtype=torch.float32)
        used = lungs.any(dim=2).any(dim=0)
        front = torch.where(used, rows, torch.inf).amin()
        back = torch.where(used, rows, -torch.inf).amax()
        return ((rows - front) / (back - front).clamp(min=1)).clamp(0, 1).square()

    def _grain(self, like: torch.Tensor) -> torch.Tensor:
        """Noise of variance 1, correlated in plane."""
        white = torch.empty(like.shape, dtype=torch.float32, device=like.device)
        ls.ops.philox_uniform(
            tuple(like.shape), self._seed, stream=NOISE_STREAM, sample=self._index, threads=1, out=white
        )
        taps = np.exp(-0.5 * (np.arange(-3, 4) / GRAIN) ** 2)
        power = float((taps**2).sum() / taps.sum() ** 2)  # what a filter along one axis leaves of a variance
        grain = torch.as_tensor(ls.ops.gaussian_filter(white - 0.5, (0.0, GRAIN, GRAIN), threads=1))
        return grain * (math.sqrt(12.0) / power)


def _sample(planes: torch.Tensor, grid: torch.Tensor, mode: str) -> torch.Tensor:
    """Sample (z, Y, X) planes, all alike, at (y, x, 2) places; 0 outside."""
    return functional.grid_sample(
        planes[None], grid[None], mode=mode, padding_mode="zeros", align_corners=True
    )[0]


def _as(like: Array, tensor: torch.Tensor) -> Array:
    """`tensor` in the library of `like`."""
    return tensor.numpy() if isinstance(like, np.ndarray) else tensor
