"""Evaluate predictions: PAPER.md Tables II and III per volume and over volumes, as CSV, JSON and HTML.

``python -m normnet.evaluate --predictions OUT --truth DIR --ct DIR --lungs DIR --output RESULTS`` pairs files
by the names of their cases (see `normnet.pairing`); ``--cases cases.csv`` lists them instead.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lesionsynth.io import read_ct, read_map, read_mask
from normnet.metrics import (
    BRIGHT,
    CONTROL_VOXELS,
    HEALTHY_THRESHOLD,
    SCORES,
    CaseScores,
    evaluate_case,
    oracle_threshold,
    roc_auc,
    summarise,
    threshold_counts,
)
from normnet.pairing import CaseFiles, find_cases, read_table
from normnet.prepare.lungs import segment_lungs
from normnet.prepare.store import write_atomically
from normnet.report import Report, case_pictures, percent

__all__ = [
    "CaseScores",
    "CaseVolumes",
    "EvaluateConfig",
    "Evaluation",
    "evaluate",
    "evaluate_case",
    "evaluate_volumes",
    "load_case",
    "roc_auc",
    "summarise",
]

Array = npt.NDArray[Any]
OWN_LUNGS = "lungs segmented by thresholds: none were given"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare predicted lesions with annotated ones."""

    output: Path
    """Folder for cases.csv, results.json and report.html."""
    predictions: tuple[Path, ...] = ()
    """What `normnet.predict` wrote: lesion maps with their probabilities and lungs, or folders of them."""
    truth: tuple[Path, ...] = ()
    """Annotated lesions, or folders of them."""
    ct: tuple[Path, ...] = ()
    """The CT volumes, or folders of them."""
    lungs: tuple[Path, ...] = ()
    """Lung masks including lesions, or folders of them; those the prediction used where omitted."""
    cases: Path | None = None
    """CSV with columns case, ct, lesion, prediction and, if any, lung, probability; replaces the above."""
    healthy_threshold: float = HEALTHY_THRESHOLD
    """Table II calls a voxel healthy where its probability exceeds this (IV-B)."""
    control_voxels: int = CONTROL_VOXELS
    """A volume with fewer lesion voxels is a control: it has no part in the means."""
    oracle: bool = False
    """Also search the threshold with the best DSC on this very test set; an upper bound, reported apart."""
    pictures: int = 3
    """Slices shown per case, worst first; 0 for none."""

    def __post_init__(self) -> None:
        if self.cases is not None and (self.predictions or self.truth or self.ct or self.lungs):
            raise ValueError("cases replaces predictions, truth, ct and lungs: give one or the other")
        if self.cases is None and not (self.predictions and self.truth and self.ct):
            raise ValueError("predictions, truth and ct must be given, or cases")
        if not 0 <= self.healthy_threshold <= 1:
            raise ValueError(f"healthy_threshold must lie in [0, 1], got {self.healthy_threshold}")
        if self.control_voxels < 0 or self.pictures < 0:
            raise ValueError(
                f"control_voxels and pictures must be >= 0, got {self.control_voxels} and {self.pictures}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseVolumes:
    """One case in memory, all (Z, Y, X) on one grid.

    Attributes
    ----------
    case : str
    hu : int16 array
    prediction, truth, lung_mask : bool arrays
    probability : float32 array or None
        Healthy probability.
    spacing : (3,) floats
        mm, (z, y, x).
    healthy : bool array or None
        Voxels that the models' vote calls healthy; where None, what exceeds the threshold.
    notes : tuple of str
        What the reader of the results should know.
    """

    case: str
    hu: Array
    prediction: Array
    truth: Array
    lung_mask: Array
    probability: Array | None
    spacing: tuple[float, float, float]
    healthy: Array | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Scores of every case, and what follows from them.

    Attributes
    ----------
    scores : dict of str to CaseScores
        By case.
    summary : dict
        See `normnet.metrics.summarise`.
    oracle : dict or None
        See `normnet.metrics.oracle_threshold`.
    pictures : dict of str to list of (slice, PNG)
        By case, worst slices first.
    settings : dict
        Thresholds used.
    """

    scores: dict[str, CaseScores]
    summary: dict[str, dict[str, float]]
    oracle: dict[str, float] | None
    pictures: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of Tables III and II in percent: a row per case, then mean±SD without controls."""
        header = [
            "case",
            "DSC",
            "PSC",
            "SEN",
            "bright PSC",
            "bright SEN",
            "bright SPC",
            "AUC",
            "lesion ml",
            "FP ml",
        ]
        rows = []
        for case, s in self.scores.items():
            values: Mapping[str, Any] = s
            shown = ["–"] * 3 if s["control"] else [percent(values[name]) for name in SCORES]
            shown += ["–"] * 4 if s["control"] else [percent(values[name]) for name in BRIGHT]
            name = f"{case} (control)" if s["control"] else case
            rows.append([name, *shown, f"{s['lesion_ml']:.1f}", f"{s['false_positive_ml']:.1f}"])
        means = [percent(self.summary[name]["mean"], self.summary[name]["sd"]) for name in (*SCORES, *BRIGHT)]
        rows.append(["mean±SD", *means, "", ""])
        return header, rows

    def write(self, output: Path) -> None:
        """Write cases.csv, results.json and report.html into a folder, each atomically."""
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "cases.csv", _csv(self.scores))
        document = {
            "cases": self.scores,
            "summary": self.summary,
            "settings": self.settings,
            "oracle_searched_on_this_test_set": self.oracle,
        }
        write_atomically(
            output / "results.json", json.dumps(_without_nan(document), indent=2, allow_nan=False) + "\n"
        )
        report = Report("NormNet: evaluation")
        self.add_to(report)
        report.write(output / "report.html")

    def add_to(self, report: Report) -> None:
        """Add tables, notes and overlays to a report; cases with the lowest DSC come first."""
        report.heading("Scores (%)")
        report.table(*self.table())
        report.paragraph(
            "DSC, PSC, SEN: final lesion map against the truth (Table III). Bright: lung voxels of at least "
            "-500 HU, network alone; positive = healthy, as in the paper's Table II, so SPC is the share of "
            "bright lesion voxels not called healthy. SD is that of the sample. A control has next to no "
            "lesion: its false-positive volume counts, and it takes no part in the means.",
            note=True,
        )
        if self.oracle is not None:
            report.paragraph(
                "Oracle, threshold searched on this very test set, no post-processing: DSC "
                f"{percent(self.oracle['mean_dsc'])} at a healthy probability of "
                f"{self.oracle['threshold']:.2f}. The best the bare network could do, not a result."
            )
        for case, s in self.scores.items():
            for note in s["notes"]:
                report.paragraph(f"{case}: {note}.", note=True)
        if any(self.pictures.values()):
            report.heading("Worst slices first")
            report.legend()
        for case in sorted(self.pictures, key=lambda c: (self.scores[c]["control"], self.scores[c]["dsc"])):
            for z, picture in self.pictures[case]:
                report.picture(picture, f"{case}, slice {z}", width=600)


