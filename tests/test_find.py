"""What lies in the inputs is taken for a CT or told to be passed over; a series in several folders is one."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from lesionsynth.io import SUFFIXES, dicom_folders, find_sources, read_ct
from normnet.cases import locate
from normnet.prepare.__main__ import main as prepare
from tests.test_inputs_dicom import SCOUT
from tests.test_io import volume, write_series

MASKS = {
    "masks", "lungs", "lesions", "labelstr", "seg-lungs-luna16", "lung_and_infection_mask", "gt", "masken",
    "annotations", "ground-truth",
}  # fmt: skip
FOLDERS = (
    "masks", "Lungs", "lesions", "labelsTr", "p1", "p2", "data", ".trash", "seg-lungs-LUNA16", "site_b",
    "Lung_and_Infection_Mask", "GT", "Masken", "annotations", "Ground-Truth", "with_masks", "lung", "5_Lung",
)  # fmt: skip
FILES = (
    "a.nii.gz", "a_hu.nii.gz", "a_lung.nii.gz", "7_Thorax_1.0_Lung.nii.gz", "b-Mask.nrrd", "b_SEG.MHA",
    "c.nii", "c.seg.nrrd", "c_healthy.nii.gz", "d.img", "d.hdr", "e.mgz", "notes.txt", "._a.nii.gz",
    "gone.nii", "gone", "pipe.mha", "lung.nii", "a_LUNGE.nii", "Maske.mhd", "b_annotations.nii", "f.tar.gz",
)  # fmt: skip


LOST = re.compile(r"^gone|\.(img|hdr|mgz|tar\.gz)$")
"""What is not read even where it is named."""


def grow(folder: Path, random: np.random.Generator, depth: int = 0) -> None:
    """A tree of files and DICOM folders under names of all kinds."""
    folder.mkdir()
    for name in random.permutation(FILES)[: random.integers(0, 5)]:
        path = folder / str(name)
        if "gone" in path.name:
            path.symlink_to(folder / "nothing")
        elif "pipe" in path.name:
            os.mkfifo(path)
        else:
            path.touch()
    if random.random() < 0.3:
        write_series(folder, volume(shape=(2, 3, 4)), names=["1", "2"])
    if depth < 3:
        for name in random.permutation(FOLDERS)[: random.integers(1, 4)]:
            grow(folder / str(name), random, depth + 1)


def visible(folder: Path) -> Iterator[Path]:
    """Every file that somebody may take for a CT, and every folder with slices."""
    for path in sorted(folder.iterdir()):
        if path.name[0] == ".":
            continue
        if path.is_dir():
            yield from visible(path)
        elif path.name == "1":
            yield folder
        elif path.is_symlink() or path.name.lower().endswith((*SUFFIXES, ".img", ".hdr", ".mgz", ".tar.gz")):
            yield path


@pytest.mark.parametrize("seed", range(20))
def test_everything_is_taken_or_told(tmp_path: Path, seed: int) -> None:
    """The whole tree is accounted for: nothing twice, and nothing passed over without a reason."""
    root = tmp_path / "in"
    grow(root, np.random.default_rng(seed))
    (root / "always.nii").touch()
    found = find_sources([root], case_of=os.fspath)
    taken, passed = [source.path for source in found], [one.path for one in found.passed]
    assert sorted(taken + passed) == sorted(visible(root))
    for one in found.passed:
        assert one.why
        assert not one.named
        parts = {part.lower() for part in one.path.relative_to(root).parts}
        assert bool(MASKS & parts) == one.why.startswith("in ") or LOST.search(one.path.name)
    # what a name hides is read where the user gives it
    named = find_sources(taken + passed, case_of=os.fspath)
    lost = {path for path in passed if LOST.search(path.name)}
    assert {source.path for source in named} >= {*taken, *passed} - lost
    assert {one.path for one in named.passed if one.named} == lost


def touched(path: Path) -> Path:
    path.touch()
    return path


def test_a_folder_in_which_all_is_passed_over(tmp_path: Path) -> None:
    for name in ("7_Thorax_1.0_Lung.nii.gz", "Lungs/p1.nii.gz", "d.img"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    with pytest.raises(ValueError, match=r"a folder must hold CT .*found none; passed over: ") as caught:
        find_sources([tmp_path / "in"])
    for name in ("7_Thorax_1.0_Lung.nii.gz: named as", "Lungs/p1.nii.gz: in Lungs", "d.img: of no format"):
        assert name in str(caught.value)
    assert [source.case for source in find_sources([tmp_path / "in/Lungs"])] == ["p1"]
    with pytest.raises(ValueError, match=r"at least one CT, found none; passed over: .*d\.img"):
        find_sources([tmp_path / "in/d.img"])
    (tmp_path / "gone.nii").symlink_to(tmp_path / "nothing")
    found = find_sources([tmp_path / "gone.nii", tmp_path / "in/Lungs"])
    assert [str(one) for one in found.passed] == [f"{tmp_path}/gone.nii: a link that leads nowhere"]
    assert found.passed[0].named


def test_an_output_folder_is_no_input(tmp_path: Path) -> None:
    for name in ("a.nii", "out/a_lesions.nii.gz", "out/b.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_sources([tmp_path], output=tmp_path / "out")
    assert ([source.case for source in found], found.passed) == (["a"], ())
    assert [source.case for source in find_sources([tmp_path / "out"], output=tmp_path / "out")] == ["b"]


@pytest.mark.parametrize("seed", range(12))
def test_a_series_in_several_folders_is_one(tmp_path: Path, seed: int) -> None:
    """Wherever it is cut: in halves, in turns, at random, each slice by itself; at any depth."""
    random = np.random.default_rng(seed)
    count = int(random.integers(4, 12))
    hu = volume(seed, (count, 6, 7))
    uid = write_series(tmp_path / "all", hu)
    parts = int(random.integers(2, count // 2 + 1)) if seed else count
    slices = np.arange(count)
    of_part = [slices % parts, slices * parts // count, random.permutation(slices % parts)][seed % 3]
    patient = tmp_path / "in" / "patient"
    folders = [
        patient / ("deep/" * int(random.integers(0, 3) if n else 0)) / f"part{n}" for n in range(parts)
    ]
    for z, part in enumerate(of_part):
        folders[part].mkdir(parents=True, exist_ok=True)
        shutil.move(tmp_path / "all" / f"{z:03d}.dcm", folders[part])
    write_series(
        folders[0],
        volume(1, (count + 2, 6, 7)),
        names=[f"s{z}.dcm" for z in range(count + 2)],
        ImageType=SCOUT,
    )
    other = write_series(tmp_path / "in" / "other", volume(99, (3, 6, 7)))
    with pytest.warns(UserWarning, match=f"taking {uid}; left: "):
        found = find_sources([tmp_path / "in"])
    assert [(s.case, s.series) for s in found] == [("other", other), ("patient", uid)]
    assert found[1].path.is_relative_to(patient)
    assert_array_equal(read_ct(found[1].path, uid).hu, hu)
    assert sorted(path.name for path in found[1].files) == [f"{z:03d}.dcm" for z in slices]
    # given one by one: what else lies beside them is not to be searched for more slices
    with pytest.raises(
        ValueError, match=f"found none; passed over: .*a part of series {uid}; give .*{patient}"
    ):
        find_sources(folders)
    (source,) = rest = find_sources([*folders, tmp_path / "in/other"])
    assert source.series == other
    assert {one.path for one in rest.passed if one.named} == set(folders)
    (listed,) = (infos for path, infos in dicom_folders([tmp_path / "in"]) if path == found[1].path)
    assert {info.uid: info.slices for info in listed if info.usable} == {uid: count}


def test_parts_of_two_patients_side_by_side(tmp_path: Path) -> None:
    """Both lie in one folder: it names neither."""
    uids = {}
    for name in ("p1", "p2"):
        uids[name] = write_series(tmp_path / "in" / f"{name}_a", volume(int(name[1]), (6, 6, 7)))
        (tmp_path / "in" / f"{name}_b").mkdir()
        for z in (1, 3, 5):
            shutil.move(tmp_path / "in" / f"{name}_a" / f"{z:03d}.dcm", tmp_path / "in" / f"{name}_b")
    found = find_sources([tmp_path / "in"])
    assert [(s.case, s.series) for s in found] == [("p1_a", uids["p1"]), ("p2_a", uids["p2"])]
    for number, source in enumerate(found, 1):
        assert_array_equal(read_ct(source.path, source.series).hu, volume(number, (6, 6, 7)))


@pytest.mark.parametrize("seed", range(6))
def test_copies_are_taken_once(tmp_path: Path, seed: int) -> None:
    """Whole copies, and copies of some slices."""
    random = np.random.default_rng(seed)
    hu = volume(seed, (8, 6, 7))
    names = [f"f{n}" for n in random.permutation(3)]
    whole, *copies = (tmp_path / "in" / name for name in names)
    uid = write_series(whole, hu)
    write_series(whole, volume(1, (3, 6, 7)), names=["a", "b", "c"], ImageType=SCOUT)
    for copy in copies:
        shutil.copytree(whole, copy)
        for z in random.permutation(8)[: random.integers(0, 4) * (seed % 2)]:
            (copy / f"{z:03d}.dcm").unlink()
    with pytest.warns(UserWarning, match=f"taking {uid}"):
        found = find_sources([tmp_path / "in"])
    (source,) = found
    assert source.series == uid
    assert_array_equal(read_ct(source.path, uid).hu, hu)
    assert sorted([source.path, *(one.path for one in found.passed)]) == sorted([whole, *copies])
    assert all("a copy" in one.why and str(source.path) in one.why for one in found.passed)
    with pytest.warns(UserWarning, match=f"taking {uid}"):
        assert sum(one.named for one in find_sources([whole, *copies]).passed) == 2


def test_a_report_says_what_was_passed_over(tmp_path: Path) -> None:
    uid = write_series(tmp_path / "in/a", volume(shape=(6, 6, 7)))
    for folder in ("b", "masks"):
        (tmp_path / "in" / folder).mkdir()
    shutil.move(tmp_path / "in/a/003.dcm", tmp_path / "in/b")
    (tmp_path / "in/masks/p.nii").touch()
    records = [{"case": case, "ct": f"/gone/{case}.nii", "series": None} for case in "pq"]
    records[1]["series"] = uid
    places = locate(records, [tmp_path / "in"])
    assert f"passed over: {tmp_path}/in/masks/p.nii: in masks" in places[0].hint
    assert (places[1].path, places[1].series) == (tmp_path / "in", uid)
    named = [
        one for one in locate(records, [tmp_path / "in", touched(tmp_path / "p.hdr")]).passed if one.named
    ]
    assert [(one.path, one.why[:12]) for one in named] == [(tmp_path / "p.hdr", "of no format")]


def test_series_in_folders_of_masks_are_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uids = [write_series(tmp_path / name, volume(shape=(2, 3, 4))) for name in ("p1", "lesions/p1")]
    assert prepare([str(tmp_path), "--list-series"]) == 0
    said = capsys.readouterr()
    assert [uid in said.out for uid in uids] == [True, False]
    assert f"passed over: {tmp_path}/lesions/p1: in lesions" in said.err


def test_baselines_tell_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from normnet.baselines import __main__ as baselines
    from normnet.cases import PredictSummary

    def fail(*_: object, **__: object) -> None:
        warnings.warn("odd", stacklevel=1)
        raise ValueError("bad")

    baseline = SimpleNamespace(
        config=SimpleNamespace(method="ae", lungs_only=True), calibration={"threshold": 0.5}
    )
    monkeypatch.setattr(baselines, "load_baseline", lambda *_, **__: baseline)
    monkeypatch.setattr(baselines, "baseline_file", lambda _: touched(tmp_path / "weights"))
    monkeypatch.setattr(baselines, "load_case", fail)
    names = [os.fspath(touched(tmp_path / name)) for name in ("a.nii", "c_lung.nii", "d.img")]
    assert baselines.main(["predict", "run", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line[:8] not in ("", "predict:")]
    assert said[0] == "warning: a: odd"
    assert [line.split(": ")[1] for line in said[1:3]] == names[1:]
    assert said[3] == f"normnet.baselines: {names[0]}: bad"
    monkeypatch.setattr(
        baselines, "run_cases", lambda cases, *_, **__: PredictSummary([], [], {}, passed=cases.passed)
    )
    for inputs, code in (([str(tmp_path)], 0), (names, 1), (names[:2], 0), (names[2:], 2)):
        assert baselines.main(["predict", "run", *inputs, "--output", str(tmp_path / "out")]) == code


@pytest.mark.parametrize("deep", ["lungs", "data/masks", "GT/x"])
def test_inputs_that_overlap(tmp_path: Path, deep: str) -> None:
    """What another input holds is taken once, whichever comes first, and a link is the same as its folder."""
    (tmp_path / "in" / deep).mkdir(parents=True)
    ct = touched(tmp_path / "in" / deep / "p.nii")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    top = ct.parent.relative_to(tmp_path)
    for inputs in ([ct, tmp_path / "in"], [tmp_path / "in", ct], [tmp_path / top, tmp_path / "in"]):
        found = find_sources(inputs)
        assert ([(one.case, one.path) for one in found], found.passed) == ([("p", ct)], ())
    with pytest.raises(ValueError, match=f"p more than once, from {ct}, {tmp_path}/link/{deep}/p.nii; give"):
        find_sources([ct, tmp_path / "link" / deep])
