"""What an evaluation found, and its files: cases.csv, results.json, tables.md and report.html."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lesionsynth.files import refuse_foreign, write_atomically
from lesionsynth.strict import read_json
from normnet.metrics import CaseScores
from normnet.report import Report
from normnet.scoring import MethodScores
from normnet.sheets import sheet
from normnet.strict_json import dumps
from normnet.tables import Grid, lay_out, markdown, volumes_grid, with_ungrown

TITLE = "NormNet: evaluation"
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
    settings : dict
        Thresholds used.
    """

    methods: tuple[MethodScores, ...]
    failures: tuple[Failure, ...] = ()
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
        failures = [Grid("Could not be evaluated", ["case", "method", "reason"], failed)] if failed else []
        return [*failures, *lay_out(self.methods, paper=paper)]

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
        report = Report(TITLE)
        self.add_to(report)
        report.write(output / "report.html")

    def add_to(self, report: Report, *, paper: bool = True) -> None:
        """Add tables, histograms and overlays to a report; cases with the lowest DSC come first.

        Parameters
        ----------
        report : Report
        paper : bool
            Also the paper's own numbers.
        """
        for grid in self.grids(paper=paper):
            report.heading(grid.title)
            report.table(grid.header, grid.rows)
            if grid.note:
                report.paragraph(grid.note, note=True)
        for (case, note), names in self._notes().items():
            whose = "" if len(names) == len(self.methods) else f" ({', '.join(names)})"
            report.paragraph(f"{case}{whose}: {note}.", note=True)
        self._add_histograms(report)
        self._add_pictures(report)

    def _notes(self) -> dict[tuple[str, str], list[str]]:
        """Collect notes by case, with the methods that they are about."""
        notes: dict[tuple[str, str], list[str]] = {}
        for method in self.methods:
            for case, s in method.scores.items():
                for note in s["notes"]:
                    notes.setdefault((case, note), []).append(method.name)
        return notes

    def _add_histograms(self, report: Report) -> None:
        drawn = [(m, caption, png) for m in self.methods for caption, png in m.voxels.pictures().items()]
        if drawn:
            report.heading("Histograms")
        for method, caption, png in drawn:
            report.picture(
                png, f"{method.name}: {caption}, n = {method.patients}; threshold: {method.threshold}"
            )

    def _add_pictures(self, report: Report) -> None:
        shown = {case: pictures for case, pictures in self.pictures.items() if pictures}
        patients = [case for case in shown if not self.scores[case]["control"]]
        controls = [case for case in shown if self.scores[case]["control"]]
        if patients:
            report.heading("Worst slices first")
            report.legend()
        for case in sorted(patients, key=lambda c: _or_one(self.scores[c]["dsc"])):
            for z, picture in shown[case]:
                text = f"{case} (DSC {100 * self.scores[case]['dsc']:.1f} %), slice {z}"
                report.picture(picture, text, width=600)
        if controls:
            report.heading("Controls: marked where there is next to no lesion")
            report.legend()
        for case in sorted(controls, key=lambda c: -self.scores[c]["false_positive_ml"]):
            for z, picture in shown[case]:
                text = f"{case} ({self.scores[case]['false_positive_ml']:.1f} ml wrongly marked), slice {z}"
                report.picture(picture, text, width=600)

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


def _or_one(dsc: float) -> float:
    """DSC to sort by: undefined is not bad."""
    return 1.0 if math.isnan(dsc) else dsc
