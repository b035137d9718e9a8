"""Segment the lungs by a network that was trained to find them whatever fills them (`normnet.chests`).

It sees the whole chest on a coarse grid, at one size whoever the patient is. On the scan's own grid the
outline follows intensities where they decide, as thresholds do, and the network where they do not: at dense
disease.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from skimage.morphology import isotropic_dilation

from normnet.config import BUNDLED_LUNGS
from normnet.model import Model, weights_file
from normnet.prepare.grid import IsoGrid, Mask, Spacing, linear
from normnet.prepare.lungs import (
    AIR_HU,
    CHUNK,
    DEPTH_MM,
    HU,
    MIN_LUNG_ML,
    Field,
    Lungs,
    around,
    block_mean,
    body_mask,
    coarse_grid,
    settle,
    voxels,
)

ADULT_MM = 3.0
"""Voxel of an adult's chest: what is measured there in millimetres is so in an adult's."""
BODY_VOXELS = 90.0
"""Side of a square of the body's cross-section in voxels: what an adult has at 3 mm, a neonate at 0.9 mm."""
SMALLEST_MM, SMALL_MM, LARGEST_MM = 0.5, 2.0, 3.5
"""Voxels of the coarse grid: bounds, and below which a patient is small."""
WINDOW = ((-1000.0, -150.0, 150.0, 800.0), (0.0, 0.4, 0.9, 1.0))
"""HU and what the network sees of them, linear in between: half of it is soft tissue, where consolidation,
heart and liver are to be told apart."""
HILUM, HILUM_ML = ndimage.generate_binary_structure(3, 2), 20.0
"""Ball of 4.5 mm: vessels that hold it and hang on the mediastinum are hilum and no lung, in an adult; of so
many ml at most in a patient: in nine healthy chests the largest piece had 16 ml."""
THICK, AROUND, ODDS = 3, 5, 9.0
"""Tissue that stays where so many layers are taken off is dense disease; up to so many coarse voxels around
it the odds of being lung count so many times: what it makes uncertain is rather searched than left out."""
PIECE = 0.05
"""Least share of a lung's largest piece: smaller ones are no lung."""
RIM, REACH = 0.5, 1.5
"""Depth at which tissue is more than a rim, and how far from there a rim is lung; coarse voxels."""
MARGIN = 3
"""Coarse voxels around the lungs within which the outline is set."""


def lung_network(path: str | os.PathLike[str] = BUNDLED_LUNGS) -> Model:
    """Load a lung network; of a file that is as it was, once per process.

    Raises
    ------
    ValueError
        There are no weights at `path`, or they are none of the task lungs.
    """
    file = weights_file(Path(path))
    status = file.stat()
    return _loaded(file, (status.st_mtime_ns, status.st_size, status.st_ino))


@functools.lru_cache(maxsize=2)
def _loaded(file: Path, version: tuple[int, ...]) -> Model:
    return Model.load(file, "lungs")


def split_by_network(hu: HU, spacing: Spacing, network: Model) -> Lungs:
    """Segment the lungs and tell right from left.

    Parameters
    ----------
    hu : (Z, Y, X) int16 array
        Hounsfield units in LPS index order (z from feet to head, y front to back, x right to left).
    spacing : (3,) floats
        Voxel size in mm, axis order z, y, x.
    network : Model
        From `lung_network`.

    Returns
    -------
    Lungs
        With whatever fills them; without trachea, main bronchi and what lies around the body.

    Raises
    ------
    ValueError
        No lung is found.
    """
    grid = chest_grid(hu, spacing)
    small = shrink(hu, grid)
    chance = _without_vessels(chances(window(small), network), small)
    return _outline(hu, small, grid, _favoured(chance, small))


