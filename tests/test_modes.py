"""How lesions enter the image, what they change there, and where they lie: the CPU twin and the oracle."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import ndimage, stats

import lesionsynth as ls
from lesionsynth.config import MODES, PLACEMENTS, SOFT_MODES
from lesionsynth.cpu import inject, place
from lesionsynth.cpu.backend import CpuStages
from lesionsynth.cpu.engine.simd import number_of, pixel_of
from tests import oracles
from tests.conftest import draw_lungs
from tests.plans import SHAPE, blob, plan, renderer, small_config, voxel
from tests.test_generator_oracle import agree
from tests.tolerances import IMAGE, KS_LEVEL, RANGE

RANGES = ((0.0, 1.0), (-3.1, 5.3), (-1024.0, 600.0), (0.0, 255.0))
KINDS = (np.float32, np.float64, np.float16)

BLOBS = {
    "two": plan(
        blob(0, semi_axes=(4.0, 7.0, 5.0), warp_amplitude=0.6, weight=0.7),
        blob(1, center=(6, 20, 33), mu0=0.4),
    ),
    "merged, at the border": plan(
        blob(0, center=(0, 20, 9), semi_axes=(5.0, 5.0, 9.0), warp_amplitude=0.8, weight=0.3),
        blob(1, center=(2, 22, 12), mu0=0.9),
        blob(2, center=(11, 20, 35)),
    ),
    "in mm": plan(
        blob(0, semi_axes=(9.0, 7.0, 8.0), weight=0.9),
        blob(1, center=(6, 20, 33), semi_axes=(6.0, 3.0, 3.0)),
        scale=(2.5, 0.7, 0.9),
    ),
    "nearly everything": plan(blob(0, semi_axes=(30.0, 60.0, 60.0), weight=0.5)),
    "voxels": plan(voxel(0, (6, 20, 12), a_low=1.0, a_high=1.0), voxel(1, (6, 20, 30), weight=0.25)),
}


def bright(kind: Any = np.float32, value_range: tuple[float, float] = (0.0, 1.0)) -> tuple[Any, Any]:
    """Voxels of every brightness, in the lungs and out of them, some of them 0 and some 1."""
    _, mask = draw_lungs()
    noise = np.random.default_rng(3).uniform(-0.05, 1.05, SHAPE).clip(0, 1)
    low, high = (np.float64(np.float32(bound)) for bound in value_range)
    image = (noise * (high - low) + low).astype(kind)
    zero = kind(0)  # bounds are float32, and float16 may round them outwards
    image = np.where(image.astype(np.float64) < low, np.nextafter(image, zero), image)
    return np.where(image.astype(np.float64) > high, np.nextafter(image, zero), image), mask


def signed(drawn: ls.LesionPlan, sign: float) -> ls.LesionPlan:
    """The same with all weights times `sign`."""
    return replace(drawn, blobs=tuple(replace(b, weight=sign * b.weight) for b in drawn.blobs))


def in_mode(name: str, mode: str, **changes: Any) -> ls.LesionPlan:
    """A plan of `BLOBS` in a mode, with a soft edge where there may be one."""
    edge = {"edge": 2.5} if mode in SOFT_MODES else {}
    return replace(BLOBS[name], mode=mode, **(edge | changes))


def check_changed(pair: ls.LesionPair, healthy: Any) -> None:
    """Compare what is recorded with what differs."""
    differs = np.asarray(pair.image) != healthy
    for component in pair.plan.components:
        assert component.changed == np.count_nonzero(differs[pair.labels == component.label])


# --- against the oracle ---


@pytest.mark.parametrize("name", BLOBS)
@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_pair(name, value_range, mode, kind) -> None:
    """Every mode, range and type; the lesions, the target and what has changed."""
    image, mask = bright(kind, value_range)
    drawn = in_mode(name, mode, value_range=value_range)
    for one in (drawn, signed(drawn, -1.0)) if mode == "add" else (drawn,):
        pair, _ = agree(one, image, mask)
        check_changed(pair, image)
        assert pair.image.dtype == image.dtype
        if name != "voxels":
            assert sum(c.changed for c in pair.plan.components) > 0


@pytest.mark.parametrize("mode", MODES)
def test_pair_of_hounsfield_units(mode) -> None:
    """int16 is windowed first; what has changed is told from that."""
    image, mask = bright(np.float32)
    hu = np.rint(image * 900 - 800).astype(np.int16)
    healthy = ls.window_hu(hu)
    pair = renderer().render(in_mode("two", mode), hu, mask)
    same = renderer().render(in_mode("two", mode), healthy, mask)
    assert_array_equal(pair.image, same.image)
    assert pair.plan == same.plan
    check_changed(pair, healthy)


@pytest.mark.parametrize("edge", [0.3, 1.0, 4.0, 40.0])
@pytest.mark.parametrize("name", BLOBS)
def test_soft_edge(edge, name) -> None:
    """Edges of less than a voxel and beyond the lesion's middle; the volume's border is none."""
    image, mask = bright()
    agree(in_mode(name, "blend", edge=edge), image, mask)


def test_soft_edge_of_a_lesion_that_fills_the_volume() -> None:
    """There is no way out of it."""
    image, mask = bright()[0], np.ones(SHAPE, bool)
    drawn = replace(plan(blob(semi_axes=(60.0,) * 3)), mode="blend")
    hard, soft = (renderer().render(replace(drawn, edge=e), image, mask) for e in (0.0, 9.0))
    assert (hard.labels == 1).all()
    assert_array_equal(hard.image, soft.image)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads) -> None:
    image, mask = draw_lungs((14, 90, 90), seed=2)
    drawn = replace(plan(*(blob(k, center=(7, 12 + 9 * k, 24)) for k in range(8)), shape=None), mode="add")
    pair = renderer(threads=threads).render(replace(drawn, edge=3.0), image, mask)
    alone = renderer(threads=1).render(replace(drawn, edge=3.0), image, mask)
    assert pair.plan == alone.plan
    assert_array_equal(pair.image, alone.image)


def test_the_kernels_know_every_mode_and_placement() -> None:
    """They have numbers of their own for the tuples of `config`."""
    numbers = inject.MAX, inject.MIN, inject.ADD, inject.BLEND
    assert [MODES[n] for n in numbers] == ["max", "min", "add", "blend"]
    assert len(MODES) == len(numbers)
    assert (PLACEMENTS[place.SURFACE], PLACEMENTS[place.DEPTH]) == ("surface", "depth")


# --- bit by bit ---

F32 = np.float32


def exact_edge(drawn: ls.LesionPlan, lesion: Any) -> Any:
    """The edge in float32 by its definition: over every offset that could count."""
    edge, steps = F32(drawn.edge), [F32(s) for s in drawn.scale]
    if edge == 0:
        return np.ones(lesion.shape, F32)
    reach = [int(drawn.edge / s) + 1 for s in drawn.scale]
    out = np.pad(~lesion, [(r, r) for r in reach])  # beyond the volume there is nothing
    least = np.full(lesion.shape, np.inf, F32)
    for offset in np.ndindex(*(2 * r + 1 for r in reach)):
        z, y, x = ((F32(abs(k - r)) * s) ** 2 for k, r, s in zip(offset, reach, steps, strict=True))
        there = out[tuple(slice(k, k + n) for k, n in zip(offset, lesion.shape, strict=True))]
        least[there] = np.minimum(least[there], z + (y + x))
    return np.minimum(F32(1), np.sqrt(least) / edge)


def exact_image(drawn: ls.LesionPlan, image: Any, mask: Any) -> Any:
    """A from H and B, operation by operation; B comes from the same lesions in an empty image."""
    plain = replace(drawn, mode="max", edge=0.0, value_range=(0.0, 1.0))
    pair = renderer().render(plain, np.zeros_like(image, dtype=F32), mask)
    low = F32(drawn.value_range[0])
    ends = [
        [np.asarray(bound, kind).astype(float) for kind in (image.dtype, F32)] for bound in drawn.value_range
    ]
    least, most = min(ends[0]), max(ends[1])
    span, real = F32(drawn.value_range[1] - drawn.value_range[0]), np.result_type(image, F32).type
    out = image.copy()
    for component in pair.plan.components:
        lesion = pair.labels == component.label
        b, h = pair.image[lesion], image[lesion].astype(real)
        share = F32(drawn.blobs[component.blobs[0]].weight) * exact_edge(drawn, lesion)[lesion]
        v = (F32(1) - b if drawn.mode == "min" else b) * span + low
        if drawn.mode in ("max", "min"):
            v = np.clip(v.astype(real), real(least), real(most)).astype(image.dtype)
            a = np.where(v > h if drawn.mode == "max" else v < h, v, image[lesion])
        elif drawn.mode == "add":
            a = np.clip(h + (share * b * span).astype(real), real(least), real(most))
        else:
            a = np.clip(h + share.astype(real) * (v.astype(real) - h), real(least), real(most))
        assert a.dtype in (real, image.dtype)
        out[lesion] = a
    return out


@pytest.mark.parametrize("name", BLOBS)
@pytest.mark.parametrize("bounds", RANGES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits(name, bounds, mode, kind) -> None:
    """What another device has to compute too: types, order and rounding of every operation."""
    image, mask = bright(kind, bounds)
    for edge in (0.0, 2.5, 3.7) if mode in SOFT_MODES and kind == F32 else (0.0,):
        drawn = in_mode(name, mode, value_range=bounds, edge=edge)
        assert_array_equal(renderer().render(drawn, image, mask).image, exact_image(drawn, image, mask))


# --- laws ---

SEEDS = st.integers(0, 2**32 - 1)


@given(seed=SEEDS, mode=st.sampled_from(MODES), kind=st.sampled_from(KINDS), bounds=st.sampled_from(RANGES))
def test_laws(seed, mode, kind, bounds) -> None:
    """What holds of any pair, voxel by voxel."""
    image, mask = bright(kind, bounds)
    drawn = ls.LesionSynthesizer(small_config(count=(1.0, 6.0)), seed=seed).sample(index=0, shape=SHAPE)
    edge = 2.0 if mode in SOFT_MODES else 0.0
    drawn = replace(drawn, mode=mode, value_range=bounds, edge=edge)
    pair = renderer().render(drawn, image, mask)
    lesions = pair.labels > 0
    assert lesions.any()
    assert_array_equal(pair.image[~lesions], image[~lesions])
    assert_array_equal(pair.target, (image >= np.asarray(drawn.threshold, kind)) & ~lesions)
    low, high = np.array(bounds, np.float32).astype(kind)
    assert ((pair.image >= low) & (pair.image <= high)).all()
    check_changed(pair, image)
    if mode in ("max", "add"):
        assert (pair.image >= image).all()
    if mode == "min":
        assert (pair.image <= image).all()
    if mode == "add":
        assert (renderer().render(signed(drawn, -1.0), image, mask).image <= image).all()


@given(seed=SEEDS, kind=st.sampled_from(KINDS), weight=st.floats(0.0, 1.0))
def test_a_blend_lies_between_the_image_and_the_lesion(seed, kind, weight) -> None:
    """The whole lesion, of weight 1 and without an edge, is the other end."""
    image, mask = bright(kind)
    drawn = ls.LesionSynthesizer(small_config(count=(1.0, 6.0)), seed=seed).sample(index=0, shape=SHAPE)
    drawn = replace(drawn, mode="blend")
    whole = renderer().render(drawn, image, mask).image
    soft = replace(drawn, edge=1.7, blobs=tuple(replace(b, weight=weight) for b in drawn.blobs))
    mixed = renderer().render(soft, image, mask).image.astype(np.float64)
    error = 2.0**-11 if kind == np.float16 else 2.0**-23
    assert (mixed >= np.minimum(whole, image).astype(np.float64) - error).all()
    assert (mixed <= np.maximum(whole, image).astype(np.float64) + error).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", RANGES[1:])
def test_another_range_is_another_unit(mode, bounds) -> None:
    """An image in another unit gives the pair in that unit."""
    image, mask = bright(np.float64)
    low, high = bounds
    other = np.clip(image * (high - low) + low, *np.array(bounds, np.float32).astype(np.float64))
    pair = renderer().render(in_mode("two", mode), image, mask)
    scaled = renderer().render(in_mode("two", mode, value_range=bounds), other, mask)
    assert_array_equal(scaled.labels, pair.labels)
    error = IMAGE * (high - low) + RANGE * max(abs(low), abs(high))
    assert np.abs(scaled.image - (pair.image * (high - low) + low)).max() <= error


@pytest.mark.parametrize("mode", SOFT_MODES)
@pytest.mark.parametrize("tiny", [1e-300, 1e-9, 0.5, 1.0])
def test_an_edge_of_up_to_a_voxel_is_none(mode, tiny) -> None:
    """The first voxel of a lesion is a voxel deep."""
    image, mask = bright()
    hard, soft = (renderer().render(in_mode("two", mode, edge=e), image, mask) for e in (0.0, tiny))
    assert_array_equal(hard.image, soft.image)


def test_a_wider_edge_takes_more() -> None:
    """An addition to an image that has room for it shrinks with the edge, everywhere."""
    image, mask = np.zeros(SHAPE, np.float32), bright()[1]
    added = [
        renderer().render(in_mode("two", "add", edge=e), image, mask).image for e in (0.0, 1.5, 2.0, 3.0, 9.0)
    ]
    for less, more in pairwise(added):
        assert (more <= less).all()
        assert (more < less).any()


# --- what is refused ---


def test_hounsfield_units_have_no_other_range() -> None:
    drawn = in_mode("two", "max", value_range=(-3.0, 5.0))
    with pytest.raises(TypeError, match="image must be float where a plan has a value_range, got int16"):
        renderer().render(drawn, np.zeros(SHAPE, np.int16), bright()[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strange", [-3.2, 5.2, 1e30, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0, 0), (5, 17, 21), (11, 39, 43)])
def test_a_voxel_out_of_range(kind, strange, at) -> None:
    image, mask = bright(kind, (-3.0, 5.0))
    image[at] = (
        np.asarray(strange, np.float64).astype(kind) if abs(strange) < 1e4 else np.sign(strange) * np.inf
    )
    what = r"in \[-3, 5\], got values from" if np.isfinite(image[at]) else "finite, got"
    for view in (image, np.asfortranarray(image)):
        with pytest.raises(ValueError, match=f"image must be {what}"):
            renderer().render(in_mode("two", "max", value_range=(-3.0, 5.0)), view, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_the_range_are_in_it(kind) -> None:
    """So is -0.0 where 0 is."""
    image, mask = bright(kind)
    image[0, 0, :3] = -0.0, 0.0, 1.0
    for mode in MODES:
        assert_array_equal(renderer().render(in_mode("two", mode), image, mask).image[0, 0, :3], [0, 0, 1])


@numba.njit
def round_trip(numbers, out, back):
    for k in range(numbers.size):
        out[k] = pixel_of(numbers[k], out[k])
        back[k] = number_of(out[k])


def test_half_precision_rounds_to_nearest_over_its_whole_range() -> None:
    """Numbers below the normal ones, ties, both signs, and what rounds to infinity."""
    rng = np.random.default_rng(0)
    halves = np.arange(-(2**15), 2**15).astype(np.int16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    ties = (halves.astype(np.float32)[1:] + halves.astype(np.float32)[:-1]) / 2
    near = np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))
    every = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    numbers = np.concatenate([halves.astype(np.float32), ties, *near, every[np.isfinite(every)]])
    out = np.empty(numbers.size, np.int16)
    back = np.empty(numbers.size, np.float32)
    round_trip(numbers, out, back)
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16)
    assert_array_equal(out.view(np.float16), expected)
    finite = np.isfinite(expected)
    assert_array_equal(back[finite], expected[finite].astype(np.float32))
    assert np.isnan(back[~finite]).all()  # what is no number, or none of the image's


# --- places ---


def ragged(seed: int, shape: tuple[int, int, int] = (3, 17, 70), density: float = 0.7) -> Any:
    return np.random.default_rng(seed).random(shape) < density


def centres(drawn: ls.LesionPlan, mask: Any) -> Any:
    return CpuStages(1).place(drawn, mask)[1][1]


def placed(kind: str, count: int, seed: int = 0) -> ls.LesionPlan:
    """A plan of voxels, by position."""
    positions = np.random.default_rng(seed).random(count).tolist()
    blobs = [voxel(k, (0, 0, 0), placement=kind, position=u) for k, u in enumerate(positions)]
    return plan(*(replace(b, center=None) for b in blobs), shape=None)


@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize("density", [0.02, 0.6, 0.97, 1.0])
@given(seed=SEEDS, shape=st.tuples(*(st.integers(1, n) for n in (3, 12, 140))))
def test_place(kind, density, seed, shape) -> None:
    """Every blob where plain loops put it: single voxels, borders, and masks without an end inside."""
    mask = ragged(seed, shape, density)
    mask[tuple(n // 2 for n in shape)] = True
    drawn = placed(kind, 60, seed)
    drawn = replace(drawn, blobs=(*drawn.blobs, replace(drawn.blobs[0], position=1 - 2**-53)))
    assert_array_equal(centres(drawn, mask), [oracles.blob_centre(b, mask) for b in drawn.blobs])


def test_a_given_centre_counts_more_than_a_placement() -> None:
    for kind in PLACEMENTS:
        given_one = plan(voxel(0, (1, 4, 9), placement=kind), shape=None)
        assert_array_equal(centres(given_one, ragged(0)), [(1, 4, 9)])


def test_surface_and_depth_are_what_they_say(lungs) -> None:
    """On the border within the slice; and farther from it than voxels drawn alike."""
    _, mask = lungs
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)), mode="edge")  # the volume's end is no border
    core = padded[:, 2:, 1:-1] & padded[:, :-2, 1:-1] & padded[:, 1:-1, 2:] & padded[:, 1:-1, :-2]
    found = {kind: tuple(centres(placed(kind, 1000), mask).T) for kind in PLACEMENTS}
    assert mask[found["surface"]].all()
    assert not core[found["surface"]].any()
    assert core[found["uniform"]].mean() > 0.5
    depth = np.stack([ndimage.distance_transform_edt(plane) for plane in mask])
    shallow, deep = depth[found["uniform"]], depth[found["depth"]]
    assert stats.ks_2samp(deep, shallow, alternative="less").pvalue < KS_LEVEL
    assert deep.mean() > shallow.mean() + 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["float32", "float64", "float16"])
@pytest.mark.parametrize("bounds", [(0.1, 0.9), (-0.3, 0.7), (-3.0, 5.1), (1000.3, 1007.7)])
def test_nothing_leaves_the_range_of_the_image_s_type(bounds, kind, mode) -> None:
    """The ends are taken, as the type and as float32 has them; what comes out is taken again."""
    low, high = (np.asarray(bound, dtype=kind) for bound in bounds)
    image = np.where(np.indices(SHAPE).sum(axis=0) % 3 == 0, low, high).astype(kind)
    image[0] = np.where(image[0] == low, np.float32(bounds[0]), np.float32(bounds[1])).astype(kind)
    bright = blob(mu0=1.0, a_low=0.8, a_high=1.0)
    faint = blob(1, center=(6, 20, 30), semi_axes=(5.0, 5.0, 5.0), mu0=0.3)
    drawn = plan(bright, faint, mode=mode, value_range=bounds)
    mask = np.ones(SHAPE, dtype=bool)
    pair = renderer().render(drawn, image, mask)
    assert np.float32(low) == np.float32(pair.image.min())
    assert np.float32(pair.image.max()) == np.float32(high)
    renderer().render(drawn, pair.image, mask)


def test_a_half_that_cannot_hold_the_range_is_refused() -> None:
    image, mask = np.full(SHAPE, 1.0, np.float16), np.ones(SHAPE, dtype=bool)
    with pytest.raises(
        TypeError, match=r"image must be float32 or float64 for value_range \(0\.0, 70000\.0\)"
    ):
        renderer().render(plan(blob(), value_range=(0.0, 7e4)), image, mask)
