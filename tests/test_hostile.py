"""Bad input raises an error that names the argument, the rule and the value (DESIGN.md section 3)."""

from __future__ import annotations

import re

import numpy as np
import pytest

import lesionsynth as ls
from tests.hostile.bounds import at_once
from tests.plans import blob, plan, renderer, small_config

SYNTH = ls.LesionSynthesizer(small_config(), seed=0)
SHAPE = (4, 10, 12)


def image(value: float = 0.1, dtype: type = np.float32, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Return a constant image."""
    return np.full(shape, value, dtype)


def mask(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Return a mask of everything."""
    return np.ones(shape, bool)


def with_voxel(value: float, dtype: type = np.float32, at: tuple[int, int, int] = (1, 2, 3)) -> np.ndarray:
    """Return an image one voxel of which is `value`."""
    volume = image(dtype=dtype)
    volume[at] = value
    return volume


def number_mask(value: float, dtype: type = np.int16) -> np.ndarray:
    """Return a mask of zeros and ones but for one `value`."""
    numbers = np.ones(SHAPE, dtype)
    numbers[0, 0, 0] = 0
    numbers[2, 3, 4] = value
    return numbers


# name: (image, mask, exception, what the message must contain)
ARRAYS = {
    "rank 2": (image(shape=(10, 12)), mask((10, 12)), ValueError, ["image", "z, y, x", r"10, 12"]),
    "rank 5": (image(shape=(1, 1, 4, 5, 6)), mask((1, 1, 4, 5, 6)), ValueError, ["image", r"1, 1, 4, 5, 6"]),
    "rank 0": (np.full((), 0.1, np.float32), np.ones((), bool), ValueError, ["image|shape"]),
    "no voxel": (image(shape=(0, 4, 4)), mask((0, 4, 4)), ValueError, ["image|shape", "0"]),
    "mask of another shape": (
        image(),
        mask((4, 10, 11)),
        ValueError,
        ["lung_mask", r"4, 10, 12", r"4, 10, 11"],
    ),
    "mask without the batch axis": (
        image(shape=(2, *SHAPE)),
        mask(),
        ValueError,
        ["lung_mask", r"2, 4, 10, 12"],
    ),
    "empty mask": (image(), ~mask(), ValueError, ["lung_mask", "empty|no voxel"]),
    "mask of 2": (image(), number_mask(2), ValueError, ["lung_mask", "0 and 1|binary", r"\b2\b"]),
    "mask of -1": (image(), number_mask(-1), ValueError, ["lung_mask", "-1"]),
    "mask of 255": (image(), number_mask(255, np.uint8), ValueError, ["lung_mask", "255"]),
    "mask of 0.5": (image(), number_mask(0.5, np.float32), ValueError, ["lung_mask", r"0\.5"]),
    "mask of NaN": (image(), number_mask(np.nan, np.float32), ValueError, ["lung_mask", "nan"]),
    "mask of text": (image(), np.full(SHAPE, "1"), (TypeError, ValueError), ["lung_mask"]),
    "complex mask": (image(), mask().astype(complex), (TypeError, ValueError), ["lung_mask", "complex"]),
    "NaN": (with_voxel(np.nan), mask(), ValueError, ["image", "(?i)nan"]),
    "NaN, float64": (with_voxel(np.nan, np.float64, (3, 9, 11)), mask(), ValueError, ["image", "(?i)nan"]),
    "infinite": (with_voxel(np.inf), mask(), ValueError, ["image", "inf"]),
    "minus infinite": (with_voxel(-np.inf, at=(0, 0, 0)), mask(), ValueError, ["image", "inf"]),
    "HU": (with_voxel(-1000.0), mask(), ValueError, ["image", r"\[0, 1\]", "-1000", "window_hu"]),
    "bright HU": (with_voxel(400.0), mask(), ValueError, ["image", r"\[0, 1\]", "400", "window_hu"]),
    "a little above 1": (with_voxel(1.001), mask(), ValueError, ["image", r"\[0, 1\]", r"1\.001"]),
    "a little below 0": (with_voxel(-0.001), mask(), ValueError, ["image", r"\[0, 1\]", r"-0\.001"]),
    "integers": (image(0, np.int32), mask(), TypeError, ["image", "float32", "int32"]),
    "bool": (mask(), mask(), TypeError, ["image", "float32", "bool"]),
    "long double": (
        image(dtype=np.longdouble),
        mask(),
        TypeError,
        ["image", "float32", "float(96|128)|long"],
    ),
    "complex": (image(dtype=np.complex64), mask(), TypeError, ["image", "complex64"]),
    "objects": (image().astype(object), mask(), TypeError, ["image", "object"]),
    "list": ([[[0.1]]], mask((1, 1, 1)), TypeError, ["image", "list"]),
    "none": (None, mask(), TypeError, ["image", "None"]),
    "mask is a list": (image(shape=(1, 1, 1)), [[[True]]], TypeError, ["lung_mask", "list"]),
    "big-endian image": (image().astype(">f4"), mask(), TypeError, ["image", ">f4|byte|endian"]),
}


def check(error: type[Exception] | tuple[type[Exception], ...], words: list[str], call) -> None:
    """Fail unless `call` raises `error` with a message that has every pattern."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert re.search(word, message), f"{word!r} is not in {message!r}"


@pytest.mark.parametrize("name", ARRAYS)
def test_array(name) -> None:
    """Both ways in check alike."""
    volume, lungs, error, words = ARRAYS[name]
    index = [0, 1] if np.ndim(volume) == 4 else 0
    check(error, words, lambda: SYNTH(volume, lungs, index=index))
    check(error, words, lambda: SYNTH.render(SYNTH.sample(index=index), volume, lungs))


@pytest.mark.parametrize("at", [(0, 0, 0), (3, 9, 11)])
def test_a_bad_voxel_of_any_batch_item_is_found(at) -> None:
    """Also outside the mask: the whole image is read."""
    lungs = mask((3, *SHAPE))
    lungs[(2, *at)] = False
    for value in (np.nan, 7.0):
        volume = image(shape=(3, *SHAPE))
        volume[(2, *at)] = value
        check(ValueError, ["image", "nan|7"], lambda volume=volume: SYNTH(volume, lungs, index=[0, 1, 2]))


def test_one_empty_mask_of_a_batch_is_found() -> None:
    """A batch item without lung cannot hold a lesion."""
    lungs = mask((2, *SHAPE))
    lungs[1] = False
    check(ValueError, ["lung_mask", "empty"], lambda: SYNTH(image(shape=(2, *SHAPE)), lungs, index=[0, 1]))


def test_the_edges_of_the_ranges_are_fine() -> None:
    """0 and 1 are in [0, 1]; one voxel is a lung; the last seed and index are words."""
    for value in (0.0, 1.0, -0.0):
        SYNTH(image(value), mask(), index=0)
    SYNTH(image(shape=(1, 1, 1)), mask((1, 1, 1)), index=2**32 - 1, lung_fraction=1)
    ls.LesionSynthesizer(small_config(), seed=2**32 - 1)(image(), mask(), index=0, lung_fraction=1e-9)


@pytest.mark.parametrize("library", ["image", "lung_mask"])
def test_mixed_libraries(library) -> None:
    """Image and mask must come from one library."""
    torch = pytest.importorskip("torch")
    volume, lungs = image(), mask()
    if library == "image":
        volume = torch.from_numpy(volume)
    else:
        lungs = torch.from_numpy(lungs)
    check(TypeError, ["lung_mask", "same library|numpy", "torch"], lambda: SYNTH(volume, lungs, index=0))


def test_torch_tensors() -> None:
    """A tensor in a graph, on no device, or of integers."""
    torch = pytest.importorskip("torch")
    lungs = torch.ones(SHAPE, dtype=torch.bool)
    grad = torch.zeros(SHAPE, requires_grad=True)
    check((TypeError, ValueError), ["image", "requires_grad|detach"], lambda: SYNTH(grad, lungs, index=0))
    meta = torch.zeros(SHAPE, device="meta")
    check((TypeError, ValueError), ["image", "meta"], lambda: SYNTH(meta, lungs, index=0))
    whole = torch.zeros(SHAPE, dtype=torch.int32)
    check(TypeError, ["image", "float32", "int32"], lambda: SYNTH(whole, lungs, index=0))
    brain = torch.zeros(SHAPE, dtype=torch.bfloat16)
    check((TypeError, ValueError), ["image", "dtype", "bfloat16"], lambda: SYNTH(brain, lungs, index=0))
    sparse = torch.zeros(SHAPE).to_sparse()
    check((TypeError, ValueError), ["image"], lambda: SYNTH(sparse, lungs, index=0))


class OnCuda:
    """Looks like an array on a CUDA device to DLPack."""

    shape, ndim, dtype = SHAPE, 3, np.dtype(np.float32)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return kDLCUDA, device 0."""
        return (2, 0)

    def __dlpack__(self, **_: object) -> object:
        """Refuse, as nothing may ask before it has looked at the device."""
        raise AssertionError("__dlpack__ was called")


def test_cuda_where_there_is_none() -> None:
    """An array on a device that this build or machine cannot serve."""
    check(
        (TypeError, ValueError, RuntimeError),
        ["image|lung_mask", "(?i)cuda"],
        lambda: SYNTH(OnCuda(), OnCuda(), index=0),
    )


# --- numbers ---


@pytest.mark.parametrize("value", [-1, 2**32, 2**63])
@pytest.mark.parametrize("name", ["seed", "index"])
def test_word_out_of_range(name, value) -> None:
    """Seeds and indices are 32-bit words of Philox; none is wrapped silently."""
    if name == "seed":
        check(ValueError, ["seed", str(value)], lambda: ls.LesionSynthesizer(small_config(), seed=value))
    else:
        check(ValueError, ["index", str(value)], lambda: SYNTH.sample(index=value))
        check(ValueError, ["index", str(value)], lambda: SYNTH(image(), mask(), index=value))


@pytest.mark.parametrize("value", [0.5, 1.0, "3", None, True, float("nan"), 1j])
@pytest.mark.parametrize("name", ["seed", "index"])
def test_word_of_a_wrong_type(name, value) -> None:
    """A fraction, a string, a flag are no index."""
    words = [name, "integer", type(value).__name__]
    if name == "seed":
        check(TypeError, words, lambda: ls.LesionSynthesizer(small_config(), seed=value))
    else:
        check(TypeError, words, lambda: SYNTH.sample(index=value))


@pytest.mark.parametrize("kind", [np.int64, np.uint32, np.int8, np.uint64])
def test_numpy_integers_are_integers(kind) -> None:
    """The plan holds Python's, which JSON can write."""
    drawn = SYNTH.sample(index=kind(7), lung_fraction=np.float32(0.5))
    assert drawn == SYNTH.sample(index=7, lung_fraction=0.5)
    assert type(drawn.index) is int
    assert ls.LesionPlan.from_json(drawn.to_json()) == drawn


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.0001, 2, float("nan"), float("inf")])
def test_lung_fraction_out_of_range(value) -> None:
    """λ is a share of the largest lung: in (0, 1]."""
    check(
        ValueError,
        ["lung_fraction", re.escape(str(value))],
        lambda: SYNTH.sample(index=0, lung_fraction=value),
    )


