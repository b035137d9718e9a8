"""Prediction: slabs, vote, and results that land on the input's own grid."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
sitk = pytest.importorskip("SimpleITK")

import lesionsynth as ls  # noqa: E402
from lesionsynth.io import Scan, read_ct  # noqa: E402
from normnet import predict  # noqa: E402
from normnet.config import (  # noqa: E402
    ModelConfig,
    PostprocessConfig,
    PredictConfig,
    from_json,
    to_json,
)
from normnet.model import Model, build_unet  # noqa: E402
from normnet.output import read_record  # noqa: E402
from normnet.postprocess import postprocess  # noqa: E402
from normnet.predict import slide, tiles  # noqa: E402
from normnet.prepare import load_case  # noqa: E402
from tests import classical  # noqa: E402
from tests.conftest import draw_lungs, played  # noqa: E402
from tests.normnet.test_dicom_seg import voxels_of, write_series  # noqa: E402

EXACT = PredictConfig(precision="fp32", slab=8)
CPU = torch.device("cpu")


class Pointwise(torch.nn.Module):
    """A network that looks at one voxel: logit = slope (x - centre)."""

    def __init__(self, slope: float = 12.0, centre: float = 0.5) -> None:
        super().__init__()
        self.slope, self.centre = slope, centre
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        return self.slope * (x - self.centre)


def pointwise(slope: float = 12.0, centre: float = 0.5, **settings: Any) -> Model:
    return played(Pointwise(slope, centre), **settings)


def probabilities(image, models, config, mask=None, device=CPU) -> np.ndarray:
    """Return all that `slide` hands out, as one array (models, z, y, x)."""
    mask = np.ones(image.shape, bool) if mask is None else mask
    blocks = slide(lambda first, last: image[first:last], mask, models, config, device)
    return np.concatenate([block.cpu().numpy() for _, block in blocks], axis=1)


def to_hu(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """HU that the window brings back to the image, with soft tissue around the lungs."""
    return np.where(mask, np.rint(image * 900 - 800), 40).astype(np.int16)


def patient(shape=(21, 40, 44), seed=0):
    image, mask = draw_lungs(shape, seed)
    centre = np.argwhere(mask)[mask.sum() // 2]
    distance = np.sqrt(((np.moveaxis(np.indices(shape), 0, -1) - centre) ** 2).sum(-1))
    image = np.maximum(image, np.clip(0.8 - 0.05 * distance, 0, 1) * mask)
    return to_hu(image, mask), mask


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("depth", [3, 8, 21])
def test_slabs_of_a_pointwise_network_are_the_whole_volume(depth, overlap):
    image = np.random.default_rng(0).random((depth, 7, 9), dtype=np.float32)
    found = probabilities(image, [pointwise()], replace(EXACT, overlap=overlap))[0]
    whole = 1 / (1 + np.exp(-12.0 * (image.astype(np.float64) - 0.5)))
    # float32 logits up to 6 (error 5e-7) through a slope of 1/4, and a weighted mean
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_a_slab_has_the_configured_depth_and_fits_the_network():
    config = ModelConfig(channels=(4, 8, 8), strides=(2, 2))
    model = Model(build_unet(config), config)
    found = probabilities(np.ones((19, 13, 18), np.float32), [model], EXACT)
    assert found.shape == (1, 19, 13, 18)
    probe = pointwise()
    probabilities(np.ones((19, 13, 18), np.float32), [probe], EXACT)
    assert {shape[2] for shape in probe.network.shapes} == {8}


def test_slabs_are_averaged_by_their_distance_to_the_ends():
    class Counter(torch.nn.Module):
        """Answer with the probability 0.1, 0.2, ... of the call."""

        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.full_like(x, float(np.log(0.1 * self.calls / (1 - 0.1 * self.calls))))

    found = probabilities(np.ones((12, 1, 1), np.float32), [played(Counter())], EXACT)[0, :, 0, 0]
    first, second = [1, 2, 3, 4, 4, 3, 2, 1], [1, 2, 3, 4, 4, 3, 2, 1]
    expected = []
    for z in range(12):
        a, b = (first[z] if z < 8 else 0), (second[z - 4] if z >= 4 else 0)
        expected.append((0.1 * a + 0.2 * b) / (a + b))
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 sums of three terms


def test_vote_of_three_models_against_a_plain_loop():
    hu, mask = patient()
    models = [pointwise(centre=c, slope=40.0) for c in (0.35, 0.5, 0.65)]
    found = predict.predict_volume(hu, mask, models, EXACT)
    image = ls.window_hu(hu) * mask
    healthy, mean = np.zeros(hu.shape, bool), np.zeros(hu.shape)
    for at in np.argwhere(mask):
        here = tuple(at)
        chances = [1 / (1 + np.exp(-40.0 * (float(image[here]) - c))) for c in (0.35, 0.5, 0.65)]
        mean[here] = sum(chances) / 3
        bright = image[here] >= np.float32(1 / 3)
        healthy[here] = bright and sum(p > 0.95 for p in chances) >= 2
    np.testing.assert_array_equal(found.healthy, healthy)
    assert 0 < healthy.sum() < mask.sum()
    np.testing.assert_allclose(found.probability, mean, atol=2e-6)  # float32 logits up to 26
    expected = postprocess(image, mask, healthy, EXACT.postprocess)
    np.testing.assert_array_equal(found.lesions, expected.final)
    np.testing.assert_array_equal(found.lesions_without_growing, expected.core)


def test_models_are_asked_about_the_tissue_they_were_trained_on():
    """T comes with the weights: a network trained for -700 HU says nothing else of what is brighter."""
    hu, mask = patient()
    # healthy, whatever is asked
    models = [pointwise(centre=0.05, slope=400.0, threshold_hu=-700.0) for _ in range(2)]
    found = predict.predict_volume(hu, mask, models, EXACT)
    image = ls.window_hu(hu) * mask
    np.testing.assert_array_equal(found.healthy, mask & (image >= np.float32(100 / 900)))
    assert found.healthy.sum() > (mask & (image >= np.float32(1 / 3))).sum()
    higher = replace(EXACT, postprocess=replace(EXACT.postprocess, threshold_hu=-400.0))
    found = predict.predict_volume(hu, mask, models, higher)
    np.testing.assert_array_equal(found.healthy, mask & (image >= np.float32(400 / 900)))
    models[1].threshold_hu = -600.0
    with pytest.raises(ValueError, match=r"one threshold_hu unless .* is given, got -700, -600"):
        predict.predict_volume(hu, mask, models, EXACT)


def test_votes_of_networks_in_tiles_are_those_of_whole_maps():
    """Three calibrated networks: full probability maps in memory, then thresholds, majority and mean."""
    config = ModelConfig(channels=(4, 8), strides=(2,))
    settings = replace(EXACT, probability="calibrated", tile=32)
    hu, mask = patient((19, 60, 76))
    hu[:3], mask[:3] = -1000, False
    models, levels = [], (0.49, 0.5, 0.505)
    for seed, level in enumerate(levels):
        torch.manual_seed(seed)
        models.append(Model(build_unet(config), config, calibration={"probability": level, "dice": 0.5}))
    found = predict.predict_volume(hu, mask, models, settings)
    image = ls.window_hu(hu) * mask
    rows, columns = (np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    box = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    maps = np.zeros((3, *mask.shape), np.float32)
    for one, model in zip(maps, models, strict=True):
        one[box] = probabilities(image[box], [model], settings)[0]
    votes = sum((one > np.float32(level)).astype(int) for one, level in zip(maps, levels, strict=True))
    healthy = (votes >= 2) & mask & (image >= np.float32(1 / 3))
    np.testing.assert_array_equal(found.healthy, healthy)
    bright = mask & (image >= np.float32(1 / 3))
    assert 0.05 < healthy[bright].mean() < 0.95
    np.testing.assert_allclose(found.probability, maps.mean(axis=0) * mask, atol=1e-6)  # float32 means
    bare = predict.predict_volume(hu, mask, models, settings, keep_probability=False)
    assert bare.probability is None
    np.testing.assert_array_equal(bare.lesions, found.lesions)
    models[1].calibration = None
    with pytest.raises(ValueError, match="this model carries no calibration"):
        predict.predict_volume(hu, mask, models, settings)


def test_a_tie_is_no_majority():
    hu, mask = patient()
    sure, unsure = pointwise(slope=0.0), pointwise(slope=0.0)
    sure.network.forward = lambda x: torch.full_like(x, 10.0)
    assert not predict.predict_volume(hu, mask, [sure, unsure], EXACT).healthy.any()
    assert predict.predict_volume(hu, mask, [sure, sure, unsure], EXACT).healthy.any()


def test_nothing_outside_the_lungs():
    hu, mask = patient()
    sure = pointwise(slope=0.0)
    sure.network.forward = lambda x: torch.full_like(x, 10.0)
    found = predict.predict_volume(hu, mask, [sure], EXACT)
    assert not found.probability[~mask].any()
    assert not found.healthy[~mask].any()
    ill = predict.predict_volume(hu, mask, [pointwise(slope=0.0)], EXACT)
    assert ill.lesions.any()
    assert not ill.lesions[~mask].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hu": np.zeros((4, 4), np.int16)},
            r"hu and lung_mask must be \(z, y, x\) and alike, got shapes \(4, 4\)",
        ),
        ({"lung_mask": np.zeros((21, 40, 44), bool)}, "lung_mask must contain at least one voxel"),
        ({"models": []}, "models must hold at least one network, got none"),
    ],
)
def test_bad_input(change, message):
    hu, mask = patient()
    with pytest.raises(ValueError, match=message):
        predict.predict_volume(
            **{"hu": hu, "lung_mask": mask, "models": [pointwise()], "config": EXACT, **change}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": 1.0}, r"probability must be < 1 or 'calibrated', got 1.0"),
        ({"overlap": 1.0}, r"overlap must be < 1, got 1.0"),
        ({"slab": 0}, "slab must be >= 1, got 0"),
        ({"precision": "fp8"}, "precision must be 'auto', 'fp32' or 'bf16', got 'fp8'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        PredictConfig(**change)


# Sliding windows against the plain definition: whole maps of every window, then their weighted mean.

TILED = PredictConfig(precision="fp32", slab=8, tile=32)


class Windowed(torch.nn.Module):
    """A network whose answer depends on where a window ends and on all that is in it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv3d(1, 1, 5, padding=2)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape[2:]))
        return 4.0 * self.conv(x) + 10.0 * x.mean()


