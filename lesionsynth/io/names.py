"""What the name of a file says: its format, its case, and whether it is a CT, a mask or a map.

``radiopaedia_4_hu.nii.gz``, ``radiopaedia_4_lung.nii.gz`` and ``radiopaedia_4_lesion.nii.gz`` are the CT,
lungs and truth of the case ``radiopaedia_4``: the last word of a name tells the role, the rest the case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mhd", ".mha")
"""Ends of the names of volume files that are read, in lower case."""
ROLE_WORDS: Mapping[str, frozenset[str]] = {
    "ct": frozenset({"hu", "ct", "image", "img", "0000"}),
    "lung": frozenset({"lung", "lungs", "lungmask", "lobes", "lunge", "lungen"}),
    "lesion": frozenset({"lesion", "lesions", "infection", "truth", "gt", "annotation", "annotations"}),
    "segmentation": frozenset({"label", "labels", "labelmap", "seg", "segmentation"}),
    "mask": frozenset({"mask", "masks", "msk", "maske"}),
    "prediction": frozenset({"pred", "prediction"}),
    "probability": frozenset({"prob", "probability"}),
}
"""Last words of a file's name, after ``_`` or ``-``, and what they say it is: a "segmentation" or "mask" may
be of lungs or of lesions."""
MAP_WORDS: Mapping[str, frozenset[str]] = {
    word: frozenset({word}) for word in ("core", "healthy", "classical")
}
"""The same, among predictions alone: elsewhere ``anna_healthy`` is more likely a person."""


def case_name(path: Path) -> str:
    """Name of a case: the file or folder name without the suffix of its format, or 3-D Slicer's ``.seg``."""
    name = path.name or path.resolve().name
    # results are named after it: bytes that are no UTF-8 could be written to no table, lines break it
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    name = "".join(c if c.isprintable() else "_" for c in name)
    for suffix in sorted((*SUFFIXES, ".dcm"), key=len, reverse=True):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return re.sub(r"(?<=.)\.seg$", "", name[: -len(suffix)], flags=re.IGNORECASE)
    return name


def split_name(path: Path, *, predicted: bool = False) -> tuple[str, str | None]:
    """Split a file name into case and role.

    Parameters
    ----------
    path : Path
        ``covid/r4_lung_mask.nii.gz``
    predicted : bool
        The file is among predictions: `MAP_WORDS` count too.

    Returns
    -------
    case : str
        ``r4``
    role : str or None
        ``lung``; None where the name says nothing. With several words the last one counts: ``r4_hu_prob`` is
        a probability. One that says of what a mask is counts more: ``r4_lung_seg`` are lungs.
    """
    name, role = case_name(path), None
    words_of = {**ROLE_WORDS, **MAP_WORDS} if predicted else ROLE_WORDS
    while True:
        cut = max(name.rfind("_"), name.rfind("-"))
        word = name[cut + 1 :].lower()
        known = next((r for r, words in words_of.items() if word in words), None)
        if cut <= 0 or known is None:
            return name, "segmentation" if role in (None, "ct") and ".seg." in path.name.lower() else role
        if role is None or (role in ("segmentation", "mask") and known != "ct"):
            role = known
        name = name[:cut]
        words_of = ROLE_WORDS  # anna_healthy_lesions are those of anna_healthy
