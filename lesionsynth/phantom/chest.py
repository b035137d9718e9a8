"""A healthy chest CT made by procedure: anatomy, vessel trees, noise.

For tests, demos and evaluation where no patient data is at hand. It knows nothing of the lesion generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lesionsynth.phantom import anatomy as an
from lesionsynth.phantom.anatomy import Anatomy, Field
from lesionsynth.phantom.checks import check_number, check_seed, check_shape, check_spacing
from lesionsynth.phantom.noise import SmoothField, scanner_noise
from lesionsynth.phantom.tissue import BLOOD, Slices, slice_hu
from lesionsynth.phantom.vessels import Floats, Tree, draw_tubes, grow_tree, tubes

HU = npt.NDArray[np.int16]
Mask = npt.NDArray[np.bool_]

MARGIN_MM = 6.0
"""Air kept around the body where the field allows no more."""
SUBSLICE_MM = 1.6
"""Thicker slices are averages of several, as a scanner's are."""
MOST_SUBSLICES = 8
"""Enough for slices of 12 mm; keeps tiny volumes, whose voxels stand for centimetres, quick."""
CHUNK_VOXELS = 1 << 21
"""Fine voxels drawn at a time, which bounds the memory."""
EDGE_MM = 0.3
"""The mask reaches this far into the lungs' soft edge, as masks drawn by threshold do."""
LUMEN, WALL = -985.0, 10.0


class ChestCT(NamedTuple):
    """A healthy chest."""

    hu: HU
    """(Z, Y, X) int16, Hounsfield units in [-1024, 3071]; LPS index order."""
    lung_mask: Mask
    """(Z, Y, X) bool: both lungs with their vessels and small airways; without trachea and main bronchi."""
    spacing: tuple[float, float, float]
    """Voxel size in mm, axis order z, y, x."""


class _Trees(NamedTuple):
    vessels: Floats
    """Segments of arteries and veins in the lungs, (n, 8)."""
    walls: Floats
    """Segments of airways with their walls."""
    lumina: Floats
    """The same airways, their inner radius."""
    trunk: Floats
    """Lumina of trachea and main bronchi, which are no lung."""


def chest_ct(
    shape: Sequence[int] = (32, 320, 448),
    spacing: Sequence[float] = (1.0, 0.8, 0.8),
    seed: int = 0,
    *,
    level: float | None = None,
) -> ChestCT:
    """Make a healthy chest CT.

    Parameters
    ----------
    shape : (3,) ints
        Voxels (z, y, x), each at least 8.
    spacing : (3,) floats
        Voxel size (z, y, x) in mm.
    seed : int
        At least 0. Each seed is another person: sizes, positions, trees, noise.
    level : float, optional
        Height of the middle slice over the lungs' height: 0 at the deepest recess, 1 at the apex. Drawn from
        the seed in [0.35, 0.65] where omitted. A volume thicker than the lungs is centred on them.

    Returns
    -------
    ChestCT

    Raises
    ------
    TypeError, ValueError
        `shape` is not three integers >= 8, `spacing` not three positive numbers, `seed` negative, `level`
        outside [0, 1], or no voxel shows lung: the slab misses it, or voxels are too large.

    Notes
    -----
    A person is 300 to 380 mm wide. A field of view too small for that shows the whole chest shrunk, along z
    too: sizes in voxels are then those of a scan with larger voxels, and `spacing` is returned as given.

    The anatomy depends on the seed alone, so slabs at several levels or resolutions are of one person. The
    noise also depends on shape and level. Results repeat bit for bit with the same NumPy, SciPy and
    processor type; elsewhere sums may round differently, to 1 HU.

    Examples
    --------
    >>> chest = chest_ct(shape=(8, 48, 48), seed=3)
    >>> chest.hu.shape, chest.hu.dtype.name, chest.lung_mask.dtype.name
    ((8, 48, 48), 'int16', 'bool')
    """
    size, voxel = check_shape(shape), check_spacing(spacing)
    check_seed(seed)
    rng = np.random.Generator(np.random.PCG64(seed))
    anatomy = an.draw_anatomy(rng)
    drawn_level = rng.uniform(0.35, 0.65)
    if level is not None:
        level = check_number("level", level, 0.0, 1.0, "in [0, 1]")
    parenchyma = _draw_parenchyma(rng)
    trees = _grow(anatomy, rng)
    step = _true_step(anatomy, size, voxel)
    base = _lowest_slice(anatomy, size[0] * step[0], drawn_level if level is None else level)
    painter = _Painter(anatomy, trees, parenchyma, size, step, base, rng)
    hu, mask = painter.paint()
    if not mask.any():
        if level is not None:
            raise ValueError(f"level must leave some lung in the slab, got {level}")
        voxels = " x ".join(f"{s:.3g}" for s in step)
        raise ValueError(f"shape and spacing must leave some lung, got voxels of {voxels} mm of the chest")
    return ChestCT(hu, mask, voxel)


