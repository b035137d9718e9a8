"""Every CSV that is written: a cell with a name in it is never taken for a formula by a spreadsheet.

A text that begins with ``= + - @``, a tab or a line's end gets an apostrophe in front, as OWASP advises, and
so does one with blanks, quotes or signs of no width before them; one that is a number stays a number. `plain`
takes the apostrophe away again, from any text.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from lesionsynth.strict import name_of, read_text

_FORMULA = re.compile(r"['\"`\s\u200b-\u200f\u2060\ufeff]*([=+\-@＝＋－＠]|(?<=[\t\r\n]))")
_NUMBER = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?|[+-]?nan", re.IGNORECASE | re.ASCII
)

_LONGEST = 2**16
"""Of a heading that is read, in characters."""
MOST_BYTES = 2**28
"""Longest table that is read: that of a run has a line for each of its iterations."""


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
        """Write a row; None becomes an empty cell, and what UTF-8 cannot encode is escaped."""
        line = io.StringIO(newline="")
        # with another end of line a carriage return within a cell would not be quoted
        writer = csv.writer(line, lineterminator="\r\n")
        writer.writerow(["" if cell is None else safe(str(cell)) for cell in cells])
        text = line.getvalue()[:-2].encode("utf-8", "backslashreplace").decode("utf-8")
        self._stream.write(f"{text}\n")


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


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Read the rows of a CSV as `plain` text, each with the number of the line where it ends.

    Raises
    ------
    OSError
        It cannot be opened or read.
    ValueError
        It is no regular file in UTF-8, longer than `MOST_BYTES`, or no CSV; the message names it.
    """
    reader = csv.reader(io.StringIO(read_text(path, MOST_BYTES), newline=""))
    try:
        return [(reader.line_num, [plain(cell) for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{name_of(path)}: must be a CSV, got {error}") from error


def heading(path: Path) -> list[str]:
    """Return the first row of a CSV; nothing where there is none to read, or it is no regular file."""
    try:
        if not path.is_file():  # a pipe would keep its reader waiting
            return []
        with path.open(newline="", encoding="utf-8") as stream:
            return [plain(cell) for cell in next(csv.reader([stream.readline(_LONGEST)]), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Tell whether a CSV has some of these columns, the first one first, and no others."""
    found = heading(path)
    return found[:1] == list(columns[:1]) and set(found) <= set(columns)