def windowed(seed: int = 0, multiple: int = 1) -> Model:
    return played(Windowed(seed), multiple)


def distance_to_ends(n: int) -> np.ndarray:
    return np.array([min(i + 1, n - i) for i in range(n)], float)


def starts_of(length: int, size: int, step: int) -> list[int]:
    """Windows from the begin on, of which the last one ends with the axis."""
    starts = [0]
    while starts[-1] + size < length:
        starts.append(min(starts[-1] + step, length - size))
    return starts


def oracle(image, model, config, multiple):
    """Full maps of every window, one at a time in float64, then the weighted mean over them."""
    step = max(1, round(config.slab * (1 - config.overlap)))
    axes = [(config.slab, step), *(tiles(n, config.tile, multiple) for n in image.shape[1:])]
    padded = np.zeros([max(n, size) for n, (size, _) in zip(image.shape, axes, strict=True)], np.float32)
    padded[tuple(slice(0, n) for n in image.shape)] = image
    total, weight = np.zeros(padded.shape), np.zeros(padded.shape)
    size = tuple(size for size, _ in axes)
    ramp = np.multiply.outer(
        np.multiply.outer(distance_to_ends(size[0]), distance_to_ends(size[1])), distance_to_ends(size[2])
    )
    starts = [starts_of(n, *axis) for n, axis in zip(image.shape, axes, strict=True)]
    for corner in product(*starts):
        at = tuple(slice(a, a + n) for a, n in zip(corner, size, strict=True))
        with torch.no_grad():
            window = torch.from_numpy(padded[at].copy())[None, None]
            logit = model.network(window)[0, 0].double().numpy()
        total[at] += ramp / (1 + np.exp(-logit))
        weight[at] += ramp
    return (total / weight)[tuple(slice(0, n) for n in image.shape)]


