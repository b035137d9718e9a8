"""Branching trees of vessels and airways, and how they are drawn.

Trees are minimum spanning trees whose cost mixes wire length with path length from the root (Cuntz et al.
2010, "One rule to grow them all"); radii follow Murray's law from the tips. Tubes are drawn as chains of
capsules, each in its own box, with the profile of a disc seen through a Gaussian point spread, so a tube
thinner than a voxel is fainter, not wider.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lesionsynth._cache import compiled

Floats = npt.NDArray[np.float64]
Volume = npt.NDArray[np.float32]

MURRAY = 2.75
"""Exponent of r^m = sum of the children's r^m; 3 in theory, 2.3-3 measured in pulmonary trees."""


class Tree(NamedTuple):
    """A tree of nodes; node 0 is the root and its own parent."""

    points: Floats
    """(n, 3): x, y, z in mm."""
    parents: npt.NDArray[np.int64]
    """A parent's number may be larger than its child's."""
    radii: Floats
    """(n,) mm."""
    depth_first: npt.NDArray[np.int64]
    """Nodes in an order in which parents precede children."""


@compiled
def _apart(points: Floats, i: int, j: int) -> float:
    x, y, z = points[i, 0] - points[j, 0], points[i, 1] - points[j, 1], points[i, 2] - points[j, 2]
    return math.sqrt(x * x + y * y + z * z)


