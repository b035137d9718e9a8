"""Segment patients: ``python -m normnet.predict IN... --models RUN...`` (PAPER.md III-A, III-D).

Each model calls a bright voxel healthy where its probability exceeds 0.95; the majority of the models
decides. What is bright and not healthy becomes a lesion in post-processing. Results are written on the
input's own grid.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from tqdm import tqdm

import lesionsynth as ls
from normnet.config import PredictConfig
from normnet.device import choose_device, cpu_settings, use_bf16
from normnet.model import find_models, load_model
from normnet.pairing import split_name
from normnet.postprocess import Mask, postprocess
from normnet.prepare import load_case
from normnet.prepare.run import find_mask
from normnet.prepare.store import write_atomically


@dataclass(frozen=True)
class Prediction:
    """What `predict_volume` found, on the grid of its input (z, y, x)."""

    lesions: Mask
    """Final lesions."""
    lesions_without_growing: Mask
    """Before region growing (Table III, "w/o growing")."""
    healthy: Mask
    """Bright lung voxels that the majority of the models calls healthy."""
    probability: npt.NDArray[np.float32]
    """Mean healthy probability of the models; 0 outside the lung."""


def predict_volume(
    hu: Any, lung_mask: Any, models: Sequence[torch.nn.Module], config: PredictConfig, *, device: str = "auto"
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
        Threshold, slabs and post-processing.
    device : str
        Where the networks run; "auto" takes CUDA where there is some.

    Returns
    -------
    Prediction

    Raises
    ------
    ValueError
        Shapes differ, the mask is empty, or there is no model.

    Notes
    -----
    Memory: besides the results, one volume of probabilities for the model at work. The network sees the
    lungs' bounding box, zero around it as in training; a volume shorter than a slab is padded with empty
    slices.
    """
    volume, mask = np.asarray(hu), np.asarray(lung_mask, dtype=np.bool_)
    if volume.ndim != 3 or volume.shape != mask.shape:
        shapes = f"{volume.shape} and {mask.shape}"
        raise ValueError(f"hu and lung_mask must be (z, y, x) and alike, got shapes {shapes}")
    if not mask.any():
        raise ValueError("lung_mask must contain at least one voxel, got an empty mask")
    if not models:
        raise ValueError("models must hold at least one network, got none")
    image = ls.window_hu(volume) * mask
    box = _bounding_box(mask)
    votes = np.zeros(image[box].shape, dtype=np.uint8)
    total = np.zeros(votes.shape, dtype=np.float32)
    for model in models:
        probability = slab_probabilities(image[box], model, config, choose_device(device))
        votes += probability > healthy_threshold(model, config)
        total += probability
    healthy, mean = np.zeros(image.shape, dtype=np.bool_), np.zeros(image.shape, dtype=np.float32)
    bright = (image >= ls.threshold(config.postprocess.threshold_hu)) & mask
    healthy[box] = (2 * votes.astype(np.int16) > len(models)) & bright[box]
    mean[box] = np.where(mask[box], total / len(models), 0)
    lesions = postprocess(image, mask, healthy, config.postprocess)
    return Prediction(lesions.final, lesions.core, healthy, mean)


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


@torch.inference_mode()
def slab_probabilities(
    image: npt.NDArray[np.float32], model: torch.nn.Module, config: PredictConfig, device: torch.device
) -> npt.NDArray[np.float32]:
    """Healthy probability of every voxel: overlapping slabs, weighted by their distance to the slab's ends.

    Parameters
    ----------
    image : (z, y, x) float32 array
        Windowed lungs.
    model : torch.nn.Module
        One logit a voxel.
    config : PredictConfig
        Slab and overlap.
    device : torch.device
        Where to compute.

    Returns
    -------
    (z, y, x) float32 array
    """
    multiple = getattr(getattr(model, "config", None), "multiple", 1)
    slab = config.slab
    depth, height, width = image.shape
    padded = np.pad(image, [(0, max(slab - depth, 0)), (0, -height % multiple), (0, -width % multiple)])
    step = max(1, round(slab * (1 - config.overlap)))
    starts = sorted({*range(0, len(padded) - slab, step), len(padded) - slab})
    # An end slice has seen one neighbour only: it counts least where another slab knows it better.
    ramp = np.minimum(np.arange(1, slab + 1), np.arange(slab, 0, -1)).astype(np.float32)[:, None, None]
    total = np.zeros(padded.shape, dtype=np.float32)
    weight = np.zeros((len(padded), 1, 1), dtype=np.float32)
    model = model.to(device).eval()
    bf16 = use_bf16(config.precision, device)
    if bf16:  # the layout bf16 convolutions are fastest in
        model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    for z in starts:
        part = torch.from_numpy(padded[z : z + slab])[None, None].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(part)
        total[z : z + slab] += torch.sigmoid(logits[0, 0].float()).cpu().numpy() * ramp
        weight[z : z + slab] += ramp
    total /= weight
    return total[:depth, :height, :width]


