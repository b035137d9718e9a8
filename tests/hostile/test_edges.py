"""The generator's edges: masks without lung, values beside the range, numbers and arrays of every kind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import lesionsynth as ls
from tests.conftest import REPOSITORY, draw_lungs
from tests.hostile.tally import trial
from tests.plans import blob, plan, small_config

IMAGE, MASK = draw_lungs((8, 30, 32))
IMAGE.setflags(write=False)
MASK.setflags(write=False)
NONE = np.zeros_like(MASK)
SYNTH = ls.LesionSynthesizer(small_config(), seed=4)
TAU = SYNTH.config.tau


# --- masks without lung ---


def batch(lungs: list[bool], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Items with lung and items without, whose images are not 0 for that."""
    image = (IMAGE * 900 - 800).round() if kind == "int16" else IMAGE
    images = np.stack([np.roll(image, 3 * k, axis=2) for k in range(len(lungs))]).astype(kind)
    masks = np.stack([np.roll(MASK, 3 * k, axis=2) if lung else NONE for k, lung in enumerate(lungs)])
    return images, masks


def no_lesion(pair, item: int, image) -> None:
    """Hold an item to what one without lung must be."""
    healthy = ls.window_hu(image) if image.dtype == np.int16 else image
    assert_array_equal(pair.image[item], healthy)
    assert_array_equal(pair.target[item], healthy >= healthy.dtype.type(TAU))
    assert not np.asarray(pair.labels[item]).any()
    assert pair.plan[item].blobs == pair.plan[item].components == ()
    assert ls.LesionPlan.from_json(pair.plan[item].to_json()) == pair.plan[item]


@given(
    lungs=st.lists(st.booleans(), min_size=1, max_size=5),
    kind=st.sampled_from(["float32", "float64", "float16", "int16"]),
    library=st.sampled_from(["numpy", "torch"]),
    numbers=st.sampled_from([bool, np.uint8, np.float32]),
    way=st.sampled_from(["constructor", "call", "out"]),
)
def test_an_empty_item_fails_no_batch(lungs, kind, library, numbers, way) -> None:
    """It is unchanged, and the others are what they are alone; the plan replays all of them."""
    torch = pytest.importorskip("torch") if library == "torch" else None
    images, masks = batch(lungs, kind)
    given_masks = masks.astype(numbers)
    arrays = [torch.from_numpy(a) for a in (images, given_masks)] if torch else [images, given_masks]
    indices = [7 + k for k in range(len(lungs))]
    fractions = [0.5 if lung else 0.5 * (k % 2) for k, lung in enumerate(lungs)]
    synth, options = SYNTH, {"allow_empty": True}
    if way == "constructor":
        synth, options = ls.LesionSynthesizer(small_config(), seed=4, allow_empty=True), {}
    elif way == "out":
        given = SYNTH(*arrays, index=indices, allow_empty=True)
        options |= {"out": given}
    with trial("edges"):
        pair = synth(*arrays, index=indices, lung_fraction=fractions, **options)
        for k, lung in enumerate(lungs):
            if not lung:
                no_lesion(pair, k, images[k])
                continue
            alone = SYNTH(images[k], masks[k], index=indices[k], lung_fraction=0.5)
            assert_array_equal(pair.image[k], alone.image)
            assert_array_equal(pair.target[k], alone.target)
            assert_array_equal(pair.labels[k], alone.labels)
            assert pair.plan[k] == alone.plan
        again = SYNTH.render(pair.plan, *arrays, allow_empty=True)
        assert_array_equal(again.image, pair.image)
        assert again.plan == pair.plan


def test_one_volume_without_lung() -> None:
    for image in (IMAGE, np.full_like(IMAGE, 0.9), np.zeros_like(IMAGE)):
        with trial("edges"):
            pair = SYNTH(image, NONE, index=0, allow_empty=True)
            assert_array_equal(pair.image, image)
            assert_array_equal(pair.target, image >= np.float32(TAU))
            assert pair.plan.components == pair.plan.blobs == ()
            assert not pair.labels.any()


def test_an_empty_mask_is_an_error_elsewhere() -> None:
    """Where nobody has allowed it, and where a call takes it back."""
    calls = [
        lambda: SYNTH(IMAGE, NONE, index=0),
        lambda: SYNTH.render(SYNTH.sample(index=0), IMAGE, NONE),
        lambda: ls.LesionSynthesizer(small_config(), allow_empty=True)(
            IMAGE, NONE, index=0, allow_empty=False
        ),
        lambda: SYNTH(np.stack([IMAGE] * 2), np.stack([MASK, NONE]), index=[0, 1]),
    ]
    for call in calls:
        with trial("edges"), pytest.raises(ValueError, match="lung_mask must contain at least one voxel"):
            call()
    with trial("edges"), pytest.raises(ValueError, match="lung_fraction must be in"):
        SYNTH(IMAGE, MASK, index=0, lung_fraction=0)
    for flag in (0, 1, "yes", None.__class__, [True]):
        with trial("edges"), pytest.raises(TypeError, match="allow_empty must be True or False, got"):
            ls.LesionSynthesizer(small_config(), allow_empty=flag)


