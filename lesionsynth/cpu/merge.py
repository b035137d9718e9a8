"""Stage 2: blobs that touch become one (PAPER.md III-C.1, "merge connected blobs").

Blobs are painted into one label volume, first come first kept. A voxel two blobs claim joins them; so do two
voxels of different owners that touch. The union-find runs over blobs, not voxels, so a blob that falls apart
stays one.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.shapes import Shape

Labels = npt.NDArray[np.int32]


def merge(
    shapes: list[Shape], shape: tuple[int, ...], connectivity: int
) -> tuple[Labels, list[tuple[int, ...]]]:
    """Merge blobs into non-adjacent lesions G_j.

    Parameters
    ----------
    shapes : list of Shape
        The blobs' voxels.
    shape : (3,) ints
        Volume (z, y, x).
    connectivity : {6, 18, 26}
        Neighbourhood in which two blobs touch.

    Returns
    -------
    labels : (z, y, x) int32 array
        0 background, 1..n the lesions, numbered by their lowest-numbered blob.
    members : list of tuple of int
        The blobs of each lesion, ascending. Blobs without a voxel are in none.
    """
    labels = np.zeros(shape, dtype=np.int32)
    parent = np.arange(len(shapes) + 1, dtype=np.int32)
    for k, blob in enumerate(shapes):
        _paint(labels, blob.inside, blob.start, k + 1, parent)
    offsets = _half_neighbourhood(connectivity)
    for blob in shapes:
        _join_touching(labels, blob.start, blob.inside.shape, offsets, parent)
    occupied = [bool(blob.inside.any()) for blob in shapes]
    roots = [_find(parent, k + 1) if occupied[k] else 0 for k in range(len(shapes))]
    order = sorted({root for root in roots if root})
    members = [tuple(k for k, root in enumerate(roots) if root == r) for r in order]
    final = np.zeros(len(shapes) + 1, dtype=np.int32)
    for label, blobs in enumerate(members, start=1):
        final[np.array(blobs) + 1] = label
    for blob in shapes:
        _rename(labels, blob.start, blob.inside.shape, final)
    for blob in shapes:
        _negate(labels, blob.start, blob.inside.shape)
    return labels, members


def _half_neighbourhood(connectivity: int) -> npt.NDArray[np.int64]:
    """Offsets that follow the centre in C order; the other half sees the same pairs from the other side."""
    steps = [(z, y, x) for z in (-1, 0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    most = {6: 1, 18: 2, 26: 3}[connectivity]
    return np.array([s for s in steps if s > (0, 0, 0) and sum(map(abs, s)) <= most], dtype=np.int64)


@numba.njit(nogil=True, cache=True)
def _find(parent: Any, k: int) -> int:
    while parent[k] != k:
        k = parent[k]
    return k


@numba.njit(nogil=True, cache=True)
def _unite(parent: Any, a: int, b: int) -> None:
    a, b = _find(parent, a), _find(parent, b)
    if a < b:  # the root is always the lowest number
        parent[b] = a
    elif b < a:
        parent[a] = b


@numba.njit(nogil=True, cache=True)
def _paint(labels: Any, inside: Any, start: Any, number: int, parent: Any) -> None:
    z0, y0, x0 = start
    nz, ny, nx = inside.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                if inside[z, y, x]:
                    owner = labels[z0 + z, y0 + y, x0 + x]
                    if owner == 0:
                        labels[z0 + z, y0 + y, x0 + x] = number
                    else:
                        _unite(parent, owner, number)


@numba.njit(nogil=True, cache=True)
def _join_touching(labels: Any, start: Any, size: Any, offsets: Any, parent: Any) -> None:
    (z0, y0, x0), (nz, ny, nx) = start, size
    depth, height, width = labels.shape
    for z in range(z0, z0 + nz):
        for y in range(y0, y0 + ny):
            for x in range(x0, x0 + nx):
                owner = labels[z, y, x]
                if owner == 0:
                    continue
                for k in range(offsets.shape[0]):
                    zz, yy, xx = z + offsets[k, 0], y + offsets[k, 1], x + offsets[k, 2]
                    if zz < depth and 0 <= yy < height and 0 <= xx < width:
                        other = labels[zz, yy, xx]
                        if other != 0 and other != owner:
                            _unite(parent, owner, other)


@numba.njit(nogil=True, cache=True)
def _rename(labels: Any, start: Any, size: Any, final: Any) -> None:
    """Blob numbers to negated lesion numbers: the sign marks a voxel of an overlapping box as done."""
    (z0, y0, x0), (nz, ny, nx) = start, size
    for z in range(z0, z0 + nz):
        for y in range(y0, y0 + ny):
            for x in range(x0, x0 + nx):
                if labels[z, y, x] > 0:
                    labels[z, y, x] = -final[labels[z, y, x]]


@numba.njit(nogil=True, cache=True)
def _negate(labels: Any, start: Any, size: Any) -> None:
    (z0, y0, x0), (nz, ny, nx) = start, size
    for z in range(z0, z0 + nz):
        for y in range(y0, y0 + ny):
            for x in range(x0, x0 + nx):
                if labels[z, y, x] < 0:
                    labels[z, y, x] = -labels[z, y, x]
