"""Segment the lungs by a network that was trained to find them whatever fills them (`normnet.chests`).

It sees the whole chest on a coarse grid. On the scan's own grid the outline follows intensities where they
decide, as thresholds do, and the network where they do not: at dense disease.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from normnet.config import BUNDLED_LUNGS
from normnet.model import Model, weights_file
from normnet.prepare.chest import ADULT_MM, chest_grid, shrink, window, without_hilum
from normnet.prepare.grid import IsoGrid, linear
from normnet.prepare.lungs import AIR_HU, DEPTH_MM, MIN_LUNG_ML, Lungs, around, settle
from normnet.prepare.morphology import Mask, Spacing, component_sizes, within

THICK, AROUND, ODDS = 3, 5, 9.0
"""Tissue that stays where so many layers are taken off is dense disease; up to so many coarse voxels around
it the odds of being lung count so many times: what it makes uncertain is rather searched than left out."""
HILUM_ML = 20.0
"""Of a piece of hilum at most; in nine healthy chests the largest had 16 ml."""
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


def split_by_network(hu: npt.NDArray[np.int16], spacing: Spacing, network: Model) -> Lungs:
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
    chance = without_vessels(chances(window(small), network), small)
    return outline(hu, small, grid, favoured(chance, small))


def chances(image: npt.NDArray[np.float32], network: Model) -> npt.NDArray[np.float32]:
    """Ask the network, once as it is and once mirrored.

    Parameters
    ----------
    image : (z, y, x) float32 array
        From `normnet.prepare.chest.window`.
    network : Model
        Of the task lungs.

    Returns
    -------
    (2, z, y, x) float32 array
        Chance of right and of left lung.
    """
    pads = [-n % network.config.multiple for n in image.shape]
    padded = torch.from_numpy(np.pad(image, [(p // 2, p - p // 2) for p in pads]))[None, None]
    box = tuple(slice(p // 2, p // 2 + n) for p, n in zip(pads, image.shape, strict=True))
    seen = network.healthy_probability(padded)[0]
    mirrored = network.healthy_probability(padded.flip(-1))[0].flip(0, -1)
    return np.asarray(((seen + mirrored) / 2)[(slice(None), *box)].numpy())


def without_vessels(
    chance: npt.NDArray[np.float32], small: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Leave the large vessels at the mediastinum out, as training did; what is larger is disease.

    Parameters and return value are those of `favoured`, where such vessels have no chance.
    """
    right, left = _sides(chance)
    if not (right.any() and left.any()):
        return chance
    kept_right, kept_left = without_hilum(small, right, left, HILUM_ML)
    return np.where((right ^ kept_right) | (left ^ kept_left), np.float32(0), chance)


def favoured(chance: npt.NDArray[np.float32], small: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Raise the chances around dense disease; a healthy chest has none.

    Parameters
    ----------
    chance : (2, z, y, x) float32 array
        From `chances`.
    small : (z, y, x) float32 array
        HU on the coarse grid.

    Returns
    -------
    (2, z, y, x) float32 array
        The odds times `ODDS` near tissue that is thick and lung, and as they were elsewhere.
    """
    core = ndimage.binary_erosion((small >= AIR_HU) & (chance.max(axis=0) > 0.5), iterations=THICK)
    near = within(core, AROUND, (1, 1, 1))
    return np.where(near, chance * ODDS / (chance * ODDS + 1 - chance), chance).astype(np.float32)


def outline(
    hu: npt.NDArray[np.int16],
    small: npt.NDArray[np.float32],
    grid: IsoGrid,
    chance: npt.NDArray[np.float32],
) -> Lungs:
    """Bring the network's answer to the scan's grid.

    Tissue is lung as `settle` has it, where the network sees some of it beyond the outermost coarse voxel
    nearby: a rim of liver or chest wall, by which coarse outlines are uncertain, is left out.

    Parameters
    ----------
    hu : (Z, Y, X) int16 array
        The scan.
    small : (z, y, x) float32 array
        The same on the coarse grid, from `normnet.prepare.chest.shrink`.
    grid : IsoGrid
        The coarse grid.
    chance : (2, z, y, x) float32 array
        From `chances`.

    Raises
    ------
    ValueError
        No lung is found.
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
            fine, places = [], []
            for axis, side in enumerate(box):
                ratio = size / grid.source_spacing[axis]
                last = min(int(np.ceil(side.stop * ratio)), hu.shape[axis])
                fine.append(slice(int(side.start * ratio), last))
                places.append(grid.window_positions(axis)[fine[-1]] - side.start)
            part = tuple(fine)
            air, signed = hu[part] < AIR_HU, _signed(lung[box], seen[box])
            field = linear(ADULT_MM * signed, places)
            near = _reach((small[box] >= AIR_HU) & (signed > RIM))
            allowed = air | (field > DEPTH_MM) | (linear(near, places) > 0)
            for other in found:
                allowed &= ~other[part]
            whole[part] = _pieces(settle(air, allowed, (z, y, x), field))
        found.append(whole)
    return Lungs(found[0], found[1])


def _sides(chance: npt.NDArray[np.float32]) -> tuple[Mask, Mask]:
    """Right and left lung, as far as either is more likely than not."""
    found, is_right = chance.max(axis=0) > 0.5, chance[0] >= chance[1]
    return found & is_right, found & ~is_right


def _pieces(mask: Mask) -> Mask:
    """Leave specks out; a lung that the image cuts, or the heart parts in it, may have several pieces."""
    labels, count = ndimage.label(mask)
    sizes = component_sizes(labels, count)
    sizes[0] = 0
    return np.asarray((sizes > PIECE * sizes.max())[labels])


def _reach(deep: Mask) -> npt.NDArray[np.float32]:
    """Positive up to `REACH` voxels from the mask."""
    if not deep.any():
        return np.full(deep.shape, -1, np.float32)
    return np.asarray(REACH - ndimage.distance_transform_edt(~deep), np.float32)


def _signed(mask: Mask, chance: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Distance to the outline in voxels, positive inside; between two voxels the chance says where it is."""
    inner, outer = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
    signed = np.where(mask, inner - 0.5, 0.5 - outer)
    near = np.abs(signed) <= 0.5
    signed[near] = np.where(mask, np.maximum(chance, 0.5), np.minimum(chance, 0.5))[near] - 0.5
    return np.asarray(signed, np.float32)
