"""Find the files that belong to one case: by name, as `lesionsynth.io.split_name` reads it, or from a CSV."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from lesionsynth.io import MAP_WORDS, SUFFIXES, Found, Wanted, case_name, find_scans, split_name
from lesionsynth.strict import name_of, rule_of, some_of
from normnet.origin import read_series
from normnet.sheets import read_rows

_EITHER = ("segmentation", "mask")
"""Roles of files that may show lungs or lesions."""


@dataclass(frozen=True, kw_only=True)
class PatientFiles:
    """The files of one annotated patient.

    Attributes
    ----------
    case : str
        Its name.
    ct, lesion : Path
        CT, a file or a DICOM folder, and annotated lesions.
    lung : Path or None
        Lungs.
    series : str or None
        SeriesInstanceUID, for a CT in a DICOM folder.
    """

    case: str
    ct: Path
    lesion: Path
    lung: Path | None = None
    series: str | None = None


@dataclass(frozen=True, kw_only=True)
class CaseFiles(PatientFiles):
    """The files of one patient and of a prediction.

    Attributes
    ----------
    prediction : Path
        Predicted lesions.
    probability : Path or None
        The network's healthy probability.
    core, healthy : Path or None
        Predicted lesions before region growing, and the voxels that the models' vote calls healthy.
    """

    prediction: Path
    probability: Path | None = None
    core: Path | None = None
    healthy: Path | None = None


def find_cases(
    *,
    predictions: Sequence[Path],
    truth: Sequence[Path],
    ct: Sequence[Path],
    lungs: Sequence[Path] = (),
) -> Found[CaseFiles]:
    """Pair files by the names of their cases.

    Parameters
    ----------
    predictions : sequence of Path
        What `normnet.predict` wrote (lesions, and ``..._probability``, ``..._healthy``, ``..._core``,
        ``..._lung``): files, or folders of files. Their cases are those evaluated.
    truth, lungs : sequence of Path
        Files, or folders, which may be one and the same: roles are told by the last word of a name. Without
        `lungs`, those beside the predictions.
    ct : sequence of Path
        Files, DICOM folders, and folders of these at any depth: what `normnet.predict` was given. The series
        that a prediction recorded is taken, wherever it is; see `lesionsynth.io.find_scans`.

    Returns
    -------
    Found of CaseFiles
        Sorted by case; `passed` are those in `ct` that are of none of them.

    Raises
    ------
    FileNotFoundError
        A path does not exist.
    ValueError
        No prediction, a prediction without truth or CT, two files for one role of a case, or a DICOM folder
        without the series that was predicted.
    """
    files = _listed(predictions)
    predicted, maps = _maps(files)
    if not predicted:
        raise ValueError(
            f"predictions must hold at least one lesion map, found none in {_names(predictions)}"
            f"{_there(files, predictions)}"
        )
    true, given = _listed(truth), _listed(lungs)
    truths = _by_case("lesion", true, {None, "lesion", *_EITHER})
    # a name that ends in a word for a role may be the CT's own
    wanted = [
        Wanted(case, case_name(path).removesuffix("_lesions"), read_series(path))
        for case, path in predicted.items()
    ]
    images, scans = find_scans(ct, wanted)
    lung_masks = _by_case("lung", given or files, {None, "lung", *_EITHER} if given else {"lung"})
    for role, table, paths, there in (
        ("truth", truths.keys(), truth, _there(true, truth)),
        ("ct", images.keys(), ct, _there([source.path for source in scans]) + scans.over),
        ("lungs", lung_masks.keys(), lungs, _there(given, lungs)),
    ):
        missing = sorted(predicted.keys() - table)
        if missing and (role != "lungs" or lungs):
            raise ValueError(
                f"{role} must have a file for each prediction; {missing} not found in {_names(paths)}{there}"
            )
    cases = [
        CaseFiles(
            case=case,
            ct=images[case].path,
            series=images[case].series,
            lesion=truths[case],
            prediction=path,
            lung=lung_masks.get(case),
            **{role: found.get(case) for role, found in maps.items()},
        )
        for case, path in sorted(predicted.items())
    ]
    # masks and maps of these cases among their CT are no news
    news = [one for one in scans.passed if one.named or split_name(one.path)[0] not in predicted]
    return Found(cases, news)


def with_predictions(cases: Sequence[CaseFiles], folder: Path) -> dict[str, CaseFiles]:
    """Find what another method predicted for the same cases.

    Parameters
    ----------
    cases : sequence of CaseFiles
        From `find_cases` or `read_table`.
    folder : Path
        Its maps, named as those of `normnet.predict`; other cases in it are passed over.

    Returns
    -------
    dict of str to CaseFiles
        By case, with the other method's maps and the same CT, truth and lungs; cases without a lesion map are
        not in it.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    ValueError
        It has a map of none of the cases, or two files for one role of a case.
    """
    files = _listed([folder])
    predicted, maps = _maps(files)
    others = {
        case.case: replace(
            case,
            prediction=predicted[case.case],
            probability=maps["probability"].get(case.case),
            core=maps["core"].get(case.case),
            healthy=maps["healthy"].get(case.case),
        )
        for case in cases
        if case.case in predicted
    }
    if not others:
        raise ValueError(
            f"compare must name maps of the same cases, found none of them in {folder}{_there(files)}"
        )
    return others


def read_table(path: Path) -> list[CaseFiles]:
    """Read a CSV with the columns case, ct, lesion, prediction and, if any, lung, probability, core, healthy.

    Parameters
    ----------
    path : Path
        Relative paths in it are relative to its folder; an optional cell may be empty.

    Returns
    -------
    list of CaseFiles

    Raises
    ------
    ValueError
        A column or a cell is missing, a case occurs twice, or there is no row.
    """
    rows = _rows(path, ("ct", "lesion", "prediction"), ("lung", "probability", "core", "healthy"))
    # a path that the system refuses fails its own case, when it is read
    series = {
        case: read_series(files["prediction"])
        for case, files in rows.items()
        if os.path.isdir(files["ct"]) or files["ct"].suffix.lower() == ".dcm"
    }
    return [CaseFiles(case=case, **files, series=series.get(case)) for case, files in rows.items()]


def read_patients(path: Path) -> list[PatientFiles]:
    """Read a CSV with the columns case, ct, lesion and, if any, lung; else as `read_table`."""
    rows = _rows(path, ("ct", "lesion"), ("lung",))
    return [PatientFiles(case=case, series=None, **files) for case, files in rows.items()]


def find_patients(paths: Sequence[Path]) -> list[PatientFiles]:
    """Pair CT, annotated lesions and lungs by the names of their cases.

    Parameters
    ----------
    paths : sequence of Path
        Files and folders. ``NAME_lesion`` says that NAME is a patient, ``NAME_lung`` are its lungs; these lie
        in the folders themselves. CT are searched at any depth, as `lesionsynth.io.find_scans` does.

    Returns
    -------
    list of PatientFiles
        Sorted by case.

    Raises
    ------
    FileNotFoundError
        A path does not exist.
    ValueError
        No patient, one without CT, or two files for one role of a patient.
    """
    files = _listed(paths)
    lesions, lungs = _by_case("lesion", files, {"lesion", "segmentation"}), _by_case("lung", files, {"lung"})
    if not lesions:
        raise ValueError(
            f"patients must hold at least one lesion truth (NAME_lesion...), found none in {_names(paths)}"
            f"{_there(files, paths)}"
        )
    images, scans = find_scans(paths, [Wanted(case, case) for case in lesions])
    for case, path in lesions.items():
        if case not in images:
            there = _there([source.path for source in scans]) + scans.over
            raise ValueError(f"patients must have a CT for each truth, got none for {path}{there}")
    return [
        PatientFiles(
            case=case, ct=images[case].path, series=images[case].series, lesion=path, lung=lungs.get(case)
        )
        for case, path in sorted(lesions.items())
    ]


def _rows(path: Path, needed: Sequence[str], optional: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Read the files of a CSV's columns by case; a cell that is empty is left out."""
    try:
        rows = [(number, cells) for number, cells in read_rows(path) if cells]
    except ValueError as error:
        raise ValueError(f"{name_of(path)} must be a CSV in UTF-8: {rule_of(error, path)}") from error
    if len(rows) < 2:
        raise ValueError(f"{name_of(path)} must have at least one row below its header")
    columns = ("case", *needed)
    cases: dict[str, dict[str, Path]] = {}
    for number, cells in rows[1:]:
        row = dict(zip(rows[0][1], cells, strict=False))
        lacking = [name for name in columns if not row.get(name)]
        if lacking:
            raise ValueError(
                f"{name_of(path)}, line {number}: columns {', '.join(columns)} must be filled, missing "
                f"{lacking}"
            )
        if row["case"] in cases:
            raise ValueError(f"{name_of(path)}, line {number}: cases must differ, got {row['case']!r} twice")
        cases[row["case"]] = {
            name: path.parent / cell for name in (*needed, *optional) if (cell := row.get(name))
        }
    return cases


