"""DICOM series that went wrong in silence: damaged files, split folders, grids, acquisitions, syntaxes.

Slices are written with pydicom, and damaged, moved and copied here; what must come out is what was put in.
"""

from __future__ import annotations

import os
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from lesionsynth import io
from lesionsynth.io import dicom
from tests.test_io import volume, write_series

SHAPE = (8, 6, 7)
NAMES = ["IM{:04d}.dcm", "IM{:04d}", "1.2.840.113.{}", "img.{:03d}", "slice{}.IMA", "{}"]


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        io.read_ct(path)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# ---- damaged files


def damage(file: Path, kind: str, rng: np.random.Generator) -> None:
    """Damage a slice so that it is no slice any more."""
    data = file.read_bytes()
    cut = int(rng.integers(1, len(data)))
    file.unlink()
    if kind == "broken link":
        file.symlink_to(file.with_name("nowhere"))
    elif kind == "link to itself":
        file.symlink_to(file.name)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "noise":
        file.write_bytes(rng.bytes(300))
    elif kind == "error page":
        file.write_text("<html>404: not found</html>")
    elif kind == "no mark":
        file.write_bytes(data[:128] + b"DICX" + data[132:])
    else:
        file.write_bytes({"empty": b"", "zeros": bytes(len(data)), "cut": data[:cut]}[kind])


KINDS = ["empty", "zeros", "cut", "broken link", "link to itself", "noise", "error page", "no mark", "pipe"]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_anywhere_is_named(tmp_path: Path, kind: str, names: str) -> None:
    """At the ends as well, where no gap tells; however the files are called."""
    rng = np.random.default_rng(len(kind) + len(names))
    where = [0, SHAPE[0] - 1, int(rng.integers(1, SHAPE[0] - 1))]
    for number, at in enumerate(where):
        folder = tmp_path / str(number)
        files = [names.format(z + 1) for z in range(SHAPE[0])]
        write_series(folder, volume(shape=SHAPE), names=files)
        damage(folder / files[at], kind, rng)
        refused(folder, files[at])
        (info,) = io.list_series(folder)
        assert files[at] in info.problem


@pytest.mark.parametrize("names", NAMES)
def test_several_damaged_files_are_counted(tmp_path: Path, names: str) -> None:
    files = [names.format(z + 1) for z in range(SHAPE[0])]
    write_series(tmp_path / "s", volume(shape=SHAPE), names=files)
    for file in files[-3:]:
        path = tmp_path / "s" / file
        path.write_bytes(path.read_bytes()[:300])
    refused(tmp_path / "s", sorted(files[-3:])[0], "2 more such files")


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", ["empty", "zeros", "cut"])
def test_a_transfer_that_was_broken_off(tmp_path: Path, kind: str, names: str) -> None:
    files = [names.format(z + 1) for z in range(SHAPE[0])]
    write_series(tmp_path / "s", volume(shape=SHAPE), names=files)
    damage(tmp_path / "s" / files[-1], kind, np.random.default_rng(0))
    (tmp_path / "s" / files[-1]).rename(tmp_path / "s" / f"{files[-1]}.part")
    refused(tmp_path / "s", f"{files[-1]}.part: ")


FOREIGN = {
    "README": b"Slices of the chest.\nRead with care: \xc3\xa4\n",
    "notes.txt": b"",
    "series.json": b"{}",
    "a.xml": b"<xml/>",
    "report.pdf": b"%PDF-1.4\0\1\2",
    "picture": b"\x89PNG\r\n\x1a\n\0\0\0",
    "IM0003.png": b"\x89PNG\r\n\x1a\n\0\0\0",
    "DICOMDIR": b"",
    "Thumbs.db": bytes(99),
    "letter": "\ufeffD\u00e4tum".encode("utf-16"),
    ".DS_Store": bytes(99),
    "IM0003.txt": b"",
    "scan.nii.gz": b"\x1f\x8b\0\0",
}


