"""Lungs on a CT's own grid: by thresholds and morphology, by the package ``lungmask``, or out of a mask.

`split_lungs` decides on a coarse grid of about 2 mm, where a whole chest is a few million voxels, what is
lung, airway or bowel gas; the outline is then found on the CT's own grid. In order: body (no scanner table),
trachea and main bronchi, the two lungs, closing per lung (vessels, nodules, consolidation), outline.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.measure import block_reduce, label, regionprops
from skimage.morphology import isotropic_closing, isotropic_dilation
from skimage.segmentation import expand_labels

from lesionsynth.commands import optional
from normnet.prepare.grid import Mask, Spacing, check_spacing, linear

HU = npt.NDArray[np.int16]
Field = npt.NDArray[np.float32]
Factors = tuple[int, int, int]
PLANE = ndimage.generate_binary_structure(3, 1) & (np.arange(3) == 1)[:, None, None]
"""Neighbours by faces within a slice."""
CHUNK = 32
"""Slices worked on at once, where temporary arrays are larger than what they are made of."""

# ---- what is lung
AIR_HU = -320
"""Below is air or aerated lung; ground glass lies below, consolidation and vessels above."""
BONE_HU = 200
COARSE_MM = 2.0
MIN_LUNG_ML = 30.0
MIN_LUNG_RATIO = 0.08
"""Least volume of the second lung, of the first: a collapsed lung, not a stomach beside it."""
JOINED_RATIO = 0.3
"""A second air space of more than this share of the first is the other lung; else the first may be both."""
APART_MM, APART_SHARE = 40.0, 0.42
"""Least distance of the two lungs' centres, in mm and of their common width: 0.47 to 0.57 in 26 scans."""
SPLIT_DEPTHS_MM = (0.0, 2.5, 4.5, 6.5, 9.0, 12.0)
"""Tried in turn: the lungs touch in front of and behind the mediastinum, where they are thin."""

# ---- what is body
PADDED_RIM = 0.6
"""Share of the image's border that is dense, from which on it may be padding: cropped scans reach 0.45."""
WALL_MM = 60.0
"""Reach of the chest wall around the lungs' shadow, where padding hangs on it."""
PLAIN_AIR_HU, SPACE_DEPTH_MM = -980, 6.0
"""An air space with a fifth below, so far from its walls, is no lung: lungs have no tenth below -976."""
CUT_SHARE = 0.7
"""Share of a body's height and depth that is tissue where an image ends at its middle; less at an arm."""
HEAD_BONE_HU, HEAD_BONE, CHEST_AIR = 300, 0.1, 0.08
"""A head has more bone (a sixth) and less air (a fiftieth); a chest of contrast or fluid has only one."""

# ---- what is airway
AREA_MM2, MIN_LENGTH_MM, MIDDLE_MM = (40.0, 700.0), 20.0, 45.0
"""Of the trachea: cross-section, length, and distance from the middle of the body."""
THRESHOLDS = range(-970, -600, 20)
MAX_ML, GROWTH, GROWTH_ML = 180.0, 1.5, 12.0
"""Largest airways, and growth from one threshold to the next (times, plus); more is a burst into the lung."""
MAIN_MM = 3.0
"""Radius of main bronchi; thinner ones stay part of the lung."""

# ---- the outline
CLOSING_MM = 10.0
"""Ball of the closing per lung: wider than nodules, narrower than the curvature of the heart."""
THICK_MM = 4.0
"""From this slice distance on, neighbouring slices differ too much to close across them."""
COSTAL_MM, BITE_MM = 25.0, 4.0
"""Disc and least half-thickness of the dents that are filled at the chest wall."""
DOME_MM = 18.0
"""So far below a dent there must be lung again."""
REACH_MM, DEPTH_MM, RIM_MM = 2.5, 3.0, 1.5
HOLE_MM2 = 150.0
"""Holes of a slice filled: vessels; larger ones, open above or below, are the liver's dome or the hilum."""

