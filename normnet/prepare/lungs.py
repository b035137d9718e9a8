"""Segment the lungs of a chest CT by thresholds and morphology, so that no hand-made mask is needed.

What is lung, airway or bowel gas is decided on a coarse grid of about 2 mm, where a whole chest is a few
million voxels; the outline is then found on the volume's own grid. The steps, in order: body (no scanner
table), air in the body, trachea and main bronchi, the two lungs, closing per lung (vessels at the hilum,
nodules, consolidation), outline.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from normnet.prepare.airways import Airways, grow_airways
from normnet.prepare.morphology import (
    Mask,
    Spacing,
    block_mean,
    bounding_box,
    closed,
    component_sizes,
    fill_enclosed,
    fill_slices,
    largest,
    plane_dilated,
    plane_eroded,
    plane_opened,
    spread,
    within,
)

AIR_HU = -320
"""Below is air or aerated lung; ground glass lies below, consolidation and vessels above."""
COARSE_MM = 2.0
CLOSING_MM = 10.0
"""Ball of the closing per lung: wider than nodules, narrower than the curvature of the heart."""
COSTAL_MM, BITE_MM, COSTAL_COSINE = 25.0, 4.0, 0.0
"""Disc, least half-thickness and direction of the dents that are filled at the chest wall."""
DOME_MM = 18.0
"""So far below a dent there must be lung again."""
PADDED_RIM = 0.6
"""Share of the image's border that is as dense as tissue, from which on it may be padding.

Up to 0.45 in scans cropped to the chest, 0.69 and more around a circle that ends within the image or 5 %
outside it.
"""
WALL_MM = 60.0
"""Reach of the chest wall around the lungs' shadow, where padding hangs on it."""
PLAIN_AIR_HU, SPACE_DEPTH_MM = -980, 6.0
"""An air space with a fifth below, so far from its walls, is no lung.

Lungs have no tenth below -976 (emphysema), the outside a quarter below -996, in 25 scans of ten scanners; the
foam of a table lies higher. Nearer to the walls are partial volume and blended padding.
"""
BONE_HU = 200
THICK_MM = 4.0
"""From this slice distance on, neighbouring slices differ too much to close across them."""
MIN_LUNG_ML = 30.0
MIN_LUNG_RATIO = 0.08
"""Least volume of the second lung, of the first: a collapsed lung, not a stomach beside it."""
JOINED_RATIO = 0.3
"""A second air space of more than this share of the first is the other lung; else the first may be both."""
APART_MM, APART_SHARE = 40.0, 0.42
"""Distance of the two lungs' centres from right to left, in mm and as a share of their common width.

It is 0.47 to 0.57 in 26 scans; parts of one lung lie closer.
"""
CUT_SHARE = 0.7
"""Share of a body's height and depth that is tissue where an image ends at its middle; less at an arm."""
SPLIT_DEPTHS_MM = (0.0, 2.5, 4.5, 6.5, 9.0, 12.0)
"""Tried in turn: the lungs touch in front of and behind the mediastinum, where they are thin."""
HEAD_BONE_HU = 300
HEAD_BONE, CHEST_AIR = 0.1, 0.08
"""Share of the body that is bone, from which on, and share that is air, below which it is a head, no chest.

A skull is about a sixth of a head and its sinuses a fiftieth; ribs and spine are about a twentieth of a
chest, and lungs a fifth or more. Both must hold: a chest full of contrast has air, lungs full of fluid no
more bone.
"""
MOST_ML, LARGE_ML = 12_000.0, 10_500.0
"""Lungs that are refused, and warned of: 10.5 l is the 95th percentile of total lung capacity in men of 2.0 m
(Hall et al., Eur Respir J 2021;57:2000289), and emphysema adds to it; a mask with the air around the body has
20 l and more."""
MOST_SHARE = 0.95
"""Of the image: both lungs fill about half of their own box, and one lung two thirds of its own."""
LEAST_RATIO = 1 / 6
"""The smaller lung, of the other one: less is a collapsed lung, none, or one outside the image."""
AERATED_HU, LEAST_AERATED = -960, 0.3
"""Share of lung that lies between this and tissue: 0.71 (emphysema) and more in 27 scans, 0.27 and less
in all that is no lung in them."""
MOST_CUT = 0.05
"""Share of the lungs' shadow on a side of the image; less where an image is cropped to their box."""
APART_ML, APART_PART = 1000.0, 0.2
"""Volume by which two segmentations of the same lungs may differ, in ml and as a share of the larger."""
REACH_MM, DEPTH_MM, RIM_MM = 2.5, 3.0, 1.5
CHUNK = 32
"""Slices whose distances are worked out at once."""
HOLE_MM2 = 150.0
"""Holes of a slice filled: vessels; larger ones, open above or below, are the liver's dome or the hilum."""