@settings(max_examples=25, deadline=None)
@given(
    depth=st.integers(1, 30),
    plane=st.tuples(st.integers(20, 100), st.integers(20, 100)),
    slab=st.sampled_from([4, 8, 12]),
    overlap=st.sampled_from([0.0, 0.3, 0.5, 0.75, 0.9]),
    tile=st.one_of(st.none(), st.integers(32, 70)),
    multiples=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3),
)
@example(depth=21, plane=(45, 70), slab=8, overlap=0.5, tile=32, multiples=[2, 4, 1])
def test_tiles_and_slabs_are_the_mean_of_whole_maps(depth, plane, slab, overlap, tile, multiples):
    image, mask = draw_lungs((depth, *plane), seed=depth)
    mask[depth // 2, plane[0] // 2, plane[1] // 2] = True
    models = [windowed(seed, multiple=m) for seed, m in enumerate(multiples)]
    config = replace(TILED, slab=slab, overlap=overlap, tile=tile)
    found = probabilities(image, models, config, mask)
    assert found.shape == (len(models), depth, *plane)
    for model, one in zip(models, found, strict=True):
        expected = oracle(image, model, config, max(multiples))
        # float32 logits up to 30 through a slope of 1/4, and weighted means
        np.testing.assert_allclose(one[mask], expected[mask], atol=5e-6)


def test_slices_come_out_once_and_in_order():
    image, mask = draw_lungs((23, 20, 24))
    blocks = [
        (first, block.shape[1])
        for first, block in slide(lambda a, b: image[a:b], mask, [windowed()], TILED, CPU)
    ]
    ends = [first + count for first, count in blocks]
    assert [first for first, _ in blocks] == [0, *ends[:-1]]
    assert ends[-1] == 23
    assert max(count for _, count in blocks) <= TILED.slab


def test_a_plane_that_fits_is_one_window():
    image, mask = draw_lungs((8, 30, 34))
    model = windowed(multiple=8)
    found = probabilities(image, [model], replace(TILED, tile=40), mask)
    assert model.network.shapes == [(8, 32, 40)]
    whole = probabilities(image, [model], replace(TILED, tile=None), mask)
    np.testing.assert_array_equal(found, whole)


def test_windows_without_lung_are_skipped_and_change_nothing():
    image, mask = draw_lungs((40, 64, 64), seed=4)
    lower = mask.copy()
    lower[:24] = lower[:, :, :34] = False
    seen = image * lower
    every, skipping = windowed(), windowed()
    (whole,) = probabilities(seen, [every], TILED)
    (part,) = probabilities(seen, [skipping], TILED, lower)
    # 64 voxels: three tiles of 32 along either axis; a slab every four slices
    windows = [(z, y, x) for z in range(0, 33, 4) for y in (0, 16, 32) for x in (0, 16, 32)]
    assert len(every.network.shapes) == len(windows)
    full = sum(bool(lower[z : z + 8, y : y + 32, x : x + 32].any()) for z, y, x in windows)
    assert 0 < full < sum(bool(lower[z : z + 8].any()) for z, _, _ in windows)
    assert len(skipping.network.shapes) == full
    np.testing.assert_array_equal(part[lower], whole[lower])


def test_only_one_slab_is_read_at_a_time():
    image, mask = draw_lungs((40, 20, 24))
    asked = []

    def read(first, last):
        asked.append((first, last))
        return image[first:last]

    list(slide(read, mask, [windowed()], TILED, CPU))
    assert max(last - first for first, last in asked) == TILED.slab
    assert asked == sorted(asked)


def test_probabilities_of_a_real_network_in_tiles_stay_close_to_those_of_whole_planes():
    """Tiles hide what lies beyond them; with a ramp that costs little."""
    config = ModelConfig(channels=(4, 8, 8), strides=(2, 2))
    torch.manual_seed(0)
    model = Model(build_unet(config), config)
    image, mask = draw_lungs((8, 64, 96), seed=2)
    (tiled,) = probabilities(image, [model], replace(TILED, tile=64))
    (whole,) = probabilities(image, [model], replace(TILED, tile=None))
    assert tiled.shape == whole.shape == image.shape
    assert np.ptp(whole[mask]) > 0.01
    # typical voxels differ by less than a tenth of how much the answers vary
    assert np.abs(tiled - whole)[mask].mean() < 0.1 * whole[mask].std()


@given(length=st.integers(1, 700), tile=st.integers(32, 400), multiple=st.sampled_from([1, 4, 8, 16, 32]))
def test_tiles_cover_a_row_evenly(length, tile, multiple):
    size, step = tiles(length, tile, multiple)
    padded = -(-length // multiple) * multiple
    assert size % multiple == 0
    if step == size:
        assert size == padded >= length
        return
    assert size <= tile < padded
    assert size < length
    largest = tile // multiple * multiple
    assert size - step >= min(64, largest // 2)
    # one tile less, of the largest size, would not reach
    count = len(starts_of(length, size, step))
    assert (count - 1) * largest - (count - 2) * min(64, largest // 2) < length
    # no wider, though the last one would be nearer: as MONAI makes them of its overlaps
    assert int(size * (1 - max(0.0, 1 - (step + 0.5) / size))) == step


def test_slab_and_tile_must_fit_the_network():
    image, mask = draw_lungs((12, 40, 44))
    with pytest.raises(ValueError, match=r"slab must be a multiple of 12 \(product of .*\), got 8"):
        probabilities(image, [windowed(multiple=4), windowed(multiple=6)], TILED, mask)
    with pytest.raises(ValueError, match=r"tile must be at least 64 .*, got 40"):
        probabilities(image, [windowed(multiple=64)], replace(TILED, slab=64, tile=40))


def test_a_network_that_is_damaged_is_named():
    image, mask = draw_lungs((12, 40, 44))
    bad = windowed()
    bad.network.conv.bias.data[:] = float("nan")
    with pytest.raises(ValueError, match=r"got NaN from models\[1\]"):
        probabilities(image, [windowed(), bad], TILED, mask)


@pytest.mark.gpu
def test_a_gpu_gives_the_cpu_s_probabilities():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    image, mask = draw_lungs((21, 45, 70))
    models = [windowed(seed) for seed in (0, 1)]
    here = probabilities(image, models, TILED, mask)
    there = probabilities(image, models, TILED, mask, torch.device("cuda"))
    # convolutions may use TF32, 10 bits: logits of a few units are right to 1e-2
    np.testing.assert_allclose(here[:, mask], there[:, mask], atol=1e-2)


# Files: two boxes of lung in tissue, a dense ball in one of them, stored in several orientations.

SHAPE, SPACING = (16, 56, 72), (2.0, 1.6, 1.6)


@pytest.fixture(scope="module")
def undecided(tmp_path_factory):
    """Weights of a network that gives every voxel the probability 0.5: nothing is healthy."""
    config = ModelConfig(channels=(4, 8), strides=(2,))
    model = build_unet(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b"):
        Model(model, config).save(folder / name / "model.safetensors")
    return folder


def write_case(folder, name, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1), *, mask=True, spacing=SPACING):
    """Write CT and lung mask with the array in the file's own order; return where the ball is in it."""
    z, y, x = np.indices(SHAPE)
    lung = ((z > 1) & (z < 14) & (y > 8) & (y < 46)) & (((x > 6) & (x < 32)) | ((x > 40) & (x < 66)))
    ball = (z - 5) ** 2 * 1.56 + (y - 20) ** 2 + (x - 18) ** 2 <= 8**2
    hu = np.where(ball & lung, 0, np.where(lung, -850, 30)).astype(np.int16)
    for array, suffix in ((hu, ""), (lung.astype(np.uint8), "_lung"))[: 2 if mask else 1]:
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing[::-1])
        image.SetOrigin((-31.5, 12.0, 77.0))
        image.SetDirection(direction)
        sitk.WriteImage(image, str(folder / f"{name}{suffix}.nii.gz"))
    return ball & lung


@pytest.mark.parametrize(
    "direction",
    [
        (1, 0, 0, 0, 1, 0, 0, 0, 1),
        (-1, 0, 0, 0, -1, 0, 0, 0, 1),
        (1, 0, 0, 0, -1, 0, 0, 0, -1),
        (0, 1, 0, 1, 0, 0, 0, 0, 1),  # rows and columns exchanged
    ],
)
def test_results_land_on_the_file_s_own_grid(tmp_path, undecided, direction):
    ball = write_case(tmp_path, "p1", direction)
    arguments = [str(tmp_path / "p1.nii.gz"), "--masks", str(tmp_path), "--models", str(undecided / "a")]
    arguments += [
        "--output",
        str(tmp_path / "out"),
        "--save-probability",
        "--threads",
        "1",
        "--settings.slab",
        "16",
    ]
    assert predict.main(arguments) == 0
    source = sitk.ReadImage(str(tmp_path / "p1.nii.gz"))
    results = {
        n: sitk.ReadImage(str(tmp_path / f"out/p1_{n}.nii.gz"))
        for n in ("lesions", "lung", "probability", "healthy")
    }
    for image in results.values():
        assert image.GetSize() == source.GetSize()
        np.testing.assert_allclose(
            image.GetDirection(), source.GetDirection(), atol=1e-6
        )  # NIfTI keeps float32
        np.testing.assert_allclose(image.GetOrigin(), source.GetOrigin(), atol=1e-4)
        np.testing.assert_allclose(image.GetSpacing(), source.GetSpacing(), atol=1e-6)
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1_lung.nii.gz"))) > 0
    lesions = sitk.GetArrayFromImage(results["lesions"]) > 0
    np.testing.assert_array_equal(sitk.GetArrayFromImage(results["lung"]) > 0, lung)
    # Mean filters move a surface by a few voxels of 0.8 mm; a flip moves the ball by five at least.
    assert lesions[ball].mean() > 0.95
    assert ndimage.binary_dilation(ball, iterations=3)[lesions].all()
    assert not lesions[~lung].any()
    probability = sitk.GetArrayFromImage(results["probability"])
    assert not probability[~lung].any()
    np.testing.assert_allclose(np.median(probability[lung]), 0.5, atol=1e-6)
    assert not sitk.GetArrayFromImage(results["healthy"]).any()  # 0.5 is no vote for healthy
    (row,) = csv.DictReader((tmp_path / "out/volumes.csv").read_text().splitlines())
    ml = np.prod(SPACING) / 1000
    assert row["case"] == "p1"
    assert float(row["lung_ml"]) == pytest.approx(lung.sum() * ml, abs=0.05)  # written with one decimal
    assert float(row["lesion_ml"]) == pytest.approx(lesions.sum() * ml, abs=0.005)


def test_a_broken_file_is_reported_and_the_others_go_on(tmp_path, undecided, capsys):
    write_case(tmp_path, "good")
    (tmp_path / "bad.nii.gz").write_bytes(b"nothing")
    write_case(tmp_path, "bare", mask=False)
    inputs = [str(tmp_path / f"{n}.nii.gz") for n in ("bad", "bare", "good")]
    arguments = [
        *inputs,
        "--masks",
        str(tmp_path),
        "--models",
        str(undecided),
        "--output",
        str(tmp_path / "out"),
    ]
    assert predict.main([*arguments, "--threads", "1"]) == 1
    said = capsys.readouterr()
    assert "bad.nii.gz" in said.err
    assert "bare" in said.err
    assert "1 of 3 volumes" in said.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "good.json", "good_lesions.nii.gz", "good_lung.nii.gz", "volumes.csv",
    ]  # fmt: skip


def test_wrong_calls(tmp_path, undecided, capsys, monkeypatch):
    write_case(tmp_path, "p")
    call = [str(tmp_path / "p.nii.gz"), "--output", str(tmp_path / "out")]
    assert predict.main([*call, "--models", str(tmp_path / "nowhere")]) == 2
    assert "models must be weights files or run folders" in capsys.readouterr().err
    assert predict.main([*call, "--models", str(undecided / "a"), "--device", "gpu9"]) == 2
    assert "device must be auto, cpu, cuda or cuda:N, got 'gpu9'" in capsys.readouterr().err
    twice = tmp_path / "other"
    twice.mkdir()
    write_case(twice, "p")
    both = [str(tmp_path / "p.nii.gz"), str(twice / "p.nii.gz")]
    assert predict.main([*both, *call[1:], "--models", str(undecided / "a")]) == 2
    assert "case names must differ, got p more than once" in capsys.readouterr().err
    monkeypatch.setattr("normnet.model.BUNDLED", tmp_path / "none")
    assert predict.main(call) == 2
    assert "this build of normnet ships no weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    call += ["--models", str(undecided / "a"), "--settings.slab", "15"]
    assert predict.main([*call, "--masks", str(tmp_path)]) == 1
    assert "slab must be a multiple of 2" in capsys.readouterr().err
    assert predict.main([*call, "--settings.probability", "calibrated"]) == 2
    assert "a/model.safetensors: probability: this model carries no calibration" in capsys.readouterr().err


def run(folder, models, *more, names=("p1",), masks=True):
    """Call the command on ``<name>.nii.gz`` in a folder; results in ``out``.

    Thresholds find the lungs where neither masks nor ``--lungs`` are given.
    """
    call = [*(str(folder / f"{n}.nii.gz") for n in names), "--models", str(models), "--threads", "1"]
    call += ["--output", str(folder / "out"), "--settings.slab", "16"]
    method = () if masks or "--lungs" in more else classical.FLAGS
    return predict.main([*call, *(("--masks", str(folder)) if masks else method), *more])


def test_a_record_says_what_was_done(tmp_path, undecided):
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided, "--save-core", "--settings.postprocess.growth-iterations", "3") == 0
    out = tmp_path / "out"
    record = json.loads((out / "p1.json").read_text())
    assert record["case"] == "p1"
    assert record["ct"] == str(tmp_path / "p1.nii.gz")
    assert record["series"] is None
    assert record["grid"] == {"shape": list(SHAPE), "spacing": pytest.approx(SPACING)}
    assert record["lungs_from"] == str(tmp_path / "p1_lung.nii.gz")
    assert record["lungs_sha256"] is None
    assert record["files"] == {
        "lesions": "p1_lesions.nii.gz",
        "lung": "p1_lung.nii.gz",
        "classical": None,
        "core": "p1_core.nii.gz",
        "probability": None,
        "healthy": None,
        "dicom_seg": None,
    }
    settings = from_json(PredictConfig, json.dumps(record["settings"]))
    assert settings == PredictConfig(slab=16, postprocess=PostprocessConfig(growth_iterations=3))
    weights = (undecided / "a/model.safetensors").read_bytes()
    one = {
        "name": "a",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "probability": 0.95,
        "calibrated": False,
        "threshold_hu": -500.0,
        "inflation_hu": None,
    }
    assert record["inflation"] == 1.0
    assert record["models"] == [one, {**one, "name": "b"}]
    assert record["version"] == ls.__version__
    assert record["seconds"] > 0
    lesions, core = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"p1_{n}.nii.gz"))) > 0 for n in ("lesions", "core")
    )
    assert 0 < core.sum() < lesions.sum()
    assert not (core & ~lesions).any()
    volumes = record["volumes"]
    ml = np.prod(SPACING) / 1000
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "p1_lung.nii.gz"))) > 0
    assert volumes["lung_ml"] == pytest.approx(lung.sum() * ml)
    assert volumes["lesion_ml"] == pytest.approx(lesions.sum() * ml)
    assert volumes["percent"] == pytest.approx(100 * lesions.sum() / lung.sum())
    # the ball lies in the box of low x, the patient's right
    half = lung & (np.arange(SHAPE[2]) < 36)
    assert volumes["right_lung_ml"] == pytest.approx(half.sum() * ml)
    assert volumes["right_lesion_ml"] == pytest.approx((half & lesions).sum() * ml)
    assert volumes["left_lung_ml"] == pytest.approx((lung & ~half).sum() * ml)
    assert volumes["left_lesion_ml"] == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "p1.json", "p1_core.nii.gz", "p1_lesions.nii.gz", "p1_lung.nii.gz", "volumes.csv",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["../p", "a/b", ".p"])
