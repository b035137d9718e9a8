"""Every CSV that is written: a cell with a name in it is never taken for a formula by a spreadsheet.

A text that begins with ``= + - @``, a tab or a line's end gets an apostrophe in front, as OWASP advises; one
that is a number stays a number. `plain` takes the apostrophe away again, from any text.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?|[+-]?nan", re.IGNORECASE | re.ASCII
)


class Sheet:
    """Writes rows as CSV.

    Parameters
    ----------
    stream : text stream
        Opened with ``newline=""``.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def row(self, cells: Iterable[Any]) -> None:
        """Write a row; None becomes an empty cell."""
        line = io.StringIO(newline="")
        # with another end of line a carriage return within a cell would not be quoted
        writer = csv.writer(line, lineterminator="\r\n")
        writer.writerow([safe(cell) if isinstance(cell, str) else cell for cell in cells])
        self._stream.write(f"{line.getvalue()[:-2]}\n")


def sheet(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows as CSV."""
    stream = io.StringIO(newline="")
    writer = Sheet(stream)
    for row in rows:
        writer.row(row)
    return stream.getvalue()


def safe(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula.

    Examples
    --------
    >>> safe("=1+1"), safe("-3.5"), safe("'=a")
    ("'=1+1", '-3.5', "''=a")
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def plain(cell: str) -> str:
    """Return the text that `safe` was given.

    Examples
    --------
    >>> plain("'=1+1"), plain("'a"), plain("-3.5")
    ('=1+1', "'a", '-3.5')
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def heading(path: Path) -> list[str]:
    """Return the first row of a CSV; nothing where there is none to read."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return [plain(cell) for cell in next(csv.reader(stream), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Tell whether a CSV has some of these columns, the first one first, and no others."""
    found = heading(path)
    return found[:1] == list(columns[:1]) and set(found) <= set(columns)