@dataclass(frozen=True)
class Lungs:
    """The two lungs on one grid.

    Attributes
    ----------
    right, left : (Z, Y, X) bool array
        The patient's right lung (low x in LPS order) and left lung; disjoint, one may be empty.
    """

    right: Mask
    left: Mask


def segment_lungs(hu: npt.NDArray[np.int16], spacing: Spacing) -> Mask:
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


def split_lungs(hu: npt.NDArray[np.int16], spacing: Spacing) -> Lungs:
    """Segment the lungs and tell right from left; arguments and errors as `segment_lungs`."""
    if hu.ndim != 3:
        raise ValueError(f"hu must be 3-D (z, y, x), got shape {hu.shape}")
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing must be three positive lengths in mm, got {spacing}")
    (fz, fy, fx), mm = coarse_grid(spacing)
    coarse = block_mean(hu, (fz, fy, fx))
    fillers = _fillers(hu)
    slabs = (hu[z : z + 16 * fz] for z in range(0, len(hu), 16 * fz))
    filled = np.concatenate([block_mean(np.isin(slab, fillers), (fz, fy, fx)) for slab in slabs])
    empty = ndimage.binary_dilation(filled == 1) & (filled > 0)  # with blocks that are half in it
    body = body_mask(coarse, mm, empty)
    box = bounding_box(body)
    if box is None:
        raise ValueError("no lung found: no body in the volume (no tissue thicker than 8 mm)")
    right, left, airway = (np.zeros(coarse.shape, bool) for _ in range(3))
    inner, outer = coarse[box], body[box]
    middle = _centre_x(outer)
    cropped = grow_airways(inner, outer, mm, middle)
    found = find_lungs(inner, outer, cropped, mm)
    cut = None if all(lung.any() for lung in found) else _cut_end(found[0] | found[1], inner, outer)
    if cut is not None:  # the trachea lies there, and not in the middle of this half
        cropped = grow_airways(inner, outer, mm, cut)
        found = find_lungs(inner, outer, cropped, mm)
    airway[box] = cropped.large
    check_chest(inner, outer, found)
    right[box], left[box] = close_lungs(inner, found, outer, cropped, mm)
    return outline(hu, spacing, (right, left), airway, (fz, fy, fx), (empty & ~body, fillers))


def coarse_grid(spacing: Spacing) -> tuple[tuple[int, int, int], Spacing]:
    """Return how many voxels (z, y, x) become one of about `COARSE_MM`, and its size in mm."""
    fz, fy, fx = (max(1, round(COARSE_MM / s)) for s in spacing)
    return (fz, fy, fx), (spacing[0] * fz, spacing[1] * fy, spacing[2] * fx)


