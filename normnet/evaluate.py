"""Evaluate predictions: PAPER.md Tables II and III per volume and over volumes, as CSV, JSON, Markdown, HTML.

``python -m normnet.evaluate --predictions MAPS --truth DIR --output RESULTS`` scores the cases of a folder
that `normnet.predict` or `normnet.baselines` wrote; ``--compare VAE=MAPS2`` sets other methods' maps of the
same cases beside them, and ``--cases cases.csv`` names files one by one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy.typing as npt
import pandas as pd
from pydantic import Field

import lesionsynth as ls
from lesionsynth.commands import plainly, printable, run
from lesionsynth.files import refuse_foreign, same_file, write_atomically
from lesionsynth.io import Found, Passed, case_name, read_ct, read_map, read_mask
from lesionsynth.strict import name_of, read_json, shown, some_of
from lesionsynth.window import HU_RANGE
from normnet import metrics
from normnet.cases import Case, find_cases, hear, locate, match, read_table, reason, tell, with_masks
from normnet.config import PAPER_THRESHOLD_HU, Share
from normnet.draw import VoxelCounts, case_pictures
from normnet.metrics import CaseScores
from normnet.output import Record, dumps, read_record, read_records, unfinished
from normnet.paper import Method, Table, as_text, oracle_table, printed, table_three, table_two, volume_table
from normnet.prepare.case import LungMethod, method_of, method_record, weights_of
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
    """Folder with lung masks including lesions, named like the truth; the prediction's where omitted."""
    lungs: LungMethod = "network"
    """How lungs are segmented where neither are there: network, that of this package; classical, thresholds
    and morphology; lungmask, that package's, if installed; or weights of normnet.train --task lungs."""
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

        TypeError and ValueError as `normnet.metrics.evaluate_case`.
        """
        first, at, (label, level, inflation) = self.names[0], self.healthy_threshold, v.origin
        method, maps = method or first, (v.prediction, v.truth, v.lung_mask)
        how: Any = {"spacing": v.spacing, "healthy_threshold": at, "control_voxels": self.control_voxels}
        scores = metrics.evaluate_case(*maps, v.hu, v.probability, healthy=v.healthy, **how)
        scores["notes"] += v.notes
        own = None if level is None else round(level * inflation, 3)
        scaled = "" if inflation == 1 else ", at one inflation"
        bright = "–" if v.probability is None else f"mean probability, fixed at {at:g}{tissue(own)}"
        row = {
            "case": v.case,
            "method": method,
            **scores,
            "threshold": label,
            "bright_threshold": bright if v.healthy is None else f"vote, {label}",
            "judges": "lung" if own is None else f"lung from {round(own)} HU{scaled}",
        }
        rows = [row]
        if method == first and v.core is not None:
            before = metrics.overlap_scores(v.core, v.truth, v.spacing)
            rows.append({**row, "method": self._before, **before})
        if method == first and self.pictures:  # a page with overlays of ten methods is too large to open
            self._slices[v.case] = case_pictures(v.hu, *maps, count=self.pictures)
        self._rows += rows
        if scores["control"]:
            return
        self.voxels[method].add(v.hu, *maps, v.probability, threshold_hu=level)
        if self.oracle and v.probability is not None:
            volumes = (v.truth, v.lung_mask, v.hu, v.probability)
            self._counts[method].append(metrics.threshold_counts(*volumes, threshold_hu=level))

    @property
    def frame(self) -> pd.DataFrame:
        """A row per method and case: scores, `LABELS`, and notes with what was warned of.

        The first method's maps before growing come in front, as in the paper, where every case has them.
        """
        kinds = get_type_hints(CaseScores)
        columns = ["case", "method", *kinds, *LABELS]
        frame = pd.DataFrame(self._rows, columns=columns, dtype=object)  # names may be no text
        frame = frame.astype({name: kind for name, kind in kinds.items() if kind in (bool, int, float)})
        warned = frame["case"].map(lambda case: self.warnings.get(case, []))
        frame["notes"] = frame.pop("notes") + warned  # the last column
        names = [self._before, *self.names]
        count = frame["method"].value_counts()
        if count.get(names[0], 0) < count.get(names[1], 0):
            frame = frame[frame["method"] != names[0]]
        return frame.sort_values("method", key=lambda column: column.map(names.index), kind="stable")

    @property
    def methods(self) -> dict[str, Method]:
        """By name, in the order of `frame`."""
        frame, found = self.frame, {}
        columns = list(CaseScores.__annotations__)
        for name in dict.fromkeys((*frame["method"], *self.names)):
            part = frame[frame["method"] == name]
            cases: Any = part.set_index("case")[columns].to_dict("index")
            searched = self.oracle and name in self._counts
            best = metrics.oracle_threshold(self._counts[name]) if searched else None
            threshold, bright, judges = (_one_label(part[label]) for label in LABELS)
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
        return volume_table(self.methods[method or self.names[0]])

    def tables(self, *, paper: bool = True) -> list[Table]:
        """Every table, in the order in which they are read; the paper's own numbers where asked for."""
        methods = self.methods
        compared = {name: methods[name] for name in self.names}
        failed = [(case, method or "all", why) for case, method, why in self.failures]
        notes = self.frame[self.frame["method"].isin(self.names)].explode("notes").dropna(subset="notes")
        whose: Any = notes.groupby(["case", "notes"], sort=False)["method"].agg(list)
        every = {len(self.names): "all"}
        noted = [(case, every.get(len(m), ", ".join(m)), note) for (case, note), m in whose.items()]
        tables = [
            Table.of("Could not be evaluated", ("case", "method", "reason"), failed),
            table_three(methods),
            table_two(compared),
            *(printed() if paper else ()),
            oracle_table(compared),
            *(Table(f"Per volume: {name} (%)", volume_table(method)) for name, method in methods.items()),
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
        frame = self.frame.drop(columns="judges")
        frame["notes"] = frame["notes"].map("; ".join)
        write_atomically(output / "cases.csv", sheet([frame.columns, *frame.itertuples(index=False)]))
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
        methods = self.methods
        pictures = [(name, *one) for name in self.names for one in self.voxels[name].pictures().items()]
        if pictures:
            page.heading("Histograms")
        for name, caption, png in pictures:
            n, threshold = methods[name].patients, methods[name].threshold
            page.picture(png, f"{name}: {caption}, n = {n}; threshold: {threshold}")
        first = self.frame[self.frame["method"] == self.names[0]].set_index("case").sort_index()
        worst = 100 * first[~first["control"]]["dsc"].sort_values(kind="stable")
        self._add_slices(page, "Worst slices first", worst.map("DSC {:.1f} %".format).to_dict())
        ml = first[first["control"]]["false_positive_ml"].sort_values(ascending=False, kind="stable")
        marked = ml.map("{:.1f} ml wrongly marked".format).to_dict()
        self._add_slices(page, "Controls: marked where there is next to no lesion", marked)

    def _add_slices(self, page: Page, heading: str, told: Mapping[Any, str]) -> None:
        """Add the overlays of cases, with what is told of each."""
        shown = [
            (f"{case} ({text}), slice {z}", png)
            for case, text in told.items()
            for z, png in self._slices.get(case, ())
        ]
        if shown:
            page.heading(heading)
            page.legend()
        for caption, png in shown:
            page.picture(png, caption, width=600)


def _one_label(labels: Iterable[str]) -> str:
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
    name, **how
        ``healthy_threshold``, ``control_voxels``, ``oracle`` and ``pictures`` of `EvaluateConfig`.

    Raises
    ------
    ValueError
        No case, a repeated name, or an unfit volume; the message names the case.
    """
    evaluation, seen = Evaluation(names=(name,), **how), set[str]()
    for v in volumes:
        if v.case in seen:
            raise ValueError(f"cases must have different names, got {v.case!r} twice")
        seen.add(v.case)
        try:
            evaluation.add(v)
        except (TypeError, ValueError) as error:
            raise type(error)(f"case {v.case!r}: {error}") from error
    if not seen:
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


def _records(folder: Path) -> tuple[list[Record], dict[str, str]]:
    """Read the records of a folder, and what is wrong with cases; nothing where another program wrote it."""
    records, problems = read_records(folder)
    if records or problems:
        for case in unfinished(folder, {*problems, *(record["case"] for record in records)}):
            problems[case] = f"{case}.json is missing: its prediction was not finished"
    return records, problems


def _maps(folder: Path, cases: Sequence[Case], argument: str) -> dict[str, Maps]:
    """Find a method's maps of the cases in a folder, or why there are none."""
    records, problems = _records(folder)
    if not (records or problems):
        files, problems = match(folder, cases, argument)
        return {**problems, **{case: _with_record({"lesions": path}) for case, path in files.items()}}
    maps: dict[str, Maps] = {**problems}
    for record in records:
        files = {kind: folder / name for kind, name in record["files"].items() if name}
        maps[record["case"]] = files, record
    if not any(case.case in maps for case in cases):
        there = some_of(", ", list(map(name_of, sorted(maps))))
        raise ValueError(f"{argument} must hold maps of the same cases, got {there} in {name_of(folder)}")
    return maps


def _predicted(folder: Path, ct: Sequence[Path]) -> Found[Case]:
    """Make cases of the records in a folder, their CT where they are now; or one for each CT."""
    records, problems = _records(folder)
    if not (records or problems):
        if not ct:
            raise ValueError(f"ct must be given for maps without <case>.json, as in {name_of(folder)}")
        return find_cases(ct)
    places = locate(records, ct)
    cases = [Case(case=case, ct=folder, problem=problem) for case, problem in problems.items()]
    for record, place in zip(records, places, strict=True):
        path, series = place.path, place.series
        lost = "" if path.exists() else f"{name_of(path)}: no such file or folder; {place.hint}"
        files = () if series else (path,)
        cases.append(Case(case=record["case"], ct=path, series=series, files=files, problem=lost))
    return Found(sorted(cases, key=lambda case: case.case), places.passed)


def _find(config: EvaluateConfig) -> tuple[Found[Case], dict[str, dict[str, Maps]]]:
    """Find the cases, and each method's maps of them."""
    if config.cases is not None:
        needed = ("lesions",) if config.predictions else ("lesions", "prediction")
        cases = Found(read_table(config.cases, columns=tuple(COLUMNS), needed=needed))
    else:
        assert config.predictions is not None
        cases = _predicted(config.predictions, config.ct)
    cases = Found(with_masks(cases, config.masks, config.truth), cases.passed)
    if config.predictions is not None:
        own = _maps(config.predictions, cases, "predictions")
    else:
        own = {c.case: _with_record({COLUMNS[name]: path for name, path in c.more.items()}) for c in cases}
    compared = {name: _maps(Path(folder), cases, "compare") for name, folder in config.compared}
    return cases, {config.name: own, **compared}


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Find, read, evaluate, and write results.

    A case whose files are broken is among the failures and does not stop the others.

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
    (method_of if own else weights_of)(config.lungs)  # before any case fails of it
    names = tuple(case.case for case in cases)
    evaluation = Evaluation(
        names=tuple(maps),
        healthy_threshold=config.healthy_threshold,
        control_voxels=config.control_voxels,
        oracle=config.oracle,
        pictures=config.pictures,
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
    except Exception as error:  # one failing case must not stop the batch
        evaluation.failures.append(Failure(case.case, None, reason(None, error)))
        return
    scan: Any = {"case": case.case, "hu": ct.hu, "spacing": ct.spacing, "notes": notes}
    scan |= {"truth": truth, "lung_mask": lung_mask}
    for name, found in maps.items():
        try:
            if isinstance(found, str):
                raise ValueError(found)
            files, record = found
            if same_file(files["lesions"], case.lesions):
                raise ValueError(f"{name_of(case.lesions)}: must not be both the truth and the prediction")
            masks: Any = {kind: read_mask(files[kind], ct) for kind in ("healthy", "core") if kind in files}
            probability = read_map(files["probability"], ct) if "probability" in files else None
            lesions, origin = read_mask(files["lesions"], ct), origin_of(record)
            volumes = CaseVolumes(**scan, **masks, prediction=lesions, probability=probability, origin=origin)
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
