"""Segment patients: ``python -m normnet.predict IN... --output OUT`` (PAPER.md III-A, III-D).

Each model calls a bright voxel healthy where its probability exceeds a threshold, 0.95 in the paper; the
majority of the models decides. What is bright and not healthy becomes a lesion in post-processing. Results
are written on the input's own grid.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from tqdm import tqdm

import lesionsynth as ls
from lesionsynth.io import CTVolume
from normnet.config import PAPER_THRESHOLD_HU, PredictConfig, from_json
from normnet.device import choose_device, cpu_settings
from normnet.dicom_seg import write_segmentation
from normnet.inputs import Source, find_sources
from normnet.maps import Folder, Record, Writer, as_record, model_record, volumes_of
from normnet.model import bundled_models, find_models, load_model
from normnet.pairing import split_name
from normnet.postprocess import Mask, postprocess_slices
from normnet.prepare import load_case
from normnet.prepare.case import LungMethod
from normnet.prepare.run import find_mask
from normnet.sliding import probabilities as slab_probabilities
from normnet.sliding import slide

__all__ = [
    "CasePrediction",
    "PredictArgs",
    "PredictSummary",
    "Prediction",
    "bright_threshold",
    "healthy_threshold",
    "main",
    "predict",
    "predict_case",
    "predict_volume",
    "slab_probabilities",
]


@dataclass(frozen=True)
class Prediction:
    """What `predict_volume` found, on the grid of its input (z, y, x)."""

    lesions: Mask
    """Final lesions."""
    lesions_without_growing: Mask
    """Before region growing (Table III, "w/o growing")."""
    healthy: Mask
    """Bright lung voxels that the majority of the models calls healthy."""
    probability: npt.NDArray[np.float32] | None
    """Mean healthy probability of the models; 0 outside the lung. None where it was not asked for."""


def predict_volume(
    hu: Any,
    lung_mask: Any,
    models: Sequence[torch.nn.Module],
    config: PredictConfig,
    *,
    device: str = "auto",
    keep_probability: bool = True,
) -> Prediction:
    """Segment one volume.

    Parameters
    ----------
    hu : (z, y, x) array
        Hounsfield units on the training grid, 1.0 x 0.8 x 0.8 mm.
    lung_mask : (z, y, x) bool array
        Lungs, lesions included.
    models : sequence of torch.nn.Module
        From `normnet.model.load_model`.
    config : PredictConfig
        Threshold, slabs, tiles and post-processing.
    device : str
        Where the networks run; "auto" takes CUDA where there is some.
    keep_probability : bool
        Also return the mean probability, four bytes a voxel.

    Returns
    -------
    Prediction

    Raises
    ------
    ValueError
        Shapes differ, the mask is empty, there is no model, or slab or tile do not fit the models.

    Notes
    -----
    Memory: the results, and for each model the probabilities of one slab; see `normnet.sliding.slide`. The
    networks see the lungs' bounding box, zero around it as in training; a volume shorter than a slab is
    padded with empty slices.
    """
    volume, mask = np.asarray(hu), np.asarray(lung_mask, dtype=np.bool_)
    if volume.ndim != 3 or volume.shape != mask.shape:
        shapes = f"{volume.shape} and {mask.shape}"
        raise ValueError(f"hu and lung_mask must be (z, y, x) and alike, got shapes {shapes}")
    if not mask.any():
        raise ValueError("lung_mask must contain at least one voxel, got an empty mask")
    if not models:
        raise ValueError("models must hold at least one network, got none")
    where = choose_device(device)
    levels = torch.tensor([healthy_threshold(model, config) for model in models], device=where)
    level = bright_threshold(models, config)
    settings, tau = replace(config.postprocess, threshold_hu=level), np.float32(ls.threshold(level))
    healthy = np.zeros(mask.shape, dtype=np.bool_)
    mean = np.zeros(mask.shape, dtype=np.float32) if keep_probability else None
    plane = _lung_box(mask)

    def read(first: int, last: int) -> npt.NDArray[np.float32]:
        image: npt.NDArray[np.float32] = ls.window_hu(volume[first:last])
        image *= mask[first:last]
        return image

    def read_lungs(first: int, last: int) -> npt.NDArray[np.float32]:
        return read(first, last)[:, *plane]

    for first, chances in slide(read_lungs, mask[:, *plane], models, config, where):
        last = first + chances.shape[1]
        part = (slice(first, last), *plane)
        votes = (chances > levels[:, None, None, None]).sum(dim=0)
        majority = (2 * votes > len(models)).cpu().numpy()
        healthy[part] = majority & (read_lungs(first, last) >= tau) & mask[part]
        if mean is not None:
            mean[part] = np.where(mask[part], chances.mean(dim=0).cpu().numpy(), 0)
    lesions = postprocess_slices(read, mask, healthy, settings)
    return Prediction(lesions.final, lesions.core, healthy, mean)


def bright_threshold(models: Sequence[torch.nn.Module], config: PredictConfig) -> float:
    """Return T in HU, at or above which voxels are bright: the models' own unless `config` has another.

    Raises
    ------
    ValueError
        The models were trained with different T, and `config` has none.
    """
    if config.postprocess.threshold_hu is not None:
        return config.postprocess.threshold_hu
    levels = {float(getattr(model, "threshold_hu", PAPER_THRESHOLD_HU)) for model in models}
    if len(levels) > 1:
        shown = ", ".join(f"{level:g}" for level in sorted(levels))
        raise ValueError(
            f"models must have one threshold_hu unless postprocess.threshold_hu is given, got {shown}"
        )
    return levels.pop()


def healthy_threshold(model: torch.nn.Module, config: PredictConfig) -> float:
    """Return the probability above which a voxel is healthy for `model`.

    Raises
    ------
    ValueError
        It shall be calibrated, and the model is not.
    """
    if not isinstance(config.probability, str):
        return config.probability
    calibration: Any = getattr(model, "calibration", None)
    if not calibration:
        raise ValueError("probability: this model carries no calibration (trained without held-out volumes)")
    return float(calibration["probability"])


@dataclass(frozen=True, eq=False)
class CasePrediction:
    """What `predict_case` found, on the CT's own grid (z, y, x)."""

    lesions: Mask
    """Final lesions."""
    core: Mask
    """Before region growing."""
    lung: Mask
    """The lungs that were searched."""
    probability: npt.NDArray[np.float32] | None
    """Mean healthy probability, 0 outside the lung. None where it was not asked for."""
    healthy: Mask | None
    """Bright lung voxels that the majority of the models calls healthy; the mean cannot tell (Table II). None
    where the probability was not asked for."""
    volumes: dict[str, float | None]
    """Lungs and lesions in ml and percent, see `normnet.maps.volumes_of`."""
    ct: CTVolume
    """The CT; ``ct.write_like(lesions, "lesions.nii.gz")`` writes a map."""


