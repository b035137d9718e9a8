"""Ask networks about scans that they were not trained on: ``python docs/lesions_check.py STORE RUN...``.

Of every RUN of a cross-validation (`TrainConfig.folds`) the held-out scans of STORE are predicted, by that
network alone, and two things are printed as CSV, a line a scan:

- ``false_ml``: what is marked in the healthy scan as it is, within the slices that training may use;
- Dice of lesions painted into 48 of its slices, of one kind at a time, by `normnet.painting`, which shares
  shapes with the generator and no texture. HU are those of a lung whose healthy tissue is at -870 HU.

With ``--masses docs/masses.csv --scans FILES`` it is asked about real nodules and masses instead, in scans
with lungs by the lung network: what is marked in a box around each, beside an estimate of its volume, the
largest connected part of the lungs in the box that is at least -500 HU.

``--summary TABLES`` reads such tables instead and prints, for each threshold, median and worst false volume
and the mean Dice of each kind over patients, with 95 % intervals of a bootstrap over patients; scans of one
patient are averaged first.

A STORE prepared with ``--edges keep`` has the masks that `normnet.predict` would make. Networks vote at their
own threshold unless ``--probability`` gives some.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import ndimage

import lesionsynth as ls
from lesionsynth.io import case_name
from normnet.ablate import majority
from normnet.config import PostprocessConfig, PredictConfig, TrainConfig, read_config
from normnet.data import Volume, fold_of, read_folds, store_volumes
from normnet.inflation import inflate, inflation_factor
from normnet.model import Model, find_models
from normnet.painting import Density, render
from normnet.postprocess import postprocess
from normnet.predict import slide
from normnet.prepare.case import load_case
from normnet.sheets import Sheet, read_rows

SLICES = 48
"""Of a scan that lesions are painted into: those with most lung."""
SEED = 7
RESAMPLES = 2000
TWINS = {"lungdx_a0001_kernelB": "tumour_lungdx_A0001", "dicom_lungdx_A0002": "lungdx_a0002_b70f"}
"""Scans of a patient of whom there is another."""


class Kind(NamedTuple):
    """Lesions as they are painted, and the least volume of those that count."""

    shapes: ls.LesionConfig
    density: Density
    least_ml: float = 0.0


def shapes(count: tuple[float, float], radius: tuple[float, float], **more: Any) -> ls.LesionConfig:
    """So many ellipsoids, of such semi-axes in mm."""
    blobs = ls.BlobClass(count=count, radius_mm=radius, scale_by_lung=False, **more)
    return ls.LesionConfig(small=None, medium=blobs, large=None)


KINDS = {
    "solid_1ml": Kind(shapes((4, 7), (7, 18)), Density(hu=30, spread=20), 1.0),
    "nodules": Kind(shapes((8, 12), (3, 6)), Density(hu=20, spread=20), 0.1),
    "glass_650": Kind(shapes((4, 8), (8, 25)), Density(hu=-650, spread=30)),
    "glass_720": Kind(shapes((4, 8), (8, 25)), Density(hu=-720, spread=30)),
    "consolidation": Kind(shapes((3, 5), (12, 35)), Density(hu=-50, spread=40, bronchi=0.08)),
    "pleural": Kind(
        shapes((5, 8), (8, 25), flatness=(0.2, 0.6), placement="surface"), Density(hu=-200, spread=60)
    ),
    "lobar": Kind(shapes((1, 2), (45, 80)), Density(hu=-300, spread=80)),
}


class Scan(NamedTuple):
    """A held-out scan: HU as a network expects them, lungs, and slices that count."""

    hu: Any
    lungs: Any
    usable: Any
    spacing: tuple[float, float, float]


def read(volume: Volume, inflation_hu: float | None) -> Scan:
    """Read a volume within the box of its lungs."""
    volume = volume if inflation_hu is None else volume.inflated(inflation_hu)
    hu, lungs = (array.numpy() for array in volume.slab(0, volume.shape[0]))
    usable = np.zeros(len(hu), bool)
    for first, stop in volume.segments:
        usable[first:stop] = True
    (box,) = ndimage.find_objects(lungs.astype(np.uint8))
    box = tuple(slice(max(s.start - 8, 0), s.stop + 8) for s in box)
    return Scan(hu[box].astype(np.float32), lungs[box], usable[box[0]], volume.spacing)


def lesions_of(scan: Scan, models: list[Model], probabilities: list[float]) -> Iterator[Any]:
    """Final lesions of the vote at each threshold."""
    image = ls.window_hu(scan.hu) * scan.lungs
    device = torch.device("cpu")
    blocks = slide(lambda a, b: image[a:b], scan.lungs, models, PredictConfig(), device)
    chances = np.concatenate([chances.numpy() for _, chances in blocks], axis=1)
    level = models[0].threshold_hu
    bright = scan.lungs & (image >= np.float32(ls.threshold(level)))
    for probability in probabilities:
        healthy = majority([p > np.float32(probability) for p in chances]) & bright
        yield postprocess(image, scan.lungs, healthy, PostprocessConfig(threshold_hu=level)).final


def painted(scan: Scan, kind: Kind, number: int) -> tuple[Scan, Any]:
    """Paint one kind of lesions into the slices with most lung, within one usable run; and which they are."""
    counts = np.where(scan.usable, scan.lungs.sum((1, 2)), 0)
    sums = np.convolve(counts, np.ones(min(SLICES, len(counts))), "valid")
    first = int(sums.argmax())
    at = slice(first, first + SLICES)
    hu, lungs = np.ascontiguousarray(scan.hu[at]), np.ascontiguousarray(scan.lungs[at])
    synth = ls.LesionSynthesizer(kind.shapes, seed=SEED, allow_empty=True)
    empty = np.zeros(hu.shape, np.float32)
    found = np.asarray(synth(empty, lungs, index=number, spacing=scan.spacing).labels)
    voxels = np.bincount(found.ravel())
    small = np.flatnonzero(voxels * np.prod(scan.spacing) / 1000 < kind.least_ml)
    disease = (found > 0) & ~np.isin(found, small)
    ill = render(hu, lungs.astype(np.uint8), disease, kind.density, seed=SEED, index=number)
    return Scan(ill.hu, lungs, scan.usable[at], scan.spacing), ill.disease


def mass(
    path: Path, box: list[int], model: Model, probabilities: list[float]
) -> Iterator[tuple[float, float, float]]:
    """Volume of the estimate, volume found in the box, and their Dice, at each threshold."""
    case = load_case(path)
    z0, z1, y0, y1, x0, x1 = box
    native = np.zeros(case.volume.hu.shape, bool)
    native[z0 : z1 + 1, y0 : y1 + 1, x0 : x1 + 1] = True
    inside = case.grid.to_iso(native) > 0
    factor = inflation_factor(case.hu, case.mask, model.inflation_hu)
    hu = inflate(case.hu, case.mask, factor).astype(np.float32)
    scan = Scan(hu, case.mask, np.ones(len(hu), bool), case.grid.spacing)
    labels, number = ndimage.label(inside & case.mask & (case.hu >= -500), np.ones((3, 3, 3)))
    estimate = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]) if number else labels > 0
    ml = float(np.prod(scan.spacing)) / 1000
    for lesions in lesions_of(scan, [model], probabilities):
        found = lesions & inside
        yield estimate.sum() * ml, found.sum() * ml, dice(found, estimate)


def print_masses(csv: Path, scans: list[Path], files: list[Path], probability: list[float] | None) -> None:
    """Print a line a mass, as the network of its fold sees it."""
    paths = {case_name(path): path for path in scans}
    table = Sheet(sys.stdout)
    table.row(["run", "case", "probability", "outlined_ml", "estimate_ml", "found_ml", "dice"])
    rows = [row for _, row in read_rows(csv) if row and not row[0].startswith("#")][1:]
    for file in files:
        model, folds, fold = held_out(file)
        levels = probability or [model.threshold()]
        for name, *box, outlined in rows:
            if folds[name] == fold and name in paths:
                found = mass(paths[name], list(map(int, box)), model, levels)
                for level, numbers in zip(levels, found, strict=True):
                    cells = [f"{number:.1f}" for number in numbers]
                    table.row([file.parent.name, name, f"{level:g}", outlined, *cells])
                    sys.stdout.flush()


def summarise(tables: list[Path]) -> None:
    """Print a line a threshold."""
    frame = pd.concat(map(pd.read_csv, tables), ignore_index=True)
    kinds = [name for name in frame if name in KINDS]
    frame["patient"] = frame["case"].replace(TWINS)
    out = Sheet(sys.stdout)
    out.row(["probability", "patients", "false_ml_median", "interval", "false_ml_worst", "case", *kinds])
    for level, rows in frame.groupby("probability"):
        patients = rows.groupby("patient")[["false_ml", *kinds]].mean()
        worst = rows.loc[rows["false_ml"].idxmax()]
        cells = [f"{patients[k].mean():.1f} ({interval(patients[k], np.nanmean)})" for k in kinds]
        median = patients["false_ml"].median()
        found = [f"{median:.2f}", interval(patients["false_ml"], np.median, ".2f")]
        out.row([f"{level:g}", len(patients), *found, f"{worst['false_ml']:.2f}", worst["case"], *cells])


def interval(values: Any, statistic: Any, form: str = ".0f") -> str:
    """95 % interval of a statistic over patients, by the percentiles of a bootstrap."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.percentile([statistic(draw) for draw in draws], [2.5, 97.5])
    return f"{low:{form}} to {high:{form}}"


