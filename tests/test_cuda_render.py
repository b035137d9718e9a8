"""The CUDA generator on the host: the kernels' own source and all launches, against the CPU twin and oracle.

Equal means equal: images, targets, labels and components have the twin's bits. The twin is held to the oracle
in test_generator_oracle.py; one test here goes to the oracle directly.
"""

from __future__ import annotations

import ast
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import lesionsynth as ls
from lesionsynth.cuda.render import Renderer
from lesionsynth.cuda.workspace import MOST_SLOTS
from tests import oracles
from tests.conftest import draw_lungs
from tests.cuda_host.device import HostDevice
from tests.cuda_host.pairs import render
from tests.cuda_host.shim import compiler
from tests.plans import blob, plan, renderer, sheets, small_config, voxel

pytestmark = pytest.mark.skipif(compiler() is None, reason="the shim needs g++, which is not installed")

ORDERS = [
    {},
    {"order": "reverse"},
    {"order": "warps"},
    {"order": "random", "seed": 3},
    {"order": "random", "yield_percent": 30, "seed": 5, "processors": 2},
]


def host(*, plain: bool = False, **options) -> Renderer:
    return Renderer(HostDevice(**options), plain=plain)


def agree(gpu: Renderer, plans, images, masks) -> None:
    """Hold a batch to the CPU twin."""
    expected = renderer().render(plans, images, masks)
    pair = render(gpu, plans, images, masks)
    assert_array_equal(pair.labels, expected.labels)
    assert_array_equal(pair.target, expected.target)
    assert_array_equal(pair.image, expected.image)
    assert list(pair.components) == [p.components for p in expected.plan]


def drawn(count: int, shape, seed: int = 11, **config):
    synth = ls.LesionSynthesizer(small_config(**config), seed=seed)
    return [synth.sample(index=i, shape=shape) for i in range(count)]


@pytest.fixture(scope="module")
def lungs():
    return draw_lungs()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_drawn_plans_in_any_order_of_threads(options, plain, lungs) -> None:
    image, mask = lungs
    gpu = host(plain=plain, **options)
    for one in drawn(5, image.shape):
        agree(gpu, [one], image[None], mask[None])


def test_two_hundred_plans(lungs) -> None:
    """The issue's number, on small volumes; full slabs are in the slow test below."""
    image, mask = lungs
    gpu = host()
    for number, connectivity in enumerate((26, 18, 6, 26)):
        plans = drawn(50, image.shape, seed=number, connectivity=connectivity)
        for k in range(0, 50, 5):
            agree(gpu, plans[k : k + 5], np.stack([image] * 5), np.stack([mask] * 5))


@pytest.mark.slow
def test_full_slabs() -> None:
    """32 x 512 x 512 with the paper's settings."""
    chest = ls.phantom.chest_ct(shape=(32, 512, 512), spacing=(1.0, 0.8, 0.8), seed=1)
    image = (ls.window_hu(chest.hu) * chest.lung_mask).astype(np.float32)
    synth, gpu = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0), host()
    for index in range(6):
        one = synth.sample(index=index, shape=image.shape)
        agree(gpu, [one], image[None], chest.lung_mask[None])


def test_against_the_oracle(lungs) -> None:
    image, mask = lungs
    (one,) = drawn(1, image.shape, seed=2)
    expected = oracles.oracle_render(one, image, mask)
    pair = render(host(), [one], image[None], mask[None])
    assert_array_equal(pair.labels[0], expected.labels)
    assert_array_equal(pair.target[0], expected.target)
    assert ((pair.image[0] >= expected.image_low) & (pair.image[0] <= expected.image_high)).all()