def load_case(files: CaseFiles) -> CaseVolumes:
    """Read a case's files; everything must lie on the CT's grid.

    Raises
    ------
    FileNotFoundError, ValueError
        A file is missing, unreadable or on another grid; the message names it.
    """
    ct = read_ct(files.ct)
    lung_mask = segment_lungs(ct.hu, ct.spacing) if files.lung is None else read_mask(files.lung, ct)
    return CaseVolumes(
        case=files.case,
        hu=ct.hu,
        prediction=read_mask(files.prediction, ct),
        truth=read_mask(files.lesion, ct),
        lung_mask=lung_mask,
        probability=None if files.probability is None else read_map(files.probability, ct),
        spacing=ct.spacing,
        notes=(OWN_LUNGS,) if files.lung is None else (),
    )


def evaluate_volumes(
    volumes: Iterator[CaseVolumes] | Sequence[CaseVolumes],
    *,
    healthy_threshold: float = HEALTHY_THRESHOLD,
    control_voxels: int = CONTROL_VOXELS,
    oracle: bool = False,
    pictures: int = 3,
) -> Evaluation:
    """Evaluate cases one after another, holding one in memory where `volumes` is an iterator.

    Parameters
    ----------
    volumes : iterator or sequence of CaseVolumes
        At least one; names differ.
    healthy_threshold, control_voxels, oracle, pictures
        See `EvaluateConfig`.

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError
        No case, a repeated name, or an unfit volume; the message names the case.
    """
    scores: dict[str, CaseScores] = {}
    shown: dict[str, list[tuple[int, bytes]]] = {}
    counts = []
    for v in volumes:
        if v.case in scores:
            raise ValueError(f"cases must have different names, got {v.case!r} twice")
        try:
            result = evaluate_case(
                v.prediction,
                v.truth,
                v.lung_mask,
                v.hu,
                v.probability,
                healthy=v.healthy,
                spacing=v.spacing,
                healthy_threshold=healthy_threshold,
                control_voxels=control_voxels,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"case {v.case!r}: {error}") from error
        result["notes"].extend(v.notes)
        scores[v.case] = result
        shown[v.case] = (
            case_pictures(v.hu, v.prediction, v.truth, v.lung_mask, count=pictures) if pictures else []
        )
        if oracle and v.probability is not None and not result["control"]:
            counts.append(threshold_counts(v.truth, v.lung_mask, v.hu, v.probability))
    if not scores:
        raise ValueError("there must be at least one case, got none")
    return Evaluation(
        scores=scores,
        summary=summarise(list(scores.values())),
        oracle=oracle_threshold(counts) if oracle else None,
        pictures=shown,
        settings={"healthy_threshold": healthy_threshold, "control_voxels": control_voxels},
    )


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Pair, read, evaluate, and write results.

    Parameters
    ----------
    config : EvaluateConfig
        Files and settings.

    Returns
    -------
    Evaluation

    Raises
    ------
    FileNotFoundError, ValueError
        See `find_cases`, `read_table`, `load_case` and `evaluate_volumes`.
    """
    if config.cases is not None:
        files = read_table(config.cases)
    else:
        files = find_cases(
            predictions=config.predictions, truth=config.truth, ct=config.ct, lungs=config.lungs
        )
    evaluation = evaluate_volumes(
        (load_case(f) for f in files),
        healthy_threshold=config.healthy_threshold,
        control_voxels=config.control_voxels,
        oracle=config.oracle,
        pictures=config.pictures,
    )
    evaluation.write(config.output)
    return evaluation


def _csv(scores: Mapping[str, CaseScores]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    fields = [name for name in CaseScores.__annotations__ if name != "notes"]
    writer.writerow(["case", *fields, "notes"])
    for case, s in scores.items():
        values: Mapping[str, Any] = s
        writer.writerow([case, *(values[name] for name in fields), "; ".join(s["notes"])])
    return stream.getvalue()


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Set a table in columns for a terminal."""
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    lines = (
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m normnet.evaluate``; 2 where the input does not fit."""
    import sys

    import tyro

    try:
        config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m normnet.evaluate")
        evaluation = evaluate(config)
    except (FileNotFoundError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(plain_table(*evaluation.table()))
    if evaluation.oracle is not None:
        print(
            "oracle (threshold searched on this test set, bare network without post-processing): DSC "
            f"{percent(evaluation.oracle['mean_dsc'])} at {evaluation.oracle['threshold']:.2f}"
        )
    print(f"report: {config.output / 'report.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
