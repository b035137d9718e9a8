"""Masks as a DICOM Segmentation that refers to the CT series they were found in: viewers show it on top.

UIDs follow from the series and the voxels: the same result again is the same instance, not a second one.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from lesionsynth import __version__
from lesionsynth.files import write_atomically
from lesionsynth.io import Scan, read_headers
from lesionsynth.strict import name_of, shown, some_of

Mask = npt.NDArray[np.bool_]

SEGMENTS: dict[str, tuple[Any, Any, tuple[int, int, int]]] = {
    "lung": (codes.SCT.AnatomicalStructure, codes.SCT.Lung, (80, 160, 220)),
    "lesion": (codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion, (220, 60, 50)),
}
"""Names of segments: SNOMED category (DICOM CID 7150), SNOMED type, and an RGB colour for viewers."""
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName", "PositionReferenceIndicator", "SliceThickness",
)  # fmt: skip
"""What a CT and a segmentation must have, though without a value: attributes of type 2."""


def check_segmentation(files: Sequence[Path]) -> None:
    """Raise `ValueError` unless a CT series, the files of a `Scan` or a `Source`, allows a segmentation.

    Its headers may lack what a segmentation must repeat, or not be as the standard wants them.
    """
    with _naming(files):
        slices = _slices(files)[:1]  # they agree: one is as good as all
        voxel = np.zeros((1, int(slices[0].Rows), int(slices[0].Columns), 1), bool)
        voxel[:, 0, 0] = True
        _segmentation(slices, ["lesion"], voxel, [""])


def encode_segmentation(masks: Mapping[str, Mask], scan: Scan) -> bytes:
    """Make one binary DICOM Segmentation of masks, the content of a file.

    Parameters
    ----------
    masks : mapping of str to (Z, Y, X) bool array
        By name, "lung" or "lesion"; on the grid of ``scan.hu``. They may overlap.
    scan : Scan
        The CT.

    Raises
    ------
    ValueError
        `scan` is no DICOM series or refused by `check_segmentation`, there is no mask, a name is unknown, or
        a mask has not the shape of the CT.

    Notes
    -----
    Frames without a voxel are left out, as the standard has it. What a CT must have, though maybe empty (a
    date of birth, say), is empty here where de-identification took it away.
    """
    if not masks:
        raise ValueError("masks must hold at least one mask, got none")
    if scan.series is None:
        rule = "scan must be a DICOM series, for a segmentation refers to it"
        raise ValueError(f"{rule}, got {name_of(scan.path)}")
    content = hashlib.sha256()
    for name, mask in masks.items():
        if name not in SEGMENTS:
            raise ValueError(f"masks must be named {' or '.join(SEGMENTS)}, got {name!r}")
        if mask.shape != scan.hu.shape:
            rule = f"have the shape of the CT, {scan.hu.shape}"
            raise ValueError(f"masks[{name!r}] must {rule}, got {mask.shape}")
        if mask.dtype != np.bool_:
            raise ValueError(f"masks[{name!r}] must be bool, got {mask.dtype}")
        content.update(f"{name} {mask.shape} ".encode() + np.packbits(mask).tobytes())
    frames = np.stack([scan.grid.from_lps(mask) for mask in masks.values()], axis=-1)
    with _naming(scan.files):
        return _segmentation(_slices(scan.files), list(masks), frames, [scan.series, content.hexdigest()])


def write_segmentation(path: str | os.PathLike[str], masks: Mapping[str, Mask], scan: Scan) -> Path:
    """Write what `encode_segmentation` makes, with its errors; folders are created, a file is replaced."""
    content = encode_segmentation(masks, scan)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(Path(path), content)


@contextmanager
def _naming(files: Sequence[Path]) -> Iterator[None]:
    """Name the CT in whatever highdicom and pydicom miss in its headers."""
    try:
        with warnings.catch_warnings():
            # of a name or a UID, which is the CT's and not ours to change
            for odd in ("The string .* is unlikely", "The value length", "Invalid value for VR"):
                warnings.filterwarnings("ignore", odd)
            yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        where = name_of(os.path.commonpath([file.parent for file in files]))
        lacking = isinstance(error, AttributeError) and error.name
        rule = f"{lacking} must be there" if lacking else error
        raise ValueError(f"{where}: headers of the CT do not allow a segmentation: {rule}") from error


def _slices(files: Sequence[Path]) -> list[pydicom.Dataset]:
    """Read the headers of slices that a segmentation can refer to; attributes of type 2 are there."""
    slices = read_headers(files)
    for header in slices:
        for name in _MAY_BE_EMPTY:
            if name not in header:
                setattr(header, name, "")
        if header.get("SpecificCharacterSet"):  # highdicom takes one, and texts may be in several
            header.decode()
            header.SpecificCharacterSet = "ISO_IR 192"
        header.ImageOrientationPatient = slices[0].ImageOrientationPatient  # rounded otherwise, it may be
    # of a Source, files are there twice where a folder was copied
    each = len({(str(header.get("SOPInstanceUID")), str(header.ImagePositionPatient)) for header in slices})
    for name, count in (("StudyInstanceUID", 1), ("FrameOfReferenceUID", 1), ("SOPInstanceUID", each)):
        values = {str(header.get(name, "")) for header in slices}
        if "" in values or len(values) != count:
            rule = "one for all slices" if count == 1 else "another for each slice"
            raise ValueError(f"{name} must be {rule}, got {some_of(', ', sorted(map(shown, values)), 3)}")
    return slices


def _segmentation(
    slices: Sequence[pydicom.Dataset], names: Sequence[str], frames: Mask, seed: Sequence[str]
) -> bytes:
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="normnet", family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    segments = []
    for number, name in enumerate(names, 1):
        category, kind, colour = SEGMENTS[name]
        segment = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=category,
            segmented_property_type=kind,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            anatomic_regions=None if kind == codes.SCT.Lung else [codes.SCT.Lung],
            display_color=highdicom.color.CIELabColor.from_rgb(*colour),
        )
        segments.append(segment)
    dataset = highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=frames.view(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=segments,
        series_instance_uid=generate_uid(entropy_srcs=[*seed, "series"]),
        series_number=int(slices[0].get("SeriesNumber") or 0) + 1000,
        sop_instance_uid=generate_uid(entropy_srcs=[*seed, "instance"]),
        instance_number=1,
        manufacturer="normnet",
        manufacturer_model_name="normnet",
        software_versions=__version__,
        device_serial_number="0",
        content_label="LESIONS",
        content_description="Lungs and lesions by normnet",
        series_description="normnet: lungs and lesions",
    )
    organization = generate_uid(entropy_srcs=[*seed, "dimensions"])  # highdicom draws it at random
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
    dataset.save_as(stream := io.BytesIO())
    return stream.getvalue()