def test_a_case_must_have_the_name_of_a_file(tmp_path, undecided, capsys, name):
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided, "--name", name, masks=False) == 2
    assert "case must be a file's name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def stamps(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name.startswith("p")}


def test_finished_cases_are_kept_and_others_done(tmp_path, undecided, capsys):
    for name in ("p1", "p2"):
        write_case(tmp_path, name)
    out = tmp_path / "out"
    assert run(tmp_path, undecided) == 0
    before = stamps(out)
    capsys.readouterr()
    assert run(tmp_path, undecided, names=("p1", "p2")) == 0
    assert "2 of 2 volumes segmented (1 by an earlier call)" in capsys.readouterr().out
    after = stamps(out)
    assert {name: after[name] for name in before} == before
    assert "p2.json" in after
    rows = list(csv.DictReader((out / "volumes.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == ["p1", "p2"]
    # the table is of the folder, whatever the call names
    assert run(tmp_path, undecided, names=("p2",)) == 0
    assert (out / "volumes.csv").read_text().count("\n") == 3
    # a map more than there is: done again, and what there was stays
    assert run(tmp_path, undecided, "--save-core") == 0
    assert run(tmp_path, undecided, "--save-probability") == 0
    files = json.loads((out / "p1.json").read_text())["files"]
    assert files["core"] == "p1_core.nii.gz"
    assert files["probability"] == "p1_probability.nii.gz"
    assert files["healthy"] == "p1_healthy.nii.gz"
    # an earlier version's call wrote the probability alone: the same call completes the case
    files["healthy"] = None
    record = json.loads((out / "p1.json").read_text())
    (out / "p1.json").write_text(json.dumps({**record, "files": files}))
    (out / "p1_healthy.nii.gz").unlink()
    assert run(tmp_path, undecided) == 0
    assert not (out / "p1_healthy.nii.gz").exists()
    assert run(tmp_path, undecided, "--save-probability") == 0
    assert (out / "p1_healthy.nii.gz").exists()
    assert (out / "p1_core.nii.gz").exists()
    (out / "p1_lesions.nii.gz").unlink()
    assert run(tmp_path, undecided) == 0
    assert (out / "p1_lesions.nii.gz").exists()
    assert (out / "p1_core.nii.gz").exists()


def test_other_settings_models_or_masks_are_refused_without_overwrite(tmp_path, undecided, capsys):
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided, "--save-core") == 0
    before = stamps(tmp_path / "out")
    assert run(tmp_path, undecided, "--settings.probability", "0.9") == 2
    assert "settings must be that of this call, or overwrite passed" in capsys.readouterr().err
    assert run(tmp_path, undecided / "a") == 2
    assert "models must be that of this call" in capsys.readouterr().err
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "p1.nii.gz").rename(moved / "p1.nii.gz")
    (moved / "out").symlink_to(tmp_path / "out")
    assert run(moved, undecided, "--masks", str(tmp_path), masks=False) == 2
    assert "ct must be that of this call" in capsys.readouterr().err
    assert stamps(tmp_path / "out") == before
    assert run(moved, undecided, "--masks", str(tmp_path), "--overwrite", masks=False) == 0
    record = json.loads((tmp_path / "out/p1.json").read_text())
    assert record["ct"] == str(moved / "p1.nii.gz")
    assert record["files"]["core"] is None
    assert not (tmp_path / "out/p1_core.nii.gz").exists()  # it would be of the other settings


def test_names_and_lungs_found_by_thresholds(tmp_path, undecided):
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided, "--name", "px", masks=False) == 0
    record = json.loads((tmp_path / "out/px.json").read_text())
    assert record["case"] == "px"
    assert (record["lungs_from"], record["lungs_sha256"]) == ("classical", None)
    assert record["files"]["classical"] is None  # there is nothing else to compare it with
    assert record["volumes"]["lung_ml"] > 0


