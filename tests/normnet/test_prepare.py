"""Resampling, the store, exclusions and the command, on small drawn chests written as NIfTI."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

import lesionsynth as ls
from lesionsynth import io
from normnet.inflation import healthy_density
from normnet.prepare import LoadedCase, Store
from normnet.prepare import store as store_module
from normnet.prepare.__main__ import main
from normnet.prepare.exclude import kept_slices, nodule_slices, read_annotations, read_exclusions, runs
from normnet.prepare.grid import IsoGrid
from normnet.prepare.run import EDGE_MM, _without_edges
from tests import classical
from tests.classical import load_case, prepare

SPACING = (5.0, 3.0, 3.0)
FINE: dict[str, Any] = {"spacing": (2.0, 2.0, 2.0), "size": 160}
COARSE: dict[str, Any] = {"spacing": SPACING, "size": 96}


def chest(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """HU int16 and lung mask, (40, 70, 100) voxels of 5 x 3 x 3 mm: two ellipsoids in a body."""
    z, y, x = np.meshgrid(np.arange(40) - 20, np.arange(70) - 35, np.arange(100) - 50, indexing="ij")
    hu = np.full(z.shape, -1000.0)
    hu[(y / 32) ** 2 + (x / 46) ** 2 <= 1] = 40
    right = (z / 17) ** 2 + (y / 22) ** 2 + ((x + 22) / 14) ** 2 <= 1
    left = (z / 17) ** 2 + (y / 22) ** 2 + ((x - 22) / 14) ** 2 <= 1
    hu[right | left] = -850
    vessel = ((y / 2) ** 2 + ((np.abs(x) - 22) / 2) ** 2 <= 1) & (right | left)
    hu[vessel] = 0
    hu += np.random.default_rng(seed).normal(0, 15, hu.shape)
    return np.rint(hu).clip(-1024).astype(np.int16), right | left


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chests with given lung masks; a file that is no CT."""
    base = tmp_path_factory.mktemp("ct")
    for name, seed in (("anna", 1), ("bert", 2)):
        hu, mask = chest(seed)
        write(base / f"{name}.nii.gz", hu)
        write(base / "masks" / f"{name}_lung.nii.gz", mask.astype(np.uint8))
    (base / "broken.nii.gz").write_bytes(b"\x1f\x8b nothing")
    return base


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Store:
    """Anna and bert at 2 x 2 x 2 mm, anna without the file's slices 18-20."""
    (folder / "leave.csv").write_text("case,first_slice,last_slice\n# nodule\nanna,18,20\n")
    summary = prepare(
        [folder / "anna.nii.gz", folder / "bert.nii.gz"],
        folder / "store",
        **FINE,
        exclude=folder / "leave.csv",
    )
    assert not summary.failed
    return summary.store


# ---- resampling


@given(
    n=st.integers(2, 30),
    source=st.floats(0.4, 6.0),
    target=st.floats(0.4, 3.0),
    start=st.integers(-6, 6),
    size=st.integers(1, 40),
)
def test_positions_are_centres_in_mm(n: int, source: float, target: float, start: int, size: int) -> None:
    """Both directions against millimetres from the volume's first face."""
    grid = IsoGrid((n, 1, 1), (source, 1.0, 1.0), (target, 1.0, 1.0), (start, 0, 0), (size, 1, 1))
    millimetres = (np.arange(start, start + size) + 0.5) * target
    assert_allclose((grid.source_positions(0) + 0.5) * source, millimetres, rtol=1e-9, atol=1e-9)
    assert_allclose(
        (grid.window_positions(0) + start + 0.5) * target, (np.arange(n) + 0.5) * source, rtol=1e-9, atol=1e-9
    )


@st.composite
def grids(draw: st.DrawFn) -> IsoGrid:
    """Windows that lie in the volume, reach beyond it, or miss it."""
    shape, size = ([draw(st.integers(1, most)) for _ in range(3)] for most in (9, 14))
    lengths = st.floats(0.4, 3.0).map(lambda s: round(s, 3))
    source, target = ([draw(lengths) for _ in range(3)] for _ in range(2))
    start = [draw(st.integers(-4, 6)) for _ in range(3)]
    return IsoGrid(*map(tuple, (shape, source, target, start, size)))


