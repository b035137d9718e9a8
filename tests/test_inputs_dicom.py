"""Finding CT in files and folders, and choosing among the DICOM series of a folder."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.testing import assert_array_equal

import lesionsynth.io as io
from lesionsynth.io import Source, dicom_folders, find_sources
from normnet.prepare.__main__ import main
from tests import classical
from tests.classical import load_case, prepare
from tests.normnet.test_prepare import SPACING, chest, write
from tests.test_io import volume, write_series

SCOUT = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One folder with a lung and a soft series, a larger scout, a larger MR and a report; UIDs by name."""
    folder = tmp_path_factory.mktemp("study")
    uids = {"folder": str(folder)}
    for name, slices, changes in (
        ("lung", 6, {"SeriesDescription": "Lung 1.0 B70"}),
        ("soft", 4, {"SeriesDescription": "Weichteil Sch\u00e4del", "SpecificCharacterSet": "ISO_IR 100"}),
        ("scout", 8, {"ImageType": SCOUT}),
        ("mr", 9, {"Modality": "MR"}),
        ("hole", 11, {"SeriesDescription": "holes"}),
    ):
        files = [f"{name}{z}.dcm" for z in range(slices)]
        skip = (5,) if name == "hole" else ()
        uids[name] = write_series(folder, volume(slices, (slices, 6, 7)), names=files, skip=skip, **changes)
    (folder / "notes.txt").write_text("no DICOM")
    (folder / "._lung0.dcm").write_bytes(b"\0" * 128 + b"DICM")
    report = pydicom.dcmread(folder / "lung0.dcm")
    del report.PixelData
    report.Modality, report.SeriesInstanceUID = "SR", pydicom.uid.generate_uid()
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.SOPInstanceUID = report.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    report.save_as(folder / "report.dcm")
    return uids


# ---- lesionsynth.io


def test_series_are_listed_largest_first(study: dict[str, str]) -> None:
    infos = [info for info in io.list_series(study["folder"]) if info.modality in ("CT", "MR")]
    assert [info.uid for info in infos] == [study[n] for n in ("hole", "mr", "scout", "lung", "soft")]
    assert [info.slices for info in infos] == [10, 9, 8, 6, 4]
    assert [info.usable for info in infos] == [False, False, False, True, True]
    assert [info.localizer for info in infos] == [False, False, True, False, False]
    hole, mr, scout, lung, _ = infos
    assert hole.problem.startswith("missing slices: 5.00 mm between slices 4 and 5")
    assert "modality must be CT, got MR" in mr.problem
    assert "localizer" in scout.problem
    assert lung.problem == ""
    assert lung.description == "Lung 1.0 B70"
    assert study["folder"] not in "".join(info.problem for info in infos)


def test_equal_series_are_listed_by_uid(tmp_path: Path) -> None:
    uids = [
        write_series(tmp_path, volume(n, (3, 6, 7)), names=[f"{n}-{z}.dcm" for z in range(3)])
        for n in range(4)
    ]
    assert [info.uid for info in io.list_series(tmp_path)] == sorted(uids)
    with pytest.warns(UserWarning, match=f"reading {min(uids)}"):
        hu = io.read_ct(tmp_path).hu
    assert_array_equal(hu, volume(uids.index(min(uids)), (3, 6, 7)))


