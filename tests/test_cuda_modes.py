"""Modes, soft edges, placements and ranges of values in the CUDA generator, on the host.

What is expected is computed here, slowly, from the kernels' own b: what the same lesions are in the paper's
mode on an empty image.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

import lesionsynth as ls
from lesionsynth.config import MODES, PLACEMENTS, SOFT_MODES
from tests.cuda_host.pairs import HU_RANGE, HostPair, render
from tests.cuda_host.shim import compiler
from tests.plans import SHAPE, blob, plan, renderer, sheets, voxel
from tests.test_cuda_render import ORDERS, drawn, host
from tests.test_cuda_shim import sanitized

pytestmark = pytest.mark.skipif(compiler() is None, reason="the shim needs g++, which is not installed")

KINDS = ("float32", "float16", "bfloat16", "int16", "float64")
RANGES = ((0.0, 1.0), (-3.1, 5.3), (-1024.0, 600.0))
F32 = np.float32


# --- what is expected ---


def shifted(costs: np.ndarray, k: int, axis: int) -> np.ndarray:
    """What stands k voxels further along an axis; infinity beyond the volume."""
    out = np.full_like(costs, np.inf)
    n = costs.shape[axis]
    to, of = [slice(None)] * 3, [slice(None)] * 3
    to[axis], of[axis] = slice(max(-k, 0), max(n - max(k, 0), 0)), slice(max(k, 0), max(n + min(k, 0), 0))
    out[tuple(to)] = costs[tuple(of)]
    return out


def terms(edge: float, step: float) -> list[tuple[int, np.float32]]:
    """Steps that are shorter than the edge, and (k s)^2."""
    return [
        (k, (F32(k) * F32(step)) * (F32(k) * F32(step)))
        for k in range(-65, 66)
        if k == 0 or F32(abs(k)) * F32(step) < F32(edge)
    ]


def softened(least: np.ndarray, edge: float) -> np.ndarray:
    e = np.minimum(np.sqrt(least) / F32(edge), F32(1))
    assert e.dtype == F32
    return e


def edge_by_axes(inside: np.ndarray, edge: float, scale: tuple[float, ...]) -> np.ndarray:
    """e of a lesion's voxels, one axis after another."""
    if edge == 0:
        return np.ones(inside.shape, F32)
    least = np.where(inside, F32(np.inf), F32(0))
    for axis in (2, 1, 0):
        costs = [t + shifted(least, k, axis) for k, t in terms(edge, scale[axis])]
        least = np.minimum.reduce(costs)
    return softened(least, edge)


def edge_by_offsets(inside: np.ndarray, edge: float, scale: tuple[float, ...]) -> np.ndarray:
    """The same: at every voxel, every other one within reach is looked at."""
    least = np.full(inside.shape, np.inf, F32)
    out = np.where(inside, F32(np.inf), F32(0))
    for (dz, z), (dy, y), (dx, x) in product(*(terms(edge, step) for step in scale)):
        costs = shifted(shifted(shifted(out, dz, 0), dy, 1), dx, 2)
        least = np.minimum(least, (z + (y + x)) + costs)
    return softened(least, edge)


def by_bfloat16(values: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).float().numpy()


def stored(values: Any, kind: str) -> np.ndarray:
    """Values of an array as the image's type holds them; bfloat16 in float32."""
    if kind == "bfloat16":
        return by_bfloat16(values)
    return values.astype("float32" if kind == "int16" else kind)


def windowed(image: np.ndarray) -> np.ndarray:
    low, high = (F32(v) for v in HU_RANGE)
    return (np.clip(image.astype(F32), low, high) - low) / (high - low)