@given(grid=grids(), back=st.booleans(), seed=st.integers(0, 99))
def test_resampling_matches_itk(grid: IsoGrid, back: bool, seed: int) -> None:
    """Linear values, the half voxel at the border and the nearest voxel, as another library has them."""
    rng = np.random.default_rng(seed)
    shape, other = (grid.shape, grid.source_shape) if back else (grid.source_shape, grid.shape)
    spacing, wanted = (grid.spacing, grid.source_spacing)[:: 1 if back else -1]
    volume = rng.normal(0, 300, shape).astype(np.float32)
    # first faces of input and output in mm
    here, there = (start * np.array(grid.spacing) for start in (np.array(grid.start), np.zeros(3)))
    here, there = (here, there) if back else (there, here)
    found, image = [], sitk.GetImageFromArray(volume)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((here + np.array(spacing) / 2)[::-1])
    for kind in (sitk.sitkLinear, sitk.sitkNearestNeighbor):
        resample = sitk.ResampleImageFilter()
        resample.SetInterpolator(kind)
        resample.SetSize(other[::-1])
        resample.SetOutputSpacing(wanted[::-1])
        resample.SetOutputOrigin((there + np.array(wanted) / 2)[::-1])
        resample.SetDefaultPixelValue(7.0)
        found.append(sitk.GetArrayFromImage(resample.Execute(image)))
    positions = [(grid.window_positions if back else grid.source_positions)(axis) for axis in range(3)]
    # on the border, and half way between two voxels, the rounding of ITK's positions decides
    clear = np.ix_(*(np.abs(at % 1 - 0.5) > 1e-6 for at in positions))
    bring = grid.to_native if back else grid.to_iso
    assert_allclose(bring(volume, 7.0)[clear], found[0][clear], atol=2e-3)  # float32 of values near 1000
    beyond = found[1] == 7
    assert_array_equal(bring(volume > 0, 0)[clear], (np.where(beyond, 0, found[1]) > 0)[clear])
    rounded = bring(np.rint(volume).astype(np.int16), 7)
    assert rounded.dtype == np.int16
    exact = bring(np.rint(volume), 7.0)
    # a half may turn over to the next integer, and nothing else
    assert np.abs(rounded - exact).max(initial=0) <= 0.5 + 1e-3


def test_a_voxel_reaches_half_its_width() -> None:
    """As far as it reaches it is continued; beyond there is nothing. On the first face it is there."""
    volume = np.array([10, 20], np.float32).reshape(2, 1, 1)
    grid = IsoGrid((2, 1, 1), (4.0, 1.0, 1.0), (1.0, 1.0, 1.0), (-2, 0, 0), (12, 1, 1))
    expected = [-1, -1, 10, 10, 11.25, 13.75, 16.25, 18.75, 20, 20, -1, -1]
    assert_allclose(grid.to_iso(volume, -1)[:, 0, 0], expected)
    assert_array_equal(grid.to_iso(volume > 10)[:, 0, 0], [False] * 6 + [True] * 4 + [False] * 2)
    # back: voxels of the file at -0.5 and 1.5 of the window; the first face belongs to it, the last does not
    for size, expected in ((3, [10, 25]), (2, [10, -1])):
        window = IsoGrid((2, 1, 1), (2.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1, 0, 0), (size, 1, 1))
        values = np.array([10, 20, 30], np.float32)[:size].reshape(-1, 1, 1)
        assert_allclose(window.to_native(values, -1)[:, 0, 0], expected)


@pytest.mark.parametrize("n", [3, 8])
def test_ties_of_the_nearest_voxel_go_down(n: int) -> None:
    """Between two voxels the lower one is taken, however 0.1 mm are rounded."""
    mask = np.arange(2 * n).reshape(-1, 1, 1) % 2 == 0
    for size in (0.1, 0.3, 0.7, 1.0):
        grid = IsoGrid.whole((2 * n, 1, 1), (size, 1.0, 1.0), (2 * size, 1.0, 1.0))
        assert grid.to_iso(mask).all()
        assert not grid.to_iso(~mask).any()


def test_window_is_centred_padded_or_cropped() -> None:
    mask = np.zeros((20, 50, 60), bool)
    mask[5:15, 10:20, 30:50] = True
    grid = IsoGrid.around(mask, (2.0, 1.0, 1.0), (1.0, 1.0, 1.0), margin=3, size=64)
    assert grid.shape == (26, 64, 64)  # 20 mm and 3 slices on each side
    iso = grid.to_iso(mask)
    ys, xs = np.flatnonzero(iso.any(axis=(0, 2))), np.flatnonzero(iso.any(axis=(0, 1)))
    assert (ys[0] + ys[-1] + 1) / 2 == 32
    assert (xs[0] + xs[-1] + 1) / 2 == 32
    assert iso.sum() == 2 * mask.sum()
    assert_array_equal(grid.to_native(iso), mask)
    small = IsoGrid.around(mask, (2.0, 1.0, 1.0), (1.0, 1.0, 1.0), size=8)
    assert small.to_iso(mask).sum() == 20 * 8 * 8
    with pytest.raises(ValueError, match="at least one voxel"):
        IsoGrid.around(np.zeros((3, 3, 3), bool), SPACING, SPACING)