@pytest.mark.parametrize("value", ["0.5", b"1", 1j])
def test_lung_fraction_of_a_wrong_type(value) -> None:
    """Text is no fraction."""
    check(
        TypeError,
        ["lung_fraction", "number", type(value).__name__],
        lambda: SYNTH.sample(index=0, lung_fraction=value),
    )


def test_batch_lengths() -> None:
    """One index per item, and one λ per item or one for all."""
    volume, lungs = image(shape=(3, *SHAPE)), mask((3, *SHAPE))
    check(ValueError, ["index", "3", "2"], lambda: SYNTH(volume, lungs, index=[0, 1]))
    check((TypeError, ValueError), ["index", "batch", "int"], lambda: SYNTH(volume, lungs, index=0))
    check((TypeError, ValueError), ["index"], lambda: SYNTH(image(), mask(), index=[0]))
    check(
        ValueError,
        ["lung_fraction", "3", "2"],
        lambda: SYNTH(volume, lungs, index=[0, 1, 2], lung_fraction=[0.5, 0.5]),
    )
    check(ValueError, ["plan", "3", "2"], lambda: SYNTH.render(SYNTH.sample(index=[0, 1]), volume, lungs))
    check((TypeError, ValueError), ["plan"], lambda: SYNTH.render(SYNTH.sample(index=0), volume, lungs))
    check((TypeError, ValueError), ["plan"], lambda: SYNTH.render([SYNTH.sample(index=0)], image(), mask()))
    check((TypeError, ValueError), ["plan"], lambda: SYNTH.render("no plan", image(), mask()))
    check((TypeError, ValueError), ["plan"], lambda: SYNTH.render([1, 2, 3], volume, lungs))


