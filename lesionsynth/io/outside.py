"""Tell what lies outside a scan's field of view: what fills it is no tissue, whatever its value."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_dilation, label
from scipy.spatial import ConvexHull

Mask = npt.NDArray[np.bool_]

_AIR, _TISSUE, _DARK = -900, -200, -300
_LUNG = (-950, -500)
_RIM = 1.0
"""Voxels from the edge of a hull; what lies deeper was inside before positions were rounded to voxels."""
_INSIDE = 0.25
"""Share of a field of view, and of its rim, that may have the padding's value by chance."""
_EACH = 0.05
"""Least share of tissue, and of air, in a field of view: a chest fills 9 % of one 70 cm wide; vessels are 3 %
of a lung."""
_RING = 0.03
"""Least share of a volume that a padding within another one has; seldom has one HU of a scan as much."""
_FEWEST = 50
"""Voxels that are no chance: corners of tissue may well be equal."""
_BIT = 1e-3
_IN_PLANE = np.ones((1, 3, 3), bool)


def outside_of_view(filled: Mask, tolerance: float = 0.0) -> Mask | None:
    """Find what surrounds a convex field of view and is `filled`, whole slices at the ends included.

    Parameters
    ----------
    filled : (Z, Y, X) bool array
        Voxels that may be padding.
    tolerance : float
        Share of the outside that may lie where neighbouring slices have the field of view.

    Returns
    -------
    (Z, Y, X) bool array or None
        The outside; None where it leaves no field of view, or one that is not convex in all three planes.
    """
    outside = np.stack([~_hull(~plane, 0) for plane in filled])
    if outside.all():
        return None
    within = 0
    for planes in (outside.transpose(1, 0, 2), outside.transpose(2, 0, 1)):
        within += sum(int((plane & _hull(~plane, _RIM)).sum()) for plane in planes if plane.any())
    return None if within > tolerance * int(outside.sum()) else outside


def is_outside(nan: Mask) -> bool:
    """Tell whether all of these voxels surround a convex field of view, but for its rim."""
    outside = outside_of_view(nan)
    return outside is not None and not any(
        (inner & ~out & _hull(~inner, _RIM)).any() for inner, out in zip(nan, outside, strict=True)
    )


def find_padding(hu: npt.NDArray[np.int16]) -> tuple[list[int], Mask] | None:
    """Find values, no air, each of which fills all outside a field of view.

    Parameters
    ----------
    hu : (Z, Y, X) int16 array
        HU.

    Returns
    -------
    (list of int, (Z, Y, X) bool array) or None
        The values from the outermost, and their voxels, with those at the rim where they were blended with
        air.

    Notes
    -----
    Two corners of the volume have the value, or it is next to much of what has theirs, air included: a scan
    that was padded may have been padded again. The field of view holds tissue and air, other values right
    inside its rim, and no lung along most of it: neither a saturated volume nor constant tissue around lungs
    is taken for padding.
    """
    ends = tuple(slice(None, None, n - 1) for n in hu.shape)
    corners, counts = np.unique(hu[ends], return_counts=True)
    corners = corners[counts > 1]
    nothing = np.zeros(hu.shape, bool)
    tries = [(int(value), nothing) for value in corners[corners > _AIR]]
    common, counts = np.unique(hu[:, ::4, ::4], return_counts=True)
    if (counts[(common > _AIR) & ~np.isin(common, corners)] > _RING * counts.sum()).any():
        parts, _ = label(np.isin(hu, corners))
        around = np.isin(parts, np.setdiff1d(parts[ends], 0))
        common, counts = np.unique(hu[binary_dilation(around) & ~around], return_counts=True)
        if counts.max(initial=0) > _INSIDE * counts.sum() and (value := int(common[counts.argmax()])) > _AIR:
            tries.append((value, around))
    found = {value: _padding(hu, hu == value, around) for value, around in tries}
    masks = {value: mask for value, mask in found.items() if mask is not None}
    return (list(masks), np.any(list(masks.values()), axis=0)) if masks else None


def _padding(hu: npt.NDArray[np.int16], same: Mask, around: Mask) -> Mask | None:
    """Voxels of one value, and of what lies `around` them, that fill the outside; None where they do not."""
    outside = outside_of_view(same | around, 0.01)
    if outside is None or int((outside & ~around).sum()) < max(_FEWEST, hu.size // 1000):
        return None
    inside = hu[~outside]
    others = inside[~same[~outside]]
    rim = binary_dilation(outside, np.ones((3, 3, 3), bool)) & ~outside
    if (
        max(1 - others.size / inside.size, same[rim].mean()) >= _INSIDE
        or min((others > _TISSUE).mean(), (others < _DARK).mean()) <= _EACH
    ):
        return None
    near = binary_dilation(outside, _IN_PLANE, iterations=2, border_value=1)
    next_to = hu[binary_dilation(near, _IN_PLANE, border_value=1) & ~near]
    if next_to.size and ((next_to > _LUNG[0]) & (next_to < _LUNG[1])).mean() > 0.5:
        return None
    air = binary_dilation((hu < _AIR) & ~near, _IN_PLANE, iterations=3)
    return outside | (near & (same | (air & (hu > _AIR))))


def _hull(region: Mask, depth: float) -> Mask:
    """Pixels whose centres lie so deep in the convex hull of those of a region."""
    rows = np.flatnonzero(region.any(1))
    if not rows.size:
        return np.zeros_like(region)
    ends = np.concatenate([region[rows].argmax(1), region.shape[1] - 1 - region[rows, ::-1].argmax(1)])
    points = np.column_stack([[*rows, *rows], ends])
    # a little more than the centres: one row, or one pixel, has a hull, too
    corners = np.array([(-_BIT, -_BIT), (-_BIT, _BIT), (_BIT, -_BIT), (_BIT, _BIT)])
    planes = ConvexHull((points[:, None] + corners).reshape(-1, 2)).equations
    edge = -planes[:, 2, None] - depth - planes[:, 0, None] * np.arange(region.shape[0])  # slope * x <= edge
    slope = np.where(np.abs(planes[:, 1]) < 1e-9, 0.0, planes[:, 1])[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(slope < 0, edge / slope, -np.inf).max(0)
        high = np.where(slope > 0, edge / slope, np.inf).min(0)
    high[np.where(slope == 0, edge, 0).min(0) < 0] = -np.inf
    x = np.arange(region.shape[1])
    inside: Mask = (x >= low[:, None]) & (x <= high[:, None])
    return inside
