"""What the name of a file says: its format, its case, and whether it is a mask or a map and no CT."""

from __future__ import annotations

import re
from pathlib import Path

SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mhd", ".mha")
"""Ends of the names of volume files that are read, in lower case."""
NO_CT = frozenset({
    *("lung", "lungs", "lungmask", "lobes", "lunge", "lungen"),
    *("lesion", "lesions", "infection", "truth", "gt", "annotation", "annotations"),
    *("label", "labels", "labelmap", "seg", "segmentation", "mask", "masks", "msk", "maske"),
    *("pred", "prediction", "prob", "probability", "core"),
})  # fmt: skip
"""Last words of a file's name, after ``_`` or ``-``, that say that it is a mask or a map."""


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