def test_an_item_does_not_know_its_batch(lungs) -> None:
    """Items of one batch differ in everything, and come out as they do alone."""
    image, mask = lungs
    shape = image.shape
    plans = [
        drawn(1, shape, seed=1, connectivity=6)[0],
        plan(blob(), index=3),
        drawn(2, shape, seed=8, lengths="mm", spacing=(2.0, 0.7, 0.9))[1],
        plan(index=4),  # no blob at all
        plan(voxel(7, (6, 20, 12)), seed=99, tau=0.25, mean_threshold=0.4),
    ]
    rng = np.random.default_rng(0)
    images = np.stack([(image * rng.uniform(0.5, 1)).astype(np.float32) for _ in plans])
    masks = np.stack([mask, mask[:, ::-1], mask, mask, mask[::-1]])
    agree(host(), plans, images, np.ascontiguousarray(masks))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 700), (2, 330, 3), (300, 4, 5), (3, 33, 65), (5, 31, 32), (7, 9, 129)]
)
def test_awkward_shapes(shape, plain) -> None:
    """One voxel; lines longer than a tile, along each axis; widths around words."""
    rng = np.random.default_rng(sum(shape))
    image = rng.random(shape, dtype=np.float32)
    mask = rng.random(shape) < 0.8
    mask.reshape(-1)[0] = True
    gpu = host(plain=plain)
    for index in range(2 if plain else 3):
        (one,) = drawn(1, shape, seed=index)
        wide = plan(
            blob(
                semi_axes=(400.0,) * 3,
                center=tuple(n // 2 for n in shape),
                sigma_a=3.0 + 15 * index,
                sigma_b=4.0,
            ),
            shape=shape,
            index=index,
        )
        agree(gpu, [one], image[None], mask[None])
        agree(gpu, [wide], image[None], mask[None])


@pytest.mark.parametrize("sigma", [0.1, 20.0, 33.0, 60.0, 100.0])
def test_lines_in_pieces(sigma) -> None:
    """Taps over a line of several tiles, matrices, and kernels that fit no tile."""
    shape = (2, 3, 700)
    image, mask = np.full((1, *shape), 0.1, np.float32), np.ones((1, *shape), bool)
    one = plan(
        blob(semi_axes=(900.0,) * 3, center=(1, 1, 350), sigma_a=sigma, sigma_b=sigma / 3), shape=shape
    )
    agree(host(), [one], image, mask)


def test_lesions_that_find_no_room(lungs, monkeypatch) -> None:
    """Fields for one lesion only: the others take their turn in one block, with the same bits."""
    image, mask = lungs
    monkeypatch.setattr("lesionsynth.cuda.render.LEAST_FIELD", 0)
    gpu = host()
    from lesionsynth.cuda.records import BATCH

    for crowded, one in ((2, plan(*sheets())), (1, plan(*sheets()[:2], index=5))):
        agree(gpu, [one], image[None], np.ones_like(mask)[None])
        header = gpu.workspace.buffers["table"].array[: BATCH.itemsize].view(BATCH)
        assert header["crowded"] == [crowded], "as many lesions as were meant to were without room"


def test_more_blobs_than_lanes(lungs) -> None:
    """Forty, a hundred and three hundred blobs: a warp holds 32 at a time, a block 256."""
    image, mask = lungs
    rng = np.random.default_rng(4)
    inside = np.argwhere(mask)
    for count in (40, 100, 300):
        centers = inside[rng.integers(len(inside), size=count)]
        axes = rng.uniform(0.4, 1.6, size=(count, 3))
        blobs = [
            blob(k, center=tuple(int(c) for c in center), semi_axes=tuple(map(float, s)), warp_amplitude=0.3)
            for k, (center, s) in enumerate(zip(centers, axes, strict=True))
        ]
        agree(host(), [plan(*blobs)], image[None], mask[None])


def test_surface_of_the_table_v_sphere() -> None:
    """Radius 12, any rotation: 30 voxels lie on the surface exactly, and belong to it."""
    n = np.arange(-14, 15)
    square = n[:, None, None] ** 2 + n[:, None] ** 2 + n**2
    mask, image = np.ones(square.shape, bool), np.zeros(square.shape, np.float32)
    rng, gpu = np.random.default_rng(0), host()
    for _ in range(4):
        turn = rng.standard_normal(4)
        turn = tuple(float(v) for v in turn / np.linalg.norm(turn))
        one = plan(blob(semi_axes=(12.0,) * 3, rotation=turn, center=(14, 14, 14)), shape=mask.shape)
        assert_array_equal(render(gpu, [one], image[None], mask[None]).labels[0], square <= 144)


@pytest.mark.parametrize("seed", range(12))
def test_extreme_shapes(seed) -> None:
    """Wild warps of needles and plates, in voxels of any form: no row is left out that has a voxel."""
    rng = np.random.default_rng(seed)
    shape = (24, 60, 100)
    blobs = []
    for k in range(4):
        turn = rng.standard_normal(4)
        blobs.append(
            blob(
                k,
                semi_axes=tuple(float(v) for v in np.exp(rng.uniform(np.log(0.8), np.log(15), 3))),
                rotation=tuple(float(v) for v in turn / np.linalg.norm(turn)),
                center=tuple(int(rng.integers(size)) for size in shape),
                warp_amplitude=float(rng.uniform(0, 3)),
                warp_correlation=float(rng.uniform(0.25, 1.5)),
            )
        )
    scale = tuple(float(v) for v in rng.uniform(0.4, 3, 3))
    one = plan(*blobs, shape=shape, scale=scale, index=seed, connectivity=(6, 18, 26)[seed % 3])
    agree(host(), [one], np.zeros((1, *shape), np.float32), np.ones((1, *shape), bool))


@pytest.mark.parametrize("shape", [(2, 4500, 3), (1, 257, 40), (3, 3000, 33)])
def test_centres_in_masks_of_many_rows(shape) -> None:
    """More rows than a block has threads: their share is found, then the row, then the voxel."""
    rng = np.random.default_rng(shape[1])
    for voxels in (1, 40, 2000):
        mask = np.zeros(shape, bool)
        mask.reshape(-1)[rng.choice(mask.size, voxels, replace=False)] = True
        positions = [0.0, 1.0 - 2.0**-53, *rng.random(30).tolist()]
        blobs = [blob(k, semi_axes=(0.5,) * 3, center=None, position=p) for k, p in enumerate(positions)]
        agree(host(), [plan(*blobs, shape=shape)], np.zeros((1, *shape), np.float32), mask[None])


def test_lattices_too_large_for_a_tile(lungs) -> None:
    """The displacement of many nodes is summed voxel by voxel, to the same bits."""
    image, mask = lungs
    one = plan(blob(semi_axes=(3.0, 9.0, 9.0), warp_amplitude=2.0, warp_correlation=0.1))
    agree(host(), [one], image[None], mask[None])


def test_merging_by_each_neighbourhood(lungs) -> None:
    """Two voxels, a face, an edge and a corner apart; the words' borders are at multiples of 32."""
    mask = np.ones((6, 8, 70), bool)
    image = np.full(mask.shape, 0.2, np.float32)
    gpu = host()
    for x in (5, 30, 31, 32, 33, 63):
        for step in (
            (0, 0, 1),
            (0, 1, 0),
            (1, 0, 0),
            (0, 1, 1),
            (1, 0, -1),
            (1, 1, 1),
            (1, -1, -1),
            (0, 0, 2),
        ):
            other = (2 + step[0], 3 + step[1], x + step[2])
            for connectivity in (6, 18, 26):
                one = plan(voxel(0, (2, 3, x)), voxel(1, other), shape=mask.shape, connectivity=connectivity)
                pair = render(gpu, [one], image[None], mask[None])
                touching = (
                    np.abs(step).max() <= 1 and np.abs(step).sum() <= {6: 1, 18: 2, 26: 3}[connectivity]
                )
                assert pair.labels.max() == (1 if touching else 2)


# --- inputs ---


@pytest.mark.parametrize("kind", ["float32", "float16", "float64", "int16"])
def test_image_types_and_layouts(kind, lungs) -> None:
    """Contiguous, transposed, cropped at odd offsets, mirrored: all read where they are."""
    image, mask = lungs
    values = (image * 900 - 800).round() if kind == "int16" else image
    (one,) = drawn(1, image.shape, seed=6)
    gpu = host()
    batch, masks = values.astype(kind)[None], mask[None]
    padded, wide = np.zeros((2, 14, 43, 51), kind), np.zeros((2, 14, 43, 51), bool)
    padded[1:, 1:13, 2:42, 3:47], wide[1:, 1:13, 2:42, 3:47] = batch, masks
    layouts = {
        "contiguous": (batch, masks),
        "fortran": (np.asfortranarray(batch), np.asfortranarray(masks)),
        "crop": (padded[1:, 1:13, 2:42, 3:47], wide[1:, 1:13, 2:42, 3:47]),
        "mirrored": (batch[..., ::-1].copy()[..., ::-1], masks[..., ::-1].copy()[..., ::-1]),
    }
    expected = renderer().render([one], batch, masks)
    for name, (images, lung) in layouts.items():
        before = images.copy()
        pair = render(gpu, [one], images, lung)
        assert_array_equal(pair.image, expected.image, err_msg=name)
        assert_array_equal(pair.target, expected.target, err_msg=name)
        assert_array_equal(images, before)
        assert pair.image.dtype == expected.image.dtype


def test_bfloat16(lungs) -> None:
    """Bits of torch's bfloat16, which NumPy lacks; τ is compared in it, and B rounded to it."""
    torch = pytest.importorskip("torch")
    image, mask = lungs
    (one,) = drawn(1, image.shape, seed=6)
    half = torch.from_numpy(image).to(torch.bfloat16)
    pair = render(host(), [one], half.view(torch.int16).numpy()[None], mask[None], kind="bfloat16")
    full = renderer().render([one], half.float().numpy()[None], mask[None])
    tau = torch.tensor(one.tau).to(torch.bfloat16)
    assert_array_equal(pair.labels, full.labels)
    assert_array_equal(pair.target[0], (half >= tau).numpy() & (pair.labels[0] == 0))
    expected = torch.from_numpy(full.image[0]).to(torch.bfloat16)
    assert_array_equal(
        torch.from_numpy(pair.image[0]).view(torch.bfloat16).float().numpy(), expected.float().numpy()
    )


@given(index=st.integers(0, 2**32 - 1), data=st.data())
@settings(max_examples=15)
def test_any_sample(index, data, lungs) -> None:
    """Any index, any volume that can hold lungs: the twin's pair."""
    shape = tuple(data.draw(st.integers(1, n), label="shape") for n in (9, 40, 70))
    rng = np.random.default_rng(index)
    image, mask = (
        rng.random(shape, dtype=np.float32),
        rng.random(shape) < data.draw(st.sampled_from([0.05, 0.9])),
    )
    mask[tuple(n // 2 for n in shape)] = True
    synth = ls.LesionSynthesizer(small_config(), seed=index)
    agree(host(), [synth.sample(index=index, shape=shape)], image[None], mask[None])


# --- what is found wrong, and when it is told ---


def wrong(lungs, **change):
    image, mask = (a.copy() for a in lungs)
    if "voxel" in change:
        image[0, 0, 0] = change["voxel"]
    if "mask" in change:
        mask = mask.view(np.uint8) * np.uint8(change["mask"])
    return image[None], mask[None]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"voxel": np.nan}, "image must be finite"),
        ({"voxel": np.inf}, "image must be finite"),
        ({"voxel": -0.01}, "image must be finite"),
        ({"voxel": 1.01}, "image must be finite"),
        ({"mask": 0}, "at least one voxel"),
        ({"mask": 2}, "binary"),
    ],
)
def test_bad_voxels_are_told(change, text, lungs) -> None:
    """With the plan or the labels, or by a later call; once."""
    (one,) = drawn(1, lungs[0].shape)
    gpu = host()
    for ask in ("components", "labels"):
        pair = render(gpu, [one], *wrong(lungs, **change))
        with pytest.raises(ValueError, match=rf"{text}.*samples 0"):
            getattr(pair, ask)
        with pytest.raises(ValueError, match=text):
            getattr(pair, ask)
        agree(gpu, [one], lungs[0][None], lungs[1][None])
    del pair
    render(gpu, [one], *wrong(lungs, **change))
    with pytest.raises(ValueError, match=rf"{text}.*samples 0.*earlier call"):
        render(gpu, [one], lungs[0][None], lungs[1][None])  # the host's slots are free at once
    agree(gpu, [one], lungs[0][None], lungs[1][None])


