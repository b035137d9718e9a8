"""DICOM segmentations read back: every frame's pixels where its own position says they are.

Series are written here with pydicom; where a voxel lies is worked out from the headers alone.
"""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")
highdicom = pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid  # noqa: E402

from lesionsynth.io import read_ct, read_headers  # noqa: E402
from normnet.dicom_seg import check_segmentation, write_segmentation  # noqa: E402

SHAPE, SPACING, ORIGIN = (6, 7, 9), (2.5, 0.7, 0.9), (-31.0, 12.5, 40.0)
AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)
FEET_FIRST = (-1, 0, 0, 0, 1, 0)  # the normal points down


def chest(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(-1000, 400, shape).astype(np.int16)


def some_masks(shape=SHAPE, seed=0):
    """Overlapping masks without symmetry; some slices empty along each axis."""
    rng = np.random.default_rng(seed)
    lung = np.zeros(shape, bool)
    lung[1:-1, 1:-2, 2:-1] = rng.random(shape)[1:-1, 1:-2, 2:-1] < 0.6
    lesion = np.zeros(shape, bool)
    lesion[1:3, 2:4, 2:5] = rng.random((2, 2, 3)) < 0.7
    lesion[2, 3, 4] = True
    return {"lung": lung, "lesion": lesion}


def index_of(world):
    """LPS world positions (..., 3: x, y, z) to voxels (z, y, x) of the volume that was written."""
    offset = (np.asarray(world) - np.array(ORIGIN)) / np.array(SPACING[::-1])
    nearest = np.rint(offset)
    np.testing.assert_allclose(offset, nearest, atol=1e-3)
    return tuple(nearest[..., k].astype(int) for k in (2, 1, 0))


def pixel_positions(position, orientation, spacing, shape):
    """World position of every pixel of a plane, (rows, columns, 3)."""
    row, column = np.array(orientation, float).reshape(2, 3)
    r, c = np.indices(shape)
    at = c[..., None] * float(spacing[1]) * row + r[..., None] * float(spacing[0]) * column
    return np.array(position, float) + at


def write_series(folder, hu, orientation=AXIAL, *, series=None, name="s", patient="Doe^Jane"):
    """Write an LPS volume as CT slices of any right-angled orientation; returns the series UID."""
    row, column = np.array(orientation, float).reshape(2, 3)
    normal = np.cross(row, column)
    sizes = np.array(hu.shape[::-1])  # x, y, z
    steps = np.array(SPACING[::-1])
    columns, rows, count = (int(abs(axis) @ sizes) for axis in (row, column, normal))
    dx, dy, dn = (float(abs(axis) @ steps) for axis in (row, column, normal))
    corner = np.array(ORIGIN)
    for axis, n, d in ((row, columns, dx), (column, rows, dy), (normal, count, dn)):
        corner = corner + np.where(axis < 0, -axis * (n - 1) * d, 0)  # start at the far end
    series = series or generate_uid(entropy_srcs=[str(folder), name])
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        position = corner + k * dn * normal
        pixels = hu[index_of(pixel_positions(position, orientation, (dy, dx), (rows, columns)))]
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(k)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.Modality, data.SeriesInstanceUID = "CT", series
        data.StudyInstanceUID = generate_uid(entropy_srcs=["study"])
        data.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame"])
        data.PatientID, data.PatientName = "p", patient
        data.PatientBirthDate = data.PatientSex = data.AccessionNumber = data.StudyID = ""
        data.StudyDate, data.StudyTime, data.ReferringPhysicianName = "20200101", "120000", ""
        data.SeriesNumber, data.InstanceNumber = 3, k + 1
        data.PositionReferenceIndicator = ""
        data.ImagePositionPatient = [float(v) for v in position]
        data.ImageOrientationPatient = [float(v) for v in orientation]
        data.PixelSpacing, data.SliceThickness = [dy, dx], dn
        data.Rows, data.Columns = rows, columns
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.PixelData = np.ascontiguousarray(pixels).tobytes()
        # names in another order than the slices
        data.save_as(folder / f"{name}{(k * 7) % 100:02d}-{k}.dcm", enforce_file_format=True)
    return series


def voxels_of(path, shape):
    """Masks on the written volume's LPS grid, from the frames' own headers; by the segments' labels."""
    data = pydicom.dcmread(path)
    labels = {s.SegmentNumber: s.SegmentLabel for s in data.SegmentSequence}
    shared = data.SharedFunctionalGroupsSequence[0]
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    frames = data.pixel_array.reshape(int(data.NumberOfFrames), data.Rows, data.Columns)
    found = {label: np.zeros(shape, bool) for label in labels.values()}
    references = {}
    for frame, groups in zip(frames, data.PerFrameFunctionalGroupsSequence, strict=True):
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        label = labels[groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        at = index_of(pixel_positions(position, orientation, spacing, frame.shape))
        assert not found[label][at].any()
        found[label][at] = frame > 0
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        references[source] = tuple(float(v) for v in position)
    return found, references


@pytest.mark.parametrize("orientation", [AXIAL, FEET_FIRST, CORONAL, SAGITTAL])
def test_voxels_come_back_where_they_were(tmp_path, orientation):
    hu, masks = chest(), some_masks()
    write_series(tmp_path / "ct", hu, orientation)
    ct = read_ct(tmp_path / "ct")
    np.testing.assert_array_equal(ct.hu, hu)  # the masks' grid
    path = write_segmentation(tmp_path / "deep/er/out.dcm", masks, ct)
    assert [p.name for p in path.parent.iterdir()] == ["out.dcm"]
    found, references = voxels_of(path, SHAPE)
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name], mask)
    # each frame refers to the slice of the CT at its own place
    headers = {h.SOPInstanceUID: h for h in read_headers(ct.files)}
    assert references
    for source, position in references.items():
        np.testing.assert_allclose(headers[source].ImagePositionPatient, position, atol=1e-5)


