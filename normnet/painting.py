"""Paint dense disease into healthy lungs: what the lung network must learn to look through.

Shapes: lesions of `lesionsynth`, anywhere or at the pleura; bands at the back, at the base and along the
pleura; lobes; whole lungs. Densities: consolidation of -300 to +80 HU, with or without air bronchograms,
smooth fluid, ground glass. Everything is a function of (seed, index), nothing is painted outside the lungs,
and a band has at least the share of the lung that it is asked to have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from scipy import ndimage

import lesionsynth as ls

Labels = npt.NDArray[np.uint8]
"""Lungs: 1 right, 2 left, 0 elsewhere."""
Image = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Pattern = Literal["dorsal", "basal", "subpleural", "lobe", "lung"]
"""A shape that takes a share of a lung; see `region`."""

RIGHT, LEFT = 1, 2
PAINT_STREAM, ROUGH_STREAM, GRAIN_STREAM, AIR_STREAM = 70, 71, 72, 73
"""Philox streams of the draws, of rough edges, of texture and of bronchi; see `normnet.data.SLAB_STREAM`."""
SHARES: dict[Pattern, tuple[float, float, float]] = {
    "dorsal": (0.35, 0.05, 0.6),
    "basal": (0.25, 0.05, 0.6),
    "subpleural": (0.15, 0.1, 0.6),
    "lobe": (0.15, 0.2, 0.6),
    "lung": (0.08, 1.0, 1.0),
}
"""Chance of each pattern; least and largest share of the lung that it takes."""
PLEURA_MM = 5.0
"""Lesions that come so near to the lung's surface lie at the pleura."""
AIR_HU = -850.0
"""Air in bronchi, with partial volume."""
RIM_HU = (-700.0, -150.0)
"""Voxels outside the lungs' mask that are part lung, part wall: beside disease they are dense, too, or a dark
line would show where the lung ends."""
LESIONS = ls.LesionConfig(
    small=ls.BlobClass(count=(0, 6), radius=(4, 12), scale_by_lung=False),
    medium=ls.BlobClass(count=(0, 5), radius=(12, 40), scale_by_lung=False),
    large=ls.BlobClass(probability=0.4, radius=(35, 80), scale_by_lung=False),
    lengths="mm",
)
"""Nodules to masses and consolidated segments."""


class Painted(NamedTuple):
    """A diseased scan.

    Attributes
    ----------
    hu : (z, y, x) float32 array
        Equal to the healthy one outside the lungs, but for voxels of `RIM_HU` that touch disease.
    disease : (z, y, x) bool array
        What was painted, part of the lungs.
    """

    hu: Image
    disease: Mask


class Painter:
    """Paint disease that is drawn from (seed, index).

    Parameters
    ----------
    spacing : float
        Voxel size in mm of every scan.
    seed : int
        In [0, 2**32).
    """

    def __init__(self, spacing: float, seed: int) -> None:
        self._spacing, self._seed = spacing, seed
        self._synthesizer = ls.LesionSynthesizer(LESIONS, seed=seed, threads=1, allow_empty=True)

    def __call__(self, hu: Image, lungs: Labels, depth: Image, index: int) -> Painted:
        """Paint.

        Parameters
        ----------
        hu : (z, y, x) float32 array
            Healthy scan. Not modified.
        lungs : (z, y, x) uint8 array
            1 right, 2 left.
        depth : (z, y, x) float32 array
            Distance of lung voxels to the lung's surface in mm.
        index : int
            Names the sample.
        """
        u = uniform(24, self._seed, PAINT_STREAM, index)
        disease = np.zeros(lungs.shape, bool)
        if not lungs.any():
            return Painted(hu, disease)
        if u[0] < 0.6:
            disease |= self._lesions(lungs, depth, index, at_pleura=u[1] < 0.5)
        how = {"spacing": self._spacing, "roughness": 12.0 * u[18]}
        for k, (pattern, (chance, least, most)) in enumerate(SHARES.items()):
            if u[2 + k] < chance:
                side = int(3 * u[12 + k]) or (1 + int(2 * u[17]) if pattern == "lung" else 0)  # 0: both
                chosen = np.where((lungs == side) | (side == 0), lungs, np.uint8(0))
                share = least + u[7 + k] * (most - least)
                disease |= region(pattern, chosen, depth, share, **how, seed=self._seed, index=index)
        return render(hu, lungs, disease, _density(*u[19:]), seed=self._seed, index=index)

    def _lesions(self, lungs: Labels, depth: Image, index: int, *, at_pleura: bool) -> Mask:
        empty, spacing = np.zeros(lungs.shape, np.float32), (self._spacing,) * 3
        found = np.asarray(self._synthesizer(empty, lungs > 0, index=index, spacing=spacing).labels)
        if at_pleura:
            found = np.where(np.isin(found, found[depth <= PLEURA_MM]), found, 0)
        return found > 0


