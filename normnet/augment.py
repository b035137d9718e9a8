"""Vary the healthy anatomy that lesions are put into: pose, size, mask, inflation, kernel, noise, HU.

The paper has 453 healthy volumes and no such step. A few volumes show few ways to breathe in, to lie and to
reconstruct; what a network has never seen healthy it calls a lesion. All of it happens to raw HU before there
are lesions, so that none of it tells the two apart.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as functional

import lesionsynth as ls
from normnet.config import AugmentConfig

AUGMENT_STREAM, NOISE_STREAM = 65, 66
"""Philox streams of the draws and of the noise; see `normnet.data.SLAB_STREAM`."""
AIR = -1024
"""HU outside a volume."""
GRAIN = 0.7
"""Standard deviation in voxels of the filter that correlates the noise in plane, as a reconstruction does."""

Window = tuple[slice, slice]


class Variation:
    """What happens to one sample: amounts up to those of `config`, a function of (seed, index)."""

    def __init__(self, config: AugmentConfig, seed: int, index: int) -> None:
        self._seed, self._index = seed, index
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

    def apply(
        self, hu: torch.Tensor, mask: torch.Tensor, window: Window
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut a window out of slices that are varied.

        Parameters
        ----------
        hu : (z, Y, X) int16 tensor
            Hounsfield units of whole slices. Not modified.
        mask : (z, Y, X) bool tensor
            Lungs. Not modified.
        window : (rows, columns)
            In plane; the slices turn and scale about its centre.

        Returns
        -------
        hu : (z, y, x) int16 tensor
            Linearly interpolated; `AIR` from outside the slices.
        mask : (z, y, x) bool tensor
            Of the nearest voxel. Where nothing would be left of it after turning and scaling, these are left
            out, as is a change of its border.
        """
        cut = hu[:, *window], mask[:, *window]
        if self.angle or self.zoom != 1:
            moved = self._moved(hu, mask, window)
            cut = moved if moved[1].any() else cut
        lungs = self._bordered(cut[1])
        return self._changed(cut[0].float(), lungs), lungs

    def _moved(
        self, hu: torch.Tensor, mask: torch.Tensor, window: Window
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn and scale about the centre of the window."""
        sizes = [s.stop - s.start for s in window]
        middle = [(s.start + s.stop - 1) / 2 for s in window]
        cos, sin = math.cos(self.angle) / self.zoom, math.sin(self.angle) / self.zoom
        half = [(n - 1) / 2 for n in sizes]
        # the part of the slices that is seen, and no more, becomes float
        reach = (abs(cos) * half[0] + abs(sin) * half[1], abs(sin) * half[0] + abs(cos) * half[1])
        box = [
            slice(max(math.floor(c - r) - 1, 0), min(math.ceil(c + r) + 2, n))
            for c, r, n in zip(middle, reach, mask.shape[1:], strict=True)
        ]
        hu, mask = hu[:, *box], mask[:, *box]
        y, x = (torch.arange(n, device=hu.device) - h for n, h in zip(sizes, half, strict=True))
        rows = cos * y[:, None] - sin * x[None, :] + (middle[0] - box[0].start)
        columns = sin * y[:, None] + cos * x[None, :] + (middle[1] - box[1].start)
        height, width = mask.shape[1:]
        # grid_sample counts from -1 to 1 between the centres of the outer voxels, x before y
        grid = torch.stack([2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], dim=-1)
        seen, lungs = (
            functional.grid_sample(planes[None], grid[None], mode=mode, align_corners=True)[0]
            for planes, mode in ((hu.float() - AIR, "bilinear"), (mask.float(), "nearest"))
        )
        return (seen + AIR).round().to(torch.int16), lungs > 0.5

    def _bordered(self, mask: torch.Tensor) -> torch.Tensor:
        """Shrink or grow the lungs in plane, by squares."""
        if not self.border:
            return mask
        size, grows = 2 * abs(self.border) + 1, self.border > 0
        part = (mask if grows else ~mask).float()[:, None]
        reached = functional.max_pool2d(part, size, stride=1, padding=size // 2)[:, 0] > 0
        found = reached if grows else ~reached
        return found if found.any() else mask

    def _changed(self, hu: torch.Tensor, lungs: torch.Tensor) -> torch.Tensor:
        """Vary inflation, kernel, noise and calibration.

        Less air in the lungs scales HU towards 0, water: ``hu (1 - k)``, where k grows towards the back, as
        in dependent lung. Vessels stay what they are.
        """
        if self.deflation or self.dependent:
            k = self.deflation + self.dependent * _depth(lungs)
            hu = torch.where(lungs & (hu < 0), hu * (1 - k[:, None]), hu)
        if self.blur:
            hu = _smooth(hu, self.blur)
        if self.noise:
            hu = hu + self.noise * self._grain(hu)
        hu = (hu + 1000.0) * (1 + self.gain) - 1000.0 if self.gain else hu
        return (hu + self.offset).round().clamp(AIR, 3071).to(torch.int16)

    def _grain(self, like: torch.Tensor) -> torch.Tensor:
        """Noise of variance 1, correlated in plane; drawn into a tensor: on the stream torch works on."""
        white = torch.empty_like(like)
        ls.ops.philox_uniform(
            tuple(like.shape), self._seed, stream=NOISE_STREAM, sample=self._index, threads=1, out=white
        )
        taps = np.exp(-0.5 * (np.arange(-3, 4) / GRAIN) ** 2)
        power = float((taps**2).sum() / taps.sum() ** 2)  # what a filter along one axis leaves of a variance
        return _smooth(white - 0.5, GRAIN) * (math.sqrt(12.0) / power)


def _smooth(volume: torch.Tensor, sigma: float) -> torch.Tensor:
    """Filter by a Gaussian in plane."""
    return torch.as_tensor(ls.ops.gaussian_filter(volume, (0.0, sigma, sigma), threads=1))


def _depth(lungs: torch.Tensor) -> torch.Tensor:
    """0 at the front of the lungs to 1 at their back, for every row; steeper towards the back."""
    rows = torch.arange(lungs.shape[1], device=lungs.device, dtype=torch.float32)
    used = lungs.any(dim=2).any(dim=0)
    front = torch.where(used, rows, torch.inf).amin()
    back = torch.where(used, rows, -torch.inf).amax()
    return ((rows - front) / (back - front).clamp(min=1)).clamp(0, 1).square()