def test_what_the_segments_are(tmp_path):
    write_series(tmp_path / "ct", chest())
    segmentation = highdicom.seg.segread(
        write_segmentation(tmp_path / "out.dcm", some_masks(), read_ct(tmp_path / "ct"))
    )
    lung, lesion = (segmentation.get_segment_description(n) for n in (1, 2))
    assert (lung.segment_label, lesion.segment_label) == ("lung", "lesion")
    assert lung.segmented_property_type.value == "39607008"
    assert lesion.segmented_property_type.value == "52988006"
    assert lesion.segmented_property_category.value == "49755003"
    assert {d.segmented_property_type.scheme_designator for d in (lung, lesion)} == {"SCT"}
    assert lesion.anatomic_regions[0].value == "39607008"
    assert segmentation.Modality == "SEG"
    assert segmentation.SegmentationType == "BINARY"
    assert str(segmentation.PatientName) == "Doe^Jane"
    assert segmentation.SegmentsOverlap == "YES"


def test_uids_follow_from_series_and_voxels(tmp_path):
    write_series(tmp_path / "a", chest(), name="a")
    write_series(tmp_path / "b", chest(), name="b")

    def uids(masks, source):
        data = pydicom.dcmread(write_segmentation(tmp_path / "out.dcm", masks, read_ct(tmp_path / source)))
        organization = data.DimensionOrganizationSequence[0].DimensionOrganizationUID
        assert {d.DimensionOrganizationUID for d in data.DimensionIndexSequence} == {organization}
        return data.SOPInstanceUID, data.SeriesInstanceUID, organization

    masks = some_masks()
    first = uids(masks, "a")
    assert len(set(first)) == 3
    assert uids(masks, "a") == first
    assert not set(uids(masks, "b")) & set(first)
    masks["lesion"][0, 0, 0] = True
    assert not set(uids(masks, "a")) & set(first)


def test_the_series_that_was_read_of_several(tmp_path):
    write_series(tmp_path / "ct", chest(), name="large")
    small = write_series(tmp_path / "ct", chest((4, 7, 9)), name="small")
    ct = read_ct(tmp_path / "ct", small)
    path = write_segmentation(tmp_path / "o.dcm", some_masks((4, 7, 9)), ct)
    assert pydicom.dcmread(path).ReferencedSeriesSequence[0].SeriesInstanceUID == small


def test_a_patient_with_one_name_and_no_lesion(tmp_path):
    write_series(tmp_path / "ct", chest(), patient="Lung_Dx-A0002")
    masks = some_masks()
    masks["lesion"][:] = False
    found, _ = voxels_of(write_segmentation(tmp_path / "o.dcm", masks, read_ct(tmp_path / "ct")), SHAPE)
    np.testing.assert_array_equal(found["lung"], masks["lung"])
    assert not found["lesion"].any()