def chest_grid(hu: HU, spacing: Spacing) -> IsoGrid:
    """Choose the coarse grid of a scan: cubic voxels, of a size that follows the patient's.

    Parameters
    ----------
    hu, spacing
        As `split_by_network`.

    Returns
    -------
    IsoGrid
        Covers the whole scan. Its voxels have the same share of the median cross-section of the body in every
        patient, between `SMALLEST_MM` and `LARGEST_MM`.
    """
    size = _body_mm(hu, spacing) / BODY_VOXELS
    if size < SMALL_MM:  # the wall of a small chest is thin for lengths that are an adult's
        z, y, x = (s * ADULT_MM / size for s in spacing)
        size = max(size, _body_mm(hu, (z, y, x)) / BODY_VOXELS * size / ADULT_MM)
    size = float(np.clip(size, SMALLEST_MM, LARGEST_MM))
    shape = (hu.shape[0], hu.shape[1], hu.shape[2])
    return IsoGrid.whole(shape, spacing, (size, size, size))


def _body_mm(hu: HU, spacing: Spacing) -> float:
    """Side of a square of the body's median cross-section in mm; of the slices', where no body is found."""
    factors, mm = coarse_grid(spacing)
    coarse = block_mean(hu, factors)
    areas = body_mask(coarse, mm).sum(axis=(1, 2))
    area = float(np.median(areas[areas > 0])) if areas.any() else float(np.prod(coarse.shape[1:]))
    return float(np.sqrt(area * mm[1] * mm[2]))


def shrink(volume: npt.NDArray[np.generic], grid: IsoGrid) -> Field:
    """Average a volume (HU or a mask) on the scan's grid to the coarse one.

    It is weighted by a triangle as wide as two coarse voxels, or interpolated where those are smaller.
    """
    along_z, along_y, along_x = (
        _triangles(grid.source_positions(axis), n, grid.spacing[axis] / grid.source_spacing[axis])
        for axis, n in enumerate(volume.shape)
    )
    out = np.zeros(grid.shape, np.float32)
    for first in range(0, len(volume), CHUNK):
        part = along_y @ (volume[first : first + CHUNK].astype(np.float32) @ along_x.T)
        out += np.tensordot(along_z[:, first : first + CHUNK], part, 1)
    return out


