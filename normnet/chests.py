"""Training samples of the lung network: healthy chests, moved, diseased, and seen by another scanner.

A healthy scan's lung mask is right where its disease is painted on: asked for it all the same, a network
learns where lung is from ribs, heart, diaphragm and the other lung. The batch of a step is a function of
(seed, step) alone, as `normnet.data`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from scipy import ndimage
from scipy.spatial.transform import Rotation

import lesionsynth as ls
from normnet.config import Shape, Spacing, TrainConfig
from normnet.data import VALIDATION_INDEX, Batch, Stream, phantoms
from normnet.painting import LEFT, RIGHT, Image, Labels, Mask, Painter, field, smooth, uniform
from normnet.prepare.lungs import split_mask
from normnet.prepare.network import ADULT_MM, window
from normnet.prepare.store import Store
from normnet.thick import draw_profile

AIR_HU = -1024.0
"""What lies beyond the ends of a scan."""
CHEST_STREAM, NOISE_STREAM, BEND_STREAM, VESSEL_STREAM = 80, 82, 83, 84
"""Philox streams; see `normnet.data.SLAB_STREAM`."""
GAS = ls.LesionConfig(
    small=ls.BlobClass(count=(0, 6), radius=(5, 12), scale_by_lung=False),
    medium=ls.BlobClass(count=(0, 4), radius=(10, 30), scale_by_lung=False),
    large=ls.BlobClass(probability=0.2, radius=(25, 50), scale_by_lung=False),
    lengths="mm",
)
"""Gas in bowel and stomach, by its shapes."""
GAS_AWAY = 2
"""Voxels that stay between gas and lung: a wall and the diaphragm."""
BEND_VOXELS = 16
"""Distance of the control points of a chest's bending."""
FILLS = (-1024.0, -1000.0, -2000.0, -3024.0, -800.0, 0.0, 40.0, 1000.0)
"""What files have outside the scanned field."""


def lung_streams(
    config: TrainConfig, device: torch.device, *, rank: int = 0, processes: int = 1, local: int = 1
) -> tuple[ChestStream, list[Batch]]:
    """Return the training stream of the task lungs and the fixed validation batches.

    The chests with the fewest slices are held out; phantoms are, where there is no data. Parameters are those
    of `normnet.data.pair_streams`; samples are made on the CPU and lie in its memory, whatever the device.

    Raises
    ------
    ValueError
        `config.data` is no store of chests, or nothing would be left to train on.
    """
    drawn = config.phantoms + (config.held_out if config.data is None else 0)
    phantoms = phantom_chests(drawn, config.seed, config.phantom_shape, config.phantom_spacing)
    chests = phantoms if config.data is None else store_chests(config.data)
    if len(chests) <= config.held_out:
        raise ValueError(f"data must hold more than held_out={config.held_out} chests, got {len(chests)}")
    chests = sorted(chests, key=lambda chest: (len(chest.hu), chest.name))
    held, training = chests[: config.held_out], chests[config.held_out :]
    if config.data is not None:
        training = training + phantoms
    stream = ChestStream(training, config, rank=rank, processes=processes)
    if rank or not held:
        return stream, []
    one = replace(config, batch_size=1, accumulate=1)
    checks = ChestStream(held, one, first_index=VALIDATION_INDEX)
    return stream, [checks.batch(k) for k in range(config.validation_pairs)]


@dataclass(frozen=True, eq=False)
class Chest:
    """A healthy scan on the coarse grid of `normnet.prepare.network`.

    Attributes
    ----------
    name : str
    hu : (z, y, x) int16 array
    lungs : (z, y, x) uint8 array
        1 right, 2 left.
    segments : list of (first, after last)
        Runs of slices whose mask is right.
    """

    name: str
    hu: npt.NDArray[np.int16]
    lungs: Labels
    segments: list[tuple[int, int]]


def store_chests(path: Path) -> list[Chest]:
    """Read a store that `normnet.prepare` wrote for the task lungs.

    Raises
    ------
    ValueError
        There is no store at `path`, or it is of another task.
    """
    store = Store.open(path)
    if (task := store.meta.get("task", "lesions")) != "lungs":
        raise ValueError(f"data must be a store prepared with --task lungs, got {path} for {task}")
    cases = [store[name] for name in store.case_ids]
    return [Chest(c.case_id, c.slab(0, c.shape[0])[0], c.lungs(), c.segments) for c in cases]