def expected(
    one: ls.LesionPlan, image: np.ndarray, kind: str, b: np.ndarray, labels: np.ndarray, components: Any
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A, GT and `changed` of every lesion; `image` is in values that `stored` leaves alone."""
    healthy = windowed(image) if kind == "int16" else image
    real = np.float64 if kind == "float64" else F32
    h = healthy.astype(real)
    (lo, hi), a, changed = one.value_range, healthy.copy(), []
    low, span = F32(lo), F32(hi - lo)
    ends = [[float(F32(end)), float(stored(np.array([end]), kind)[0])] for end in (lo, hi)]
    least, most = real(min(ends[0])), real(max(ends[1]))  # as the type or float32 has them
    for component in components:
        inside = labels == component.label
        w, e = F32(one.blobs[component.blobs[0]].weight), edge_by_axes(inside, one.edge, one.scale)
        v = (F32(1) - b if one.mode == "min" else b) * span + low
        if one.mode in SOFT_MODES:
            t = w * e
            if one.mode == "add":
                values = h + (t * b * span).astype(real)
            else:
                values = h + t.astype(real) * (v.astype(real) - h)
            now = stored(np.clip(values, least, most), kind)
        else:
            level = stored(np.clip(v.astype(real), least, most), kind)
            now = np.where(level > h if one.mode == "max" else level < h, level, healthy)
        a[inside] = now[inside]
        changed.append(int((now != healthy)[inside].sum()))
    tau = stored(np.array([one.tau if one.value_range == (0.0, 1.0) else lo + one.tau * (hi - lo)]), kind)[0]
    return a, (healthy >= tau) & (labels == 0), changed


def as_kind(values: np.ndarray, kind: str) -> np.ndarray:
    """Values of [0, 1] as an image of a type; bfloat16 by its bits."""
    if kind == "int16":
        return (values * (HU_RANGE[1] - HU_RANGE[0]) + HU_RANGE[0]).round().astype(np.int16)
    if kind == "bfloat16":
        return (by_bfloat16(values.astype(F32)).view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    return values.astype(kind)


def values_of(stored_image: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bfloat16":
        return (stored_image.view(np.uint16).astype(np.uint32) << 16).view(F32)
    return stored_image


def spread(image: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """An image of [0, 1] in the middle of a range, and its ends where every type can hold them."""
    low, high = bounds
    return low + (high - low) * (image.astype(np.float64) * 0.98 + 0.01) if bounds != (0.0, 1.0) else image


def hold_to_twin(pair: HostPair, plans: list[ls.LesionPlan], images: np.ndarray, masks: np.ndarray) -> None:
    wanted = renderer().render(plans, images, masks)
    assert_array_equal(pair.labels, wanted.labels)
    assert_array_equal(pair.target, wanted.target)
    assert_array_equal(pair.image, wanted.image)
    assert list(pair.components) == [p.components for p in wanted.plan]


def hold(
    plans: list[ls.LesionPlan], image: np.ndarray, masks: np.ndarray, kind: str = "float32", **options: Any
) -> HostPair:
    """Render a batch and hold it to what is expected, and to the CPU twin; `image` lies in [0, 1]."""
    hard = [replace(one, mode="max", edge=0.0, value_range=(0.0, 1.0)) for one in plans]
    base = render(host(**options), hard, np.zeros(masks.shape, F32), masks)
    images = np.stack([as_kind(spread(image, one.value_range), kind) for one in plans])
    before = images.copy()
    pair = render(host(**options), plans, images, masks, kind=kind)
    assert_array_equal(images, before)
    assert_array_equal(pair.labels, base.labels)
    for k, (one, components) in enumerate(zip(plans, pair.components, strict=True)):
        healthy = values_of(images[k], kind)
        a, target, changed = expected(one, healthy, kind, base.image[k], base.labels[k], components)
        assert_array_equal(values_of(pair.image[k], kind), a)
        assert_array_equal(pair.target[k], target)
        assert [c.changed for c in components] == changed
        outside = base.labels[k] == 0
        if kind != "int16":
            assert pair.image[k][outside].tobytes() == images[k][outside].tobytes()
    if kind != "bfloat16":
        hold_to_twin(pair, plans, images, masks)
    return pair


def weighted(one: ls.LesionPlan, mode: str, weights: tuple[float, ...], **changes: Any) -> ls.LesionPlan:
    """Return a plan in another mode, its blobs with these weights in turn."""
    if mode in SOFT_MODES:
        signs = [abs(w) if mode == "blend" else w for w in weights]
        blobs = tuple(replace(b, weight=signs[k % len(signs)]) for k, b in enumerate(one.blobs))
        changes = {"blobs": blobs, **changes}
    return replace(one, mode=mode, **changes)


# --- modes ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", RANGES)
def test_modes_of_one_batch(bounds, kind, lungs) -> None:
    """Items of one batch differ in mode, edge and weight; ranges of values in all types that have them."""
    if kind == "int16" and bounds != (0.0, 1.0):
        pytest.skip("Hounsfield units have no other range of values")
    if kind == "bfloat16":
        pytest.importorskip("torch")
    image, mask = lungs
    plans = drawn(4, image.shape, seed=21)
    changed = {}
    batch = [
        weighted(one, mode, (0.7, -0.4, 1.0), value_range=bounds, edge=edge)
        for one, (mode, edge) in zip(
            [*plans, *plans[2:]], [*((m, 0.0) for m in MODES), ("add", 2.5), ("blend", 4.0)], strict=True
        )
    ]
    pair = hold(batch, image, np.stack([mask] * len(batch)), kind)
    for one, components in zip(batch, pair.components, strict=True):
        changed.setdefault(one.mode, 0)
        changed[one.mode] += sum(c.changed for c in components)
        assert all(c.changed <= c.voxels for c in components)
    assert min(changed.values()) > 0, "every mode does something"


def test_items_of_several_ranges(lungs) -> None:
    """The range is the item's: what one item may hold, another may not."""
    image, mask = lungs
    plans = [
        weighted(one, mode, (1.0,), value_range=bounds)
        for one, mode, bounds in zip(
            drawn(4, image.shape), MODES, [(0.0, 1.0), (-3.1, 5.3), (0.0, 1.0), (-1024.0, 600.0)], strict=True
        )
    ]
    hold(plans, image, np.stack([mask] * 4))


def test_the_ends_of_a_range(lungs) -> None:
    """Both ends are inside, a step beyond is not, -0.0 is as good as 0; the message says the numbers."""
    image, mask = lungs
    one = plan(blob(), value_range=(-3.0, 5.0), mode="blend")
    gpu = host()
    for value in (-3.0, 5.0, -0.0):
        images = np.full((1, *image.shape), value, F32)
        assert render(gpu, [one], images, mask[None]).components
    for value in (np.nextafter(F32(-3), F32(-4)), np.nextafter(F32(5), F32(6)), np.nan, np.inf):
        images = np.zeros((1, *image.shape), F32)
        images[0, 0, 0, 0] = value
        pair = render(gpu, [one], images, mask[None])
        with pytest.raises(ValueError, match=r"image must be finite and in \[-3, 5\].*samples 9"):
            _ = pair.components
    minus_zero = np.full((1, *image.shape), -0.0, F32)
    assert render(gpu, [plan(blob())], minus_zero, mask[None]).components
    images[0, 0, 0, 0] = 2.0
    pair = render(gpu, [plan(blob()), one], np.concatenate([images, images]), np.stack([mask] * 2))
    with pytest.raises(ValueError, match=r"in \[0, 1\] or \[-3, 5\]"):
        _ = pair.components


def test_what_a_lesion_cannot_change(lungs) -> None:
    """`changed` is 0 where the image is brighter already, and all voxels where everything moves."""
    image, mask = lungs
    gpu, masks = host(), mask[None]
    ones, zeros = np.ones((1, *image.shape), F32), np.zeros((1, *image.shape), F32)
    for mode, images, all_ in (("max", ones, False), ("min", zeros, False), ("add", zeros, True)):
        one = plan(blob(sigma_b=3.0), mode=mode)
        ((component,),) = render(gpu, [one], images, masks).components
        assert component.changed == (component.voxels if all_ else 0)


# --- the soft edge ---


@pytest.mark.parametrize(
    ("scale", "edge"),
    [((1.0, 1.0, 1.0), 1.5), ((1.0, 1.0, 1.0), 6.5), ((2.0, 0.7, 0.9), 3.3), ((0.3, 1.1, 0.4), 4.0)],
)
def test_edge_against_a_distance_transform(scale, edge) -> None:
    """e = min(1, depth / edge), to a few roundings; no way out lies beyond the volume."""
    shape = (9, 31, 70)
    rng = np.random.default_rng(int(10 * edge))
    lesions = ndimage.gaussian_filter(rng.random(shape), 2.5) > 0.5
    padded = np.pad(lesions, 66, mode="edge")
    depth = ndimage.distance_transform_edt(padded, sampling=scale)[66:-66, 66:-66, 66:-66]
    e = edge_by_axes(lesions, edge, scale)
    assert_array_equal(e, edge_by_offsets(lesions, edge, scale))
    core = lesions & (e < 1)
    assert core.sum() > 1000
    # Padding by the edge repeats ways out beyond the volume too: they are never nearer than their originals.
    assert_allclose(e[lesions], np.minimum(1, depth[lesions] / edge), rtol=2e-6)


@pytest.mark.parametrize("mode", SOFT_MODES)
@pytest.mark.parametrize(
    ("scale", "edge"),
    [
        ((1.0, 1.0, 1.0), 1e-3),
        ((1.0, 1.0, 1.0), 1.0),
        ((1.0, 1.0, 1.0), 9.0),
        ((2.0, 0.7, 0.9), 3.3),
        ((0.3, 1.1, 0.4), 4.0),
    ],
)
def test_edges(scale, edge, mode, lungs) -> None:
    """Narrower than a voxel, of one voxel exactly, and wider than any lesion."""
    image, mask = lungs
    plans = drawn(3, image.shape, seed=31)
    hold(
        [weighted(one, mode, (0.9, 0.5), scale=scale, edge=edge) for one in plans],
        image,
        np.stack([mask] * 3),
    )


@pytest.mark.parametrize("shape", [(2, 3, 300), (3, 280, 5), (150, 4, 6), (5, 65, 129)])
def test_the_widest_edge(shape) -> None:
    """64 voxels, along each axis: over words, tiles of rows, and slices; up to the end of the volume."""
    axis = int(np.argmax(shape))
    rng = np.random.default_rng(axis)
    image, mask = rng.random(shape, dtype=F32), np.ones(shape, bool)
    for n in (shape[axis] // 2, 5, shape[axis] - 1):
        center = tuple(n if k == axis else size // 2 for k, size in enumerate(shape))
        axes = tuple(100.0 if k == axis else 200.0 for k in range(3))
        one = plan(blob(semi_axes=axes, center=center), shape=shape, edge=64.0, mode="blend")
        hold([one], image, mask[None])
    # Rows end at the mask here, and at every column of a word.
    stairs = np.tri(shape[1], shape[2], shape[2] // 2, dtype=bool) & mask
    one = plan(blob(semi_axes=(900.0,) * 3, center=(0, 0, 0)), shape=shape, edge=64.0, mode="add")
    hold([one], image, stairs[None])


def test_edges_as_far_as_a_tile_sees() -> None:
    """The only way out is 63 rows from the last row of a tile, or from the first: as far as counts."""
    shape = (1, 140, 33)
    image = np.random.default_rng(0).random(shape, dtype=F32)
    for out in (slice(126, None), slice(1, 2)):
        mask = np.ones(shape, bool)
        mask[:, out] = False
        one = plan(blob(semi_axes=(900.0,) * 3, center=(0, 60, 5)), shape=shape, edge=63.5, mode="blend")
        hold([one], image, mask[None])


def test_a_lesion_without_a_way_out() -> None:
    """It fills the volume: e is 1 everywhere."""
    shape = (3, 5, 40)
    image, mask = np.full(shape, 0.2, F32), np.ones(shape, bool)
    wide = plan(blob(semi_axes=(900.0,) * 3, center=(1, 2, 20)), shape=shape, mode="add", edge=30.0)
    soft, hard = (render(host(), [p], image[None], mask[None]).image for p in (wide, replace(wide, edge=0.0)))
    assert_array_equal(soft, hard)
    hold([wide], image, mask[None])


def test_another_lesion_is_a_way_out() -> None:
    """Neighbours that do not merge: each sees the other as outside."""
    mask = np.ones((3, 20, 40), bool)
    image = np.full(mask.shape, 0.2, F32)
    one = plan(
        blob(0, semi_axes=(9.0, 9.0, 9.0), center=(1, 10, 10)),
        *(voxel(k, (1, 10, 20 + 2 * k)) for k in (1, 2)),
        shape=mask.shape, mode="blend", edge=5.0, connectivity=6,
    )  # fmt: skip
    pair = hold([one], image, mask[None])
    assert pair.labels.max() == 3


def test_edges_of_many_blobs(lungs) -> None:
    """More blobs than a warp has lanes, in lesions of several."""
    image, mask = lungs
    rng = np.random.default_rng(4)
    inside = np.argwhere(mask)
    centers = inside[rng.integers(len(inside), size=70)]
    axes = rng.uniform(0.4, 3.6, size=(70, 3))
    blobs = [
        blob(k, center=tuple(int(c) for c in center), semi_axes=tuple(map(float, s)), warp_amplitude=0.3)
        for k, (center, s) in enumerate(zip(centers, axes, strict=True))
    ]
    for mode in MODES:
        edge = 2.0 if mode in SOFT_MODES else 0.0
        hold([weighted(plan(*blobs), mode, (0.2, 1.0, -0.8), edge=edge)], image, mask[None])


@pytest.mark.parametrize("mode", MODES)
def test_lesions_that_find_no_room(mode, lungs, monkeypatch) -> None:
    """The crowded, too, have modes, edges and a count of what they changed."""
    image, mask = lungs
    monkeypatch.setattr("lesionsynth.cuda.render.LEAST_FIELD", 0)
    one = weighted(plan(*sheets()), mode, (0.6, -1.0), edge=2.0 if mode in SOFT_MODES else 0.0)
    pair = hold([one], image, np.ones_like(mask)[None])
    assert len(pair.components[0]) == 3


def one_of_each(seed: int) -> list[ls.LesionPlan]:
    """Plans of every mode, two with soft edges, and blobs of every placement."""
    plans = []
    for one, mode, edge in zip(drawn(4, SHAPE, seed=seed), MODES, (0.0, 0.0, 3.0, 2.0), strict=True):
        blobs = tuple(replace(b, placement=PLACEMENTS[k % 3]) for k, b in enumerate(one.blobs))
        plans.append(weighted(replace(one, blobs=blobs), mode, (0.8, -0.3), edge=edge))
    return plans


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_any_order_of_threads(options, plain, lungs) -> None:
    image, mask = lungs
    hold(one_of_each(5), image, np.stack([mask] * 4), plain=plain, **options)


@pytest.mark.slow
def test_under_address_sanitizer() -> None:
    """No access outside any buffer: in all modes, over words and tiles, with and without room."""
    done = sanitized(
        """
        import numpy as np
        from unittest.mock import patch
        from tests.conftest import draw_lungs
        from tests.cuda_host.pairs import render
        from tests.plans import blob, plan, sheets
        from tests.test_cuda_modes import one_of_each
        from tests.test_cuda_render import host
        image, mask = draw_lungs()
        images, masks = np.stack([image] * 4), np.stack([mask] * 4)
        gpu = host(sanitize=True, order="random", seed=2)
        for kind in ("float32", "float16", "float64"):
            pair = render(gpu, one_of_each(7), images.astype(kind), masks)
            assert all(sum(c.changed for c in item) > 0 for item in pair.components)
        with patch("lesionsynth.cuda.render.LEAST_FIELD", 0):
            one = plan(*sheets(), mode="blend", edge=2.0)
            render(gpu, [one], images[:1], np.ones_like(masks[:1]))
        for shape in ((2, 3, 300), (3, 280, 5), (150, 4, 6)):
            wide = blob(semi_axes=(90.0,) * 3, center=tuple(n // 2 for n in shape))
            one = plan(wide, shape=shape, edge=64.0, mode="blend")
            render(gpu, [one], np.full((1, *shape), 0.2, np.float32), np.ones((1, *shape), bool))
        print("clean", flush=True)
        """
    )
    assert "clean" in done.stdout, done.stderr[-3000:]
    assert done.returncode == 0


def test_what_an_edge_costs(lungs) -> None:
    """A launch more where an item has one, none where nobody does."""
    image, mask = lungs
    hard, soft = host(), host()
    one = replace(drawn(1, image.shape)[0], mode="blend")
    plans = [replace(one, edge=0.0), replace(one, edge=3.0)]
    images, masks = np.stack([image] * 2), np.stack([mask] * 2)
    render(hard, [plans[0]] * 2, images, masks)
    render(soft, plans, images, masks)
    assert len(hard.device.launches) == 13
    assert hard.device.launches[-2:] == ["inject", "inject_crowded"]
    assert soft.device.launches == [
        *hard.device.launches[:-2],
        "edge_in_plane",
        "inject_soft",
        "inject_crowded",
    ]


def test_graphs_tell_edges_apart(lungs, monkeypatch) -> None:
    """A batch with a soft edge is not replayed as one without."""
    gpu = host()
    keys = []
    monkeypatch.setattr(gpu.device, "replay", lambda key, launches: (keys.append(key), launches()))
    one = replace(drawn(1, lungs[0].shape)[0], mode="blend")
    for edge in (0.0, 3.0, 0.0):
        for _ in range(2):  # on both sides of the workspace, where it has two
            render(gpu, [replace(one, edge=edge)], lungs[0][None], lungs[1][None])
    assert keys[:2] == keys[4:]
    assert not set(keys[:2]) & set(keys[2:4])


# --- placement ---


def start_of(mask: np.ndarray, position: float) -> tuple[list[int], float]:
    ranks = np.flatnonzero(mask)
    p = position * len(ranks)
    return [int(i) for i in np.unravel_index(ranks[min(int(p), len(ranks) - 1)], mask.shape)], p - int(p)


def on_surface(mask: np.ndarray, position: float) -> tuple[int, ...]:
    start, f = start_of(mask, position)
    for k in range(4):
        dy, dx = ((0, 1), (1, 0), (0, -1), (-1, 0))[(min(int(4 * f), 3) + k) % 4]
        z, y, x = start
        while True:
            if not (0 <= y + dy < mask.shape[1] and 0 <= x + dx < mask.shape[2]):
                break
            if not mask[z, y + dy, x + dx]:
                return z, y, x
            y, x = y + dy, x + dx
    return tuple(start)


def in_depth(mask: np.ndarray, position: float) -> tuple[int, ...]:
    (z, y, x), _ = start_of(mask, position)
    row, _ = ndimage.label(mask[z, y])
    run = np.flatnonzero(row == row[x])
    x = int(run[0] + run[-1]) // 2
    column, _ = ndimage.label(mask[z, :, x])
    run = np.flatnonzero(column == column[y])
    return z, int(run[0] + run[-1]) // 2, x


def masks_to_place_in() -> list[np.ndarray]:
    """Organs with holes, that reach the array's end or do not, of rows longer than a word or a walk."""
    rng = np.random.default_rng(8)
    shape = (3, 50, 135)
    full, single = np.ones(shape, bool), np.zeros(shape, bool)
    single[1, 20, 64] = True
    inner = np.zeros(shape, bool)
    inner[:, 3:-2, 1:-1] = True
    pierced = full.copy()
    pierced[1, 25, 70] = pierced[0, 7, 0] = False
    clouds = [ndimage.gaussian_filter(rng.random(shape), (0, s, s)) > 0.5 for s in (1.0, 4.0)]
    return [full, single, inner, pierced, *clouds, ~inner]


@pytest.mark.parametrize(
    "options", [{}, {"order": "reverse"}, {"order": "random", "yield_percent": 20}], ids=str
)
@pytest.mark.parametrize("placement", ["uniform", "surface", "depth"])
def test_placement(placement, options) -> None:
    """One voxel a plan tells where it went; a centre that is given stays."""
    rng = np.random.default_rng(3)
    gpu = host(**options)
    where = {"uniform": lambda m, p: tuple(start_of(m, p)[0]), "surface": on_surface, "depth": in_depth}[
        placement
    ]
    for mask in masks_to_place_in():
        positions = [0.0, 1.0 - 2.0**-53, *rng.random(14 if mask.all() else 30).tolist()]
        plans = [
            plan(voxel(0, None, position=p, placement=placement), shape=mask.shape, index=k)
            for k, p in enumerate(positions)
        ]
        plans.append(plan(voxel(0, (1, 20, 64), placement=placement), shape=mask.shape))
        masks = np.stack([mask] * len(plans))
        images = np.zeros(masks.shape, F32)
        pair = render(gpu, plans, images, masks)
        hold_to_twin(pair, plans, images, masks)
        labels = pair.labels
        found = [tuple(int(i) for i in np.argwhere(one)[0]) for one in labels[:-1]]
        assert found == [where(mask, p) for p in positions]
        if mask[1, 20, 64]:
            assert labels[-1].nonzero() == ((1,), (20,), (64,))


def test_placement_of_blobs_of_one_plan(lungs) -> None:
    """Each blob has its own; an empty mask is refused as ever."""
    image, mask = lungs
    rng = np.random.default_rng(0)
    kinds = ("surface", "depth", "uniform")
    blobs = [voxel(k, None, position=float(p), placement=kinds[k % 3]) for k, p in enumerate(rng.random(45))]
    expected_voxels = np.zeros(mask.shape, bool)
    for one in blobs:
        if one.placement == "uniform":
            expected_voxels[tuple(start_of(mask, one.position)[0])] = True
        else:
            expected_voxels[(on_surface if one.placement == "surface" else in_depth)(mask, one.position)] = (
                True
            )
    gpu = host()
    pair = render(gpu, [plan(*blobs)], image[None], mask[None])
    assert_array_equal(pair.labels[0] > 0, expected_voxels)
    pair = render(gpu, [plan(*blobs)], image[None], np.zeros_like(mask)[None])
    with pytest.raises(ValueError, match="at least one voxel"):
        _ = pair.components


# --- the CPU twin ---


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bfloat16"])
@pytest.mark.parametrize("bounds", RANGES)
def test_against_the_cpu_twin(bounds, kind, lungs) -> None:
    """Equal bits of image, target and labels; equal lesions."""
    if kind == "int16" and bounds != (0.0, 1.0):
        pytest.skip("Hounsfield units have no other range of values")
    image, mask = lungs
    rng = np.random.default_rng(1)
    gpu = host()
    for scale in ((1.0, 1.0, 1.0), (2.0, 0.7, 0.9)):
        plans = []
        for one, (mode, edge) in zip(
            drawn(8, image.shape, seed=41),
            [(m, e if m in SOFT_MODES else 0.0) for e in (3.7, 0.0) for m in MODES],
            strict=True,
        ):
            blobs = tuple(
                replace(b, placement=("uniform", "surface", "depth")[int(rng.integers(3))]) for b in one.blobs
            )
            changed = replace(
                one, blobs=blobs, scale=scale, edge=edge if mode in SOFT_MODES else 0.0, mode=mode
            )
            plans.append(weighted(changed, mode, (0.9, -0.5), value_range=bounds))
        images = np.stack([as_kind(spread(image, bounds), kind)] * len(plans))
        masks = np.stack([mask] * len(plans))
        hold_to_twin(render(gpu, plans, images, masks), plans, images, masks)
