"""Write what a baseline finds in CT files, under the names that `normnet.evaluate` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lesionsynth.files import sha256
from normnet.baselines.score import find_lesions, score_volume
from normnet.baselines.train import baseline_file, load_baseline
from normnet.cases import Case, CaseArgs, PredictSummary, Segmented, find_cases, run_cases
from normnet.device import cpu_settings
from normnet.output import volumes_of
from normnet.prepare import load_case
from normnet.prepare.case import check_lungs, method_record

WHOLE = 512
"""In-plane size in voxels of what a method trained on whole slices sees (PAPER.md IV-B.2)."""


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
    """Segment files and write the results; broken cases do not stop the others.

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

    def segment(case: Case, kinds: Sequence[str]) -> Segmented:
        loaded = load_case(
            case.ct, case.lungs, series=case.series, lungs=args.lungs, size=size, label=args.label
        )
        anomaly = score_volume(baseline, loaded.hu, loaded.mask, spacing=loaded.spacing)
        anomaly = np.clip(loaded.to_native(anomaly), 0, 1)  # linear resampling may round beyond
        lung = loaded.native_mask
        lesions = find_lesions(baseline, anomaly, threshold) & lung
        probability = np.where(lung, 1 - anomaly, 0).astype(np.float32)
        volumes = volumes_of(lesions, lung, loaded.volume.spacing, loaded.native_sides)
        maps: dict[str, Any] = {"lesions": lesions, "lung": lung, "probability": probability}
        writers = {kind: partial(loaded.volume.write_like, voxels) for kind, voxels in maps.items()}
        return Segmented(loaded.volume, writers, volumes)

    def kinds(case: Case) -> list[str]:
        return ["lesions", "lung", "probability"]

    with cpu_settings(args.threads):
        method = method_record(args.lungs)
        return run_cases(cases, args, method, request, kinds, segment, progress_bar=progress_bar)
