"""Find the trachea and the main bronchi, which a threshold takes for lung.

The trachea is the one air space near the midline that keeps a small, round cross-section over several
centimetres. From there a region grows at rising thresholds; the last threshold before it bursts into the lung
is kept (explosion control). Bronchi inside the lung are then dropped again, as they are thinner: they stay
part of the lung.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from normnet.prepare.morphology import Mask, Spacing, plane_dilated, plane_opened

AREA_MM2 = (40.0, 700.0)
MAX_ML = 180.0
"""Trachea and bronchi together; larger means that the region burst into the lung."""
GROWTH = 1.5
"""Largest growth in volume (plus `GROWTH_ML`) from one threshold to the next."""
GROWTH_ML = 12.0
THRESHOLDS = range(-970, -600, 20)
MIN_LENGTH_MM = 20.0
LARGE_RADIUS_MM = 3.0


@dataclass(frozen=True)
class Airways:
    """Trachea and bronchi on the coarse grid.

    Attributes
    ----------
    tree : (Z, Y, X) bool array
        All that grew: trachea, main bronchi and the larger bronchi in the lung.
    large : (Z, Y, X) bool array
        Trachea and main bronchi with their wall; not part of the lungs.
    """

    tree: Mask
    large: Mask


def grow_airways(coarse: npt.NDArray[np.float32], body: Mask, mm: Spacing, middle: float) -> Airways:
    """Grow the airways from the trachea downwards; empty masks where none is near x = `middle` (voxels)."""
    seed = find_trachea(coarse, body, mm, middle)
    empty = np.zeros(coarse.shape, bool)
    if seed is None:
        return Airways(empty, empty)
    tree = _explode(coarse, body, seed, mm)
    thick = (plane_opened(tree, LARGE_RADIUS_MM, mm) & tree) | seed
    labels, _ = ndimage.label(thick)
    # the main bronchi hang on the trachea; thick pieces farther out are bronchi or bullae in the lung
    hanging = np.isin(labels, np.unique(labels[seed]))
    return Airways(tree, plane_dilated(hanging, 2.2, mm))


def find_trachea(coarse: npt.NDArray[np.float32], body: Mask, mm: Spacing, middle: float) -> Mask | None:
    """Chain of round air sections near the midline, the longest from the top; None where it is too short."""
    air = (coarse < -650) & body
    area = mm[1] * mm[2]
    best: list[tuple[int, Mask]] = []
    open_chains: list[list[tuple[int, Mask]]] = []
    for z in range(coarse.shape[0] - 1, -1, -1):
        sections = [s for s in _sections(air[z], area, mm) if abs(s[1] - middle) * mm[2] < 45]
        chains: list[list[tuple[int, Mask]]] = []
        for section, _ in sections:
            ahead = [c for c in open_chains if (c[-1][1] & section).any() and _similar(c, section)]
            chain = [*max(ahead, key=len), (z, section)] if ahead else [(z, section)]
            chains.append(chain)
            if len(chain) > len(best):
                best = chain
        open_chains = chains
    if len(best) * mm[0] < MIN_LENGTH_MM:
        return None
    seed = np.zeros(coarse.shape, bool)
    for z, section in best:
        seed[z] |= section
    return seed


def _similar(chain: list[tuple[int, Mask]], section: Mask) -> bool:
    sizes = [int(s.sum()) for _, s in chain[-5:]]
    return 0.4 * float(np.mean(sizes)) <= int(section.sum()) <= 2.2 * float(np.mean(sizes)) + 4


def _sections(air: Mask, area: float, mm: Spacing) -> list[tuple[Mask, float]]:
    """Round air components of a slice: (mask, x of the centre)."""
    labels, count = ndimage.label(air)
    found: list[tuple[Mask, float]] = []
    for number, box in enumerate(ndimage.find_objects(labels, count), start=1):
        part = labels[box] == number
        size = int(part.sum()) * area
        height, width = part.shape[0] * mm[1], part.shape[1] * mm[2]
        if not AREA_MM2[0] <= size <= AREA_MM2[1] or max(height, width) > 2.2 * min(height, width) + mm[1]:
            continue
        if size < 0.5 * height * width:
            continue
        whole = np.zeros(air.shape, bool)
        whole[box] = part
        found.append((whole, box[1].start + float(np.nonzero(part)[1].mean())))
    return found


def _explode(coarse: npt.NDArray[np.float32], body: Mask, seed: Mask, mm: Spacing) -> Mask:
    """Grow the seed at rising thresholds; stop before the volume bursts."""
    ml = mm[0] * mm[1] * mm[2] / 1000
    tree: Mask = seed
    for threshold in THRESHOLDS:
        labels, _ = ndimage.label(((coarse < threshold) & body) | seed)
        touched = np.unique(labels[seed])
        grown: Any = np.isin(labels, touched[touched > 0])
        volume, before = grown.sum() * ml, tree.sum() * ml
        if volume > MAX_ML or volume > GROWTH * before + GROWTH_ML:
            break
        tree = grown
    return tree