def region(
    pattern: Pattern,
    lungs: Labels,
    depth: Image,
    share: float,
    *,
    spacing: float,
    roughness: float = 0.0,
    seed: int = 0,
    index: int = 0,
) -> Mask:
    """Choose a share of each lung.

    Parameters
    ----------
    pattern : {"dorsal", "basal", "subpleural", "lobe", "lung"}
        What lies lowest in a patient on the back, give or take 20 degrees; what lies at the feet; what lies
        at the surface; what lies below an oblique fissure; everything.
    lungs : (z, y, x) uint8 array
        1 right, 2 left, LPS index order (z from feet to head, y front to back).
    depth : (z, y, x) float32 array
        Distance of lung voxels to the lung's surface in mm; "subpleural" alone looks at it.
    share : float
        Of each lung's voxels, in (0, 1].
    spacing : float
        Voxel size in mm.
    roughness : float
        Standard deviation in mm by which the edge wanders.
    seed, index : int
        The edge, and how a band or a fissure lies, are a function of these.

    Returns
    -------
    (z, y, x) bool array
        At least `share` of each lung, more only where voxels are equally low; nothing outside.

    Raises
    ------
    ValueError
        `pattern` or `share` is no such thing.
    """
    if pattern not in get_args(Pattern) or not 0 < share <= 1:
        known = ", ".join(get_args(Pattern))
        raise ValueError(f"pattern must be one of {known}, share in (0, 1], got {pattern!r}, {share}")
    if pattern == "lung" or share == 1:
        return lungs > 0
    tilt, lean = (2 * u - 1 for u in uniform(4, seed, ROUGH_STREAM, index, component=1)[:2])
    z, y, x = (np.arange(n) * spacing for n in lungs.shape)
    ways = {  # direction (z, y, x) of what comes first, in mm
        "dorsal": (0.35 * tilt, 1.0, 0.35 * lean),
        "basal": (-1.0, 0.35 * tilt, 0.35 * lean),
        "lobe": (-1.0, 0.9 + 0.4 * tilt, 0.2 * lean),  # the oblique fissure falls from back to front
    }
    first: npt.NDArray[np.floating] = -depth
    if pattern != "subpleural":
        a, b, c = ways[pattern]
        first = (a * z[:, None, None] + b * y[:, None] + c * x).astype(np.float32)
    if roughness:
        first = first + np.float64(roughness) * field(lungs.shape, 12.0 / spacing, seed, ROUGH_STREAM, index)
    chosen = np.zeros(lungs.shape, bool)
    for side in (RIGHT, LEFT):
        lung = lungs == side
        values = first[lung]
        if len(values):
            at = len(values) - int(np.ceil(share * len(values)))
            chosen[lung] = values >= np.partition(values, at)[at]
    return chosen


