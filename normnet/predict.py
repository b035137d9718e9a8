"""Segment patients: ``python -m normnet.predict IN... --output OUT`` (PAPER.md III-A, III-D).

Each model calls a bright voxel healthy where its probability exceeds a threshold, 0.95 in the paper; the
majority of the models decides. What is bright and not healthy becomes a lesion in post-processing. Results
are written on the input's own grid.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from monai.inferers import sliding_window_inference
from torch.nn.functional import pad

import lesionsynth as ls
from lesionsynth.commands import plainly, run
from lesionsynth.io import Scan
from lesionsynth.strict import name_of, read_json
from normnet.cases import Case, CaseArgs, PredictSummary, Segmented, find_cases, reason, run_cases
from normnet.config import PredictConfig, to_json
from normnet.device import choose_device, cpu_settings
from normnet.dicom_seg import check_segmentation, encode_segmentation
from normnet.inflation import inflation_factor, windowed_lungs
from normnet.model import Model, bundled_models, find_models
from normnet.output import Record, Writer, volumes_of
from normnet.postprocess import Mask, postprocess_slices
from normnet.prepare.case import LungMethod, check_lungs, load_case, method_record
from normnet.settings import from_record, naming

Image = npt.NDArray[np.float32]

TILE_OVERLAP = 64
"""Least overlap of neighbouring tiles in voxels, at most half a tile: what a ramp of 32 voxels on either side
needs for a network that looks that far."""


# ---- an array: the networks vote, post-processing makes lesions


@dataclass(frozen=True)
class Prediction:
    """What `predict_volume` found, on the grid of its input (z, y, x)."""

    lesions: Mask
    """Final lesions."""
    lesions_without_growing: Mask
    """Before region growing (Table III, "w/o growing")."""
    healthy: Mask
    """Bright lung voxels that the majority of the models calls healthy."""
    probability: Image | None
    """Mean healthy probability of the models; 0 outside the lung. None where it was not asked for."""
    inflation: float
    """What HU in the lungs were multiplied with (`normnet.inflation`); 1 where the models ask for nothing."""


def predict_volume(
    hu: Any,
    lung_mask: Any,
    models: Sequence[Model],
    config: PredictConfig,
    *,
    device: str = "auto",
    keep_probability: bool = True,
) -> Prediction:
    """Segment one volume, in the memory of the results and of one slab.

    Parameters
    ----------
    hu : (z, y, x) array
        Hounsfield units on the training grid, 1.0 x 0.8 x 0.8 mm.
    lung_mask : (z, y, x) bool array
        Lungs, lesions included: the networks see their bounding box, zero around them as in training.
    models, config, device
        What votes, how, and where; "auto" takes CUDA where there is some.
    keep_probability : bool
        Also return the mean probability, four bytes a voxel.

    Raises
    ------
    ValueError
        Shapes differ, the mask is empty, there is no model, or slab or tile do not fit the models.
    """
    volume, mask = checked_volume(hu, lung_mask)
    if not models:
        raise ValueError("models must hold at least one network, got none")
    where = choose_device(device)
    limits = torch.tensor([model.threshold(config.probability) for model in models], device=where)
    level = bright_threshold(models, config)
    tau = np.float32(ls.threshold(level))
    factor = inflation_factor(volume, mask, inflation_of(models))
    healthy = np.zeros(mask.shape, np.bool_)
    mean = np.zeros(mask.shape, np.float32) if keep_probability else None
    rows, columns = (np.flatnonzero(mask.any(axis=other)) for other in ((0, 2), (0, 1)))
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)

    def read(first: int, last: int) -> Image:
        return windowed_lungs(volume[first:last], mask[first:last], factor)

    def read_box(first: int, last: int) -> Image:
        return read(first, last)[:, *box]

    for first, chances in slide(read_box, mask[:, *box], models, config, where):
        last = first + chances.shape[1]
        part = (slice(first, last), *box)
        votes = (chances > limits[:, None, None, None]).sum(dim=0)
        majority = (2 * votes > len(models)).cpu().numpy()
        healthy[part] = majority & (read_box(first, last) >= tau) & mask[part]
        if mean is not None:
            mean[part] = np.where(mask[part], chances.mean(dim=0).cpu().numpy(), 0)
    lesions = postprocess_slices(read, mask, healthy, replace(config.postprocess, threshold_hu=level))
    return Prediction(lesions.final, lesions.core, healthy, mean, factor)


def checked_volume(hu: Any, lung_mask: Any) -> tuple[npt.NDArray[Any], Mask]:
    """Return a volume and its lungs as arrays; `ValueError` where shapes do not fit or there is no lung."""
    volume, mask = np.asarray(hu), np.asarray(lung_mask, dtype=np.bool_)
    if volume.ndim != 3 or volume.shape != mask.shape:
        shapes = f"{volume.shape} and {mask.shape}"
        raise ValueError(f"hu and lung_mask must be (z, y, x) and alike, got shapes {shapes}")
    if not mask.any():
        raise ValueError("lung_mask must contain at least one voxel, got an empty mask")
    return volume, mask


def bright_threshold(models: Sequence[Model], config: PredictConfig) -> float:
    """Return T in HU, at or above which voxels are bright: the models' own unless `config` has another."""
    own = config.postprocess.threshold_hu
    return float(_shared(models, "threshold_hu") if own is None else own)