def test_plan_of_another_shape() -> None:
    """A plan drawn for one volume is not rendered into another unnoticed."""
    drawn = SYNTH.sample(index=0, shape=(5, 10, 12))
    check(ValueError, ["plan", r"5, 10, 12", r"4, 10, 12"], lambda: SYNTH.render(drawn, image(), mask()))


def test_centre_outside_the_volume() -> None:
    """A centre that an edit moved out of the volume."""
    away = plan(blob(center=(4, 3, 3)), shape=None)
    check(ValueError, ["center", r"4, 3, 3", r"4, 10, 12"], lambda: renderer().render(away, image(), mask()))


def test_a_lattice_without_end() -> None:
    """A fine warp that carries a small blob far is refused, not left to run out of memory."""
    wild = blob(semi_axes=(0.05,) * 3, warp_amplitude=1e4, warp_correlation=0.1, center=(1, 2, 3))
    check(
        ValueError,
        ["warp_correlation", r"0\.1", "nodes"],
        lambda: renderer().render(plan(wild, shape=None), image(), mask()),
    )


@pytest.mark.parametrize("radius", [0.05, 1e-4, 1e-9])
def test_blobs_far_smaller_than_a_voxel(radius) -> None:
    """One voxel, at once: the lattice of a warp is as fine as the blob, and is not laid over whole voxels."""
    tiny = blob(semi_axes=(radius,) * 3, warp_amplitude=0.0, warp_correlation=0.1, center=(1, 2, 3))
    with at_once(61):
        pair = renderer().render(plan(tiny, shape=None), image(), mask())
    assert pair.labels.sum() == pair.labels[1, 2, 3] == 1


