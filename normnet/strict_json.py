"""JSON that every reader takes: what is no number becomes null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(document: Any) -> str:
    """Write a document as indented JSON, a newline at its end.

    Parameters
    ----------
    document : mapping, list, str, number or None
        Nested as deep as one likes. NaN and infinities, which JSON does not have, become null.

    Returns
    -------
    str
        ASCII: names of files may hold what UTF-8 cannot encode.
    """
    return json.dumps(without_nan(document), indent=2, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """Return a document with None for every float that is NaN or infinite."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