def test_what_else_is_wrong_is_told_all_the_same() -> None:
    """A voxel that is NaN, a mask of 2, a centre outside the volume, in an item without lung."""
    outside = plan(blob(center=(8, 0, 0)), shape=None)
    wrong = np.where(np.arange(32) == 5, np.nan, IMAGE).astype(np.float32)
    calls = {
        "image must be finite": lambda: SYNTH(wrong, NONE, index=0, allow_empty=True),
        "lung_mask must be binary": lambda: SYNTH(IMAGE, 2 * NONE + 2, index=0, allow_empty=True),
        r"blobs\[0\].center must": lambda: SYNTH.render(outside, IMAGE, NONE, allow_empty=True),
    }
    for text, call in calls.items():
        with trial("edges"), pytest.raises(ValueError, match=text):
            call()


def test_an_empty_item_on_a_gpu() -> None:
    """The device's own source, on the host: told as the CPU tells it, and an error elsewhere."""
    from lesionsynth.cuda.render import Job, Renderer
    from tests.cuda_host.device import HostDevice
    from tests.cuda_host.pairs import HU_RANGE, HostPair, volume
    from tests.cuda_host.shim import compiler

    if compiler() is None:
        pytest.skip("the shim needs g++, which is not installed")
    gpu = Renderer(HostDevice())

    def begin(images, masks, allow_empty: bool) -> HostPair:
        plans = [SYNTH.sample(index=k) for k in range(len(images))]
        out, target = np.full(images.shape, 77, np.float32), np.full(images.shape, 77, np.uint8)
        job = Job(volume(images), volume(masks.view(np.uint8)), volume(out), volume(target))
        return HostPair(out, target, gpu.render(plans, job, HU_RANGE, allow_empty=allow_empty))

    for lungs in ([True, False, True], [False], [False, False], [True]):
        images, masks = batch(lungs, "float32")
        with trial("edges"):
            pair = begin(images, masks, True)
            expected = SYNTH(images, masks, index=list(range(len(lungs))), allow_empty=True)
            assert_array_equal(pair.image, expected.image)
            assert_array_equal(pair.target.astype(bool), expected.target)
            assert_array_equal(pair.labels, expected.labels)
            found = pair.components
            assert [c is None for c in found] == [not lung for lung in lungs]
            for components, drawn in zip(found, expected.plan, strict=True):
                assert (components or ()) == drawn.components
    images, masks = batch([True, False], "float32")
    with trial("edges"), pytest.raises(ValueError, match="empty mask"):
        _ = begin(images, masks, False).components
    with trial("edges"):
        begin(images, masks, True)  # nobody asks
        for _ in range(40):
            begin(images[:1], masks[:1], False)
    wrong = np.full_like(images, 2.0)
    with trial("edges"), pytest.raises(ValueError, match=r"^image must be finite and in \[0, 1\]"):
        _ = begin(wrong, masks, True).components


