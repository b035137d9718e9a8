"""What a prediction leaves in its folder: maps on the CT's grid, and a JSON that says they are complete.

``<case>.json`` is written last. A case that has it is finished; after a crash the others are done again.
Everything is first written into a hidden folder beside, so that a full disk leaves nothing half-written.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from normnet.config import WEIGHTS, PredictConfig, to_json
from normnet.prepare.store import write_atomically

Mask = npt.NDArray[np.bool_]
Record = dict[str, Any]
Writer = Callable[[Path], object]

FILES: Mapping[str, str] = {
    "lesions": "_lesions.nii.gz",
    "lung": "_lung.nii.gz",
    "core": "_core.nii.gz",
    "probability": "_probability.nii.gz",
    "healthy": "_healthy.nii.gz",
    "dicom_seg": "_lesions.dcm",
}
"""What a case may have, and how its files end."""
SETTINGS = "settings.json"
"""Settings and models of the last call, beside the cases."""
TABLE = "volumes.csv"
SAME = ("ct", "series", "lungs_from", "settings", "models")
"""Entries of a record that make it the result of the same call."""
VOLUMES = tuple(
    name.format(side)
    for side in ("", "right_", "left_")
    for name in ("{}lung_ml", "{}lesion_ml", "{}percent")
)
"""Volumes of a record, in the order of the table's columns."""


@dataclass(frozen=True)
class Folder:
    """The output folder of `normnet.predict`."""

    path: Path

    def record(self, case: str) -> Record | None:
        """Return the record of a finished case, None where there is none.

        Raises
        ------
        ValueError
            ``<case>.json`` is something else.
        """
        return read_record(self.path / f"{case}.json")

    def check(self, inputs: Mapping[str, Sequence[Path]], *, overwrite: bool) -> None:
        """Refuse to write over what no prediction wrote.

        Parameters
        ----------
        inputs : mapping of str to sequence of Path
            The files each case is read from.
        overwrite : bool
            Replace other files of these names, inputs excepted.

        Raises
        ------
        ValueError
            A map would replace an input, or a file of a folder that is not ours; a case's name names no file.
        """
        ours = overwrite or (self.path / SETTINGS).exists()
        for case, read in inputs.items():
            if not case or case[0] == "." or Path(case).name != case or f"{case}.json" == SETTINGS:
                raise ValueError(
                    f"case must be a file's name, not hidden and not {SETTINGS}'s, got {case!r}; give a name"
                )
            for file in self._files(case):
                if any(file.exists() and other.exists() and file.samefile(other) for other in read):
                    raise ValueError(f"output must not replace an input, got {file.parent} for {file}")
                if file.exists() and not ours:
                    raise ValueError(f"output holds {file.name}, which is of no earlier call; pass overwrite")

    def missing(self, case: str, record: Record, wanted: Sequence[str]) -> tuple[str, ...]:
        """Return the kinds of files to write for a case: none where an earlier call made all of them.

        Parameters
        ----------
        case : str
            Its name.
        record : dict
            What this call would write, `SAME` at least.
        wanted : sequence of str
            Kinds of `FILES`.

        Returns
        -------
        tuple of str
            Where one is missing all of them, and those the earlier call made besides.

        Raises
        ------
        ValueError
            They were made with other settings, models or from another CT.
        """
        there = self.record(case)
        if there is None:
            return tuple(wanted)
        for entry in SAME:
            if there[entry] != record[entry]:
                raise ValueError(
                    f"{self.path / case}.json: {entry} must be that of this call, or overwrite passed: there "
                    f"{_short(there[entry])}, now {_short(record[entry])}"
                )
        made = [kind for kind in FILES if there["files"].get(kind)]
        if all(kind in made and (self.path / there["files"][kind]).is_file() for kind in wanted):
            return ()
        return tuple(kind for kind in FILES if kind in wanted or kind in made)

    def write(self, case: str, writers: Mapping[str, Writer], record: Record) -> Record:
        """Write a case: all of its files, or none.

        Parameters
        ----------
        case : str
            Its name.
        writers : mapping of str to callable
            By kind of `FILES`; each is given the path to write.
        record : dict
            What goes into ``<case>.json``, without ``files``.

        Returns
        -------
        dict
            The record as written.

        Raises
        ------
        OSError
            No room, or a file came out shorter than it should be.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.clean(case)
        names = {kind: f"{case}{FILES[kind]}" if kind in writers else None for kind in FILES}
        stage = self.path / f".{case}.{uuid.uuid4().hex}"
        stage.mkdir()
        try:
            for kind, writer in writers.items():
                writer(stage / f"{case}{FILES[kind]}")
                check_written(stage / f"{case}{FILES[kind]}")
            whole = {**record, "files": names}
            (stage / "record").write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n")
            # without its record the case counts as unfinished until all files are in place
            (self.path / f"{case}.json").unlink(missing_ok=True)
            for kind, name in names.items():
                if name is None:
                    (self.path / f"{case}{FILES[kind]}").unlink(missing_ok=True)
                else:
                    os.replace(stage / name, self.path / name)
            os.replace(stage / "record", self.path / f"{case}.json")
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        return whole

    def clean(self, case: str) -> None:
        """Remove what killed calls left of a case."""
        leftover = re.compile(rf"\.{re.escape(case)}\.[0-9a-f]{{32}}")
        for path in self.path.iterdir():
            if leftover.fullmatch(path.name) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def write_settings(self, config: PredictConfig, models: Sequence[Record]) -> None:
        """Write the settings and models of a call."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"settings": as_record(config), "models": list(models)}
        write_atomically(self.path / SETTINGS, json.dumps(content, indent=2) + "\n")

    def write_table(self) -> None:
        """Write ``volumes.csv`` of all finished cases; none where there is none."""
        rows = []
        for path in sorted(self.path.glob("*.json")):
            record = read_record(path) if path.name != SETTINGS else None
            if record is not None:
                rows.append({"case": record["case"], **_written(record["volumes"])})
        if not rows:
            if (self.path / SETTINGS).exists():
                (self.path / TABLE).unlink(missing_ok=True)
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, ["case", *VOLUMES], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path / TABLE, text.getvalue())

    def _files(self, case: str) -> list[Path]:
        return [self.path / f"{case}{ending}" for ending in (*FILES.values(), ".json")]