def body_mask(coarse: npt.NDArray[np.float32], mm: Spacing, empty: Mask | None = None) -> Mask:
    """Fill the patient: tissue left by an opening (tables are thin shells), largest piece, holes filled.

    Parameters
    ----------
    coarse : (Z, Y, X) float32 array
        HU on the coarse grid.
    mm : (3,) floats
        Its voxel size, axis order z, y, x.
    empty : (Z, Y, X) bool array, optional
        Where the file holds one value only, beyond what was scanned.

    Returns
    -------
    (Z, Y, X) bool array
        A lung that the image cuts through is part of the body, although its air reaches the image's border.
        Where most of the border is as dense as tissue, the image may be padded (with noise, a gradient,
        anything): air spaces that are plain air are then the outside, whatever surrounds them.
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
    large = np.flatnonzero(component_sizes(labels, count) * (mm[0] * mm[1] * mm[2]) > 1000 * MIN_LUNG_ML)
    large = large[large > 0]
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
    body: Mask = fill_slices(core) | lung
    if not padded:
        return body
    body &= lung | ~np.isin(labels, large)
    if lungs:  # padding that touches the body reaches farther
        body &= within(np.asarray(lung.any(axis=0, keepdims=True)), WALL_MM, mm)
    pieces, count = ndimage.label(body)
    held = component_sizes(np.where(lung, pieces, 0) if lungs else pieces, count)
    held[0] = 0
    return np.asarray(pieces == max(int(held.argmax()), 1))


def _fillers(hu: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """List the values of a constant outside: those in a twentieth of the border, in runs of 8 voxels."""
    border = np.concatenate([hu[:, 0], hu[:, -1], hu[:, :, 0], hu[:, :, -1]], axis=1).ravel()
    runs = border[: border.size // 8 * 8].reshape(-1, 8)
    values, counts = np.unique(runs[np.ptp(runs, axis=1) == 0, 0], return_counts=True)
    return np.asarray(values[counts > 0.05 * len(runs)])


def _between(mask: Mask, axis: int) -> Mask:
    """Tell where the mask lies on both sides along an axis."""
    before = np.logical_or.accumulate(mask, axis)
    after = np.flip(np.logical_or.accumulate(np.flip(mask, axis), axis), axis)
    return np.asarray(before & after)


def find_lungs(
    coarse: npt.NDArray[np.float32], body: Mask, airways: Airways, mm: Spacing
) -> tuple[Mask, Mask]:
    """Choose the air spaces that are lung and tell right from left.

    Bowel and stomach gas is told by its place: it ends below the middle of the largest lung. Small separate
    air spaces are no loss: `close_lungs` takes those back that a lung surrounds.
    """
    ml = mm[0] * mm[1] * mm[2] / 1000
    labels, count = ndimage.label((coarse < AIR_HU) & body & ~airways.tree & ~airways.large)
    volumes = np.bincount(labels.ravel(), minlength=count + 1) * ml
    volumes[0] = 0
    first = int(volumes.argmax())
    if volumes[first] < MIN_LUNG_ML:
        raise ValueError(
            f"no lung found: the largest air space inside the body has {volumes.max():.0f} ml, expected "
            f"at least {MIN_LUNG_ML:.0f}"
        )
    one: Mask = labels == first
    second = _opposite(labels, volumes, one, mm)
    parts = None if second.sum() > JOINED_RATIO * one.sum() else split_two(one, mm)
    if parts is None:
        parts = (one, second)
    centres = [_centre_x(part) for part in parts]
    if not parts[1].any():
        cut = _cut_end(one, coarse, body)
        centres[1] = _centre_x(body) if cut is None else cut
    return parts if centres[0] < centres[1] else (parts[1], parts[0])


def _cut_end(lung: Mask, coarse: npt.NDArray[np.float32], body: Mask) -> float | None:
    """Tell where, along x, a body with one lung in view is cut at the midline; None where it is whole.

    The lung lies then in the middle of what is left, and more of that end is tissue than of the round one.
    """
    ends = (body & (coarse >= AIR_HU)).sum(axis=(0, 1)) / body.any(axis=2).sum()
    first, last = ends[:2].max(), ends[-2:].max()  # the outermost voxels may be half outside
    off = abs(_centre_x(body) - _centre_x(lung)) / body.shape[2]
    if first == last or not (off < 0.1 or (max(first, last) > CUT_SHARE and abs(last - first) > 0.1)):
        return None
    return 0.0 if first > last else float(body.shape[2] - 1)


def check_chest(coarse: npt.NDArray[np.float32], body: Mask, lungs: tuple[Mask, Mask]) -> None:
    """Refuse a head, whose sinuses would pass for lungs.

    Raises
    ------
    ValueError
        Little air and much bone; names both shares.
    """
    tissue = int(body.sum())
    air = int(lungs[0].sum() + lungs[1].sum()) / tissue
    bone = int(((coarse >= HEAD_BONE_HU) & body).sum()) / tissue
    if air < CHEST_AIR and bone > HEAD_BONE:
        raise ValueError(
            f"no lung found: must be a CT of the chest, but {air:.1%} of the body is air space and "
            f"{bone:.1%} bone, as in a head"
        )


def _centre_x(mask: Mask) -> float:
    total = int(mask.sum())
    return float(mask.sum(axis=(0, 1)) @ np.arange(mask.shape[2]) / total) if total else float("nan")


def _opposite(labels: npt.NDArray[Any], volumes: npt.NDArray[Any], one: Mask, mm: Spacing) -> Mask:
    """Find the second lung: beside the first, reaching above its middle height; empty where there is none."""
    z = np.arange(one.shape[0])
    half = float(one.sum(axis=(1, 2)) @ z / one.sum())
    for number in np.argsort(-volumes):
        if volumes[number] < max(MIN_LUNG_ML, MIN_LUNG_RATIO * volumes.max()):
            break
        part: Mask = labels == number
        top = int(np.flatnonzero(part.any(axis=(1, 2)))[-1])
        if top >= half and abs(_centre_x(part) - _centre_x(one)) * mm[2] > APART_MM:
            return part
    return np.zeros(one.shape, bool)


def split_two(mask: Mask, mm: Spacing) -> tuple[Mask, Mask] | None:
    """Part an air space, where it is thin, into two halves side by side; None where it is one lung."""
    deep = ndimage.distance_transform_edt(mask, sampling=mm)
    width = np.ptp(np.flatnonzero(mask.any(axis=(0, 1)))) * mm[2]
    for depth in SPLIT_DEPTHS_MM:
        labels, count = ndimage.label(deep > depth)
        if count < 2:
            continue
        sizes = component_sizes(labels, count)
        sizes[0] = 0
        a, b = (int(n) for n in np.argsort(-sizes)[:2])
        if sizes[b] < 0.1 * sizes[a]:
            continue
        markers = (labels == a).view(np.uint8) + np.uint8(2) * (labels == b).view(np.uint8)
        apart = abs(_centre_x(markers == 1) - _centre_x(markers == 2)) * mm[2]
        if apart < max(APART_MM, APART_SHARE * width):
            continue
        nearest = ndimage.distance_transform_edt(
            markers == 0, sampling=mm, return_distances=False, return_indices=True
        )
        owner = markers[tuple(nearest)]
        return mask & (owner == 1), mask & (owner == 2)
    return None


def close_lungs(
    coarse: npt.NDArray[np.float32], lungs: tuple[Mask, Mask], body: Mask, airways: Airways, mm: Spacing
) -> tuple[Mask, Mask]:
    """Close each lung with a ball: vessels, nodules and consolidations join it, the airways do not."""
    right, left = lungs
    allowed = body & ~airways.large
    reach = (mm[0] if mm[0] < THICK_MM else 2 * CLOSING_MM, mm[1], mm[2])
    a, b = (closed(lung, CLOSING_MM, reach) & allowed for lung in lungs)
    both = a & b & ~right & ~left  # tissue between the lungs that both closings claim: mediastinum
    a, b = a & ~left & ~both, b & ~right & ~both
    soft = allowed & (coarse < BONE_HU)
    return a | (costal_bites(a, b, mm) & soft & ~b), b | (costal_bites(b, a, mm) & soft & ~a)


def costal_bites(lung: Mask, other: Mask, mm: Spacing) -> Mask:
    """Find what a wide disc closes on the chest wall's side, slice by slice.

    The chest wall's side of a lung is convex, so a dent there is consolidation; the dents of the heart, the
    liver and the hilum lie on the other side, towards the middle between the lungs. A dent with no lung below
    it is the dome of the diaphragm.
    """
    bites = np.zeros(lung.shape, bool)
    if not lung.any() or not other.any():
        return bites
    dents = plane_opened(closed(lung, COSTAL_MM, (4 * COSTAL_MM, mm[1], mm[2])) & ~lung, BITE_MM, mm)
    dents &= ~fill_slices(lung)  # holes are domes
    below = max(1, round(DOME_MM / mm[0]))
    for z in np.flatnonzero(dents.any(axis=(1, 2)) & other.any(axis=(1, 2))):
        centre, middle = _centre(lung[z], mm), (_centre(lung[z], mm) + _centre(other[z], mm)) / 2
        outward = (centre - middle) / max(float(np.linalg.norm(centre - middle)), 1e-6)
        labels, count = ndimage.label(dents[z])
        for number in range(1, count + 1):
            dent = labels == number
            way = _centre(dent, mm) - centre
            on_lung = (lung[z - below] | bites[z - below])[dent].mean() if z >= below else 0.0
            if way @ outward > COSTAL_COSINE * np.linalg.norm(way) and on_lung > 0.5:
                bites[z] |= dent
    return bites


def _centre(plane: Mask, mm: Spacing) -> npt.NDArray[np.float64]:
    y, x = np.nonzero(plane)
    return np.array([y.mean() * mm[1], x.mean() * mm[2]])


def outline(
    hu: npt.NDArray[np.int16],
    spacing: Spacing,
    lungs: tuple[Mask, Mask],
    airway: Mask,
    factors: tuple[int, int, int],
    outside: tuple[Mask, npt.NDArray[np.int16]],
) -> Lungs:
    """Bring the coarse lungs to the volume's own grid and set their outline by the air threshold there.

    Air counts as lung up to `REACH_MM` outside the coarse outline, but for what is empty (mask and values of
    `outside`); tissue only from `DEPTH_MM` inside it, or where it is thick: a rim of chest wall (partial
    volume) is left out, a consolidation at the pleura stays.
    """
    mm = (spacing[0] * factors[0], spacing[1] * factors[1], spacing[2] * factors[2])
    if not any(lung.any() for lung in lungs):
        raise ValueError("no lung found: nothing is left of the air spaces")
    found: list[Mask] = []
    for lung in lungs:
        whole = np.zeros(hu.shape, bool)
        if (box := around(lung, 3)) is not None:
            fine = tuple(
                slice(s.start * f, min(s.stop * f, n)) for s, f, n in zip(box, factors, hu.shape, strict=True)
            )
            part = hu[fine]
            empty = outside[0][box]
            for axis, factor in enumerate(factors):
                empty = empty.repeat(factor, axis)
            empty = empty[tuple(slice(n) for n in part.shape)]
            empty[empty] = np.isin(part[empty], outside[1])
            allowed = ~empty
            allowed &= spread(_signed(airway[box], mm), factors, part.shape) <= 0
            for other in found:
                allowed &= ~other[fine]
            field = spread(_signed(lung[box], mm), factors, part.shape)
            whole[fine] = largest(settle((part < AIR_HU) & ~empty, allowed, spacing, field))
        found.append(whole)
    return Lungs(found[0], found[1])


def around(mask: Mask, margin: int) -> tuple[slice, slice, slice] | None:
    """Box around the mask with a margin, as far as the grid reaches; None where it is empty."""
    box = bounding_box(mask)
    if box is None:
        return None
    a, b, c = (
        slice(max(s.start - margin, 0), min(s.stop + margin, n)) for s, n in zip(box, mask.shape, strict=True)
    )
    return a, b, c


def settle(air: Mask, allowed: Mask, spacing: Spacing, field: npt.NDArray[np.float32]) -> Mask:
    """Set the outline of a lung by intensities where they decide, and else by its field.

    Parameters
    ----------
    air : (z, y, x) bool array
        Voxels as dark as lung.
    allowed : (z, y, x) bool array
        Voxels that may be this lung.
    spacing : (3,) floats
        Voxel size in mm, axis order z, y, x.
    field : (z, y, x) float32 array
        Distance in mm to the lung's outline as it is known so far, positive inside.

    Returns
    -------
    (z, y, x) bool array
        Air up to `REACH_MM` outside the outline; tissue from `DEPTH_MM` inside it, or where it is thick.
    """
    tissue = plane_opened((field > 0) & ~air, RIM_MM, spacing)
    mask = ((air & (field > -REACH_MM)) | (field > DEPTH_MM) | tissue) & allowed
    mask = fill_slices(fill_enclosed(mask), round(HOLE_MM2 / (spacing[1] * spacing[2])))
    return np.asarray(mask & allowed)


def check_plausible(
    hu: npt.NDArray[np.int16], mask: Mask, spacing: Spacing, left: Mask | None = None
) -> None:
    """Refuse lungs that nobody has, and warn of unlikely ones: outside air, a mask of something else.

    Small lungs are none of it: children, a collapsed lung, a few slices.

    Parameters
    ----------
    hu : (Z, Y, X) int16 array
        Hounsfield units.
    mask : (Z, Y, X) bool array
        Both lungs, or the one that is asked for.
    spacing : (3,) floats
        Voxel size in mm, axis order z, y, x.
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
    said = [f"the lungs have {ml:.0f} ml, more than {LARGE_ML:.0f}: look at their outline"] * (ml > LARGE_ML)
    if left is not None and count * LEAST_RATIO > (1 + LEAST_RATIO) * min(
        part := int(left.sum()), count - part
    ):
        said.append(
            f"the right lung has {ml * (1 - part / count):.0f} ml, the left {ml * part / count:.0f}: is one "
            "collapsed, removed or outside the image?"
        )
    aerated = sum(
        int(((plane[at] > AERATED_HU) & (plane[at] < AIR_HU)).sum())
        for plane, at in zip(hu, mask, strict=True)
    )
    if aerated < LEAST_AERATED * count:
        said.append(
            f"{aerated / count:.0%} of the lungs lie between {AERATED_HU} and {AIR_HU} HU: are they lungs?"
        )
    for axis, index, side in ((1, 0, "front"), (1, -1, "back"), (2, 0, "right"), (2, -1, "left")):
        cut = mask.take(index, axis).sum() / mask.any(axis).sum()
        if cut > MOST_CUT:
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


