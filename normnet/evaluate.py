"""Evaluate predictions: PAPER.md Tables II and III per volume and over volumes, as CSV, JSON, Markdown, HTML.

``python -m normnet.evaluate --predictions MAPS --truth DIR --output RESULTS`` scores the cases of a folder
that `normnet.predict` or `normnet.baselines` wrote; ``--compare VAE=MAPS2`` sets other methods' maps of the
same cases beside them, and ``--cases cases.csv`` names files one by one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

import lesionsynth as ls
from lesionsynth.commands import plainly, printable, run
from lesionsynth.files import refuse_foreign, same_file, write_atomically
from lesionsynth.io import Found, Passed, case_name, read_ct, read_map, read_mask
from lesionsynth.strict import name_of, read_json, shown, some_of
from lesionsynth.window import HU_RANGE
from normnet import metrics, paper
from normnet.cases import Case, find_cases, hear, locate, match, read_table, reason, tell
from normnet.config import PAPER_THRESHOLD_HU, Share
from normnet.draw import VoxelCounts, case_pictures
from normnet.metrics import BRIGHT, SCORES, CaseScores, percent
from normnet.output import FILES as MAPS
from normnet.output import Record, dumps, read_record, read_records
from normnet.prepare.case import LungMethod, method_of, method_record
from normnet.prepare.lungs import check_plausible
from normnet.report import Page, lungs_told
from normnet.settings import File, settings
from normnet.sheets import sheet

Array = npt.NDArray[Any]

PROPOSED, WITHOUT_GROWING = "Proposed", "w/o growing"
"""What the paper's Table III calls its own method, and a map before region growing."""
FILES = ("cases.csv", "tables.md", "report.html", "results.json")
"""What an evaluation writes; the last proves that the others are its own."""
MOST_RECORD = 2**27
"""Bytes of it: it grows with the cases, by about a thousand each."""
LABELS = ("threshold", "bright_threshold", "judges")
"""Of each case: where the thresholds behind Tables III and II come from; the voxels that are judged."""
SHARED = ("healthy_threshold", "control_voxels", "oracle", "pictures")
OF_SCORES = ("DSC (%)", "PSC (%)", "SEN (%)")
OF_BRIGHT = ("Precision", "Sensitivity", "Specificity", "AUC")
"""Headers of Tables III and II."""
COLUMNS = {"prediction": "lesions", "probability": "probability", "healthy": "healthy", "core": "core"}
"""Of a table of cases: kinds of maps."""


@settings
class EvaluateConfig:
    """Compare predicted lesions with annotated ones.

    Exit status: 0 when every case is evaluated, 1 when some failed or a file that was named was passed over
    (the others are), 2 for a wrong call.
    """

    output: File
    """Folder for cases.csv, results.json, tables.md and report.html."""
    predictions: File | None = None
    """Folder that normnet.predict or normnet.baselines wrote; or that has the maps of another program:
    <case>.nii.gz, or one <case>_*.nii.gz, for each CT in `ct`."""
    truth: File | None = None
    """Folder with the annotated lesions of each case: <case>.nii.gz, or one <case>_*.nii.gz."""
    ct: tuple[File, ...] = ()
    """Where the CT are now, if they moved since the prediction, or for maps of another program: files, DICOM
    folders, or folders of these at any depth."""
    masks: File | None = None
    """Folder with lung masks including lesions, named like the truth; those the prediction used where
    omitted."""
    lungs: LungMethod = "network"
    """How lungs are segmented where there are neither given ones nor the prediction's: network, that of this
    package; classical, thresholds and morphology; lungmask, the network of that package, if installed; or
    weights of your own (normnet.train --task lungs)."""
    label: tuple[int, ...] = ()
    """Labels of the truth that are lesions; all above zero where omitted."""
    lung_label: tuple[int, ...] = ()
    """Labels of the given lungs that are lungs; all above zero where omitted."""
    cases: File | None = None
    """CSV with columns case, ct, lungs, lesions and, if any, prediction, probability, healthy, core; replaces
    `truth`, `ct` and `masks`. With `predictions` the maps are those of that folder."""
    compare: tuple[str, ...] = ()
    """NAME=FOLDER: other methods' maps of the same cases, a row each in Tables II and III."""
    name: str = PROPOSED
    """What the tables call the method of `predictions`."""
    healthy_threshold: Share = metrics.HEALTHY_THRESHOLD
    """Table II calls a voxel healthy where its probability exceeds this (IV-B), unless the predictions have
    <case>_healthy maps: the vote that `normnet.predict --save-probability` writes."""
    control_voxels: Annotated[int, Field(ge=0)] = metrics.CONTROL_VOXELS
    """A volume with fewer lesion voxels is a control: it has no part in the means."""
    oracle: bool = False
    """Also search the threshold with the best DSC on this very test set; an upper bound, reported apart."""
    pictures: Annotated[int, Field(ge=0)] = 3
    """Slices shown per case, worst first; 0 for none."""

    def __post_init__(self) -> None:
        if self.cases is not None and (self.truth or self.ct or self.masks):
            raise ValueError("cases replaces truth, ct and masks: give one or the other")
        if self.cases is None and not (self.predictions and self.truth):
            raise ValueError("predictions and truth must be given, or cases")
        if self.lung_label and not (self.masks or self.cases):
            raise ValueError("lung_label must be omitted where neither masks nor cases are given")
        taken = [self.name, f"{self.name} {WITHOUT_GROWING}"]
        for name, folder in self.compared:
            if not (name and folder):
                raise ValueError(f"compare must be NAME=FOLDER, got {shown(self.compare)}")
            if name in taken:
                raise ValueError(f"compare must give every method a name of its own, got {name!r} again")
            taken.append(name)

    @property
    def compared(self) -> list[tuple[str, str]]:
        """Name and folder of each other method."""
        return [(name.strip(), path.strip()) for name, _, path in (t.partition("=") for t in self.compare)]