def test_bad_input(tmp_path):
    write_series(tmp_path / "ct", chest())
    masks = some_masks()
    out = tmp_path / "out"
    ct = read_ct(tmp_path / "ct")
    nifti = read_ct(ct.write_like(ct.hu, tmp_path / "ct.nii.gz"))
    with pytest.raises(ValueError, match=r"scan must be a DICOM series.*ct\.nii\.gz"):
        write_segmentation(out / "a.dcm", masks, nifti)
    with pytest.raises(ValueError, match="masks must hold at least one mask"):
        write_segmentation(out / "a.dcm", {}, ct)
    with pytest.raises(ValueError, match="masks must be named lung or lesion, got 'liver'"):
        write_segmentation(out / "a.dcm", {"liver": masks["lung"]}, ct)
    with pytest.raises(ValueError, match=r"masks\['lung'\] must have the shape of the CT, \(6, 7, 9\)"):
        write_segmentation(out / "a.dcm", {"lung": masks["lung"][1:]}, ct)
    with pytest.raises(ValueError, match=r"masks\['lung'\] must be bool, got uint8"):
        write_segmentation(out / "a.dcm", {"lung": masks["lung"].astype(np.uint8)}, ct)
    assert not out.exists()


TYPE_2 = [
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName", "PositionReferenceIndicator", "SeriesNumber", "InstanceNumber",
    "SliceThickness",
]  # fmt: skip


def change(folder, **values):
    """Change attributes of every slice; None takes one away, a list has a value for each slice."""
    for number, file in enumerate(sorted(folder.iterdir())):
        data = pydicom.dcmread(file)
        for name, value in values.items():
            value = value[number] if isinstance(value, list) else value
            if value is None:
                del data[name]
            else:
                with pydicom.config.disable_value_validation():
                    setattr(data, name, value)
        data.save_as(file)


@settings(max_examples=12)
@given(st.sets(st.sampled_from(TYPE_2), min_size=1), st.booleans())
def test_what_was_taken_away_is_empty(tmp_path_factory, lacking, some):
    """De-identified: attributes that may be empty are away, in all slices or in the first alone."""
    tmp_path = tmp_path_factory.mktemp("lacking")
    hu, masks = chest(), some_masks()
    write_series(tmp_path / "ct", hu)
    for number, file in enumerate(sorted((tmp_path / "ct").iterdir())):
        data = pydicom.dcmread(file)
        for name in lacking if number == 0 or not some else ():
            del data[name]
        data.save_as(file)
    ct = read_ct(tmp_path / "ct")
    check_segmentation(ct.files)
    path = write_segmentation(tmp_path / "o.dcm", masks, ct)
    found, _ = voxels_of(path, SHAPE)
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name], mask)
    written = pydicom.dcmread(path)
    for name in lacking - {"SeriesNumber", "InstanceNumber", "SliceThickness"}:
        assert name in written
        assert some or not written[name].value


def test_slices_in_two_folders_with_jitter(tmp_path):
    """Frames lie where their own slices do, of which orientations are rounded otherwise."""
    write_series(tmp_path / "ct/a", chest())
    rng = np.random.default_rng(0)
    for number, file in enumerate(sorted((tmp_path / "ct/a").iterdir())):
        data = pydicom.dcmread(file)
        data.ImagePositionPatient[2] = round(
            float(data.ImagePositionPatient[2]) + rng.uniform(-0.02, 0.02), 3
        )
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 1e-5 * (number % 2)]
        target = tmp_path / "ct" / "ab"[number % 2] / file.name
        target.parent.mkdir(exist_ok=True)
        file.unlink()
        data.save_as(target)
    ct = read_ct(tmp_path / "ct")
    check_segmentation(ct.files)
    masks = some_masks()
    segmentation = highdicom.seg.segread(write_segmentation(tmp_path / "o.dcm", masks, ct))
    headers = read_headers(ct.files)
    uids = [h.SOPInstanceUID for h in headers]
    frames = segmentation.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for number, mask in enumerate(masks.values()):
        np.testing.assert_array_equal(frames[..., number] > 0, mask)
    places = {h.SOPInstanceUID: h.ImagePositionPatient for h in headers}
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        # highdicom rounds places to micrometres
        np.testing.assert_allclose(
            frame.PlanePositionSequence[0].ImagePositionPatient, places[source], atol=1e-3
        )


