"""Find the files that belong to one case: by name, or from a CSV table.

``radiopaedia_4_hu.nii.gz``, ``radiopaedia_4_lung.nii.gz`` and ``radiopaedia_4_lesion.nii.gz`` are the CT,
lungs and truth of the case ``radiopaedia_4``: the last word of a name tells the role, the rest the case.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from lesionsynth.io import MAP_WORDS, SUFFIXES, Wanted, find_scans, name_of_map, split_name
from lesionsynth.strict import name_of, rule_of
from normnet.origin import read_series
from normnet.sheets import read_rows


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
) -> list[CaseFiles]:
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
    list of CaseFiles
        Sorted by case.

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
        )
    truths = _by_case("lesion", _listed(truth), {None, "lesion"})
    wanted = [Wanted(case, name_of_map(path), read_series(path)) for case, path in predicted.items()]
    images = find_scans(ct, wanted)
    used = [f for f in files if split_name(f)[1] == "lung"]
    lung_masks = _by_case("lung", _listed(lungs) or used, {None, "lung"})
    for role, table, given in (
        ("truth", truths.keys(), truth),
        ("ct", images.keys(), ct),
        ("lungs", lung_masks.keys(), lungs),
    ):
        missing = sorted(predicted.keys() - table)
        if missing and (role != "lungs" or lungs):
            raise ValueError(
                f"{role} must have a file for each prediction; {missing} not found in {_names(given)}"
            )
    return [
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
    predicted, maps = _maps(_listed([folder]))
    found = {
        files.case: replace(
            files,
            prediction=predicted[files.case],
            probability=maps["probability"].get(files.case),
            core=maps["core"].get(files.case),
            healthy=maps["healthy"].get(files.case),
        )
        for files in cases
        if files.case in predicted
    }
    if not found:
        raise ValueError(f"compare must name maps of the same cases, found none of them in {folder}")
    return found


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
    cases = []
    for case, files in rows.items():
        # a path that the system refuses fails its own case, when it is read
        dicom = os.path.isdir(files["ct"]) or files["ct"].suffix.lower() == ".dcm"
        cases.append(
            CaseFiles(case=case, **files, series=read_series(files["prediction"]) if dicom else None)
        )
    return cases


def read_patients(path: Path) -> list[PatientFiles]:
    """Read a CSV with the columns case, ct, lesion and, if any, lung.

    Parameters
    ----------
    path : Path
        As in `read_table`.

    Returns
    -------
    list of PatientFiles

    Raises
    ------
    ValueError
        As in `read_table`.
    """
    return [
        PatientFiles(case=case, series=None, **files)
        for case, files in _rows(path, ("ct", "lesion"), ("lung",)).items()
    ]


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
    lesions, lungs = (_by_case(role, files, {role}) for role in ("lesion", "lung"))
    if not lesions:
        raise ValueError(
            f"patients must hold at least one lesion truth (NAME_lesion...), found none in {_names(paths)}"
        )
    images = find_scans(paths, [Wanted(case, case) for case in lesions])
    for case, path in lesions.items():
        if case not in images:
            raise ValueError(f"patients must have a CT for each truth, got none for {path}")
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
    roles = {file: split_name(file, predicted=True)[1] for file in files}
    lesions = _by_case(
        "prediction", [f for f in files if roles[f] not in MAP_WORDS], {None, "prediction", "ct", "lesion"}
    )
    beside = {
        role: _by_case(role, [f for f in files if roles[f] == role], {role}, predicted=True)
        for role in ("probability", *MAP_WORDS)
    }
    return lesions, beside


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
    """Files of the accepted roles by case; one that names `role` itself wins over one that says nothing."""
    table: dict[str, Path] = {}
    for path in files:
        case, own = split_name(path, predicted=predicted)
        if own not in roles:
            continue
        other = table.get(case)
        if other is None or (own == role and split_name(other, predicted=predicted)[1] != role):
            table[case] = path
        elif own == role or split_name(other, predicted=predicted)[1] != role:
            raise ValueError(f"{role} of case {case!r} must be one file, got {other} and {path}")
    return table


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(str(p) for p in paths) or "nothing"
