"""The files of a case in an output folder: written as a whole or not at all, and not twice.

All files of a case are written into a hidden folder beside their places, then renamed, and ``<case>.json``
last: it says how they were made, with settings, hashes of models, sizes and times of what was read. A case
whose JSON agrees with a call is skipped. What else exists is replaced with ``overwrite`` alone, and an input
never.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lesionsynth.files import left_over, others, remove_folder, temporary, write_atomically
from lesionsynth.strict import name_of, read_json, rule_of, shown
from lesionsynth.window import HU_RANGE
from normnet.config import HEALTHY_HU
from normnet.sheets import has_columns, sheet

Mask = npt.NDArray[np.bool_]
Record = dict[str, Any]
Writer = Callable[[Path], object]

FILES: Mapping[str, str] = {
    "lesions": "_lesions.nii.gz",
    "lung": "_lung.nii.gz",
    "classical": "_classical.nii.gz",
    "core": "_core.nii.gz",
    "probability": "_probability.nii.gz",
    "healthy": "_healthy.nii.gz",
    "dicom_seg": "_lesions.dcm",
}
"""What a case may have, and how its files end. A new format: a line here, a writer in `normnet.predict`."""
VOLUMES = tuple(
    name.format(side)
    for side in ("", "right_", "left_")
    for name in ("{}lung_ml", "{}lesion_ml", "{}percent")
)
"""Volumes of a record, in the order of the table's columns."""
TABLE = "volumes.csv"
HEADER = ("case", *VOLUMES)
"""Columns of `TABLE`."""
_STAMPS = {"ct_stamp": "the CT", "lungs_stamp": "the lung mask"}
_INSTEAD = "take another folder or pass overwrite"
_BEFORE = "before"
"""In the hidden folder: the record that is being replaced."""


def stamp(files: Sequence[Path]) -> Record:
    """Sum up names, sizes and times of files, which tell that one was changed since it was read.

    Parameters
    ----------
    files : sequence of Path
        In any order. Headers (``.mhd``, ``.nhdr``) bring the file of their voxels along.

    Returns
    -------
    dict
        ``files``, ``bytes``, ``modified_ns`` (the latest; nanoseconds since 1970), and ``listing``, the
        SHA-256 of every name, size and time.

    Raises
    ------
    OSError
        A file is gone.
    """
    rows = []
    for file in sorted({*files, *(voxels for header in files for voxels in _voxels(header))}):
        status = file.stat()
        rows.append((file.name, status.st_size, status.st_mtime_ns))
    return {
        "files": len(rows),
        "bytes": sum(size for _, size, _ in rows),
        "modified_ns": max(time for _, _, time in rows),
        "listing": hashlib.sha256(repr(rows).encode("utf-8", "surrogateescape")).hexdigest(),
    }


def _voxels(file: Path) -> list[Path]:
    """Files with the voxels of a header; none where it has them itself, or names them by a pattern."""
    if file.suffix.lower() not in (".mhd", ".nhdr"):
        return []
    pattern = r"^(?:ElementDataFile\s*=|data ?file:)\s*(\S.*?)\s*$"
    named = re.findall(pattern, file.read_bytes().decode("latin-1"), re.MULTILINE)
    return [path for name in named if (path := file.parent / name).is_file()]


def volumes_of(
    lesions: Mask, lung: Mask, spacing: Sequence[float], sides: tuple[Mask, Mask] | None = None
) -> dict[str, float | None]:
    """Measure lungs and lesions.

    Parameters
    ----------
    lesions, lung : (z, y, x) bool arrays
    spacing : (3,) floats
        Voxel size in mm.
    sides : pair of (z, y, x) bool arrays, optional
        The patient's right and left lung.

    Returns
    -------
    dict
        `VOLUMES`: ml and percent of the lung, of both lungs and of each; None for a side that is not known
        and for the percentage of a lung without voxels.
    """
    ml = float(np.prod(spacing)) / 1000.0
    volumes: dict[str, float | None] = dict.fromkeys(VOLUMES)
    for side, part in zip(("", "right_", "left_"), (lung, *(sides or ())), strict=False):
        whole = int(np.count_nonzero(part))
        ill = int(np.count_nonzero(lesions & part))
        volumes[f"{side}lung_ml"] = whole * ml
        volumes[f"{side}lesion_ml"] = ill * ml
        volumes[f"{side}percent"] = 100.0 * ill / whole if whole else None
    return volumes