def _signed(mask: Mask, mm: Spacing) -> npt.NDArray[np.float32]:
    """Distance in mm to the outline: positive inside; far away where the mask is empty."""
    if not mask.any():
        return np.full(mask.shape, -1e3, np.float32)
    half = min(mm) / 2  # distances run between voxel centres, the outline lies half-way
    out = ndimage.distance_transform_edt(mask, sampling=mm) - ndimage.distance_transform_edt(
        ~mask, sampling=mm
    )
    signed: npt.NDArray[np.float32] = (out - half * np.sign(out)).astype(np.float32)
    return signed


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
    (fz, fy, fx), mm = coarse_grid(spacing)
    filled = block_mean(mask.view(np.uint8), (fz, fy, fx))
    # distances in the box, with a rim of background, are those in the whole volume
    box = around(filled > 0, 2)
    parts = split_two(filled[box] >= 0.5, mm) if box is not None else None
    if box is None or parts is None:
        raise ValueError("the lung mask must show two lungs side by side, to tell right from left")
    if _centre_x(parts[0]) > _centre_x(parts[1]):
        parts = (parts[1], parts[0])
    # signed distances also cover the voxels that the coarse mask lost
    fields = [np.zeros(filled.shape, np.float32) for _ in parts]
    for field, part in zip(fields, parts, strict=True):
        field[box] = _signed(part, mm)
    right, left = np.zeros(mask.shape, bool), np.zeros(mask.shape, bool)
    for first in range(0, len(mask), CHUNK):
        last = min(first + CHUNK, len(mask))
        one, other = (spread(field, (fz, fy, fx), mask.shape, (first, last)) for field in fields)
        np.logical_and(mask[first:last], one >= other, out=right[first:last])
        np.logical_and(mask[first:last], one < other, out=left[first:last])
    return Lungs(right, left)