def predict_case(
    path: str | os.PathLike[str],
    models: Sequence[torch.nn.Module],
    config: PredictConfig | None = None,
    *,
    mask_path: str | os.PathLike[str] | None = None,
    series: str | None = None,
    lungs: LungMethod = "thresholds",
    device: str = "auto",
    keep_probability: bool = True,
) -> CasePrediction:
    """Segment one CT file or DICOM folder.

    Parameters
    ----------
    path : path
        What `lesionsynth.io.read_ct` reads.
    models : sequence of torch.nn.Module
        From `normnet.model.load_model`.
    config : PredictConfig, optional
        The paper's where omitted.
    mask_path : path, optional
        Lung mask on the CT's grid; the lungs are segmented where it is omitted.
    series : str, optional
        SeriesInstanceUID, in a DICOM folder with several.
    lungs : {"thresholds", "lungmask"}
        How lungs are segmented.
    device : str
        As in `predict_volume`.
    keep_probability : bool
        Also return the mean probability and the voxels called healthy.

    Returns
    -------
    CasePrediction

    Raises
    ------
    FileNotFoundError, ValueError
        As `normnet.prepare.load_case` and `predict_volume`.
    """
    loaded = load_case(path, mask_path, series=series, lungs=lungs)
    native, lung = loaded.to_native, loaded.native_mask
    found = predict_volume(
        loaded.hu,
        loaded.mask,
        models,
        config or PredictConfig(),
        device=device,
        keep_probability=keep_probability,
    )
    masks = {"lesions": found.lesions, "core": found.lesions_without_growing}
    if keep_probability:
        masks["healthy"] = found.healthy
    chances = found.probability
    # each map of the working grid is let go once it lies on the CT's: both together would be the peak
    del found
    on_ct: dict[str, Mask] = {}
    for name in tuple(masks):
        on_ct[name] = native(masks.pop(name))
        on_ct[name] &= lung
    volumes = volumes_of(on_ct["lesions"], lung, loaded.volume.spacing, loaded.native_sides)
    probability = None
    if chances is not None:
        probability = native(chances)
        probability[~lung] = 0
    return CasePrediction(
        on_ct["lesions"], on_ct["core"], lung, probability, on_ct.get("healthy"), volumes, loaded.volume
    )


