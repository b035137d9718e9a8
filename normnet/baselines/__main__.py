"""Command line of `normnet.baselines`: train a method, or predict with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from lesionsynth.commands import plainly, run
from lesionsynth.files import sha256
from lesionsynth.strict import name_of
from normnet.baselines.methods import METHODS, PRESETS, BaselineConfig, Method
from normnet.baselines.train import baseline_file, find_lesions, load_baseline, score_volume, train_baseline
from normnet.cases import Case, CaseArgs, PredictSummary, Segmented, find_cases, run_cases
from normnet.device import cpu_settings
from normnet.output import volumes_of
from normnet.prepare import load_case
from normnet.prepare.case import check_lungs, method_record
from normnet.settings import settings

PROGRAM = "python -m normnet.baselines"
HELP = """Train a comparison method of the paper (IV-C, Table III) on healthy slices.

`python -m normnet.baselines NAME [--data STORE] [--output RUN]` trains; `python -m normnet.baselines predict
RUN IN... --output MAPS` maps anomalies, for `python -m normnet.evaluate`. Numbers in brackets are the paper's
sections; --preset paper gives its values.

Exit status: 0 when done, 1 when training failed on the way, 2 for a wrong call."""
WHOLE = 512
"""In-plane size in voxels of what a method trained on whole slices sees (PAPER.md IV-B.2)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)

    def body() -> int:
        if argv[:1] == ["predict"]:
            args = tyro.cli(BaselinePredictArgs, args=argv[1:], prog=f"{PROGRAM} predict")
            with plainly():
                summary = predict(args, progress_bar=True)
            return summary.tell("normnet.baselines", args.output)
        result = train_baseline(parse(argv), progress_bar=True)
        for phase, losses in result.losses.items():
            print(f"{phase}: {len(losses)} iterations, loss {losses[0]:.4g} to {losses[-1]:.4g}")
        print(f"{result.seconds:.0f} s; threshold {result.baseline.calibration['threshold']:.4f}")
        print(f"weights: {name_of(result.weights)}")
        return 0

    return run("normnet.baselines", body, failed=(FloatingPointError,))


@settings
class TrainArgs(BaselineConfig):
    """What the command takes: `BaselineConfig` and a preset."""

    method: Annotated[Method, tyro.conf.Positional]
    """Which of the ten detectors."""
    preset: Literal["small", "paper"] = "small"
    """Defaults of the other flags: minutes on a CPU, or the paper's."""


def parse(argv: Sequence[str]) -> BaselineConfig:
    """Read the command line of training; the preset gives the defaults that the other flags change.

    Raises
    ------
    ValueError
        A value is out of its range.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="small")
    preset = early.parse_known_args(list(argv))[0].preset
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    asks_help = "--help" in argv or "-h" in argv
    method = next((name for name in METHODS if argv and argv[0] == name), METHODS[0] if asks_help else None)
    if method is None:
        first = repr(argv[0]) if argv else "nothing"
        raise ValueError(f"NAME must come first and be predict or one of {', '.join(METHODS)}, got {first}")
    default = TrainArgs(**vars(PRESETS[preset](method)), preset=preset)
    args = tyro.cli(TrainArgs, args=list(argv), default=default, prog=PROGRAM, description=HELP)
    return BaselineConfig(**{name: value for name, value in vars(args).items() if name != "preset"})


@dataclass(frozen=True, kw_only=True)
class BaselinePredictArgs(CaseArgs):
    """Map anomalies in CT volumes with a trained baseline.

    Exit status: 0 when every case is done, 1 when some failed or a file that was named was passed over (the
    others are written), 2 for a wrong call. A call that was interrupted goes on where it stopped when it is
    given again.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of a trained baseline, or its weights file."""
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """NIfTI, NRRD or MetaImage files, DICOM folders, and folders of these; or one CSV with the columns case,
    ct and, for lung masks, lungs."""
    output: Path
    """Folder for <case>_lesions.nii.gz, <case>_probability.nii.gz, <case>_lung.nii.gz, <case>.json, which
    tells the threshold, and volumes.csv."""
    threshold: float | None = None
    """Lesion where the anomaly exceeds this; the one calibrated on healthy volumes where omitted."""


def predict(args: BaselinePredictArgs, *, progress_bar: bool = False) -> PredictSummary:
    """Map anomalies in files and write what `normnet.evaluate` reads; broken cases do not stop the others.

    Parameters
    ----------
    args : BaselinePredictArgs
    progress_bar : bool

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As `normnet.cases.find_cases`, `normnet.prepare.case.check_lungs`, `normnet.cases.run_cases`; there is
        no baseline, or a setting is out of range.
    """
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {args.threshold}")
    baseline, file = load_baseline(args.run, device=args.device), baseline_file(args.run)
    cases = find_cases(args.inputs, masks=args.masks, series=args.series, output=args.output)
    check_lungs(cases, args.lungs, args.label)
    threshold = baseline.calibration.get("threshold") if args.threshold is None else args.threshold
    size = None if baseline.config.lungs_only else WHOLE
    request = {
        "settings": {},
        "models": [{"name": file.resolve().parent.name, "sha256": sha256(file)}],
        "baseline": {
            "method": baseline.config.method,
            "threshold": threshold,
            "calibrated": args.threshold is None,
        },
    }
    kinds = ["lesions", "lung", "probability"]

    def segment(case: Case, _: Sequence[str]) -> Segmented:
        loaded = load_case(
            case.ct, case.lungs, series=case.series, lungs=args.lungs, size=size, label=args.label
        )
        anomaly = score_volume(baseline, loaded.hu, loaded.mask, spacing=loaded.spacing)
        anomaly = np.clip(loaded.to_native(anomaly), 0, 1)  # linear resampling may round beyond
        lung = loaded.native_mask
        lesions = find_lesions(baseline, anomaly, threshold) & lung
        probability = np.where(lung, 1 - anomaly, 0).astype(np.float32)
        volumes = volumes_of(lesions, lung, loaded.volume.spacing, loaded.native_sides)
        maps: list[Any] = [lesions, lung, probability]
        writers = {k: partial(loaded.volume.write_like, v) for k, v in zip(kinds, maps, strict=True)}
        return Segmented(loaded.volume, writers, volumes)

    with cpu_settings(args.threads):
        method = method_record(args.lungs)
        return run_cases(cases, args, method, request, lambda _: kinds, segment, progress_bar=progress_bar)


if __name__ == "__main__":
    sys.exit(main())
