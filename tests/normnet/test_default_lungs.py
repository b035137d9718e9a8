"""What the commands find lungs with where they are told nothing: the network of the package, on a phantom.

These tests hold for the weights that ship, and for none that are half trained. The phantom's lungs are drawn,
so that they are known; it is a healthy one, and one with pneumonia, at the size of an adult.
"""

from __future__ import annotations

import csv
import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
sitk = pytest.importorskip("SimpleITK")

import lesionsynth as ls  # noqa: E402
from normnet import predict  # noqa: E402
from normnet.baselines.__main__ import main as baselines  # noqa: E402
from normnet.baselines.methods import build_baseline, small  # noqa: E402
from normnet.baselines.train import save_baseline  # noqa: E402
from normnet.config import BUNDLED_LUNGS, ModelConfig  # noqa: E402
from normnet.model import Model, build_unet  # noqa: E402
from normnet.prepare import Store, load_case  # noqa: E402
from normnet.prepare.__main__ import main as prepare  # noqa: E402

SHAPE, SPACING = (40, 96, 120), (5.0, 3.2, 3.2)
DICE = 0.95
"""A rim of half a voxel is 5 % of these lungs; a lobe left out, or bowel taken in, is more."""


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder with ``ill.nii.gz``, and where its lungs are."""
    folder = tmp_path_factory.mktemp("phantom")
    chest = ls.phantom.chest_ct(shape=SHAPE, spacing=SPACING, seed=3)
    ill = ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed=3)
    image = sitk.GetImageFromArray(ill.hu)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(folder / "ill.nii.gz"))
    return folder, chest.lung_mask


@pytest.fixture(scope="module")
def sha256() -> str:
    return hashlib.sha256(BUNDLED_LUNGS.read_bytes()).hexdigest()


def read(path: Path) -> np.ndarray:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path))) > 0)


def test_load_case(phantom: tuple[Path, np.ndarray]) -> None:
    folder, lungs = phantom
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that the two outlines are apart
        case = load_case(folder / "ill.nii.gz")
    assert not case.apart
    assert dice(case.native_mask, lungs) > DICE
    assert case.native_classical is not None
    assert dice(case.native_classical, lungs) > DICE
    right, left = case.native_sides or (None, None)
    x = np.arange(SHAPE[2]) < SHAPE[2] / 2
    assert dice(right, lungs & x) > DICE
    assert dice(left, lungs & ~x) > DICE


def test_predict(phantom: tuple[Path, np.ndarray], sha256: str, tmp_path: Path) -> None:
    folder, lungs = phantom
    config = ModelConfig(channels=(4, 8), strides=(2,))
    Model(build_unet(config), config).save(tmp_path / "run/model.safetensors")
    call = [str(folder), "--models", str(tmp_path / "run"), "--output", str(tmp_path / "maps")]
    assert predict.main([*call, "--threads", "1", "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "maps/ill.json").read_text())
    assert (record["lungs_from"], record["lungs_sha256"]) == ("network", sha256)
    assert (record["files"]["classical"], record["warnings"]) == (None, [])
    assert dice(read(tmp_path / "maps/ill_lung.nii.gz"), lungs) > DICE
    ml = lungs.sum() * np.prod(SPACING) / 1000
    assert record["volumes"]["lung_ml"] == pytest.approx(ml, rel=2 * (1 - DICE))
    assert record["volumes"]["right_lung_ml"] + record["volumes"]["left_lung_ml"] == pytest.approx(
        record["volumes"]["lung_ml"]
    )


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_prepare(phantom: tuple[Path, np.ndarray], sha256: str, tmp_path: Path, workers: int) -> None:
    """In workers too, each of which has the network and its share of the cores; the store is the same."""
    folder, lungs = phantom
    names = ["ill", "again"][:workers]
    (tmp_path / "again.nii.gz").symlink_to(folder / "ill.nii.gz")
    scans = [folder / "ill.nii.gz", tmp_path / "again.nii.gz"][:workers]
    call = [*map(str, scans), "--workers", str(workers), "--size", "120", "--spacing", *map(str, SPACING)]
    assert prepare([*call, "--output", str(tmp_path / "s")]) == 0
    store = Store.open(tmp_path / "s")
    for name in names:
        meta = store[name].meta
        assert (meta["lungs_from"], meta["lungs_sha256"], meta["warnings"]) == ("network", sha256, [])
        assert meta["lung_ml"] == pytest.approx(lungs.sum() * np.prod(SPACING) / 1000, rel=2 * (1 - DICE))
    rows = list(csv.DictReader((tmp_path / "s/summary.csv").read_text().splitlines()))
    assert [row["lungs_from"] for row in rows] == ["network"] * workers
    here = load_case(folder / "ill.nii.gz", spacing=SPACING, size=120, margin=4)
    hu, mask = store["ill"].slab(0, here.hu.shape[0])
    np.testing.assert_array_equal(hu, here.hu)
    assert not (mask & ~here.mask).any()  # erroneous edges are taken out


def test_baselines(phantom: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, lungs = phantom
    torch.manual_seed(0)
    baseline = build_baseline(small("ae"))
    baseline.calibration = {"threshold": 0.5, "scale": 1.0, "slices": 4.0}
    save_baseline(tmp_path / "ae.safetensors", baseline)
    call = ["predict", str(tmp_path / "ae.safetensors"), str(folder), "--output", str(tmp_path / "maps")]
    assert baselines([*call, "--threads", "1", "--device", "cpu"]) == 0
    assert dice(read(tmp_path / "maps/ill_lung.nii.gz"), lungs) > DICE
    assert json.loads((tmp_path / "maps/ill.json").read_text())["warnings"] == []