@pytest.mark.parametrize(
    "value", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0), (1.0, float("nan"), 1.0), (1, 1, float("inf"))]
)
def test_spacing(value) -> None:
    """Spacing is three positive lengths, in the configuration and in a call."""
    words = ["spacing", "positive", re.escape(repr(value))]
    check(ValueError, words, lambda: small_config(lengths="mm", spacing=value))
    thick = ls.LesionSynthesizer(small_config(lengths="mm"), seed=0)
    check(ValueError, words, lambda: thick.sample(index=0, spacing=value))
    check(ValueError, words, lambda: thick(image(), mask(), index=0, spacing=value))


@pytest.mark.parametrize("value", [1.0, "abc", ("1", 1.0, 1.0), [1.0, 1.0]])
def test_spacing_that_is_none(value) -> None:
    """One number for three axes, text, a list of two."""
    check((TypeError, ValueError), ["spacing"], lambda: small_config(lengths="mm", spacing=value))
    check((TypeError, ValueError), ["spacing"], lambda: SYNTH.sample(index=0, spacing=value))


@pytest.mark.parametrize("value", [-1, 0, 1.5, "2"])
def test_threads(value) -> None:
    """At least one thread."""
    words = ["threads", re.escape(repr(value))]
    check((TypeError, ValueError), words, lambda: ls.LesionSynthesizer(small_config(), seed=0, threads=value))


def test_config_is_a_config() -> None:
    """A preset's function instead of its value, or a dictionary."""
    check(TypeError, ["config", "LesionConfig"], lambda: ls.LesionSynthesizer(ls.presets.covid_lung, seed=0))
    check(TypeError, ["config", "LesionConfig"], lambda: ls.LesionSynthesizer({}, seed=0))


# --- configurations ---