@pytest.mark.parametrize(
    ("sets", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 192", "Müller^山田"),
        ("GB18030", "王^小东"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    ],
)
def test_names_in_any_alphabet(tmp_path, sets, name):
    """Also where a text changes between several character sets, as in East Asia."""
    write_series(tmp_path / "ct", chest())
    change(tmp_path / "ct", SpecificCharacterSet=[sets] * len(list((tmp_path / "ct").iterdir())))
    change(tmp_path / "ct", PatientName=name)
    ct = read_ct(tmp_path / "ct")
    check_segmentation(ct.files)
    written = pydicom.dcmread(write_segmentation(tmp_path / "o.dcm", some_masks(), ct))
    assert str(written.PatientName) == name


@pytest.mark.parametrize(
    ("name", "value"), [("StudyID", "x" * 30), ("PatientID", "x" * 70), ("FrameOfReferenceUID", "1.02.x")]
)
def test_values_of_the_ct_that_break_a_rule_are_kept(tmp_path, name, value):
    """Without a warning: they are those of the CT."""
    write_series(tmp_path / "ct", chest())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydicom, that writes and reads them here
        change(tmp_path / "ct", **{name: value})
    ct = read_ct(tmp_path / "ct")
    check_segmentation(ct.files)
    path = write_segmentation(tmp_path / "o.dcm", some_masks(), ct)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pydicom.dcmread(path)[name].value == value


UIDS = ["1.2.3", *["1.2.4"] * 5]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("FrameOfReferenceUID", None, "FrameOfReferenceUID must be one for all slices, got ''"),
        ("FrameOfReferenceUID", UIDS, "FrameOfReferenceUID must be one for all slices, got '1.2.3', '1.2.4'"),
        ("StudyInstanceUID", None, "StudyInstanceUID must be one for all slices, got ''"),
        ("StudyInstanceUID", UIDS, "StudyInstanceUID must be one"),
        ("SOPInstanceUID", None, "SOPInstanceUID must be another for each slice"),
        ("SOPInstanceUID", UIDS, "SOPInstanceUID must be another for each slice"),
        ("SOPClassUID", None, "SOPClassUID must be there"),
        ("PatientSex", "UNKNOWN", "UNKNOWN"),
        ("StudyDate", "ANON", ""),
    ],
)
def test_what_is_wrong_is_told_before(tmp_path, name, value, rule):
    write_series(tmp_path / "ct", chest())
    ct = read_ct(tmp_path / "ct")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's own, of a value that it reads all the same
        change(tmp_path / "ct", **{name: value})
        rule = rf"ct: headers of the CT do not allow a segmentation: .*{rule}"
        with pytest.raises(ValueError, match=rule):
            check_segmentation(ct.files)
        with pytest.raises(ValueError, match=rule):
            write_segmentation(tmp_path / "o.dcm", some_masks(), ct)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_series(tmp_path / "ct", chest())
    ct = read_ct(tmp_path / "ct")
    target = tmp_path / "out/o.dcm"
    target.parent.mkdir()
    target.write_text("old")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("normnet.dicom_seg.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_segmentation(target, some_masks(), ct)
    assert [p.name for p in target.parent.iterdir()] == ["o.dcm"]
    assert target.read_text() == "old"


def test_a_real_series(tmp_path, shared_data):
    source = tmp_path / "ct"
    shutil.copytree(shared_data / "dicom_lungdx_A0002", source)
    ct = read_ct(source)
    lung = (ct.hu < -500) & (np.arange(ct.hu.shape[0])[:, None, None] > 3)
    lesion = np.zeros_like(lung)
    lesion[10:13, 200:260, 100:180] = True
    path = write_segmentation(tmp_path / "o.dcm", {"lung": lung, "lesion": lesion}, ct)
    segmentation = highdicom.seg.segread(path)
    headers = read_headers(ct.files)
    uids = [h.SOPInstanceUID for h in headers]
    # highdicom puts the frames of a segment in the order of these slices; patients lie upright in LPS here
    assert [h.ImagePositionPatient[2] for h in headers] == sorted(h.ImagePositionPatient[2] for h in headers)
    frames = segmentation.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(frames[..., 0] > 0, lung)
    np.testing.assert_array_equal(frames[..., 1] > 0, lesion)
    assert segmentation.StudyInstanceUID == headers[0].StudyInstanceUID
    assert segmentation.FrameOfReferenceUID == headers[0].FrameOfReferenceUID
