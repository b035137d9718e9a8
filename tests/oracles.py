"""The generator again, slowly and in float64, from PAPER.md III-C and DESIGN.md section 2 alone.

Nothing here imports `lesionsynth` or shares an algorithm with it: blobs are evaluated over the whole volume
and not in boxes, the displacement is a product of full B-spline matrices, adjacency is binary dilation,
filters are SciPy's.

Labels and the target are decided by float64 comparisons and must be *equal*. The image cannot be: the salt
noise is ``v < a``, the implementation has a in float32, and where v and a agree to the rounding of a either
answer is right. One such voxel moves b2 around it, the mean of b2 and so the whole lesion. Instead of
forgiving such voxels, `texture` encloses the answer. It evaluates b1 with a lowered and raised by its
rounding error; the Gaussian has positive taps and so keeps the order; the extreme means give the extreme β.
The image must lie in the enclosure, which without a tie is as narrow as the tolerance itself
(`tests/test_generator_oracle.py` checks that it mostly is).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from tests.tolerances import A2_ERROR, B2_ERROR, HALF, IMAGE, RANGE, SURFACE

# --- Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011,
# section 3.3) ---

LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
WARP, PROBABILITY, SALT = 1, 2, 3
NODE_ORIGIN = (32768, 32768, 1 << 20)
"""Counter coordinates of control node (0, 0, 0), which keep those of its neighbours positive."""


def philox4x32_10(counter: Any, key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Four output words (uint64 holding 32 bits) of each counter, a tuple of four broadcastable arrays."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & LOW,
            (p0 >> SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform_field(
    seed: int, stream: int, sample: int, component: int, z: np.ndarray, y: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """U[0, 1) with 24 bits at the grid of integer coordinates z, y, x; float64 (Z, Y, X)."""
    zz, yy, xx = np.meshgrid(*(np.asarray(c, np.int64) for c in (z, y, x)), indexing="ij")
    words = philox4x32_10((xx >> 2, (zz << 16) | yy, sample, component), (seed, stream))
    word = np.choose(xx & 3, [np.broadcast_to(w, xx.shape) for w in words])
    return (word >> np.uint64(8)).astype(np.float64) / 2**24


# --- shapes ---


def rotation_matrix(quaternion: tuple[float, float, float, float]) -> np.ndarray:
    """Matrix of v -> q v q* for the unit quaternion (w, x, y, z)."""
    w, *v = quaternion
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return (w * w - np.dot(v, v)) * np.eye(3) + 2 * np.outer(v, v) + 2 * w * cross


def cubic_bspline(t: np.ndarray) -> np.ndarray:
    """Centred cardinal cubic B-spline as a divided difference of truncated powers (Schoenberg 1946)."""
    return sum(
        binomial * np.clip(t + 2 - k, 0, None) ** 3 / 6 for k, binomial in enumerate((1, -4, 6, -4, 1))
    ) * (np.abs(t) < 2)


def displacement(plan: Any, blob: Any, axes: list[np.ndarray]) -> np.ndarray:
    """Displacement (3, Z, Y, X) at the grid of offsets `axes` from the centre, in the plan's length unit."""
    radius = np.prod(blob.semi_axes) ** (1 / 3)
    spacing = blob.warp_correlation * radius
    nodes, weights = [], []
    for offsets in axes:
        t = offsets / spacing
        n = np.arange(np.floor(t.min()) - 2, np.ceil(t.max()) + 3)
        nodes.append(n.astype(np.int64))
        weights.append(cubic_bspline(t[:, None] - n))
    grid = [n + origin for n, origin in zip(nodes, NODE_ORIGIN, strict=True)]
    parts = []
    for i in range(3):
        c = 2 * uniform_field(plan.seed, WARP, plan.index, 3 * blob.component + i, *grid) - 1
        for axis in range(3):
            c = np.moveaxis(np.tensordot(weights[axis], c, axes=(1, axis)), 0, axis)
        parts.append(blob.warp_amplitude * radius * c)
    return np.stack(parts)


def blob_centre(blob: Any, mask: np.ndarray) -> np.ndarray:
    """Centre voxel (z, y, x): the one the plan names, or where the floor(u |M|)-th voxel in C order leads."""
    if blob.center is not None:
        return np.array(blob.center)
    inside = np.argwhere(mask)
    p = blob.position * len(inside)
    z, y, x = inside[min(int(np.floor(p)), len(inside) - 1)].tolist()
    if blob.placement == "surface":
        first = min(int(4 * (p - np.floor(p))), 3)
        for k in range(4):
            dy, dx = ((0, 1), (1, 0), (0, -1), (-1, 0))[(first + k) % 4]
            way = [(y, x)]
            while mask[z][way[-1]]:
                to = way[-1][0] + dy, way[-1][1] + dx
                if not (0 <= to[0] < mask.shape[1] and 0 <= to[1] < mask.shape[2]):
                    break
                way.append(to)
            else:
                return np.array([z, *way[-2]])
    elif blob.placement == "depth":
        x = middle_of_run(mask[z, y], x)
        y = middle_of_run(mask[z, :, x], y)
    return np.array([z, y, x])


