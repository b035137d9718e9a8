"""What is said about a case: one line where it failed while the others go on, and its warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lesionsynth.commands import printable
from lesionsynth.io import Passed
from lesionsynth.strict import name_of, some_of

FORESEEN = (ValueError, OSError, MemoryError, ImportError)
"""Errors whose text says what is wrong with a file or a machine; of others the kind is news."""


def reason(path: Path | None, error: Exception) -> str:
    """Tell which file, where one is given, and what is wrong; the kind of an error that nobody foresaw."""
    text = str(error)
    said = text if isinstance(error, FORESEEN) and text else f"{type(error).__name__}: {text}"
    # on one line, and what is no text escaped: it goes to terminals and tables
    if path is None:
        return name_of(said)
    name = name_of(path)
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


def tell(said: Mapping[str, Sequence[str]], passed: Sequence[Passed] = ()) -> bool:
    """Tell on standard error, at a command's end, what is to be known beside its results.

    Parameters
    ----------
    said : mapping of str to sequence of str
        Warnings by case.
    passed : sequence of Passed
        What was passed over: a line each for the first ten.

    Returns
    -------
    bool
        The user named one of those: the command did not do what it was asked to, its exit status is 1.
    """
    for case, texts in said.items():
        for text in texts:
            _say(f"warning: {case}: {text}")
    if passed:
        _say(*(f"passed over: {one}" for one in sorted(passed, key=lambda one: not one.named)))
    return any(one.named for one in passed)


def _say(*lines: str) -> None:
    sys.stderr.write(some_of("\n", list(map(printable, lines))) + "\n")
