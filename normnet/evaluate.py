"""Evaluate predictions: PAPER.md Tables II and III per volume and over volumes, as CSV, JSON, Markdown, HTML.

``python -m normnet.evaluate --predictions OUT --truth DIR --ct DIR --lungs DIR --output RESULTS`` pairs files
by the names of their cases (see `normnet.pairing`); ``--cases cases.csv`` lists them instead. ``--compare
VAE=OUT2`` sets other methods' maps of the same cases beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lesionsynth.commands import plainly, printable, run
from lesionsynth.files import same_file
from lesionsynth.io import Found, Scan, read_ct, read_map, read_mask
from lesionsynth.strict import name_of
from normnet.cases import hear, reason, tell
from normnet.metrics import (
    CONTROL_VOXELS,
    HEALTHY_THRESHOLD,
    CaseScores,
    evaluate_case,
    percent,
    roc_auc,
    summarise,
)
from normnet.origin import read_origin
from normnet.pairing import CaseFiles, find_cases, read_table, with_predictions
from normnet.prepare.case import LungMethod, method_of, method_record
from normnet.prepare.lungs import check_plausible
from normnet.prepare.morphology import Mask
from normnet.report import lungs_told
from normnet.results import Evaluation, Failure, check_output
from normnet.scoring import WITHOUT_GROWING, CaseVolumes, MethodScores, Rules
from normnet.tables import bright_grid, plain_table, scores_grid

__all__ = [
    "CaseScores",
    "CaseVolumes",
    "EvaluateConfig",
    "Evaluation",
    "Failure",
    "MethodScores",
    "evaluate",
    "evaluate_case",
    "evaluate_volumes",
    "load_case",
    "roc_auc",
    "summarise",
]

Array = npt.NDArray[Any]
OWN_LUNGS = "lungs {}: none were given"
"""Note of a case whose lungs are segmented here; it says how."""
PROPOSED = "Proposed"
"""What the paper's Table III calls its own method."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare predicted lesions with annotated ones.

    Exit status: 0 when every case is evaluated, 1 when some failed or a file that was named was passed over
    (the others are), 2 for a wrong call.
    """

    output: Path
    """Folder for cases.csv, results.json, tables.md and report.html."""
    predictions: tuple[Path, ...] = ()
    """What `normnet.predict` wrote: lesion maps with their probabilities and lungs, or folders of them."""
    truth: tuple[Path, ...] = ()
    """Annotated lesions, or folders of them."""
    ct: tuple[Path, ...] = ()
    """The CT volumes: what `normnet.predict` was given, files, DICOM folders, or folders of these at any
    depth."""
    lungs: tuple[Path, ...] = ()
    """Lung masks including lesions, or folders of them; those the prediction used where omitted."""
    segment: LungMethod = "network"
    """How lungs are segmented where there are neither given ones nor the prediction's: network, that of this
    package; classical, thresholds and morphology; lungmask, the network of that package, if installed; or
    weights of your own (normnet.train --task lungs)."""
    label: tuple[int, ...] = ()
    """Labels of the truth that are lesions; all above zero where omitted."""
    lung_label: tuple[int, ...] = ()
    """Labels of the given lungs that are lungs; all above zero where omitted."""
    cases: Path | None = None
    """CSV with columns case, ct, lesion, prediction and, if any, lung, probability, core, healthy; replaces
    the above."""
    compare: tuple[str, ...] = ()
    """NAME=FOLDER: other methods' maps of the same cases, a row each in Tables II and III."""
    name: str = PROPOSED
    """What the tables call the method of `predictions`."""
    healthy_threshold: float = HEALTHY_THRESHOLD
    """Table II calls a voxel healthy where its probability exceeds this (IV-B), unless the predictions have
    <case>_healthy maps: the vote that `normnet.predict --save-probability` writes."""
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
        if self.lung_label and not (self.lungs or self.cases):
            raise ValueError("lung_label must be omitted where neither lungs nor cases are given")
        if not 0 <= self.healthy_threshold <= 1:
            raise ValueError(f"healthy_threshold must lie in [0, 1], got {self.healthy_threshold}")
        if self.control_voxels < 0 or self.pictures < 0:
            raise ValueError(
                f"control_voxels and pictures must be >= 0, got {self.control_voxels} and {self.pictures}"
            )
        taken = [self.name, f"{self.name} {WITHOUT_GROWING}"]
        for text in self.compare:
            name, equals, folder = (part.strip() for part in text.partition("="))
            if not (name and equals and folder):
                raise ValueError(f"compare must be NAME=FOLDER, got {text!r}")
            if name in taken:
                raise ValueError(f"compare must give every method a name of its own, got {name!r} again")
            taken.append(name)

    @property
    def compared(self) -> dict[str, Path]:
        """Folders of the other methods, by name."""
        return {name.strip(): Path(path.strip()) for name, path in (t.split("=", 1) for t in self.compare)}