def _triangles(positions: npt.NDArray[np.float64], n: int, ratio: float) -> Field:
    """Weights (out, in); rows sum to 1."""
    away = np.abs(positions[:, None].clip(0, n - 1) - np.arange(n))
    weights = np.clip(1 - away / max(ratio, 1.0), 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def window(hu: Field) -> Field:
    """Scale HU to what the network sees: [0, 1], by `WINDOW`; what is beyond it lies at its ends."""
    return np.interp(hu, *WINDOW).astype(np.float32)


def chances(image: Field, network: Model) -> Field:
    """Ask for the chance of right and of left lung, (2, z, y, x): of the image as it is, and mirrored."""
    pads = [-n % network.config.multiple for n in image.shape]
    padded = torch.from_numpy(np.pad(image, [(p // 2, p - p // 2) for p in pads]))[None, None]
    box = tuple(slice(p // 2, p // 2 + n) for p, n in zip(pads, image.shape, strict=True))
    seen = network.healthy_probability(padded)[0]
    mirrored = network.healthy_probability(padded.flip(-1))[0].flip(0, -1)
    return np.asarray(((seen + mirrored) / 2)[(slice(None), *box)].numpy())


def _without_vessels(chance: Field, small: Field) -> Field:
    """Leave the large vessels at the mediastinum out, as training did; what is larger is disease."""
    right, left = _sides(chance)
    if not (right.any() and left.any()):
        return chance
    kept_right, kept_left = without_hilum(small, right, left, HILUM_ML)
    return np.where((right ^ kept_right) | (left ^ kept_left), np.float32(0), chance)


def without_hilum(
    hu: npt.NDArray[Any], right: Mask, left: Mask, most_ml: float = math.inf
) -> tuple[Mask, Mask]:
    """Take the large vessels at the mediastinum out of lungs.

    In a healthy lung they are the thick tissue between the middles of the two lungs that goes on outside.

    Parameters
    ----------
    hu : (z, y, x) array
        Scan on the coarse grid.
    right, left : (z, y, x) bool arrays
        Its lungs, neither empty.
    most_ml : float
        Pieces of more than so many ml of an adult are disease, and stay.

    Returns
    -------
    right, left : (z, y, x) bool arrays
        Parts of those given.
    """
    tissue, lungs = hu >= AIR_HU, right | left
    core = ndimage.binary_erosion(tissue, HILUM, border_value=1)
    thick, _ = ndimage.label(ndimage.binary_dilation(core, HILUM) & tissue)
    hanging = np.isin(thick, np.unique(thick[~lungs & (thick > 0)]))
    middles = sorted(float(np.nonzero(lung)[2].mean()) for lung in (right, left))
    medial = np.arange(hu.shape[2])
    hilum = hanging & (medial > middles[0]) & (medial < middles[1])
    pieces, count = ndimage.label(hilum & lungs)
    hilum &= (voxels(pieces, count) * ADULT_MM**3 / 1000 <= most_ml)[pieces]
    return right & ~hilum, left & ~hilum


def _favoured(chance: Field, small: Field) -> Field:
    """Raise the chances around dense disease; a healthy chest has none."""
    core = ndimage.binary_erosion((small >= AIR_HU) & (chance.max(axis=0) > 0.5), iterations=THICK)
    if not core.any():
        return chance
    near = isotropic_dilation(core, AROUND)
    return np.where(near, chance * ODDS / (chance * ODDS + 1 - chance), chance).astype(np.float32)


def _outline(hu: HU, small: Field, grid: IsoGrid, chance: Field) -> Lungs:
    """Bring the network's answer to the scan's grid.

    Tissue is lung as `settle` has it, where the network sees some of it beyond the outermost coarse voxel
    nearby: a rim of liver or chest wall, by which coarse outlines are uncertain, is left out.
    """
    coarse = [_pieces(side) for side in _sides(chance)]
    ml = max(int(lung.sum()) for lung in coarse) * ADULT_MM**3 / 1000
    if ml < MIN_LUNG_ML:
        raise ValueError(
            f"no lung found: the network sees {ml:.0f} ml, expected at least {MIN_LUNG_ML:.0f} of an adult's"
        )
    size, found = grid.spacing[0], list[Mask]()
    z, y, x = (s * ADULT_MM / size for s in grid.source_spacing)  # lengths are those of an adult's chest
    for lung, seen in zip(coarse, chance, strict=True):
        whole = np.zeros(hu.shape, bool)
        if (box := around(lung, MARGIN)) is not None:
            ratios = [size / s for s in grid.source_spacing]
            fine = tuple(
                slice(int(s.start * r), math.ceil(s.stop * r)) for s, r in zip(box, ratios, strict=True)
            )
            at = [grid.window_positions(axis)[fine[axis]] - box[axis].start for axis in range(3)]
            air, signed = hu[fine] < AIR_HU, _signed(lung[box], seen[box])
            field = linear(ADULT_MM * signed, at)
            near = _reach((small[box] >= AIR_HU) & (signed > RIM))
            allowed = air | (field > DEPTH_MM) | (linear(near, at) > 0)
            for other in found:
                allowed &= ~other[fine]
            whole[fine] = _pieces(settle(air, allowed, (z, y, x), field))
        found.append(whole)
    return Lungs(found[0], found[1])


def _sides(chance: Field) -> tuple[Mask, Mask]:
    """Right and left lung, as far as either is more likely than not."""
    found, is_right = chance.max(axis=0) > 0.5, chance[0] >= chance[1]
    return found & is_right, found & ~is_right


def _pieces(mask: Mask) -> Mask:
    """Leave specks out; a lung that the image cuts, or the heart parts in it, may have several pieces."""
    labels, count = ndimage.label(mask)
    sizes = voxels(labels, count)
    return np.asarray((sizes > PIECE * sizes.max())[labels])


def _reach(deep: Mask) -> Field:
    """Positive up to `REACH` voxels from the mask."""
    if not deep.any():
        return np.full(deep.shape, -1, np.float32)
    return np.asarray(REACH - ndimage.distance_transform_edt(~deep), np.float32)


def _signed(mask: Mask, chance: Field) -> Field:
    """Distance to the outline in voxels, positive inside; between two voxels the chance says where it is."""
    inner, outer = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
    signed = np.where(mask, inner - 0.5, 0.5 - outer)
    near = np.abs(signed) <= 0.5
    signed[near] = np.where(mask, np.maximum(chance, 0.5), np.minimum(chance, 0.5))[near] - 0.5
    return np.asarray(signed, np.float32)
