"""Predict lesions: ``python -m normnet.predict IN... --output OUT --models RUN...`` (PAPER.md III-A, III-D).

A CT is read, its lungs are found or given, both are resampled to the working grid; every model sees the lungs
in overlapping slabs; what most models call healthy with high probability is removed from the bright lung
voxels; post-processing makes lesions of the rest, on the file's own grid.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import tyro

import lesionsynth as ls
from normnet.config import PredictConfig
from normnet.device import choose_device, set_up_cpu, use_bf16
from normnet.model import find_models, load_model
from normnet.pairing import split_name
from normnet.postprocess import postprocess
from normnet.prepare import LoadedCase, load_case
from normnet.prepare.morphology import bounding_box
from normnet.prepare.store import write_atomically

Image = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
VOLUMES = "volumes.csv"
"""Table of a prediction folder."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the models say of a volume, (Z, Y, X) on its grid."""

    healthy_votes: npt.NDArray[np.uint8]
    """Models that call a voxel healthy."""
    probability: Image
    """Mean over the models of the probability of being healthy and bright; 0 outside the lungs."""
    lesions: Mask
    """After vote and post-processing."""
    models: int
    """How many voted."""

    @property
    def healthy(self) -> Mask:
        """Voxels that more than half of the models call healthy."""
        return majority(self.healthy_votes, self.models)