@dataclass(frozen=True, kw_only=True)
class Density:
    """What disease looks like."""

    hu: float
    """Mean density."""
    spread: float = 0.0
    """Standard deviation of its texture in HU."""
    grain: float = 1.0
    """Standard deviation in voxels of the Gaussian that correlates the texture."""
    bronchi: float = 0.0
    """Share of it that is air in bronchi, in [0, 1)."""
    edge: float = 0.5
    """Standard deviation in voxels of the Gaussian that softens its edge."""


def render(
    hu: Image, lungs: Labels, disease: Mask, density: Density, *, seed: int = 0, index: int = 0
) -> Painted:
    """Give diseased lung its density.

    Without bronchi lung only becomes denser: vessels, and whatever else is denser than the disease, stay.
    Bronchi have to make it darker, so with them vessels go.

    Parameters
    ----------
    hu : (z, y, x) float32 array
        Healthy scan. Not modified.
    lungs : (z, y, x) uint8 array
        1 right, 2 left.
    disease : (z, y, x) bool array
        Where; what is outside the lungs is left out. Not modified.
    density : Density
        How.
    seed, index : int
        The texture is a function of these.
    """
    inside = lungs > 0
    disease = disease & inside
    if not disease.any():
        return Painted(hu, disease)
    level = np.full(hu.shape, density.hu, np.float32)
    if density.spread:
        level += density.spread * field(hu.shape, density.grain, seed, GRAIN_STREAM, index)
    if density.bronchi:
        salt = field(hu.shape, 0.8, seed, AIR_STREAM, index)
        cut = np.partition(values := salt[disease], at := int((1 - density.bronchi) * (values.size - 1)))[at]
        level[salt >= cut] = AIR_HU
    alpha = disease.astype(np.float32)
    if density.edge:
        alpha = np.maximum(smooth(alpha, density.edge), alpha) * inside
    rim = ~inside & (hu > RIM_HU[0]) & (hu < RIM_HU[1])
    rim &= ndimage.binary_dilation(disease)
    alpha[rim] = 1
    dense = hu + alpha * (level - hu)
    keep = (dense <= hu) & (rim if density.bronchi else True)
    return Painted(np.where(keep, hu, dense), disease)


def _density(kind: float, level: float, spread: float, grain: float, edge: float) -> Density:
    """Draw consolidation (60 %, two fifths of it with bronchi), fluid (25 %) or ground glass (15 %).

    Consolidation is more often as dense as the tissue around: that is what is hard.
    """
    edge, grain = 0.3 + 0.9 * edge, 0.3 + 1.7 * grain
    if kind < 0.25:
        return Density(hu=-20 + 80 * level, spread=10 * spread, edge=edge)
    if kind < 0.4:
        return Density(hu=-700 + 400 * level, spread=20 + 100 * spread, grain=grain, edge=edge)
    bronchi = 0.01 + 0.14 * (kind - 0.75) / 0.25 if kind > 0.75 else 0.0
    return Density(hu=80 - 380 * level**2, spread=100 * spread**2, grain=grain, bronchi=bronchi, edge=edge)


# ---- draws, each a function of (seed, stream, index)


def uniform(count: int, seed: int, stream: int, index: int, component: int = 0) -> list[float]:
    """Draw numbers in [0, 1)."""
    u = ls.ops.philox_uniform(
        (1, 1, count), seed, stream=stream, sample=index, component=component, threads=1
    )
    return [float(value) for value in u.ravel()]


def field(shape: tuple[int, ...], sigma: float, seed: int, stream: int, index: int) -> Image:
    """Draw a Gaussian random field of mean 0 and standard deviation 1, correlated over `sigma` voxels."""
    white = ls.ops.philox_uniform(shape, seed, stream=stream, sample=index, threads=1)
    waves = smooth(white - np.float32(0.5), sigma)
    return np.asarray(waves / max(float(waves.std()), 1e-6), np.float32)


def smooth(volume: Image, sigma: float | Sequence[float]) -> Image:
    """Filter by a Gaussian of so many voxels, on one thread."""
    return np.asarray(ls.ops.gaussian_filter(volume, sigma, threads=1))
