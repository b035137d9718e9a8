"""The invariants of DESIGN.md section 2, and the same bits however a pair is asked for."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import ndimage

import lesionsynth as ls
from lesionsynth._dlpack import accept
from tests import oracles
from tests.conftest import REPOSITORY, draw_lungs
from tests.plans import SHAPE, blob, plan, renderer, small_config, voxel

WORD = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 26), st.integers(1, 26))
RANK = {6: 1, 18: 2, 26: 3}


@cache
def synthesizer(connectivity: int = 26, seed: int = 3) -> ls.LesionSynthesizer:
    """Return the small configuration, one object for all examples."""
    return ls.LesionSynthesizer(small_config(connectivity=connectivity), seed=seed)


def any_lungs(
    shape: tuple[int, int, int], seed: int, dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Return a rough image and a ragged mask, at least one voxel of which is set."""
    rng = np.random.default_rng(seed)
    mask = ndimage.uniform_filter(rng.random(shape), 3) < rng.uniform(0.4, 0.7)
    mask.flat[rng.integers(mask.size)] = True
    image = np.clip(rng.random(shape) * 1.6 - 0.3, 0, 1).astype(dtype)
    image[~mask & (rng.random(shape) < 0.5)] = 0  # bright voxels outside the lung must survive as well
    return image, mask


def same(a: Any, b: Any) -> None:
    """Fail unless two pairs are equal in every bit, and so are their plans."""
    for name in ("image", "target", "labels"):
        left, right = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        assert left.dtype == right.dtype
        assert_array_equal(left, right)
    assert a.plan == b.plan


def digest(pair: ls.LesionPair) -> str:
    """Hash the bytes of a pair and its plan."""
    parts = [np.ascontiguousarray(x).tobytes() for x in (pair.image, pair.target, pair.labels)]
    return hashlib.sha256(b"".join(parts) + pair.plan.to_json().encode()).hexdigest()


# --- invariants ---