# Lungs by a network: what it sees is played, as the boxes here are no chest.


@pytest.fixture
def lung_run(tmp_path):
    """The folder of a run of the task lungs."""
    return lung_weights(tmp_path / "own", seed=0)


def lung_weights(folder, seed):
    torch.manual_seed(seed)
    config = ModelConfig(channels=(4, 8), strides=(2,), outputs=2)
    Model(build_unet(config), config, "lungs").save(folder / "model.safetensors")
    return folder


@pytest.fixture
def sees(monkeypatch):
    """Let every lung network see the air on some sides of the patient."""

    def see(*sides):
        def chances(image, network):
            air, left = image < 0.5, np.arange(image.shape[2]) >= image.shape[2] / 2
            halves = [air & half & (side in sides) for side, half in (("right", ~left), ("left", left))]
            return np.stack(halves).astype(np.float32)

        monkeypatch.setattr("normnet.prepare.network.chances", chances)

    return see


def test_the_outline_by_thresholds_is_written_where_it_is_another(
    tmp_path, undecided, lung_run, sees, capsys
):
    write_case(tmp_path, "p1")
    out, flags = tmp_path / "out", ("--lungs", str(lung_run))
    left = np.arange(SHAPE[2]) >= SHAPE[2] / 2

    def written(name):
        return sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"p1_{name}.nii.gz"))) > 0

    sees("right")
    assert run(tmp_path, undecided, *flags, "--save-core", masks=False) == 0
    told = r"warning: p1: the lung network has \d ml that thresholds have not, and lacks [1-9]\d* ml"
    assert re.search(told, capsys.readouterr().err)
    record = json.loads((out / "p1.json").read_text())
    weights = (lung_run / "model.safetensors").read_bytes()
    assert (record["lungs_from"], record["lungs_sha256"]) == ("own", hashlib.sha256(weights).hexdigest())
    assert record["files"]["classical"] == "p1_classical.nii.gz"
    expected = classical.load_case(tmp_path / "p1.nii.gz").native_mask
    np.testing.assert_array_equal(written("classical"), expected)
    assert expected[..., left].any()
    assert written("lung")[..., ~left].any()
    assert not written("lung")[..., left].any()
    # the same call again: there, told again, and what more it writes leaves no part out
    assert run(tmp_path, undecided, *flags, masks=False) == 0
    said = capsys.readouterr()
    assert "(1 by an earlier call)" in said.out
    assert re.search(told, said.err)
    assert run(tmp_path, undecided, *flags, "--save-probability", masks=False) == 0
    files = json.loads((out / "p1.json").read_text())["files"]
    assert [kind for kind, name in files.items() if name is None] == ["dicom_seg"]
    assert all((out / name).is_file() for name in files.values() if name)
    # a network that agrees takes the outline of before away
    sees("right", "left")
    capsys.readouterr()
    assert run(tmp_path, undecided, *flags, "--overwrite", masks=False) == 0
    assert "the lung network" not in capsys.readouterr().err
    record = json.loads((out / "p1.json").read_text())
    assert (record["files"]["classical"], record["warnings"]) == (None, [])
    assert not (out / "p1_classical.nii.gz").exists()
    assert written("lung")[..., left].any()


def test_an_outline_that_no_call_wrote_is_not_taken_for_an_old_one(
    tmp_path, undecided, lung_run, sees, capsys
):
    """Neither replaced where the two disagree, nor taken away where they agree."""
    write_case(tmp_path, "p1")
    file = tmp_path / "out/p1_classical.nii.gz"
    file.parent.mkdir()
    file.write_bytes(b"my own")
    flags = ("--lungs", str(lung_run))
    for sides in (("right",), ("right", "left")):
        sees(*sides)
        assert run(tmp_path, undecided, *flags, masks=False) == 2
        said = capsys.readouterr().err
        assert "output holds p1_classical.nii.gz, which is of no finished call; take another" in said
        assert file.read_bytes() == b"my own"
    assert run(tmp_path, undecided, *flags, "--overwrite", masks=False) == 0
    assert file.read_bytes() == b"my own"  # there is no outline to replace it
    (tmp_path / "out/p1.json").unlink()
    sees("right")
    assert run(tmp_path, undecided, *flags, "--overwrite", masks=False) == 0
    assert file.read_bytes() != b"my own"
    shutil.rmtree(tmp_path / "out")
    sees("right", "left")
    assert run(tmp_path, undecided, *flags, masks=False) == 0
    # a record may name any file: that of another case is not this one's
    record = json.loads((tmp_path / "out/p1.json").read_text())
    record["files"]["classical"] = "p2_lesions.nii.gz"
    (tmp_path / "out/p1.json").write_text(json.dumps(record))
    (tmp_path / "out/p2_lesions.nii.gz").write_bytes(b"my own")
    assert run(tmp_path, undecided, *flags, "--overwrite", masks=False) == 0
    assert (tmp_path / "out/p2_lesions.nii.gz").read_bytes() == b"my own"