def inflation_of(models: Sequence[Model]) -> float | None:
    """Return the density in HU that the models expect of healthy lung; None where they expect nothing."""
    level: float | None = _shared(models, "inflation_hu")
    return level


def _shared(models: Sequence[Model], name: str) -> Any:
    found = list(dict.fromkeys(getattr(model, name) for model in models))
    if len(found) > 1:
        shown = ", ".join("None" if level is None else f"{level:g}" for level in found)
        rest = " unless postprocess.threshold_hu is given" * (name == "threshold_hu")
        raise ValueError(f"models must have one {name}{rest}, got {shown}")
    return found[0]


# ---- the sliding window: slabs of slices here, tiles of a slab by MONAI


@torch.inference_mode()
def slide(
    read: Callable[[int, int], Image],
    lung_mask: Mask,
    models: Sequence[Model],
    config: PredictConfig,
    device: torch.device,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Run the networks over a volume and hand out finished slices, from the first to the last.

    What several slabs or tiles saw is averaged, each weighted by the distance to its ends. A slice is handed
    out as soon as no later slab sees it: memory does not grow with the volume.

    Parameters
    ----------
    read : callable
        ``read(first, last)`` gives the windowed lungs of these slices, (last - first, y, x) float32.
    lung_mask : (z, y, x) bool array
        Windows without lung are skipped: their voxels have no meaning.
    models, config, device
        As in `predict_volume`.

    Yields
    ------
    first : int
        Number of the first slice.
    probabilities : (models, slices, y, x) float32 tensor on `device`
        Of the slices from it on.

    Raises
    ------
    ValueError
        Slab or tile do not fit the networks' strides, or a network gives NaN.
    """
    depth, height, width = lung_mask.shape
    slab = config.slab
    multiple = math.lcm(*(model.config.multiple for model in models))
    if slab % multiple:
        raise ValueError(
            f"slab must be a multiple of {multiple} (product of the model's strides), got {slab}"
        )
    models = [model.to(device, config.precision) for model in models]
    rows, down = tiles(height, config.tile, multiple)
    columns, right = tiles(width, config.tile, multiple)
    plane = max(height, rows), max(width, columns)
    # MONAI rounds the steps down that it makes of the overlaps
    overlap = (0.0, max(0.0, 1 - (down + 0.5) / rows), max(0.0, 1 - (right + 0.5) / columns))
    ramp = torch.outer(triangle(rows, device), triangle(columns, device))[None]
    ramp_z = triangle(slab, device)[:, None, None]

    def ask(window: torch.Tensor) -> torch.Tensor:
        if not window[:, 1].any():
            return window.new_zeros((1, len(models), *window.shape[2:]))
        return torch.cat([model.healthy_probability(window[:, :1]) for model in models], dim=1)

    end = max(depth - slab, 0)
    starts = sorted({*range(0, end, max(1, round(slab * (1 - config.overlap)))), end})
    total = torch.zeros((len(models), slab, *plane), device=device)
    weight = torch.zeros_like(ramp_z)
    for start, following in pairwise([*starts, depth]):
        inside = lung_mask[start : start + slab]
        if inside.any():
            both = np.zeros((1, 2, slab, *plane), np.float32)
            both[0, 0, : len(inside), :height, :width] = read(start, start + len(inside))
            both[0, 1, : len(inside), :height, :width] = inside
            image = torch.from_numpy(both).to(device)
            size = (slab, rows, columns)
            total += ramp_z * sliding_window_inference(image, size, 1, ask, overlap, roi_weight_map=ramp)[0]
        weight += ramp_z
        done = following - start
        found = (total[:, :done] / weight[:done])[..., :height, :width]
        if not math.isfinite(float(found.sum())):
            number = int(found.flatten(1).sum(dim=1).isfinite().logical_not().nonzero()[0])
            raise ValueError(f"models must give probabilities, got NaN from models[{number}], damaged ones")
        yield start, found
        total, weight = (pad(t[..., done:, :, :], (0, 0, 0, 0, 0, done)) for t in (total, weight))


def tiles(length: int, tile: int | None, multiple: int) -> tuple[int, int]:
    """Cover a row or column with equal tiles, as few and as small as a size of at most `tile` allows.

    Parameters
    ----------
    length : int
        Voxels to cover; what a single tile has beyond them is padding.
    tile : int, optional
        Largest size; one tile takes everything where omitted.
    multiple : int
        The size is a multiple of it.

    Returns
    -------
    size, step : int
        Of a tile, and from one to the next; the last one ends the row. They overlap by `TILE_OVERLAP` at
        least, or by half a small tile.

    Raises
    ------
    ValueError
        `tile` is smaller than `multiple`.
    """
    padded = -(-length // multiple) * multiple
    if tile is None or padded <= tile:
        return padded, padded
    largest = tile // multiple * multiple
    if largest == 0:
        raise ValueError(f"tile must be at least {multiple} (product of the model's strides), got {tile}")
    shared = min(TILE_OVERLAP, largest // 2)
    count = -(-(length - shared) // (largest - shared))
    size = -(-(length + (count - 1) * shared) // count)
    size = min(-(-size // multiple) * multiple, largest)
    return size, -(-(length - size) // (count - 1))


def triangle(size: int, device: torch.device) -> torch.Tensor:
    """Weights 1, 2, ... 2, 1: an end has seen one neighbour only and counts least."""
    up = torch.arange(1, size + 1, dtype=torch.float32, device=device)
    return torch.minimum(up, up.flip(0))


# ---- a file: maps on its own grid, and volumes


@dataclass(frozen=True, eq=False, kw_only=True)
class CasePrediction:
    """What `predict_case` found, as in `Prediction`, on the CT's own grid (z, y, x)."""

    lesions: Mask
    core: Mask
    """Lesions before region growing."""
    lung: Mask
    """The lungs that were searched."""
    classical: Mask | None
    """The lungs by thresholds, where these and the lung network disagree; else None."""
    probability: Image | None = None
    """None where it was not asked for."""
    healthy: Mask | None = None
    """None where the probability was not asked for, whose mean cannot tell it (Table II)."""
    volumes: dict[str, float | None]
    """Lungs and lesions in ml and percent, see `normnet.output.volumes_of`."""
    inflation: float
    ct: Scan
    """The CT; ``ct.write_like(lesions, "lesions.nii.gz")`` writes a map."""


def predict_case(
    path: str | os.PathLike[str],
    models: Sequence[Model],
    config: PredictConfig | None = None,
    *,
    mask_path: str | os.PathLike[str] | None = None,
    label: Sequence[int] = (),
    series: str | None = None,
    lungs: LungMethod = "network",
    device: str = "auto",
    keep_probability: bool = True,
) -> CasePrediction:
    """Segment one CT file or DICOM folder.

    Parameters
    ----------
    path, mask_path, series, lungs, label
        The CT, and where its lungs are from: see `normnet.prepare.load_case`.
    models, config, device, keep_probability
        As in `predict_volume`; the paper's settings where `config` is omitted.

    Raises
    ------
    FileNotFoundError, ValueError
        As `normnet.prepare.load_case` and `predict_volume`.
    """
    loaded = load_case(path, mask_path, series=series, lungs=lungs, label=label)
    lung = loaded.native_mask
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
    probability, inflation = found.probability, found.inflation
    # each map of the working grid is let go once it lies on the CT's: both together would be the peak
    del found
    for name in masks:
        masks[name] = loaded.to_native(masks[name])
        masks[name] &= lung
    volumes = volumes_of(masks["lesions"], lung, loaded.volume.spacing, loaded.native_sides)
    if probability is not None:
        probability = loaded.to_native(probability)
        probability[~lung] = 0
    return CasePrediction(
        **masks,
        probability=probability,
        lung=lung,
        classical=loaded.native_classical if loaded.apart else None,
        volumes=volumes,
        inflation=inflation,
        ct=loaded.volume,
    )


# ---- the command


@dataclass(frozen=True, kw_only=True)
class PredictArgs(CaseArgs):
    """Segment CT volumes with trained models.

    Exit status: 0 when every case is done, 1 when some failed or a file that was named was passed over (the
    others are written), 2 for a wrong call. A call that was interrupted goes on where it stopped when it is
    given again.
    """

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """NIfTI, NRRD or MetaImage files, DICOM folders, and folders of these; or one CSV with the columns case,
    ct and, for lung masks, lungs."""
    output: Path = Path("predictions")
    """Folder for <case>_lesions.nii.gz, <case>_lung.nii.gz, <case>.json and volumes.csv; where thresholds
    find other lungs than the network, also <case>_classical.nii.gz, theirs."""
    models: tuple[Path, ...] = ()
    """Run folders or weights files; several vote. Those that ship with the package where omitted."""
    name: tuple[str, ...] = ()
    """Case names, one per CT; file names where omitted."""
    save_probability: bool = False
    """Also write <case>_probability.nii.gz, the mean healthy probability, 0 outside the lung, and
    <case>_healthy.nii.gz, the bright voxels that the models' vote calls healthy: what Table II needs."""
    save_core: bool = False
    """Also write <case>_core.nii.gz: the lesions before region growing."""
    dicom_seg: bool = False
    """Also write <case>_lesions.dcm, a DICOM Segmentation of lungs and lesions; for DICOM input. A case whose
    headers do not allow one fails, but has its other files."""
    config: Path | None = None
    """Settings as JSON: a PredictConfig, or the <case>.json of an earlier call. Flags override them."""
    settings: PredictConfig = field(default_factory=PredictConfig)
    """Thresholds and post-processing; the paper's. In Python, `config` is not read: pass these."""


def predict(args: PredictArgs, *, progress_bar: bool = False) -> PredictSummary:
    """Segment files and write the results; broken cases do not stop the others.

    Parameters
    ----------
    args : PredictArgs
    progress_bar : bool

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As `normnet.cases.find_cases`, `normnet.prepare.case.check_lungs`, `normnet.cases.run_cases`; there is
        no model or no such device, or the models do not fit each other.
    """
    cases = find_cases(
        args.inputs, masks=args.masks, series=args.series, names=args.name or None, output=args.output
    )
    check_lungs(cases, args.lungs, args.label)
    choose_device(args.device)
    files = find_models(args.models) if args.models else bundled_models()
    models = [Model.load(file) for file in files]
    inflation_of(models)  # refuses models that do not fit each other, before the first case
    bright_threshold(models, args.settings)
    request = {
        "settings": json.loads(to_json(args.settings)),
        "models": [_used(file, model, args.settings) for file, model in zip(files, models, strict=True)],
    }
    unfit: dict[str, str] = {}
    for case in cases if args.dicom_seg else ():
        try:
            if case.series is None:
                raise ValueError("dicom_seg must be left out, as the CT is no DICOM series")
            check_segmentation(case.files)
        except (ValueError, OSError) as error:
            unfit[case.case] = _unfit(case, error)
            warnings.warn(f"{case.case}: {unfit[case.case]}", stacklevel=2)  # hours before the end

    def kinds(case: Case) -> list[str]:
        extra = ["core"] * args.save_core + ["probability", "healthy"] * args.save_probability
        return ["lesions", "lung", *extra, *["dicom_seg"] * (args.dicom_seg and case.case not in unfit)]

    def segment(case: Case, kinds: Sequence[str]) -> Segmented:
        found = predict_case(
            case.ct,
            models,
            args.settings,
            mask_path=case.lungs,
            label=args.label,
            series=case.series,
            lungs=args.lungs,
            device=args.device,
            keep_probability=not {"probability", "healthy"}.isdisjoint(kinds),
        )
        maps = {kind: getattr(found, kind) for kind in {*kinds, "classical"} - {"dicom_seg"}}
        writers: dict[str, Writer] = {
            kind: partial(found.ct.write_like, voxels) for kind, voxels in maps.items() if voxels is not None
        }
        if "dicom_seg" in kinds:
            try:
                content = encode_segmentation({"lung": found.lung, "lesion": found.lesions}, found.ct)
                writers["dicom_seg"] = lambda path: path.write_bytes(content)
            except Exception as error:  # the maps do not depend on it
                unfit[case.case] = _unfit(case, error)
        return Segmented(found.ct, writers, found.volumes, found.inflation)

    with cpu_settings(args.threads):
        method = method_record(args.lungs)
        done = run_cases(cases, args, method, request, kinds, segment, progress_bar=progress_bar)
    return replace(done, failures={**unfit, **done.failures})


def _used(file: Path, model: Model, config: PredictConfig) -> Record:
    """Tell a model and how it is used, for a record."""
    with naming(file):
        probability = model.threshold(config.probability)
    return {
        "name": model.name,
        "sha256": model.sha256,
        "probability": probability,
        "calibrated": (config.probability or model.probability) == "calibrated",
        "threshold_hu": bright_threshold([model], config),
        "inflation_hu": model.inflation_hu,
    }


def _unfit(case: Case, error: Exception) -> str:
    """Say why there is no DICOM Segmentation of a CT."""
    return f"{reason(case.ct, error)}; the other files do not need it"


def read_config(path: Path) -> PredictConfig:
    """Read a PredictConfig, or the entry "settings" of a record; `ValueError` where the file has neither."""
    try:
        record = read_json(path)
        found = record.get("settings", record) if isinstance(record, dict) else record
        return from_record(PredictConfig, found)
    except (OSError, ValueError) as error:
        raise ValueError(f"config must be a JSON file with settings, got {name_of(path)}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all went well, 1 when an input failed, 2 for a wrong call."""

    def body() -> int:
        given = sys.argv[1:] if argv is None else argv
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=Path)
        file = finder.parse_known_args(given)[0].config  # its settings are the defaults of the flags
        settings = PredictConfig() if file is None else read_config(file)
        default = PredictArgs(inputs=tyro.MISSING, settings=settings)
        args = tyro.cli(PredictArgs, args=given, default=default, prog="normnet.predict", description=__doc__)
        with plainly():
            summary = predict(args, progress_bar=True)
        return summary.tell("normnet.predict", args.output)

    return run("normnet.predict", body)


if __name__ == "__main__":
    sys.exit(main())
