"""The record of a blob as it was drawn, and what a stage works out besides.

A parameter that is added to `lesionsynth.sampling.BLOB` reaches the kernels of every stage.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.sampling import BLOB as DRAWN

NAMES = DRAWN.names or ()


def extended(*fields: Any) -> np.dtype[Any]:
    """Return the type of a drawn blob with more fields."""
    drawn = [(name, DRAWN[name].base, DRAWN[name].shape) for name in NAMES]
    return np.dtype([*drawn, *fields], align=True)


def extend(drawn: npt.NDArray[Any], kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """Copy drawn blobs into records of an `extended` type, whose other fields are 0."""
    records = np.zeros(len(drawn), dtype=kind)
    for name in NAMES:
        records[name] = drawn[name]
    return records
