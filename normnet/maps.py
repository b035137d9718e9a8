"""The folder of a prediction: maps on the CT's grid, and a JSON that says they are complete.

``<case>.json`` is written last. A case that has it is finished; after a crash the others are done again.
What is replaced without being asked was written by the same command, as the record of the case tells, or that
of a call that was killed; the user's own files stay.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesionsynth.files import write_atomically
from normnet.config import PredictConfig
from normnet.records import (
    FILES,
    PREDICT,
    SAME,
    SETTINGS,
    STAMPS,
    VOLUMES,
    Record,
    as_record,
    maker_of,
    read_record,
    read_records,
)
from normnet.sheets import has_columns, sheet
from normnet.stage import Writer, claims, load, names_in, publish

TABLE = "volumes.csv"
_AWAY = "take another folder, or move it away"


@dataclass(frozen=True)
class Folder:
    """An output folder with maps."""

    path: Path
    maker: str = PREDICT
    """Who writes into it; see `normnet.records.maker_of`."""

    def check(self, inputs: Mapping[str, Sequence[Path]]) -> None:
        """Refuse to write over what is read.

        Parameters
        ----------
        inputs : mapping of str to sequence of Path
            The files each case is read from.

        Raises
        ------
        ValueError
            A map would replace an input of any case; a case's name names no file.
        """
        read = {_identity(path) for paths in inputs.values() for path in paths} - {None}
        for case in inputs:
            if not case or case[0] == "." or Path(case).name != case or f"{case}.json" == SETTINGS:
                raise ValueError(
                    f"case must be a file's name, not hidden and not {SETTINGS}'s, got {case!r}; give a name"
                )
            for file in self._files(case):
                if _identity(file) in read:
                    raise ValueError(f"output must not replace an input, got {file.parent} for {file}")

    def check_own(self, case: str, *, overwrite: bool = False) -> None:
        """Refuse to write over files of a case that this maker did not write; any maker, to overwrite.

        What no record tells to be the work of one is never written over.

        Raises
        ------
        ValueError
            Says whose they are, as far as their record tells.
        """
        owners = self._owners(case)
        for file in self._files(case):
            owner = owners.get(file.name)
            if not os.path.lexists(file) or owner == self.maker or (overwrite and owner is not None):
                continue
            way = "take another folder or pass overwrite" if owner else _AWAY
            raise ValueError(f"output holds {file.name}, which is of {owner or 'no earlier call'}; {way}")

    def check_shared(self) -> None:
        """Refuse to write over a `SETTINGS` or `TABLE` that no prediction wrote.

        Raises
        ------
        ValueError
            Names it.
        """
        for name, ours in ((SETTINGS, _is_settings), (TABLE, _is_table)):
            if os.path.lexists(self.path / name) and not ours(self.path / name):
                raise ValueError(f"output holds {name}, which is of no earlier call; {_AWAY}")

    def missing(self, case: str, record: Record, wanted: Sequence[str]) -> tuple[str, ...]:
        """Return the kinds of files to write for a case: none where an earlier call made all of them.

        Parameters
        ----------
        case : str
            Its name.
        record : dict
            What this call would write, `SAME` and `STAMPS` at least.
        wanted : sequence of str
            Kinds of `FILES`.

        Returns
        -------
        tuple of str
            Where one is missing all of them, and those the earlier call made besides.

        Raises
        ------
        ValueError
            They were made with other settings, models or from another CT or mask, or one that was changed
            since; or files there are not ours, see `check_own`.
        """
        file = self.path / f"{case}.json"
        if self._owners(case).get(file.name) != PREDICT:
            self.check_own(case)
            return tuple(wanted)
        there = read_record(file)
        for entry in SAME:
            if there[entry] != record[entry]:
                raise ValueError(
                    f"{file}: {entry} must be that of this call, or overwrite passed: there "
                    f"{_short(there[entry])}, now {_short(record[entry])}"
                )
        for entry, what in STAMPS.items():
            if entry in there and there[entry] != record[entry]:
                raise ValueError(
                    f"{file}: {what} must be as it was when it was read, or overwrite passed: there "
                    f"{_short(there[entry])}, now {_short(record[entry])}"
                )
        made = [kind for kind in FILES if there["files"].get(kind)]
        if all(kind in made and (self.path / there["files"][kind]).is_file() for kind in wanted):
            return ()
        self.check_own(case)
        return tuple(kind for kind in FILES if kind in wanted or kind in made)

    def write(
        self, case: str, writers: Mapping[str, Writer], record: Record, *, overwrite: bool = False
    ) -> Record:
        """Write a case: all of its files, or none.

        Parameters
        ----------
        case : str
            Its name.
        writers : mapping of str to callable
            By kind of `FILES`; each is given the path to write.
        record : dict
            What goes into ``<case>.json``, without ``files``.
        overwrite : bool
            Replace what another call, or another method, made.

        Returns
        -------
        dict
            The record as written.

        Raises
        ------
        ValueError
            As `check_own`: a file may have come since a call began.
        OSError
            No room, or a file came out shorter than it should be.
        """
        self.check_own(case, overwrite=overwrite)
        files = {kind: f"{case}{ending}" for kind, ending in FILES.items()}
        whole = {**record, "files": {kind: name if kind in writers else None for kind, name in files.items()}}
        publish(self.path, case, {name: writers.get(kind) for kind, name in files.items()}, whole)
        return whole

    def write_settings(self, config: PredictConfig, models: Sequence[Record]) -> None:
        """Write the settings and models of a call."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"settings": as_record(config), "models": list(models)}
        write_atomically(self.path / SETTINGS, json.dumps(content, indent=2) + "\n")

    def write_table(self) -> None:
        """Write ``volumes.csv`` of all finished cases; none where there is none."""
        rows = [[r["case"], *_written(r["volumes"]).values()] for r in read_records(self.path)[0]]
        if not _is_table(self.path / TABLE) and os.path.lexists(self.path / TABLE):
            raise ValueError(f"output holds {TABLE}, which is of no earlier call; {_AWAY}")
        if not rows:
            (self.path / TABLE).unlink(missing_ok=True)
            return
        write_atomically(self.path / TABLE, sheet([["case", *VOLUMES], *rows]))

    def _files(self, case: str) -> list[Path]:
        return [self.path / f"{case}{ending}" for ending in (*FILES.values(), ".json")]

    def _owners(self, case: str) -> dict[str, str]:
        """Who wrote the files of a case, by name; without those of which no record tells."""
        owners: dict[str, str] = {}
        file = self.path / f"{case}.json"
        linked = {path.name for path in self._files(case) if path.is_symlink()}  # we make no links
        told = claims(self.path, case)
        if file.exists() and isinstance(record := load(file), dict) and record.get("case") == case:
            told.append((record, {file.name, *names_in(record, case)}))
        for record, names in told:
            if (maker := maker_of(record)) is not None:
                owners.update(dict.fromkeys(names - linked, maker))
        return owners


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what all names of one file share; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_settings(path: Path) -> bool:
    content = None if path.is_symlink() else load(path)
    return isinstance(content, dict) and content.keys() == {"settings", "models"}


def _is_table(path: Path) -> bool:
    # earlier versions had fewer columns
    return not path.is_symlink() and has_columns(path, ["case", *VOLUMES])


def _written(volumes: Mapping[str, float | None]) -> dict[str, str]:
    """Volumes as the table shows them: lungs to 0.1 ml, the rest to two decimals, empty where unknown."""
    digits = {name: 1 if name.endswith("lung_ml") else 2 for name in VOLUMES}
    return {n: "" if (v := volumes.get(n)) is None else f"{v:.{digits[n]}f}" for n in VOLUMES}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:297]}..."