def check_output(folder: Path, cases: Mapping[str, Sequence[Path]], *, overwrite: bool = False) -> None:
    """Check, before anything is computed, that results can go into a folder.

    Parameters
    ----------
    folder : Path
        Need not be there yet.
    cases : mapping of str to sequence of Path
        The files that each case is read from.
    overwrite : bool
        Replace a `TABLE` that is none of ours.

    Raises
    ------
    ValueError
        A result would replace an input; `folder` is a file; a case's name names no file; a table is there
        that no call wrote.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"output must be a folder, got the file {folder}")
    read = {_identity(path) for paths in cases.values() for path in paths} - {None}
    for case in cases:
        if not case or case[0] == "." or Path(case).name != case or "\0" in case:
            raise ValueError(f"case must be a file's name, not hidden, got {shown(case)}; give a name")
        for file in (folder / f"{case}{ending}" for ending in (*FILES.values(), ".json")):
            if _identity(file) in read:
                raise ValueError(f"output must not replace an input, got {folder} for {file}")
    if overwrite or not os.path.lexists(file := folder / TABLE):
        return
    if file.is_symlink() or not has_columns(file, HEADER):
        raise ValueError(f"output holds {TABLE}, which no call wrote; {_INSTEAD}")


def to_write(
    folder: Path, case: str, request: Mapping[str, Any], kinds: Sequence[str], *, overwrite: bool = False
) -> tuple[str, ...]:
    """Return the kinds of files to write for a case: none where an earlier call made all of them.

    Parameters
    ----------
    folder : Path
        Where they go. What a killed call had written as a whole is put in place first.
    case : str
    request : mapping
        Entries of the record that make it the result of this call: inputs, settings, models.
    kinds : sequence of str
        Of `FILES`.
    overwrite : bool
        Write all, whatever is there.

    Returns
    -------
    tuple of str
        Where one is missing all of them, and those the earlier call made besides.

    Raises
    ------
    ValueError
        The record that is there has another entry, or a file is there that no record names.
    """
    _recover(folder, case)
    if overwrite:
        return tuple(kinds)
    file = folder / f"{case}.json"
    made: dict[str, str] = {}
    if os.path.lexists(file):
        try:
            record = read_record(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}; {_INSTEAD}") from error
        for entry, now in request.items():
            if entry in record and record[entry] != now:
                rule = f"{entry} must be that of this call"
                if entry in _STAMPS:
                    rule = f"{_STAMPS[entry]} must be as it was when it was read"
                told = f"there {_short(record[entry])}, now {_short(now)}"
                raise ValueError(f"{file}: {rule}, or overwrite passed: {told}")
        made = {kind: name for kind, name in record["files"].items() if name}
        if all(kind in made and (folder / made[kind]).is_file() for kind in kinds):
            return ()
    _refuse(folder, [f"{case}{ending}" for kind, ending in FILES.items() if kind not in made])
    return tuple(kind for kind in FILES if kind in kinds or kind in made)


def write_case(
    folder: Path,
    case: str,
    writers: Mapping[str, Writer],
    record: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Record:
    """Write a case: all of its files, or none.

    Parameters
    ----------
    folder : Path
        Made where it is missing.
    case : str
    writers : mapping of str to callable
        By kind of `FILES`; each is given the path to write.
    record : mapping
        What goes into ``<case>.json``, without ``files``.
    overwrite : bool
        Replace what the record that is there does not name.

    Returns
    -------
    dict
        The record as written.

    Raises
    ------
    ValueError
        A file has come since `to_write`.
    OSError
        No room, or a file came out shorter than it should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _recover(folder, case)
    names = {kind: f"{case}{FILES[kind]}" for kind in writers}
    whole = {**record, "files": dict.fromkeys(FILES) | names}
    stage = temporary(folder / case)
    stage.mkdir()
    try:
        for kind, writer in writers.items():
            path = stage / names[kind]
            writer(path)
            check_written(path)
        if not overwrite:
            _refuse(folder, sorted({*names.values()} - _named(folder / f"{case}.json", case)))
        for place in (folder / name for name in (*names.values(), f"{case}.json")):
            if place.is_dir() and not place.is_symlink():
                raise IsADirectoryError(f"{place} must be a file, got a folder")
        write_atomically(stage / f"{case}.json", dumps(whole))
        _put(folder, case, stage)
    except BaseException:
        with suppress(OSError):
            _undo(folder, case, stage)
        raise
    return whole


