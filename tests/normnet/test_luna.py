"""LUNA16's layout: ten folders of MetaImage files and one annotations.csv for all."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from lesionsynth.io import find_sources
from normnet.prepare import Store
from normnet.prepare.__main__ import main
from normnet.prepare.exclude import find_annotations
from tests import classical
from tests.classical import prepare
from tests.normnet.test_prepare import SPACING, chest
from tests.test_io import write_series

SETTINGS = {"spacing": (5.0, 3.0, 3.0), "size": 96}
FLAGS = ["--spacing", "5", "3", "3", "--size", "96", *classical.FLAGS]
ORIGIN = (-150.0, -100.0, -400.0)
HEAD = "seriesuid,coordX,coordY,coordZ,diameter_mm\n"


def scan(path: Path, seed: int) -> None:
    image = sitk.GetImageFromArray(chest(seed)[0])
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin(ORIGIN)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


@pytest.fixture(autouse=True, scope="module")
def plain_pictures() -> Iterator[None]:
    """Drawing takes most of the time of so small a case; test_prepare.py looks at real pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normnet.prepare.run.prepared_picture", lambda *_, **__: b"\x89PNG" * 10)
        yield


@pytest.fixture(scope="module")
def luna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans in two subsets, lung masks beside them under the same names, nodules in scan 1.1 alone."""
    root = tmp_path_factory.mktemp("LUNA16")
    for name, seed in (("subset0/1.1.mhd", 1), ("subset0/1.2.mhd", 2), ("subset7/1.3.mhd", 3)):
        scan(root / name, seed)
    shutil.copytree(root / "subset0", root / "seg-lungs-LUNA16")
    shutil.copytree(root / "subset0", root / "other")
    # slices of 5 mm from -400 mm: 21 mm around slice 19.2
    nodules = f"1.1,-80,5,{-400 + 5 * 19.2},21\n1.1,-80,5,-350,3\n9.9,1,2,3,4\n"
    (root / "annotations.csv").write_text(HEAD + nodules)
    return root


@pytest.fixture(scope="module")
def store(luna: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    with pytest.warns(UserWarning, match=r"annotations\.csv: 1 of 2 annotated series.*9\.9"):
        summary = prepare([luna], tmp_path_factory.mktemp("out") / "s", **SETTINGS)
    assert not summary.failed
    return summary.store


def test_subsets_alone_are_searched(luna: Path) -> None:
    found = find_sources([luna])
    assert [s.path.relative_to(luna).as_posix() for s in found] == [
        "subset0/1.1.mhd",
        "subset0/1.2.mhd",
        "subset7/1.3.mhd",
    ]
    assert [s.case for s in found] == ["1.1", "1.2", "1.3"]


def test_annotations_are_found(luna: Path, tmp_path: Path) -> None:
    file = luna / "annotations.csv"
    assert find_annotations([luna]) == [file]
    assert find_annotations([luna / "subset0", luna / "subset7"]) == [file]
    assert find_annotations([luna / "subset0" / "1.1.mhd", luna / "other"]) == []
    (tmp_path / "subset0").mkdir()
    (tmp_path / "annotations.csv").write_text("of something else")
    assert find_annotations([tmp_path]) == []  # no MetaImage in it


def test_slices_with_nodules_are_left_out(store: Store) -> None:
    """Against the definition, slice by slice of the store: no weight on a slice that a nodule reaches."""
    assert store.case_ids == ["1.1", "1.2", "1.3"]
    case = store["1.1"]
    bad = set()
    for centre, diameter in ((19.2, 21.0), (10.0, 3.0)):
        half = diameter / 2 / 5 + 1  # and one slice more
        bad |= set(range(math.floor(centre - half), math.ceil(centre + half) + 1))
    used = {z for a, b in case.segments for z in range(a, b)}
    start = case.meta["start"][0]
    for z in range(case.shape[0]):
        # same slice distance in file and store: a slice of the store is one of the file
        assert (z in used) == (start + z not in bad), z
    mask = case.slab(0, case.shape[0])[1]
    assert not mask[[z for z in range(case.shape[0]) if z not in used]].any()
    for name in ("1.2", "1.3"):
        assert store[name].segments == [(0, store[name].shape[0])]
        assert store[name].meta["nodules"] == []
    assert len(case.meta["nodules"]) == 2


def test_given_annotations_replace_those_found(
    luna: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.csv"
    mine.write_text(f"{HEAD}1.3,-80,5,-300,4\n")
    code = main([str(luna), "--output", str(tmp_path / "s"), "--annotations", str(mine), *FLAGS])
    assert code == 0
    assert "warning" not in capsys.readouterr().err
    found = Store.open(tmp_path / "s")
    assert len(found["1.1"].segments) == 1
    assert len(found["1.3"].segments) == 2


def test_annotations_of_another_study(luna: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.csv").write_text(f"{HEAD}7.7,1,2,3,4\n7.8,1,2,3,4\n")
    flags = ["--output", str(tmp_path / "s"), "--annotations", str(tmp_path / "other.csv")]
    assert main([str(luna), *flags, *FLAGS]) == 2
    error = capsys.readouterr().err
    assert "other.csv: annotations of another study: none of its 2 series (7.7, ...)" in error
    assert not (tmp_path / "s").exists()


def test_annotations_by_series_uid(tmp_path: Path) -> None:
    """LIDC's own DICOM has the UIDs of LUNA16, under any folder name."""
    uid = write_series(tmp_path / "a", chest(1)[0], step=5.0, PixelSpacing=[3.0, 3.0])
    (tmp_path / "n.csv").write_text(f"{HEAD}{uid},10,10,200,6\n")
    summary = prepare([tmp_path / "a"], tmp_path / "s", annotations=tmp_path / "n.csv", **SETTINGS)
    assert [c.message for c in summary.failed] == []
    assert len(summary.store["a"].segments) == 2


def test_an_annotation_outside_the_scan(luna: Path, tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text(f"{HEAD}1.1,0,0,900,6\n")
    summary = prepare([luna], tmp_path / "s", annotations=tmp_path / "n.csv", **SETTINGS)
    (case,) = summary.failed
    assert case.case_id == "1.1"
    assert "1.1.mhd: the annotation at (0, 0, 900) mm lies outside the volume" in case.message
    assert summary.store.case_ids == ["1.2", "1.3"]


def test_new_annotations_are_noticed(store: Store, luna: Path, tmp_path: Path) -> None:
    """A case that is there stays as it is, but not without a word."""
    shutil.copytree(store.path, tmp_path / "s")
    (tmp_path / "n.csv").write_text(f"{HEAD}1.2,-80,5,-300,4\n")
    summary = prepare([luna], tmp_path / "s", annotations=tmp_path / "n.csv", **SETTINGS)
    assert [c.status for c in summary.cases] == ["there"] * 3
    assert [bool(c.message) for c in summary.cases] == [True, True, False]
    assert "prepared with another nodules; overwrite prepares it again" in summary.cases[1].message
    again = prepare([luna], tmp_path / "s", annotations=tmp_path / "n.csv", overwrite=True, **SETTINGS)
    assert [c.status for c in again.cases] == ["prepared"] * 3
    assert len(np.asarray(again.store["1.2"].segments)) == 2