def held_out(file: Path) -> tuple[Model, dict[str, int], int]:
    """Read a network, all folds, and the one that it has not seen."""
    config = read_config(TrainConfig, file.parent / "config.json")
    if config.folds is None:
        raise SystemExit(f"{file.parent}: trained without folds, so nothing was held out")
    folds = read_folds(config.folds)
    return Model.load(file).to("cpu"), folds, fold_of(folds, config.seed)


def dice(found: Any, truth: Any) -> float:
    """Dice coefficient in percent."""
    both = int(found.sum()) + int(truth.sum())
    return 100 * 2 * int((found & truth).sum()) / both if both else float("nan")


def main() -> None:
    """Print a line a scan and threshold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store", nargs="?", type=Path)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--probability", nargs="*", type=float)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--masses", type=Path)
    parser.add_argument("--scans", nargs="*", type=Path, default=[])
    parser.add_argument("--summary", nargs="+", type=Path)
    args = parser.parse_args()
    if args.summary:
        summarise(args.summary)
        return
    files = find_models(args.runs)
    if args.masses:
        print_masses(args.masses, args.scans, files, args.probability)
        return
    volumes = {volume.name: volume for volume in store_volumes(args.store)}
    table = Sheet(sys.stdout)
    table.row(["run", "fold", "case", "probability", "false_ml", "dense_ml", *args.kinds])
    for file in files:
        model, folds, fold = held_out(file)
        levels = args.probability or [model.threshold()]
        for number, name in enumerate(sorted(name for name in volumes if folds[name] == fold)):
            scan = read(volumes[name], model.inflation_hu)
            ml = float(np.prod(scan.spacing)) / 1000
            found = list(lesions_of(scan, [model], levels))
            false = [int((lesions & scan.usable[:, None, None]).sum()) * ml for lesions in found]
            scores: list[list[float]] = []
            for kind in args.kinds:
                sick, truth = painted(scan, KINDS[kind], number)
                scores.append([dice(lesions, truth) for lesions in lesions_of(sick, [model], levels)])
            bright = scan.lungs & scan.usable[:, None, None] & (scan.hu >= model.threshold_hu)
            for k, level in enumerate(levels):
                cells = [f"{row[k]:.1f}" for row in scores]
                dense = f"{bright.sum() * ml:.1f}"
                table.row([file.parent.name, fold, name, f"{level:g}", f"{false[k]:.2f}", dense, *cells])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
