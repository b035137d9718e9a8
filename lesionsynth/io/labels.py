"""Which labels of a file make the mask, and what to say of those that do."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.io.checks import MAX_HEADER
from lesionsynth.strict import name_of, shown, some_of

MOST_LABELS = 200
"""Different labels of a mask; TotalSegmentator has 117, an image in grey levels has more."""


def mask_of(
    path: Path, values: npt.NDArray[Any], voxel_ml: float, label: int | Sequence[int] | None
) -> tuple[npt.NDArray[np.bool_], str]:
    """Make the mask of labels, as `lesionsynth.io.read_mask` says, and the warning, if any.

    Values that a slope left beside whole numbers are made whole in place.
    """
    try:
        chosen = [] if label is None else [operator.index(one) for one in np.ravel(np.asarray(label))]
    except TypeError:
        raise TypeError(f"label must be an integer or several, got {shown(label)}") from None
    counts = _count(path, values)
    names = _segments(path) if len(counts) > 1 else {}
    told = some_of(", ", [f"{k} ({names.get(k, '')}{n * voxel_ml:.1f} ml)" for k, n in counts.items()])
    if not chosen:
        if min(counts, default=0) < 0:
            raise ValueError(f"{name_of(path)}: labels must be above zero unless label chooses, got {told}")
        said = f"{name_of(path)}: labels {told} all count as the mask; label chooses"
        return np.asarray(values > 0), said if len(counts) > 1 else ""
    there = [one for one in chosen if one in counts]  # never 0, which is the outside
    lacking = ", ".join(str(one) for one in chosen if one not in counts)
    if counts and not there:
        raise ValueError(f"{name_of(path)}: label must be among {told}, got {lacking}")
    said = f"{name_of(path)}: there is no label {lacking}, only {told}"
    return np.isin(values, there), said if counts and lacking else ""


def _count(path: Path, values: npt.NDArray[Any]) -> dict[int, int]:
    """Voxels of each label but zero, in order."""
    counts: Counter[int] = Counter()
    for plane in values:  # one after another: a volume of floats takes a gigabyte
        if plane.dtype.kind == "f":
            whole = np.rint(plane)
            odd = plane[np.abs(plane - whole) > 1e-5 * np.abs(plane)]
            if odd.size:
                raise ValueError(
                    f"{name_of(path)}: a mask must hold labels, which are whole numbers, got {odd[0]:g}: a "
                    "probability, or a mask that was interpolated? Apply a threshold first"
                )
            plane[...] = whole
        found, number = np.unique(plane[plane != 0], return_counts=True)
        counts.update(dict(zip(map(int, found), map(int, number), strict=True)))
        if len(counts) > MOST_LABELS:
            raise ValueError(
                f"{name_of(path)}: a mask must have at most {MOST_LABELS} labels, got more, from "
                f"{values.min():g} to {values.max():g}: an image?"
            )
    return dict(sorted(counts.items()))


def _segments(path: Path) -> dict[int, str]:
    """Read what 3-D Slicer called the labels, each with a comma behind."""
    if not path.name.lower().endswith((".nrrd", ".nhdr")):
        return {}
    with path.open("rb") as stream:
        head = stream.read(MAX_HEADER).decode("utf-8", "replace")
    labels = re.findall(r"^Segment(\d+)_LabelValue:=(\d{1,9})\r?$", head, re.MULTILINE)
    names = dict(re.findall(r"^Segment(\d+)_Name:=(.+?)\r?$", head, re.MULTILINE))
    return {int(label): f"{name_of(names[k][:40])}, " for k, label in labels if k in names}