def test_adaptors_let_an_empty_item_pass() -> None:
    """MONAI's transform and the training stream by default; the transform raises where it is told to."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("monai")
    import monai.transforms  # noqa: F401

    from normnet import data
    from normnet.config import ModelConfig, TrainConfig

    item = {
        "image": torch.from_numpy(IMAGE.copy())[None],
        "lung_mask": torch.from_numpy(NONE)[None],
        "f": 0.0,
    }
    for options in ({}, {"lung_fraction_key": "f"}):
        with trial("edges"):
            transform = ls.monai.RandLesiond(config=small_config(), **options)
            out = transform(item)
            assert torch.equal(out["image"], item["image"])
            assert not out["labels"].any()
            assert torch.equal(out["target"], item["image"] >= TAU)
    with trial("edges"), pytest.raises(ValueError, match="lung_mask must contain at least one voxel"):
        ls.monai.RandLesiond(config=small_config(), allow_empty=False)(item)

    with trial("edges"):
        hu = (IMAGE * 900 - 800).round().astype(np.int16)
        config = TrainConfig(model=ModelConfig(channels=(1, 1), strides=(2,)), batch_size=2, slab=8)
        stream = data.PairStream([], SYNTH, config, largest=1000)
        stacked = (torch.from_numpy(np.stack(pair)) for pair in ([hu, hu], [NONE, MASK]))
        slabs = data.Slabs(*stacked, [0, 1], [1e-3, 1.0], [None, None], 0.0)
        made = stream.pairs(slabs)
        assert not made.lesions[0].any()
        assert made.lesions[1].any()
        assert not made.image[0].any(), "H is 0 outside the mask"
        assert not made.target[0].any()
        rows, columns = data._window(torch.from_numpy(NONE), [16, 20], 0.5)
        assert (rows, columns) == (slice(7, 23), slice(6, 26))


# --- values beside the range ---


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_value_beside_the_range_is_told_with_its_digits(kind, steps) -> None:
    """The message shows a number that is above 1, or below 0."""
    above, below = np.dtype(kind).type(1), np.dtype(kind).type(0)
    for _ in range(steps):
        above, below = (
            np.nextafter(above, np.dtype(kind).type(2)),
            np.nextafter(below, np.dtype(kind).type(-1)),
        )
    checks = [SYNTH] if kind == "float16" else [SYNTH, lambda *a, index: ls.remove_erroneous_edges(*a)]
    for value in (above, below):
        image = IMAGE.astype(kind)
        image[4, 15, 9] = value
        mask = np.ones_like(MASK)
        for call in checks:
            with trial("edges"), pytest.raises(ValueError, match="image must") as caught:
                call(image, mask, index=0)
            low, high = re.search(r"from (\S+) to ([^\s;]+)", str(caught.value)).groups()
            assert np.dtype(kind).type(low if value is below else high) == value
            assert float(low) < 0 or float(high) > 1
    mask = np.ones(MASK.shape, kind)
    mask[1, 2, 3] = above
    with trial("edges"), pytest.raises(ValueError, match="lung_mask must be binary") as caught:
        SYNTH(IMAGE, mask, index=0)
    assert float(str(caught.value).split()[-1]) > 1


def test_numbers_beside_the_range_are_told_with_their_digits() -> None:
    above = float(np.nextafter(1.0, 2.0))
    calls = {
        "lung_fraction": lambda: SYNTH.sample(index=0, lung_fraction=above),
        "threshold": lambda: ls.remove_erroneous_edges(IMAGE, MASK, threshold=above),
        "probability": lambda: ls.BlobClass(probability=above, radius=(1.0, 2.0)),
        "rotation": lambda: blob(rotation=(1.0000011, 0.0, 0.0, 0.0)),
        "position": lambda: blob(position=above),
    }
    for name, call in calls.items():
        with trial("edges"), pytest.raises(ValueError, match=name) as caught:
            call()
        assert re.search(r"got.*1\.0000", str(caught.value))


# --- numbers of every kind ---

INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.array]


@pytest.mark.parametrize("kind", INTEGERS)
def test_numpy_integers_are_integers(kind) -> None:
    """Everywhere; plans hold Python's, which JSON can write."""
    three = kind(3)
    with trial("edges"):
        synth = ls.LesionSynthesizer(small_config(), seed=three)
        pair = synth(IMAGE, MASK, index=three)
        expected = ls.LesionSynthesizer(small_config(), seed=3)(IMAGE, MASK, index=3)
        assert_array_equal(pair.image, expected.image)
        assert json.loads(pair.plan.to_json())["seed"] == 3
        assert pair.plan == expected.plan
        assert type(pair.plan.seed) is type(pair.plan.index) is int
        drawn = synth.sample(index=[three, 4], shape=(kind(2), kind(8), kind(30), kind(32)))
        assert [type(n) for p in drawn for n in p.shape] == [int] * 6
        assert all(ls.LesionPlan.from_json(p.to_json()) == p for p in drawn)
    with trial("edges"):
        field = ls.ops.philox_uniform((kind(2), kind(3), kind(4)), three, stream=kind(5), sample=kind(6))
        assert_array_equal(field, ls.ops.philox_uniform((2, 3, 4), 3, stream=5, sample=6))
        assert_array_equal(ls.ops.uniform_filter(IMAGE, three), ls.ops.uniform_filter(IMAGE, 3))
        grown = ls.ops.grow(IMAGE > 0.5, MASK, iterations=three)
        assert_array_equal(grown, ls.ops.grow(IMAGE > 0.5, MASK, iterations=3))
    if kind is not np.array:
        with trial("edges"):
            ls.LesionSynthesizer(small_config(connectivity=kind(6)), threads=three)(IMAGE, MASK, index=0)
            assert ls.ops.label(MASK, connectivity=kind(6))[1] == ls.ops.label(MASK, connectivity=6)[1]
            ls.remove_erroneous_edges(IMAGE, MASK, shell_width=three, connectivity=kind(18))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64, int])
def test_numpy_floats_are_numbers(kind) -> None:
    one = kind(1)
    with trial("edges"):
        drawn = SYNTH.sample(index=1, lung_fraction=one, spacing=np.array([1, 1, 1], kind))
        assert ls.LesionPlan.from_json(drawn.to_json()) == drawn == SYNTH.sample(index=1)
        smooth = ls.ops.gaussian_filter(IMAGE, one, truncate=one)
        assert_array_equal(smooth, ls.ops.gaussian_filter(IMAGE, 1.0, truncate=1.0))
        assert ls.threshold(kind(-500), (kind(-800), kind(100))) == ls.threshold()
        wide = np.array([-30000, 0, 30000], np.int16)
        assert ls.window_hu(wide, (np.int16(-30000), np.int16(30000))).tolist() == [0.0, 0.5, 1.0]


