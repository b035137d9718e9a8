"""The finished cases of a prediction folder, and where their CT are now."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

from lesionsynth.io import Found, Source, find_sources, split_name
from normnet.cases import hear
from normnet.output import FILES, Record, read_records


@dataclass(frozen=True)
class Finished:
    """What a folder of maps holds."""

    records: list[Record]
    """Of the finished cases: the largest share of lesion first, then by name."""
    failures: dict[str, str]
    """Cases whose record is damaged, and what is wrong with it."""
    unfinished: list[str]
    """Cases with a map and without a record: a prediction was interrupted."""


@dataclass(frozen=True)
class Place:
    """Where a CT is read from: what `lesionsynth.io.read_ct` takes."""

    path: Path
    series: str | None
    hint: str = ""
    """What to say where nothing is there."""


def finished_cases(folder: Path) -> Finished:
    """Read the records of a folder that `normnet.predict` wrote.

    Parameters
    ----------
    folder : Path
        With ``<case>.json`` and maps. JSON of other kinds without a map of its name is passed over.

    Returns
    -------
    Finished

    Raises
    ------
    ValueError
        It is no folder, or holds no finished prediction.
    """
    if not folder.is_dir():
        raise ValueError(f"maps must be a folder that normnet.predict wrote, got {folder}, which is none")
    ending = FILES["lesions"]
    records, failures = read_records(folder)
    if not records and not failures:
        raise ValueError(
            "maps must hold at least one finished case of normnet.predict (<case>.json), found none in "
            f"{folder}"
        )
    records.sort(key=lambda record: (-_share(record), record["case"]))
    known = {record["case"] for record in records} | failures.keys()
    mapped = {path.name.removesuffix(ending) for path in folder.glob(f"*{ending}") if path.name[0] != "."}
    return Finished(records, failures, sorted(mapped - known))


def locate(records: Sequence[Record], inputs: Sequence[Path]) -> dict[str, Place]:
    """Tell where the CT of every case is.

    Parameters
    ----------
    records : sequence of dict
        Of the cases.
    inputs : sequence of Path
        Files and folders with CT that may have moved. A series is known by its UID; a file by its name, where
        several have it by the folders above, else by the name of its case. A file that would fit two cases
        equally well is taken for neither.

    Returns
    -------
    dict of str to Place
        By case; the recorded place where `inputs` holds nothing that fits.

    Raises
    ------
    FileNotFoundError, ValueError
        As `lesionsynth.io.find_sources`.
    """
    sources = _sources(inputs) if inputs else Found[Source]()
    hint = f"nothing in ct fits either{sources.over}" if inputs else "ct must name its new place"
    for one in sources.passed:
        if one.named:
            warnings.warn(f"passed over: {one}", stacklevel=3)
    places = {r["case"]: Place(Path(r["ct"]), r["series"], hint) for r in records}
    claims: dict[Path, list[tuple[int, str]]] = defaultdict(list)
    for record in records:
        case, series = record["case"], record["series"]
        same = [source for source in sources if series is not None and source.series == series]
        if same:
            places[case] = Place(same[0].path, series)
            continue
        fits = [(fit, source.path) for source in sources if (fit := _fit(source, record))]
        best = [path for fit, path in fits if fit == max(fits)[0]]
        if len(best) == 1:
            claims[best[0]].append((max(fits)[0], case))
        elif best:
            hint = f"{best[0]} and {best[1]} fit equally well"
            places[case] = replace(places[case], hint=hint)
    for path, claim in claims.items():
        highest = max(claim)[0]
        first = [case for fit, case in claim if fit == highest]
        if len(first) == 1:
            places[first[0]] = Place(path, None)
            continue
        for case in first:
            hint = f"{path} fits {' and '.join(first)} equally well"
            places[case] = replace(places[case], hint=hint)
    return places


def _sources(inputs: Sequence[Path]) -> Found[Source]:
    """Every CT in files and folders, each once."""
    try:
        # that localizers are left out is no news: series are looked up by UID
        with hear():
            return find_sources(list(dict.fromkeys(inputs)), series="all", case_of=os.fspath)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"ct must exist, got {error}") from None
    except ValueError as error:
        raise ValueError(f"ct must name CT volumes or DICOM series, got {error}") from error


def _fit(source: Source, record: Record) -> int:
    """How well a file fits a record: one and the names its path ends in like the recorded; 0 for another."""
    if source.series is not None:
        return 0
    # the recorded path may be of another system; this class splits at both kinds of slashes
    there, here = PureWindowsPath(record["ct"]).parts, source.path.resolve().parts
    same = 0
    while same < min(len(there), len(here)) and there[-1 - same] == here[-1 - same]:
        same += 1
    return same + 1 if same else int(split_name(source.path)[0] == record["case"])


def _share(record: Record) -> float:
    percent = record["volumes"].get("percent")
    return -1.0 if percent is None else float(percent)