def _open(
    case: CaseFiles, label: Sequence[int], lung_label: Sequence[int], segment: LungMethod
) -> Callable[[CaseFiles], CaseVolumes]:
    """Read what all methods share of one case; the function returned adds the maps of one."""
    if case.lung and same_file(case.lung, case.lesion) and set(label) == set(lung_label):
        raise ValueError(f"{name_of(case.lesion)}: labels must tell truth and lungs of one file apart")
    ct = read_ct(case.ct, case.series)
    truth = read_mask(case.lesion, ct, label)
    if case.lung:
        lungs, note = read_mask(case.lung, ct, lung_label), None
    else:
        lungs, note = _segmented(ct, segment), OWN_LUNGS.format(lungs_told(method_record(segment)))

    def with_maps(files: CaseFiles) -> CaseVolumes:
        if same_file(files.prediction, case.lesion):
            raise ValueError(f"{name_of(case.lesion)}: must not be both the truth and the prediction")
        return CaseVolumes(
            case=files.case,
            hu=ct.hu,
            prediction=read_mask(files.prediction, ct),
            truth=truth,
            lung_mask=lungs,
            probability=None if files.probability is None else read_map(files.probability, ct),
            spacing=ct.spacing,
            healthy=None if files.healthy is None else read_mask(files.healthy, ct),
            core=None if files.core is None else read_mask(files.core, ct),
            origin=read_origin(files.prediction),
            notes=() if note is None else (note,),
        )

    return with_maps


def _segmented(ct: Scan, segment: LungMethod) -> Mask:
    found = method_of(segment)(ct.hu, ct.spacing)
    lungs = found.right | found.left
    check_plausible(ct.hu, lungs, ct.spacing, found.left)
    return lungs


def load_case(
    files: CaseFiles,
    label: Sequence[int] = (),
    lung_label: Sequence[int] = (),
    *,
    segment: LungMethod = "network",
) -> CaseVolumes:
    """Read a case's files; everything must lie on the CT's grid.

    Parameters
    ----------
    files : CaseFiles
    label, lung_label : sequence of int
        See `EvaluateConfig`.
    segment : str
        How lungs are segmented where `files` has none; see `EvaluateConfig`.

    Raises
    ------
    FileNotFoundError, ValueError
        A file is missing, unreadable or on another grid, and the message names it; no lungs are found;
        `segment` is no method, and no weights.
    ImportError
        `segment` is "lungmask", which is needed and not installed.
    """
    return _open(files, label, lung_label, segment)(files)


