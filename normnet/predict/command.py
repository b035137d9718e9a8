"""The command: what is to do for each case, done, and written."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import lesionsynth as ls
from lesionsynth.commands import run
from lesionsynth.io import Source, find_sources, split_name
from lesionsynth.strict import name_of
from normnet.config import PredictConfig
from normnet.device import choose_device, cpu_settings
from normnet.dicom_seg import write_segmentation
from normnet.maps import Folder
from normnet.model import bundled_models, find_models, load_model
from normnet.predict.args import PredictArgs, parse
from normnet.predict.case import CasePrediction, predict_case
from normnet.predict.volume import bright_threshold, healthy_threshold, inflation_of, threshold_setting
from normnet.prepare.masks import check_lungs, find_mask
from normnet.reasons import reason
from normnet.records import Record, as_record, model_record
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
    """Why the others failed."""


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
    sources = _sources(args)
    check_lungs(args.masks, args.lungs, len(sources))
    choose_device(args.device)
    files = find_models(args.models) if args.models else bundled_models()
    models = [load_model(file) for file in files]
    bright_threshold(models, args.settings)  # before any case fails of it
    inflation_of(models)
    records = [_record(file, model, args.settings) for file, model in zip(files, models, strict=True)]
    jobs, failures = _plan(args, sources, records)
    folder = Folder(args.output)
    todo, there = _left(args, folder, jobs)
    written: list[str] = []
    with cpu_settings(args.threads):
        if todo:
            folder.write_settings(args.settings, records)
        try:
            for job in tqdm(todo, disable=not progress_bar, unit="case", desc="predict"):
                try:
                    _run(args, job, models, folder)
                    written.append(job.source.case)
                except Exception as error:  # whatever is wrong with one patient, the others are not to wait
                    failures[job.source.case] = reason(job.source.path, error)
        finally:
            if args.output.is_dir():
                folder.write_table()
    return PredictSummary(written, there, failures)


@dataclass(frozen=True)
class _Job:
    """A case to segment."""

    source: Source
    mask: Path | None
    record: Record
    """What is known of its record beforehand; see `normnet.records.SAME`."""
    kinds: tuple[str, ...]
    """Files to write, of `normnet.records.FILES`."""


def _record(file: Path, model: torch.nn.Module, config: PredictConfig) -> Record:
    try:
        return model_record(
            file,
            probability=healthy_threshold(model, config),
            calibrated=threshold_setting(model, config) == "calibrated",
            threshold_hu=bright_threshold([model], config),
            inflation_hu=inflation_of([model]),
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _sources(args: PredictArgs) -> list[Source]:
    found = find_sources(
        args.inputs, series=args.series, names=args.name or None, case_of=lambda path: split_name(path)[0]
    )
    # an output folder below an input holds DICOM too: the segmentations of earlier calls
    given = {path.resolve() for path in args.inputs}
    own = {args.output.resolve()} - given
    return [source for source in found if source.path.resolve() not in own]


def _plan(
    args: PredictArgs, sources: Sequence[Source], models: Sequence[Record]
) -> tuple[list[_Job], dict[str, str]]:
    """Tell what to do for each case, and why nothing can be done for the others."""
    flags = {
        "core": args.save_core,
        "probability": args.save_probability,
        "healthy": args.save_probability,
        "dicom_seg": args.dicom_seg,
    }
    kinds = ("lesions", "lung", *(kind for kind, wanted in flags.items() if wanted))
    jobs, failures = [], {}
    for source in sources:
        try:
            if args.dicom_seg and source.series is None:
                raise ValueError("dicom_seg must be left out, as the CT is no DICOM series")
            mask = None if args.masks is None else find_mask(args.masks, source.case)
            record = {
                "case": source.case,
                "ct": os.path.abspath(source.path),
                "series": source.series,
                "lungs_from": args.lungs if mask is None else os.path.abspath(mask),
                # before anything is read: what changes meanwhile is not taken for what was segmented
                "ct_stamp": stamp(source.files),
                "lungs_stamp": None if mask is None else stamp([mask]),
                "settings": as_record(args.settings),
                "models": list(models),
            }
        except (ValueError, OSError) as error:
            failures[source.case] = reason(source.path, error)
        else:
            jobs.append(_Job(source, mask, record, kinds))
    return jobs, failures


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


def _run(args: PredictArgs, job: _Job, models: Sequence[torch.nn.Module], folder: Folder) -> None:
    """Segment a case and write it."""
    start = time.perf_counter()
    found = predict_case(
        job.source.path,
        models,
        args.settings,
        mask_path=job.mask,
        series=job.source.series,
        lungs=args.lungs,
        device=args.device,
        keep_probability="probability" in job.kinds,
    )
    record = {
        **job.record,
        "grid": {"shape": list(found.lung.shape), "spacing": [float(s) for s in found.ct.spacing]},
        "volumes": found.volumes,
        "inflation": found.inflation,
        "seconds": round(time.perf_counter() - start, 2),
        "version": ls.__version__,
    }
    folder.write(job.source.case, _writers(found, job), record, overwrite=args.overwrite)


def _writers(found: CasePrediction, job: _Job) -> Mapping[str, Writer]:
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
    if "dicom_seg" in job.kinds:
        masks = {"lung": found.lung, "lesion": found.lesions}
        writers["dicom_seg"] = lambda path: write_segmentation(
            path, masks, job.source.path, series=job.source.series
        )
    return writers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all went well, 1 when an input failed, 2 for a wrong call."""

    def body() -> int:
        args = parse(argv)
        summary = predict(args, progress_bar=True)
        for said in summary.failures.values():
            print(f"normnet.predict: {said}", file=sys.stderr)
        done, there = len(summary.written) + len(summary.there), len(summary.there)
        earlier = f" ({there} by an earlier call)" if there else ""
        count = done + len(summary.failures)
        print(f"{done} of {count} volumes segmented{earlier}, in {name_of(args.output)}")
        return 1 if summary.failures else 0

    return run("normnet.predict", body)