# In the hidden folder lie the files, then <case>.json: from there on the result is whole, here and there, and
# _put may be called again and again. A kill at any point leaves what one of the two brings to its end.


def _recover(folder: Path, case: str) -> None:
    """Finish what killed calls had written as a whole, and take away what they had not."""
    for stage in left_over(folder, case):
        if stage.is_symlink() or not stage.is_dir() or others(stage, _inside(case)):
            continue
        before = _named(stage / _BEFORE, case) or _named(folder / f"{case}.json", case)
        names = _named(stage / f"{case}.json", case)
        coming = [name for name in names - before if (stage / name).exists()]
        # what has come since in a place of its own is somebody else's
        if names and not any(os.path.lexists(folder / name) for name in coming):
            _put(folder, case, stage)
        else:
            _undo(folder, case, stage)


def _put(folder: Path, case: str, stage: Path) -> None:
    """Move the files of a case into place, its record last."""
    final, new, before = folder / f"{case}.json", stage / f"{case}.json", stage / _BEFORE
    if os.path.lexists(final):
        os.replace(final, before)  # from here on the case counts as unfinished
    names = _named(new, case)
    for name in sorted(names):
        if (stage / name).exists():
            os.replace(stage / name, folder / name)
    for name in _named(before, case) - names:
        (folder / name).unlink(missing_ok=True)
    os.replace(new, final)
    _remove(case, stage)


def _undo(folder: Path, case: str, stage: Path) -> None:
    """Take a result back: the old one stays where all of it is there, else none."""
    final, before = folder / f"{case}.json", stage / _BEFORE
    if not os.path.lexists(final):
        names = _named(stage / f"{case}.json", case)
        moved = [name for name in names if not (stage / name).exists() and (folder / name).exists()]
        if before.exists() and not moved:
            os.replace(before, final)
        for name in moved:
            os.replace(folder / name, stage / name)
        for name in _named(before, case):
            (folder / name).unlink(missing_ok=True)
    _remove(case, stage)


def _inside(case: str) -> list[str]:
    """Names in a hidden folder, in the order in which they go: what says that it is whole, then the files."""
    name = glob.escape(case)
    return [_BEFORE, f"{name}.json", *(f"{name}{ending}" for ending in FILES.values())]


def _remove(case: str, stage: Path) -> None:
    with suppress(OSError, ValueError):  # a file of others in it: the folder stays
        remove_folder(stage, _inside(case))