CONFIGS = {
    "radius reversed": (
        lambda: ls.BlobClass(count=(1, 2), radius=(10.0, 3.0)),
        ["radius", "low <= high", r"10\.0, 3\.0"],
    ),
    "radius zero": (lambda: ls.BlobClass(count=(1, 2), radius=(0.0, 3.0)), ["radius", "> 0", r"0\.0, 3\.0"]),
    "radius NaN": (
        lambda: ls.BlobClass(count=(1, 2), radius=(1.0, float("nan"))),
        ["radius", "finite", "nan"],
    ),
    "radius one number": (lambda: ls.BlobClass(count=(1, 2), radius=3.0), ["radius", "pair", r"3\.0"]),
    "count reversed": (lambda: ls.BlobClass(count=(9.0, 2.0), radius=(1.0, 3.0)), ["count", r"9\.0, 2\.0"]),
    "count negative": (
        lambda: ls.BlobClass(count=(-1.0, 2.0), radius=(1.0, 3.0)),
        ["count", ">= 0", r"-1\.0"],
    ),
    "count infinite": (lambda: ls.BlobClass(count=(1.0, float("inf")), radius=(1.0, 3.0)), ["count", "inf"]),
    "no count": (lambda: ls.BlobClass(radius=(1.0, 3.0)), ["count", "probability"]),
    "both": (
        lambda: ls.BlobClass(count=(1, 2), probability=0.1, radius=(1.0, 3.0)),
        ["count", "probability", r"0\.1"],
    ),
    "probability 2": (
        lambda: ls.BlobClass(probability=2.0, radius=(1.0, 3.0)),
        ["probability", r"\[0, 1\]", r"2\.0"],
    ),
    "sigma_a reversed": (lambda: ls.Texture(sigma_a=(20.0, 2.0)), ["sigma_a", r"20\.0, 2\.0"]),
    "sigma_b zero": (lambda: ls.Texture(sigma_b_low=(0.0, 2.0)), ["sigma_b_low", r"0\.0, 2\.0"]),
    "sigma_b reversed": (lambda: ls.Texture(sigma_b_high=(5.0, 2.0)), ["sigma_b_high", r"5\.0, 2\.0"]),
    "a_range above 1": (lambda: ls.Texture(a_range=(0.0, 1.5)), ["a_range", r"1\.5"]),
    "a_range reversed": (lambda: ls.Texture(a_range=(0.3, 0.0)), ["a_range", r"0\.3, 0\.0"]),
    "gap wider than range": (lambda: ls.Texture(a_min_gap=0.4), ["a_min_gap", r"0\.3", r"0\.4"]),
    "gap negative": (lambda: ls.Texture(a_min_gap=-0.1), ["a_min_gap", r"-0\.1"]),
    "p above 1": (lambda: ls.Texture(p_sigma_b_low=1.1), ["p_sigma_b_low", r"\[0, 1\]", r"1\.1"]),
    "mu0 zero": (lambda: ls.Texture(mu0=(0.0, 0.5)), ["mu0", r"0\.0, 0\.5"]),
    "mu0 above 1": (lambda: ls.Texture(mu0=(0.4, 1.5)), ["mu0", r"1\.5"]),
    "threshold 0": (lambda: ls.Texture(mean_threshold=0.0), ["mean_threshold", r"0\.0"]),
    "warp negative": (lambda: ls.Warp(amplitude=(-0.1, 1.0)), ["amplitude", r"-0\.1"]),
    "warp reversed": (lambda: ls.Warp(amplitude=(1.0, 0.5)), ["amplitude", r"1\.0, 0\.5"]),
    "lattice of nothing": (lambda: ls.Warp(correlation=(0.0, 1.0)), ["correlation", r"0\.0, 1\.0"]),
    "connectivity": (lambda: ls.LesionConfig(connectivity=8), ["connectivity", "6, 18, 26", "8"]),
    "hu_range reversed": (lambda: ls.LesionConfig(hu_range=(100.0, -800.0)), ["hu_range", "100.0, -800.0"]),
    "threshold outside": (lambda: ls.LesionConfig(hu_threshold=200.0), ["hu_threshold", "200"]),
    "threshold NaN": (lambda: ls.LesionConfig(hu_threshold=float("nan")), ["hu_threshold", "nan"]),
    "lengths": (lambda: ls.LesionConfig(lengths="cm"), ["lengths", "mm", "cm"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name) -> None:
    """A field that leaves its domain is named at once, not when it is first used."""
    make, words = CONFIGS[name]
    check(ValueError, words, make)


PARTS = {
    "small": lambda: ls.LesionConfig(small=3),
    "texture": lambda: ls.LesionConfig(texture=None),
    "warp": lambda: ls.LesionConfig(warp=1.0),
    "radius": lambda: ls.BlobClass(count=(1, 2), radius=("1", 2)),
    "blobs": lambda: plan(blobs=(1,)),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_wrong_type(name) -> None:
    """A number where a part of the configuration or plan belongs is named when it is put there."""
    check((TypeError, ValueError), [name], PARTS[name])


def test_window() -> None:
    """`window_hu` and `threshold` refuse a window that is none."""
    for bad in ((100.0, -800.0), (5.0, 5.0)):
        check(
            ValueError,
            ["hu_range", str(bad[0])],
            lambda bad=bad: ls.window_hu(np.zeros((1, 2, 3)), hu_range=bad),
        )
    np.testing.assert_allclose(ls.threshold(hu=-500), 1 / 3, rtol=1e-15)
    got = ls.window_hu(np.array([[[-3000, -800, -500, 100, 3000]]], np.int16))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0, 0], [0, 0, 1 / 3, 1, 1], rtol=1e-7)