WINDOWS = [(-800, 100), (-1e5, 1e5), (0.0, 0.01), (99_999.98, 1e5), (-1e5, -99_999.98), (-1024.3, 599.9)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("window", WINDOWS)
def test_hounsfield_units_as_large_as_they_come(window) -> None:
    """They are clipped, without a word, and become the same in a call that takes int16."""
    for kind in (np.int16, np.int64, np.uint64, np.float16, np.float32, np.float64):
        limits = (np.iinfo if issubclass(kind, np.integer) else np.finfo)(kind)
        least, most = float(limits.min), float(limits.max)
        with trial("edges"):
            low, high = ls.window_hu(np.array([limits.min, limits.max], kind), window)
            assert low == (0 if least <= window[0] else 1 if least >= window[1] else low)
            assert high == (0 if most <= window[0] else 1 if most >= window[1] else high)
            assert 0 <= low <= high <= 1
    hu = np.linspace(-32768, 32767, IMAGE.size).astype(np.int16).reshape(IMAGE.shape)
    hu[3] = np.arange(-700, -700 + hu[3].size).reshape(hu[3].shape)
    config = small_config(hu_range=window, hu_threshold=window[0] + 0.5 * (window[1] - window[0]))
    with trial("edges"):
        pair = ls.LesionSynthesizer(config)(hu, NONE, index=0, allow_empty=True)
        assert_array_equal(pair.image, ls.window_hu(hu, window))


def test_windows_that_are_too_narrow() -> None:
    """For float32, in which they are divided by."""
    for low, high in ((0.0, 5e-324), (1.0, np.nextafter(1.0, 2.0)), (0, 1e-46), (99_999.995, 1e5)):
        calls = [
            lambda w: ls.window_hu(IMAGE, w),
            lambda w: ls.threshold(w[0], w),
            lambda w: small_config(hu_range=w),
        ]
        for call in calls:
            with trial("edges"), pytest.raises(ValueError, match=r"hu_range must be at least \S+ HU wide"):
                call((float(low), float(high)))


BIG = 2**70
BAD_INTEGERS = [True, np.True_, 3.0, np.float32(3), "3", None, 1j, [3], np.array([3]), b"3", -1, BIG]
INTEGER_ARGUMENTS = {
    "seed": lambda n: ls.LesionSynthesizer(small_config(), seed=n),
    "index": lambda n: SYNTH(IMAGE, MASK, index=n),
    "shape": lambda n: SYNTH.sample(index=0, shape=(8, n, 32)),
    "index ": lambda n: SYNTH.sample(index=n if isinstance(n, bytes | str | int) else [None]),
    "stream": lambda n: ls.ops.philox_uniform((1, 1, 1), 0, stream=n),
    "sample": lambda n: ls.ops.philox_uniform((1, 1, 1), 0, sample=n),
    "component": lambda n: ls.ops.philox_uniform((1, 1, 1), 0, component=n),
    "offset": lambda n: ls.ops.philox_uniform((1, 1, 1), 0, offset=(0, n, 0)),
    "size": lambda n: ls.ops.uniform_filter(IMAGE, (n, 3, 3)),
    "connectivity": lambda n: ls.ops.label(MASK, connectivity=[n]),
    "shell_width": lambda n: ls.remove_erroneous_edges(IMAGE, MASK, shell_width=-1 if n is BIG else n),
    "threads": lambda n: ls.LesionSynthesizer(small_config(), threads="0" if n is None or n is BIG else n),
}


@pytest.mark.parametrize("name", INTEGER_ARGUMENTS)
def test_what_is_no_integer_is_refused_by_name(name) -> None:
    for value in BAD_INTEGERS:
        if isinstance(value, np.ndarray) and name == "threads":
            continue
        with trial("edges"), pytest.raises((TypeError, ValueError), match=name):
            INTEGER_ARGUMENTS[name](value)


LONG = [10**5000, [10] * 10_000, np.zeros((9, 9)), "x" * 10_000, b"\n" * 10_000, {n: n for n in range(999)}]


@pytest.mark.parametrize("name", [*INTEGER_ARGUMENTS, "sigma", "mode", "device", "allow_empty", "plan"])
def test_messages_stay_short(name) -> None:
    """Whatever is refused: one line that names the argument."""
    others = {
        "sigma": lambda v: ls.ops.gaussian_filter(IMAGE, v),
        "mode": lambda v: ls.ops.gaussian_filter(IMAGE, 1.0, mode=v),
        "device": lambda v: ls.ops.philox_uniform(
            (1, 1, 1), 0, device=3.5 if isinstance(v, str | int) else v
        ),
        "allow_empty": lambda v: SYNTH(IMAGE, MASK, index=0, allow_empty=v),
        "plan": lambda v: SYNTH.render(
            [SYNTH.sample(index=0), v], IMAGE[None].repeat(2, 0), MASK[None].repeat(2, 0)
        ),
    }
    for value in LONG:
        if isinstance(value, int) and name in ("shell_width", "threads"):
            continue  # as many as there are
        with trial("edges"), pytest.raises((TypeError, ValueError), match=name) as caught:
            (INTEGER_ARGUMENTS | others)[name](value)
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)