class Origin(NamedTuple):
    """How a lesion map was made: thresholds fixed, calibrated and searched are three different things."""

    label: str = "not recorded"
    """``fixed at 0.95``, ``calibrated on synthetic pairs: 0.62; T -700 HU``."""
    threshold_hu: float | None = PAPER_THRESHOLD_HU
    """T on the CT's own scale: the method judges lung voxels at or above it. None for the whole lung."""
    inflation: float = 1.0
    """What HU in the lungs were multiplied with before they were judged; see `normnet.inflation`."""


def origin_of(record: Mapping[str, Any]) -> Origin:
    """Read from ``<case>.json`` how its maps were made; what it does not tell is not guessed."""
    try:
        if "baseline" in record:
            entry = record["baseline"]
            how = "calibrated on healthy volumes: " if entry["calibrated"] else "fixed at "
            return Origin(f"{how}anomaly {float(entry['threshold']):.4g}", threshold_hu=None)
        settings, models = record["settings"], record["models"]
        # records of earlier versions have T among the settings alone
        usual = settings.get("postprocess", {}).get("threshold_hu")
        usual = PAPER_THRESHOLD_HU if usual is None else usual
        judged = [float(model.get("threshold_hu", usual)) for model in models]
        for level in judged:
            ls.threshold(level)  # no T lies beyond the networks' window
        calibrated = [model.get("calibrated", settings["probability"] == "calibrated") for model in models]
        levels = [f"{float(model['probability']):g}" for model in models]
        # what any of the models judges may become a lesion; T is of lungs brought to their inflation
        factor = float(record.get("inflation", 1.0))
        lowest = max(min(judged) / factor, HU_RANGE[0])
    except (ValueError, TypeError, LookupError, AttributeError):
        return Origin()
    if all(calibrated):
        label = f"calibrated on synthetic pairs: {', '.join(levels)}"
    elif not any(calibrated):
        label = f"fixed at {', '.join(dict.fromkeys(levels))}"
    else:
        marked = (f"{p} calibrated" if c else f"{p} fixed" for p, c in zip(levels, calibrated, strict=True))
        label = f"thresholds {', '.join(marked)}"
    return Origin(f"{label}{tissue(*judged)}", lowest, factor)


