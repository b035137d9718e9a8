"""What an evaluation found, and its files: cases.csv, results.json, tables.md and report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lesionsynth.files import refuse_foreign, write_atomically
from lesionsynth.io import Passed
from lesionsynth.strict import read_json
from normnet.metrics import CaseScores
from normnet.output import dumps
from normnet.report import Page
from normnet.scoring import MethodScores
from normnet.sheets import sheet
from normnet.tables import Grid, lay_out, markdown, volumes_grid, with_ungrown

TITLE = "NormNet: evaluation"
CONTROLS = "Controls: marked where there is next to no lesion"
RECORD = "results.json"
MOST_RECORD = 2**27
"""Bytes of it: it grows with the cases, by about a thousand each."""
FILES = ("cases.csv", "tables.md", "report.html", RECORD)
"""What an evaluation writes; the record proves that the others are its own."""
_RECORDED = {"cases", "summary", "settings", "methods", "failures"}


@dataclass(frozen=True)
class Failure:
    """A case that could not be evaluated."""

    case: str
    method: str | None
    """Whose maps are at fault; None where the CT, its truth or its lungs are."""
    reason: str

    def __str__(self) -> str:
        """One line: case, method, reason."""
        return f"{self.case}{f' ({self.method})' if self.method else ''}: {self.reason}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Scores of every case by every method, and what follows from them.

    Attributes
    ----------
    methods : tuple of MethodScores
        The method that is evaluated, then those it is compared with.
    failures : tuple of Failure
        What could not be evaluated; the other cases could.
    warnings : dict of str to list of str
        What was warned of, by case; among the notes of its scores, too.
    passed : tuple of Passed
        What was passed over where the CT were searched.
    settings : dict
        Thresholds and labels used.
    """

    methods: tuple[MethodScores, ...]
    failures: tuple[Failure, ...] = ()
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    passed: tuple[Passed, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, CaseScores]:
        """Scores of the first method, by case."""
        return self.methods[0].scores

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and SD of the first method; see `normnet.metrics.summarise`."""
        return self.methods[0].summary

    @property
    def oracle(self) -> dict[str, Any] | None:
        """The first method's; see `normnet.scoring.MethodScores.oracle`."""
        return self.methods[0].oracle

    @property
    def pictures(self) -> dict[str, list[tuple[int, bytes]]]:
        """Slices of the first method by case, worst first."""
        return self.methods[0].pictures

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the first method's scores in percent: a row per case, then mean±SD."""
        grid = volumes_grid(self.methods[0])
        return list(grid.header), [list(row) for row in grid.rows]

    def grids(self, *, paper: bool = True) -> list[Grid]:
        """Every table; see `normnet.tables.lay_out`."""
        failed = [[f.case, f.method or "all", f.reason] for f in self.failures]
        grids = [
            Grid("Could not be evaluated", ["case", "method", "reason"], failed),
            *lay_out(self.methods, paper=paper),
            Grid("Notes", ["case", "method", "note"], self._notes()),
        ]
        return [grid for grid in grids if grid.rows]

    def write(self, output: Path) -> None:
        """Write cases.csv, results.json, tables.md and report.html into a folder, each atomically.

        Raises
        ------
        ValueError
            As `check_output`.
        """
        check_output(output)
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / RECORD, dumps(self._document()))  # first: it claims the others
        write_atomically(output / "cases.csv", self._csv())
        write_atomically(output / "tables.md", "\n".join(markdown(grid) for grid in self.grids()))
        report = Page(TITLE)
        self.add_to(report)
        report.write(output / "report.html")

    def add_to(self, report: Page, *, paper: bool = True) -> None:
        """Add tables, histograms and overlays to a report; cases with the lowest DSC come first.

        Parameters
        ----------
        report : Page
        paper : bool
            Also the paper's own numbers.
        """
        for grid in self.grids(paper=paper):
            report.heading(grid.title)
            report.table(pd.DataFrame(list(grid.rows), columns=list(grid.header), dtype=object))
            if grid.note:
                report.paragraph(grid.note, note=True)
        self._add_histograms(report)
        self._add_pictures(report)

    def _notes(self) -> list[list[str]]:
        """Collect notes of cases, each once, with the methods that it is about."""
        notes: dict[tuple[str, str], list[str]] = {}
        for method in self.methods:
            for case, s in method.scores.items():
                for note in s["notes"]:
                    notes.setdefault((case, note), []).append(method.name)
        every = len(self.methods)
        return [[case, "all" if len(m) == every else ", ".join(m), note] for (case, note), m in notes.items()]

    def _add_histograms(self, report: Page) -> None:
        drawn = [(m, caption, png) for m in self.methods for caption, png in m.voxels.pictures().items()]
        if drawn:
            report.heading("Histograms")
        for method, caption, png in drawn:
            report.picture(
                png, f"{method.name}: {caption}, n = {method.patients}; threshold: {method.threshold}"
            )

    def _add_pictures(self, report: Page) -> None:
        for control, heading in enumerate(("Worst slices first", CONTROLS)):
            ranked = sorted(
                (-s["false_positive_ml"] if control else np.nan_to_num(s["dsc"], nan=1.0), case)
                for case, s in self.scores.items()
                if self.pictures[case] and s["control"] == control
            )
            if ranked:
                report.heading(heading)
                report.legend()
            for _, case in ranked:
                s = self.scores[case]
                dsc = f"DSC {100 * s['dsc']:.1f} %"
                text = f"{s['false_positive_ml']:.1f} ml wrongly marked" if control else dsc
                for z, picture in self.pictures[case]:
                    report.picture(picture, f"{case} ({text}), slice {z}", width=600)

    def _document(self) -> dict[str, Any]:
        return {
            "cases": self.scores,
            "summary": self.summary,
            "settings": self.settings,
            "oracle_searched_on_this_test_set": self.oracle,
            "methods": {
                m.name: {
                    "threshold": m.threshold,
                    "bright_threshold": m.bright_threshold,
                    "judges": m.judges,
                    "summary": m.summary,
                    "cases": m.scores,
                    "oracle_searched_on_this_test_set": m.oracle,
                }
                for m in with_ungrown(self.methods)
            },
            "files": list(FILES),
            "failures": [{"case": f.case, "method": f.method, "reason": f.reason} for f in self.failures],
            "warnings": self.warnings,
        }

    def _csv(self) -> str:
        fields = [name for name in CaseScores.__annotations__ if name != "notes"]
        rows: list[Sequence[Any]] = [
            ["case", "method", *fields, "threshold", "bright_threshold", "notes"],
        ]
        for m in with_ungrown(self.methods):
            for case, s in m.scores.items():
                values: Mapping[str, Any] = s
                labels: Sequence[str] = (m.thresholds[case], m.bright_thresholds[case])
                rows.append(
                    [case, m.name, *(values[name] for name in fields), *labels, "; ".join(s["notes"])]
                )
        return sheet(rows)


def check_output(output: Path) -> None:
    """Refuse a folder with files of these names that no evaluation wrote.

    Raises
    ------
    ValueError
        Names the first.
    """
    try:
        record = read_json(output / RECORD, MOST_RECORD)
    except (OSError, ValueError):
        record = None
    ours = isinstance(record, dict) and record.keys() >= _RECORDED
    refuse_foreign(output, FILES, ours=ours, maker="an evaluation")
