"""LUNA16: ten folders ``subset*`` of MetaImage files, with the nodules of all in ``annotations.csv``."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from lesionsynth.io import case_name
from normnet.cases import Case
from normnet.prepare.exclude import Nodule, read_annotations


def find_annotations(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Find the ``annotations.csv`` beside the ``subset*`` folders of LUNA16.

    Parameters
    ----------
    inputs : sequence of paths
        The folder that holds ``subset0`` ..., or such folders themselves.

    Returns
    -------
    list of Path
        Each file once; empty where no input is of that layout.
    """
    found: list[Path] = []
    for given in map(Path, inputs):
        if _is_subset(given):
            root = given.resolve().parent
        elif given.is_dir() and any(_is_subset(folder) for folder in given.iterdir()):
            root = given.resolve()
        else:
            continue
        file = root / "annotations.csv"
        if file.is_file() and file not in found:
            found.append(file)
    return found


def _is_subset(path: Path) -> bool:
    return re.fullmatch(r"subset\d+", path.name) is not None and path.is_dir() and any(path.glob("*.mhd"))


def match_annotations(files: Sequence[Path], cases: Sequence[Case]) -> Mapping[Case, list[Nodule]]:
    """Give each case its nodules.

    Parameters
    ----------
    files : sequence of Path
        See `read_annotations`.
    cases : sequence of Case
        An annotation belongs to the case whose SeriesInstanceUID, file name or name is its ``seriesuid``.

    Returns
    -------
    mapping of Case to list of Nodule
        Of those that have any.

    Raises
    ------
    ValueError
        An unreadable file; one of whose series none is among the cases. Where only some are missing, a
        warning says how many.
    """
    found: dict[Case, list[Nodule]] = {}
    for file in files:
        nodules = read_annotations(file)
        known = {case: _keys(case) & set(nodules) for case in cases}
        used = set().union(*known.values()) if known else set()
        missing = sorted(set(nodules) - used)
        if nodules and not used:
            raise ValueError(
                f"{file}: annotations of another study: none of its {len(nodules)} series "
                f"({missing[0]}, ...) is among the inputs ({', '.join(case.case for case in cases[:3])}, ...)"
            )
        if missing:
            warnings.warn(
                f"{file}: {len(missing)} of {len(nodules)} annotated series are not among the inputs "
                f"({missing[0]}, ...)",
                stacklevel=3,
            )
        for case, keys in known.items():
            for key in sorted(keys):
                found.setdefault(case, []).extend(nodules[key])
    return found


def _keys(case: Case) -> set[str]:
    return {case.case, case_name(case.ct), case.series or case.case}