def test_shapes_are_checked() -> None:
    grid = IsoGrid.whole((4, 5, 6), SPACING, (1.0, 0.8, 0.8))
    with pytest.raises(ValueError, match=r"volume must have shape \(4, 5, 6\), got \(4, 5, 5\)"):
        grid.to_iso(np.zeros((4, 5, 5)))
    with pytest.raises(ValueError, match="array must have shape"):
        grid.to_native(np.zeros((4, 5, 6)))


# ---- one case in memory


def test_load_case_and_back(folder: Path) -> None:
    hu, mask = chest(1)
    case = load_case(folder / "anna.nii.gz", folder / "masks" / "anna_lung.nii.gz", spacing=(2.0, 1.5, 1.5))
    assert case.spacing == (2.0, 1.5, 1.5)
    assert case.hu.shape == case.mask.shape == case.grid.shape
    assert_array_equal(case.native_mask, mask)
    assert_array_equal(case.volume.hu, hu)
    back = case.to_native(case.mask)
    # nearest voxels there and back move a face by half a voxel of the working grid at most
    assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) > 0.97
    # lung is about -850 on either grid; noise of 15 HU averages out
    assert np.median(case.hu[case.mask]) == pytest.approx(np.median(hu[mask]), abs=3)
    inner = ndimage.binary_erosion(mask)
    smooth = case.to_native(case.hu.astype(np.float32))
    assert np.median(smooth[inner] - hu[inner]) == pytest.approx(0, abs=3)


def test_load_case_finds_the_lungs_itself(folder: Path) -> None:
    _, mask = chest(1)
    found = load_case(folder / "anna.nii.gz", spacing=(2.0, 2.0, 2.0)).native_mask
    # 5 x 3 x 3 mm voxels: a rim of one would be 20 %
    assert 2 * (found & mask).sum() / (found.sum() + mask.sum()) > 0.95
    right = load_case(folder / "anna.nii.gz", spacing=(2.0, 2.0, 2.0), keep_lung="right").native_mask
    assert not right[:, :, 50:].any()
    given_left = load_case(folder / "anna.nii.gz", folder / "masks" / "anna_lung.nii.gz", keep_lung="left")
    assert_array_equal(given_left.native_mask, mask & (np.arange(100) >= 50))