def middle_of_run(line: np.ndarray, at: int) -> int:
    """Middle of the voxels of a line, one after the other, that contain `at`; the lower of two."""
    label, _ = ndimage.label(line)
    run = np.flatnonzero(label == label[at])
    return int(run[0] + run[-1]) // 2


def blob_level(plan: Any, blob: Any, mask: np.ndarray) -> np.ndarray:
    """Sum of (q_i / s_i)^2 at every voxel of the volume; the blob is where it is at most 1."""
    centre = blob_centre(blob, mask)
    axes = [(np.arange(n) - c) * s for n, c, s in zip(mask.shape, centre, plan.scale, strict=True)]
    p = np.stack(np.meshgrid(*axes, indexing="ij"))
    if blob.warp_amplitude != 0:
        p = p + displacement(plan, blob, axes)
    q = np.tensordot(rotation_matrix(blob.rotation).T, p, axes=1)
    return sum((q[i] / blob.semi_axes[i]) ** 2 for i in range(3))


def blob_voxels(plan: Any, blob: Any, mask: np.ndarray) -> np.ndarray:
    """Voxels of one blob within the mask. A voxel on the surface to rounding is inside (see `SURFACE`)."""
    return (blob_level(plan, blob, mask) <= 1 + SURFACE) & mask


def merge(blobs: list[np.ndarray], connectivity: int) -> list[tuple[int, ...]]:
    """Groups of touching blobs, ascending, in the order of their first; empty blobs are in none."""
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connectivity])
    grown = [ndimage.binary_dilation(b, structure) for b in blobs]
    touch = np.array([[bool((g & b).any()) for b in blobs] for g in grown]).reshape(len(blobs), len(blobs))
    _, root = csgraph.connected_components(sparse.csr_matrix(touch), directed=False)
    groups: dict[int, list[int]] = {}
    for k, r in enumerate(root):
        if blobs[k].any():
            groups.setdefault(int(r), []).append(k)
    return sorted(tuple(g) for g in groups.values())


# --- texture ---


@dataclass(frozen=True)
class TextureEnclosure:
    """Bounds of B on a component's box, and of its β."""

    low: np.ndarray
    high: np.ndarray
    beta: tuple[float, float]
    fallback: tuple[bool, bool]
    """(it surely falls back, it possibly does)."""
    ties: int
    """Voxels of the box whose salt noise the rounding of a may decide."""


def probability_map(plan: Any, blob: Any, box: tuple[slice, ...]) -> tuple[np.ndarray, float]:
    """a(x) of eq. 8 on the box, and the error that an error `A2_ERROR` of a2 makes in it."""
    grid = [np.arange(s.start, s.stop) for s in box]
    a1 = uniform_field(plan.seed, PROBABILITY, plan.index, blob.component, *grid)
    sigma = [blob.sigma_a / s for s in plan.scale]
    a2 = ndimage.gaussian_filter(a1, sigma, mode="reflect", truncate=4.0)
    spread, gap = np.ptp(a2), blob.a_high - blob.a_low
    if a2.size == 1:
        return np.full(a2.shape, blob.a_low), 0.0
    if spread <= 4 * A2_ERROR:  # the implementation may see a constant, or only its own rounding noise
        return np.full(a2.shape, blob.a_low), gap
    # Four: of a2 and the minimum above the bar, of maximum and minimum below it.
    return gap * (a2 - a2.min()) / spread + blob.a_low, gap * 4 * A2_ERROR / spread


def mean_above(low: np.ndarray, high: np.ndarray, threshold: float) -> tuple[float, float, bool, bool]:
    """Least and greatest mean of the values above `threshold`, for values known only to lie in [low, high].

    Returns the two means (nan where no value need pass), and whether none can pass and whether none may pass.
    """
    sure, possible = low > threshold, high > threshold
    if not possible.any():
        return np.nan, np.nan, True, True
    if not sure.any():
        return threshold, float(high[possible].max()), False, True
    extra = possible & ~sure
    least = (low[sure].sum() + threshold * extra.sum()) / (sure.sum() + extra.sum())
    top = np.concatenate([[high[sure].sum()], np.sort(high[extra])[::-1]]).cumsum()
    return float(least), float((top / (sure.sum() + np.arange(top.size))).max()), False, False