@pytest.mark.parametrize("width", [16, 33, 64])
def test_one_strange_voxel_of_a_mask(width) -> None:
    """In the words that are read sixteen bytes at once, and in those that are not."""
    gpu, shape = host(), (1, 2, width)
    image = np.zeros((1, *shape), np.float32)
    for x in (0, 15, width - 1):
        for value in (2, 128, 255):
            mask = np.ones((1, *shape), np.uint8)
            mask[0, 0, 1, x] = value
            pair = render(gpu, [plan(blob(center=(0, 0, 0)), shape=shape)], image, mask)
            with pytest.raises(ValueError, match="binary"):
                _ = pair.components


def test_b2_exactly_on_the_threshold(lungs) -> None:
    """Above 0.2 means above: a voxel whose b2 is the threshold itself does not count."""
    image, mask = np.zeros_like(lungs[0]), lungs[1]
    one = plan(blob(sigma_b=1.3))
    pair = renderer().render(one, image, mask)
    (component,) = pair.plan.components
    inside = pair.labels > 0
    # B = beta b2 where it is not clipped: candidates for b2 itself, of which some are exact.
    candidates = np.unique((pair.image[inside] / np.float32(component.beta)).astype(np.float32))
    exact = [float(t) for t in candidates if 0.1 < t < 0.9][::7][:40]
    means = set()
    for threshold in exact:
        again = plan(one.blobs[0], mean_threshold=threshold)
        agree(host(), [again], image[None], mask[None])
        means.add(renderer().render(again, image, mask).plan.components[0].beta)
    assert len(exact) >= 10
    assert len(means) > 1