def read_record(path: Path) -> Record | None:
    """Read ``<case>.json``; None where there is none.

    Raises
    ------
    ValueError
        It is something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not the record of a prediction: {error}") from error
    if not isinstance(record, dict) or not {"case", "volumes", "files", *SAME} <= record.keys():
        raise ValueError(f"{path}: not the record of a prediction")
    return record


def model_record(file: Path, probability: float, threshold_hu: float) -> Record:
    """Tell a model: its name, the SHA-256 of its weights, the threshold it votes with, and its T in HU."""
    name = file.resolve().parent.name if file.name == WEIGHTS else file.stem
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": name, "sha256": digest, "probability": probability, "threshold_hu": threshold_hu}


def as_record(config: PredictConfig) -> Record:
    """Return a configuration as JSON reads it back."""
    record: Record = json.loads(to_json(config))
    return record


def volumes_of(
    lesions: Mask, lung: Mask, spacing: Sequence[float], sides: tuple[Mask, Mask] | None = None
) -> dict[str, float | None]:
    """Measure lungs and lesions.

    Parameters
    ----------
    lesions, lung : (z, y, x) bool arrays
        On one grid.
    spacing : (3,) floats
        Its voxel size in mm.
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
    parts = {"": lung} if sides is None else {"": lung, "right_": sides[0], "left_": sides[1]}
    for side, part in parts.items():
        whole, ill = int(np.count_nonzero(part)), int(np.count_nonzero(lesions & part))
        volumes[f"{side}lung_ml"], volumes[f"{side}lesion_ml"] = whole * ml, ill * ml
        volumes[f"{side}percent"] = 100.0 * ill / whole if whole else None
    return volumes


def _written(volumes: Mapping[str, float | None]) -> dict[str, str]:
    """Volumes as the table shows them: lungs to 0.1 ml, the rest to two decimals, empty where unknown."""
    digits = {name: 1 if name.endswith("lung_ml") else 2 for name in VOLUMES}
    return {n: "" if (v := volumes.get(n)) is None else f"{v:.{digits[n]}f}" for n in VOLUMES}


def check_written(path: Path) -> None:
    """Read a file back to its end: ITK reports no error where a disk is full, but writes a short file.

    Raises
    ------
    OSError
        A ``.nii.gz`` file is damaged or shorter than its header says; others are not looked at.
    """
    if not path.name.endswith(".gz"):
        return
    try:
        with gzip.open(path) as stream:
            header = stream.read(348)
            size = np.frombuffer(header, "<i2", 8, offset=40)
            bits, offset = np.frombuffer(header, "<i2", 1, 72)[0], np.frombuffer(header, "<f4", 1, 108)[0]
            length = len(header)
            while block := stream.read(1 << 22):
                length += len(block)
    except (EOFError, ValueError, zlib.error, gzip.BadGzipFile) as error:
        raise OSError(f"{path.name}: could not be written completely (is the disk full?): {error}") from error
    needed = int(offset) + int(np.prod(size[1 : 1 + size[0]], dtype=np.int64)) * int(bits) // 8
    if length < needed:
        raise OSError(f"{path.name}: {length} of {needed} bytes were written (is the disk full?)")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:297]}..."
