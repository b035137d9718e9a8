"""Inputs that clinics send: each gives what the scan behind it gives, or is refused by name.

The files are those of ``shared/cases/clinical``: one CT, and the same CT padded, cropped, cut, split, moved
or damaged. They are compared with the scan itself, so that new weights move both.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("monai")

from lesionsynth.io import read_ct
from normnet.evaluate import EvaluateConfig, evaluate
from normnet.model import Model, bundled_models
from normnet.predict import main as predict
from normnet.predict import predict_case
from normnet.prepare.__main__ import main as prepare

Volumes = Callable[[Path], dict[str, float]]
KINDS = ("lung_ml", "lesion_ml", "right_lung_ml", "right_lesion_ml", "left_lung_ml", "left_lesion_ml")


@pytest.fixture(scope="module")
def clinical(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases, unpacked."""
    source = shared_data.parent / "cases" / "clinical"
    if not source.is_dir():
        pytest.skip(f"the cases are not installed: {source} does not exist")
    folder = tmp_path_factory.mktemp("clinical")
    for file in source.iterdir():
        if file.name.endswith(".tar.gz"):
            with tarfile.open(file) as packed:
                packed.extractall(folder / file.name[:2], filter="data")
        else:
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def volumes(clinical: Path) -> Volumes:
    """What one of the networks finds; all five find the same kind of wrong."""
    model = Model.load(bundled_models()[0])

    def volumes(path: Path) -> dict[str, float]:
        found = predict_case(path, [model], keep_probability=False)
        assert np.isfinite(found.ct.affine).all()
        return {kind: float(found.volumes[kind] or 0) for kind in KINDS}

    return volumes


@pytest.fixture(scope="module")
def right(clinical: Path, volumes: Volumes) -> dict[str, float]:
    found = volumes(clinical / "ref_plain18.nii.gz")
    # ml, as published with the cases: by thresholds, which take in more of the hilum
    assert found["lung_ml"] == pytest.approx(1061.9, rel=0.02)
    return found


def dicom(folder: Path) -> Path:
    (inside,) = (path for path in folder.iterdir() if path.is_dir())
    return inside


@pytest.mark.parametrize(
    ("name", "warning", "lungs"),
    [
        # the network's grid follows the body, of which less is in view
        ("02b_nan_outside_fov18.nii.gz", "NaN", 0.01),
        ("03_cropped_to_lung_box.nii.gz", None, 0.03),
        ("06_sform2_qform1_disagree.nii.gz", "sform and qform", 0.001),
        ("07", None, 0.001),
        ("10_sform_shear_1e-3.nii.gz", "shear", 0.005),
        ("12", None, 0.001),
    ],
)
def test_what_is_odd_about_a_file_changes_nothing(
    clinical: Path, volumes: Volumes, right: dict[str, float], name: str, warning: str | None, lungs: float
) -> None:
    path = clinical / name
    path = dicom(path) if path.is_dir() else path
    if warning is None:
        found = volumes(path)
    else:
        with pytest.warns(UserWarning, match=warning):
            found = volumes(path)
    # a crop moves the working grid by a part of a voxel and takes what lies around the lungs from the network
    assert found == pytest.approx(right, rel=0.05)
    assert found["lung_ml"] == pytest.approx(right["lung_ml"], rel=lungs)


@pytest.mark.parametrize(("name", "distance"), [("08", 0.625), ("09", 1.0)])
def test_distances_are_those_of_the_whole_series(clinical: Path, name: str, distance: float) -> None:
    scan = read_ct(dicom(clinical / name))
    # both ends are rounded or moved by 0.01 mm at most, over at least 17 steps
    assert scan.spacing[0] == pytest.approx(distance, abs=0.02 / 17)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("02c_nan_inside_lung.nii.gz", ["NaN", "voxels"]),
        ("04", ["truncated"]),
        ("05_gzip_bitflip.nrrd", ["damaged"]),
    ],
)
def test_what_cannot_be_right_is_refused(clinical: Path, name: str, rules: list[str]) -> None:
    path = clinical / name
    with pytest.raises(ValueError, match=".*".join(rules)):
        read_ct(dicom(path) if path.is_dir() else path)


def test_a_padded_frame_is_air(clinical: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the whole chest; the same lungs as without the frame."""
    files = [str(clinical / name) for name in ("ref_plain100.nii.gz", "01_frame_of_0HU.nii.gz")]
    assert prepare([*files, "--output", str(tmp_path / "store"), "--name", "plain", "framed"]) == 0
    lungs = {}
    for name in ("plain", "framed"):
        lungs[name] = json.loads((tmp_path / "store" / "cases" / name / "meta.json").read_text())["lung_ml"]
    assert lungs["plain"] == pytest.approx(4312.5, rel=0.02)  # ml, as published with the cases: by thresholds
    assert lungs["framed"] == pytest.approx(lungs["plain"], rel=0.03)  # 14 mm of the field are gone
    assert "warning: framed: " in capsys.readouterr().err


def test_two_folders_are_one_case(clinical: Path, tmp_path: Path) -> None:
    assert predict([str(clinical / "07"), "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*_lesions.nii.gz"))) == 1


def test_a_segmentation_of_a_series_without_a_birthdate(clinical: Path, tmp_path: Path) -> None:
    folder = dicom(clinical / "12")
    assert predict([str(folder), "--output", str(tmp_path / "out"), "--dicom-seg", "--name", "p"]) == 0
    assert {"p_lesions.nii.gz", "p_lesions.dcm"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_truth_of_several_labels(clinical: Path, tmp_path: Path) -> None:
    """The prediction is the truth's third label."""
    files = {
        "predictions": (clinical / "13_pred_p_lesions.nii.gz",),
        "truth": (clinical / "13_truth_lungs12_infection3.nii.gz",),
    }
    ct = tmp_path / "13_pred_p.nii.gz"
    shutil.copy(clinical / "ref_plain18.nii.gz", ct)
    table = tmp_path / "cases.csv"
    table.write_text(f"case,ct,lesions,prediction\np,{ct},{files['truth'][0]},{files['predictions'][0]}\n")

    def dice(folder: str, **label: tuple[int, ...]) -> float:
        config = EvaluateConfig(cases=table, output=tmp_path / folder, pictures=0, **label)
        return evaluate(config).scores["p"]["dsc"]

    assert dice("all") == pytest.approx(0.095, abs=1e-3)
    assert "1 (" in (tmp_path / "all" / "tables.md").read_text()  # what counts is listed
    assert dice("third", label=(3,)) == 1.0
