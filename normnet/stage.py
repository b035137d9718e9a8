"""Put the files of a case into a folder as a whole, whatever happens on the way.

Files are first written into a hidden folder beside, ``.<case>.<32 digits>``, so that a full disk leaves
nothing half-written. Then they are moved into place, and the record last. What a killed call leaves in the
hidden folder tells which files it had moved: these are its own and may be taken away, others may not.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lesionsynth.files import hold, sweep, temporary
from lesionsynth.strict import read_json
from normnet.records import FILES

Writer = Callable[[Path], object]
_NEW, _BEFORE, _CLAIM = "record", "before", "claim"
"""In the hidden folder: the record to come, the one that it replaces, the case's name from the start on."""


def publish(
    folder: Path,
    case: str,
    writers: Mapping[str, Writer | None],
    record: Mapping[str, Any],
) -> None:
    """Write the files of a case and its record: all, or none.

    Parameters
    ----------
    folder : Path
        Where they go; made where it is not there.
    case : str
        Its name; the record is ``<case>.json``.
    writers : mapping of str to callable or None
        By file name; each is given the path to write. None for a file that is not to be there.
    record : mapping
        For JSON; its ``files`` names the files by kind.

    Raises
    ------
    OSError
        No room, or a file came out shorter than it should be.
    ValueError
        Another process is writing this case there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder, case)
    sweep(folder, case)
    begun, stage = temporary(folder / case), folder / f".{case}.{uuid.uuid4().hex}"
    begun.mkdir()
    final = folder / f"{case}.json"
    held = hold(begun)
    os.rename(begun, stage)  # nobody sees it before it is held
    try:
        # behind our own: of two that begin at once at least one sees the other
        if live := [other for other in _stages(folder, case) if other != stage and _is_held(other)]:
            raise ValueError(f"{case} is being written by another process, in {live[0]}")
        (stage / _CLAIM).write_text(case, encoding="utf-8")
        for name, writer in writers.items():
            if writer is not None:
                writer(stage / name)
                check_written(stage / name)
        (stage / _NEW).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        # without its record the case counts as unfinished until all files are in place
        if final.exists():
            os.replace(final, stage / _BEFORE)
        for name, writer in writers.items():
            if writer is not None:
                os.replace(stage / name, folder / name)
        # last: until the first file has moved, the earlier result can be put back as a whole
        for name, writer in writers.items():
            if writer is None:
                (folder / name).unlink(missing_ok=True)
        os.replace(stage / _NEW, final)
    finally:
        _undo(folder, case, stage)
        if held is not None:
            os.close(held)


def clear(folder: Path, case: str) -> None:
    """Take away what killed calls left of a case, but for a result that is whole."""
    for stage in _stages(folder, case):
        if _is_ours(stage) and not _is_held(stage):
            _undo(folder, case, stage)


def claims(folder: Path, case: str) -> list[tuple[Any, set[str]]]:
    """Tell what killed calls had written of a case.

    Returns
    -------
    list of (record, set of str)
        The record of each and the names of its files in `folder`, without those that it did not get to.
    """
    found = []
    for stage in _stages(folder, case):
        found.append((load(stage / _NEW), _moved(stage, case)))
        earlier = load(stage / _BEFORE)
        found.append((earlier, names_in(earlier, case)))
    return [(record, names) for record, names in found if names]


def names_in(record: Any, case: str) -> set[str]:
    """Return the files that a record names; none where it is no record, or that of another case."""
    files = record.get("files") if isinstance(record, dict) else None
    # whatever a JSON may say: nothing but files of these names is ever touched
    return {
        f"{case}{end}"
        for end in FILES.values()
        if isinstance(files, dict) and f"{case}{end}" in files.values()
    }


def load(path: Path) -> Any:
    """Read JSON; None where there is none."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


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


def _stages(folder: Path, case: str) -> list[Path]:
    name = re.compile(rf"\.{re.escape(case)}\.[0-9a-f]{{32}}")
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if name.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _is_ours(stage: Path) -> bool:
    """Tell whether a call made this folder: it has what only a call writes, or nothing."""
    try:
        return any((stage / name).exists() for name in (_CLAIM, _NEW, _BEFORE)) or not any(stage.iterdir())
    except FileNotFoundError:  # its process has just ended
        return False


def _is_held(stage: Path) -> bool:
    """Tell whether a process is writing there."""
    try:
        handle = hold(stage)
    except FileNotFoundError:  # it has just ended
        return False
    if handle is not None:
        os.close(handle)
    return handle is None


def _moved(stage: Path, case: str) -> set[str]:
    """Names of the new files that are in place already."""
    return {name for name in names_in(load(stage / _NEW), case) if not (stage / name).exists()}


def _undo(folder: Path, case: str, stage: Path) -> None:
    """Remove a hidden folder, and of a case that did not get its record what had been moved from it."""
    final = folder / f"{case}.json"
    if not final.exists():
        moved = _moved(stage, case)
        if not moved and (stage / _BEFORE).exists():
            os.replace(stage / _BEFORE, final)  # nothing of the new result is in place: the old one is whole
        else:
            for name in moved | names_in(load(stage / _BEFORE), case):
                (folder / name).unlink(missing_ok=True)
    # first what claims files: a call that is killed here must not leave claims that are no longer true
    for name in (_NEW, _BEFORE):
        (stage / name).unlink(missing_ok=True)
    sweep(stage)
    for name in (*(f"{case}{end}" for end in FILES.values()), _CLAIM):
        (stage / name).unlink(missing_ok=True)
    with suppress(OSError):  # what somebody else put there stays, and so does the folder
        stage.rmdir()