def test_what_the_phantom_refuses() -> None:
    chest = ls.phantom.chest_ct(shape=(8, 32, 32), seed=1)
    bad = {
        "shape": [b"abc", "888", (8, 8, True), (8, 8, 9.0), (8, 10**6, 10**6), (8, 8, 10**5000), {8, 9, 10}],
        "spacing": [
            "123",
            (True, 1.0, 1.0),
            (1e308, 1.0, 1.0),
            (1e-308, 1.0, 1.0),
            ("1", 1.0, 1.0),
            1.0,
            {1, 2, 3},
        ],
        "seed": ["1", 1.0, True, None, -(10**5000)],
        "level": ["a", [0.5], True, 1 + 1e-15],
        "severity": ["a", [0.5], True, 0.9000000001, 0],
        "hu": [np.ma.array(chest.hu), None],
    }
    given = {"hu": chest.hu, "lung_mask": chest.lung_mask, "spacing": chest.spacing}
    for name, values in bad.items():
        ill = name in ("severity", "hu")
        make, others = (
            (ls.phantom.add_pneumonia, given) if ill else (ls.phantom.chest_ct, {"shape": (8, 32, 32)})
        )
        for value in values:
            with trial("edges"), pytest.raises((TypeError, ValueError), match=name) as caught:
                make(**others | {name: value})
            assert len(str(caught.value)) < 500