@compiled
def _span(
    points: Floats, lobes: npt.NDArray[np.int8], free: float, balance: float, detour: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Prim's algorithm on |p - q| + balance * path(q) + detour where p and q lie in different lobes."""
    n = points.shape[0]
    parent, order = np.zeros(n, np.int64), np.zeros(n, np.int64)
    path, best = np.zeros(n), np.full(n, np.inf)
    done = np.zeros(n, np.bool_)
    node = 0
    for step in range(n):
        done[node] = True
        order[step] = node
        nearest, cost = -1, np.inf
        for i in range(n):
            if done[i]:
                continue
            length = _apart(points, i, node)
            c = length + balance * (path[node] + length)
            if lobes[i] != lobes[node] and path[node] > free:
                c += detour
            if c < best[i]:
                best[i] = c
                parent[i] = node
            if best[i] < cost:
                cost, nearest = best[i], i
        if nearest < 0:
            break
        path[nearest] = path[parent[nearest]] + _apart(points, nearest, parent[nearest])
        node = nearest
    return parent, order


def grow_tree(
    root: tuple[float, float, float],
    targets: Floats,
    lobes: npt.NDArray[np.int8],
    *,
    tip_radius: float,
    root_radius: float,
    balance: float = 0.35,
) -> Tree:
    """Grow a tree from a root through all targets.

    Parameters
    ----------
    root : (3,) floats
        x, y, z in mm.
    targets : (n, 3) float array
        Points that the tree must reach.
    lobes : (n,) int8 array
        Lobe of each target; branches avoid crossing between lobes once away from the root.
    tip_radius, root_radius : float
        Radius in mm at the tips, and the largest allowed.
    balance : float
        0 gives the shortest tree, 1 one whose paths run straight from the root.

    Returns
    -------
    Tree
    """
    points = np.concatenate([np.array([root], np.float64), targets])
    kinds = np.concatenate([np.array([-1], np.int8), lobes])
    parents, order = _span(points, kinds, 25.0, balance, 40.0)
    power = np.zeros(len(points))
    children = np.bincount(parents[1:], minlength=len(points))
    power[children == 0] = tip_radius**MURRAY
    for node in order[:0:-1]:
        power[parents[node]] += power[node]
    radii = np.minimum(power ** (1 / MURRAY), root_radius)
    return Tree(_straighten(points, parents, order, power), parents, radii, order)


def _straighten(
    points: Floats, parents: npt.NDArray[np.int64], order: npt.NDArray[np.int64], power: Floats
) -> Floats:
    """Take the kinks out: inner nodes move towards the line from parent to thickest child, twice."""
    heir = np.full(len(points), -1)
    for node in order[1:]:
        parent = parents[node]
        if heir[parent] < 0 or power[node] > power[heir[parent]]:
            heir[parent] = node
    inner = np.flatnonzero(heir >= 0)
    inner = inner[inner != 0]
    out = points.copy()
    for _ in range(2):
        out[inner] = 0.4 * out[inner] + 0.3 * (out[parents[inner]] + out[heir[inner]])
    return out


def tubes(tree: Tree, keep: npt.NDArray[np.bool_] | None = None) -> Floats:
    """Return a tree's segments as rows (x0, y0, z0, x1, y1, z1, r0, r1).

    A branch starts no thicker than 1.15 of its end.
    """
    nodes = tree.depth_first[1:]
    if keep is not None:
        nodes = nodes[keep[nodes]]
    start = tree.parents[nodes]
    r1 = tree.radii[nodes]
    r0 = np.minimum(tree.radii[start], 1.15 * r1)
    return np.concatenate([tree.points[start], tree.points[nodes], r0[:, None], r1[:, None]], axis=1)


@compiled
def draw_tubes(out: Volume, segments: Floats, origin: Floats, step: Floats, blur: float) -> None:
    """Draw capsules into a coverage volume, keeping the larger value where they overlap.

    Parameters
    ----------
    out : (Z, Y, X) float32 array
        Coverage in [0, 1]; changed in place.
    segments : (n, 8) float array
        Rows as of `tubes`, mm.
    origin : (3,) float array
        Position (x, y, z) of voxel (0, 0, 0) in mm.
    step : (3,) float array
        Voxel size (x, y, z) in mm.
    blur : float
        Standard deviation of the point spread in mm.

    Notes
    -----
    At distance d from the axis of a tube of radius r the coverage is A erfc((d - r) / (√2 s)) / erfc(-r /
    (√2 s)) with A = 1 - exp(-r² / 2 s²), the exact value on the axis of a disc blurred by s.
    """
    nz, ny, nx = out.shape
    for k in range(segments.shape[0]):
        ax, ay, az = segments[k, 0], segments[k, 1], segments[k, 2]
        bx, by, bz = segments[k, 3], segments[k, 4], segments[k, 5]
        ra, rb = segments[k, 6], segments[k, 7]
        reach = max(ra, rb) + 2.6 * blur
        x_lo = max(0, math.ceil((min(ax, bx) - reach - origin[0]) / step[0]))
        x_hi = min(nx - 1, math.floor((max(ax, bx) + reach - origin[0]) / step[0]))
        y_lo = max(0, math.ceil((min(ay, by) - reach - origin[1]) / step[1]))
        y_hi = min(ny - 1, math.floor((max(ay, by) + reach - origin[1]) / step[1]))
        z_lo = max(0, math.ceil((min(az, bz) - reach - origin[2]) / step[2]))
        z_hi = min(nz - 1, math.floor((max(az, bz) + reach - origin[2]) / step[2]))
        ux, uy, uz = bx - ax, by - ay, bz - az
        length2 = ux * ux + uy * uy + uz * uz + 1e-12
        for z in range(z_lo, z_hi + 1):
            pz = origin[2] + z * step[2] - az
            for y in range(y_lo, y_hi + 1):
                py = origin[1] + y * step[1] - ay
                for x in range(x_lo, x_hi + 1):
                    px = origin[0] + x * step[0] - ax
                    t = min(1.0, max(0.0, (px * ux + py * uy + pz * uz) / length2))
                    dx, dy, dz = px - t * ux, py - t * uy, pz - t * uz
                    d2 = dx * dx + dy * dy + dz * dz
                    if d2 > reach * reach:
                        continue
                    r = ra + t * (rb - ra)
                    s = 1.4142135623730951 * blur
                    peak = 1.0 - math.exp(-(r * r) / (s * s))
                    value = peak * math.erfc((math.sqrt(d2) - r) / s) / math.erfc(-r / s)
                    if value > out[z, y, x]:
                        out[z, y, x] = value
