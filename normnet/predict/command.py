"""The command: what is to do for each case, done, and written."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

import lesionsynth as ls
from lesionsynth.commands import plainly, run
from lesionsynth.io import Found, Passed, Source, find_sources, split_name
from lesionsynth.strict import name_of
from normnet.config import PredictConfig
from normnet.device import choose_device, cpu_settings
from normnet.dicom_seg import check_segmentation, write_segmentation
from normnet.maps import Folder
from normnet.model import Model, bundled_models, find_models, naming
from normnet.predict.args import PredictArgs, parse
from normnet.predict.case import CasePrediction, predict_case
from normnet.predict.volume import bright_threshold, inflation_of
from normnet.prepare.case import method_record
from normnet.prepare.masks import check_lungs, find_mask
from normnet.reasons import hear, reason, tell
from normnet.records import Record, as_record, read_record
from normnet.stage import Writer
from normnet.stamps import stamp


@dataclass(frozen=True)
class PredictSummary:
    """What became of the cases of a call."""

    written: list[str]
    """Segmented now."""
    there: list[str]
    """Finished by an earlier call with the same settings."""
    failures: dict[str, str]
    """Why the others failed, or why cases that have their maps have no DICOM Segmentation."""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """What was warned of, by case."""
    passed: tuple[Passed, ...] = ()
    """What lay in the inputs and was not taken for a CT."""


def predict(args: PredictArgs, *, progress_bar: bool = False) -> PredictSummary:
    """Segment files and write the results.

    Parameters
    ----------
    args : PredictArgs
        What the command takes.
    progress_bar : bool
        Show one on standard error.

    Returns
    -------
    PredictSummary
        Broken cases do not stop the others.

    Raises
    ------
    ValueError
        No input, two of one name, one mask file for several CT, no model, a device that is not there, or
        results of other settings or files of others in the output folder.
    FileNotFoundError
        An input or `masks` does not exist.
    ImportError
        Lungs shall be segmented by lungmask, which is not installed.
    """
    sources = find_ct(args.inputs, args.output, series=args.series, names=args.name or None)
    check_lungs(args.masks, args.lungs, len(sources), args.label)
    choose_device(args.device)
    files = find_models(args.models) if args.models else bundled_models()
    models = [Model.load(file) for file in files]
    bright_threshold(models, args.settings)  # before any case fails of it
    inflation_of(models)
    records = [_record(file, model, args.settings) for file, model in zip(files, models, strict=True)]
    jobs, failures = _plan(args, sources, records)
    folder = Folder(args.output)
    todo, there = _left(args, folder, jobs)
    said = {case: list(read_record(args.output / f"{case}.json").get("warnings", ())) for case in there}
    written: list[str] = []
    with cpu_settings(args.threads):
        if todo:
            folder.write_settings(args.settings, records)
        try:
            for job in tqdm(todo, disable=not progress_bar, unit="case", desc="predict"):
                case = job.source.case
                try:
                    with hear() as said[case]:
                        found, seconds = _run(args, job, models)
                    problem = _write(args, job, folder, found, {"seconds": seconds, "warnings": said[case]})
                    written.append(case)
                    if problem:
                        failures[case] = problem
                except Exception as error:  # whatever is wrong with one patient, the others are not to wait
                    failures[case] = reason(job.source.path, error)
        finally:
            if args.output.is_dir():
                folder.write_table()
    return PredictSummary(written, there, failures, said, sources.passed)


@dataclass(frozen=True)
class _Job:
    """A case to segment."""

    source: Source
    mask: Path | None
    record: Record
    """What is known of its record beforehand; see `normnet.records.SAME`."""
    kinds: tuple[str, ...]
    """Files to write, of `normnet.records.FILES`."""


def _record(file: Path, model: Model, config: PredictConfig) -> Record:
    with naming(file):
        level = model.threshold(config.probability)
    return {
        "name": model.name,
        "sha256": model.sha256,
        "probability": level,
        "calibrated": (config.probability or model.probability) == "calibrated",
        "threshold_hu": bright_threshold([model], config),
        "inflation_hu": model.inflation_hu,
    }


def find_ct(
    inputs: Sequence[Path], output: Path, *, series: str, names: Sequence[str] | None = None
) -> Found[Source]:
    """Find CT as `lesionsynth.io.find_sources` does; words for a role are no part of a case's name."""
    return find_sources(
        inputs, series=series, names=names, case_of=lambda path: split_name(path)[0], output=output
    )