def tissue(*levels: float | None) -> str:
    """Tell T in a label, where it is not the paper's: models of another judge other tissue."""
    others = {level for level in levels if level is not None} - {PAPER_THRESHOLD_HU}
    return "".join(f"; T {level:g} HU" for level in sorted(others))


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseVolumes:
    """One case in memory, all (Z, Y, X) on one grid; see `normnet.metrics.evaluate_case`."""

    case: str
    hu: Array
    prediction: Array
    truth: Array
    lung_mask: Array
    probability: Array | None
    """Healthy probability, float32."""
    spacing: tuple[float, float, float]
    """mm, (z, y, x)."""
    healthy: Array | None = None
    """Voxels that the models' vote calls healthy; where None, what exceeds the threshold."""
    core: Array | None = None
    """Predicted lesions before region growing."""
    origin: Origin = field(default_factory=Origin)
    notes: tuple[str, ...] = ()
    """What the reader of the results should know."""


class Failure(NamedTuple):
    """A case that could not be evaluated; `method` is None where its CT, truth or lungs are at fault."""

    case: str
    method: str | None
    reason: str


class Method(NamedTuple):
    """What is known of a method: `LABELS` of all its cases, their scores, and mean and SD of these."""

    threshold: str
    bright_threshold: str
    judges: str
    summary: dict[str, dict[str, float]]
    cases: dict[str, CaseScores]
    oracle_searched_on_this_test_set: dict[str, Any] | None
    """The best threshold, and Table III's scores at it: an upper bound, no result."""

    @property
    def patients(self) -> int:
        """Cases that are no controls."""
        return sum(not scores["control"] for scores in self.cases.values())