def test_lungs_of_another_method_or_network_are_refused(tmp_path, undecided, lung_run, sees, capsys):
    write_case(tmp_path, "p1")
    sees("right", "left")
    own = ("--lungs", str(lung_run))
    assert run(tmp_path, undecided, *own, masks=False) == 0
    before = stamps(tmp_path / "out")
    assert run(tmp_path, undecided, masks=False) == 2
    rule = "p1.json: lungs_from must be that of this call, or overwrite passed: there "
    assert f'{rule}"own", now "classical"\n' in capsys.readouterr().err
    assert run(tmp_path, undecided, "--lungs", "network", masks=False) == 2
    assert f'{rule}"own", now "network"\n' in capsys.readouterr().err
    # a run that was trained on, and another of the same name
    old = hashlib.sha256((lung_run / "model.safetensors").read_bytes()).hexdigest()
    elsewhere = lung_weights(tmp_path / "other/own", seed=2)
    for folder in (lung_weights(lung_run, seed=1), elsewhere):
        assert run(tmp_path, undecided, "--lungs", str(folder), masks=False) == 2
        new = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        said = capsys.readouterr().err
        rule = "p1.json: lungs_sha256 must be that of this call, or overwrite passed: there "
        assert f'{rule}"{old}", now "{new}"\n' in said
    assert stamps(tmp_path / "out") == before
    assert run(tmp_path, undecided, "--lungs", str(elsewhere), "--overwrite", masks=False) == 0
    assert json.loads((tmp_path / "out/p1.json").read_text())["lungs_sha256"] == new


def test_lungs_of_an_earlier_version_are_of_another_method(tmp_path, undecided, sees, capsys):
    """Its records tell "thresholds" and no weights: read and told, and replaced where that is asked for."""
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided, masks=False) == 0
    file = tmp_path / "out/p1.json"
    record = json.loads(file.read_text())
    old = {k: v for k, v in record.items() if k != "lungs_sha256"} | {"lungs_from": "thresholds"}
    del old["files"]["classical"]
    file.write_text(json.dumps(old))
    assert read_record(file)["lungs_sha256"] is None
    capsys.readouterr()
    sees("right", "left")
    network = ("--lungs", "network")  # what is found without a word of it
    assert run(tmp_path, undecided, *network, masks=False) == 2
    rule = "lungs_from must be that of this call, or overwrite passed"
    assert f'p1.json: {rule}: there "classical", now "network"\n' in capsys.readouterr().err
    assert json.loads(file.read_text()) == old
    assert run(tmp_path, undecided, *network, "--overwrite", masks=False) == 0
    found = json.loads(file.read_text())
    assert (found["lungs_from"], found["files"]["classical"]) == ("network", None)
    assert len(found["lungs_sha256"]) == 64
    # masks that were given then are the same now
    assert run(tmp_path, undecided, "--overwrite") == 0
    record = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in record.items() if k != "lungs_sha256"}))
    capsys.readouterr()
    assert run(tmp_path, undecided) == 0
    assert "(1 by an earlier call)" in capsys.readouterr().out


def test_settings_from_a_file_and_flags_above_it(tmp_path, undecided, capsys):
    write_case(tmp_path, "p1")
    mine = PredictConfig(probability=0.4, overlap=0.25, postprocess=PostprocessConfig(full_size=5))
    (tmp_path / "mine.json").write_text(to_json(mine))
    config = ["--config", str(tmp_path / "mine.json"), "--settings.overlap", "0.0"]
    assert run(tmp_path, undecided, *config) == 0
    record = json.loads((tmp_path / "out/p1.json").read_text())
    expected = replace(mine, slab=16, overlap=0.0)
    assert from_json(PredictConfig, json.dumps(record["settings"])) == expected
    # what a call writes can be given to the next
    assert predict.read_config(tmp_path / "out/p1.json") == expected
    (tmp_path / "bad.json").write_text('{"slabs": 3}')
    assert run(tmp_path, undecided, "--config", str(tmp_path / "bad.json")) == 2
    assert "PredictConfig has no field 'slabs'" in capsys.readouterr().err
    assert run(tmp_path, undecided, f"--config={tmp_path / 'none.json'}") == 2
    assert "config must be a JSON file with settings" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_of_a_case(tmp_path, undecided, monkeypatch, capsys):
    """ITK reports no error: it writes a short file. The case before is kept, the one after is written."""
    for name in ("p1", "p2", "p3"):
        write_case(tmp_path, name)
    assert run(tmp_path, undecided) == 0
    write_like = Scan.write_like

    def short(self, array, path):
        written = write_like(self, array, path)
        if written.name == "p2_lung.nii.gz":
            written.write_bytes(written.read_bytes()[:-20])
        return written

    monkeypatch.setattr(Scan, "write_like", short)
    assert run(tmp_path, undecided, names=("p2", "p3", "p1")) == 1
    said = capsys.readouterr()
    assert "p2_lung.nii.gz: could not be written completely" in said.err
    assert "2 of 3 volumes segmented (1 by an earlier call)" in said.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "p1.json", "p1_lesions.nii.gz", "p1_lung.nii.gz", "p3.json", "p3_lesions.nii.gz",
        "p3_lung.nii.gz", "volumes.csv",
    ]  # fmt: skip
    monkeypatch.undo()
    before = stamps(tmp_path / "out")

    def full(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr("normnet.output.check_written", lambda path: full(path, path))
    assert run(tmp_path, undecided, "--settings.probability", "0.5", "--overwrite") == 1
    after = stamps(tmp_path / "out")
    assert after == before  # the old result outlives a new one that fails


@pytest.mark.parametrize("what", ["", "_lung"])
def test_a_ct_or_mask_that_was_corrected_is_not_taken_for_the_old(tmp_path, undecided, capsys, what):
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided) == 0
    file = tmp_path / f"p1{what}.nii.gz"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # a correction of the same size
    assert run(tmp_path, undecided) == 2
    said = capsys.readouterr().err
    name = {"": "the CT", "_lung": "the lung mask"}[what]
    assert f"p1.json: {name} must be as it was when it was read, or overwrite passed: there " in said
    assert run(tmp_path, undecided, "--overwrite") == 0
    assert run(tmp_path, undecided) == 0
    # a record of an earlier version has no stamps: it is what it was
    record = json.loads((tmp_path / "out/p1.json").read_text())
    del record["ct_stamp"], record["lungs_stamp"]
    (tmp_path / "out/p1.json").write_text(json.dumps(record))
    assert run(tmp_path, undecided) == 0
    assert "(1 by an earlier call)" in capsys.readouterr().out


def test_a_slice_of_a_series_that_was_corrected_is_seen(tmp_path, undecided, capsys):
    """Of a DICOM folder the files of the series count, and no others."""
    write_case(tmp_path, "p1")
    study = tmp_path / "study"
    write_series(study, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1.nii.gz"))))
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1_lung.nii.gz"))) > 0
    mask = read_ct(study).write_like(lung, tmp_path / "mask.nii.gz")
    call = [str(study), "--models", str(undecided), "--threads", "1", "--output", str(study)]
    call += ["--settings.slab", "16", "--masks", str(mask)]
    assert predict.main(call) == 0
    assert predict.main(call) == 0
    assert "(1 by an earlier call)" in capsys.readouterr().out
    slices = sorted(p for p in study.glob("*.dcm"))
    os.utime(slices[3], ns=(0, slices[3].stat().st_mtime_ns + 1))
    assert predict.main(call) == 2
    assert "the CT must be as it was when it was read" in capsys.readouterr().err


def test_calls_that_cannot_give_each_case_its_lungs(tmp_path, undecided, capsys, monkeypatch):
    for name in ("p1", "p2"):
        write_case(tmp_path, name)
    mask = tmp_path / "p1_lung.nii.gz"
    assert run(tmp_path, undecided, "--masks", str(mask), names=("p1", "p2"), masks=False) == 2
    said = capsys.readouterr().err
    assert f"masks must be a folder where there are several CT, got the file {mask}" in said
    assert run(tmp_path, undecided, "--masks", str(tmp_path / "gone"), masks=False) == 2
    assert f"masks must exist, got {tmp_path / 'gone'}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lungmask", None)
    assert run(tmp_path, undecided, "--lungs", "lungmask", masks=False) == 2
    assert "pip install lungmask" in capsys.readouterr().err
    assert run(tmp_path, undecided, "--threads", "0") == 2
    assert "threads must be >= 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, undecided, "--masks", str(mask), masks=False) == 0
    assert run(tmp_path, undecided, "--lungs", "lungmask", "--masks", str(mask), masks=False) == 0