class _Parenchyma(NamedTuple):
    hu: float
    gradient: float
    """HU from front to back."""
    noise: float
    """Standard deviation of the scanner's noise in HU."""
    grain_mm: float
    """Standard deviation of the noise's kernel."""
    sharpness: float
    """0 for a soft kernel, towards 1 for a sharp one."""


def _draw_parenchyma(rng: np.random.Generator) -> _Parenchyma:
    return _Parenchyma(
        hu=rng.uniform(-885, -840),
        gradient=rng.uniform(25, 60),
        noise=rng.uniform(14, 30),
        grain_mm=rng.uniform(0.55, 0.8),
        sharpness=rng.uniform(0.0, 0.6),
    )


def _true_step(
    anatomy: Anatomy, size: tuple[int, int, int], voxel: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Voxel size in the chest's own millimetres: larger than `voxel` where the chest must shrink to fit."""
    need_y = 2 * (anatomy.body_half_depth + MARGIN_MM)
    need_x = 2 * (anatomy.body_half_width + MARGIN_MM)
    scale = max(1.0, need_y / (size[1] * voxel[1]), need_x / (size[2] * voxel[2]))
    return voxel[0] * scale, voxel[1] * scale, voxel[2] * scale


def _lowest_slice(anatomy: Anatomy, depth: float, level: float) -> float:
    """Height of the slab's lower face in mm."""
    if depth >= anatomy.height:
        return 0.5 * (anatomy.height - depth)
    return level * anatomy.height - 0.5 * depth


def _grow(anatomy: Anatomy, rng: np.random.Generator) -> _Trees:
    """Grow arteries, veins and airways of both lungs; all in mm, whatever the window."""
    vessels, walls, lumina = [], [], []
    tip = rng.uniform(0.56, 0.68)
    trunk = [_trachea(anatomy)]
    for side in (an.RIGHT, an.LEFT):
        hx, hy, hz = anatomy.hilum(side)
        targets = _targets(anatomy, side, 7000, rng)
        half = len(targets) // 2
        artery = _tree(anatomy, (hx + side * 2, hy - 4, hz), targets[:half], tip, 7.0)
        vein = _tree(anatomy, (hx - side * 2, hy - 10, hz - 24), targets[half:], tip, 6.5)
        vessels += [tubes(artery), tubes(vein)]
        outer, inner = _airways(artery, side)
        walls.append(outer)
        lumina.append(inner)
        trunk.append(_main_bronchus(anatomy, side, artery.points[0] + _offset(side, 9.0)))
    pipes = np.concatenate(trunk)
    thick = pipes.copy()
    thick[:, 6:] += 1.8
    return _Trees(np.concatenate(vessels), np.concatenate([*walls, thick]), np.concatenate(lumina), pipes)


def _targets(anatomy: Anatomy, side: int, count: int, rng: np.random.Generator) -> Floats:
    """Points spread over one lung, at least 2 mm below the pleura; fewer at the edge."""
    box = np.array([anatomy.half_width, 2 * anatomy.half_depth + 10, anatomy.height + 12])
    # the lungs fill about 0.4 of the box; a fixed number of draws keeps the seed's stream the same
    cloud = rng.random((4 * count, 3)) * box - np.array([0.0, anatomy.half_depth + 5, 10.0])
    cloud[:, 0] *= side
    depth = -an.lungs(anatomy, cloud[:, 0], cloud[:, 1], cloud[:, 2])
    points: Floats = cloud[depth > 2.0 + 2.5 * rng.random(len(cloud))]
    return points[:count]


def _tree(anatomy: Anatomy, root: an.Point, targets: Floats, tip: float, thickest: float) -> Tree:
    lobes = an.lobe(anatomy, targets[:, 0], targets[:, 1], targets[:, 2])
    return grow_tree(root, targets, lobes, tip_radius=tip, root_radius=thickest)


def _offset(side: int, distance: float) -> Floats:
    """From an artery's axis to its bronchus: towards the midline, back and head."""
    return distance * np.array([-side * 0.55, 0.65, 0.5])


def _airways(artery: Tree, side: int) -> tuple[Floats, Floats]:
    """Bronchi beside the arteries thicker than 1.7 mm, with and without their walls."""
    keep = artery.radii > 1.7
    bronchi = tubes(artery, keep)
    outer = bronchi[:, 6:] * 0.85 + 0.2
    shift = bronchi[:, 6:] + outer
    direction = _offset(side, 1.0)
    bronchi[:, 0:3] += shift[:, :1] * direction
    bronchi[:, 3:6] += shift[:, 1:] * direction
    inner = bronchi.copy()
    inner[:, 6:] = np.maximum(outer * 0.8 - 0.15, 0.2)
    bronchi[:, 6:] = outer
    return bronchi, inner


def _trachea(anatomy: Anatomy) -> Floats:
    top, fork = 1.35 * anatomy.height, an.CARINA * anatomy.height
    return np.array(
        [
            [2.0, -8.0, top, 1.0, 2.0, fork + 40, 8.6, 8.6],
            [1.0, 2.0, fork + 40, 0.0, 12.0, fork + 5, 8.6, 9.2],
        ]
    )


def _main_bronchus(anatomy: Anatomy, side: int, hilum: Floats) -> Floats:
    fork = an.CARINA * anatomy.height + 5
    middle = np.array([side * 12.0, 14.0, fork - (13 if side < 0 else 11)])
    return np.array(
        [[side * 3.0, 12.0, fork, *middle, 7.4, 6.8], [*middle, *hilum, 6.8, 5.6]],
    )


class _Painter:
    """Draws one window of a chest, some slices at a time."""

    def __init__(
        self,
        anatomy: Anatomy,
        trees: _Trees,
        parenchyma: _Parenchyma,
        size: tuple[int, int, int],
        step: tuple[float, float, float],
        base: float,
        rng: np.random.Generator,
    ) -> None:
        self.anatomy, self.trees, self.parenchyma = anatomy, trees, parenchyma
        self.size, self.step, self.base, self.rng = size, step, base, rng
        self.fine = min(max(1, math.ceil(step[0] / SUBSLICE_MM)), MOST_SUBSLICES)
        """Subslices per slice."""
        in_plane = max(step[1], step[2])
        self.blur = math.hypot(0.45, 0.33 * in_plane)
        y = (np.arange(size[1]) - 0.5 * (size[1] - 1)) * step[1]
        x = (np.arange(size[2]) - 0.5 * (size[2] - 1)) * step[2]
        self.x, self.y = x, y
        cos, sin = math.cos(anatomy.roll), math.sin(anatomy.roll)
        self.plane = Slices(
            x=(cos * x[None, :] + sin * y[:, None]).astype(np.float32),
            y=(cos * y[:, None] - sin * x[None, :]).astype(np.float32),
            edge=2.2 * self.blur,
        )
        low, high = (-60.0, -200.0, -250.0), (anatomy.height + 60, 200.0, 250.0)
        self.marbling = SmoothField(rng, low, high, 9.0)
        self.density = SmoothField(rng, low, high, 32.0)
        self.lobules = SmoothField(rng, low, high, 5.0)

    def paint(self) -> tuple[HU, Mask]:
        """Return HU and lung mask of the window."""
        hu = np.empty(self.size, np.int16)
        mask = np.empty(self.size, np.bool_)
        noise = self.parenchyma.noise * scanner_noise(
            self.rng,
            self.size,
            self.step,
            grain=self.parenchyma.grain_mm,
            sharpness=self.parenchyma.sharpness,
        )
        many = max(1, CHUNK_VOXELS // (self.fine * self.size[1] * self.size[2]))
        for start in range(0, self.size[0], many):
            stop = min(start + many, self.size[0])
            clean, inside = self._chunk(start, stop)
            hu[start:stop] = np.rint(np.clip(clean + noise[start:stop], -1024, 3071))
            mask[start:stop] = inside
        return hu, mask

    def _chunk(self, start: int, stop: int) -> tuple[Field, Mask]:
        """Draw slices start..stop, averaged over their subslices."""
        count = (stop - start) * self.fine
        height = self.step[0] / self.fine
        lowest = self.base + start * self.step[0] + 0.5 * height
        drawn = [self._draw(segments, count, lowest, height) for segments in self.trees]
        hu = np.empty((count, *self.size[1:]), np.float32)
        depth = np.empty_like(hu)
        for i in range(count):
            layers = [layer[i] for layer in drawn]
            hu[i], depth[i] = self._slice(lowest + i * height, *layers)
        shape = (stop - start, self.fine, *self.size[1:])
        inside = depth.reshape(shape).mean(1) < EDGE_MM
        inside &= drawn[3].reshape(shape).max(1) < 0.1
        return hu.reshape(shape).mean(1), inside

    def _draw(self, segments: Floats, count: int, lowest: float, height: float) -> Field:
        """Coverage of tubes in a stack of fine slices."""
        cover = np.zeros((count, *self.size[1:]), np.float32)
        low, high = np.minimum(segments[:, 2], segments[:, 5]), np.maximum(segments[:, 2], segments[:, 5])
        near = (high > lowest - 15) & (low < lowest + count * height + 15)  # 15 mm: more than any radius
        turned = segments[near]
        cos, sin = math.cos(self.anatomy.roll), math.sin(self.anatomy.roll)
        for i in (0, 3):
            x, y = turned[:, i].copy(), turned[:, i + 1].copy()
            turned[:, i], turned[:, i + 1] = cos * x - sin * y, sin * x + cos * y
        origin = np.array([self.x[0], self.y[0], lowest])
        draw_tubes(cover, turned, origin, np.array([self.step[2], self.step[1], height]), self.blur)
        return cover

    def _slice(
        self, z: float, vessels: Field, walls: Field, lumina: Field, trunk: Field
    ) -> tuple[Field, Field]:
        """One fine slice: HU without noise, and the signed distance to the lungs."""
        hu, lung = slice_hu(self.anatomy, self.plane, z, self.marbling.plane(z, self.y, self.x))
        share = np.clip(0.5 - lung / self.plane.edge, 0, 1)
        hu += share * (self._air_spaces(z) - hu)
        hu += share * vessels * (BLOOD - hu)
        near = np.clip((14 - lung) / 4, 0, 1)
        hu += near * walls * np.maximum(WALL - hu, 0)
        hu += np.maximum(near * lumina, trunk) * (LUMEN - hu)
        return hu, lung

    def _air_spaces(self, z: float) -> Field:
        """HU of the lungs between the vessels: denser to the back and below, with the fissures' lines."""
        a, x, y = self.anatomy, self.plane.x, self.plane.y
        out = self.parenchyma.hu + self.parenchyma.gradient * 0.5 * (y / a.half_depth)
        out = out + 10 * (0.5 - z / a.height)
        out = out + 9 * self.density.plane(z, self.y, self.x) + 8 * self.lobules.plane(z, self.y, self.x)
        oblique, horizontal = an.fissures(a, x, y, z)
        horizontal = np.where((x < 0) & (oblique > 0), horizontal, 99)
        for height in (oblique, horizontal):
            # a sheet of 0.25 mm seen through the point spread
            out = out + 820 * (0.07 / self.blur) * np.exp(-((height / (1.6 * self.blur)) ** 2))
        return np.asarray(out, np.float32)
