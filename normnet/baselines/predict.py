"""Write what a baseline finds in CT files, under the names that `normnet.evaluate` reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from lesionsynth.commands import printable
from lesionsynth.io import Source
from normnet.baselines.base import Baseline
from normnet.baselines.score import find_lesions, score_volume
from normnet.baselines.train import load_baseline
from normnet.device import cpu_settings
from normnet.maps import Folder
from normnet.predict.command import PredictSummary, find_ct
from normnet.prepare import load_case
from normnet.prepare.case import LungMethod
from normnet.prepare.masks import check_lungs, find_mask
from normnet.reasons import hear, reason
from normnet.records import baseline_maker

WHOLE = 512
"""In-plane size in voxels of what a method trained on whole slices sees (PAPER.md IV-B.2)."""


@dataclass(frozen=True, kw_only=True)
class BaselinePredictArgs:
    """Map anomalies in CT volumes with a trained baseline.

    Exit status: 0 when every case is done, 1 when some failed or a file that was named was passed over (the
    others are written), 2 for a wrong call.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of a trained baseline, or its weights file."""
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """NIfTI, NRRD or MetaImage files, DICOM folders, and folders of these."""
    output: Path
    """Folder for <case>_lesions.nii.gz, <case>_probability.nii.gz, <case>_lung.nii.gz and <case>.json, which
    tells the threshold."""
    masks: Path | None = None
    """Lung mask of a single CT, or folder with a <case>_lung file per case; segmented where omitted."""
    label: tuple[int, ...] = ()
    """Labels of the masks that are lung; all above zero where omitted."""
    lungs: LungMethod = "network"
    """How lungs are segmented; see `normnet.predict`."""
    series: str = "largest"
    """DICOM series to read: the "largest" of a folder, "all", or a SeriesInstanceUID."""
    threshold: float | None = None
    """Lesion where the anomaly exceeds this; the one calibrated on healthy volumes where omitted."""
    overwrite: bool = False
    """Replace maps of another method or of normnet.predict. Files that no call wrote stay."""
    device: str = "auto"
    """"auto" takes CUDA where there is some, else the CPU."""
    threads: int | None = None
    """CPU threads; all cores where omitted."""


def predict(args: BaselinePredictArgs, say: Callable[[str], None] = print) -> PredictSummary:
    """Segment files and write the results.

    Parameters
    ----------
    args : BaselinePredictArgs
        What the command takes.
    say : callable
        Takes a line for each case that is done.

    Returns
    -------
    PredictSummary
        Broken cases do not stop the others.

    Raises
    ------
    ValueError
        No input, two of one name, one mask file for several CT, no baseline, a setting out of range, or maps
        of another method or files of others in the output folder.
    FileNotFoundError
        An input or `masks` does not exist.
    ImportError
        Lungs shall be segmented by lungmask, which is not installed.
    """
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {args.threshold}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads must be >= 1, got {args.threads}")
    baseline = load_baseline(args.run, device=args.device)
    sources = find_ct(args.inputs, args.output, series=args.series)
    check_lungs(args.masks, args.lungs, len(sources), args.label)
    failures: dict[str, str] = {}
    masks: dict[str, Path | None] = {}
    for source in sources:
        try:
            masks[source.case] = None if args.masks is None else find_mask(args.masks, source.case)
        except ValueError as error:
            failures[source.case] = reason(source.path, error)
    folder = Folder(args.output, baseline_maker(baseline.config.method))
    found = [source for source in sources if source.case in masks]
    folder.check({s.case: [*s.files, *([] if (m := masks[s.case]) is None else [m])] for s in found})
    for source in found:
        folder.check_own(source.case, overwrite=args.overwrite)
    said: dict[str, list[str]] = {}
    written: list[str] = []
    with cpu_settings(args.threads):
        for source in found:
            try:
                _predict_case(baseline, source, masks[source.case], args, folder, said)
                written.append(source.case)
                say(f"{printable(source.case)}: done")
            except Exception as error:  # whatever is wrong with one patient, the others are not to wait
                failures[source.case] = reason(source.path, error)
    return PredictSummary(written, [], failures, said, sources.passed)


def _predict_case(
    baseline: Baseline,
    source: Source,
    mask: Path | None,
    args: BaselinePredictArgs,
    folder: Folder,
    said: dict[str, list[str]],
) -> None:
    size = None if baseline.config.lungs_only else WHOLE
    with hear() as said[source.case]:
        case = load_case(
            source.path, mask, series=source.series, lungs=args.lungs, size=size, label=args.label
        )
    anomaly = case.to_native(score_volume(baseline, case.hu, case.mask, spacing=case.spacing))
    anomaly = np.clip(anomaly, 0, 1)  # linear resampling may round beyond
    lung = case.native_mask
    threshold = baseline.calibration["threshold"] if args.threshold is None else args.threshold
    maps = {
        "lesions": find_lesions(baseline, anomaly, threshold) & lung,
        "lung": lung,
        "probability": np.where(lung, 1 - anomaly, 0).astype(np.float32),
    }
    record = {
        "case": source.case,
        "baseline": {
            "method": baseline.config.method,
            "threshold": threshold,
            "calibrated": args.threshold is None,
        },
        "label": list(args.label) or None,
        "warnings": said[source.case],
    }
    writers = {kind: partial(case.volume.write_like, array) for kind, array in maps.items()}
    folder.write(source.case, writers, record, overwrite=args.overwrite)