def phantom_chests(count: int, seed: int, shape: Shape, spacing: Spacing) -> list[Chest]:
    """Draw healthy phantoms for the training run `seed`; a sample takes their voxels for `ADULT_MM`.

    Raises
    ------
    ValueError
        The shape is too small to show two lungs.
    """
    chests = []
    for name, phantom in phantoms(count, seed, shape, spacing):
        sides = split_mask(phantom.lung_mask, spacing)
        lungs = (RIGHT * sides.right + LEFT * sides.left).astype(np.uint8)
        chests.append(Chest(name, phantom.hu, lungs, [(0, shape[0])]))
    return chests


class ChestStream(Stream):
    """Batches for the lung network, made on the CPU.

    Parameters
    ----------
    chests : sequence of Chest
        Healthy scans.
    config : TrainConfig
        Seed, sizes of batch and sample, mirroring, thick slices, and how anatomy and scanner vary: `chest`,
        and of `augment` rotate, zoom, blur, noise, offset and gain.
    **part
        As of `normnet.data.Stream`.
    """

    def __init__(self, chests: Sequence[Chest], config: TrainConfig, **part: Any) -> None:
        super().__init__(config, **part)
        self._sources = [_Source(c.hu[a:b], c.lungs[a:b]) for c in chests for a, b in c.segments]
        self._slices = np.cumsum([source.shape[0] for source in self._sources])
        self._seed, self._shape = config.seed, (config.slab, config.crop or 0, config.crop or 0)
        self._paint = Painter(ADULT_MM, config.seed)
        self._bowel = ls.LesionSynthesizer(GAS, seed=config.seed, threads=1, allow_empty=True)

    def batch(self, step: int) -> Batch:
        """Make the samples of a step: target and lesions as of `sample`, right lung first."""
        start = time.perf_counter()
        image, lungs, disease = map(np.stack, zip(*map(self.sample, self.indices(step)), strict=True))
        target = torch.from_numpy(np.stack([lungs == RIGHT, lungs == LEFT], axis=1))
        ill = torch.from_numpy(disease)[:, None]
        seconds = time.perf_counter() - start
        return Batch(torch.from_numpy(image)[:, None], target, lambda: ill, lambda: seconds)

    def sample(self, index: int) -> tuple[Image, Labels, Mask]:
        """Make one sample.

        Parameters
        ----------
        index : int
            Names it: a sample is a function of (seed, index).

        Returns
        -------
        image : (slab, crop, crop) float32 array
            What the network sees, in [0, 1]; see `normnet.prepare.network.window`.
        lungs : (slab, crop, crop) uint8 array
            1 right, 2 left; 0 outside the field of view.
        disease : (slab, crop, crop) bool array
            What of the lungs is painted.
        """
        draw = iter(uniform(64, self._seed, CHEST_STREAM, index))
        at = np.searchsorted(self._slices, next(draw) * self._slices[-1], side="right")
        source = self._sources[int(at)]
        places, zoom = self._places(source, draw, index)
        hu, lungs, depth = source.at(places)
        if self.config.mirror and next(draw) < 0.5:
            hu, depth = (np.ascontiguousarray(a[:, :, ::-1]) for a in (hu, depth))
            lungs = np.asarray([0, LEFT, RIGHT], np.uint8)[np.ascontiguousarray(lungs[:, :, ::-1])]
        disease = np.zeros(lungs.shape, bool)
        if next(draw) < self.config.chest.diseased:
            hu, disease = self._paint(hu, lungs, depth * zoom, index)
        hu = self._gas(hu, lungs, draw, index)
        hu = self._arms(hu, lungs, draw)
        hu = self._contrast(hu, lungs, draw, index)
        hu, nearest = self._scanner(hu, draw, index)
        lungs, disease = lungs[nearest], disease[nearest]
        hu, lungs = self._field(hu, lungs, draw)
        return window(hu), lungs, disease & (lungs > 0)

    def _places(self, source: _Source, draw: Iterator[float], index: int) -> tuple[torch.Tensor, float]:
        """Where the sample's voxels lie in the scan: (z, y, x, 3), in voxels z, y, x; and the zoom."""
        augment, chest = self.config.augment, self.config.chest
        turn = augment.rotate * (2 * next(draw) - 1)
        tilt, roll = (chest.tilt * (2 * next(draw) - 1) for _ in range(2))
        zoom = (1 + augment.zoom) ** (2 * next(draw) - 1)
        scales = [zoom * (1 + chest.stretch) ** (2 * next(draw) - 1) for _ in range(3)]
        # about z, x and y, whose order is z, y, x
        matrix = Rotation.from_euler("XZY", (turn, tilt, -roll), degrees=True).as_matrix() / scales
        reach, height = self._shape[0] / 4 / scales[0], source.shape[0]
        low, high = (reach, height - reach) if height > 2 * reach else (height / 2, height / 2)
        centre = [
            low + next(draw) * (high - low),
            source.middle[0] + 24 * (next(draw) - 0.5),
            source.middle[1] + 48 * (next(draw) - 0.5),
        ]
        axes = [torch.arange(n) - (n - 1) / 2 for n in self._shape]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        places = grid @ torch.from_numpy(matrix.T.astype(np.float32)) + torch.tensor(
            centre, dtype=torch.float32
        )
        if chest.bend:
            knots = [n // BEND_VOXELS + 2 for n in self._shape]
            bends = ls.ops.philox_uniform(
                (3 * knots[0], knots[1], knots[2]), self._seed, stream=BEND_STREAM, sample=index, threads=1
            )
            shifts = torch.from_numpy(bends.reshape(1, 3, *knots)) - 0.5
            shifts = functional.interpolate(shifts, self._shape, mode="trilinear", align_corners=True)
            places += 2 * chest.bend * next(draw) * shifts[0].permute(1, 2, 3, 0)
        return places, zoom

    def _gas(self, hu: Image, lungs: Labels, draw: Iterator[float], index: int) -> Image:
        """Put gas into tissue below the middle of the lungs, as bowel and stomach hold it."""
        chance, level = next(draw), next(draw)
        if chance >= self.config.chest.gas:
            return hu
        heights = np.flatnonzero(lungs.any(axis=(1, 2)))
        top = len(hu) if not len(heights) else (heights[0] + heights[-1]) // 2
        tissue = (hu > -150) & ~ndimage.binary_dilation(lungs > 0, iterations=GAS_AWAY)
        tissue[top:] = False
        empty = np.zeros(hu.shape, np.float32)
        labels = self._bowel(empty, tissue, index=index, spacing=(ADULT_MM,) * 3).labels
        gas = smooth((labels > 0).astype(np.float32), 0.5) * (lungs == 0)
        return np.asarray(hu + gas * np.minimum(-1000 + 100 * np.float32(level) - hu, 0), np.float32)

    def _arms(self, hu: Image, lungs: Labels, draw: Iterator[float]) -> Image:
        """Lay an arm beside the body, where there is air."""
        chance, side, place, radius, along = (next(draw) for _ in range(5))
        if chance >= self.config.chest.arms or not lungs.any():
            return hu
        columns = np.flatnonzero((hu > -300).mean(axis=(0, 1)) > 0.05)
        if not len(columns):
            return hu
        radius = 10 + 8 * radius
        x = columns[0] - radius + 4 if side < 0.5 else columns[-1] + radius - 4
        y = hu.shape[1] * (0.35 + 0.4 * place)
        z, ys, xs = (np.arange(n, dtype=np.float32) for n in hu.shape)
        lean = 0.3 * (2 * along - 1) * (z - z.mean())
        away = np.hypot(ys[:, None] - (y + lean)[:, None, None], xs - x)
        arm = np.where(away < 0.3 * radius, 700.0, np.where(away < 0.85 * radius, 50.0, -90.0))
        free = (away < radius) & (hu < -300) & (lungs == 0)
        return np.where(free, arm, hu).astype(np.float32)

    def _contrast(self, hu: Image, lungs: Labels, draw: Iterator[float], index: int) -> Image:
        """Add contrast to soft tissue, more here and less there."""
        chance, amount = next(draw), next(draw)
        if chance >= self.config.chest.contrast:
            return hu
        where = np.clip(field(self._shape, 5.0, self._seed, VESSEL_STREAM, index), 0, 1.5)
        soft = (hu > 0) & (hu < 150) & (lungs == 0)
        return np.asarray(hu + 300 * amount * where * soft, np.float32)

    def _scanner(self, hu: Image, draw: Iterator[float], index: int) -> tuple[Image, npt.NDArray[np.int64]]:
        """Blur or sharpen, thick slices, noise, calibration; also the slice that each shows most of."""
        augment, nearest = self.config.augment, np.arange(len(hu))
        sharp, blur, noise, grain, offset, gain, *thick = (next(draw) for _ in range(9))
        if augment.blur and sharp < 0.7:
            sigma = augment.blur * blur
            soft = smooth(hu, (0.0, sigma, sigma))
            hu = soft if sharp < 0.4 else 2 * hu - soft
        if (profile := draw_profile(self.config, len(hu), ADULT_MM, *thick)) is not None:
            hu, nearest = np.tensordot(profile.weights, hu, 1), profile.nearest
        if augment.noise:
            level = np.float32(augment.noise * noise**2)
            hu = hu + level * field(self._shape, 0.2 + 0.8 * grain, self._seed, NOISE_STREAM, index)
        hu = (hu + 1000) * (1 + augment.gain * (2 * gain - 1)) - 1000 + augment.offset * (2 * offset - 1)
        return hu, nearest

    def _field(self, hu: Image, lungs: Labels, draw: Iterator[float]) -> tuple[Image, Labels]:
        """Cut the field of view, and fill what is outside; what is cut off is no lung."""
        chance, round_, fill = next(draw), next(draw), next(draw)
        cuts, edges = ([next(draw) for _ in range(6)] for _ in range(2))
        inside = np.ones(hu.shape, bool)
        if chance < self.config.chest.cropped:
            for side, (cut, edge) in enumerate(zip(cuts, edges, strict=True)):
                line = np.moveaxis(inside, side // 2, 0)  # a view; even sides are the lower ones
                width = int(len(line) * 0.35 * edge) if cut < 0.4 else 0
                (line if side % 2 == 0 else line[::-1])[:width] = False
        if round_ < 0.5 * self.config.chest.cropped:
            y, x = (np.arange(n) - (n - 1) / 2 for n in hu.shape[1:])
            inside &= np.hypot(y[:, None], x) < hu.shape[1] * (0.45 + 0.25 * edges[0])
        filling = np.float32(FILLS[int(fill * len(FILLS))])
        return np.where(inside, hu, filling), np.where(inside, lungs, np.uint8(0))


class _Source:
    """Slices of a chest, ready to be sampled: HU, right, left, and depth in an adult's mm as one tensor.

    The first and the last slice are no surface of a lung that they cut.
    """

    def __init__(self, hu: npt.NDArray[np.int16], lungs: Labels) -> None:
        mask = lungs > 0
        deep = ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1, 1:-1] * ADULT_MM
        channels = np.stack(
            [hu - np.float32(AIR_HU), lungs == RIGHT, lungs == LEFT, deep],
            dtype=np.float32,
            casting="same_kind",
        )
        self._channels = torch.from_numpy(channels)[None]
        self.shape = lungs.shape
        # of slices without lung the image's: they show what lung is not
        lines = [np.flatnonzero(mask.any(axis=a)) for a in ((0, 2), (0, 1))] if mask.any() else []
        rows, columns = lines or [np.arange(n) for n in mask.shape[1:]]
        self.middle = ((rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2)

    def at(self, places: torch.Tensor) -> tuple[Image, Labels, Image]:
        """Sample HU, lungs and depth at places (z, y, x, 3) in voxels."""
        normal = (2 * places + 1) / torch.tensor(self.shape) - 1  # -1 and 1 are the ends of the outer voxels
        hu, right, left, depth = functional.grid_sample(
            self._channels, normal.flip(-1)[None], mode="bilinear", padding_mode="zeros", align_corners=False
        )[0].numpy()
        lungs = np.where(right + left > 0.5, np.where(right >= left, RIGHT, LEFT), 0)
        return hu + np.float32(AIR_HU), lungs.astype(np.uint8), depth