# ---- what is plausible
MOST_ML, LARGE_ML = 12_000.0, 10_500.0
"""Refused, and warned of: 10.5 l is the 95th percentile of men of 2.0 m (Hall et al., Eur Respir J 2021)."""
MOST_SHARE = 0.95
"""Of the image: both lungs fill about half of their own box, and one lung two thirds of its own."""
LEAST_RATIO = 1 / 6
"""The smaller lung, of the other one: less is a collapsed lung, none, or one outside the image."""
AERATED_HU, LEAST_AERATED = -960, 0.3
"""Share between this and tissue: 0.71 and more in the lungs of 27 scans, 0.27 and less in all else."""
MOST_CUT = 0.05
"""Share of the lungs' shadow on a side of the image; less where an image is cropped to their box."""
APART_ML, APART_PART = 1000.0, 0.2
"""Volume by which two segmentations of the same lungs may differ, in ml and as a share of the larger."""
RIGHT, LEFT = 1, 2
"""Labels of lungmask's network R231."""


class Lungs(NamedTuple):
    """The two lungs on one grid.

    Attributes
    ----------
    right, left : (Z, Y, X) bool array
        The patient's right lung (low x in LPS order) and left lung; disjoint, one may be empty.
    """

    right: Mask
    left: Mask


def segment_lungs(hu: HU, spacing: Spacing) -> Mask:
    """Segment both lungs.

    Parameters
    ----------
    hu : (Z, Y, X) int16 array
        Hounsfield units in LPS index order (z from feet to head, y front to back, x right to left).
    spacing : (3,) floats
        Voxel size in mm, axis order z, y, x.

    Returns
    -------
    (Z, Y, X) bool array
        Lungs with their vessels, nodules and most of their consolidations; without trachea, main bronchi,
        bowel gas, air outside the body and the scanner table.

    Raises
    ------
    ValueError
        `hu` is not 3-D, `spacing` is not positive, or no lung is found.
    """
    lungs = split_lungs(hu, spacing)
    return lungs.right | lungs.left


def split_lungs(hu: HU, spacing: Spacing) -> Lungs:
    """Segment the lungs and tell right from left; arguments and errors as `segment_lungs`."""
    if hu.ndim != 3:
        raise ValueError(f"hu must be 3-D (z, y, x), got shape {hu.shape}")
    check_spacing(spacing)
    factors, mm = coarse_grid(spacing)
    whole = block_mean(hu, factors)
    fillers = _fillers(hu)
    share = block_mean(hu, factors, lambda slab: np.isin(slab, fillers))
    empty = ndimage.binary_dilation(share == 1) & (share > 0)  # with blocks that are half in it
    body = body_mask(whole, mm, empty)
    if (box := around(body)) is None:
        raise ValueError("no lung found: no body in the volume (no tissue thicker than 8 mm)")
    coarse, inside = whole[box], body[box]

    def search(middle: float) -> tuple[Mask, tuple[Mask, Mask]]:
        tree, main = _airways(coarse, inside, mm, middle)
        return main, _air_spaces(coarse, inside & ~tree & ~main, inside, mm)

    main, found = search(_middle(inside))
    cut = None if all(lung.any() for lung in found) else _cut_end(found[0] | found[1], coarse, inside)
    if cut is not None:  # the trachea lies there, and not in the middle of this half
        main, found = search(cut)
    check_chest(coarse, inside, found)
    right, left, airway = (np.zeros(whole.shape, bool) for _ in range(3))
    right[box], left[box] = _closed_lungs(coarse, found, inside & ~main, mm)
    airway[box] = main
    return _outline(hu, spacing, (right, left), airway, (empty & ~body, fillers))


def coarse_grid(spacing: Spacing) -> tuple[Factors, Spacing]:
    """Return how many voxels (z, y, x) become one of about `COARSE_MM`, and its size in mm."""
    fz, fy, fx = (max(1, round(COARSE_MM / s)) for s in spacing)
    return (fz, fy, fx), (spacing[0] * fz, spacing[1] * fy, spacing[2] * fx)


def block_mean(volume: npt.NDArray[Any], factors: Factors, seen: Callable[..., Any] = np.asarray) -> Field:
    """Mean over blocks of `factors` voxels (z, y, x) of what is `seen` in a slab of the volume.

    The edge is repeated where the shape is no multiple.
    """
    means = []
    for z in range(0, len(volume), CHUNK * factors[0]):
        slab = seen(volume[z : z + CHUNK * factors[0]])
        slab = np.pad(slab, [(0, -n % f) for n, f in zip(slab.shape, factors, strict=True)], mode="edge")
        means.append(block_reduce(slab, factors, np.mean, func_kwargs={"dtype": np.float32}))
    return np.concatenate(means)