def test_a_lattice_without_end(lungs) -> None:
    """The CPU refuses it before it draws; a device says so afterwards."""
    endless = plan(blob(semi_axes=(0.02,) * 3, warp_amplitude=900.0, warp_correlation=0.1))
    pair = render(host(), [endless], lungs[0][None], lungs[1][None])
    with pytest.raises(ValueError, match="lattice"):
        _ = pair.components


# --- steady state ---


def counters(device: HostDevice) -> tuple[int, ...]:
    return device.allocations, device.uploads, device.downloads, device.waits, len(device.launches)


def test_nothing_is_waited_for_in_steady_state(lungs) -> None:
    """One copy up, thirteen launches whatever the plans and the batch, the pair's memory, nothing down."""
    image, mask = lungs
    gpu = host()
    device = gpu.device
    counts = set()
    for size in (1, 3):
        plans = drawn(12, image.shape)
        images, masks = np.stack([image] * size), np.stack([mask] * size)
        for round_ in range(3):  # the first rounds find out how much is needed
            for k in range(0, 12, size):
                before = counters(device)
                render(gpu, plans[k : k + size], images, masks)
                gained = tuple(b - a for a, b in zip(before, counters(device), strict=True))
                if round_ == 2:
                    assert gained[:4] == (1, 1, 0, 0)
                    counts.add(gained[4])
    assert counts == {13}