def test_a_table_names_ct_and_lungs(tmp_path, undecided, capsys, monkeypatch):
    """A method for lungs is asked for by the cases without a mask alone, and not by those that fail."""
    for name in ("p1", "p2"):
        write_case(tmp_path, name)
    monkeypatch.setitem(sys.modules, "lungmask", None)
    table = tmp_path / "cases.csv"
    table.write_text("case,ct,lungs\na,p1.nii.gz,p1_lung.nii.gz\nb,p2.nii.gz,gone.nii.gz\nc,gone.nii.gz,\n")
    call = [str(table), "--models", str(undecided), "--threads", "1", "--settings.slab", "16", "--output"]
    assert predict.main([*call, str(tmp_path / "out"), "--lungs", "lungmask"]) == 1
    said = capsys.readouterr()
    assert "1 of 3 volumes segmented" in said.out
    assert f"{tmp_path}/p2.nii.gz: {tmp_path}/gone.nii.gz: no such file or folder" in said.err
    record = read_record(tmp_path / "out/a.json")
    assert (record["ct"], record["lungs_from"]) == (f"{tmp_path}/p1.nii.gz", f"{tmp_path}/p1_lung.nii.gz")
    table.write_text("case,ct,lungs\na,p1.nii.gz,p1_lung.nii.gz\nb,p2.nii.gz,\n")
    assert predict.main([*call, str(tmp_path / "out"), "--lungs", "lungmask"]) == 2
    assert "pip install lungmask" in capsys.readouterr().err
    assert predict.main([*call, str(tmp_path / "out"), *classical.FLAGS]) == 0
    assert "2 of 2 volumes segmented (1 by an earlier call)" in capsys.readouterr().out
    assert read_record(tmp_path / "out/b.json")["lungs_from"] == "classical"
    assert predict.main([*call, str(tmp_path / "out"), "--masks", str(tmp_path)]) == 2
    assert "masks must be omitted beside a table of cases" in capsys.readouterr().err


def test_any_error_stays_with_its_case(tmp_path, undecided, monkeypatch, capsys):
    for name in ("p1", "p2"):
        write_case(tmp_path, name)
    real = load_case

    def odd(path, *args, **kwargs):
        if "p1" in str(path):
            raise RuntimeError("nobody thought of this")
        return real(path, *args, **kwargs)

    monkeypatch.setattr("normnet.predict.load_case", odd)
    summary = predict.predict(
        predict.PredictArgs(
            inputs=tuple(tmp_path / f"{n}.nii.gz" for n in ("p1", "p2")),
            models=(undecided,),
            output=tmp_path / "out",
            masks=tmp_path,
            save_probability=False,
            device="cpu",
            threads=1,
            settings=EXACT,
        )
    )
    assert summary.written == ["p2"]
    assert summary.there == []
    reason = f"{tmp_path / 'p1.nii.gz'}: RuntimeError: nobody thought of this"
    assert summary.failures == {"p1": reason}


def test_a_case_for_notebooks(tmp_path, undecided):
    """On a grid whose voxels are no multiple of the working grid's, maps reach over the lungs' edge."""
    spacing = (2.5, 1.3, 0.5)
    ball = write_case(tmp_path, "p1", spacing=spacing)
    case, lungs = tmp_path / "p1.nii.gz", tmp_path / "p1_lung.nii.gz"
    models = [Model.load(undecided / "a")]
    settings = replace(EXACT, postprocess=PostprocessConfig(threshold_hu=-790, full_threshold=0.001))
    write_case(tmp_path, "p1", spacing=spacing)
    found = predict.predict_case(case, models, settings, mask_path=lungs)
    assert found.lesions.shape == found.ct.hu.shape == SHAPE
    assert found.lesions[ball].mean() > 0.95
    assert found.volumes["lesion_ml"] == pytest.approx(found.lesions.sum() * np.prod(spacing) / 1000)
    assert found.probability.dtype == np.float32
    bare = predict.predict_case(case, models, settings, mask_path=lungs, keep_probability=False)
    assert bare.probability is None
    assert bare.healthy is None
    loaded = load_case(case, lungs)
    volume = predict.predict_volume(loaded.hu, loaded.mask, models, settings)
    for on_grid, native in (
        (volume.lesions, found.lesions),
        (volume.lesions_without_growing, found.core),
        (volume.probability, found.probability),
    ):
        there = loaded.to_native(on_grid)
        assert native.any()
        assert not native[~found.lung].any()
        np.testing.assert_array_equal(native[found.lung], there[found.lung])
    assert loaded.to_native(volume.probability)[~found.lung].any()


def test_the_vote_is_written_on_the_file_s_own_grid(tmp_path):
    """Two of three models call healthy what is above 0.45 of the window, the mean never does."""
    write_case(tmp_path, "p1")
    case, lungs = tmp_path / "p1.nii.gz", tmp_path / "p1_lung.nii.gz"
    models = [pointwise(centre=c, slope=40.0) for c in (0.35, 0.36, 5.0)]
    found = predict.predict_case(case, models, EXACT, mask_path=lungs)
    loaded = load_case(case, lungs)
    volume = predict.predict_volume(loaded.hu, loaded.mask, models, EXACT)
    expected = loaded.to_native(volume.healthy) & found.lung
    assert found.healthy.dtype == bool
    np.testing.assert_array_equal(found.healthy, expected)
    assert found.healthy.sum() > 1000
    assert not (found.probability > 0.95).any()