def test_what_the_transform_refuses() -> None:
    """No number is cut to a whole one, or read out of a text; no entry takes the place of another."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("monai")
    import monai.transforms  # noqa: F401

    arrays = {"image": torch.from_numpy(IMAGE.copy())[None], "lung_mask": torch.from_numpy(MASK.copy())[None]}
    transform = ls.monai.RandLesiond(config=small_config(), index_key="number", lung_fraction_key="part")
    good = [3, np.int64(3), np.array([3]), torch.tensor(3), torch.tensor([3])]
    assert {transform(arrays | {"number": n, "part": 1})["lesion_index"] for n in good} == {3}
    bad = {
        "number": [3.7, True, "3", "a", None, float("nan"), torch.tensor([3, 4]), 2**32, -1],
        "lung_fraction": ["0.5", "a", None, True, float("nan"), torch.tensor([0.5, 1.0]), -0.1, 1.0000001],
        "image": [IMAGE.tolist(), None, arrays["image"][0]],
    }
    keys = {"lung_fraction": "part"}
    for name, values in bad.items():
        for value in values:
            with trial("edges"), pytest.raises((TypeError, ValueError), match=f"^{name} must"):
                transform(arrays | {"number": 3, "part": 1.0} | {keys.get(name, name): value})
    for key in ("image", "lung_mask", "labels", "lesion_index"):
        with trial("edges"), pytest.raises(ValueError, match="keys of entries must differ"):
            ls.monai.RandLesiond(config=small_config(), target_key=key)


FEW_VOXELS = """
import numpy as np, lesionsynth as ls
mask = np.ones((17, 64, 64), bool)
ls.LesionSynthesizer(ls.presets.covid_lung())(mask * np.float32(0.5), mask, index=0)
"""


def test_a_number_of_threads_that_numba_dies_of() -> None:
    """The call says so, and names the variable."""
    with trial("edges"):
        done = subprocess.run(
            [sys.executable, "-c", FEW_VOXELS], capture_output=True, text=True, timeout=120, cwd=REPOSITORY,
            env={**os.environ, "NUMBA_NUM_THREADS": "0"},
        )  # fmt: skip
        assert "NUMBA_NUM_THREADS must be an integer >= 1, got '0'" in done.stderr.splitlines()[-1]


BAD_NUMBERS = ["1", None, 1j, float("nan"), float("inf"), -1, b"1", [[1.0]], 1e300, True]
NUMBER_ARGUMENTS = {
    "lung_fraction": lambda v: SYNTH.sample(index=0, lung_fraction="" if v is None else v),
    "sigma": lambda v: ls.ops.gaussian_filter(IMAGE, v),
    "truncate": lambda v: ls.ops.gaussian_filter(IMAGE, 1.0, truncate=v),
    "threshold": lambda v: ls.remove_erroneous_edges(IMAGE, MASK, threshold=v),
    "contact_fraction": lambda v: ls.remove_erroneous_edges(IMAGE, MASK, contact_fraction=v),
    "hu_range": lambda v: ls.window_hu(IMAGE, (v, -2.0)),
    "hu": lambda v: ls.threshold("-1" if v == -1 else v),
    "spacing": lambda v: SYNTH.sample(index=0, spacing=(1.0, v, 1.0)),
}


@pytest.mark.parametrize("name", NUMBER_ARGUMENTS)
def test_what_is_no_number_is_refused_by_name(name) -> None:
    for value in BAD_NUMBERS:
        with trial("edges"), pytest.raises((TypeError, ValueError), match=name):
            NUMBER_ARGUMENTS[name](value)


# --- arrays of every kind ---


def unaligned(array: np.ndarray) -> np.ndarray:
    """The same values at an odd address."""
    odd = np.frombuffer(bytearray(array.nbytes + 1), np.uint8)[1:].view(array.dtype).reshape(array.shape)
    odd[...] = array
    return odd


def field_of_records(array: np.ndarray) -> np.ndarray:
    """The same values between bytes of something else."""
    records = np.zeros(array.shape, np.dtype([("byte", "u1"), ("value", array.dtype)]))
    records["value"] = array
    return records["value"]


VIEWS = {
    "read-only": lambda a: a,
    "Fortran": np.asfortranarray,
    "backwards": lambda a: a[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    "every other": lambda a: np.repeat(a, 2, axis=2)[:, :, ::2],
    "unaligned": unaligned,
    "field": field_of_records,
    "memmap": lambda a: a.view(np.memmap),
}
CALLS = {
    "image": lambda a: SYNTH(a, MASK, index=2).image,
    "mask": lambda a: SYNTH(IMAGE, (a >= 0) & MASK if a.dtype != IMAGE.dtype else MASK, index=2).image,
    "gaussian_filter": lambda a: ls.ops.gaussian_filter(a, 1.0),
    "uniform_filter": lambda a: ls.ops.uniform_filter(a, 3),
    "label": lambda a: ls.ops.label(a)[0],
    "grow": lambda a: ls.ops.grow(a, a, iterations=2),
    "edges": lambda a: ls.remove_erroneous_edges(a, MASK)[0],
    "window": ls.window_hu,
}


@pytest.mark.parametrize("call", CALLS)
def test_memory_of_every_kind(call) -> None:
    """The same numbers, wherever they lie; other byte orders are the same or are refused by name."""
    expected = CALLS[call](IMAGE)
    for name, view in VIEWS.items():
        with trial("edges"):
            assert_array_equal(CALLS[call](view(IMAGE)), expected, err_msg=name)
    swapped = IMAGE.astype(IMAGE.dtype.newbyteorder())
    with trial("edges"):
        if call == "image" or call == "edges":
            with pytest.raises(TypeError, match=r"image must be .*>f4"):
                CALLS[call](swapped)
        else:
            assert_array_equal(CALLS[call](swapped), expected)


def strange_arrays() -> dict[str, tuple[object, str]]:
    """Arrays whose memory does not hold their values, or no array at all, and the word to find."""
    masked = np.ma.array(IMAGE, mask=IMAGE > 0.5)
    found: dict[str, tuple[object, str]] = {
        "masked": (masked, "masked array"),
        "masked, nothing masked": (np.ma.array(IMAGE), "masked array"),
        "memoryview": (memoryview(IMAGE), "memoryview"),
        "list": (IMAGE.tolist(), "list"),
        "array of objects": (IMAGE.astype(object), "object"),
        "records": (np.zeros(IMAGE.shape, [("a", "f4")]), "void32|V4|a"),
        "complex": (IMAGE.astype(complex), "complex128"),
        "text": (IMAGE.astype("U4"), "str|U4"),
        "dates": (np.zeros(IMAGE.shape, "M8[s]"), "datetime64"),
        "none": (None, "NoneType"),
    }
    from scipy import sparse

    for name in ("csr_matrix", "coo_array", "dia_array"):
        found[name] = (getattr(sparse, name)(IMAGE[0]), name)
    return found


ONE_ARRAY = {
    "image": lambda a: SYNTH(a, MASK, index=0),
    "lung_mask": lambda a: SYNTH(IMAGE, a, index=0),
    "out image": lambda a: SYNTH(IMAGE, MASK, index=0, out=(a, np.empty_like(MASK))),
    "out target": lambda a: SYNTH(IMAGE, MASK, index=0, out=(np.empty_like(IMAGE), a)),
    "input": lambda a: ls.ops.gaussian_filter(a, 1.0),
    "mask": lambda a: ls.ops.grow(IMAGE, a),
    "out": lambda a: ls.ops.philox_uniform(IMAGE.shape, 0, out=a),
    "hu": ls.window_hu,
}


def test_no_voxel_at_all() -> None:
    for shape in ((0, 30, 32), (8, 0, 32), (8, 30, 0), (0, 8, 30, 32), (2, 8, 0, 32)):
        image, index = np.zeros(shape, np.float32), 0 if len(shape) == 3 else [0] * shape[0]
        for allow in (False, True):
            with trial("edges"), pytest.raises(ValueError, match=r"image must have at least one voxel"):
                SYNTH(image, image > 0, index=index, allow_empty=allow)


class Shapeless:
    """An array of DLPack that tells no shape, or none that is one."""

    def __init__(self, array: np.ndarray, shape: object = None) -> None:
        self.array, self.shape = array, shape

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_arrays_that_tell_no_shape() -> None:
    images, masks = np.stack([IMAGE] * 2), np.stack([MASK] * 2)
    for shape in (None, 5, "abc", [8, 30, 32], np.array([2, 8, 30, 32])):
        with trial("edges"):
            pair = SYNTH(Shapeless(IMAGE, shape), MASK, index=2)
            assert_array_equal(pair.image, SYNTH(IMAGE, MASK, index=2).image)
        for index in ([1], [1, 2, 3]):
            with trial("edges"), pytest.raises(ValueError, match="index must have one entry per item"):
                SYNTH(Shapeless(images, shape), masks, index=index)


@pytest.mark.parametrize("argument", ONE_ARRAY)
def test_what_is_no_plain_array_is_refused_by_name(argument) -> None:
    for name, (array, word) in strange_arrays().items():
        if argument == "out" and array is None:
            continue
        with trial("edges"), pytest.raises((TypeError, ValueError)) as caught:
            ONE_ARRAY[argument](array)
        message = str(caught.value)
        assert argument in message, (name, message)
        assert re.search(f"{word}|shape", message), (name, message)


def test_buffers_that_share_memory() -> None:
    """With each other, in part, as with the arguments."""
    block = np.zeros(IMAGE.nbytes + MASK.nbytes, np.uint8)
    image = block[: IMAGE.nbytes].view(np.float32).reshape(IMAGE.shape)
    for start in (0, 4, IMAGE.nbytes - 1, IMAGE.nbytes):
        target = block[start : start + MASK.nbytes].view(bool).reshape(MASK.shape)
        with trial("edges"):
            if start == IMAGE.nbytes:
                pair = SYNTH(IMAGE, MASK, index=0, out=(image, target))
                assert_array_equal(pair.image, SYNTH(IMAGE, MASK, index=0).image)
                continue
            with pytest.raises(ValueError, match="out image must not share memory with out target"):
                SYNTH(IMAGE, MASK, index=0, out=(image, target))
    for kind in (bool, np.uint8, np.int16, np.int32, np.float32, np.float64):
        mask = MASK.astype(kind)
        first = mask.view(np.uint8).reshape(-1)
        target = first[: MASK.nbytes].view(bool).reshape(MASK.shape)
        buffers = {"out target": (np.empty_like(IMAGE), target)}
        if mask.nbytes >= IMAGE.nbytes:
            image = first[: IMAGE.nbytes].view(np.float32).reshape(IMAGE.shape)
            buffers["out image"] = image, np.empty_like(MASK)
        for name, out in buffers.items():
            with (
                trial("edges"),
                pytest.raises(ValueError, match=f"{name} must not share memory with image or"),
            ):
                SYNTH(IMAGE, mask, index=0, out=out)
            assert_array_equal(mask, MASK)


@pytest.mark.parametrize("kind", ["float32", "float64", "float16"])
def test_buffers_at_odd_addresses(kind) -> None:
    image = IMAGE.astype(kind)
    with trial("edges"):
        pair = SYNTH(image, MASK, index=2, out=(unaligned(image), unaligned(MASK)))
        expected = SYNTH(image, MASK, index=2)
        assert_array_equal(pair.image, expected.image)
        assert_array_equal(pair.target, expected.target)
        out = ls.ops.philox_uniform(IMAGE.shape, 1, out=unaligned(IMAGE))
        assert_array_equal(out, ls.ops.philox_uniform(IMAGE.shape, 1))
    swapped = image.astype(image.dtype.newbyteorder())
    with trial("edges"), pytest.raises(TypeError, match=f"out image must be {kind}, got >f"):
        SYNTH(image, MASK, index=2, out=(swapped, MASK.copy()))
    with trial("edges"), pytest.raises(TypeError, match="out must be float32, got >f"):
        ls.ops.philox_uniform(IMAGE.shape, 1, out=swapped)


# --- torch ---


def strange_tensors(torch) -> dict[str, object]:
    """Functions that hand a tensor of a strange kind to `use`, and a word of the refusal."""
    values = torch.from_numpy(IMAGE.copy())
    fake = pytest.importorskip("torch._subclasses").FakeTensorMode
    pairs = torch.view_as_complex(torch.stack([values, -values], -1))

    def under_fake(use):
        with fake():
            use(values)

    def export(use):
        class Module(torch.nn.Module):
            def forward(self, x):
                return use(x * 1)

        torch.export.export(Module(), (values,))

    def make_fx(use):
        from torch.fx.experimental.proxy_tensor import make_fx

        make_fx(lambda x: use(x * 1))(values)

    return {
        "sparse_coo": lambda use: use(values.to_sparse()),
        "sparse_csr": lambda use: use(values[0].to_sparse_csr()),
        "nested": lambda use: use(torch.nested.nested_tensor([values[0], values[1]])),
        "nested ": lambda use: use(torch.nested.nested_tensor([values[0], values[1]], layout=torch.jagged)),
        "meta": lambda use: use(values.to("meta")),
        "gradient": lambda use: use(values.clone().requires_grad_()),
        "lazy conjugate": lambda use: use(pairs.conj()),
        "lazy negation": lambda use: use(pairs.conj().imag),
        "quint8": lambda use: use(torch.quantize_per_tensor(values, 1 / 255, 0, torch.quint8)),
        "bfloat16": lambda use: use(values.bfloat16()),
        "FakeTensor": lambda use: use(fake().from_tensor(values)),
        "FakeTensorMode": under_fake,
        "torch.func": lambda use: torch.vmap(use)(torch.stack([values, values])),
        "torch.func ": lambda use: torch.func.grad(lambda x: use(x).sum())(values),
        "torch.func  ": lambda use: torch.func.jvp(use, (values,), (values,)),
        "torch.func   ": lambda use: torch.func.functionalize(use)(values),
        "torch.jit.trace": lambda use: torch.jit.trace(use, (values,)),
        "torch.fx": lambda use: torch.fx.symbolic_trace(use),
        "ProxyTorchDispatchMode": make_fx,
        "FakeTensor ": export,
    }


def test_tensors_without_values_are_refused_by_name() -> None:
    """Nothing reads memory that is not there, nor records one pair as if it were all."""
    torch = pytest.importorskip("torch")
    mask = torch.from_numpy(MASK.copy())
    uses = {
        "image": lambda x: SYNTH(x, mask, index=0).image,
        "image ": lambda x: SYNTH.render(SYNTH.sample(index=0), x, mask).image,
        "input": lambda x: ls.ops.gaussian_filter(x, 1.0),
        "hu": lambda x: ls.window_hu(x),
    }
    for kind, make in strange_tensors(torch).items():
        for argument, use in uses.items():
            if (kind, argument) in {("bfloat16", "hu")}:
                continue
            with warnings.catch_warnings(), trial("edges"):
                warnings.simplefilter("ignore")  # torch's own, of what is deprecated there
                with pytest.raises((TypeError, ValueError)) as caught:
                    make(use)
            message = str(caught.value)
            assert argument.strip() in message, (kind, message)
            assert kind.strip() in message, (kind, message)


def test_tensors_that_are_values() -> None:
    torch = pytest.importorskip("torch")

    class Own(torch.Tensor):
        """A subclass that changes nothing."""

    image, mask = torch.from_numpy(IMAGE.copy()), torch.from_numpy(MASK.copy())
    expected = torch.from_numpy(SYNTH(IMAGE, MASK, index=3).image)
    with torch.inference_mode():
        inference = image.clone()
    views = [
        image.as_subclass(Own), torch.nn.Parameter(image.clone(), requires_grad=False), inference,
        image.permute(2, 1, 0).contiguous().permute(2, 1, 0), image.contiguous(), image.share_memory_(),
    ]  # fmt: skip
    for view in views:
        with trial("edges"):
            assert torch.equal(SYNTH(view, mask, index=3).image, expected)
    with trial("edges"), torch.no_grad():
        assert torch.equal(SYNTH(image.requires_grad_().detach(), mask, index=3).image, expected)


@pytest.mark.slow
def test_torch_compile_leaves_it_alone() -> None:
    """A graph before and one after; a whole graph is refused with the reason."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("monai")
    import monai.transforms  # noqa: F401

    image, mask = torch.from_numpy(IMAGE.copy()), torch.from_numpy(MASK.copy())
    drawn, transform = SYNTH.sample(index=3), ls.monai.RandLesiond(config=small_config(), index_key="index")
    item = {"lung_mask": mask[None], "index": 3}
    functions = {
        "call": lambda x: SYNTH(x * 1, mask, index=3).image + 0,
        "target": lambda x: SYNTH(x * 1, mask, index=3).target | mask,
        "labels": lambda x: SYNTH(x * 1, mask, index=3).labels + 0,
        "render": lambda x: SYNTH.render(drawn, x * 1, mask).image + 0,
        "monai": lambda x: transform({"image": x[None] * 1, **item})["image"] + 0,
        "gaussian_filter": lambda x: ls.ops.gaussian_filter(x * 1, 1.0) + 0,
        "uniform_filter": lambda x: ls.ops.uniform_filter(x * 1, 3) + 0,
        "label": lambda x: ls.ops.label(x > 0.5)[0] + 0,
        "grow": lambda x: ls.ops.grow(x > 0.5, x > 0) | mask,
        "edges": lambda x: ls.remove_erroneous_edges(x * 1, mask)[0] + 0,
        "window": lambda x: ls.window_hu(x * 900 - 800) + 0,
    }
    for name, function in functions.items():
        with trial("edges"):
            torch.compiler.reset()
            with pytest.raises(Exception, match="fullgraph=True cannot hold them"):
                torch.compile(function, backend="eager", fullgraph=True)(image)
            torch.compiler.reset()
            assert torch.equal(torch.compile(function, backend="eager")(image), function(image)), name