@pytest.mark.parametrize("names", NAMES)
def test_files_of_other_kinds_are_no_slices(tmp_path: Path, names: str) -> None:
    hu = volume(shape=SHAPE)
    write_series(tmp_path / "s", hu, names=[names.format(z + 1) for z in range(SHAPE[0])])
    for name, content in FOREIGN.items():
        (tmp_path / "s" / name).write_bytes(content)
    (tmp_path / "s/gone").symlink_to(tmp_path / "nowhere")
    if "." in names and not names.endswith(("{}", "d}")):
        assert_array_equal(io.read_ct(tmp_path / "s").hu, hu)
    else:
        refused(tmp_path / "s", "gone: ")  # what has no suffix may be a slice where slices have none
        (tmp_path / "s/gone").unlink()
        assert_array_equal(io.read_ct(tmp_path / "s").hu, hu)


# ---- one series in several folders


@settings(max_examples=10)
@given(st.lists(st.integers(0, 2), min_size=8, max_size=8), st.sampled_from(NAMES))
def test_a_series_in_several_folders_is_one(
    tmp_path_factory: pytest.TempPathFactory, folders: list[int], names: str
) -> None:
    root = tmp_path_factory.mktemp("split")
    hu = volume(shape=SHAPE)
    uid = write_series(root / "all", hu, names=[names.format(z + 1) for z in range(SHAPE[0])])
    for z, number in enumerate(folders):
        folder = root / "p" / ("a", "a/below", "b")[number]
        folder.mkdir(parents=True, exist_ok=True)
        name = names.format(z + 1)
        (root / "all" / name).rename(folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ct = io.read_ct(root / "p")
    assert_array_equal(ct.hu, hu)
    assert ct.series == uid
    assert [int(pydicom.dcmread(file).InstanceNumber) for file in ct.files] == list(range(1, 9))
    listed = [info for folder in dicom.folders_below(root / "p") for info in dicom.list_series(folder)]
    (joined,) = dicom.join_series(listed)
    assert (joined.uid, joined.slices, joined.problem) == (uid, 8, "")
    assert_array_equal(io.read_ct(joined.folder, uid).hu, hu)


def test_other_series_are_not_joined(tmp_path: Path) -> None:
    uids = [write_series(tmp_path / name, volume(n, SHAPE)) for n, name in enumerate("abc")]
    (tmp_path / "d").mkdir()
    (tmp_path / "a/007.dcm").rename(tmp_path / "d/007.dcm")
    listed = [info for folder in dicom.folders_below(tmp_path) for info in dicom.list_series(folder)]
    joined = dicom.join_series(listed)
    assert [info.uid for info in joined] == uids
    assert [info.folder for info in joined] == [tmp_path, tmp_path / "b", tmp_path / "c"]
    assert all(info.usable for info in joined)


def test_a_folder_with_slices_of_its_own_is_asked_first(tmp_path: Path) -> None:
    hu = volume(1, SHAPE)
    write_series(tmp_path, hu)
    below = write_series(tmp_path / "derived", volume(2, (12, 6, 7)))
    (tmp_path / "derived/more").mkdir()
    (tmp_path / "derived/more/x.dcm").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_array_equal(io.read_ct(tmp_path).hu, hu)
        assert_array_equal(io.read_ct(tmp_path, below).hu, volume(2, (12, 6, 7)))
    assert len(io.list_series(tmp_path)) == 3
    (tmp_path / "007.dcm").rename(tmp_path / "derived/007.dcm")
    assert_array_equal(io.read_ct(tmp_path).hu, hu)


@pytest.mark.parametrize("names", NAMES)
def test_damage_in_one_of_the_folders(tmp_path: Path, names: str) -> None:
    """Also where not one file of it tells the series, or that it is DICOM."""
    files = [names.format(z + 1) for z in range(SHAPE[0])]
    write_series(tmp_path / "p/a", volume(shape=SHAPE), names=files)
    (tmp_path / "p/b").mkdir()
    for file in files[5:]:
        (tmp_path / "p/a" / file).rename(tmp_path / "p/b" / file)
    whole = (tmp_path / "p/b" / files[6]).read_bytes()
    (tmp_path / "p/b" / files[6]).write_bytes(whole[:300])
    refused(tmp_path / "p", f"b/{files[6]}: truncated")
    for content in (whole[:300], b"", bytes(500)):
        for file in files[5:]:
            (tmp_path / "p/b" / file).write_bytes(content)
        refused(tmp_path / "p", f"b/{files[5]}: ", "2 more such files")


@pytest.mark.parametrize("part", [1, 3, 8])
def test_copies_are_read_once(tmp_path: Path, part: int) -> None:
    hu = volume(shape=SHAPE)
    uid = write_series(tmp_path / "p/a", hu)
    (tmp_path / "p/b").mkdir()
    for z in range(part):
        shutil.copy(tmp_path / f"p/a/{z:03d}.dcm", tmp_path / f"p/b/x{z:03d}.dcm")
    with pytest.warns(UserWarning, match=f"copies are left out: {part}, the first b/x000.dcm of a/000.dcm"):
        ct = io.read_ct(tmp_path / "p")
    assert_array_equal(ct.hu, hu)
    (info,) = io.list_series(tmp_path / "p")
    assert (info.uid, info.slices, info.usable) == (uid, 8, True)


@settings(max_examples=20)
@given(
    st.sampled_from(["PatientID", "StudyInstanceUID", "FrameOfReferenceUID"]),
    st.integers(1, 7),
    st.booleans(),
    st.booleans(),
)
def test_scans_that_share_a_series_are_not_joined(
    tmp_path_factory: pytest.TempPathFactory, name: str, first: int, split: bool, alike: bool
) -> None:
    """Where one ends the other begins: nothing else would tell. What is taken away is no other."""
    root = tmp_path_factory.mktemp("shared")
    hu = volume(shape=SHAPE)
    write_series(root / "p/a", hu)
    (root / "p/b").mkdir()
    for z, file in enumerate(sorted((root / "p/a").iterdir())):
        data = pydicom.dcmread(file)
        setattr(data, name, "1.2.3" if z < first else "" if alike else "1.2.4")
        file.unlink()
        data.save_as(root / "p" / ("b" if split and z >= first else "a") / file.name)
    if alike:
        assert_array_equal(io.read_ct(root / "p").hu, hu)
        return
    refused(root / "p", f"{name} must be one for all slices of a series", "several scans share", "007.dcm")
    if split and 2 <= first <= 6:
        assert_array_equal(io.read_ct(root / "p/a").hu, hu[:first])
        assert_array_equal(io.read_ct(root / "p/b").hu, hu[first:])


@pytest.mark.parametrize("name", ["StudyInstanceUID", "FrameOfReferenceUID"])
def test_a_uid_drawn_for_each_slice_tells_nothing(tmp_path: Path, name: str) -> None:
    hu = volume(shape=SHAPE)
    write_series(tmp_path, hu)
    for z, file in enumerate(sorted(tmp_path.iterdir())):
        data = pydicom.dcmread(file)
        setattr(data, name, f"1.2.{z + 1}")
        data.save_as(file)
    assert_array_equal(io.read_ct(tmp_path).hu, hu)


@pytest.mark.parametrize("offset", [0.0, 1.0, 300.0])
def test_folders_that_do_not_fit_are_told(tmp_path: Path, offset: float) -> None:
    """Of scans that share all their UIDs, at the places of the other, between them and far away."""
    write_two(tmp_path / "all", 8, 6, offset, False)
    for z, file in enumerate(sorted((tmp_path / "all").iterdir())):
        folder = tmp_path / "p" / ("a" if z < 8 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / file.name)
    refused(tmp_path / "p", "if each is a scan of its own, give one at a time")
    assert len(io.read_ct(tmp_path / "p/b").files) == 6


@pytest.mark.parametrize("names", ["IM{:04d}", "{}", "1.2.840.113.{}"])
@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_folder_of_nothing_but_zeros_is_found(tmp_path: Path, names: str, size: int) -> None:
    """No file of it tells that it is DICOM: it may be half of a series all the same."""
    files = [names.format(z + 1) for z in range(SHAPE[0])]
    write_series(tmp_path / "a", volume(shape=SHAPE), names=files)
    (tmp_path / "b").mkdir()
    for file in files[5:]:
        (tmp_path / "a" / file).unlink()
        (tmp_path / "b" / file).write_bytes(bytes(size))
    found = io.find_sources([tmp_path])
    assert [source.path.name for source in found] == ["a", "b"]
    refused(tmp_path / "b", files[5], "2 more such files")
    (tmp_path / "b/notes.txt").write_text("")  # as in folders of other kinds
    assert [source.path.name for source in io.find_sources([tmp_path])] == ["a"]


def test_the_folder_of_the_series_that_is_read_is_told(tmp_path: Path) -> None:
    write_series(tmp_path / "p1", volume(shape=SHAPE))
    write_series(tmp_path / "p2", volume(shape=(9, 6, 7)))
    with pytest.warns(UserWarning, match=f"several DICOM series.*reading .* in {tmp_path / 'p2'}$"):
        assert io.read_ct(tmp_path).hu.shape[0] == 9


def test_a_link_that_may_not_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders beside it are walked through."""
    uid = write_series(tmp_path / "a", volume(shape=SHAPE))
    (tmp_path / "locked").symlink_to(tmp_path / "a")
    stat = os.stat

    def denied(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", denied)
    assert [info.uid for info in io.list_series(tmp_path)] == [uid]


@pytest.mark.parametrize("changed", ["pixels", "header"])
def test_two_slices_at_one_place_are_both_named(tmp_path: Path, changed: str) -> None:
    """Of a copied folder in which one slice is another now, and nobody knows which is meant."""
    write_series(tmp_path / "p/a", volume(shape=SHAPE))
    shutil.copytree(tmp_path / "p/a", tmp_path / "p/b")
    file = tmp_path / "p/b/004.dcm"
    data = pydicom.dcmread(file)
    if changed == "pixels":
        data.PixelData = data.PixelData[::-1]
    else:
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.save_as(file)
    refused(tmp_path / "p", "two slices lie at the same position (110.00 mm", "a/004.dcm and b/004.dcm")


# ---- where slices lie


def stack(along: np.ndarray, names: list[str] | None = None) -> dicom._Stack:
    """Slices at places along z, for thousands of series within seconds."""
    positions = np.stack([np.full(along.size, -20.0), np.full(along.size, 5.0), along], 1)
    files = names or [f"/s/{n}.dcm" for n in range(along.size)]
    return dicom._Stack(tuple(files), positions, np.eye(3), np.full(2, 0.7))


STEPS = st.floats(0.1, 10)
SEEDS = st.integers(0, 2**32 - 1)


def jittered(count: int, step: float, jitter: float, seed: int) -> tuple[np.ndarray, np.random.Generator]:
    """Places with jitter as a part of what may be tolerated, which grows with the distance."""
    rng = np.random.default_rng(seed)
    # a grid through the jittered ends is off by one jitter, a slice by another
    most = min(max(0.05, 0.05 * step), step / 8) / 2
    return rng.uniform(-900, 900) + step * np.arange(count) + rng.uniform(-1, 1, count) * jitter * most, rng


@settings(max_examples=300)
@given(st.integers(2, 1500), STEPS, st.floats(0, 1), SEEDS)
def test_jitter_is_no_gap(count: int, step: float, jitter: float, seed: int) -> None:
    along, _ = jittered(count, step, jitter, seed)
    assert dicom._fault(stack(along)) == ""


@settings(max_examples=500)
@given(st.integers(3, 1500), STEPS, st.floats(0, 0.5), SEEDS, st.integers(1, 6))
def test_missing_slices_never_pass(count: int, step: float, jitter: float, seed: int, most: int) -> None:
    """One or several, together or apart, near the ends, of thin slices and of long series."""
    along, rng = jittered(count, step, jitter, seed)
    left = np.unique(rng.integers(1, count - 1, int(rng.integers(1, most + 1))))
    if rng.random() < 0.3:
        left = np.unique(np.clip(left, 1, 2))
    kept = np.delete(np.arange(count), left)
    fault = dicom._fault(stack(along[kept]))
    steps = np.sort(np.diff(kept))
    if np.ptp(steps) and steps[steps.size // 2] > 1:  # of a few slices, the usual distance is another
        assert fault
    elif np.ptp(steps):  # else what is left is a regular grid
        assert fault.startswith(("missing slices: ", "two acquisitions are interleaved")), fault
        # a handful of slices may be either
        assert fault.startswith("missing slices: ") or count < 30, fault
        assert "or slices are missing" in fault or fault.startswith("missing"), fault


@settings(max_examples=200)
@given(st.integers(12, 400), st.floats(0.3, 10), SEEDS, st.floats(0.2, 0.9))
def test_most_slices_missing_in_turn(count: int, step: float, seed: int, share: float) -> None:
    along, rng = jittered(count, step, 0.2, seed)
    kept = np.unique([0, count - 1, *np.flatnonzero(rng.random(count) > share)])
    if kept.size < 6 or np.ptp(np.diff(kept)) == 0:
        return  # a regular grid, of twice the distance, say
    fault = dicom._fault(stack(along[kept]))
    assert fault.startswith(("missing slices", "two acquisitions", "irregular slice spacing"))
    if np.median(np.diff(kept)) == 1 and kept.size >= 10:  # else the usual distance is another
        assert fault.startswith("missing slices"), fault


@settings(max_examples=300)
@given(st.integers(8, 800), STEPS, SEEDS, st.floats(0.25, 0.45), st.sampled_from([-1, 1]))
def test_a_slice_out_of_place_is_irregular(count: int, step: float, seed: int, by: float, sign: int) -> None:
    along, rng = jittered(count, step, 0.1, seed)
    at = int(rng.integers(1, count - 1))
    along[at] += sign * by * step
    fault = dicom._fault(stack(along))
    assert fault.startswith(f"irregular slice spacing: slice {at} ({at}.dcm) lies "), fault


@settings(max_examples=100)
@given(st.integers(3, 300), STEPS, SEEDS)
def test_a_slice_aside_is_irregular(count: int, step: float, seed: int) -> None:
    along, rng = jittered(count, step, 0.1, seed)
    slices = stack(along)
    at = int(rng.integers(1, count - 1))
    slices.positions[at, 0] += 2 * max(0.05, 0.05 * step)
    assert dicom._fault(slices).startswith(f"irregular slice positions: slice {at} ({at}.dcm)")


@pytest.mark.parametrize(
    ("step", "decimals", "jitter"), [(0.625, 2, 0), (0.625, 3, 0), (1.25, 1, 0), (1.0, 6, 0.01), (0.3, 2, 0)]
)
def test_the_distance_is_of_all_slices(tmp_path: Path, step: float, decimals: int, jitter: float) -> None:
    """The median of 0.62, 0.63, 0.62 is wrong by 1.3 mm over 256 mm."""
    rng = np.random.default_rng(0)
    z = np.round(100 + step * np.arange(41) + rng.uniform(-1, 1, 41) * jitter, decimals)
    hu = volume(shape=(41, 4, 4))
    write_series(tmp_path / "s", hu, positions=[(-20.0, 5.0, float(v)) for v in z])
    ct = io.read_ct(tmp_path / "s")
    assert_array_equal(ct.hu, hu)
    # what ITK has; decimal texts and sums of floats differ by less than this
    assert ct.spacing[0] == pytest.approx((z[-1] - z[0]) / 40, abs=1e-9)
    # half a unit of the last decimal at either end
    assert ct.spacing[0] == pytest.approx(step, abs=(10.0**-decimals + 2 * jitter) / 40)


def test_oblique_series_with_rounded_cosines(tmp_path: Path) -> None:
    """Three decimals, as some scanners write: no shear, and the corners where the slices are."""
    turn = np.round(np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0], 3)
    normal = np.cross(turn[0], turn[1])
    positions = [tuple(np.round(np.array((3.0, -7.0, 9.0)) + 2.0 * z * normal, 3)) for z in range(8)]
    hu = volume(shape=SHAPE)
    write_series(
        tmp_path / "s", hu, positions=positions, ImageOrientationPatient=[float(v) for v in turn[:2].ravel()]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ct = io.read_ct(tmp_path / "s")
    assert_array_equal(ct.grid.from_lps(ct.hu), hu)
    cosines = np.array(ct.grid.direction).reshape(3, 3)
    assert_allclose(cosines.T @ cosines, np.eye(3), atol=1e-12)
    last = np.array(ct.grid.origin) + cosines[:, 2] * ct.grid.spacing[2] * 7
    assert_allclose(last, positions[-1], atol=0.02)  # 14 mm times the rounding of cosines


# ---- acquisitions


def write_two(folder: Path, first: int, second: int, offset: float, numbers: bool, step: float = 2.5) -> Any:
    """Write two acquisitions of one series, the second `offset` further; their voxels."""
    hu = volume(5, (first + second, 6, 7))
    places = [(n * step, 0) for n in range(first)] + [(n * step + offset, 1) for n in range(second)]
    write_series(folder, hu, positions=[(-20.0, 5.0, z) for z, _ in places])
    for number, (_, part) in enumerate(places):
        file = folder / f"{number:03d}.dcm"
        data = pydicom.dcmread(file)
        if numbers:
            data.AcquisitionNumber = 3 + part
        data.save_as(file)
    return hu[:first], hu[first:]


@settings(max_examples=15)
@given(st.integers(4, 9), st.integers(4, 9), st.floats(0, 1.9), st.sampled_from([0.6, 2.5, 5.0]))
def test_interleaved_acquisitions_are_told_apart(
    tmp_path_factory: pytest.TempPathFactory, first: int, second: int, offset: float, step: float
) -> None:
    """At the places of the other, between them or half way; the larger is read, or the first of equals."""
    folder = tmp_path_factory.mktemp("two")
    one, two = write_two(folder, first, second, round(offset * step, 3), True, step)
    with pytest.warns(
        UserWarning, match="acquisitions are interleaved.*'[34]' with . slices.*reading '[34]'"
    ):
        ct = io.read_ct(folder)
    assert_array_equal(ct.hu, two if second > first else one)
    assert ct.spacing[0] == pytest.approx(step, abs=1e-6)
    (info,) = io.list_series(folder)
    assert info.slices == max(first, second)


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("offset", [0.5, 1.0, 1.7, 2.0])
@pytest.mark.parametrize(("first", "second"), [(6, 6), (9, 7), (7, 10)])
def test_interleaved_acquisitions_that_nothing_tells_apart(
    tmp_path: Path, first: int, second: int, offset: float, numbers: bool
) -> None:
    write_two(tmp_path / "s", first, second, offset, numbers)
    if numbers:  # one of them lacks a slice
        (tmp_path / "s/002.dcm").unlink()
        refused(tmp_path / "s", "acquisitions are interleaved, by AcquisitionNumber")
    else:
        refused(tmp_path / "s", "two acquisitions are interleaved")


@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_two_halves_that_overlap_are_not_cut(tmp_path: Path, overlap: int) -> None:
    """Reading the larger would leave half of the lungs out."""
    write_two(tmp_path / "s", 10, 9, 2.5 * (10 - overlap) + 0.3, True)
    refused(tmp_path / "s", "two acquisitions are interleaved, of 10 and 9 slices 2.50 mm apart")


@pytest.mark.parametrize("numbers", [[1] * 4 + [2] * 4, list(range(8)), [2, 2, 1, 1, 1, 1, 3, 3]])
def test_acquisitions_one_after_another_are_one(tmp_path: Path, numbers: list[int]) -> None:
    hu = volume(shape=SHAPE)
    write_series(tmp_path / "s", hu)
    for z, number in enumerate(numbers):
        data = pydicom.dcmread(tmp_path / f"s/{z:03d}.dcm")
        data.AcquisitionNumber = number
        data.save_as(tmp_path / f"s/{z:03d}.dcm")
    assert_array_equal(io.read_ct(tmp_path / "s").hu, hu)


# ---- values that are compared


@pytest.mark.parametrize(
    ("value", "same"),
    [
        (["0.90", "0.7000"], True),
        (["9e-1", "0.7"], True),
        (["0.900001", "0.699999"], True),
        (["0.9003", "0.7"], True),  # cut after three decimals
        (["0.91", "0.7"], False),
        (["0.9", "0.701"], False),
        (["0.7", "0.9"], False),
    ],
)
def test_pixel_spacing_is_compared_as_numbers(tmp_path: Path, value: list[str], same: bool) -> None:
    hu = volume(shape=SHAPE)
    write_series(tmp_path / "s", hu, PixelSpacing=["0.9", "0.7"])
    data = pydicom.dcmread(tmp_path / "s/003.dcm")
    data.PixelSpacing = value
    data.save_as(tmp_path / "s/003.dcm")
    if same:
        ct = io.read_ct(tmp_path / "s")
        assert_array_equal(ct.hu, hu)
        assert ct.spacing[1:] == (0.9, 0.7)
    else:
        rule = (
            "003.dcm: all slices must share one orientation, size and pixel spacing; its PixelSpacing differ"
        )
        refused(tmp_path / "s", rule)


# ---- transfer syntaxes


def recode(file: Path, syntax: str) -> None:
    """Write a slice anew in a transfer syntax, by pydicom, or by SimpleITK where pydicom has no encoder."""
    data = pydicom.dcmread(file)
    if syntax in ("JPEG", "JPEG2000"):
        image = sitk.Cast(sitk.ReadImage(str(file)), sitk.sitkInt16)
        for key in image.GetMetaDataKeys():
            image.EraseMetaData(key)
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(syntax)
        writer.SetFileName(str(file.with_name("new.dcm")))
        writer.Execute(image)
        new = pydicom.dcmread(file.with_name("new.dcm"))
        file.with_name("new.dcm").unlink()
        for name in ("PixelRepresentation", "RescaleIntercept", "RescaleSlope", "PixelData"):
            data[name] = new[name]
        data.file_meta.TransferSyntaxUID = new.file_meta.TransferSyntaxUID
        data.save_as(file)
        return
    uid = getattr(pydicom.uid, syntax)
    if uid.is_encapsulated:
        data.compress(uid)
    elif not uid.is_little_endian:
        data.PixelData = data.pixel_array.astype(">u2").tobytes()
    fresh = pydicom.Dataset()
    fresh.update(data)
    fresh.file_meta = data.file_meta
    fresh.file_meta.TransferSyntaxUID = uid
    pydicom.dcmwrite(
        file,
        fresh,
        implicit_vr=uid.is_implicit_VR,
        little_endian=uid.is_little_endian,
        enforce_file_format=True,
    )


SYNTAXES = [
    "ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian",
    "DeflatedExplicitVRLittleEndian", "RLELossless", "JPEGLSLossless", "JPEG", "JPEG2000",
]  # fmt: skip


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_transfer_syntax_gives_the_same_volume(tmp_path: Path, syntax: str) -> None:
    """Voxels, and corners within 0.01 mm, of a smooth volume with noise, as NIfTI has them."""
    if syntax == "JPEGLSLossless":
        pytest.importorskip("jpeg_ls")
    rng = np.random.default_rng(0)
    z, y, x = np.indices((6, 40, 50))
    smooth = 300 * np.sin(z / 3 + y / 7) + 200 * np.cos(x / 9) - 400
    hu = np.clip(smooth + rng.normal(0, 20, smooth.shape), -1000, 3000).astype(np.int16)
    write_series(tmp_path / "s", hu)
    plain = io.read_ct(tmp_path / "s")
    nifti = io.read_ct(plain.write_like(plain.hu, tmp_path / "a.nii.gz"))
    for file in (tmp_path / "s").iterdir():
        recode(file, syntax)
    ct = io.read_ct(tmp_path / "s")
    for other in (plain, nifti):
        assert_array_equal(ct.hu, other.hu)
        assert_allclose(ct.grid.corners(), other.grid.corners(), atol=0.01)  # the bound
    assert_array_equal(ct.hu, hu)


# ---- messages


@pytest.mark.parametrize("uid", ["1.2.3", "1.2.840.10008.5.1.4.1.1.9999", "1.3.12.2.1107.5.9.1"])
def test_an_unknown_class_is_named(tmp_path: Path, uid: str) -> None:
    write_series(tmp_path / "s", volume(shape=SHAPE))
    for file in (tmp_path / "s").iterdir():
        data = pydicom.dcmread(file)
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = uid
        data.save_as(file)
    refused(tmp_path / "s", "000.dcm: unreadable: SOPClassUID must be that of CT images, ", f"got '{uid}'")


def test_run_lengths_of_few_pixels(tmp_path: Path) -> None:
    """GDCM reads them from some hundred pixels on."""
    for side in (2, 5, 16):
        hu = volume(shape=(3, side, side))
        write_series(tmp_path / str(side), hu)
        for file in (tmp_path / str(side)).iterdir():
            recode(file, "RLELossless")
    assert_array_equal(io.read_ct(tmp_path / "16").hu, hu)
    for side in ("2", "5"):
        refused(tmp_path / side, "000.dcm: unreadable: run-length slices of so few pixels are not read")


def test_headers_come_in_the_order_of_the_files(tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume(shape=SHAPE), names=[f"{(z * 3) % 8}.dcm" for z in range(8)])
    ct = io.read_ct(tmp_path / "s")
    heights = [header.ImagePositionPatient[2] for header in io.read_headers(ct.files)]
    assert heights == [100 + 2.5 * z for z in range(8)]
    assert "PixelData" not in io.read_headers(ct.files[:1])[0]
    (tmp_path / "s/0.dcm").write_bytes(struct.pack("128x4s", b"DICM") + b"\2\0")
    with pytest.raises(ValueError, match=r"0\.dcm: "):
        io.read_headers([tmp_path / "s/0.dcm"])
