"""A report that is one HTML file: pictures inside, nothing fetched, no script."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lesionsynth.files import write_atomically

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0
1rem;color:#1a1a1a;background:#fff} h1{font-size:1.6rem} h2{font-size:1.2rem;margin-top:2.2rem}
table{border-collapse:collapse;margin:1rem 0} td,th{padding:.25rem .8rem;border-bottom:1px solid
#ddd;text-align:right} td:first-child,th:first-child{text-align:left} th{border-bottom:2px solid #888}
figure{display:inline-block;margin:.5rem .8rem .8rem 0;vertical-align:top} figure
img{max-width:100%;border-radius:3px} figcaption{font-size:.85rem;color:#555}
tr:hover td{background:#f4f6f8} td{font-variant-numeric:tabular-nums} a{color:#0b57a4}
section{border-top:1px solid #ddd;margin-top:2.4rem;break-before:page} section h2{margin-top:1.2rem}
.wide{overflow-x:auto} .warning{border-left:4px solid #e08a00;background:#fff6e5;padding:.4rem
.8rem;margin:.5rem 0;overflow-wrap:anywhere} .note{color:#555;font-size:.9rem;overflow-wrap:anywhere}
.tp{color:#1b8a35}.fn{color:#2456d6}.fp{color:#c8281c}
"""

_MARK = '<meta name="generator" content="normnet">'
"""Tells a page of ours from others."""
_HEAD = '<!doctype html><html lang="en"><head><meta charset="utf-8">'


def check_page(path: Path) -> None:
    """Refuse to write over a file that is no page of ours.

    Raises
    ------
    ValueError
        Something else is at `path`.
    """
    if not os.path.lexists(path):
        return
    ours = path.is_file() and not path.is_symlink()
    if ours:
        with path.open("rb") as stream:
            ours = stream.read(len(_HEAD) + len(_MARK)) == f"{_HEAD}{_MARK}".encode()
    if not ours:
        raise ValueError(
            f"output must be a new file or an earlier page, got {path}: name another, or move it"
        )


class Report:
    """A self-contained HTML page, built from top to bottom.

    Parameters
    ----------
    title : str
        Heading and window title.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = []
        self._open = False

    def heading(self, text: str, *, anchor: str | None = None) -> None:
        """Start a section, with a line above where it has an `anchor` that a table's rows can lead to."""
        title = f"<h2>{html.escape(text)}</h2>"
        if anchor is not None:
            title = f'{self._closing()}<section id="{html.escape(anchor)}">{title}'
            self._open = True
        self._parts.append(title)

    def paragraph(self, text: str, *, note: bool = False) -> None:
        """Add text; a note is set smaller."""
        self._parts.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def warning(self, text: str) -> None:
        """Add a sentence that must not be overlooked."""
        self._parts.append(f"<p class=warning>{html.escape(text)}</p>")

    def legend(self) -> None:
        """Explain the colours of the overlays."""
        self._parts.append(
            "<p class=note><b class=tp>green</b>: lesion that was found; <b class=fn>blue</b>: missed; "
            "<b class=fp>red</b>: marked where the truth has none.</p>"
        )

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        anchors: Sequence[str | None] | None = None,
    ) -> None:
        """Add a table; its first column is set to the left, and leads to the section of its row's anchor."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            f"<tr>{''.join(f'<td>{cell}</td>' for cell in _cells(row, anchor))}</tr>"
            for row, anchor in zip(rows, anchors or [None] * len(rows), strict=True)
        )
        self._parts.append(f"<div class=wide><table><tr>{head}</tr>{body}</table></div>")

    def picture(self, png: bytes, caption: str, *, width: int | None = None) -> None:
        """Add a PNG picture with a caption; `width` in CSS pixels, its own size where omitted."""
        data = base64.b64encode(png).decode()
        size = f' width="{width}"' if width else ""
        text = html.escape(caption, quote=True)
        self._parts.append(
            f'<figure><img{size} alt="{text}" src="data:image/png;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )

    def write(self, path: Path) -> Path:
        """Write the page atomically; folders are created.

        Raises
        ------
        ValueError
            As `check_page`.
        """
        check_page(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        title = html.escape(self._title)
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">{_MARK}<title>{title}</title>'
            f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(self._parts)}"
            f"{self._closing()}</body></html>"
        )
        # a name that the file system has in no known encoding is shown by its bytes
        write_atomically(path, page.encode("utf-8", "backslashreplace"))
        return path

    def _closing(self) -> str:
        return "</section>" if self._open else ""


def _cells(row: Sequence[object], anchor: str | None) -> list[str]:
    """HTML of a row's cells."""
    cells = [html.escape(str(cell)) for cell in row]
    if anchor is not None:
        cells[0] = f'<a href="#{html.escape(anchor)}">{cells[0]}</a>'
    return cells


def percent(mean: float, sd: float | None = None) -> str:
    """Write a fraction as the paper's tables do: ``68.7``, ``68.7±15.8`` with a deviation, ``–`` for NaN."""
    if np.isnan(mean):
        return "–"
    return f"{100 * mean:.1f}" + ("" if sd is None or np.isnan(sd) else f"±{100 * sd:.1f}")
