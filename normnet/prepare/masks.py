"""Where the lungs of cases come from: masks found by the case's name, or a method to segment them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lesionsynth.io import SUFFIXES, case_name, split_name
from lesionsynth.strict import name_of, some_of
from normnet.prepare.case import LungMethod, method_of


def check_lungs(masks: Path | None, lungs: LungMethod, cases: int, label: Sequence[int] = ()) -> None:
    """Refuse a call that cannot give each of `cases` CT its own lungs; the other arguments as of `prepare`.

    Raises
    ------
    FileNotFoundError
        `masks` does not exist.
    ValueError
        It is one file for several CT; `label` without `masks`; `lungs` is no method, and no weights.
    ImportError
        `lungs` is "lungmask", which is needed and not installed.
    """
    if masks is None:
        if label:
            raise ValueError(f"label must be left out where no masks are given, got {list(label)}")
        method_of(lungs)
        return
    if not masks.exists():
        raise FileNotFoundError(f"masks must exist, got {masks}: no such file or folder")
    if not masks.is_dir() and cases > 1:
        raise ValueError(f"masks must be a folder where there are several inputs, got the file {masks}")


def find_mask(masks: Path, case_id: str) -> Path:
    """Find a case's lung mask; rules as in `prepare`.

    Raises
    ------
    ValueError
        None, or several that are named alike.
    """
    if not masks.is_dir():
        return masks
    cases = {case_id, split_name(Path(case_id))[0]}
    files = sorted(p for p in masks.iterdir() if p.name.lower().endswith(SUFFIXES) and p.name[0] != ".")
    fits: dict[str | None, list[Path]] = {}
    for path in files:
        case, role = split_name(path)
        if case_name(path) in cases and ".seg." not in path.name.lower():
            fits.setdefault(None, []).append(path)  # in the same folder it is the CT itself
        elif case in cases:
            fits.setdefault("lung" if role == "mask" else role, []).append(path)
    # a segmentation may be of lesions
    found = next((fits[role] for role in ("lung", "segmentation", None) if role in fits), [])
    there = some_of(", ", [name_of(path.name) for path in found or files])
    if len(found) > 1:
        raise ValueError(f"{name_of(masks)}: several masks for case {case_id}: {there}")
    if not found:
        raise ValueError(
            f"{name_of(masks)}: no lung mask for case {case_id}; expected a file like {case_id}_lung.nii.gz; "
            f"there: {there or 'no file of a format that is read'}"
        )
    return found[0]
