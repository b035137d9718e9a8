"""Where blobs are: boxes, rotations, and the undeformed ellipsoid that image libraries warp."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import lesionsynth as ls

Mask = npt.NDArray[np.bool_]
Field = npt.NDArray[np.float32]
Box = tuple[slice, ...]
Corner = tuple[int, int, int]


@dataclass(frozen=True)
class Site:
    """A blob and where it is."""

    plan: ls.LesionPlan
    blob: ls.Blob
    center: Corner
    box: Box
    """What of the volume the warped blob can reach."""
    shape: tuple[int, ...]
    """Of the volume."""


def half_extent(plan: ls.LesionPlan, blob: ls.Blob) -> npt.NDArray[np.float64]:
    """Reach of a warped blob along each axis in voxels: the rotated ellipsoid's, and its displacement's."""
    turned = rotation_matrix(blob.rotation) * np.array(blob.semi_axes)
    reach = np.sqrt((turned**2).sum(axis=1)) + blob.warp_amplitude * radius_of(blob)
    return reach / np.array(plan.scale)


def blob_box(plan: ls.LesionPlan, blob: ls.Blob, center: Corner, shape: tuple[int, ...]) -> Box:
    """Part of the volume a warped blob can reach."""
    reach = np.floor(half_extent(plan, blob) + 1e-6).astype(int)
    return tuple(
        slice(max(c - int(r), 0), min(c + int(r) + 1, n))
        for c, r, n in zip(center, reach, shape, strict=True)
    )


def ellipsoid(site: Site) -> Mask:
    """Blob before its displacement, in a box with its centre in the middle, as image libraries want it."""
    reach = whole_reach(site)
    axes = [np.arange(-r, r + 1) * step for r, step in zip(reach, site.plan.scale, strict=True)]
    z, y, x = np.ix_(*(axis.astype(np.float32) for axis in axes))
    turn = (rotation_matrix(site.blob.rotation) / np.array(site.blob.semi_axes)).T.astype(np.float32)
    level = sum((row[0] * z + row[1] * y + row[2] * x) ** 2 for row in turn)
    inside: Mask = level <= np.float32(1)
    return inside


def whole_reach(site: Site) -> list[int]:
    """Half the size of the box that holds the warped blob, were the volume endless."""
    return [int(r) for r in np.floor(half_extent(site.plan, site.blob) + 1e-6)]


def needed_reach(site: Site) -> list[int]:
    """Half the size of the smallest box with the blob's centre in the middle that covers `site.box`."""
    return [
        min(r, max(c, n - 1 - c)) for r, c, n in zip(whole_reach(site), site.center, site.shape, strict=True)
    ]


def crop_to_box(voxels: Mask, site: Site) -> Mask:
    """Cut a box with the blob's centre in the middle to `site.box`."""
    corner = [c - n // 2 for c, n in zip(site.center, voxels.shape, strict=True)]
    return voxels[tuple(slice(s.start - k, s.stop - k) for s, k in zip(site.box, corner, strict=True))]


def radius_of(blob: ls.Blob) -> float:
    """Geometric mean of the semi-axes."""
    return float(np.prod(blob.semi_axes) ** (1 / 3))


def rotation_matrix(quaternion: tuple[float, float, float, float]) -> npt.NDArray[np.float64]:
    """Matrix of v -> q v q* for the unit quaternion (w, x, y, z)."""
    w, x, y, z = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def bounding_box(voxels: Mask) -> Box | None:
    """Tight box of a mask; None where it is empty."""
    plane, rows = voxels.any(axis=0), voxels.any(axis=2)
    lines = [np.flatnonzero(m) for m in (rows.any(axis=1), rows.any(axis=0), plane.any(axis=0))]
    return None if not lines[0].size else tuple(slice(int(m[0]), int(m[-1]) + 1) for m in lines)


def shifted(inner: Box, outer: Box) -> Box:
    """`inner`, which counts from the corner of `outer`, in the coordinates of `outer`."""
    return tuple(slice(o.start + i.start, o.start + i.stop) for i, o in zip(inner, outer, strict=True))