def evaluate_volumes(
    volumes: Iterator[CaseVolumes] | Sequence[CaseVolumes],
    *,
    name: str = PROPOSED,
    healthy_threshold: float = HEALTHY_THRESHOLD,
    control_voxels: int = CONTROL_VOXELS,
    oracle: bool = False,
    pictures: int = 3,
) -> Evaluation:
    """Evaluate cases of one method one after another, holding one in memory where `volumes` is an iterator.

    Parameters
    ----------
    volumes : iterator or sequence of CaseVolumes
        At least one; names differ.
    name, healthy_threshold, control_voxels, oracle, pictures
        See `EvaluateConfig`.

    Returns
    -------
    Evaluation
        Those of several methods become one as ``Evaluation(methods=(*a.methods, *b.methods))``.

    Raises
    ------
    ValueError
        No case, a repeated name, or an unfit volume; the message names the case.
    """
    rules = Rules(
        healthy_threshold=healthy_threshold, control_voxels=control_voxels, oracle=oracle, pictures=pictures
    )
    method = MethodScores(name=name, rules=rules)
    for v in volumes:
        if v.case in method.scores:
            raise ValueError(f"cases must have different names, got {v.case!r} twice")
        try:
            method.add(v)
        except (TypeError, ValueError) as error:
            raise type(error)(f"case {v.case!r}: {error}") from error
    if not method.scores:
        raise ValueError("there must be at least one case, got none")
    return Evaluation(methods=(method,), settings=_settings(rules))


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Pair, read, evaluate, and write results.

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
        See `find_cases`, `read_table` and `with_predictions`; ``segment`` is needed, and is no method and no
        weights.
    ImportError
        ``segment`` is "lungmask", which is needed and not installed.
    """
    check_output(config.output)
    if config.cases is not None:
        if same_file(config.cases, config.output / "cases.csv"):
            raise ValueError(f"output must not replace an input, got {config.output} for {config.cases}")
        files = Found(read_table(config.cases))
    else:
        files = find_cases(
            predictions=config.predictions, truth=config.truth, ct=config.ct, lungs=config.lungs
        )
    own = any(case.lung is None for case in files)
    if own:
        try:
            method_of(config.segment)  # before any case fails of it
        except ValueError as error:
            raise ValueError(f"segment: {error}") from error
    tables = {config.name: {f.case: f for f in files}}
    tables |= {name: with_predictions(files, folder) for name, folder in config.compared.items()}
    rules = Rules(
        healthy_threshold=config.healthy_threshold,
        control_voxels=config.control_voxels,
        oracle=config.oracle,
        pictures=config.pictures,
    )
    # overlays of the first method alone: a page with those of ten is too large to open
    methods = {
        name: MethodScores(name=name, rules=rules if name == config.name else replace(rules, pictures=0))
        for name in tables
    }
    failures: list[Failure] = []
    warned: dict[str, list[str]] = {}
    for case in files:
        maps = {methods[name]: table.get(case.case) for name, table in tables.items()}
        with hear() as warned[case.case]:
            failures += _score(case, maps, config)
        for method in methods.values():
            if case.case in method.scores:
                method.scores[case.case]["notes"] += warned[case.case]
    asked = {
        "label": config.label,
        "lung_label": config.lung_label,
        "segment": method_record(config.segment) if own else None,
    }
    evaluation = Evaluation(
        methods=tuple(methods.values()),
        failures=tuple(failures),
        warnings=warned,
        passed=files.passed,
        settings={**_settings(rules), **asked, "compare": {n: str(p) for n, p in config.compared.items()}},
    )
    evaluation.write(config.output)
    return evaluation


def _score(
    case: CaseFiles, maps: Mapping[MethodScores, CaseFiles | None], config: EvaluateConfig
) -> list[Failure]:
    """Score one case by every method; what goes wrong with it is told and not raised."""
    failures = []
    try:
        with_maps = _open(case, config.label, config.lung_label, config.segment)
    except Exception as error:  # whatever is wrong with one patient, the others are not to wait
        return [Failure(case.case, None, reason(None, error))]
    for method, files in maps.items():
        try:
            if files is None:
                raise ValueError("there is no lesion map of this case")
            method.add(with_maps(files))
        except Exception as error:
            failures.append(Failure(case.case, method.name, reason(None, error)))
    return failures


def _settings(rules: Rules) -> dict[str, Any]:
    return {"healthy_threshold": rules.healthy_threshold, "control_voxels": rules.control_voxels}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    import tyro

    def body() -> int:
        config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m normnet.evaluate")
        with plainly():
            evaluation = evaluate(config)
        print(plain_table(*evaluation.table()))
        for grid in (scores_grid(evaluation.methods), bright_grid(evaluation.methods)):
            print(f"\n{grid.title}")
            print(plain_table(grid.header, grid.rows))
        for method in evaluation.methods:
            if method.oracle is not None:
                print(
                    f"oracle, {printable(method.name)} (threshold searched on this test set, bare network "
                    f"without post-processing): DSC {percent(method.oracle['mean_dsc'])} at "
                    f"{method.oracle['threshold']:.2f}"
                )
        print(f"report: {name_of(config.output / 'report.html')}")
        named = tell(evaluation.warnings, evaluation.passed)
        for failure in evaluation.failures:
            print(f"error: {printable(str(failure))}", file=sys.stderr)
        return 1 if evaluation.failures or named else 0

    return run("error", body, wrong=(OSError, TypeError, ValueError, ImportError))


if __name__ == "__main__":
    raise SystemExit(main())