@given(
    shape=SHAPES,
    seed=st.integers(0, 2**20),
    index=WORD,
    share=st.floats(0.01, 1.0),
    connectivity=st.sampled_from([6, 18, 26]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_invariants(shape, seed, index, share, connectivity, dtype) -> None:
    """Everything DESIGN.md section 2 says of A, GT, G and the labels, for any mask and image."""
    image, mask = any_lungs(shape, seed, dtype)
    before = image.copy(), mask.copy()
    image.setflags(write=False)
    mask.setflags(write=False)
    pair = synthesizer(connectivity)(image, mask, index=index, lung_fraction=share)
    lesions = pair.labels > 0

    assert_array_equal(image, before[0])
    assert_array_equal(mask, before[1])
    assert pair.image.dtype == dtype
    assert pair.target.dtype == bool
    assert pair.labels.dtype == np.int32
    assert pair.image.shape == pair.target.shape == pair.labels.shape == shape

    assert_array_equal(pair.image[~lesions], image[~lesions])
    assert (pair.image >= image).all()
    assert (pair.image <= 1).all()
    assert_array_equal(pair.target, (image >= dtype(1 / 3)) & ~lesions)
    assert not (lesions & ~mask).any()

    found = np.unique(pair.labels[lesions])
    assert_array_equal(found, np.arange(1, len(found) + 1))
    structure = ndimage.generate_binary_structure(3, RANK[connectivity])
    nearest = ndimage.maximum_filter(pair.labels, footprint=structure)
    farthest = ndimage.minimum_filter(np.where(lesions, pair.labels, len(found) + 1), footprint=structure)
    # Around a lesion voxel no label but its own: neither a greater nor, background aside, a smaller one.
    assert_array_equal(nearest[lesions], pair.labels[lesions])
    assert_array_equal(farthest[lesions], pair.labels[lesions])

    members = [k for c in pair.plan.components for k in c.blobs]
    assert len(members) == len(set(members))
    assert set(members) <= set(range(len(pair.plan.blobs)))
    first = [c.blobs[0] for c in pair.plan.components]
    assert first == sorted(first)
    assert all(list(c.blobs) == sorted(c.blobs) for c in pair.plan.components)
    assert [c.label for c in pair.plan.components] == list(found)


@pytest.mark.parametrize("tau", [1 / 3, 0.6, 0.7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tissue_on_the_threshold_is_tissue(tau, dtype) -> None:
    """H = τ in the image's dtype counts, the next number below does not; float32(0.7) is below 0.7."""
    _, mask = draw_lungs()
    far = plan(voxel(0, (6, 20, 12)), tau=tau)
    level = dtype(tau)
    for value, tissue in ((level, True), (np.nextafter(level, dtype(0)), False)):
        pair = renderer().render(far, np.full(SHAPE, value, dtype), mask)
        assert_array_equal(pair.target, (pair.labels == 0) & tissue)


def test_nothing_aliases_the_input(lungs) -> None:
    """Results are new arrays, also where there is no lesion to write."""
    image, mask = lungs[0].copy(), lungs[1].copy()
    for drawn in (plan(), plan(blob())):
        pair = renderer().render(drawn, image, mask)
        for result in (pair.image, pair.target, pair.labels):
            assert not np.shares_memory(result, image)
            assert not np.shares_memory(result, mask)
            assert result.flags.writeable


# --- the same pair, however it is asked for ---


@given(indices=st.lists(WORD, min_size=3, max_size=3), order=st.permutations(range(3)))
def test_batch_equals_items_in_any_order(indices, order, lung_batch) -> None:
    """A batch is its items; their order, their place in it and what else is in it change nothing."""
    images, masks = lung_batch
    shares = [1.0, 0.5, 0.2]
    order = list(order)
    batch = synthesizer()(
        images[order],
        masks[order],
        index=[indices[i] for i in order],
        lung_fraction=[shares[i] for i in order],
    )
    assert isinstance(batch.plan, tuple)
    for place, i in enumerate(order):
        alone = synthesizer()(images[i], masks[i], index=indices[i], lung_fraction=shares[i])
        names = ("image", "target", "labels", "plan")
        item = SimpleNamespace(**{name: getattr(batch, name)[place] for name in names})
        same(item, alone)


def test_one_fraction_serves_a_batch(lung_batch) -> None:
    """A single λ is everybody's."""
    images, masks = lung_batch
    one = synthesizer()(images, masks, index=[4, 5, 6], lung_fraction=0.5)
    each = synthesizer()(images, masks, index=np.array([4, 5, 6]), lung_fraction=[0.5] * 3)
    same(one, each)


def test_equal_items_with_equal_indices_are_equal(lungs) -> None:
    """The place in a batch is no source of randomness; the index is."""
    images, masks = (np.stack([a, a, a]) for a in lungs)
    pair = synthesizer()(images, masks, index=[8, 8, 9])
    assert_array_equal(pair.image[0], pair.image[1])
    assert not np.array_equal(pair.image[0], pair.image[2])


@given(index=WORD, share=st.floats(0.01, 1.0))
def test_replay_from_json(index, share, lungs) -> None:
    """Sampling, writing, reading and rendering give what a call gives; so does a rendered plan."""
    image, mask = lungs
    pair = synthesizer()(image, mask, index=index, lung_fraction=share)
    drawn = synthesizer().sample(index=index, lung_fraction=share, shape=image.shape)
    read = ls.LesionPlan.from_json(drawn.to_json())
    assert read == drawn
    same(synthesizer().render(read, image, mask), pair)
    again = ls.LesionPlan.from_json(pair.plan.to_json(indent=None))
    assert again == pair.plan
    # The plan says it all: a synthesizer of another seed and configuration renders the same.
    other = ls.LesionSynthesizer(ls.presets.no_shapes(), seed=99)
    same(other.render(again, image, mask), pair)


@given(seed=WORD, index=WORD, share=st.floats(0.01, 1.0), position=st.floats(0, 1, exclude_max=True))
def test_json_keeps_every_bit(seed, index, share, position) -> None:
    """Words of 32 bits, doubles of 17 digits, a centre or none."""
    drawn = ls.LesionSynthesizer(small_config(), seed=seed).sample(index=index, lung_fraction=share)
    edited = replace(drawn, blobs=(blob(1), blob(2, center=None, position=position), *drawn.blobs))
    for p in (drawn, edited, replace(edited, shape=SHAPE)):
        for indent in (None, 2):
            assert ls.LesionPlan.from_json(p.to_json(indent=indent)) == p


def test_calls_leave_no_trace(lungs) -> None:
    """Neither the calls before, nor the global generators, nor the synthesizer object matter."""
    image, mask = lungs
    expected = digest(synthesizer()(image, mask, index=5))
    for index in (9, 1, 5):
        last = synthesizer()(image, mask, index=index)
    assert digest(last) == expected
    assert digest(ls.LesionSynthesizer(small_config(), seed=3)(image, mask, index=5)) == expected


def test_global_generators_are_neither_used_nor_moved(lungs) -> None:
    """Seeding NumPy and Python changes no pair, and a pair does not advance them."""
    digests, following = set(), []
    for seed, index in ((0, 5), (1, 5), (1, 6)):
        np.random.seed(seed)  # noqa: NPY002 - the global generator is what is being watched
        random.seed(seed)
        pair = synthesizer()(*lungs, index=index)
        digests |= {digest(pair)} if index == 5 else set()
        following.append((np.random.random(), random.random()))  # noqa: NPY002
    assert len(digests) == 1
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    assert following[1] == following[2] == (np.random.random(), random.random())  # noqa: NPY002


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_threads_change_nothing(threads, lung_batch) -> None:
    """Any split of the work gives the same bits."""
    images, masks = lung_batch
    expected = ls.LesionSynthesizer(small_config(), seed=3, threads=1)(images, masks, index=[1, 2, 3])
    same(
        ls.LesionSynthesizer(small_config(), seed=3, threads=threads)(images, masks, index=[1, 2, 3]),
        expected,
    )


ELSEWHERE = """
import lesionsynth as ls
from tests.conftest import draw_lungs
from tests.plans import small_config
from tests.test_generator_properties import digest
image, mask = draw_lungs()
synth = ls.LesionSynthesizer(small_config(), seed=3)
for index in {indices}:
    print(index, digest(synth(image, mask, index=index)))
"""


@pytest.mark.parametrize(("hash_seed", "threads", "indices"), [("0", "1", (7, 8)), ("4242", "4", (8, 7))])
def test_other_process(hash_seed, threads, indices, lungs) -> None:
    """Another interpreter with another hash seed and thread count gives the same bytes."""
    environment = os.environ | {
        "PYTHONHASHSEED": hash_seed,
        "NUMBA_NUM_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": str(REPOSITORY),
    }
    code = ELSEWHERE.format(indices=indices)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    here = {str(i): digest(synthesizer()(*lungs, index=i)) for i in indices}
    assert dict(line.split() for line in done.stdout.splitlines()) == here


@given(seed=WORD, index=WORD)
def test_sampled_numbers_are_fixed_words(seed, index) -> None:
    """Number j of blob k is 53 bits of Philox words 2j, 2j + 1: counters (block, 0, index, k), stream 0.

    Number 6 is the position, 0 the first semi-axis: no release can change what (seed, index) means unnoticed.
    """
    blobs = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=seed).sample(index=index).blobs
    for k in (0, len(blobs) - 1):
        block = [int(w) for w in oracles.philox4x32_10((3, 0, index, k), (seed, 0))]
        assert blobs[k].position == ((block[0] >> 5) * 2**26 + (block[1] >> 6)) / 2**53
    block = [int(w) for w in oracles.philox4x32_10((0, 0, index, 0), (seed, 0))]
    assert blobs[0].semi_axes[0] == 3 + 7 * (((block[0] >> 5) * 2**26 + (block[1] >> 6)) / 2**53)


GOLDEN_VOXELS = [144, 147]
GOLDEN_LABELS = "d165e985adae4b28"
"""From `oracles.oracle_render`, not from the implementation."""


def test_golden_labels(lungs) -> None:
    """The bits are part of the contract: a change of this hash is a change of every user's training data.

    Labels only: they come from float64 comparisons and integers, and so from no library's rounding.
    """
    image, mask = lungs
    pair = renderer().render(
        plan(blob(0, warp_amplitude=0.8), blob(1, center=None, position=0.75)), image, mask
    )
    assert [c.voxels for c in pair.plan.components] == GOLDEN_VOXELS
    assert (
        hashlib.sha256(np.ascontiguousarray(pair.labels, "<i4").tobytes()).hexdigest()[:16] == GOLDEN_LABELS
    )


# --- kinds of arrays ---


def test_float64_and_float32_agree(lungs) -> None:
    """The same lesions in both; B itself is float32, so A differs only where H does."""
    image, mask = lungs
    single = synthesizer()(image, mask, index=3)
    double = synthesizer()(image.astype(np.float64), mask, index=3)
    assert double.image.dtype == np.float64
    assert_array_equal(double.labels, single.labels)
    assert_array_equal(double.image.astype(np.float32), single.image)


def test_float64_keeps_bits_that_float32_lacks() -> None:
    """A float64 image is not sent through float32 on its way."""
    _, mask = draw_lungs()
    image = np.random.default_rng(0).random(SHAPE)
    pair = synthesizer()(image, mask, index=3)
    outside = pair.labels == 0
    assert (image.astype(np.float32) != image).mean() > 0.9
    assert_array_equal(pair.image[outside], image[outside])
    assert_array_equal(pair.target, (image >= 1 / 3) & outside)


def views(array: np.ndarray) -> dict[str, np.ndarray]:
    """Return arrays of equal values and unlike strides."""
    padded = np.zeros(tuple(2 * n for n in array.shape), array.dtype)
    padded[::2, 1::2, ::2] = array
    return {
        "Fortran": np.asfortranarray(array),
        "every other voxel": padded[::2, 1::2, ::2],
        "turned round": np.ascontiguousarray(array[::-1, :, ::-1])[::-1, :, ::-1],
        "transposed": np.ascontiguousarray(array.transpose(2, 0, 1)).transpose(1, 2, 0),
        "read-only": array,
    }


@pytest.mark.parametrize("kind", ["Fortran", "every other voxel", "turned round", "transposed", "read-only"])
def test_strides_change_nothing(kind, lungs) -> None:
    """Views, of the image, of the mask and of both."""
    image, mask = lungs
    expected = synthesizer()(image, mask, index=2)
    same(synthesizer()(views(image)[kind], mask, index=2), expected)
    same(synthesizer()(image, views(mask)[kind], index=2), expected)
    same(synthesizer()(views(image)[kind], views(mask.astype(np.uint8))[kind], index=2), expected)


def test_torch_in_torch_out(lung_batch) -> None:
    """Tensors give tensors of the same values; the input's memory is neither copied nor written."""
    torch = pytest.importorskip("torch")
    images, masks = lung_batch
    expected = synthesizer()(images, masks, index=[1, 2, 3])
    tensor, lung = torch.from_numpy(images.copy()), torch.from_numpy(masks.copy())
    view, _ = accept(tensor, "image")
    assert np.shares_memory(view, tensor.numpy())
    assert view.ctypes.data == tensor.data_ptr()
    pair = synthesizer()(tensor, lung, index=[1, 2, 3])
    for name, dtype in (("image", torch.float32), ("target", torch.bool), ("labels", torch.int32)):
        got = getattr(pair, name)
        assert isinstance(got, torch.Tensor)
        assert got.dtype == dtype
        assert got.data_ptr() not in (tensor.data_ptr(), lung.data_ptr())
        assert_array_equal(got.numpy(), getattr(expected, name))
    assert_array_equal(tensor.numpy(), images)
    assert_array_equal(lung.numpy(), masks)
    pair.image.mul_(0.5)  # the result is the caller's to write
    assert pair.plan == expected.plan


def test_torch_views_and_doubles(lungs) -> None:
    """Strided tensors, float64 tensors, masks of other types, an index from a tensor's `tolist`."""
    torch = pytest.importorskip("torch")
    image, mask = lungs
    expected = synthesizer()(image, mask, index=2)
    volume = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for kind in (torch.bool, torch.uint8, torch.float32):
        pair = synthesizer()(volume, torch.from_numpy(mask.copy()).to(kind), index=2)
        assert_array_equal(pair.image.numpy(), expected.image)
    double = synthesizer()(volume.double(), torch.from_numpy(mask.copy()), index=2)
    assert double.image.dtype == torch.float64
    assert_array_equal(double.labels.numpy(), expected.labels)
    batch = synthesizer()(volume[None], torch.from_numpy(mask.copy())[None], index=torch.tensor([2]).tolist())
    assert_array_equal(batch.image[0].numpy(), expected.image)


def test_indices_as_a_dataloader_collates_them():
    torch = pytest.importorskip("torch")
    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=4)
    plain = synth.sample(index=[7, 9], lung_fraction=[0.5, 1.0], shape=(2, 8, 32, 32))
    for index in (np.array([7, 9]), torch.tensor([7, 9]), [np.int64(7), torch.tensor(9)]):
        assert (
            synth.sample(index=index, lung_fraction=torch.tensor([0.5, 1.0]), shape=(2, 8, 32, 32)) == plain
        )
    assert synth.sample(index=torch.tensor(7)) == synth.sample(index=7)