def _plan(
    args: PredictArgs, sources: Sequence[Source], models: Sequence[Record]
) -> tuple[list[_Job], dict[str, str]]:
    """Tell what to do for each case, and why nothing can be done for the others."""
    flags = {
        "core": args.save_core,
        "probability": args.save_probability,
        "healthy": args.save_probability,
    }
    kinds = ("lesions", "lung", *(kind for kind, wanted in flags.items() if wanted))
    lungs = None if args.masks else method_record(args.lungs)
    jobs, failures = [], {}
    for source in sources:
        try:
            mask = None if args.masks is None else find_mask(args.masks, source.case)
            record = {
                "case": source.case,
                "ct": os.path.abspath(source.path),
                "series": source.series,
                **(lungs or {"lungs_from": os.path.abspath(str(mask)), "lungs_sha256": None}),
                "label": list(args.label) or None,
                # before anything is read: what changes meanwhile is not taken for what was segmented
                "ct_stamp": stamp(source.files),
                "lungs_stamp": None if mask is None else stamp([mask]),
                "settings": as_record(args.settings),
                "models": list(models),
            }
        except (ValueError, OSError) as error:
            failures[source.case] = reason(source.path, error)
        else:
            problem = _seg_problem(source) if args.dicom_seg else ""
            if problem:
                failures[source.case] = problem
                warnings.warn(f"{source.case}: {problem}", stacklevel=3)  # hours before the end
            seg = ("dicom_seg",) if args.dicom_seg and not problem else ()
            jobs.append(_Job(source, mask, record, (*kinds, *seg)))
    return jobs, failures


def _seg_problem(source: Source) -> str:
    """Why there can be no DICOM Segmentation of a CT; empty where there can."""
    try:
        if source.series is None:
            raise ValueError("dicom_seg must be left out, as the CT is no DICOM series")
        check_segmentation(source.files)
    except (ValueError, OSError) as error:
        return f"{reason(source.path, error)}; the other files do not need it"
    return ""


def _left(args: PredictArgs, folder: Folder, jobs: Sequence[_Job]) -> tuple[list[_Job], list[str]]:
    """Tell what is left to do, and which cases are there; refuse to replace what is not to be replaced."""
    folder.check(
        {job.source.case: [*job.source.files, *([] if job.mask is None else [job.mask])] for job in jobs}
    )
    folder.check_shared()
    if args.overwrite:
        for job in jobs:
            folder.check_own(job.source.case, overwrite=True)
        return list(jobs), []
    todo, there = [], []
    for job in jobs:
        if left := folder.missing(job.source.case, job.record, job.kinds):
            todo.append(replace(job, kinds=left))
        else:
            there.append(job.source.case)
    return todo, there


def _run(args: PredictArgs, job: _Job, models: Sequence[Model]) -> tuple[CasePrediction, float]:
    """Segment a case; returns the seconds that it took, too."""
    start = time.perf_counter()
    found = predict_case(
        job.source.path,
        models,
        args.settings,
        mask_path=job.mask,
        label=args.label,
        series=job.source.series,
        lungs=args.lungs,
        device=args.device,
        keep_probability="probability" in job.kinds,
    )
    return found, round(time.perf_counter() - start, 2)


def _write(args: PredictArgs, job: _Job, folder: Folder, found: CasePrediction, more: Record) -> str:
    """Write a case; returns why it has no DICOM Segmentation, where one fails to be made."""
    record = {
        **job.record,
        "grid": {"shape": list(found.lung.shape), "spacing": [float(s) for s in found.ct.spacing]},
        "volumes": found.volumes,
        "inflation": found.inflation,
        "version": ls.__version__,
        **more,
    }
    maps: dict[str, Any] = {
        "lesions": found.lesions,
        "lung": found.lung,
        "core": found.core,
        "probability": found.probability,
        "healthy": found.healthy,
    }
    writers: dict[str, Writer] = {
        kind: partial(found.ct.write_like, maps[kind]) for kind in job.kinds if kind in maps
    }
    if found.classical is not None:
        writers["classical"] = partial(found.ct.write_like, found.classical)
    problem = ""
    if "dicom_seg" in job.kinds:
        masks = {"lung": found.lung, "lesion": found.lesions}
        seg = {"dicom_seg": lambda path: write_segmentation(path, masks, found.ct)}
        try:
            folder.write(job.source.case, {**writers, **seg}, record, overwrite=args.overwrite)
            return ""
        except OSError:
            raise
        except Exception as error:  # of the segmentation: the maps do not depend on it
            problem = f"{reason(job.source.path, error)}; the other files do not need it"
    folder.write(job.source.case, writers, record, overwrite=args.overwrite)
    return problem


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all went well, 1 when an input failed, 2 for a wrong call."""

    def body() -> int:
        args = parse(argv)
        with plainly():
            summary = predict(args, progress_bar=True)
        done, there = {*summary.written, *summary.there}, len(summary.there)
        earlier = f" ({there} by an earlier call)" if there else ""
        count = len(done | summary.failures.keys())
        print(f"{len(done)} of {count} volumes segmented{earlier}, in {name_of(args.output)}", flush=True)
        named = tell(summary.warnings, summary.passed)
        for said in summary.failures.values():
            print(f"normnet.predict: {said}", file=sys.stderr)
        return 1 if summary.failures or named else 0

    return run("normnet.predict", body)