def test_no_dicom_no_series(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x" * 200)
    assert io.list_series(tmp_path) == []
    assert capfd.readouterr() == ("", "")  # GDCM would complain on the terminal
    with pytest.raises(FileNotFoundError, match="gone"):
        io.list_series(tmp_path / "gone")


def test_a_series_is_chosen_by_uid(study: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # who names a series need not be warned
        assert_array_equal(io.read_ct(study["folder"], study["soft"]).hu, volume(4, (4, 6, 7)))
    with pytest.raises(ValueError, match="missing slices"):
        io.read_ct(study["folder"], study["hole"])
    with pytest.raises(ValueError, match=r"series must be one of .*, got 1\.2\.3") as caught:
        io.read_ct(study["folder"], "1.2.3")
    for name in ("lung", "soft", "scout", "mr"):
        assert study[name] in str(caught.value)
    file = Path(study["folder"]) / "lung0.dcm"
    assert_array_equal(io.read_ct(file, study["lung"]).hu, volume(6, (6, 6, 7)))
    with pytest.raises(ValueError, match="series must be that of the file"):
        io.read_ct(file, study["soft"])


def test_the_largest_readable_ct_is_read(study: dict[str, str]) -> None:
    """Scout, MR and a series with holes are all larger."""
    with pytest.warns(UserWarning, match=f"several DICOM series.*reading {study['lung']}") as caught:
        assert_array_equal(io.read_ct(study["folder"]).hu, volume(6, (6, 6, 7)))
    assert len(caught) == 1
    for name in ("soft", "scout", "mr", "hole"):
        assert study[name] in str(caught[0].message)


def test_a_series_of_a_plain_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", volume())
    with pytest.raises(ValueError, match=r"a\.nii\.gz: series must be omitted"):
        io.read_ct(path, "1.2.3")


# ---- find_sources


def test_largest_names_the_others(study: dict[str, str]) -> None:
    folder = Path(study["folder"])
    with pytest.warns(UserWarning, match=f"taking {study['lung']}; left: .*{study['soft']}.*--series"):
        found = find_sources([folder])
    assert found == [Source(folder.name, folder, study["lung"])]


def test_all_takes_every_ct(study: dict[str, str]) -> None:
    """Also the one with holes, so that its failure is reported; neither scout nor MR."""
    folder = Path(study["folder"])
    with pytest.warns(UserWarning, match=study["scout"]):
        found = find_sources([folder], series="all")
    assert [(s.case, s.series) for s in found] == [
        (f"{folder.name}_s1", study["hole"]),
        (f"{folder.name}_s2", study["lung"]),
        (f"{folder.name}_s3", study["soft"]),
    ]


def test_one_uid_among_many_folders(study: dict[str, str], tmp_path: Path) -> None:
    folder = Path(study["folder"])
    other = write_series(tmp_path / "b", volume())
    assert find_sources([tmp_path, folder], series=study["soft"]) == [
        Source(folder.name, folder, study["soft"])
    ]
    assert find_sources([tmp_path, folder], series=other) == [Source("b", tmp_path / "b", other)]
    with pytest.raises(ValueError, match=r"series must be largest, all or the UID.*got 1\.2\.3") as caught:
        find_sources([tmp_path, folder], series="1.2.3")
    assert other in str(caught.value)
    assert study["lung"] in str(caught.value)


def test_nested_folders_and_names(tmp_path: Path) -> None:
    """DICOM at any depth; equal folder names get the folders above in front; a link is not followed twice."""
    a = write_series(tmp_path / "anna" / "2020" / "chest", volume())
    b = write_series(tmp_path / "bert" / "2021" / "chest", volume())
    c = write_series(tmp_path / "carl" / "scan", volume())
    d = write_series(tmp_path / "anna" / "2021" / "chest", volume())
    (tmp_path / "carl" / "up").symlink_to(tmp_path)
    write_series(tmp_path / ".trash" / "scan", volume())
    found = find_sources([tmp_path])
    assert [(s.case, s.series) for s in found] == [
        ("2020_chest", a),
        ("anna_2021_chest", d),
        ("bert_2021_chest", b),
        ("scan", c),
    ]
    assert [s.case for s in find_sources([tmp_path], names=["1", "2", "3", "4"])] == ["1", "2", "3", "4"]
    with pytest.raises(ValueError, match=r"--name\) must be one for each CT found, got 1 name for 4 CT"):
        find_sources([tmp_path], names=["1"])


def test_masks_and_hidden_files_are_no_ct(tmp_path: Path) -> None:
    for name in (
        "r4_hu.nii.gz",
        "r5.NRRD",
        "x/r6-ct.mha",
        "r4_lung.nii.gz",
        "r4_lesion.nii.gz",
        "r4_lesions.nii.gz",
        "r4_probability.nii.gz",
        "r4_lung_mask.nii.gz",
        "r5_mask.nii",
        "r4_core.nii.gz",
        "r4_pred.nii",
        "._r4_hu.nii.gz",
        ".hidden/r7.nii",
        "labelsTr/r5.nii.gz",
        "masks/r5.nii.gz",
        "read.me",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_sources([tmp_path])
    assert [s.path.relative_to(tmp_path).as_posix() for s in found] == [
        "r4_hu.nii.gz",
        "r5.NRRD",
        "x/r6-ct.mha",
    ]
    assert [s.case for s in found] == ["r4_hu", "r5", "r6-ct"]
    assert all(s.series is None for s in found)
    # named by hand, a file is taken for what the user says it is
    assert len(find_sources([tmp_path / "r4_lung.nii.gz"])) == 1
    assert [s.case for s in find_sources([tmp_path / "masks"])] == ["r5"]


def test_files_of_one_series_are_one_case(study: dict[str, str]) -> None:
    """A shell turns scan/*.dcm into many names."""
    folder = Path(study["folder"])
    files = sorted(folder.glob("lung*.dcm")) + sorted(folder.glob("soft*.dcm"))[:2]
    found = find_sources(files, names=["a", "b"])
    assert found == [Source("a", folder, study["lung"]), Source("b", folder, study["soft"])]
    with pytest.raises(ValueError, match="case names must differ"):
        find_sources(files)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inputs must name at least one CT"):
        find_sources([])
    with pytest.raises(FileNotFoundError, match=r"gone\.nii"):
        find_sources([tmp_path / "gone.nii"])
    (tmp_path / "empty" / "below").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"empty: a folder must hold CT .* found none"):
        find_sources([tmp_path / "empty"])
    (tmp_path / "a.nii").touch()
    with pytest.raises(ValueError, match="case names must differ, got a more than once"):
        find_sources([tmp_path / "a.nii", tmp_path / "a.nii"])


def test_only_mr_is_left_to_the_reader(tmp_path: Path) -> None:
    """The folder is reported as a failed case, and does not stop the others."""
    uid = write_series(tmp_path / "head", volume(), Modality="MR")
    assert find_sources([tmp_path]) == [Source("head", tmp_path / "head", uid)]
    assert [folder for folder, _ in dicom_folders([tmp_path])] == [tmp_path / "head"]


# ---- load_case


def test_sides_of_segmented_and_given_lungs(tmp_path: Path) -> None:
    hu, truth = chest(1)
    ct = write(tmp_path / "a.nii.gz", hu)
    mask = write(tmp_path / "a_lung.nii.gz", truth.astype(np.uint8))
    west = np.arange(100) < 50
    for case in (load_case(ct), load_case(ct, mask)):
        assert case.native_sides is not None
        right, left = case.native_sides
        assert_array_equal(right | left, case.native_mask)
        assert right.any()
        assert left.any()
        assert not right[:, :, ~west].any()
        assert not left[:, :, west].any()
    only = load_case(ct, keep_lung="left").native_sides
    assert only is not None
    assert not only[0].any()
    assert_array_equal(only[1], load_case(ct).native_mask & ~west)
    one = write(tmp_path / "one_lung.nii.gz", (truth & west).astype(np.uint8))
    assert load_case(ct, one).native_sides is None  # one blob: nobody knows which lung it is


@pytest.fixture
def fake_lungmask(monkeypatch: pytest.MonkeyPatch) -> list[sitk.Image]:
    """A module ``lungmask`` that calls air in the patient's right half right lung; keeps what it is given."""
    given: list[sitk.Image] = []

    class LMInferer:
        def apply(self, image: sitk.Image) -> np.ndarray:
            given.append(image)
            air = sitk.GetArrayFromImage(image) < -500
            air[:, :12] = air[:, -12:] = air[:, :, :18] = air[:, :, -18:] = False
            x = np.arange(air.shape[2])
            return np.where(air, np.where(x < air.shape[2] // 2, 1, 2), 0).astype(np.uint8)

    module = types.ModuleType("lungmask")
    module.LMInferer = LMInferer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lungmask", module)
    return given


def test_lungmask_is_used_where_installed(fake_lungmask: list[sitk.Image], tmp_path: Path) -> None:
    hu, truth = chest(1)
    # stored upside down and left to right: the network must still see the patient upright
    image = sitk.GetImageFromArray(np.ascontiguousarray(hu[::-1, :, ::-1]))
    image.SetSpacing(SPACING[::-1])
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, -1))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    case = load_case(tmp_path / "a.nrrd", lungs="lungmask")
    assert_array_equal(sitk.GetArrayFromImage(fake_lungmask[0]), hu)
    assert fake_lungmask[0].GetSpacing() == SPACING[::-1]
    assert case.native_sides is not None
    right, left = case.native_sides
    assert_array_equal(right, case.native_mask & (np.arange(100) < 50))
    assert_array_equal(left, case.native_mask & (np.arange(100) >= 50))
    assert (case.native_mask & truth).sum() > 0.9 * truth.sum()
    summary = prepare([tmp_path / "a.nrrd"], tmp_path / "s", lungs="lungmask", spacing=(5, 3, 3), size=96)
    assert summary.store["a"].meta["lungs_from"] == "lungmask"


def test_lungmask_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lungmask", None)
    ct = write(tmp_path / "a.nii.gz", chest(1)[0])
    with pytest.raises(ImportError, match="pip install lungmask"):
        load_case(ct, lungs="lungmask")
    with pytest.raises(ValueError, match=r"lungs must be network, classical, lungmask, or .*, got 'best'"):
        load_case(ct, lungs="best")
    assert main([str(ct), "--output", str(tmp_path / "s"), "--lungs", "lungmask"]) == 2
    assert not (tmp_path / "s").exists()


# ---- the command


def test_list_series_prints_a_table(study: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([study["folder"], "--list-series"]) == 0
    lines = capsys.readouterr().out.splitlines()
    stars = [line for line in lines if line.startswith("  * ")]
    assert len(stars) == 1
    assert study["lung"] in stars[0]
    assert "Lung 1.0 B70" in stars[0]
    (mr,) = (line for line in lines if study["mr"] in line)
    assert "modality must be CT, got MR" in mr


def test_prepare_takes_a_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two chests in one folder; the smaller is asked for."""
    large, small = chest(1)[0], chest(2)[0][8:32]
    pixel = {"step": 5.0, "PixelSpacing": [3.0, 3.0]}
    write_series(tmp_path / "CT of a b", large, names=[f"a{z}.dcm" for z in range(40)], **pixel)
    uid = write_series(tmp_path / "CT of a b", small, names=[f"b{z}.dcm" for z in range(24)], **pixel)
    flags = ["--output", str(tmp_path / "s"), "--spacing", "5", "3", "3", "--size", "96"]
    flags += [*classical.FLAGS, "--series"]
    assert main([str(tmp_path / "CT of a b"), *flags, uid]) == 0
    summary = prepare([tmp_path / "CT of a b"], tmp_path / "s", spacing=(5.0, 3.0, 3.0), size=96, series=uid)
    (case,) = summary.cases
    assert (case.case_id, case.status, case.series, case.message) == ("CT_of_a_b", "there", uid, "")
    meta = summary.store["CT_of_a_b"].meta
    assert meta["series"] == uid
    assert meta["source_shape"][0] == 24
    assert uid in (tmp_path / "s" / "summary.csv").read_text()
    assert main([str(tmp_path / "CT of a b"), *flags, "largest"]) == 0
    captured = capsys.readouterr()
    assert "warning: " in captured.err
    assert "several DICOM series; taking" in captured.err
    assert "prepared with another series; overwrite prepares it again" in captured.out