@dataclass(frozen=True, kw_only=True)
class PredictArgs:
    """Segment CT volumes with trained models."""

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """NIfTI, NRRD or MetaImage files, DICOM folders."""
    models: tuple[Path, ...]
    """Run folders or weights files; several vote."""
    output: Path = Path("predictions")
    """Folder for <case>_lesions.nii.gz, <case>_lung.nii.gz and volumes.csv."""
    masks: Path | None = None
    """Lung mask, or folder with a <case>_lung file per case; segmented where omitted."""
    save_probability: bool = False
    """Also write <case>_probability.nii.gz: the mean healthy probability, 0 outside the lung."""
    device: str = "auto"
    """"auto" takes CUDA where there is some, else the CPU."""
    threads: int | None = None
    """CPU threads; all cores where omitted."""
    settings: PredictConfig = field(default_factory=PredictConfig)
    """Thresholds and post-processing; the paper's."""


def predict(args: PredictArgs, *, progress_bar: bool = False) -> list[str]:
    """Segment files and write the results.

    Returns
    -------
    list of str
        A line for each input that failed; the others are written.

    Raises
    ------
    ValueError
        No input, two of one name, no model, or a device that is not there.
    """
    if not args.inputs:
        raise ValueError("inputs must name at least one CT")
    cases: dict[str, Path] = {}
    for path in args.inputs:
        other = cases.setdefault(split_name(path)[0], path)
        if other is not path:
            raise ValueError(f"inputs must have different names, got {other} and {path}")
    choose_device(args.device)
    models = [load_model(path) for path in find_models(args.models)]
    rows, failures = [], []
    with cpu_settings(args.threads):
        for case, path in tqdm(cases.items(), disable=not progress_bar, unit="case", desc="predict"):
            try:
                rows.append(_predict_file(args, path, case, models))
            except (ValueError, OSError, MemoryError) as error:
                failures.append(f"{path}: {error}" if str(path) not in str(error) else str(error))
    if rows:
        _write_volumes(args.output, rows)
    return failures


def _predict_file(
    args: PredictArgs, path: Path, case: str, models: Sequence[torch.nn.Module]
) -> dict[str, Any]:
    mask_path = None if args.masks is None else find_mask(args.masks, case)
    loaded = load_case(path, mask_path)
    found = predict_volume(loaded.hu, loaded.mask, models, args.settings, device=args.device)
    lesions = loaded.to_native(found.lesions) & loaded.native_mask
    write = loaded.volume.write_like
    write(lesions, args.output / f"{case}_lesions.nii.gz")
    write(loaded.native_mask, args.output / f"{case}_lung.nii.gz")
    if args.save_probability:
        probability = np.where(loaded.native_mask, loaded.to_native(found.probability), 0).astype(np.float32)
        write(probability, args.output / f"{case}_probability.nii.gz")
    ml = float(np.prod(loaded.volume.spacing)) / 1000.0
    lung, lesion = float(loaded.native_mask.sum()) * ml, float(lesions.sum()) * ml
    return {
        "case": case,
        "lung_ml": f"{lung:.1f}",
        "lesion_ml": f"{lesion:.2f}",
        "percent": f"{100 * lesion / lung:.2f}",
    }


def _write_volumes(output: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(output / "volumes.csv", text.getvalue())


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    """In-plane box of the lungs, all slices."""
    rows, columns = np.flatnonzero(mask.any(axis=(0, 2))), np.flatnonzero(mask.any(axis=(0, 1)))
    return slice(None), slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all went well, 1 when an input failed, 2 for a wrong call."""
    args = tyro.cli(PredictArgs, args=argv, prog="normnet.predict", description=__doc__)
    try:
        failures = predict(args, progress_bar=True)
    except ValueError as error:
        print(f"normnet.predict: {error}", file=sys.stderr)
        return 2
    for line in failures:
        print(f"normnet.predict: {line}", file=sys.stderr)
    done = len(args.inputs) - len(failures)
    print(f"{done} of {len(args.inputs)} volumes segmented, in {args.output}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