def test_no_blobs_take_two_launches(lungs) -> None:
    gpu = host()
    pair = render(gpu, [plan()], lungs[0][None], lungs[1][None])
    assert gpu.device.launches == ["read_mask", "copy_pair"]
    assert pair.components == ((),)
    assert pair.labels.max() == 0


def test_pairs_outlive_the_workspace(lungs) -> None:
    """Whoever keeps pairs finds their plans and labels right, whatever came after, `release` too."""
    image, mask = lungs
    gpu, plans = host(), drawn(2 * MOST_SLOTS + 2, image.shape)
    pairs = [render(gpu, [one], image[None], mask[None]) for one in plans]
    for _ in range(2):
        for one, pair in zip(plans, pairs, strict=True):
            expected = renderer().render([one], image[None], mask[None])
            for _ in range(2):
                assert_array_equal(pair.labels, expected.labels)
                assert list(pair.components) == [expected.plan[0].components]
        gpu.release()
    del pairs, pair
    gc.collect()
    agree(gpu, plans[:2], np.stack([image] * 2), np.stack([mask] * 2))


def test_a_pair_goes_when_nobody_holds_it(lungs) -> None:
    """At once and with its memory: nothing holds it in a circle, or behind its back."""
    gpu, gone = host(), []
    one = plan(*sheets())
    pair = render(gpu, [one], lungs[0][None], lungs[1][None])
    for held in (pair.lesions, pair.lesions._copied):
        weakref.finalize(held, gone.append, type(held).__name__)
    gc.disable()
    try:
        del pair, held
        assert sorted(gone) == ["DeviceLesions", "HostBuffer"]
    finally:
        gc.enable()


def test_a_pair_knows_neither_the_renderer_nor_the_workspace() -> None:
    """Not even for the type checker: of both modules, the findings alone."""
    from lesionsynth.cuda import pair

    tree = ast.parse(Path(pair.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{one.name}" for node in imports for one in node.names}
    assert not [name for name in names if "render" in name]
    assert [name for name in names if "workspace" in name] == ["lesionsynth.cuda.workspace.Findings"]


def test_the_workspace_is_bounded_and_told(lungs) -> None:
    """Scratch of a batch: two fields of a volume for eight items, bits, and what the plans need."""
    gpu = host()
    shape = (32, 128, 128)
    image, mask = np.zeros((8, *shape), np.float32), np.ones((8, *shape), bool)
    render(gpu, drawn(8, shape), image, mask)
    report = gpu.workspace.report()
    assert report["field0"] == report["field1"] <= 4 * 2**20 * 1.5
    assert sum(report.values()) < 2 * report["field0"] + image.nbytes


def test_repeatable_bit_for_bit(lungs) -> None:
    image, mask = lungs
    plans = drawn(3, image.shape)
    images, masks = np.stack([image] * 3), np.stack([mask] * 3)
    first = render(host(), plans, images, masks)
    for options in ORDERS[1:]:
        again = render(host(**options), plans, images, masks)
        assert first.image.tobytes() == again.image.tobytes()
        assert first.target.tobytes() == again.target.tobytes()
