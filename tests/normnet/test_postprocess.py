"""Post-processing against plain SciPy in float64, and what its words promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

torch = pytest.importorskip("torch")

import lesionsynth as ls  # noqa: E402
from normnet.config import PostprocessConfig  # noqa: E402
from normnet.postprocess import postprocess, postprocess_slices, raw_lesions  # noqa: E402
from tests.conftest import draw_lungs  # noqa: E402

DEFAULT = PostprocessConfig()


def patient(seed: int = 0, shape: tuple[int, int, int] = (14, 40, 44)):
    """Lungs with noise, two blobs of dense tissue with a faint rim, and a vote on bright voxels at random."""
    rng = np.random.default_rng(seed)
    image, mask = draw_lungs(shape, seed)
    points = np.moveaxis(np.indices(shape), 0, -1)
    for _ in range(2):
        centre = np.argwhere(mask)[rng.integers(mask.sum())]
        distance = np.sqrt(((points - centre) ** 2).sum(-1))
        image = np.maximum(image, np.clip(0.9 - 0.06 * distance, 0, 1) * mask)
    image = (image * mask).astype(np.float32)
    healthy = mask & (image >= 1 / 3) & (rng.random(shape) < 0.4)
    return image, mask, healthy


def oracle(image, mask, healthy, config):
    """PAPER.md III-D in float64; also the smallest distance of a mean from its threshold."""
    tau = np.float32(((-500 if config.threshold_hu is None else config.threshold_hu) + 800) / 900)
    left = mask & ~healthy
    d = (left & (image >= tau)).astype(float)
    f = np.where(left, image, 0).astype(float)
    smooth_d = ndimage.uniform_filter(d, config.bright_size, mode="reflect")
    smooth_f = ndimage.uniform_filter(f, config.full_size, mode="reflect")
    full_threshold = config.full_threshold
    if full_threshold is None:  # the paper's, but for low T
        full_threshold = min(0.15, 0.75 * (((config.threshold_hu or -500) + 800) / 900))
    g = (smooth_f > full_threshold) & mask
    e = (smooth_d > config.bright_threshold) & g
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[config.connectivity])
    final = e
    for _ in range(config.growth_iterations if config.growth_iterations >= 0 else image.size):
        grown = (ndimage.binary_dilation(final, structure) & g) | final
        if (grown == final).all():
            break
        final = grown
    margin = min(np.abs(smooth_d - config.bright_threshold).min(), np.abs(smooth_f - full_threshold).min())
    return final, e, margin


@given(
    seed=st.integers(0, 50),
    sizes=st.tuples(st.sampled_from([1, 3, 4, 9]), st.sampled_from([1, 2, 7])),
    growth=st.sampled_from([-1, 0, 1, 3, 8]),
    connectivity=st.sampled_from([6, 18, 26]),
)
def test_postprocess_is_scipy_s(seed, sizes, growth, connectivity):
    config = PostprocessConfig(
        bright_size=sizes[0], full_size=sizes[1], growth_iterations=growth, connectivity=connectivity
    )
    image, mask, healthy = patient(seed)
    final, core, margin = oracle(image, mask, healthy, config)
    # A mean closer to its threshold than float32 resolves there (1.5e-8 at 0.2) may fall on either side.
    if margin < 3e-8:
        return
    found = postprocess(image, mask, healthy, config)
    np.testing.assert_array_equal(found.core, core)
    np.testing.assert_array_equal(found.final, final)


@given(seed=st.integers(0, 20), chunk=st.integers(1, 30), sizes=st.sampled_from([(9, 7), (4, 11), (1, 2)]))
def test_chunks_change_no_voxel(seed, chunk, sizes):
    image, mask, healthy = patient(seed, (25, 30, 33))
    mask[:5] = mask[22:] = False  # the lungs' box is smaller than the volume
    # values far below 1.5e-5 too, whose sums in another order would differ in their last bits
    image = (image * mask * np.where(np.arange(33) % 3, 1, np.float32(1.7e-7))).astype(np.float32)
    config = PostprocessConfig(bright_size=sizes[0], full_size=sizes[1])
    asked = []

    def read(first, last):
        asked.append(last - first)
        return image[first:last]

    found = postprocess_slices(read, mask, healthy, config, chunk=chunk)
    whole = postprocess_slices(lambda a, b: image[a:b], mask, healthy, config, chunk=1000)
    np.testing.assert_array_equal(found.core, whole.core)
    np.testing.assert_array_equal(found.final, whole.final)
    assert max(asked) <= chunk + 2 * max(sizes)


def test_chunks_change_no_voxel_on_the_threshold_itself():
    """Every mean lies half-way between the threshold and the next float32: a residue of 1e-17 decides."""
    level = np.nextafter(np.float32(0.15), np.float32(1))
    assert level.view(np.uint32) % 2 == 1  # ties go to the even neighbour, which is above
    image = np.full((60, 12, 12), level)
    image[::4, ::4, ::4] += 32 * np.spacing(level)  # one voxel in 64: the mean is half a step above
    # lost beside these ones, and left over in a running sum when the ones leave it
    image[2:12] = 1e-12 * np.random.default_rng(0).random((10, 12, 12))
    image[5] = 1.0
    mask, healthy = np.ones(image.shape, bool), np.zeros(image.shape, bool)
    config = PostprocessConfig(
        threshold_hu=-799, bright_size=1, bright_threshold=0, full_size=4, full_threshold=float(level)
    )
    for chunk in (5, 12, 1000):
        core = postprocess_slices(lambda a, b: image[a:b], mask, healthy, config, chunk=chunk).core
        assert core[16:-4, 4:-4, 4:-4].all()


@pytest.mark.parametrize(("level", "threshold"), [(-300.0, 0.15), (None, 0.15), (-700.0, 0.75 / 9)])
def test_the_full_threshold_is_the_paper_s_unless_tau_is_low(level, threshold):
    image, mask, healthy = patient(3)
    usual = postprocess(image, mask, healthy, PostprocessConfig(threshold_hu=level))
    same = PostprocessConfig(threshold_hu=level, full_threshold=threshold)
    np.testing.assert_array_equal(usual.final, postprocess(image, mask, healthy, same).final)
    other = PostprocessConfig(threshold_hu=level, full_threshold=0.12)
    assert (usual.final != postprocess(image, mask, healthy, other).final).any()


def test_tensors_are_numpy_s_twins():
    for seed in range(4):
        arrays = patient(seed)
        expected = postprocess(*arrays)
        found = postprocess(*(torch.from_numpy(a) for a in arrays))
        for tensor, array in zip(found, expected, strict=True):
            assert isinstance(tensor, torch.Tensor)
            assert tensor.dtype == torch.bool
            np.testing.assert_array_equal(tensor.numpy(), array)
        assert expected.core.any()
        bright, full = raw_lesions(*(torch.from_numpy(a) for a in arrays), ls.threshold())
        for tensor, array in zip((bright, full), raw_lesions(*arrays, ls.threshold()), strict=True):
            np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.gpu
def test_a_gpu_gives_the_cpu_s_voxels():
    pytest.importorskip("cupy")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for seed, connectivity, growth in ((0, 6, 8), (1, 18, -1), (2, 26, 0)):
        config = replace(DEFAULT, connectivity=connectivity, growth_iterations=growth)
        arrays = patient(seed, (60, 70, 80))
        expected = postprocess(*arrays, config)
        found = postprocess(*(torch.from_numpy(a).cuda() for a in arrays), config)
        for tensor, array in zip(found, expected, strict=True):
            assert tensor.is_cuda
            np.testing.assert_array_equal(tensor.cpu().numpy(), array)


def test_the_cases_of_the_oracle_are_not_empty():
    image, mask, healthy = patient(0)
    final, core, _ = oracle(image, mask, healthy, DEFAULT)
    assert 0 < core.sum() < final.sum() < mask.sum()


def test_lungs_that_touch_the_border_of_the_volume():
    image, mask, healthy = patient(3, (14, 40, 44))
    part = (slice(4, 10), slice(10, 30), slice(5, 40))
    cut = [np.ascontiguousarray(a[part]) for a in (image, mask, healthy)]
    assert cut[1][0].any()
    assert cut[1][-1].any()
    np.testing.assert_array_equal(postprocess(*cut).final, oracle(*cut, DEFAULT)[0])


def test_empty_space_around_the_lungs_changes_nothing():
    image, mask, healthy = patient(1)
    wide = [np.pad(a, ((11, 15), (12, 13), (10, 17))) for a in (image, mask, healthy)]
    bare = [np.pad(a, 10) for a in (image, mask, healthy)]
    inner = (slice(11, -15), slice(12, -13), slice(10, -17))
    np.testing.assert_array_equal(
        postprocess(*wide).final[inner], postprocess(*bare).final[10:-10, 10:-10, 10:-10]
    )


def test_raw_lesions_are_what_is_left():
    image, mask, healthy = patient(2)
    bright, full = raw_lesions(image, mask, healthy, ls.threshold())
    for at in np.argwhere(mask)[::7]:
        here = tuple(at)
        assert bright[here] == (image[here] >= np.float32(1 / 3) and not healthy[here])
        assert full[here] == (0 if healthy[here] else image[here])
    assert not bright[~mask].any()
    assert not full[~mask].any()


def test_a_lesion_grows_into_its_faint_rim_and_not_across_a_gap():
    image = np.zeros((20, 30, 60), np.float32)
    mask = np.ones(image.shape, bool)
    image[:, 5:25, 5:20] = 0.8  # dense
    image[:, 5:25, 20:30] = 0.25  # below tau: the network says nothing here
    image[:, 5:25, 45:55] = 0.25  # as faint, but apart
    found = postprocess(image, mask, np.zeros(mask.shape, bool), replace(DEFAULT, growth_iterations=-1))
    assert not found.core[:, :, 24:].any()
    assert found.final[10, 15, 28]
    assert not found.final[:, :, 40:].any()
    limited = postprocess(image, mask, np.zeros(mask.shape, bool), replace(DEFAULT, growth_iterations=2))
    assert found.core.sum() < limited.final.sum() < found.final.sum()


def test_healthy_lungs_have_no_lesions():
    image, mask, _ = patient(0)
    found = postprocess(image, mask, mask)
    assert not found.final.any()
    assert not postprocess(image, np.zeros_like(mask), mask).final.any()


def test_inputs_are_not_written():
    arrays = patient(0)
    for array in arrays:
        array.setflags(write=False)
    postprocess(*arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 4), np.float32)}, r"image must be \(z, y, x\), got shape \(4, 4\)"),
        ({"healthy": np.zeros((1, 2, 3), bool)}, "healthy must have the shape of image"),
        ({"lung_mask": np.ones((14, 40, 44))}, "lung_mask must be bool, got float64"),
        ({"image": np.ones((14, 40, 44))}, "image must be float32, got float64"),
    ],
)
def test_bad_input(change, message):
    image, mask, healthy = patient(0)
    with pytest.raises(ValueError, match=message):
        postprocess(**{"image": image, "lung_mask": mask, "healthy": healthy, **change})


def test_arrays_and_tensors_are_not_mixed():
    image, mask, healthy = patient(0)
    with pytest.raises(TypeError, match=r"all be NumPy arrays or all torch tensors, healthy is Tensor"):
        postprocess(image, mask, torch.from_numpy(healthy))
    with pytest.raises(ValueError, match=r"lung_mask must be bool, got torch\.uint8"):
        postprocess(*(torch.from_numpy(a) for a in (image, mask.astype(np.uint8), healthy)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bright_size": 0}, "bright_size must be >= 1, got 0"),
        ({"full_threshold": 1.5}, r"full_threshold must be <= 1, got 1.5"),
        ({"connectivity": 8}, "connectivity must be 6, 18 or 26, got 8"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        PostprocessConfig(**change)
