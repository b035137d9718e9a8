"""Masks as a DICOM Segmentation that refers to the CT series they were found in.

Viewers and archives show it on top of the CT. UIDs follow from the series and the voxels: writing the same
result again gives the same instance, not a second one.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from lesionsynth import __version__
from lesionsynth.files import named_when_whole, replacing
from lesionsynth.io import Grid, SeriesInfo, largest_series, list_series
from lesionsynth.strict import name_of

Mask = npt.NDArray[np.bool_]

SEGMENTS: Mapping[str, tuple[Any, Any, tuple[int, int, int]]] = {
    "lung": (codes.SCT.AnatomicalStructure, codes.SCT.Lung, (80, 160, 220)),
    "lesion": (codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion, (220, 60, 50)),
}
"""Names of segments: SNOMED category (DICOM CID 7150), SNOMED type, and an RGB colour for viewers."""


def write_segmentation(
    path: str | os.PathLike[str],
    masks: Mapping[str, Mask],
    source: str | os.PathLike[str],
    *,
    series: str | None = None,
) -> Path:
    """Write masks as one binary DICOM Segmentation.

    Parameters
    ----------
    path : path
        File to write; replaced atomically, folders are created.
    masks : mapping of str to (Z, Y, X) bool array
        By name, "lung" or "lesion"; in LPS index order on the CT's own grid, as `lesionsynth.io.read_ct`
        gives it. They may overlap.
    source : path
        The CT: a DICOM folder, or one file of the series.
    series : str, optional
        SeriesInstanceUID; where omitted, that of the file, or the one of the folder that `read_ct` takes.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ValueError
        `source` is no DICOM series or lacks what a segmentation must repeat of it, there is no mask, a name
        is unknown, or a mask has not the shape of the CT.
    FileNotFoundError
        `source` does not exist.

    Notes
    -----
    Frames without a voxel are left out, as the standard has it. An instance with the same voxels on the same
    series has the same UIDs.
    """
    if not masks:
        raise ValueError("masks must hold at least one mask, got none")
    if unknown := sorted(set(masks) - set(SEGMENTS)):
        raise ValueError(f"masks must be named {' or '.join(SEGMENTS)}, got {unknown[0]!r}")
    slices = read_series(source, series)
    grid = _grid(slices)
    frames = [grid.from_lps(_checked(name, mask, grid)) for name, mask in masks.items()]
    seed = [str(slices[0].SeriesInstanceUID), _digest(masks)]
    try:
        with warnings.catch_warnings():
            # of the patient's name, which is the CT's and not ours to change
            warnings.filterwarnings("ignore", "The string .* is unlikely to represent the intended person")
            dataset = _segmentation(slices, list(masks), np.stack(frames, axis=-1), seed)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # whatever highdicom misses
        raise ValueError(f"{source}: headers of the CT do not allow a segmentation: {error}") from error
    return _save(dataset, Path(path))


def read_series(source: str | os.PathLike[str], series: str | None = None) -> list[pydicom.Dataset]:
    """Read the headers of a CT series.

    Parameters
    ----------
    source, series
        As in `write_segmentation`.

    Returns
    -------
    list of pydicom.Dataset
        Without pixels; ascending along the slice normal, as `lesionsynth.io.read_ct` orders slices.

    Raises
    ------
    FileNotFoundError, ValueError
        Nothing is there; no DICOM series, or not the one asked for.
    """
    place = Path(source)
    there = list_series(place)
    if series is None:
        series = _chosen(place, there)
    # pydicom descends into sequences by recursion: only files that were walked through are given to it
    files = sorted(name for info in there if info.uid == series and info.usable for name in info.files)
    slices = [header for file in files if (header := _header(Path(file))) is not None]
    if not slices:
        raise ValueError(f"{name_of(place)}: series must be one that is there, got {series}")
    normal = _axes(slices[0])[2]
    return sorted(slices, key=lambda header: float(_position(header) @ normal))


def _chosen(place: Path, there: Sequence[SeriesInfo]) -> str:
    """Series of a file, or the one of a folder that `read_ct` reads."""
    infos = there if place.is_dir() else [info for info in there if str(place) in info.files]
    if infos:
        return largest_series(infos).uid
    raise ValueError(f"source must be a DICOM series, for a segmentation refers to it, got {name_of(place)}")


def _header(file: Path) -> pydicom.Dataset | None:
    """Header of an image with a place in a patient, or None."""
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
    except InvalidDicomError:
        return None
    needed = ("SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    return header if all(header.get(name) for name in needed) else None


def _axes(header: pydicom.Dataset) -> npt.NDArray[np.float64]:
    """Directions of columns, rows and slices (x, y, z index), one a row."""
    row, column = np.asarray(header.ImageOrientationPatient, float).reshape(2, 3)
    return np.stack([row, column, np.cross(row, column)])


def _position(header: pydicom.Dataset) -> npt.NDArray[np.float64]:
    return np.asarray(header.ImagePositionPatient, float)


def _grid(slices: Sequence[pydicom.Dataset]) -> Grid:
    first, last = slices[0], slices[-1]
    axes = _axes(first)
    distance = float((_position(last) - _position(first)) @ axes[2]) / max(len(slices) - 1, 1)
    along_rows, along_columns = (float(s) for s in first.PixelSpacing)  # DICOM: row spacing comes first
    return Grid.of(
        (int(first.Columns), int(first.Rows), len(slices)),
        (along_columns, along_rows, distance),
        [float(v) for v in _position(first)],
        [float(v) for v in axes.T.ravel()],
    )


def _checked(name: str, mask: Mask, grid: Grid) -> Mask:
    file_shape = grid.size[::-1]
    shape = tuple(file_shape[axis] for axis in grid.axes)
    if mask.shape != shape:
        raise ValueError(f"masks[{name!r}] must have the shape of the CT, {shape}, got {mask.shape}")
    if mask.dtype != np.bool_:
        raise ValueError(f"masks[{name!r}] must be bool, got {mask.dtype}")
    return mask


def _digest(masks: Mapping[str, Mask]) -> str:
    content = hashlib.sha256()
    for name, mask in masks.items():
        content.update(f"{name} {mask.shape} ".encode())
        content.update(np.packbits(mask).tobytes())
    return content.hexdigest()


def _segmentation(
    slices: Sequence[pydicom.Dataset], names: Sequence[str], frames: Mask, seed: Sequence[str]
) -> pydicom.Dataset:
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="normnet", family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    dataset: pydicom.Dataset = highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=frames.view(np.uint8),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_describe(number, name, algorithm) for number, name in enumerate(names, 1)],
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
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    organization = generate_uid(entropy_srcs=[*seed, "dimensions"])  # highdicom draws it at random
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
    return dataset


def _describe(number: int, name: str, algorithm: Any) -> Any:
    category, kind, colour = SEGMENTS[name]
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        anatomic_regions=None if kind == codes.SCT.Lung else [codes.SCT.Lung],
        display_color=highdicom.color.CIELabColor.from_rgb(*colour),
    )


def _save(dataset: pydicom.Dataset, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as beside, named_when_whole(beside) as stream:
        dataset.save_as(stream)
    return target
