"""One line about a case that failed while the others go on."""

from __future__ import annotations

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
