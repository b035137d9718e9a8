"""What is said about a case: one line where it failed while the others go on, and its warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lesionsynth.strict import name_of

FORESEEN = (ValueError, OSError, MemoryError, ImportError)
"""Errors whose text says what is wrong with a file or a machine; of others the kind is news."""


def reason(path: Path, error: Exception) -> str:
    """Tell which file, and what is wrong with it; the kind of an error that nobody foresaw."""
    text = str(error)
    said = text if isinstance(error, FORESEEN) and text else f"{type(error).__name__}: {text}"
    name = name_of(path)
    # on one line, and what is no text escaped: it goes to terminals and tables
    said = name_of(said.replace(str(path), name))
    return said if name in said else f"{name}: {said}"


@contextmanager
def hear() -> Iterator[list[str]]:
    """Collect what is warned of while a case is worked on, each text once; the list is full at the end."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield texts
        finally:
            texts += dict.fromkeys(
                str(one.message) for one in caught if issubclass(one.category, UserWarning)
            )
    for one in caught:
        if not issubclass(one.category, UserWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