def _maps(files: Sequence[Path]) -> tuple[dict[str, Path], dict[str, dict[str, Path]]]:
    """Lesion maps by case, and by their role those that may be beside them."""
    lesions = _by_case(
        "prediction",
        [file for file in files if split_name(file, predicted=True)[1] not in MAP_WORDS],
        {None, "prediction", "ct", "lesion", *_EITHER},
    )
    return lesions, {
        role: _by_case(role, files, {role}, predicted=True) for role in ("probability", "core", "healthy")
    }


def _listed(paths: Iterable[Path]) -> list[Path]:
    """Files, and the volumes inside folders."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if not path.is_dir():
            found.append(path)
            continue
        found += sorted(p for p in path.iterdir() if p.name.lower().endswith(SUFFIXES) and p.name[0] != ".")
    return found


def _by_case(
    role: str, files: Iterable[Path], roles: Set[str | None], *, predicted: bool = False
) -> dict[str, Path]:
    """Files of the accepted roles by case: one that names `role`, else a segmentation, else another."""
    ranks = {role: 0, **dict.fromkeys(_EITHER, 1)}
    table: dict[str, tuple[int, Path]] = {}
    named = [(*split_name(path, predicted=predicted), path) for path in files]
    for case, own, path in sorted(named, key=lambda one: ranks.get(one[1] or "", 2)):
        rank = ranks.get(own or "", 2)
        if own in roles and table.setdefault(case, (rank, path)) != (rank, path) and table[case][0] == rank:
            raise ValueError(f"{role} of case {case!r} must be one file, got {table[case][1]} and {path}")
    return {case: path for case, (_, path) in table.items()}


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(str(p) for p in paths) or "nothing"


def _there(files: Sequence[Path], paths: Sequence[Path] = ()) -> str:
    """Tell, at the end of an error, the files that are there and the cases that their names give."""
    texts = [f"{name_of(path)} (case {name_of(split_name(path)[0])})" for path in files]
    inside = {p for path in paths if path.is_dir() for p in path.iterdir() if p.name[0] != "."}
    rest = some_of(", ", [name_of(p) for p in sorted(inside.difference(files))])
    found = some_of(", ", texts) or "no file of a format that is read"
    return f"; there: {found}{rest and f'; passed over: {rest}'}"
