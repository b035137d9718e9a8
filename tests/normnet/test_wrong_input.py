"""Wrong input of every kind: a message that names the file and the rule, and the other cases unharmed."""

from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from lesionsynth import phantom
from normnet.prepare import CaseSummary, Store
from normnet.prepare import run as run_module
from normnet.prepare.__main__ import main
from normnet.prepare.lungs import check_chest
from normnet.prepare.store import write_atomically
from tests import classical
from tests.classical import load_case, prepare
from tests.normnet.test_prepare import write
from tests.test_io import volume, write_series

FLAGS = ["--spacing", "8", "3.2", "3.2", "--size", "120", *classical.FLAGS]
SETTINGS: dict[str, Any] = {"spacing": (8.0, 3.2, 3.2), "size": 120}
DICOM = {"PixelSpacing": [3.0, 3.0], "step": 5.0}


def head() -> np.ndarray:
    """HU of a head, (64, 74, 60) voxels of 3.5 x 3 x 3 mm: skull, brain, 80 ml of sinuses and throat."""
    z, y, x = np.meshgrid(np.arange(64) - 31.5, np.arange(74) - 36.5, np.arange(60) - 29.5, indexing="ij")
    radius = np.sqrt((3.5 * z / 105) ** 2 + (3 * y / 98) ** 2 + (3 * x / 76) ** 2)
    hu = np.full(z.shape, -1000.0)
    hu[radius < 1] = 60
    hu[radius < 0.95] = 1100
    hu[radius < 0.87] = 35
    hu[(3.5 * (z + 12) / 40) ** 2 + (3 * (y + 20) / 20) ** 2 + (3 * x / 24) ** 2 < 1] = -980
    hu += np.random.default_rng(0).normal(0, 10, hu.shape)
    return hu.clip(-1024).astype(np.int16)