@dataclass(frozen=True, kw_only=True)
class PredictArgs:
    """Segment CT volumes with trained models.

    Exit status: 0 when every case is done, 1 when some failed (the others are written), 2 for a wrong call.
    A call that was interrupted goes on where it stopped when it is given again.
    """

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """NIfTI, NRRD or MetaImage files, DICOM folders, and folders of these."""
    output: Path = Path("predictions")
    """Folder for <case>_lesions.nii.gz, <case>_lung.nii.gz, <case>.json and volumes.csv."""
    models: tuple[Path, ...] = ()
    """Run folders or weights files; several vote. Those that ship with the package where omitted."""
    series: str = "largest"
    """DICOM series to read: the "largest" of a folder, "all", or a SeriesInstanceUID."""
    name: tuple[str, ...] = ()
    """Case names, one per CT; file names where omitted."""
    masks: Path | None = None
    """Lung mask, or folder with a <case>_lung file per case; segmented where omitted."""
    lungs: LungMethod = "thresholds"
    """How lungs are segmented: by thresholds and morphology, or by the lungmask package."""
    save_probability: bool = False
    """Also write <case>_probability.nii.gz, the mean healthy probability, 0 outside the lung, and
    <case>_healthy.nii.gz, the bright voxels that the models' vote calls healthy: what Table II needs."""
    save_core: bool = False
    """Also write <case>_core.nii.gz: the lesions before region growing."""
    dicom_seg: bool = False
    """Also write <case>_lesions.dcm, a DICOM Segmentation of lungs and lesions; for DICOM input."""
    overwrite: bool = False
    """Replace results of other settings, models or CTs."""
    config: Path | None = None
    """Settings as JSON: a PredictConfig, or the settings.json or <case>.json of an earlier call. Flags
    override them."""
    device: str = "auto"
    """"auto" takes CUDA where there is some, else the CPU."""
    threads: int | None = None
    """CPU threads; all cores where omitted."""
    settings: PredictConfig = field(default_factory=PredictConfig)
    """Thresholds and post-processing; the paper's. In Python, `config` is not read: pass these."""


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
        No input, two of one name, no model, a device that is not there, or results of other settings in the
        output folder.
    FileNotFoundError
        An input does not exist.
    """
    sources = _sources(args)
    choose_device(args.device)
    files = find_models(args.models) if args.models else bundled_models()
    models = [load_model(file) for file in files]
    bright_threshold(models, args.settings)  # before any case fails of it
    records = [_record(file, model, args.settings) for file, model in zip(files, models, strict=True)]
    jobs, failures = _plan(args, sources, records)
    folder = Folder(args.output)
    folder.check({job.case: job.reads for job in jobs}, overwrite=args.overwrite)
    there, todo = [], []
    for job in jobs:
        left = job.kinds if args.overwrite else folder.missing(job.case, job.record, job.kinds)
        if left:
            todo.append(replace(job, kinds=left))
        else:
            there.append(job.case)
    written: list[str] = []
    if todo:
        folder.write_settings(args.settings, records)
    try:
        with cpu_settings(args.threads):
            for job in tqdm(todo, disable=not progress_bar, unit="case", desc="predict"):
                try:
                    _run(args, job, models, folder)
                    written.append(job.case)
                except Exception as error:  # whatever is wrong with one patient, the others are not to wait
                    failures[job.case] = _reason(job.path, error)
    finally:
        if args.output.is_dir():
            folder.write_table()
    return PredictSummary(written, there, failures)


@dataclass(frozen=True)
class _Job:
    """A case to segment."""

    case: str
    path: Path
    series: str | None
    mask: Path | None
    record: Record
    """What is known of its record beforehand; see `normnet.maps.SAME`."""
    kinds: tuple[str, ...]
    """Files to write, of `normnet.maps.FILES`."""

    @property
    def reads(self) -> list[Path]:
        """Files that must not be written over."""
        return [path for path in (self.path, self.mask) if path is not None]


def _record(file: Path, model: torch.nn.Module, config: PredictConfig) -> Record:
    try:
        return model_record(file, healthy_threshold(model, config), bright_threshold([model], config))
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
        except ValueError as error:
            failures[source.case] = _reason(source.path, error)
            continue
        record = {
            "case": source.case,
            "ct": os.path.abspath(source.path),
            "series": source.series,
            "lungs_from": args.lungs if mask is None else os.path.abspath(mask),
            "settings": as_record(args.settings),
            "models": list(models),
        }
        jobs.append(_Job(source.case, source.path, source.series, mask, record, kinds))
    return jobs, failures


def _run(args: PredictArgs, job: _Job, models: Sequence[torch.nn.Module], folder: Folder) -> None:
    """Segment a case and write it."""
    start = time.perf_counter()
    found = predict_case(
        job.path,
        models,
        args.settings,
        mask_path=job.mask,
        series=job.series,
        lungs=args.lungs,
        device=args.device,
        keep_probability="probability" in job.kinds,
    )
    record = {
        **job.record,
        "grid": {"shape": list(found.lung.shape), "spacing": [float(s) for s in found.ct.spacing]},
        "volumes": found.volumes,
        "seconds": round(time.perf_counter() - start, 2),
        "version": ls.__version__,
    }
    folder.write(job.case, _writers(found, job), record)


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
        writers["dicom_seg"] = lambda path: write_segmentation(path, masks, job.path, series=job.series)
    return writers


def _reason(path: Path, error: Exception) -> str:
    """One line: which file, and what is wrong; the kind of an error that nobody foresaw."""
    said = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    return said if str(path) in said else f"{path}: {said}"


def _lung_box(mask: Mask) -> tuple[slice, slice]:
    """Box of the lungs in plane, over all slices."""
    rows, columns = np.flatnonzero(mask.any(axis=2).any(axis=0)), np.flatnonzero(mask.any(axis=1).any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _parse(argv: Sequence[str] | None) -> PredictArgs:
    """Read the command line; the settings of --config are the defaults of the flags."""
    given = sys.argv[1:] if argv is None else argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(given)[0].config
    default = PredictArgs(
        inputs=tyro.MISSING, settings=PredictConfig() if path is None else read_config(path)
    )
    return tyro.cli(PredictArgs, args=given, default=default, prog="normnet.predict", description=__doc__)


def read_config(path: Path) -> PredictConfig:
    """Read a PredictConfig: its JSON, or a JSON with the entry "settings", as a call writes.

    Raises
    ------
    ValueError
        The file is not readable or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"config must be a JSON file with settings, got {path}: {error}") from error
    if isinstance(record, dict) and "settings" in record:
        text = json.dumps(record["settings"])
    return from_json(PredictConfig, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all went well, 1 when an input failed, 2 for a wrong call."""
    try:
        args = _parse(argv)
        summary = predict(args, progress_bar=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"normnet.predict: {error}", file=sys.stderr)
        return 2
    for reason in summary.failures.values():
        print(f"normnet.predict: {reason}", file=sys.stderr)
    done, there = len(summary.written) + len(summary.there), len(summary.there)
    earlier = f" ({there} by an earlier call)" if there else ""
    count = done + len(summary.failures)
    print(f"{done} of {count} volumes segmented{earlier}, in {args.output}")
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
