"""Prediction: slabs, vote, and results that land on the input's own grid."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
sitk = pytest.importorskip("SimpleITK")

import lesionsynth as ls  # noqa: E402
from normnet import predict  # noqa: E402
from normnet.config import ModelConfig, PostprocessConfig, PredictConfig  # noqa: E402
from normnet.model import build_unet, save_model  # noqa: E402
from normnet.postprocess import postprocess  # noqa: E402
from tests.conftest import draw_lungs  # noqa: E402

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
    found = predict.slab_probabilities(image, Pointwise(), replace(EXACT, overlap=overlap), CPU)
    whole = 1 / (1 + np.exp(-12.0 * (image.astype(np.float64) - 0.5)))
    # float32 logits up to 6 (error 5e-7) through a slope of 1/4, and a weighted mean
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_a_slab_has_the_configured_depth_and_fits_the_network():
    model = build_unet(ModelConfig(channels=(4, 8, 8), strides=(2, 2)))
    model.config = ModelConfig(channels=(4, 8, 8), strides=(2, 2))
    found = predict.slab_probabilities(np.ones((19, 13, 18), np.float32), model, EXACT, CPU)
    assert found.shape == (19, 13, 18)
    probe = Pointwise()
    predict.slab_probabilities(np.ones((19, 13, 18), np.float32), probe, EXACT, CPU)
    assert {shape[2] for shape in probe.shapes} == {8}


def test_slabs_are_averaged_by_their_distance_to_the_ends():
    class Counter(torch.nn.Module):
        """Answer with the probability 0.1, 0.2, ... of the call."""

        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.full_like(x, float(np.log(0.1 * self.calls / (1 - 0.1 * self.calls))))

    found = predict.slab_probabilities(np.ones((12, 1, 1), np.float32), Counter(), EXACT, CPU)[:, 0, 0]
    first, second = [1, 2, 3, 4, 4, 3, 2, 1], [1, 2, 3, 4, 4, 3, 2, 1]
    expected = []
    for z in range(12):
        a, b = (first[z] if z < 8 else 0), (second[z - 4] if z >= 4 else 0)
        expected.append((0.1 * a + 0.2 * b) / (a + b))
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 sums of three terms


def test_vote_of_three_models_against_a_plain_loop():
    hu, mask = patient()
    models = [Pointwise(centre=c, slope=40.0) for c in (0.35, 0.5, 0.65)]
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


def test_a_tie_is_no_majority():
    hu, mask = patient()
    sure, unsure = Pointwise(slope=0.0), Pointwise(slope=0.0)
    sure.forward = lambda x: torch.full_like(x, 10.0)
    assert not predict.predict_volume(hu, mask, [sure, unsure], EXACT).healthy.any()
    assert predict.predict_volume(hu, mask, [sure, sure, unsure], EXACT).healthy.any()


def test_nothing_outside_the_lungs():
    hu, mask = patient()
    sure = Pointwise(slope=0.0)
    sure.forward = lambda x: torch.full_like(x, 10.0)
    found = predict.predict_volume(hu, mask, [sure], EXACT)
    assert not found.probability[~mask].any()
    assert not found.healthy[~mask].any()
    ill = predict.predict_volume(hu, mask, [Pointwise(slope=0.0)], EXACT)
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
            **{"hu": hu, "lung_mask": mask, "models": [Pointwise()], "config": EXACT, **change}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": 1.0}, r"probability must be in \(0, 1\), got 1.0"),
        ({"overlap": 1.0}, r"overlap must be in \[0, 1\), got 1.0"),
        ({"slab": 0}, "slab must be >= 1, got 0"),
        ({"precision": "fp8"}, "precision must be auto, fp32 or bf16, got fp8"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        PredictConfig(**change)


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
        save_model(folder / name / "model.safetensors", model, config)
    return folder


def write_case(folder, name, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1), *, mask=True):
    """Write CT and lung mask with the array in the file's own order; return where the ball is in it."""
    z, y, x = np.indices(SHAPE)
    lung = ((z > 1) & (z < 14) & (y > 8) & (y < 46)) & (((x > 6) & (x < 32)) | ((x > 40) & (x < 66)))
    ball = (z - 5) ** 2 * 1.56 + (y - 20) ** 2 + (x - 18) ** 2 <= 8**2
    hu = np.where(ball & lung, 0, np.where(lung, -850, 30)).astype(np.int16)
    for array, suffix in ((hu, "hu"), (lung.astype(np.uint8), "lung"))[: 2 if mask else 1]:
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(SPACING[::-1])
        image.SetOrigin((-31.5, 12.0, 77.0))
        image.SetDirection(direction)
        sitk.WriteImage(image, str(folder / f"{name}_{suffix}.nii.gz"))
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
    arguments = [str(tmp_path / "p1_hu.nii.gz"), "--masks", str(tmp_path), "--models", str(undecided / "a")]
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
    source = sitk.ReadImage(str(tmp_path / "p1_hu.nii.gz"))
    results = {
        n: sitk.ReadImage(str(tmp_path / f"out/p1_{n}.nii.gz")) for n in ("lesions", "lung", "probability")
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
    (row,) = csv.DictReader((tmp_path / "out/volumes.csv").read_text().splitlines())
    ml = np.prod(SPACING) / 1000
    assert row["case"] == "p1"
    assert float(row["lung_ml"]) == pytest.approx(lung.sum() * ml, abs=0.05)  # written with one decimal
    assert float(row["lesion_ml"]) == pytest.approx(lesions.sum() * ml, abs=0.005)


def test_a_broken_file_is_reported_and_the_others_go_on(tmp_path, undecided, capsys):
    write_case(tmp_path, "good")
    (tmp_path / "bad_hu.nii.gz").write_bytes(b"nothing")
    write_case(tmp_path, "bare", mask=False)
    inputs = [str(tmp_path / f"{n}_hu.nii.gz") for n in ("bad", "bare", "good")]
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
    assert "bad_hu.nii.gz" in said.err
    assert "bare" in said.err
    assert "1 of 3 volumes" in said.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "good_lesions.nii.gz", "good_lung.nii.gz", "volumes.csv",
    ]  # fmt: skip


def test_wrong_calls(tmp_path, undecided, capsys):
    write_case(tmp_path, "p")
    call = [str(tmp_path / "p_hu.nii.gz"), "--output", str(tmp_path / "out")]
    assert predict.main([*call, "--models", str(tmp_path / "nowhere")]) == 2
    assert "models must be weights files or run folders" in capsys.readouterr().err
    assert predict.main([*call, "--models", str(undecided / "a"), "--device", "gpu9"]) == 2
    assert "device must be auto, cpu, cuda or cuda:N, got 'gpu9'" in capsys.readouterr().err
    twice = tmp_path / "other"
    twice.mkdir()
    write_case(twice, "p")
    both = [str(tmp_path / "p_hu.nii.gz"), str(twice / "p_hu.nii.gz")]
    assert predict.main([*both, *call[1:], "--models", str(undecided / "a")]) == 2
    assert "must have different names" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_reach_the_post_processing():
    hu, mask = patient()
    none = replace(EXACT, postprocess=PostprocessConfig(growth_iterations=0))
    far = replace(EXACT, postprocess=PostprocessConfig(growth_iterations=-1))
    a, b = (predict.predict_volume(hu, mask, [Pointwise(slope=0.0)], c) for c in (none, far))
    np.testing.assert_array_equal(a.lesions, a.lesions_without_growing)
    assert a.lesions.sum() < b.lesions.sum()
