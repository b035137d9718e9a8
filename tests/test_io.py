"""Reading CT: every format, every orientation, DICOM series, and what must be refused.

NIfTI files are written with nibabel and DICOM with pydicom, so that the reader is not tested against itself.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.testing import assert_allclose, assert_array_equal
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

import lesionsynth.io as io
from lesionsynth.io import read

SHAPE = (5, 6, 7)
SPACING = (2.5, 0.7, 0.9)


def volume(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Random HU with air and tissue; no symmetry, so that no flip goes unseen."""
    return np.random.default_rng(seed).integers(-1000, 400, shape).astype(np.int16)


def ras_affine() -> np.ndarray:
    """NIfTI affine of an array stored (x, y, z) with x right to left, y front to back, z up: LPS order."""
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    affine[:3, 3] = (11.0, -7.0, 30.0)
    return affine


def write_nifti(
    path: Path, lps: np.ndarray, axes: tuple[int, ...] = (0, 1, 2), flips: tuple[int, ...] = (1, 1, 1)
) -> np.ndarray:
    """Write a (z, y, x) LPS array with its axes permuted and flipped in the file; returns the affine."""
    image = nib.Nifti1Image(lps.transpose(2, 1, 0), ras_affine())  # (x, y, z)
    orientation = np.array([[axes[i], flips[i]] for i in range(3)])
    stored = image.as_reoriented(orientation)
    nib.save(stored, path)
    return np.asarray(stored.affine)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mhd", ".mha"])
def test_formats_read_back_equal(tmp_path: Path, suffix: str) -> None:
    hu = volume()
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin((1.0, -2.0, 3.0))
    sitk.WriteImage(image, str(tmp_path / f"chest{suffix}"))
    ct = io.read_ct(tmp_path / f"chest{suffix}")
    assert ct.hu.dtype == np.int16
    assert_array_equal(ct.hu, hu)
    # NIfTI keeps float32 spacings
    assert_allclose(ct.spacing, SPACING, rtol=1e-6)
    assert ct.name == "chest"


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_any_orientation_becomes_lps(tmp_path: Path, axes: tuple[int, ...], flips: tuple[int, ...]) -> None:
    hu = volume()
    write_nifti(tmp_path / "a.nii", hu, axes, flips)
    ct = io.read_ct(tmp_path / "a.nii")
    assert_array_equal(ct.hu, hu)
    assert_allclose(ct.spacing, SPACING, rtol=1e-6)  # float32 in the header


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, 1)])
def test_voxel_positions_are_where_the_affine_says(
    tmp_path: Path, axes: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    """One marked voxel: its world position through nibabel's affine leads `index_of` to it."""
    hu = np.full(SHAPE, -900, np.int16)
    hu[3, 1, 5] = 700
    affine = write_nifti(tmp_path / "a.nii.gz", hu, axes, flips)
    stored = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj)
    index = np.argwhere(stored == 700)[0]
    ras = affine[:3, :3] @ index + affine[:3, 3]
    lps = ras * (-1, -1, 1)
    ct = io.read_ct(tmp_path / "a.nii.gz")
    assert ct.hu[3, 1, 5] == 700
    # affine in float32: positions of tens of mm are good to 1e-5 mm
    assert_allclose(ct.index_of(lps)[0], (3, 1, 5), atol=1e-4)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1)])
def test_results_go_back_on_the_files_own_grid(
    tmp_path: Path, axes: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    affine = write_nifti(tmp_path / "a.nii.gz", volume(), axes, flips)
    ct = io.read_ct(tmp_path / "a.nii.gz")
    written = ct.write_like(ct.hu > 0, tmp_path / "new" / "mask.nii.gz")
    back = nib.load(written)
    assert_allclose(back.affine, affine, atol=1e-4)  # float32 header
    assert_array_equal(np.asarray(back.dataobj) > 0, np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj) > 0)
    assert back.get_data_dtype() == np.uint8
    assert_array_equal(io.read_mask(written, like=ct), ct.hu > 0)


def test_oblique_grid_keeps_its_affine(tmp_path: Path) -> None:
    turn = np.deg2rad(8)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = ras_affine()
    affine[:3, :3] = rotation @ affine[:3, :3]
    nib.save(nib.Nifti1Image(volume().transpose(2, 1, 0), affine), tmp_path / "a.nii")
    ct = io.read_ct(tmp_path / "a.nii")
    assert_array_equal(ct.hu, volume())
    back = nib.load(ct.write_like(ct.hu.astype(np.float64) / 3, tmp_path / "b.nii"))
    assert_allclose(back.affine, affine, atol=1e-4)  # float32 header
    assert back.get_data_dtype() == np.float32