class Table(NamedTuple):
    """A table of strings, and what its reader must know."""

    title: str
    frame: pd.DataFrame
    note: str = ""

    @classmethod
    def of(cls, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> Table:
        """Make it of rows; names of files that are no text are left as they are."""
        return cls(title, pd.DataFrame(rows, columns=list(header), dtype=object), note)

    def markdown(self) -> str:
        """Write it in Markdown, its title above and its note below."""
        note = f"\n{self.note}\n" if self.note else ""
        return f"**{printable(self.title)}**\n\n{as_text(self.frame, 'pipe')}\n{note}"


def as_text(frame: pd.DataFrame, layout: str = "plain") -> str:
    """Set a table of strings in columns for a terminal, or in Markdown ("pipe"); controls are escaped."""
    bar, lines = "\\|" if layout == "pipe" else "|", [list(frame), *frame.to_numpy().tolist()]
    header, *rows = ([printable(cell).replace("|", bar) for cell in line] for line in lines)
    align = ("left", *["right"] * (len(header) - 1))
    shown = pd.DataFrame(rows, columns=header)
    return str(shown.to_markdown(index=False, tablefmt=layout, disable_numparse=True, colalign=align))


@dataclass(kw_only=True, eq=False)
class Evaluation:
    """Scores of every case by every method, and what follows from them."""

    names: tuple[str, ...] = (PROPOSED,)
    """The method that is evaluated, then those it is compared with."""
    healthy_threshold: float = metrics.HEALTHY_THRESHOLD
    control_voxels: int = metrics.CONTROL_VOXELS
    oracle: bool = False
    pictures: int = 3
    asked: dict[str, Any] = field(default_factory=dict)
    """What else results.json shall tell of the settings."""
    failures: list[Failure] = field(default_factory=list)
    """What could not be evaluated; the other cases could."""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """What was warned of, by case; among the notes of its scores, too."""
    passed: Sequence[Passed] = ()
    """What was passed over where the CT were searched."""

    def __post_init__(self) -> None:
        self.voxels = {name: VoxelCounts() for name in self.names}
        self._before = f"{self.names[0]} {WITHOUT_GROWING}"
        self._rows: list[dict[str, Any]] = []
        self._counts: dict[str, list[Array]] = {name: [] for name in self.names}
        self._slices: dict[str, list[tuple[int, bytes]]] = {}

    def add(self, v: CaseVolumes, method: str | None = None) -> None:
        """Score a case by a method, the first where omitted; where it fails nothing of it is kept.

        Raises
        ------
        TypeError, ValueError
            As `normnet.metrics.evaluate_case`.
        """
        first, at, (label, level, inflation) = self.names[0], self.healthy_threshold, v.origin
        method, maps = method or first, (v.prediction, v.truth, v.lung_mask)
        how: Any = {"spacing": v.spacing, "healthy_threshold": at, "control_voxels": self.control_voxels}
        scores = metrics.evaluate_case(*maps, v.hu, v.probability, healthy=v.healthy, **how)
        scores["notes"] += v.notes
        before = None if v.core is None else metrics.overlap_scores(v.core, v.truth, v.spacing)
        own = None if level is None else round(level * inflation, 3)
        scaled = "" if inflation == 1 else ", at one inflation"
        judges = "lung" if own is None else f"lung from {round(own)} HU{scaled}"
        bright = "–" if v.probability is None else f"mean probability, fixed at {at:g}{tissue(own)}"
        bright = bright if v.healthy is None else f"vote, {label}"
        labels = {"threshold": label, "bright_threshold": bright, "judges": judges}
        row = {"case": v.case, "method": method, **scores, **labels}
        if method == first and self.pictures:  # a page with overlays of ten methods is too large to open
            self._slices[v.case] = case_pictures(v.hu, *maps, count=self.pictures)
        if method == first and before is not None:
            self._rows.append({**row, "method": self._before, **before})
        self._rows.append(row)
        if scores["control"]:
            return
        self.voxels[method].add(v.hu, *maps, v.probability, threshold_hu=level)
        if self.oracle and v.probability is not None:
            volumes = (v.truth, v.lung_mask, v.hu, v.probability)
            self._counts[method].append(metrics.threshold_counts(*volumes, threshold_hu=level))

    @property
    def frame(self) -> pd.DataFrame:
        """A row per method and case: scores with their notes, and `LABELS`.

        The first method's maps before growing come in front, as in the paper, where every case has them.
        """
        parts: dict[str, list[dict[str, Any]]] = {name: [] for name in (self._before, *self.names)}
        for row in self._rows:
            notes = [*row["notes"], *self.warnings.get(row["case"], ())]
            parts[row["method"]].append({**row, "notes": notes})
        if len(parts[self._before]) < len(parts[self.names[0]]):
            del parts[self._before]
        columns = ["case", "method", *CaseScores.__annotations__, *LABELS]
        frame = pd.DataFrame([row for part in parts.values() for row in part], columns=columns, dtype=object)
        kinds = get_type_hints(CaseScores).items()
        return frame.astype({name: kind for name, kind in kinds if kind in (bool, int, float)})

    @property
    def methods(self) -> dict[str, Method]:
        """By name, in the order of `frame`."""
        frame, found = self.frame, {}
        for name in dict.fromkeys((*frame["method"], *self.names)):
            part = frame[frame["method"] == name]
            cases: Any = part.set_index("case")[list(CaseScores.__annotations__)].to_dict("index")
            best: dict[str, Any] | None = None
            if self.oracle and name in self._counts:
                best = {**metrics.oracle_threshold(counts := self._counts[name])}
                best |= metrics.summary_at(counts, best["threshold"]) if counts else {}
            threshold, bright, judges = (_one_label(list(part[label])) for label in LABELS)
            summary = metrics.summarise(list(cases.values()))
            found[name] = Method(threshold, bright, judges, summary, cases, best)
        return found

    @property
    def scores(self) -> dict[str, CaseScores]:
        """Scores of the first method, by case."""
        return self.methods[self.names[0]].cases

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Mean, SD and number of the first method's scores; see `normnet.metrics.summarise`."""
        return self.methods[self.names[0]].summary

    def table(self, method: str | None = None) -> pd.DataFrame:
        """Scores in percent of a method, the first where omitted: a row per case, then mean±SD."""
        made = self.methods[method or self.names[0]]
        names = ("DSC", "PSC", "SEN", "bright PSC", "bright SEN", "bright SPC", "AUC", "lesion ml", "FP ml")
        rows = []
        for case, scores in made.cases.items():
            s: Mapping[str, Any] = scores
            cells = ["–" if s["control"] else percent(s[name]) for name in (*SCORES, *BRIGHT)]
            cells += [f"{s[name]:.1f}" for name in ("lesion_ml", "false_positive_ml")]
            rows.append([f"{case} (control)" if s["control"] else case, *cells])
        rows.append(["mean±SD", *_means(made.summary, (*SCORES, *BRIGHT)), "", ""])
        return pd.DataFrame(rows, columns=["case", *names], dtype=object)

    def tables(self, *, paper: bool = True) -> list[Table]:
        """Every table, in the order in which they are read; the paper's own numbers where asked for."""
        methods = self.methods
        compared = {name: methods[name] for name in self.names}
        scored = [_row(n, m, m.summary, SCORES, m.threshold) for n, m in methods.items()]
        bright = [_row(n, m, m.summary, BRIGHT, m.bright_threshold) for n, m in compared.items()]
        searched = [
            _row(n, m, best, SCORES, f"{best['threshold']:.2f}", m.judges)
            for n, m in compared.items()
            if "dsc" in (best := m.oracle_searched_on_this_test_set or {})
        ]
        failed = [(case, method or "all", why) for case, method, why in self.failures]
        notes: dict[tuple[str, str], list[str]] = {}
        for name, method in compared.items():
            for case, scores in method.cases.items():
                for note in scores["notes"]:
                    notes.setdefault((case, note), []).append(name)
        every = {len(compared): "all"}
        noted = [(case, every.get(len(m), ", ".join(m)), note) for (case, note), m in notes.items()]
        tables = [
            Table.of("Could not be evaluated", ("case", "method", "reason"), failed),
            Table.of(
                "Table III: lesions against the truth, mean±SD over patients (%)",
                ("Methods", *OF_SCORES, "patients", "threshold"),
                scored,
                "SD of the sample (n - 1). Controls, which have next to no lesion, take no part. Thresholds "
                "as the predictions recorded them: fixed, or calibrated without annotated data.",
            ),
            Table.of(
                "Table II: bright voxels, healthy against lesion, mean±SD over patients (%)",
                ("Methods", *OF_BRIGHT, "patients", "threshold"),
                bright,
                "Lung voxels of at least -500 HU, the paper's T, for every method whatever its own T: "
                "methods compare on the same voxels, and what a method does not judge it does not call "
                "healthy. Before post-processing; healthy is the positive class, so specificity is the share "
                "of bright lesion voxels not called healthy. The AUC, of the mean healthy probability, needs "
                "no threshold.",
            ),
            *(_printed() if paper else ()),
            Table.of(
                "Oracle, NOT a result: thresholds searched on this very test set (%)",
                ("Methods", *OF_SCORES, "patients", "healthy probability", "searched in"),
                searched,
                "One threshold per method, the best mean DSC of 0, 0.01, ... 1, on its mean probability "
                "without post-processing: the search that the paper grants its baselines (IV-C). The most "
                "that the bare map could reach on the voxels that the method judges: from its own T on, or "
                "the whole lung. Not to be set beside Table III.",
            ),
            *(Table(f"Per volume: {name} (%)", self.table(name)) for name in methods),
            Table.of("Notes", ("case", "method", "note"), noted),
        ]
        return [table for table in tables if len(table.frame)]

    def write(self, output: Path) -> None:
        """Write `FILES` into a folder, each atomically; what no evaluation wrote is refused (ValueError)."""
        check_output(output)
        output.mkdir(parents=True, exist_ok=True)
        rules = {"healthy_threshold": self.healthy_threshold, "control_voxels": self.control_voxels}
        methods = {name: method._asdict() for name, method in self.methods.items()}
        first = methods[self.names[0]]
        document = {
            **{entry: first[entry] for entry in ("cases", "summary", "oracle_searched_on_this_test_set")},
            "settings": {**rules, **self.asked},
            "methods": methods,
            "files": FILES,
            "failures": [failure._asdict() for failure in self.failures],
            "warnings": self.warnings,
        }
        write_atomically(output / FILES[-1], dumps(document))  # first: it claims the others
        columns = [*self.frame.columns.drop(["notes", "judges"]), "notes"]
        rows = [[*row[:-1], "; ".join(row[-1])] for row in self.frame[columns].itertuples(index=False)]
        write_atomically(output / "cases.csv", sheet([columns, *rows]))
        write_atomically(output / "tables.md", "\n".join(table.markdown() for table in self.tables()))
        page = Page("NormNet: evaluation")
        self.add_to(page)
        page.write(output / "report.html")

    def add_to(self, page: Page, *, paper: bool = True) -> None:
        """Add tables, histograms and overlays to a page; `paper`: also the paper's own numbers."""
        for table in self.tables(paper=paper):
            page.heading(table.title)
            page.table(table.frame)
            if table.note:
                page.paragraph(table.note, note=True)
        methods, heading = self.methods, ""
        pictures = [(name, *one) for name in self.names for one in self.voxels[name].pictures().items()]
        if pictures:
            page.heading("Histograms")
        for name, caption, png in pictures:
            n, threshold = methods[name].patients, methods[name].threshold
            page.picture(png, f"{name}: {caption}, n = {n}; threshold: {threshold}")
        ranked = []
        for case, s in self.scores.items():
            ml, dsc = s["false_positive_ml"], s["dsc"]
            if s["control"]:
                ranked.append((1, -ml, case, f"{ml:.1f} ml wrongly marked"))
            else:
                ranked.append((0, float(np.nan_to_num(dsc, nan=1.0)), case, f"DSC {100 * dsc:.1f} %"))
        headings = ("Worst slices first", "Controls: marked where there is next to no lesion")
        for control, _, case, told in sorted(ranked):
            for z, png in self._slices.get(case, ()):
                if heading != headings[control]:
                    heading = headings[control]
                    page.heading(heading)
                    page.legend()
                page.picture(png, f"{case} ({told}), slice {z}", width=600)


def _printed() -> list[Table]:
    """Lay out the paper's own Tables III and II."""
    note = f"As printed in {paper.SOURCE}. Other patients, models and training data: no comparison with the "
    note += "above."
    header = ("Methods (paper)", *(f"{data} {name}" for data in paper.DATA_SETS for name in OF_SCORES))
    scores, bright = ([(n, *row) for n, row in rows.items()] for rows in (paper.TABLE_III, paper.TABLE_II))
    second = ("Dataset (paper)", *OF_BRIGHT)
    return [
        Table.of("The paper's Table III, on its data sets", header, scores, note),
        Table.of("The paper's Table II, on its data sets (%)", second, bright, note),
    ]


def _means(summary: Mapping[str, Mapping[str, float]], names: Iterable[str]) -> list[str]:
    return [percent(summary[name]["mean"], summary[name]["sd"]) for name in names]


def _row(name: str, method: Method, means: Mapping[str, Any], scores: Iterable[str], *more: str) -> list[str]:
    return [name, *_means(means, scores), str(method.patients), *more]


def _one_label(labels: Sequence[str]) -> str:
    """One label for all cases; where they differ, each with the number of its cases."""
    count = Counter(labels)
    if len(count) < 2:
        return next(iter(count), "–")
    return "DIFFERENT: " + "; ".join(f"{label} (n = {n})" for label, n in count.items())


def check_output(output: Path) -> None:
    """Refuse a folder with files of these names that no evaluation wrote, with a ValueError."""
    try:
        record = read_json(output / FILES[-1], MOST_RECORD)
    except (OSError, ValueError):
        record = None
    entries = {"cases", "summary", "settings", "methods", "failures"}
    ours = isinstance(record, dict) and record.keys() >= entries
    refuse_foreign(output, FILES, ours=ours, maker="an evaluation")


def evaluate_volumes(volumes: Iterable[CaseVolumes], *, name: str = PROPOSED, **how: Any) -> Evaluation:
    """Evaluate cases of one method one after another, holding one in memory where `volumes` is an iterator.

    Parameters
    ----------
    volumes : iterable of CaseVolumes
        At least one; names differ.
    name, **how
        ``healthy_threshold``, ``control_voxels``, ``oracle`` and ``pictures`` of `EvaluateConfig`.

    Raises
    ------
    ValueError
        No case, a repeated name, or an unfit volume; the message names the case.
    """
    evaluation = Evaluation(names=(name,), **how)
    for v in volumes:
        if v.case in evaluation.scores:
            raise ValueError(f"cases must have different names, got {v.case!r} twice")
        try:
            evaluation.add(v)
        except (TypeError, ValueError) as error:
            raise type(error)(f"case {v.case!r}: {error}") from error
    if not evaluation.scores:
        raise ValueError("there must be at least one case, got none")
    return evaluation


Maps = tuple[Mapping[str, Path], Record] | str
"""Maps of a case by kind, and the record that tells how they were made; or why there are none."""


def _with_record(files: Mapping[str, Path]) -> Maps:
    """Add the record beside lesions, where it is that of this file."""
    lesions = files["lesions"]
    try:
        record = read_record(lesions.with_name(f"{case_name(lesions).removesuffix('_lesions')}.json"))
        return files, record if record["files"]["lesions"] == lesions.name else {}
    except (OSError, ValueError):
        return files, {}


def _records(folder: Path) -> dict[str, Record | str]:
    """Read the records of a folder, or what is wrong with a case; nothing where another program wrote it."""
    records, problems = read_records(folder)
    found: dict[str, Record | str] = {**{record["case"]: record for record in records}, **problems}
    for path in folder.glob(f"[!.]*{MAPS['lesions']}") if found else ():
        case = path.name.removesuffix(MAPS["lesions"])
        found.setdefault(case, f"{case}.json is missing: its prediction was not finished")
    return dict(sorted(found.items()))


def _maps(folder: Path, cases: Sequence[Case], argument: str) -> dict[str, Maps]:
    """Find a method's maps of the cases in a folder, or why there are none."""
    found = _records(folder)
    if not found:
        files, problems = match(folder, cases, argument)
        return {**problems, **{case: _with_record({"lesions": path}) for case, path in files.items()}}
    if not any(case.case in found for case in cases):
        there = some_of(", ", list(map(name_of, found)))
        raise ValueError(f"{argument} must hold maps of the same cases, got {there} in {name_of(folder)}")
    maps: dict[str, Maps] = {case: text for case, text in found.items() if isinstance(text, str)}
    for case, record in found.items():
        if not isinstance(record, str):
            maps[case] = {kind: folder / file for kind, file in record["files"].items() if file}, record
    return maps


def _predicted(folder: Path, ct: Sequence[Path]) -> Found[Case]:
    """Make cases of the records in a folder, their CT where they are now; or one for each CT."""
    found = _records(folder)
    if not found:
        if not ct:
            raise ValueError(f"ct must be given for maps without <case>.json, as in {name_of(folder)}")
        return find_cases(ct)
    records = {case: record for case, record in found.items() if not isinstance(record, str)}
    places = locate(list(records.values()), ct)
    at, cases = dict(zip(records, places, strict=True)), []
    for case, problem in found.items():
        if case not in at:
            cases.append(Case(case=case, ct=folder, problem=str(problem)))
            continue
        path, series = at[case].path, at[case].series
        lost = "" if path.exists() else f"{name_of(path)}: no such file or folder; {at[case].hint}"
        cases.append(Case(case=case, ct=path, series=series, files=() if series else (path,), problem=lost))
    return Found(cases, places.passed)


def _find(config: EvaluateConfig) -> tuple[Found[Case], dict[str, dict[str, Maps]]]:
    """Find the cases, and each method's maps of them."""
    maps: dict[str, dict[str, Maps]] = {config.name: {}}
    if config.cases is not None:
        needed = ("lesions",) if config.predictions else ("lesions", "prediction")
        cases = Found(read_table(config.cases, columns=tuple(COLUMNS), needed=needed))
    else:
        assert config.predictions is not None
        cases = _predicted(config.predictions, config.ct)
    for argument, role, folder in (("truth", "lesions", config.truth), ("masks", "lungs", config.masks)):
        found, problems = ({}, {}) if folder is None else match(folder, cases, argument)
        for number, case in enumerate(cases if folder else ()):
            more: dict[str, Any] = {role: found.get(case.case)}
            cases[number] = replace(case, problem=case.problem or problems.get(case.case, ""), **more)
    if config.predictions is not None:
        maps[config.name] = _maps(config.predictions, cases, "predictions")
    else:
        given = {c.case: {COLUMNS[name]: path for name, path in c.more.items()} for c in cases}
        maps[config.name] = {case: _with_record(files) for case, files in given.items()}
    return cases, maps | {name: _maps(Path(folder), cases, "compare") for name, folder in config.compared}


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Find, read, evaluate, and write results.

    Parameters
    ----------
    config : EvaluateConfig
        Files and settings.

    Returns
    -------
    Evaluation
        A case whose files are broken is among its failures and does not stop the others.

    Raises
    ------
    FileNotFoundError, ValueError
        See `normnet.cases`; no file fits any case; `lungs` is needed, and is no method and no weights.
    ImportError
        `lungs` is "lungmask", which is needed and not installed.
    """
    check_output(config.output)
    if config.cases is not None and same_file(config.cases, config.output / "cases.csv"):
        raise ValueError(f"output must not replace an input, got {config.output} for {config.cases}")
    cases, maps = _find(config)
    # the lungs that the prediction used, where none are given
    used = {case: m[0].get("lung") for case, m in maps[config.name].items() if not isinstance(m, str)}
    own = any(not (case.problem or case.lungs or used.get(case.case)) for case in cases)
    if own:
        method_of(config.lungs)  # before any case fails of it
    names = tuple(case.case for case in cases)
    evaluation = Evaluation(
        names=tuple(maps),
        **{name: getattr(config, name) for name in SHARED},
        asked={
            "label": config.label,
            "lung_label": config.lung_label,
            "lungs": method_record(config.lungs) if own else None,
            "compare": dict(config.compared),
        },
        # masks and maps of these cases among their CT are no news
        passed=[one for one in cases.passed if one.named or not case_name(one.path).startswith(names)],
    )
    for case in cases:
        with hear() as said:
            own_maps = {n: m.get(case.case, "there is no lesion map of this case") for n, m in maps.items()}
            _score(case, used.get(case.case), own_maps, config, evaluation)
        evaluation.warnings[case.case] = said
    evaluation.write(config.output)
    return evaluation


def _score(
    case: Case, used: Path | None, maps: Mapping[str, Maps], config: EvaluateConfig, evaluation: Evaluation
) -> None:
    """Score one case by every method; what goes wrong with it is told and not raised."""
    first, lungs, notes = maps[config.name], case.lungs or used, tuple[str, ...]()
    try:
        if case.problem or case.lesions is None:
            raise ValueError(case.problem)
        if case.lungs and same_file(case.lungs, case.lesions) and {*config.label} == {*config.lung_label}:
            raise ValueError(f"{name_of(case.lesions)}: labels must tell truth and lungs of one file apart")
        # of several series the one that was predicted
        recorded = None if isinstance(first, str) or not case.series else first[1].get("series")
        ct = read_ct(case.ct, recorded or case.series)
        truth = read_mask(case.lesions, ct, config.label)
        if lungs is not None:
            lung_mask = read_mask(lungs, ct, config.lung_label if case.lungs else ())
        else:
            sides = method_of(config.lungs)(ct.hu, ct.spacing)
            lung_mask = sides.right | sides.left
            check_plausible(ct.hu, lung_mask, ct.spacing, sides.left)
            notes = (f"lungs {lungs_told(method_record(config.lungs))}: none were given",)
    except Exception as error:  # whatever is wrong with one patient, the others are not to wait
        evaluation.failures.append(Failure(case.case, None, reason(None, error)))
        return
    for name, found in maps.items():
        try:
            if isinstance(found, str):
                raise ValueError(found)
            files, record = found
            if same_file(files["lesions"], case.lesions):
                raise ValueError(f"{name_of(case.lesions)}: must not be both the truth and the prediction")
            masks = {kind: read_mask(files[kind], ct) for kind in ("healthy", "core") if kind in files}
            volumes = CaseVolumes(
                case=case.case,
                hu=ct.hu,
                prediction=read_mask(files["lesions"], ct),
                truth=truth,
                lung_mask=lung_mask,
                probability=read_map(files["probability"], ct) if "probability" in files else None,
                spacing=ct.spacing,
                origin=origin_of(record),
                notes=notes,
                **masks,
            )
            evaluation.add(volumes, name)
        except Exception as error:
            evaluation.failures.append(Failure(case.case, name, reason(None, error)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    import tyro

    def body() -> int:
        config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m normnet.evaluate")
        with plainly():
            evaluation = evaluate(config)
        print(as_text(evaluation.table()))
        for table in evaluation.tables(paper=False):
            if table.title.startswith(("Table II", "Oracle")):
                print(f"\n{table.title}\n{as_text(table.frame)}")
        print(f"report: {name_of(config.output / 'report.html')}")
        named = tell(evaluation.warnings, evaluation.passed)
        for case, method, why in evaluation.failures:
            print(printable(f"error: {case}{f' ({method})' if method else ''}: {why}"), file=sys.stderr)
        return 1 if evaluation.failures or named else 0

    return run("error", body, wrong=(OSError, TypeError, ValueError, ImportError))


if __name__ == "__main__":
    raise SystemExit(main())