def texture(plan: Any, blob: Any, box: tuple[slice, ...], voxels: np.ndarray) -> TextureEnclosure:
    """Enclose B of eq. 2-8 on a component's box; `voxels` marks the component within it."""
    a, error = probability_map(plan, blob, box)
    v = uniform_field(plan.seed, SALT, plan.index, blob.component, *[np.arange(s.start, s.stop) for s in box])
    margin = error + 1e-7  # float32 rounding of the scaling itself, values below 1
    a_low, a_high = np.maximum(a - margin, blob.a_low - 1e-7), np.minimum(a + margin, blob.a_high + 1e-7)
    sigma = [blob.sigma_b / s for s in plan.scale]
    salt_low, salt_high = v < a_low, v < a_high
    b_low = ndimage.gaussian_filter(salt_low.astype(float), sigma, mode="reflect", truncate=4.0) - B2_ERROR
    b_high = ndimage.gaussian_filter(salt_high.astype(float), sigma, mode="reflect", truncate=4.0) + B2_ERROR
    least, most, surely, possibly = mean_above(b_low[voxels], b_high[voxels], plan.mean_threshold)
    betas = [blob.mu0 / m for m in (most, least) if np.isfinite(m)]
    if possibly:
        betas.append(blob.mu0 / plan.mean_threshold)
    beta = (min(betas), max(betas))
    return TextureEnclosure(
        low=np.clip(beta[0] * b_low, 0, 1),
        high=np.clip(beta[1] * b_high, 0, 1),
        beta=beta,
        fallback=(surely, possibly),
        ties=int((salt_low != salt_high).sum()),
    )


# --- the whole pair ---


@dataclass(frozen=True)
class OraclePair:
    """What a rendering must be."""

    image_low: np.ndarray
    image_high: np.ndarray
    target: np.ndarray
    labels: np.ndarray
    groups: list[tuple[int, ...]]
    textures: list[TextureEnclosure]
    boxes: list[tuple[slice, ...]]


def softness(plan: Any, lesion: np.ndarray) -> np.ndarray:
    """Factor of a soft edge, by distance from the nearest voxel of the volume out of the lesion."""
    if plan.edge == 0 or lesion.all():
        return np.ones(lesion.shape)
    # SciPy knows nothing beyond the array, so what lies beyond the volume counts as little as it should.
    return np.minimum(ndimage.distance_transform_edt(lesion, sampling=plan.scale) / plan.edge, 1)


def enter(plan: Any, h: np.ndarray, b: np.ndarray, e: np.ndarray, weight: float) -> np.ndarray:
    """A of H, B and the soft edge; monotone in B in every mode."""
    low, high = plan.value_range
    if plan.mode == "max":
        return np.maximum(h, low + b * (high - low))
    if plan.mode == "min":
        return np.minimum(h, low + (1 - b) * (high - low))
    if plan.mode == "add":
        return np.clip(h + weight * e * b * (high - low), low, high)
    assert plan.mode == "blend"
    return np.clip(h + weight * e * (low + b * (high - low) - h), low, high)


def oracle_render(plan: Any, image: np.ndarray, mask: np.ndarray) -> OraclePair:
    """Render a plan on one (z, y, x) volume."""
    mask = np.asarray(mask) != 0
    blobs = [blob_voxels(plan, b, mask) for b in plan.blobs]
    groups = merge(blobs, plan.connectivity)
    labels = np.zeros(mask.shape, np.int32)
    low = np.asarray(image, np.float64).copy()
    high = low.copy()
    textures, boxes = [], []
    for label, group in enumerate(groups, start=1):
        lesion = np.logical_or.reduce([blobs[k] for k in group])
        labels[lesion] = label
        (box,) = ndimage.find_objects(lesion.astype(np.uint8))
        b = texture(plan, plan.blobs[group[0]], box, lesion[box])
        inside, h = lesion[box], np.asarray(image[box], np.float64)
        e, weight = softness(plan, lesion)[box], plan.blobs[group[0]].weight
        ends = [enter(plan, h, side, e, weight) for side in (b.low, b.high)]
        low[box][inside], high[box][inside] = np.minimum(*ends)[inside], np.maximum(*ends)[inside]
        textures.append(b)
        boxes.append(box)
    lesions = labels > 0
    start, stop = plan.value_range
    error = IMAGE * (stop - start)
    if (start, stop) != (0, 1):
        error += RANGE * max(abs(start), abs(stop))
    if image.dtype == np.float16:
        error += HALF * max(abs(start), abs(stop))
    low[lesions] -= error
    high[lesions] += error
    threshold = plan.tau if (start, stop) == (0, 1) else start + plan.tau * (stop - start)
    target = (image >= np.asarray(threshold, image.dtype)) & ~lesions
    return OraclePair(low, high, target, labels, groups, textures, boxes)