def test_dicom_in_and_dicom_segmentation_out(tmp_path, undecided, capsys):
    write_case(tmp_path, "p1")
    hu = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1.nii.gz")))
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1_lung.nii.gz"))) > 0
    series = write_series(tmp_path / "scans/p9", hu)
    # the mask file lies on the series' grid
    ct = read_ct(tmp_path / "scans/p9")
    ct.write_like(lung, tmp_path / "masks/p9_lung.nii.gz")
    call = ["--models", str(undecided / "a"), "--threads", "1", "--settings.slab", "16", "--dicom-seg"]
    call += ["--output", str(tmp_path / "out"), "--masks", str(tmp_path / "masks")]
    assert predict.main([str(tmp_path / "scans"), *call]) == 0
    record = json.loads((tmp_path / "out/p9.json").read_text())
    assert record["series"] == series
    assert record["files"]["dicom_seg"] == "p9_lesions.dcm"
    found, _ = voxels_of(tmp_path / "out/p9_lesions.dcm", SHAPE)
    np.testing.assert_array_equal(found["lung"], lung)
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out/p9_lesions.nii.gz"))) > 0
    np.testing.assert_array_equal(found["lesion"], written)
    assert written.any()
    # an output folder below the input is no input, though it holds DICOM now
    call[call.index("--output") + 1] = str(tmp_path / "scans/out")
    for _ in range(2):
        assert predict.main([str(tmp_path / "scans"), *call]) == 0
        assert "1 of 1 volumes" in capsys.readouterr().out
    call[-1] = str(tmp_path)
    assert predict.main([str(tmp_path / "p1.nii.gz"), *call]) == 1
    said = capsys.readouterr()
    rule = (
        "p1.nii.gz: dicom_seg must be left out, as the CT is no DICOM series; the other files do not need it"
    )
    assert said.err.count(rule) == 2  # before the computation, and at the end
    assert said.err.index(rule) < said.err.index("predict: 100%")
    assert "1 of 1 volumes" in said.out
    record = json.loads((tmp_path / "scans/out/p1.json").read_text())
    assert record["files"]["lesions"] == "p1_lesions.nii.gz"
    assert record["files"]["dicom_seg"] is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_maps_are_written_where_the_headers_allow_no_segmentation(
    tmp_path, undecided, capsys, monkeypatch, when
):
    """What is wrong is told beforehand; what nobody foresaw does not cost the maps either."""
    write_case(tmp_path, "p1")
    hu = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1.nii.gz")))
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1_lung.nii.gz")))
    write_series(tmp_path / "scans/p9", hu)
    read_ct(tmp_path / "scans/p9").write_like(lung, tmp_path / "masks/p9_lung.nii.gz")

    def refuse(*_):
        raise ValueError("003.dcm: StudyDate must be a date")

    name = "check_segmentation" if when == "before" else "encode_segmentation"
    monkeypatch.setattr(f"normnet.predict.{name}", refuse)
    call = [str(tmp_path / "scans"), "--models", str(undecided / "a"), "--threads", "1", "--dicom-seg"]
    call += ["--output", str(tmp_path / "out"), "--settings.slab", "16", "--masks", str(tmp_path / "masks")]
    for again in (False, True):
        assert predict.main(call) == 1
        said = capsys.readouterr()
        told = "003.dcm: StudyDate must be a date; the other files do not need it"
        assert said.err.count(told) == (2 if when == "before" else 1)
        early = f"warning: p9: {tmp_path / 'scans/p9'}: {told}"
        assert (early in said.err.splitlines()[0]) == (when == "before")
        assert "1 of 1 volumes segmented" in said.out
        assert ("by an earlier call" in said.out) == (again and when == "before")
        record = json.loads((tmp_path / "out/p9.json").read_text())
        assert record["files"]["lesions"] == "p9_lesions.nii.gz"
        assert not (tmp_path / "out/p9_lesions.dcm").exists()
    monkeypatch.undo()
    assert predict.main(call) == 0
    assert (tmp_path / "out/p9_lesions.dcm").exists()


def test_what_is_passed_over_is_told_and_counts_where_it_was_named(tmp_path, undecided, capsys):
    scans = tmp_path / "in"
    for folder in (scans, scans / "Lungs", scans / "sub"):
        folder.mkdir(parents=True)
        write_case(folder, f"{folder.name}_p")
    (scans / "old.img").touch()
    (scans / "gone.nii").symlink_to(scans / "nothing")
    call = ["--models", str(undecided / "a"), "--threads", "1", "--settings.slab", "16", *classical.FLAGS]
    call += ["--output"]
    assert predict.main([str(scans), *call, str(scans / "out")]) == 0
    said = capsys.readouterr()
    assert "2 of 2 volumes" in said.out
    told = [line for line in said.err.splitlines() if line.startswith("passed over: ")]
    names = (
        "gone.nii",
        "old.img",
        "in_p_lung.nii.gz",
        "Lungs/Lungs_p.nii.gz",
        "Lungs/Lungs_p_lung.nii.gz",
        "sub/sub_p_lung.nii.gz",
    )
    assert sorted(line.split(": ")[1] for line in told) == sorted(str(scans / name) for name in names)
    named = [str(scans / name) for name in ("gone.nii", "old.img")]
    assert predict.main([str(scans / "sub"), *named, *call, str(scans / "out")]) == 1
    said = capsys.readouterr()
    assert "1 of 1 volumes" in said.out
    assert said.err.index("gone.nii: a link that leads nowhere") < said.err.index(
        "sub_p_lung.nii.gz: named as"
    )
    assert "old.img: of no format that is read" in said.err
    assert predict.main([*named, *call, str(tmp_path / "other")]) == 2
    assert "found none; passed over: " in capsys.readouterr().err
    # named itself, a folder or a file is read whatever it is called
    assert predict.main([str(scans / "Lungs"), *call, str(tmp_path / "lungs")]) == 0
    assert "1 of 1 volumes" in capsys.readouterr().out


def test_warnings_of_a_case_are_told_and_kept(tmp_path, undecided, capsys):
    """A mask of several labels is used as a whole, with a warning; --label chooses."""
    write_case(tmp_path, "p1")
    path = str(tmp_path / "p1_lung.nii.gz")
    image = sitk.ReadImage(path)
    labels = sitk.GetArrayFromImage(image)
    labels[:, :, 36:] *= 2
    two = sitk.GetImageFromArray(labels)
    two.CopyInformation(image)
    sitk.WriteImage(two, path)
    volumes = {}
    for flags in ((), ("--label", "1", "--overwrite"), ("--label", "1", "2", "--overwrite")):
        assert run(tmp_path, undecided, *flags) == 0
        said = capsys.readouterr().err
        record = json.loads((tmp_path / "out/p1.json").read_text())
        assert "UserWarning" not in said
        told = [line for line in said.splitlines() if line.startswith("warning: p1: ")]
        assert [line.removeprefix("warning: p1: ") for line in told] == record["warnings"]
        assert bool(told) == (not flags)
        volumes[flags[1:-1]] = record["volumes"]["lung_ml"]
        assert record["label"] == ([int(label) for label in flags[1:-1]] or None)
    assert volumes[("1",)] < 0.6 * volumes[()]
    assert volumes[("1", "2")] == volumes[()]
    assert run(tmp_path, undecided, "--label", "1") == 2
    assert "label must be that of this call" in capsys.readouterr().err
    assert run(tmp_path, undecided, "--overwrite") == 0
    capsys.readouterr()
    assert run(tmp_path, undecided) == 0  # there by an earlier call: still told
    assert "warning: p1: " in capsys.readouterr().err
    assert run(tmp_path, undecided, "--label", "1", masks=False) == 2
    assert "label must be left out where no masks are given, got [1]" in capsys.readouterr().err


def test_records_of_earlier_versions_go_on(tmp_path, undecided, capsys):
    """They know of no labels and no warnings."""
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided) == 0
    file = tmp_path / "out/p1.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in record.items() if k not in ("label", "warnings")}))
    assert run(tmp_path, undecided) == 0
    assert "(1 by an earlier call)" in capsys.readouterr().out
    assert run(tmp_path, undecided, "--label", "1") == 2


def test_settings_reach_the_post_processing():
    hu, mask = patient()
    none = replace(EXACT, postprocess=PostprocessConfig(growth_iterations=0))
    far = replace(EXACT, postprocess=PostprocessConfig(growth_iterations=-1))
    a, b = (predict.predict_volume(hu, mask, [pointwise(slope=0.0)], c) for c in (none, far))
    np.testing.assert_array_equal(a.lesions, a.lesions_without_growing)
    assert a.lesions.sum() < b.lesions.sum()