def test_padding_is_raised_and_floats_are_rounded(tmp_path: Path) -> None:
    values = volume().astype(np.float32)
    values[0, 0, :4] = (-3024, -2000, 12.6, -0.4)
    nib.save(nib.Nifti1Image(values.transpose(2, 1, 0), ras_affine()), tmp_path / "a.nii")
    assert_array_equal(io.read_ct(tmp_path / "a.nii").hu[0, 0, :4], (-1024, -1024, 13, 0))


# ---- masks


def test_mask_in_another_orientation_fits(tmp_path: Path) -> None:
    write_nifti(tmp_path / "ct.nii.gz", volume(), (0, 1, 2), (1, 1, 1))
    labels = np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.uint8)
    write_nifti(tmp_path / "mask.nii.gz", labels, (2, 0, 1), (-1, 1, -1))
    ct = io.read_ct(tmp_path / "ct.nii.gz")
    assert_array_equal(io.read_mask(tmp_path / "mask.nii.gz", ct, (1, 2, 3)), labels > 0)


@pytest.mark.parametrize(
    ("shift", "scale", "shape", "message"),
    [
        (1.0, 1.0, SHAPE, "corners are 1.00 mm"),
        (0.0, 1.2, SHAPE, "must lie on the grid"),
        (0.0, 1.0, (5, 6, 8), "shape must be that of"),
    ],
)
def test_mask_on_another_grid_is_refused(
    tmp_path: Path, shift: float, scale: float, shape: tuple[int, int, int], message: str
) -> None:
    write_nifti(tmp_path / "ct.nii", volume())
    affine = ras_affine() @ np.diag([scale, 1, 1, 1])
    affine[0, 3] += shift
    mask = np.ones(shape[::-1], np.uint8)
    nib.save(nib.Nifti1Image(mask, affine), tmp_path / "mask.nii")
    with pytest.raises(ValueError, match=message):
        io.read_mask(tmp_path / "mask.nii", io.read_ct(tmp_path / "ct.nii"))


# ---- writing


def test_write_like_refuses(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii", volume())
    ct = io.read_ct(tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"shape \(5, 6, 7\), got \(5, 6, 8\)"):
        ct.write_like(np.zeros((5, 6, 8)), tmp_path / "b.nii")
    with pytest.raises(ValueError, match=r"must end in \.nii or \.nii\.gz"):
        ct.write_like(ct.hu, tmp_path / "b.png")
    with pytest.raises(TypeError, match="bool, integer or float, got complex128"):
        ct.write_like(ct.hu.astype(complex), tmp_path / "b.nii")


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nifti(tmp_path / "a.nii", volume())
    ct = io.read_ct(tmp_path / "a.nii")
    target = ct.write_like(ct.hu > 0, tmp_path / "out" / "m.nii.gz")
    before = target.read_bytes()

    def broken(path: Path, *_: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError(28, "disk full")

    monkeypatch.setattr(read, "write_nifti", broken)
    with pytest.raises(OSError, match="disk full"):
        ct.write_like(ct.hu < 0, target)
    assert target.read_bytes() == before
    assert os.listdir(target.parent) == ["m.nii.gz"]


# ---- what is no CT


def refuse(path: Path, *parts: str) -> None:
    with pytest.raises(ValueError, match=parts[0]) as caught:
        io.read_ct(path)
    for part in (path.name, *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.random.default_rng(0).random(SHAPE).astype(np.float32), "not a CT in Hounsfield units"),
        (np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8), "not a CT in Hounsfield units"),
        (np.full(SHAPE, -1000, np.int16), "not a CT in Hounsfield units"),
        (np.full(SHAPE, 40, np.int16), "not a CT in Hounsfield units"),
        (np.where(np.arange(7) == 3, np.nan, -900.0) * np.ones(SHAPE), "NaN"),
        (np.full((1, 6, 7), -900, np.int16), "at least two voxels along each axis"),
    ],
)
def test_other_values_are_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "x.nrrd"))
    refuse(tmp_path / "x.nrrd", message)


