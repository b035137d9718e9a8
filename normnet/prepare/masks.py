"""Where the lungs of cases come from: masks found by the case's name, or a method to segment them."""

from __future__ import annotations

from pathlib import Path

from normnet.prepare.case import LungMethod
from normnet.prepare.lungmask import check_installed

_MASK_ENDINGS = ("", "_lung", "_lungs", "_mask", "_lung_mask", "-lung", "_lobes")
_CT_ENDINGS = ("", "_hu", "_ct", "_0000")
_FORMATS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")


def check_lungs(masks: Path | None, lungs: LungMethod, cases: int) -> None:
    """Refuse a call that cannot give every case its own lungs, before the first case is read.

    Parameters
    ----------
    masks : Path, optional
        Lung mask, or a folder of them.
    lungs : {"thresholds", "lungmask"}
        How lungs are segmented where there are no masks.
    cases : int
        How many CT there are.

    Raises
    ------
    FileNotFoundError
        `masks` does not exist.
    ValueError
        It is one file for several CT.
    ImportError
        `lungs` is "lungmask", which is needed and not installed.
    """
    if masks is None:
        if lungs == "lungmask":
            check_installed()
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
        None, or several.
    """
    if not masks.is_dir():
        return masks
    stems = {case_id.removesuffix(ending) for ending in _CT_ENDINGS}
    # the CT itself may lie in the same folder: its own name only counts where nothing longer does
    for endings in (_MASK_ENDINGS[1:], _MASK_ENDINGS[:1]):
        found = [
            p
            for stem in sorted(stems)
            for ending in endings
            for suffix in _FORMATS
            if (p := masks / f"{stem}{ending}{suffix}").is_file()
        ]
        if len(found) > 1:
            raise ValueError(f"{masks}: several masks for case {case_id}: {', '.join(p.name for p in found)}")
        if found:
            return found[0]
    raise ValueError(f"{masks}: no lung mask for case {case_id}; expected a file like {case_id}_lung.nii.gz")