@pytest.fixture(autouse=True, scope="module")
def plain_pictures() -> Iterator[None]:
    """Drawing takes most of the time of so small a case; test_prepare.py looks at real pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normnet.prepare.run.prepared_picture", lambda *_, **__: b"\x89PNG" * 10)
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chest = phantom.chest_ct((24, 96, 120), (8.0, 3.2, 3.2), seed=1)
    return write(tmp_path_factory.mktemp("good") / "good.nii.gz", chest.hu, chest.spacing)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, good: Path) -> Path:
    """A folder with one wrong input of each kind."""
    base = tmp_path_factory.mktemp("bad")
    picture = np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(picture, isVector=True), str(base / "p.jpg"))
    os.replace(base / "p.jpg", base / "photo.nii.gz")
    (base / "packed.nii.gz").write_bytes(gzip.compress((base / "photo.nii.gz").read_bytes()))
    whole = good.read_bytes()
    (base / "cut.nii.gz").write_bytes(whole[: len(whole) * 2 // 3])
    (base / "short.nii").write_bytes(gzip.decompress(whole)[:-1000])
    write(base / "head.nii.gz", head(), (3.5, 3.0, 3.0))
    sitk.WriteImage(sitk.GetImageFromArray(volume()[0]), str(base / "flat.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(volume()[:1]), str(base / "slice.nrrd"))
    write(base / "scaled.nii.gz", (volume().astype(np.float32) + 1000) / 1400)
    (base / "empty.mha").touch()
    hu = volume(shape=(8, 6, 7))
    write_series(base / "holes", hu, skip=(4,), **DICOM)
    write_series(base / "tilt", hu, positions=[(0, 2.0 * z, 5.0 * z) for z in range(8)], **DICOM)
    write_series(base / "mr", hu, Modality="MR", **DICOM)
    write_series(base / "scout", hu, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **DICOM)
    write_series(base / "single", hu[:1], **DICOM)
    write_series(base / "enhanced", hu, NumberOfFrames=8, **DICOM)
    return base


MESSAGES = {
    "photo": ("photo.nii.gz: damaged or truncated gzip file",),
    "packed": ("packed.nii.gz: unreadable",),
    "cut": ("cut.nii.gz: damaged or truncated gzip file",),
    "short": ("short.nii: truncated: ", "bytes of the", "its header announces"),
    "head": ("head.nii.gz: no lung found: must be a CT of the chest", "as in a head"),
    "flat": ("flat.nii.gz: a volume must be 3-D",),
    "slice": ("slice.nrrd: a volume must be 3-D with at least two voxels along each axis",),
    "scaled": ("scaled.nii.gz: not a CT in Hounsfield units: values must reach below -300",),
    "empty": ("empty.mha: unreadable",),
    "holes": ("holes: missing slices: 10.00 mm between slices 3 and 4, 5.00 mm elsewhere",),
    "tilt": ("tilt: gantry tilt (slices shift sideways by 14.0 mm", "resample"),
    "mr": ("mr/", ".dcm: the DICOM modality must be CT, got MR"),
    "scout": ("scout/", ".dcm: a CT volume must be of axial slices, got a localizer"),
    "single": ("single: a CT volume needs at least two slices, the series has 1",),
    "enhanced": ("enhanced/", "multi-frame DICOM is not read; convert it"),
}


@pytest.fixture(scope="module")
def outcome(bad: Path, good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of it in one call of the command, the good one in the middle."""
    store = tmp_path_factory.mktemp("out") / "store"
    inputs = sorted(bad.iterdir())
    inputs.insert(len(inputs) // 2, good)
    cases: list[CaseSummary] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normnet.prepare.__main__._progress", cases.append)
        code = main([*map(str, inputs), "--output", str(store), *FLAGS])
    return {"code": code, "store": store, **{case.case_id: case for case in cases}}


@pytest.mark.parametrize("case", MESSAGES)
def test_the_message_names_file_and_rule(outcome: dict[str, Any], case: str) -> None:
    assert outcome[case].status == "failed"
    for part in MESSAGES[case]:
        assert part in outcome[case].message
    assert len(outcome[case].message) < 400


def test_the_good_case_is_prepared(outcome: dict[str, Any], good: Path) -> None:
    assert outcome["code"] == 1
    assert outcome["good"].status == "prepared"
    store = Store.open(outcome["store"])
    assert store.case_ids == ["good"]
    alone = load_case(good, margin=4, **SETTINGS)
    assert np.array_equal(store["good"].slab(0, alone.hu.shape[0])[0], alone.hu)
    files = {p.relative_to(store.path).as_posix() for p in store.path.rglob("*") if p.is_file()}
    arrays = {f"cases/good/{name}" for name in ("hu.b2nd", "mask.b2nd", "meta.json")}
    assert files == arrays | {"store.json", "summary.csv", "qc/good.png"}


def test_every_failure_is_in_the_table(outcome: dict[str, Any]) -> None:
    lines = (outcome["store"] / "summary.csv").read_text().splitlines()
    assert len(lines) == 1 + len(MESSAGES) + 1
    assert sum(",failed," in line for line in lines) == len(MESSAGES)


def test_a_whole_folder_at_once(bad: Path, good: Path, tmp_path: Path) -> None:
    """The same through the search for files."""
    summary = prepare([bad, good], tmp_path / "s", **SETTINGS)
    assert {c.case_id for c in summary.failed} == set(MESSAGES)
    assert summary.store.case_ids == ["good"]


def test_a_chest_is_no_head() -> None:
    """Lungs full of fluid have no skull's bone; a thorax full of contrast has air."""
    coarse = np.full((10, 20, 20), 40, np.float32)
    body = np.ones(coarse.shape, bool)
    empty = np.zeros(coarse.shape, bool)
    few = empty.copy()
    few[:, :2, :10] = True  # 5 %
    more = empty.copy()
    more[:, :2] = True  # 10 %
    check_chest(coarse, body, (few, empty))
    coarse[:, -3:] = 400  # 15 %
    check_chest(coarse, body, (more, empty))
    with pytest.raises(ValueError, match=r"5\.0% of the body is air space and 15\.0% bone"):
        check_chest(coarse, body, (few, empty))


# ---- masks


def test_a_mask_of_another_shape(good: Path, tmp_path: Path) -> None:
    hu = sitk.GetArrayFromImage(sitk.ReadImage(str(good)))
    lung = phantom.chest_ct((24, 96, 120), (8.0, 3.2, 3.2), seed=1).lung_mask
    for name in ("good", "wrong", "none"):
        write(tmp_path / "ct" / f"{name}.nii.gz", hu, (8.0, 3.2, 3.2))
    write(tmp_path / "lungs" / "good_lung.nii.gz", lung.astype(np.uint8), (8.0, 3.2, 3.2))
    write(tmp_path / "lungs" / "wrong_lung.nii.gz", lung[:-1].astype(np.uint8), (8.0, 3.2, 3.2))
    summary = prepare([tmp_path / "ct"], tmp_path / "s", masks=tmp_path / "lungs", **SETTINGS)
    assert summary.store.case_ids == ["good"]
    none, wrong = summary.failed
    assert "wrong_lung.nii.gz: the mask's shape must be that of" in wrong.message
    assert "(24, 96, 120) (z, y, x), got (23, 96, 120)" in wrong.message
    assert "masks must hold none.nii.gz, or one file of none_*.nii.gz" in none.message
    with pytest.raises(FileNotFoundError, match="gone"):
        prepare([good], tmp_path / "t", masks=tmp_path / "gone", **SETTINGS)


# ---- a full disk


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fill(patch: pytest.MonkeyPatch, where: str) -> None:
    """Let every write of one kind fail for the case ``first``, with half of it written."""
    target = {"arrays": "hu.b2nd", "meta": "meta.json", "picture": "first.png"}[where]
    written = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        # temporary names are the final ones with something around them
        if target.split(".")[0] in path.name and "first" in str(path):
            written(path, data[: len(data) // 2])
            no_space()
        return written(path, data)

    patch.setattr(Path, "write_bytes", write_bytes)


@pytest.mark.parametrize("where", ["arrays", "meta", "picture"])
def test_a_full_disk_costs_one_case(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with monkeypatch.context() as patch:
        fill(patch, where)
        summary = prepare([good, good], tmp_path / "s", names=["first", "second"], **SETTINGS)
    (case,) = summary.failed
    assert case.case_id == "first"
    assert "No space left on device" in case.message
    assert str(good) in case.message
    assert summary.store.case_ids == ["second"]
    # nothing half-written, under its own name or another
    left = [p for p in summary.store.path.rglob("*") if "first" in p.name]
    assert left == []
    again = prepare([good, good], tmp_path / "s", names=["first", "second"], **SETTINGS)
    assert [c.status for c in again.cases] == ["prepared", "there"]


def test_a_full_disk_while_replacing_keeps_the_old_case(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepare([good], tmp_path / "s", names=["first"], **SETTINGS).store
    before = {p: p.read_bytes() for p in store.path.rglob("*") if p.is_file() and p.name != "summary.csv"}
    with monkeypatch.context() as patch:
        fill(patch, "arrays")
        summary = prepare([good], tmp_path / "s", names=["first"], overwrite=True, **SETTINGS)
    assert len(summary.failed) == 1
    after = {p: p.read_bytes() for p in store.path.rglob("*") if p.is_file() and p.name != "summary.csv"}
    assert after == before


def test_no_room_for_the_table(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normnet.prepare.run.write_atomically", no_space)
    with pytest.warns(UserWarning, match=r"summary\.csv could not be written.*No space left"):
        summary = prepare([good], tmp_path / "s", **SETTINGS)
    assert summary.store.case_ids == ["good"]


def test_no_room_for_the_store(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store that cannot even be begun is a wrong call."""
    (tmp_path / "file").touch()
    assert main([str(good), "--output", str(tmp_path / "file" / "s"), *FLAGS]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_arrays_that_do_not_fit_are_noticed(tmp_path: Path) -> None:
    """A real limit on the size of files, as a full disk: the compressor itself would not say a word."""
    import resource

    store = Store.create(tmp_path / "s", {"spacing": [1.0, 1.0, 1.0]})
    hu = np.random.default_rng(0).integers(-1000, 1000, (8, 64, 64)).astype(np.int16)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"too large.*hu\.b2nd"):
            store.add("a", hu, hu > 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "s" / "cases").iterdir()) == []


# ---- what nobody thought of


@pytest.mark.parametrize("error", [RuntimeError("library"), KeyError("x"), MemoryError()])
def test_any_error_costs_one_case(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    loaded: Callable[..., Any] = run_module.load_case

    def load(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "odd.nii.gz":
            raise error
        return loaded(path, *args, **options)

    odd = tmp_path / "odd.nii.gz"
    odd.touch()
    monkeypatch.setattr(run_module, "load_case", load)
    summary = prepare([odd, good], tmp_path / "s", **SETTINGS)
    (case,) = summary.failed
    assert case.message == f"{odd}: {type(error).__name__}: {error}"
    assert summary.store.case_ids == ["good"]


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    write_atomically(path, "old")
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match=r"No space left.*a\.csv"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