def test_colour_flat_and_foreign_files_are_refused(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 255, (4, 5, 6, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(colour, isVector=True), str(tmp_path / "rgb.nrrd"))
    refuse(tmp_path / "rgb.nrrd", "one value per voxel", "got 3")
    sitk.WriteImage(sitk.GetImageFromArray(volume()[0]), str(tmp_path / "flat.nrrd"))
    refuse(tmp_path / "flat.nrrd", "must be 3-D")
    sitk.WriteImage(sitk.GetImageFromArray(colour[0], isVector=True), str(tmp_path / "photo.png"))
    refuse(tmp_path / "photo.png", "not a known CT format")
    (tmp_path / "photo.png").rename(tmp_path / "photo.nii")
    refuse(tmp_path / "photo.nii", "not a NIfTI file")
    (tmp_path / "text.nii").write_text("not an image")
    refuse(tmp_path / "text.nii", "unreadable")
    sitk.WriteImage(
        sitk.GetImageFromArray(np.stack([volume()] * 3), isVector=False), str(tmp_path / "gated.nrrd")
    )
    refuse(tmp_path / "gated.nrrd", "must be 3-D")
    with pytest.raises(FileNotFoundError, match=r"gone\.nii"):
        io.read_ct(tmp_path / "gone.nii")


@pytest.mark.parametrize("kept", [0.3, 0.9])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_truncated_files_are_refused(tmp_path: Path, kept: float, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(volume(shape=(20, 30, 40))), str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    refuse(path, "gzip" if suffix == ".nii.gz" else "truncated: ")


@pytest.mark.parametrize("big_endian", [False, True])
def test_nifti_byte_orders(tmp_path: Path, big_endian: bool) -> None:
    """The length check must read both byte orders: whole files pass, short ones do not."""
    image = nib.Nifti1Image(volume(shape=(20, 30, 40)).transpose(2, 1, 0), ras_affine())
    if big_endian:
        image = nib.Nifti1Image(
            np.asarray(image.dataobj), ras_affine(), header=image.header.as_byteswapped(">")
        )
    nib.save(image, tmp_path / "a.nii")
    assert_array_equal(io.read_ct(tmp_path / "a.nii").hu, volume(shape=(20, 30, 40)))
    whole = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(whole[:-2])
    refuse(tmp_path / "a.nii", f"{len(whole) - 2} bytes of the {len(whole)}")


def test_missing_simpleitk_names_the_extra(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(volume()), str(tmp_path / "x.nrrd"))
    script = (
        f"import sys; sys.path[:] = {sys.path!r}; sys.modules['SimpleITK'] = None\n"
        "import lesionsynth.io as io\n"
        "try:\n    io.read_ct('x.nrrd')\nexcept ImportError as e:\n    print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "lesionsynth[io]" in done.stdout


# ---- DICOM


def write_series(
    folder: Path,
    hu: np.ndarray,
    *,
    slope: float = 1.0,
    intercept: float = -1024.0,
    step: float = 2.5,
    skip: tuple[int, ...] = (),
    positions: list[tuple[float, float, float]] | None = None,
    names: list[str] | None = None,
    **changes: Any,
) -> str:
    """One CT series, slice by slice; returns its UID."""
    folder.mkdir(parents=True, exist_ok=True)
    uid, study = generate_uid(), generate_uid()
    for z, plane in enumerate(hu):
        if z in skip:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = study, uid, "CT"
        data.PatientID, data.InstanceNumber = "phantom", z + 1
        data.Rows, data.Columns = plane.shape
        data.PixelSpacing = [0.7, 0.9]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = list(positions[z] if positions else (-20.0, 5.0, 100.0 + step * z))
        data.SliceThickness = 5.0  # overlapping reconstruction: not the distance of the slices
        data.RescaleSlope, data.RescaleIntercept = slope, intercept
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        stored = np.rint((plane.astype(float) - intercept) / slope)
        data.PixelData = stored.astype(np.uint16).tobytes()
        for key, value in changes.items():
            setattr(data, key, value)
        data.save_as(folder / (names[z] if names else f"{z:03d}.dcm"), enforce_file_format=True)
    return str(uid)


def test_dicom_series_in_shuffled_files(tmp_path: Path) -> None:
    hu = volume(shape=(8, 6, 7))
    names = [f"{n}.dcm" for n in np.random.default_rng(3).permutation(8)]
    write_series(tmp_path / "s", hu, names=names)
    ct = io.read_ct(tmp_path / "s")
    assert_array_equal(ct.hu, hu)
    assert_allclose(ct.spacing, (2.5, 0.7, 0.9))
    assert ct.name == "s"
    # the world position of the first pixel is what the header says
    assert_allclose(ct.index_of((-20.0, 5.0, 100.0 + 3 * 2.5))[0], (3, 0, 0), atol=1e-6)


def test_dicom_head_first_and_feet_first_agree(tmp_path: Path) -> None:
    hu = volume(shape=(8, 6, 7))
    write_series(tmp_path / "up", hu)
    write_series(
        tmp_path / "down", hu[::-1], positions=[(-20.0, 5.0, 100.0 + 2.5 * (7 - z)) for z in range(8)]
    )
    assert_array_equal(io.read_ct(tmp_path / "up").hu, hu)
    assert_array_equal(io.read_ct(tmp_path / "down").hu, hu)


def test_dicom_slope_and_intercept(tmp_path: Path) -> None:
    hu = (volume(shape=(4, 6, 7)) // 4 * 4).astype(np.int16)
    write_series(tmp_path / "s", hu, slope=2.0, intercept=-2000.0)
    assert_array_equal(io.read_ct(tmp_path / "s").hu, hu)


def test_dicom_result_on_the_series_grid(tmp_path: Path) -> None:
    hu = volume(shape=(4, 6, 7))
    write_series(tmp_path / "s", hu)
    ct = io.read_ct(tmp_path / "s")
    affine = nib.load(ct.write_like(hu > 0, tmp_path / "m.nii")).affine
    # LPS to RAS turns the signs of x and y; float32 header
    assert_allclose(affine @ (2, 3, 1, 1), (-(-20 + 2 * 0.9), -(5 + 3 * 0.7), 102.5, 1), atol=1e-4)


def test_one_file_means_its_series(tmp_path: Path) -> None:
    short, long = volume(1, (3, 6, 7)), volume(2, (5, 6, 7))
    write_series(tmp_path / "s", short, names=[f"a{z}.dcm" for z in range(3)])
    uid = write_series(tmp_path / "s", long, names=[f"b{z}.dcm" for z in range(5)])
    with pytest.warns(UserWarning, match=f"several DICOM series.*reading {uid}"):
        assert_array_equal(io.read_ct(tmp_path / "s").hu, long)
    assert_array_equal(io.read_ct(tmp_path / "s" / "a1.dcm").hu, short)


def test_dicom_problems_are_named(tmp_path: Path) -> None:
    hu = volume(shape=(8, 6, 7))
    write_series(tmp_path / "hole", hu, skip=(4,))
    refuse(tmp_path / "hole", "missing slices", "5.00 mm between slices 3 and 4, 2.50 mm elsewhere")
    write_series(
        tmp_path / "uneven", hu, positions=[(0, 0, 2.5 * z + (1.0 if z == 5 else 0)) for z in range(8)]
    )
    refuse(tmp_path / "uneven", "irregular slice spacing")
    write_series(tmp_path / "tilt", hu, positions=[(0, 0.4 * z, 2.5 * z) for z in range(8)])
    refuse(tmp_path / "tilt", "gantry tilt")
    write_series(tmp_path / "twice", hu, positions=[(0, 0, 2.5 * (z // 2)) for z in range(8)])
    refuse(tmp_path / "twice", "same position")
    write_series(tmp_path / "mr", hu, Modality="MR")
    with pytest.raises(ValueError, match="modality must be CT, got MR"):
        io.read_ct(tmp_path / "mr")
    write_series(tmp_path / "one", hu[:1])
    refuse(tmp_path / "one", "at least two slices")
    (tmp_path / "none").mkdir()
    refuse(tmp_path / "none", "must hold the files of a DICOM series")
    (tmp_path / "none" / "x.dcm").write_text("no DICOM")
    with pytest.raises(ValueError, match=r"x\.dcm: not a readable DICOM"):
        io.read_ct(tmp_path / "none" / "x.dcm")


def test_dicom_slice_of_another_size_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume(shape=(4, 6, 7)))
    path = tmp_path / "s" / "002.dcm"
    data = pydicom.dcmread(path)
    data.ImageOrientationPatient = [0, 1, 0, 0, 0, 1]
    data.save_as(path)
    with pytest.raises(ValueError, match="share one orientation"):
        io.read_ct(tmp_path / "s")


def test_dicom_files_cut_short_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume(shape=(4, 60, 70)))
    path = tmp_path / "s" / "002.dcm"
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ValueError, match=r"002\.dcm: truncated: .* announces 8400 bytes, 4400 are left"):
        io.read_ct(tmp_path / "s")


# ---- real files


def test_real_nrrd_and_dicom(shared_data: Path) -> None:
    small = io.read_ct(shared_data / "small" / "ct-64.nrrd")
    assert small.hu.shape == (79, 64, 64)
    lung = io.read_mask(shared_data / "small" / "wholeLung-64.nrrd", small)
    assert small.hu[lung].mean() < -700  # lung is mostly air: the mask lies on the lungs
    series = io.read_ct(shared_data / "dicom_lungdx_A0002")
    assert series.hu.shape == (30, 512, 512)
    assert series.spacing[0] == pytest.approx(8.0)
    first = pydicom.dcmread(shared_data / "dicom_lungdx_A0002" / "1-30.dcm")
    expected = first.pixel_array * float(first.RescaleSlope) + float(first.RescaleIntercept)
    # file 1-01 is the highest, 1-30 the lowest slice
    assert_array_equal(series.hu[0], np.maximum(expected, -1024))