def test_load_case_errors_name_the_file(folder: Path, tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.nii.gz", np.zeros((40, 70, 100), np.uint8))
    with pytest.raises(ValueError, match=r"anna\.nii\.gz.*empty\.nii\.gz must not be empty"):
        load_case(folder / "anna.nii.gz", empty)
    with pytest.raises(ValueError, match="spacing must be three positive"):
        load_case(folder / "anna.nii.gz", spacing=(0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="keep_lung must be both, right or left, got 'up'"):
        load_case(folder / "anna.nii.gz", keep_lung="up")
    block = np.full((20, 40, 40), -1000, np.int16)
    block[:, 4:36, 4:36] = 40
    write(tmp_path / "block.nii.gz", block)
    with pytest.raises(ValueError, match=r"block\.nii\.gz: no lung found"):
        load_case(tmp_path / "block.nii.gz")


# ---- store


def random_case(shape: tuple[int, int, int] = (11, 32, 30), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(-1024, 3000, shape).astype(np.int16), rng.random(shape) < 0.3


def test_slabs_read_back_equal(tmp_path: Path) -> None:
    hu, mask = random_case()
    Store.create(tmp_path / "s", {"spacing": [1.0, 0.8, 0.8], "size": 32}).add("a", hu, mask, {"note": "x"})
    case = Store.open(tmp_path / "s")["a"]
    assert case.shape == hu.shape
    assert case.spacing == (1.0, 0.8, 0.8)
    assert case.meta["note"] == "x"
    assert case.segments == [(0, 11)]
    assert_array_equal(case.mask_counts, mask.sum(axis=(1, 2)))
    for z0, z1 in ((0, 11), (0, 1), (3, 9), (10, 11)):
        got_hu, got_mask = case.slab(z0, z1)
        assert got_hu.dtype == np.int16
        assert got_mask.dtype == np.bool_
        assert_array_equal(got_hu, hu[z0:z1])
        assert_array_equal(got_mask, mask[z0:z1])
    for z0, z1 in ((-1, 3), (3, 3), (5, 12)):
        with pytest.raises(ValueError, match="slab must satisfy"):
            case.slab(z0, z1)


def test_interrupted_add_leaves_no_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path / "s", {"spacing": [1.0, 0.8, 0.8]})
    hu, mask = random_case()
    store.add("a", hu, mask)
    written = store_module._write_array

    def stop_at_mask(path: Path, array: np.ndarray) -> None:
        if path.name.startswith("mask"):
            raise KeyboardInterrupt
        written(path, array)

    monkeypatch.setattr(store_module, "_write_array", stop_at_mask)
    with pytest.raises(KeyboardInterrupt):
        store.add("b", hu, mask)
    with pytest.raises(KeyboardInterrupt):
        store.add("a", hu[::-1], mask, overwrite=True)
    assert store.case_ids == ["a"]
    assert [p.name for p in (tmp_path / "s" / "cases").iterdir()] == ["a"]
    assert_array_equal(store["a"].slab(0, 11)[0], hu)


def test_store_refuses(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s", {"spacing": [1.0, 0.8, 0.8]})
    hu, mask = random_case()
    store.add("a", hu, mask)
    for arguments, message in (
        (("a", hu, mask), "case 'a' exists"),
        (("../a", hu, mask), "case_id must be letters"),
        (("b", hu.astype(float), mask), "hu must be int16"),
        (("b", hu, mask[:3]), "3-D of one shape"),
        (
            ("b", hu, mask, {"segments": [[0, 5], [4, 9]]}),
            r"segments\[1\] must be an ascending run of slices in 0..11",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            store.add(*arguments)
    with pytest.raises(KeyError, match="no case 'z'; there are a"):
        store["z"]
    with pytest.raises(ValueError, match="other settings"):
        Store.create(tmp_path / "s", {"spacing": [1.0, 1.0, 1.0]})
    with pytest.raises(ValueError, match="not a store"):
        Store.open(tmp_path)
    with pytest.raises(ValueError, match="new or empty folder"):
        Store.create(tmp_path, {})


# ---- exclusions


def test_excluded_slices_do_not_reach_the_grid() -> None:
    """Against the definition: a kept slice's interpolation weight on every excluded slice is zero."""
    grid = IsoGrid.whole((20, 1, 1), (2.5, 1.0, 1.0), (1.0, 1.0, 1.0))
    keep = kept_slices(grid, [(4, 6), (12, 12)])
    marked = np.zeros((20, 1, 1), np.float32)
    marked[[4, 5, 6, 12]] = 1
    assert_array_equal(keep, grid.to_iso(marked)[:, 0, 0] == 0)
    assert runs(keep) == [(0, 9), (19, 29), (34, 50)]
    with pytest.raises(ValueError, match="must be below 20, got 4-20"):
        kept_slices(grid, [(4, 20)])


def test_csv_files(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("case,first_slice,last_slice\n# why\nanna,3,5\nanna, 9, 9\nbert,0,1\n\n")
    assert read_exclusions(path) == {"anna": [(3, 5), (9, 9)], "bert": [(0, 1)]}
    for bad in ("anna,5,3", "anna,x,3", "anna,3", "anna,-1,3", "anna,1,2,3"):
        path.write_text(f"anna,1,2\n{bad}\n")
        with pytest.raises(ValueError, match=r"x\.csv, line 2: must be case,first_slice,last_slice"):
            read_exclusions(path)
    path.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\nanna,1.5,-2,30,8\n")
    assert read_annotations(path) == {"anna": [(1.5, -2.0, 30.0, 8.0)]}
    path.write_text("anna,1,2,nan,8\n")
    with pytest.raises(ValueError, match="line 1: must be seriesuid"):
        read_annotations(path)
    with pytest.raises(ValueError, match="unreadable CSV"):
        read_annotations(tmp_path / "gone.csv")


def test_annotations_become_slices(folder: Path) -> None:
    ct = io.read_ct(folder / "anna.nii.gz")
    # 8 mm around z = 100 mm, slices of 5 mm: 96-104 is 19.2-20.8, and one slice more on each side
    assert nodule_slices(ct, [(60.0, 60.0, 100.0, 8.0)]) == [(18, 22)]
    with pytest.raises(ValueError, match="lies outside the volume"):
        nodule_slices(ct, [(60.0, 60.0, 900.0, 8.0)])


# ---- prepare


def test_prepared_store(prepared: Store, folder: Path) -> None:
    assert prepared.case_ids == ["anna", "bert"]
    for name, seed in (("anna", 1), ("bert", 2)):
        case = prepared[name]
        assert case.shape[1:] == (160, 160)
        hu, mask = case.slab(0, case.shape[0])
        assert np.median(hu[mask]) == pytest.approx(-850, abs=3)
        _, truth = chest(seed)
        ys, xs = np.flatnonzero(mask.any(axis=(0, 2))), np.flatnonzero(mask.any(axis=(0, 1)))
        # the segmented box is good to a voxel of 3 mm on each side
        assert (ys[0] + ys[-1]) / 2 == pytest.approx(79.5, abs=2)
        assert (xs[0] + xs[-1]) / 2 == pytest.approx(79.5, abs=2)
        if name == "bert":
            assert mask.sum() * 8 == pytest.approx(truth.sum() * 45, rel=0.06)
        assert (folder / "store" / "qc" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert prepared["bert"].segments == [(0, prepared["bert"].shape[0])]


def test_left_out_slices_split_the_case(prepared: Store) -> None:
    case = prepared["anna"]
    (first, gap), (after, end) = case.segments
    start = case.meta["start"][0]
    at = (np.arange(start, start + case.shape[0]) + 0.5) * 2 / 5 - 0.5  # in slices of the file
    touched = (at > 17) & (at < 21)
    assert (first, end) == (0, case.shape[0])
    assert_array_equal(np.flatnonzero(touched), np.arange(gap, after))
    _, mask = case.slab(0, case.shape[0])
    assert not mask[gap:after].any()
    assert mask[gap - 1].any()
    assert mask[after].any()


def test_a_second_run_keeps_what_is_there(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    summary = prepare([folder / "bert.nii.gz"], tmp_path / "store", **FINE)
    assert [c.status for c in summary.cases] == ["there"]
    before = (tmp_path / "store" / "cases" / "bert" / "meta.json").stat().st_mtime_ns
    summary = prepare(
        [folder / "bert.nii.gz"], tmp_path / "store", overwrite=True, keep_lung={"bert": "right"}, **FINE
    )
    assert [c.status for c in summary.cases] == ["prepared"]
    assert (tmp_path / "store" / "cases" / "bert" / "meta.json").stat().st_mtime_ns > before
    case = summary.store["bert"]
    hu, mask = case.slab(0, case.shape[0])
    assert case.meta["kept_lung"] == "right"
    # one lung of 28 voxels of 3 mm is 42 of 2 mm; both would be 108
    assert mask.any(axis=(0, 1)).sum() < 50
    assert hu.shape == mask.shape


def test_given_masks_are_used(folder: Path, tmp_path: Path) -> None:
    summary = prepare([folder / "anna.nii.gz"], tmp_path / "s", masks=folder / "masks", **COARSE)
    case = summary.store["anna"]
    hu, truth = chest(1)
    assert case.meta["lungs_from"] == "anna_lung.nii.gz"
    z0, y0, x0 = case.meta["start"]
    got_hu, got = case.slab(0, case.shape[0])
    assert got.sum() <= truth.sum()  # erroneous edges can only take away
    assert got.sum() > 0.97 * truth.sum()
    here = got_hu[:, 20 - y0 : 50 - y0, 20 - x0 : 80 - x0]
    assert_array_equal(here, hu[z0 : z0 + len(here), 20:50, 20:80])


def test_labels_and_warnings_are_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hu, truth = chest(1)
    write(tmp_path / "in/a.nii.gz", hu)
    write(tmp_path / "in/sub/7_Thorax_1.0_Lung.nii.gz", hu)
    write(tmp_path / "masks/a.nii.gz", truth * np.where(np.arange(100) < 50, 3, 7).astype(np.uint8))
    call = [str(tmp_path / "in"), "--output", str(tmp_path / "s"), "--masks", str(tmp_path / "masks")]
    call += ["--spacing", "5", "3", "3", "--size", "96"]
    told = f"passed over: {tmp_path}/in/sub/7_Thorax_1.0_Lung.nii.gz: named as"
    for labels, both in (((), True), ((3,), False), ((3, 7), True)):
        flags = ["--label", *map(str, labels), "--overwrite"] if labels else []
        assert main([*call, *flags]) == 0
        assert told in capsys.readouterr().err
        case = Store.open(tmp_path / "s")["a"]
        assert case.meta["label"] == list(labels)
        assert bool(case.meta["warnings"]) == (not labels)
        (row,) = csv.DictReader((tmp_path / "s/summary.csv").read_text().splitlines())
        assert all(text in row["message"] for text in case.meta["warnings"])
        share = case.meta["lung_ml"] / (truth.sum() * 0.045)  # ml of a voxel of 5 x 3 x 3 mm
        assert (share > 0.9) == both  # edges are taken out of the mask: a few percent
        assert share > 0.4
    assert main([*call, "--label", "3"]) == 0
    assert "prepared with another label; overwrite" in capsys.readouterr().out
    (tmp_path / "gone.nii").symlink_to(tmp_path / "nothing")
    assert main([*call[:1], str(tmp_path / "gone.nii"), *call[1:]]) == 1
    assert f"passed over: {tmp_path}/gone.nii: a link that leads nowhere" in capsys.readouterr().err


@given(
    cut=st.integers(0, 2**16 - 1), spacing=st.tuples(st.floats(0.5, 2), st.floats(0.7, 4), st.floats(0.7, 4))
)
def test_only_the_rim_of_an_edge_goes(cut: int, spacing: tuple[float, float, float]) -> None:
    """Against the definition, voxel by voxel: what is bright on a rim goes, unless 3.2 mm deep."""
    rng = np.random.default_rng(cut)
    mask = np.zeros((3, 17, 19), bool)
    mask[:, 2:-2, 1:-1] = True
    mask[rng.random(mask.shape) < 0.01] = False
    hu = np.where(rng.random(mask.shape) < 0.6, -100, -800).astype(np.int16)
    grid = IsoGrid.whole(mask.shape, spacing, spacing)
    kept, removed = _without_edges(LoadedCase(hu, mask, io.Scan, mask, grid))
    box = (slice(None), slice(2, -2), slice(1, -1))
    _, cleaned = ls.remove_erroneous_edges(ls.window_hu(hu[box]) * mask[box], mask[box])
    outside = np.argwhere(~mask[box])
    deep = mask[box].copy()
    for z, y, x in np.argwhere(deep):
        near = outside[outside[:, 0] == z, 1:] - (y, x)
        deep[z, y, x] = not ((near * spacing[1:]) ** 2).sum(axis=1).min(initial=np.inf) <= EDGE_MM**2
    assert_array_equal(kept[box], cleaned | deep)
    assert_array_equal(removed, mask & ~kept)


def test_edges_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    """The mask that prediction has, and so more of it by a bright rim."""
    hu, truth = chest(1)
    rim = truth & ~ndimage.binary_erosion(truth, ndimage.generate_binary_structure(2, 1)[None])
    write(tmp_path / "in/a.nii.gz", np.where(rim, 0, hu).astype(np.int16))
    write(tmp_path / "masks/a.nii.gz", truth.astype(np.uint8))
    given: dict[str, Any] = {"masks": tmp_path / "masks", **COARSE}
    cases = [
        prepare([tmp_path / "in"], tmp_path / edges, edges=edges, **given).store["a"]
        for edges in ("remove", "keep")
    ]
    less, whole = (case.slab(0, case.shape[0])[1] for case in cases)
    assert whole.sum() == truth.sum()
    assert cases[0].meta["edge_voxels"] == (whole & ~less).sum()
    assert 0.99 * rim.sum() < (whole & ~less).sum() <= rim.sum()  # a tip of the lungs may be a lesion's size
    assert cases[1].meta["edge_voxels"] == 0
    again = prepare([tmp_path / "in"], tmp_path / "keep", **given)
    assert "prepared with another edges; overwrite" in again.cases[0].message
    with pytest.raises(ValueError, match="edges must be one of remove, keep, got 'none'"):
        prepare([tmp_path / "in"], tmp_path / "other", edges="none", **given)


def test_the_density_of_healthy_lung_is_kept(prepared: Store) -> None:
    """Training takes it from there; a store of before tells none, and is read."""
    for name in prepared.case_ids:
        case = prepared[name]
        assert case.meta["density_hu"] == healthy_density(*case.slab(0, case.shape[0]))
        assert case.meta["density_hu"] == pytest.approx(-850, abs=3)


def test_a_case_without_healthy_lung_and_one_of_before(prepared: Store, folder: Path, tmp_path: Path) -> None:
    hu, _ = chest(1)
    write(tmp_path / "full.nii.gz", np.where(hu < -500, hu + 500, hu).astype(np.int16))
    store = prepare(
        [tmp_path / "full.nii.gz"],
        tmp_path / "s",
        masks=folder / "masks" / "anna_lung.nii.gz",
        **COARSE,
    ).store
    assert store["full"].meta["density_hu"] is None
    file = tmp_path / "s/cases/full/meta.json"
    record = json.loads(file.read_text())
    del record["density_hu"]
    file.write_text(json.dumps(record))
    assert "density_hu" not in store["full"].meta
    assert store["full"].slab(0, 2)[0].dtype == np.int16
    for wrong in ("-850", True, []):
        file.write_text(json.dumps(record | {"density_hu": wrong}))
        with pytest.raises(ValueError, match=r"meta\.json: density_hu must be"):
            _ = store["full"]


# ---- left over by killed runs


def dead_pid() -> int:
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_runs_go_and_live_ones_stay(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s", {"spacing": [1.0, 0.8, 0.8]})
    store.add("a", *random_case())
    (store.path / "qc").mkdir()
    here, old = socket.gethostname(), time.time() - 3 * 86400
    names = {
        f"cases/.b.of-{here}-{dead_pid()}.0123456789abcdef": False,
        f"cases/.c.of-{here}-{os.getpid()}.0123456789abcdef": True,
        "cases/.d.of-elsewhere-7.0123456789abcdef": True,
        "cases/.e.of-else.where-7.0123456789abcdef": False,
        f"qc/.b.of-{here}-{dead_pid()}.0123456789abcdef.png": False,
        f".summary.csv.of-{here}-{dead_pid()}.0123456789abcdef": False,
        ".hidden": True,
    }
    for name in names:
        path = store.path / name
        if name.startswith("cases"):
            path.mkdir()
            (path / "hu.b2nd").write_bytes(b"half")
        else:
            path.touch()
    os.utime(store.path / "cases/.e.of-else.where-7.0123456789abcdef", (old, old))
    store.clean()
    assert {name: (store.path / name).exists() for name in names} == names
    assert store.case_ids == ["a"]


def test_a_store_killed_at_birth_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "s" / "cases").mkdir(parents=True)
    (tmp_path / "s" / f".store.json.of-{socket.gethostname()}-{dead_pid()}.0123456789abcdef").touch()
    assert Store.create(tmp_path / "s", {"spacing": [1.0, 0.8, 0.8]}).case_ids == []
    (tmp_path / "t" / "cases" / "precious").mkdir(parents=True)
    with pytest.raises(ValueError, match="new or empty folder"):
        Store.create(tmp_path / "t", {"spacing": [1.0, 0.8, 0.8]})


def test_a_case_cut_short_is_prepared_again(prepared: Store, folder: Path, tmp_path: Path) -> None:
    """As a copy of a store leaves it that was broken off."""
    shutil.copytree(prepared.path, tmp_path / "s")
    inputs = [folder / "bert.nii.gz"]
    for name, kept in (("hu.b2nd", 0.5), ("mask.b2nd", 0.0), ("mask.b2nd", None)):
        file = tmp_path / "s" / "cases" / "bert" / name
        whole = file.read_bytes()
        if kept is None:
            file.unlink()
        else:
            file.write_bytes(whole[: int(kept * len(whole))])
        assert [c.status for c in prepare(inputs, tmp_path / "s", **FINE).cases] == ["prepared"]
        assert file.read_bytes() == whole
    assert [c.status for c in prepare(inputs, tmp_path / "s", **FINE).cases] == ["there"]


# ---- the table in the store


def test_summary_table(prepared: Store, folder: Path, tmp_path: Path) -> None:
    """One line per case of the store, of this call or not, and one per failure."""
    shutil.copytree(folder / "store", tmp_path / "s")
    prepare([folder / "broken.nii.gz", folder / "bert.nii.gz"], tmp_path / "s", **FINE)
    with (tmp_path / "s" / "summary.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["case"], r["status"]) for r in rows] == [
        ("broken", "failed"),
        ("bert", "there"),
        ("anna", "there"),
    ]
    assert "broken.nii.gz: damaged" in rows[0]["message"]
    assert rows[0]["lung_ml"] == ""
    bert = prepared["bert"]
    hu, mask = bert.slab(0, bert.shape[0])
    assert float(rows[1]["lung_ml"]) == pytest.approx(mask.sum() * 0.008, abs=0.06)  # one decimal
    assert float(rows[1]["bright_fraction"]) == pytest.approx((hu[mask] >= -500).mean(), abs=6e-6)
    assert [float(rows[1][f"spacing_{axis}"]) for axis in "zyx"] == [5.0, 3.0, 3.0]
    assert int(rows[1]["slices"]) == bert.shape[0]
    assert int(rows[2]["slices"]) == sum(b - a for a, b in prepared["anna"].segments)
    assert (rows[1]["source"], rows[1]["series"], rows[1]["lungs_from"]) == ("bert.nii.gz", "", "classical")


# ---- several processes


@pytest.mark.slow
def test_workers_change_nothing(folder: Path, tmp_path: Path) -> None:
    """Bit for bit the same store, the broken case reported, whatever the number of processes."""
    inputs = [folder / f"{name}.nii.gz" for name in ("anna", "broken", "bert")]
    stores = []
    for workers in (1, 2):
        reported: list[str] = []
        summary = prepare(
            inputs,
            tmp_path / f"s{workers}",
            **COARSE,
            workers=workers,
            report=lambda case, seen=reported: seen.append(case.case_id),
        )
        assert [c.case_id for c in summary.cases] == ["anna", "broken", "bert"]
        assert [c.status for c in summary.cases] == ["prepared", "failed", "prepared"]
        assert sorted(reported) == ["anna", "bert", "broken"]
        files = sorted(p for p in summary.store.path.rglob("*") if p.is_file() and p.suffix != ".csv")
        stores.append({p.relative_to(summary.store.path): p.read_bytes() for p in files})
    assert stores[0] == stores[1]
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        prepare(inputs, tmp_path / "s0", workers=0)


@pytest.mark.slow
def test_a_killed_worker_costs_one_case(folder: Path, tmp_path: Path) -> None:
    """A process is killed as soon as it is there; its case fails, the others do not, and it can be redone."""
    inputs, names = [folder / "anna.nii.gz"] * 3, ["a", "b", "c"]
    settings = {"names": names, **COARSE}
    killed: list[int] = []

    def kill_first() -> None:
        while not killed:
            for child in multiprocessing.active_children():
                if child.pid is not None and not killed:
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append(child.pid)
            time.sleep(0.005)

    killer = threading.Thread(target=kill_first)
    killer.start()
    try:
        summary = prepare(inputs, tmp_path / "s", workers=2, **settings)
    finally:
        killed.append(0)
        killer.join()
    (case,) = summary.failed
    assert "anna.nii.gz: the worker process was ended by SIGKILL" in case.message
    assert summary.store.case_ids == sorted({"a", "b", "c"} - {case.case_id})
    assert not [p for p in summary.store.path.rglob(".*")]
    assert not prepare(inputs, tmp_path / "s", **settings).failed


# ---- command


def test_command_reports_a_broken_file_and_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output", str(tmp_path / "s"), "--spacing", "3", "3", "3", "--size", "112", *classical.FLAGS]
    inputs = [str(folder / "broken.nii.gz"), str(folder / "anna.nii.gz")]
    assert main([*inputs, *flags, "--name", "one", "two"]) == 1
    out = capsys.readouterr().out
    assert "damaged or truncated gzip" in out
    assert "failed" in out
    assert Store.open(tmp_path / "s").case_ids == ["two"]
    assert Store.open(tmp_path / "s")["two"].spacing == (3.0, 3.0, 3.0)
    assert main([inputs[1], *flags, "--name", "two"]) == 0
    assert "there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lung", "anna=up"], "--lung must be CASE=right or CASE=left, got anna=up"),
        (["--lung", "zoe=left"], "keep_lung names zoe: no such case among anna"),
        (["--name", "a", "b"], "names (--name) must be one for each CT found, got 2 names for 1 CT"),
        (["--exclude", "gone.csv"], "gone.csv: unreadable CSV"),
        (["--name", "a b"], "names must be of letters, digits"),
        (["--series", "1.2.3"], "series must be largest, all or the UID of one that is there (none)"),
        (["--workers", "0"], "workers must be at least 1, got 0"),
        (["--masks", "gone"], "masks must exist, got gone: no such file or folder"),
        (["--size", "0"], "size must be at least 1 voxel, got 0"),
        (["--spacing", "1", "0", "1"], "spacing must be three positive lengths in mm"),
    ],
)
def test_wrong_calls_exit_with_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(folder / "anna.nii.gz"), "--output", str(tmp_path / "s"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_unknown_option_exits_with_2(folder: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(folder / "anna.nii.gz"), "--no-such-option"])
    assert caught.value.code == 2


def test_output_is_needed_unless_series_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / "anna.nii.gz")]) == 2
    assert "output must be given" in capsys.readouterr().err
    assert main([str(folder / "anna.nii.gz"), "--list-series"]) == 0
    assert capsys.readouterr().out == "no DICOM series found\n"
    assert main([str(folder / "gone"), "--list-series"]) == 2


def test_two_cases_of_one_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="case names must differ, got anna more than once"):
        prepare([folder / "anna.nii.gz", folder / "anna.nii.gz"], tmp_path / "s")
    with pytest.raises(ValueError, match="inputs must name at least one CT"):
        prepare([], tmp_path / "s")