def majority(votes: npt.NDArray[np.uint8], models: int) -> Mask:
    """Where more than half of the models voted for it; a tie is no majority."""
    return np.asarray(votes > models // 2)


def predict_volume(
    hu: npt.NDArray[np.int16],
    lung_mask: Mask,
    models: Sequence[torch.nn.Module],
    config: PredictConfig | None = None,
) -> Prediction:
    """Predict the lesions of a volume on the working grid (0.8 x 0.8 x 1 mm).

    Parameters
    ----------
    hu : (Z, Y, X) array
        Hounsfield units.
    lung_mask : (Z, Y, X) bool array
        Lungs with their lesions.
    models : sequence of torch.nn.Module
        (b, 1, z, y, x) windowed lungs to logits, as `normnet.model.load_model` gives them. Used one after the
        other, so that only one's feature maps are in memory.
    config : PredictConfig, optional
        The paper's where omitted.

    Returns
    -------
    Prediction

    Raises
    ------
    ValueError
        Shapes differ or are not 3-D, an empty or non-bool mask, no models, an unknown or absent device.
    """
    config = config or PredictConfig()
    _check(hu, lung_mask, models)
    device = choose_device(config.device)
    set_up_cpu(config.threads)
    image = ls.window_hu(hu)
    image *= lung_mask
    votes, total = np.zeros(hu.shape, np.uint8), np.zeros(hu.shape, np.float32)
    box = bounding_box(lung_mask)
    assert box is not None  # _check saw a voxel
    for model in models:
        probability = healthy_probability(image[box], model, config, device)
        probability *= lung_mask[box]
        votes[box] += probability > np.float32(config.probability)
        total[box] += probability
    total /= len(models)
    lesions = postprocess(image, lung_mask, majority(votes, len(models)), config.postprocess)
    return Prediction(votes, total, lesions, len(models))


def healthy_probability(
    image: Image, model: torch.nn.Module, config: PredictConfig, device: torch.device
) -> Image:
    """Probability of being healthy, by one model, in overlapping slabs that are averaged.

    Parameters
    ----------
    image : (Z, Y, X) float32 array
        Windowed lungs, 0 outside them. Padded with zeros to what the network divides.
    model, config, device
        See `predict_volume`.

    Returns
    -------
    (Z, Y, X) float32 array
    """
    multiple = int(getattr(getattr(model, "config", None), "multiple", 1))
    depth = -(-config.slab // multiple) * multiple
    shape = (max(image.shape[0], depth), *(-(-n // multiple) * multiple for n in image.shape[1:]))
    padded = np.zeros(shape, np.float32)
    inside = tuple(slice(0, n) for n in image.shape)
    padded[inside] = image
    bf16 = use_bf16(config.precision, device)
    model = model.to(device).eval()
    if bf16:
        model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    total, seen = np.zeros(shape, np.float32), np.zeros(shape[0], np.float32)
    weight = slab_weight(depth)
    for z in slab_starts(shape[0], depth, config.overlap):
        slab = torch.from_numpy(padded[z : z + depth])[None, None].to(device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(slab)
        total[z : z + depth] += weight[:, None, None] * torch.sigmoid(logits[0, 0].float()).cpu().numpy()
        seen[z : z + depth] += weight
    total /= seen[:, None, None]
    return total[inside]


def slab_starts(length: int, depth: int, overlap: float) -> list[int]:
    """First slices of slabs of `depth` that cover `length` slices; the last one ends with them."""
    step = max(1, round(depth * (1.0 - overlap)))
    return [*range(0, length - depth, step), length - depth]


def slab_weight(depth: int) -> Image:
    """Weight of a slab's slices in the average: least at its ends, where the network sees one side only."""
    k = np.arange(depth, dtype=np.float32)
    return np.minimum(k + 1, depth - k)


def _check(hu: npt.NDArray[np.int16], lung_mask: Mask, models: Sequence[torch.nn.Module]) -> None:
    if hu.ndim != 3:
        raise ValueError(f"hu must be (z, y, x), got shape {hu.shape}")
    if lung_mask.shape != hu.shape:
        raise ValueError(f"lung_mask must have the shape of hu, {hu.shape}, got {lung_mask.shape}")
    if lung_mask.dtype != np.bool_:
        raise ValueError(f"lung_mask must be bool, got {lung_mask.dtype}")
    if not lung_mask.any():
        raise ValueError("lung_mask must not be empty")
    if not 1 <= len(models) <= 255:
        raise ValueError(f"models must be 1 to 255, got {len(models)}")


@dataclass(frozen=True, kw_only=True)
class PredictArgs:
    """Predict lesions of CT volumes, written as NIfTI on their own grids.

    Exit status: 0 when every case is done, 1 when some failed (the others are written), 2 for a wrong call.
    """

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """NIfTI, NRRD or MetaImage files, DICOM folders."""
    output: Path
    """Folder for <case>_pred.nii.gz and volumes.csv."""
    models: tuple[Path, ...]
    """Run folders, folders of runs (an ensemble) or weights files; they vote."""
    masks: tuple[Path, ...] = ()
    """Lung masks, or folders of them, found by the name of the case (<case>_lung.nii.gz); segmented where omitted."""
    save_probability: bool = False
    """Also write <case>_prob.nii.gz, the mean healthy probability."""
    config: Annotated[PredictConfig, tyro.conf.arg(name="")] = field(default_factory=PredictConfig)
    """Settings; the paper's where omitted."""


@dataclass(frozen=True)
class CaseVolumes:
    """A row of volumes.csv."""

    case: str
    input: str
    status: str
    lung_ml: float | None = None
    lesion_ml: float | None = None
    lesion_share: float | None = None
    seconds: float | None = None
    message: str = ""


def predict_files(args: PredictArgs, *, say: Callable[[CaseVolumes], None] | None = None) -> list[CaseVolumes]:
    """Predict every input; a broken one is reported in its row and the others go on.

    Parameters
    ----------
    args : PredictArgs
        Inputs and settings.
    say : callable, optional
        Receives each row when its case is done.

    Raises
    ------
    ValueError
        No inputs, two of one name, no readable models, a mask path that does not exist.
    """
    cases = _named(args.inputs)
    masks = _masks_by_case(args.masks, cases)
    choose_device(args.config.device)
    models = [load_model(path) for path in find_models(args.models)]
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[CaseVolumes] = []
    for name, path in cases.items():
        try:
            row = _predict_file(name, path, masks, models, args)
        except (ValueError, OSError) as error:
            row = CaseVolumes(name, str(path), "failed", message=str(error))
        rows.append(row)
        write_atomically(args.output / VOLUMES, _table(rows))
        if say:
            say(row)
    return rows


def _predict_file(
    name: str, path: Path, masks: dict[str, Path], models: Sequence[torch.nn.Module], args: PredictArgs
) -> CaseVolumes:
    start = time.perf_counter()
    if args.masks and name not in masks:
        raise ValueError(f"masks must hold one for every input, found none named {name} or {name}_lung")
    case: LoadedCase = load_case(path, masks.get(name))
    found = predict_volume(case.hu, case.mask, models, args.config)
    lesions = case.to_native(found.lesions) & case.native_mask
    case.volume.write_like(lesions, args.output / f"{name}_pred.nii.gz")
    if args.save_probability:
        case.volume.write_like(case.to_native(found.probability), args.output / f"{name}_prob.nii.gz")
    ml = float(np.prod(case.volume.spacing)) / 1000.0
    lung, ill = int(case.native_mask.sum()) * ml, int(lesions.sum()) * ml
    return CaseVolumes(name, str(path), "done", lung, ill, ill / lung, time.perf_counter() - start)


def _named(inputs: Sequence[Path]) -> dict[str, Path]:
    cases: dict[str, Path] = {}
    for path in inputs:
        name = split_name(path)[0]
        if name in cases:
            raise ValueError(f"inputs must have different names, got {cases[name]} and {path} for {name!r}")
        cases[name] = path
    if not cases:
        raise ValueError("inputs must name at least one CT, got none")
    return cases


def _masks_by_case(masks: Sequence[Path], cases: dict[str, Path]) -> dict[str, Path]:
    """Mask of each case; a single mask file belongs to a single input, whatever it is called."""
    if len(cases) == len(masks) == 1 and masks[0].is_file():
        return {next(iter(cases)): masks[0]}
    found: dict[str, Path] = {}
    for path in _files(masks):
        name, role = split_name(path)
        if role == "lung" or (role is None and name not in found):
            found[name] = path
    return found


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        elif path.exists():
            yield path
        else:
            raise ValueError(f"masks must exist, got {path}")


def _table(rows: Sequence[CaseVolumes]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(CaseVolumes.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    return text.getvalue()


def _say(row: CaseVolumes) -> None:
    if row.status == "done":
        line = f"lesions {row.lesion_ml:.1f} ml of {row.lung_ml:.0f} ml lung ({row.lesion_share:.1%}), {row.seconds:.0f} s"
    else:
        line = f"{row.status}: {row.message}"
    print(f"{row.case}: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = tyro.cli(PredictArgs, args=argv, prog="python -m normnet.predict")
    try:
        rows = predict_files(args, say=_say)
    except (ValueError, OSError, ImportError) as error:
        print(f"normnet.predict: {error}", file=sys.stderr)
        return 2
    return 1 if any(row.status != "done" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