def _refuse(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if os.path.lexists(folder / name):
            raise ValueError(f"output holds {name}, which is of no finished call; {_INSTEAD}")


def write_table(folder: Path) -> None:
    """Write ``volumes.csv`` of all finished cases; none where there is none.

    Lungs to 0.1 ml, the rest to two decimals, empty where unknown.
    """

    def cell(name: str, value: float | None) -> str:
        return "" if value is None else f"{value:.1f}" if name.endswith("lung_ml") else f"{value:.2f}"

    records = read_records(folder)[0]
    rows = [[r["case"], *(cell(name, r["volumes"].get(name)) for name in VOLUMES)] for r in records]
    if rows:
        write_atomically(folder / TABLE, sheet([HEADER, *rows]))
    elif has_columns(folder / TABLE, HEADER):
        (folder / TABLE).unlink()


def _file_name(name: str | None) -> str | None:
    if name is not None and (Path(name).name != name or name[:1] in ("", ".") or "\0" in name):
        raise ValueError(f"must be a file's name, got {shown(name)}")
    return name


_Name = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
_Millilitres = Annotated[float, Field(ge=0, lt=1e9)]


class _Model(BaseModel):
    """What readers show of a model; records of earlier versions say less."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    name: str = ""
    sha256: str = ""
    probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    calibrated: bool = False
    threshold_hu: Annotated[float, Field(ge=HU_RANGE[0], le=HU_RANGE[1])] | None = None
    inflation_hu: Annotated[float, Field(ge=HEALTHY_HU[0], le=HEALTHY_HU[1])] | None = None


class _Record(BaseModel):
    """What readers of a record rely on; it may say more."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    case: _Name
    ct: _Name
    series: str | None
    lungs_from: Any
    settings: dict[str, Any]
    models: list[_Model]
    volumes: dict[str, _Millilitres | None]
    files: dict[str, Annotated[str | None, AfterValidator(_file_name)]]
    inflation: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    warnings: list[str] = []


def read_record(path: Path) -> Record:
    """Read the ``<case>.json`` of a prediction; `OSError` or `ValueError` where there is none."""
    try:
        record = read_json(path)
        _Record.model_validate(record)
        if record["case"] != path.stem or not all(record["files"].get(k) for k in ("lesions", "lung")):
            raise ValueError("must name its own case, and its lesions and lung")
        if any(record["volumes"].get(name) is None for name in ("lung_ml", "lesion_ml")):
            raise ValueError("volumes must have lung_ml and lesion_ml")
    except ValueError as error:
        told = rule_of(error, path)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "it"
            told = f"{place}: {first['msg'].removeprefix('Value error, ')}, got {shown(first['input'])}"
        raise ValueError(f"{name_of(path)}: not the record of a prediction: {told}") from None
    # earlier versions knew of no labels, and of no weights for lungs, and called a method otherwise
    if record["lungs_from"] == "thresholds":
        record["lungs_from"] = "classical"
    return {"label": None, "lungs_sha256": None, "inflation": 1.0, "warnings": [], **record}


def read_records(folder: Path) -> tuple[list[Record], dict[str, str]]:
    """Read the records of a folder, sorted by name, and tell by case what is wrong with damaged ones.

    JSON of other kinds without a map of its name is passed over.
    """
    records, failures = [], {}
    for path in sorted(path for path in folder.glob("*.json") if path.name[0] != "."):
        try:
            records.append(read_record(path))
        except (ValueError, OSError) as error:
            if path.with_name(f"{path.stem}{FILES['lesions']}").exists():
                failures[path.stem] = str(error)
    return records, failures


def unfinished(folder: Path, known: Collection[str]) -> list[str]:
    """Return the cases with a lesion map that are none of those known by a record: a call was interrupted."""
    ending = FILES["lesions"]
    mapped = {path.name.removesuffix(ending) for path in folder.glob(f"[!.]*{ending}")}
    return sorted(mapped.difference(known))


def load(path: Path) -> Any:
    """Read JSON; None where there is none."""
    with suppress(OSError, ValueError):
        return read_json(path)
    return None


def _named(path: Path, case: str) -> set[str]:
    """Return the files that a record names; whatever a JSON says, none but those that a case may have."""
    record = load(path)
    files = record.get("files") if isinstance(record, dict) else None
    named = files.values() if isinstance(files, dict) else ()
    return {name for ending in FILES.values() if (name := f"{case}{ending}") in named}


def dumps(document: Any) -> str:
    """Write a document as indented JSON in ASCII, a newline at its end; NaN and infinities become null."""
    return json.dumps(without_nan(document), indent=2, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """Return a document with None for every float that is NaN or infinite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_written(path: Path) -> None:
    """Raise `OSError` where a ``.nii.gz`` is short: ITK reports no error where a disk is full."""
    if not path.name.endswith(".gz"):
        return
    try:
        with gzip.open(path) as stream:
            header = stream.read(348)
            rank, *shape, bits, offset = struct.unpack_from("<40x 8h 16x h 34x f", header)
            length = len(header)
            while block := stream.read(1 << 22):
                length += len(block)
    except (EOFError, struct.error, zlib.error, gzip.BadGzipFile) as error:
        raise OSError(f"{path.name}: could not be written completely (is the disk full?): {error}") from error
    needed = int(offset) + math.prod(shape[:rank]) * bits // 8
    if length < needed:
        raise OSError(f"{path.name}: {length} of {needed} bytes were written (is the disk full?)")


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what all names of one file share; None where there is no file."""
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:297]}..."