def _fillers(hu: HU) -> HU:
    """List the values of a constant outside: those in a twentieth of the border, in runs of 8 voxels."""
    border = np.concatenate([hu[:, 0], hu[:, -1], hu[:, :, 0], hu[:, :, -1]], axis=1).ravel()
    runs = border[: border.size // 8 * 8].reshape(-1, 8)
    values, counts = np.unique(runs[np.ptp(runs, axis=1) == 0, 0], return_counts=True)
    return np.asarray(values[counts > 0.05 * len(runs)])


def body_mask(coarse: Field, mm: Spacing, empty: Mask | None = None) -> Mask:
    """Fill the patient: tissue left by an opening (tables are thin shells), largest piece, holes filled.

    `empty` is where the file holds one value only, beyond what was scanned. A lung that the image cuts is
    body, although its air reaches the image's border. Where most of the border is as dense as tissue, the
    image may be padded (with noise, a gradient, anything): air spaces that are plain air are then the
    outside, whatever surrounds them.
    """
    tissue = coarse >= AIR_HU
    rim = np.ones(coarse.shape, bool)
    rim[:, 1:-1, 1:-1] = False
    padded = tissue[rim].mean() > PADDED_RIM
    core = plane_opened(tissue, 4.2, mm)
    # the opening rounds corners off: take back tissue close to the core
    core = plane_dilated(core if padded else largest(core), 4.2, mm) & tissue
    if not padded:
        core = largest(core)
    spaces = ~core if padded or empty is None else ~core & ~empty
    labels, count = ndimage.label(spaces)
    large = np.flatnonzero(voxels(labels, count) * (mm[0] * mm[1] * mm[2]) > 1000 * MIN_LUNG_ML)
    deep = np.where(plane_eroded(spaces, SPACE_DEPTH_MM, mm), labels, 0)
    walled = _between(core, 1) | _between(core, 2)
    lungs = [
        n
        for n in large
        if (at := deep == n).any()
        and np.percentile(coarse[at], 20) > PLAIN_AIR_HU
        and np.median(coarse[at]) < AIR_HU
        and walled[at].mean() > 0.5
    ]
    lung = np.isin(labels, lungs)
    body: Mask = filled(core, PLANE) | lung
    if not padded:
        return body
    body &= lung | ~np.isin(labels, large)
    if lungs:  # padding that touches the body reaches farther
        body &= isotropic_dilation(lung.any(axis=0), WALL_MM, spacing=mm[1:])
    pieces, count = ndimage.label(body)
    held = voxels(np.where(lung, pieces, 0) if lungs else pieces, count)
    return np.asarray(pieces == max(int(held.argmax()), 1))


def _between(mask: Mask, axis: int) -> Mask:
    """Tell where the mask lies on both sides along an axis."""
    before = np.logical_or.accumulate(mask, axis)
    after = np.flip(np.logical_or.accumulate(np.flip(mask, axis), axis), axis)
    return np.asarray(before & after)


def _airways(coarse: Field, body: Mask, mm: Spacing, middle: float) -> tuple[Mask, Mask]:
    """Grow the airways from the trachea: all that grew, and trachea and main bronchi with their wall.

    A region grows at rising thresholds; the last before it bursts into the lung is kept. Both are empty where
    no trachea is near x = `middle` (voxels).
    """
    seed = _trachea(coarse, body, mm, middle)
    tree, ml = seed, mm[0] * mm[1] * mm[2] / 1000
    for threshold in THRESHOLDS if seed.any() else ():
        labels, _ = ndimage.label(((coarse < threshold) & body) | seed)
        grown = np.isin(labels, np.unique(labels[seed]))
        if grown.sum() * ml > min(MAX_ML, GROWTH * tree.sum() * ml + GROWTH_ML):
            break
        tree = grown
    labels, _ = ndimage.label((plane_opened(tree, MAIN_MM, mm) & tree) | seed)
    # the main bronchi hang on the trachea; thick pieces farther out are bronchi or bullae in the lung
    main = np.isin(labels, np.unique(labels[seed]))
    return tree, plane_dilated(main, 2.2, mm)


def _trachea(coarse: Field, body: Mask, mm: Spacing, middle: float) -> Mask:
    """Chain round air sections near the middle from the top down; empty where the longest is too short."""
    best: list[Mask] = []
    above: list[list[Mask]] = []
    bottom = 0
    for z in reversed(range(len(coarse))):
        chains = []
        for section in _round_sections((coarse[z] < -650) & body[z], mm[1:], middle):
            fitting = [chain for chain in above if (chain[-1] & section).any() and _similar(chain, section)]
            chains.append([*max(fitting, key=len, default=[]), section])
            if len(chains[-1]) > len(best):
                best, bottom = chains[-1], z
        above = chains
    seed = np.zeros(coarse.shape, bool)
    if len(best) * mm[0] >= MIN_LENGTH_MM:
        seed[bottom : bottom + len(best)] = best[::-1]
    return seed


def _round_sections(air: Mask, mm: tuple[float, float], middle: float) -> Iterator[Mask]:
    for part in regionprops(label(air, connectivity=1), spacing=mm):
        height, width = (n * s for n, s in zip(part.image.shape, mm, strict=True))
        if (
            AREA_MM2[0] <= part.area <= AREA_MM2[1]
            and max(height, width) <= 2.2 * min(height, width) + mm[0]
            and part.extent >= 0.5
            and abs(part.centroid[1] - middle * mm[1]) < MIDDLE_MM
        ):
            section = np.zeros(air.shape, bool)
            section[part.slice] = part.image
            yield section


def _similar(chain: list[Mask], section: Mask) -> bool:
    size = float(np.mean([np.count_nonzero(s) for s in chain[-5:]]))
    return 0.4 * size <= int(np.count_nonzero(section)) <= 2.2 * size + 4


def _air_spaces(coarse: Field, allowed: Mask, body: Mask, mm: Spacing) -> tuple[Mask, Mask]:
    """Choose the air spaces that are lung and tell right from left.

    Bowel and stomach gas is told by its place: it ends below the middle of the largest lung. Small separate
    air spaces are no loss: closing takes those back that a lung surrounds.
    """
    labels, _ = ndimage.label((coarse < AIR_HU) & allowed)
    spaces = sorted(regionprops(labels, spacing=mm), key=lambda space: -space.area)
    least = 1000 * MIN_LUNG_ML
    if not spaces or spaces[0].area < least:
        ml = spaces[0].area / 1000 if spaces else 0
        raise ValueError(
            f"no lung found: the largest air space inside the body has {ml:.0f} ml, expected at least "
            f"{MIN_LUNG_ML:.0f}"
        )
    first, *others = spaces
    one, second = labels == first.label, np.zeros(labels.shape, bool)
    for space in others:
        if space.area < max(least, MIN_LUNG_RATIO * first.area):
            break
        top = (space.bbox[3] - 1) * mm[0]
        if top >= first.centroid[0] and abs(space.centroid[2] - first.centroid[2]) > APART_MM:
            second = labels == space.label
            break
    parts = None if second.sum() > JOINED_RATIO * one.sum() else _two_halves(one, mm)
    one, second = parts or (one, second)
    if second.any():
        middle = _middle(second)
    else:
        cut = _cut_end(one, coarse, body)
        middle = _middle(body) if cut is None else cut
    return (one, second) if _middle(one) < middle else (second, one)


def _two_halves(mask: Mask, mm: Spacing) -> tuple[Mask, Mask] | None:
    """Part an air space, where it is thin, into two halves side by side; None where it is one lung."""
    deep = ndimage.distance_transform_edt(mask, sampling=mm)
    width = np.ptp(np.flatnonzero(mask.any(axis=(0, 1)))) * mm[2]
    for depth in SPLIT_DEPTHS_MM:
        labels, count = ndimage.label(deep > depth)
        if count < 2:
            continue
        sizes = voxels(labels, count)
        a, b = np.argsort(-sizes)[:2]
        if sizes[b] < 0.1 * sizes[a]:
            continue
        halves = (labels == a).view(np.uint8) + np.uint8(2) * (labels == b).view(np.uint8)
        apart = abs(_middle(halves == 1) - _middle(halves == 2)) * mm[2]
        if apart >= max(APART_MM, APART_SHARE * width):
            owner = expand_labels(halves, np.inf, spacing=mm)
            return mask & (owner == 1), mask & (owner == 2)
    return None


def _cut_end(lung: Mask, coarse: Field, body: Mask) -> float | None:
    """Tell where, along x, a body with one lung in view is cut at the midline; None where it is whole.

    The lung lies then in the middle of what is left, and more of that end is tissue than of the round one.
    """
    ends = (body & (coarse >= AIR_HU)).sum(axis=(0, 1)) / body.any(axis=2).sum()
    first, last = ends[:2].max(), ends[-2:].max()  # the outermost voxels may be half outside
    off = abs(_middle(body) - _middle(lung)) / body.shape[2]
    if first == last or not (off < 0.1 or (max(first, last) > CUT_SHARE and abs(last - first) > 0.1)):
        return None
    return 0.0 if first > last else float(body.shape[2] - 1)


def _middle(mask: Mask) -> float:
    """Mean x, in voxels."""
    return float(np.average(np.arange(mask.shape[2]), weights=mask.sum(axis=(0, 1))))


def check_chest(coarse: Field, body: Mask, lungs: tuple[Mask, Mask]) -> None:
    """Refuse a head, whose sinuses would pass for lungs: ValueError where bone is much and air little."""
    tissue = int(body.sum())
    air = int(lungs[0].sum() + lungs[1].sum()) / tissue
    bone = int(((coarse >= HEAD_BONE_HU) & body).sum()) / tissue
    if air < CHEST_AIR and bone > HEAD_BONE:
        raise ValueError(
            f"no lung found: must be a CT of the chest, but {air:.1%} of the body is air space and "
            f"{bone:.1%} bone, as in a head"
        )


def _closed_lungs(coarse: Field, lungs: tuple[Mask, Mask], allowed: Mask, mm: Spacing) -> tuple[Mask, Mask]:
    """Close each lung with a ball: vessels, nodules and consolidations join it, the airways do not."""
    right, left = lungs
    reach = (mm[0] if mm[0] < THICK_MM else 2 * CLOSING_MM, mm[1], mm[2])
    a, b = (_closed(lung, CLOSING_MM, reach) & allowed for lung in lungs)
    both = a & b & ~right & ~left  # tissue between the lungs that both closings claim: mediastinum
    a, b = a & ~left & ~both, b & ~right & ~both
    soft = allowed & (coarse < BONE_HU)
    return a | (_costal_bites(a, b, mm) & soft & ~b), b | (_costal_bites(b, a, mm) & soft & ~a)


def _costal_bites(lung: Mask, other: Mask, mm: Spacing) -> Mask:
    """Find what a wide disc closes on the chest wall's side, slice by slice.

    The chest wall's side of a lung is convex, so a dent there is consolidation; the dents of the heart, the
    liver and the hilum lie on the other side, towards the middle between the lungs. A dent with no lung below
    it is the dome of the diaphragm.
    """
    bites = np.zeros(lung.shape, bool)
    if not lung.any() or not other.any():
        return bites
    dents = plane_opened(_closed(lung, COSTAL_MM, (4 * COSTAL_MM, mm[1], mm[2])) & ~lung, BITE_MM, mm)
    dents &= ~filled(lung, PLANE)  # holes are domes
    below = max(1, round(DOME_MM / mm[0]))

    def centre(plane: Mask) -> npt.NDArray[np.float64]:
        return np.multiply(ndimage.center_of_mass(plane), mm[1:])

    for z in np.flatnonzero(dents.any(axis=(1, 2)) & other.any(axis=(1, 2))):
        inner = centre(lung[z])
        outward = inner - centre(other[z])
        labels, count = ndimage.label(dents[z])
        for number in range(1, count + 1):
            dent = labels == number
            on_lung = (lung[z - below] | bites[z - below])[dent].mean() if z >= below else 0.0
            if (centre(dent) - inner) @ outward > 0 and on_lung > 0.5:
                bites[z] |= dent
    return bites


def _closed(mask: Mask, radius_mm: float, spacing: Spacing) -> Mask:
    """Close with a ball; space beyond the volume is like any other."""
    if (box := around(mask)) is None:
        return mask
    pads = [int(np.ceil(radius_mm / s)) + 1 for s in spacing]
    padded = np.pad(mask[box], [(p, p) for p in pads])
    closed = isotropic_closing(padded, radius_mm, spacing=spacing)
    out = mask.copy()
    out[box] |= closed[tuple(slice(p, -p) for p in pads)]
    return out


def _outline(
    hu: HU, spacing: Spacing, lungs: tuple[Mask, Mask], airway: Mask, outside: tuple[Mask, HU]
) -> Lungs:
    """Bring the coarse lungs to the volume's own grid and set their outline there.

    Nothing is lung that is empty: in the mask of `outside`, with one of its values.
    """
    factors, mm = coarse_grid(spacing)
    if not any(lung.any() for lung in lungs):
        raise ValueError("no lung found: nothing is left of the air spaces")
    found: list[Mask] = []
    for lung in lungs:
        whole = np.zeros(hu.shape, bool)
        if (box := around(lung, 3)) is not None:
            fine = tuple(slice(s.start * f, s.stop * f) for s, f in zip(box, factors, strict=True))
            part = hu[fine]
            at = [_fine(f, n) for f, n in zip(factors, part.shape, strict=True)]
            blocks = [np.arange(n) // f for f, n in zip(factors, part.shape, strict=True)]
            empty = outside[0][box][np.ix_(*blocks)]
            empty[empty] = np.isin(part[empty], outside[1])
            allowed = ~empty & (linear(_signed(airway[box], mm), at) <= 0)
            for other in found:
                allowed &= ~other[fine]
            field = linear(_signed(lung[box], mm), at)
            whole[fine] = largest(settle((part < AIR_HU) & ~empty, allowed, spacing, field))
        found.append(whole)
    return Lungs(found[0], found[1])


def _fine(factor: int, n: int) -> npt.NDArray[np.float64]:
    """Where n voxels lie along an axis, in blocks of so many."""
    return np.asarray((np.arange(n) + 0.5) / factor - 0.5)


def _signed(mask: Mask, mm: Spacing) -> Field:
    """Distance in mm to the outline: positive inside; far away where the mask is empty."""
    if not mask.any():
        return np.full(mask.shape, -1e3, np.float32)
    inner, outer = (ndimage.distance_transform_edt(part, sampling=mm) for part in (mask, ~mask))
    half = min(mm) / 2  # distances run between voxel centres, the outline lies half-way
    return np.asarray(inner - outer - np.where(mask, half, -half), np.float32)


def settle(air: Mask, allowed: Mask, spacing: Spacing, field: Field) -> Mask:
    """Set the outline of a lung by intensities where they decide, and else by its field.

    `air` is as dark as lung, `allowed` may be this lung, and `field` is the distance in mm to its outline as
    it is known so far, positive inside. Air is lung up to `REACH_MM` outside; tissue only from `DEPTH_MM`
    inside, or where it is thick: a rim of chest wall (partial volume) is left out, a consolidation at the
    pleura stays.
    """
    tissue = plane_opened((field > 0) & ~air, RIM_MM, spacing)
    mask = ((air & (field > -REACH_MM)) | (field > DEPTH_MM) | tissue) & allowed
    return filled(filled(mask), PLANE, round(HOLE_MM2 / (spacing[1] * spacing[2]))) & allowed


def split_mask(mask: Mask, spacing: Spacing) -> Lungs:
    """Tell right from left in a given lung mask.

    Parameters
    ----------
    mask : (Z, Y, X) bool array
        Both lungs, LPS index order.
    spacing : (3,) floats
        Voxel size in mm, axis order z, y, x.

    Returns
    -------
    Lungs
        Every voxel of the mask on one side; parts that are not attached go with the nearer lung.

    Raises
    ------
    ValueError
        The mask does not show two lungs side by side.
    """
    factors, mm = coarse_grid(spacing)
    share = block_mean(mask.view(np.uint8), factors)
    box = around(share > 0, 2)
    parts = None if box is None else _two_halves(share[box] >= 0.5, mm)
    if box is None or parts is None:
        raise ValueError("the lung mask must show two lungs side by side, to tell right from left")
    right, left = sorted(parts, key=_middle)
    nearer = np.zeros(share.shape, np.float32)  # distances also cover the voxels that the coarse mask lost
    nearer[box] = _signed(right, mm) - _signed(left, mm)
    at = [_fine(f, n) for f, n in zip(factors, mask.shape, strict=True)]
    chunks = (at[0][z : z + CHUNK] for z in range(0, len(mask), CHUNK))
    is_right = np.concatenate([linear(nearer, [part, *at[1:]]) >= 0 for part in chunks])
    return Lungs(mask & is_right, mask & ~is_right)


def split_by_lungmask(hu: HU, spacing: Spacing) -> Lungs:
    """Segment the lungs with ``lungmask.LMInferer`` [1]_ and tell right from left.

    Parameters
    ----------
    hu, spacing
        As `segment_lungs`.

    Raises
    ------
    ImportError
        ``lungmask`` is not installed.
    ValueError
        It finds no lung.

    References
    ----------
    .. [1] J. Hofmanninger et al., "Automatic lung segmentation in routine imaging is primarily a data
       diversity problem, not a methodology problem", European Radiology Experimental, 2020.
    """
    import SimpleITK as sitk

    # LPS index order is ITK's identity direction: the network sees patients upright
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing[::-1])
    labels = np.asarray(_inferer(check_installed()).apply(image))
    if labels.shape != hu.shape:
        raise ValueError(f"lungmask must label every voxel of {hu.shape}, got {labels.shape}")
    lungs = Lungs(labels == RIGHT, labels == LEFT)
    if not lungs.right.any() and not lungs.left.any():
        raise ValueError("no lung found by lungmask")
    return lungs


def check_installed() -> Any:
    """Give the class of networks of ``lungmask``; an ImportError says how to install it."""
    advice = "lungs='lungmask' needs the package lungmask: pip install lungmask; or use lungs='network'"
    return optional("lungmask", advice).LMInferer


@functools.cache
def _inferer(inferer: Any) -> Any:
    """Load the network once per process."""
    return inferer()


def check_plausible(hu: HU, mask: Mask, spacing: Spacing, left: Mask | None = None) -> None:
    """Refuse lungs that nobody has, and warn of unlikely ones: outside air, a mask of something else.

    Small lungs are none of it: children, a collapsed lung, a few slices.

    Parameters
    ----------
    hu, spacing
        As `segment_lungs`.
    mask : (Z, Y, X) bool array
        Both lungs, or the one that is asked for.
    left : (Z, Y, X) bool array, optional
        The left lung, where both were searched.

    Raises
    ------
    ValueError
        `mask` is empty, or has more than `MOST_ML` or `MOST_SHARE` of the image.

    Warns
    -----
    UserWarning
        Volume above `LARGE_ML`, one lung below `LEAST_RATIO` of the other, a mask with less than
        `LEAST_AERATED`, lungs cut by the image's border by more than `MOST_CUT`.
    """
    count = int(mask.sum())
    ml = count * float(np.prod(spacing)) / 1000
    if not count or ml > MOST_ML or count > MOST_SHARE * mask.size:
        raise ValueError(
            f"lungs must have more than 0 and at most {MOST_ML:.0f} ml and {MOST_SHARE:.0%} of the image, "
            f"got {ml:.0f} ml and {count / mask.size:.0%}: air around the body, or another mask?"
        )
    said = []
    if ml > LARGE_ML:
        said.append(f"the lungs have {ml:.0f} ml, more than {LARGE_ML:.0f}: look at their outline")
    if left is not None:
        share = int(left.sum()) / count
        if min(share, 1 - share) * (1 + LEAST_RATIO) < LEAST_RATIO:
            said.append(
                f"the right lung has {ml * (1 - share):.0f} ml, the left {ml * share:.0f}: is one collapsed, "
                "removed or outside the image?"
            )
    planes = (plane[at] for plane, at in zip(hu, mask, strict=True))
    aerated = sum(int(((plane > AERATED_HU) & (plane < AIR_HU)).sum()) for plane in planes) / count
    if aerated < LEAST_AERATED:
        said.append(f"{aerated:.0%} of the lungs lie between {AERATED_HU} and {AIR_HU} HU: are they lungs?")
    for axis, index, side in ((1, 0, "front"), (1, -1, "back"), (2, 0, "right"), (2, -1, "left")):
        if mask.take(index, axis).sum() / mask.any(axis).sum() > MOST_CUT:
            said.append(
                f"the image ends within the lungs at the patient's {side}: what lies beyond is missing"
            )
    for text in said:
        warnings.warn(text, stacklevel=2)


def check_agreement(lungs: Mask, classical: Mask, spacing: Spacing) -> bool:
    """Tell whether lungs by a network and by thresholds are the same lungs.

    Parameters
    ----------
    lungs, classical : (Z, Y, X) bool arrays
        By the network; by thresholds, empty where these find none.
    spacing : (3,) floats
        Voxel size in mm.

    Returns
    -------
    bool
        False where more than `APART_ML`, or `APART_PART` of the larger, belongs to one of them alone.

    Warns
    -----
    UserWarning
        They are not; says what which has alone.
    """
    ml = float(np.prod(spacing)) / 1000
    whole, other = int(np.count_nonzero(lungs)), int(np.count_nonzero(classical))
    shared = int(np.count_nonzero(lungs & classical))
    more, less = (whole - shared) * ml, (other - shared) * ml
    if more + less <= min(APART_ML, APART_PART * max(whole, other) * ml):
        return True
    text = (
        f"the lung network has {more:.0f} ml that thresholds have not, and lacks {less:.0f} ml that they have"
        if other
        else f"the lung network has {more:.0f} ml, and thresholds find no lung"
    )
    warnings.warn(f"{text}: dense disease, or a wrong outline? Look at it", stacklevel=2)
    return False


# ---- tools


def around(mask: Mask, margin: int = 0) -> tuple[slice, slice, slice] | None:
    """Box around the mask with a margin, as far as the grid reaches; None where it is empty."""
    boxes = ndimage.find_objects(mask.view(np.uint8))
    if not boxes:
        return None
    a, b, c = (slice(max(s.start - margin, 0), s.stop + margin) for s in boxes[0])
    return a, b, c


def voxels(labels: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """Count the voxels of each label, none of label 0; by slices, as counts take 8 bytes a voxel."""
    sizes = np.zeros(count + 1, int)
    for plane in labels:
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
    sizes[0] = 0
    return sizes


def largest(mask: Mask) -> Mask:
    """Keep the largest component; faces connect."""
    labels, count = ndimage.label(mask)
    return np.asarray(labels == voxels(labels, count).argmax()) if count else mask


def filled(mask: Mask, neighbours: Mask | None = None, most: float = np.inf) -> Mask:
    """Fill the holes that the mask encloses (with `PLANE`, its slices) of up to so many voxels.

    SciPy's ``binary_fill_holes`` gives the same for all holes, and takes three times as long.
    """
    labels, count = ndimage.label(~mask, neighbours)
    holes = voxels(labels, count) <= most
    for axis in range(3) if neighbours is None else (1, 2):
        holes[labels.take([0, -1], axis)] = False
    holes[0] = True  # the mask itself
    return np.asarray(holes[labels])


def plane_dilated(mask: Mask, radius_mm: float, spacing: Spacing) -> Mask:
    """Dilate every axial slice with a disc; SciPy's ``binary_dilation`` takes four times as long."""
    ny, nx = (int(radius_mm / s) for s in spacing[1:])
    out, padded = mask.copy(), np.pad(mask, [(0, 0), (ny, ny), (nx, nx)])
    for y, x in np.ndindex(2 * ny + 1, 2 * nx + 1):
        if ((y - ny) * spacing[1]) ** 2 + ((x - nx) * spacing[2]) ** 2 <= radius_mm**2:
            out |= padded[:, y : y + mask.shape[1], x : x + mask.shape[2]]
    return out


def plane_eroded(mask: Mask, radius_mm: float, spacing: Spacing) -> Mask:
    """Erode every axial slice with a disc; beyond the slice is not outside."""
    return ~plane_dilated(~mask, radius_mm, spacing)


def plane_opened(mask: Mask, radius_mm: float, spacing: Spacing) -> Mask:
    """Open every axial slice with a disc."""
    return plane_dilated(plane_eroded(mask, radius_mm, spacing), radius_mm, spacing)
