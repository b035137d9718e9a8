"""Measure what lung segmentations hold, without annotations: ``python docs/lungs_check.py SCANS...``.

SCANS are healthy chest CTs that training did not see. There, the mask by thresholds is right: it is the
reference. Each scan is then changed in ways that leave its lungs where they are: dense disease is painted
into them, the chest is scaled to a neonate's, slices are thick, there is contrast, the field of view is
another one, or a frame lies around it. Each method of ``--lungs`` segments every one of these, and a table is
printed per scan, with the methods side by side:

- Dice with the reference, of both lungs or of one;
- held: the share of the painted part that is in the mask, on whichever side; for one lung, on its own.

The last table has the lowest of all scans.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lesionsynth.io import AIR_HU, read_ct
from normnet.painting import LEFT, RIGHT, Density, render
from normnet.prepare.case import method_of
from normnet.prepare.grid import Mask, Spacing
from normnet.prepare.lungs import Lungs, around, split_lungs

Volume = npt.NDArray[np.int16]
Method = Callable[[Volume, Spacing], Lungs]
Part = Literal["dorsal", "lower", "left"]

DENSE = Density(hu=0, spread=30)
PAINTED: dict[str, tuple[Part, float, Density]] = {
    "dorsal 20 %": ("dorsal", 0.2, DENSE),
    "dorsal 40 %": ("dorsal", 0.4, DENSE),
    "lower 40 %": ("lower", 0.4, DENSE),
    "dorsal 40 %, air bronchograms": ("dorsal", 0.4, Density(hu=0, spread=40, bronchi=0.08)),
    "lower 40 %, uniform": ("lower", 0.4, Density(hu=40)),
    "whole left lung": ("left", 1.0, Density(hu=30, spread=20)),
}
"""Disease: where, what share of each lung, and how dense."""
NEONATE = 0.3
"""Size of a newborn's chest, of an adult's."""
THICK_MM = 8.0
CONTRAST_HU, SOFT_HU = 150, (20, 80)
"""What contrast adds, and to which tissue."""
FIELD_MM, FIELD_VOXELS = 820.0, 512
"""The widest field of view that scanners reconstruct, and its pixels."""
AROUND = 2
"""Voxels left around the lungs where an image is cropped to them."""
FRAME, FRAMES_HU = 24, (0, -1024, -2048)
"""Width of a frame in voxels, and what it is filled with."""
EDGE = 3
"""Voxels around a painted part within which painting changes something."""
CHUNK = 4
"""Rows averaged at once."""


class Trial(NamedTuple):
    """A scan whose lungs are known.

    Attributes
    ----------
    name : str
    hu : (z, y, x) int16 array
    spacing : (3,) floats
        mm, axis order z, y, x.
    lungs : Lungs
        The reference.
    part : (z, y, x) bool array or None
        What is consolidated, part of the lungs.
    sides : bool
        Whether each lung has a row of its own.
    """

    name: str
    hu: Volume
    spacing: Spacing
    lungs: Lungs
    part: Mask | None = None
    sides: bool = False


class Row(NamedTuple):
    """Dice with the reference, and the share of the painted part that is held; NaN where there is none."""

    dice: float
    held: float


def trials(hu: Volume, lungs: Lungs, spacing: Spacing) -> Iterator[Trial]:
    """Change a healthy scan in every way, one after the other: each takes the memory of a few volumes."""
    yield Trial("healthy", hu, spacing, lungs, sides=True)
    for name, (where, share, density) in PAINTED.items():
        part = region(lungs, where, share)
        if part.any():
            yield Trial(name, painted(hu, lungs, part, density), spacing, lungs, part, where == "left")
    child = (NEONATE * spacing[0], NEONATE * spacing[1], NEONATE * spacing[2])
    yield Trial(f"chest scaled to {NEONATE:g}", hu, child, lungs)
    shape = (max(1, int(len(hu) * spacing[0] / THICK_MM)), hu.shape[1], hu.shape[2])
    thick = (THICK_MM, spacing[1], spacing[2])
    yield averaged(f"{THICK_MM:g} mm slices", hu, lungs, spacing, shape, thick)
    yield Trial("contrast", contrasted(hu, lungs), spacing, lungs)
    shape = (len(hu), FIELD_VOXELS, FIELD_VOXELS)
    wide = (spacing[0], FIELD_MM / FIELD_VOXELS, FIELD_MM / FIELD_VOXELS)
    yield averaged(f"{FIELD_MM:g} mm field", hu, lungs, spacing, shape, wide)
    if (box := around(lungs.right | lungs.left, AROUND)) is not None:
        small = Lungs(*(np.ascontiguousarray(lung[box]) for lung in (lungs.right, lungs.left)))
        yield Trial("cropped to the lungs", np.ascontiguousarray(hu[box]), spacing, small)
        del small
    width = ((0, 0), (FRAME, FRAME), (FRAME, FRAME))
    larger = Lungs(np.pad(lungs.right, width), np.pad(lungs.left, width))
    for fill in FRAMES_HU:
        yield Trial(f"frame of {fill} HU", np.pad(hu, width, constant_values=fill), spacing, larger)


def region(lungs: Lungs, where: Part, share: float) -> Mask:
    """Take the planes at the back or at the feet that have `share` of each lung, or the left lung."""
    if where == "left":
        return lungs.left
    chosen = np.zeros(lungs.left.shape, bool)
    axis = 1 if where == "dorsal" else 0
    for lung in (lungs.right, lungs.left):
        counts = np.count_nonzero(lung, axis=(0, 2) if axis else (1, 2))
        held = (counts[::-1] if axis else counts).cumsum()
        planes = int(np.searchsorted(held, share * held[-1])) + 1
        at = np.s_[:, -planes:] if axis else np.s_[:planes]
        chosen[at] |= lung[at]
    return chosen


def painted(hu: Volume, lungs: Lungs, part: Mask, density: Density) -> Volume:
    """Give a part of the lungs the density of disease."""
    box = around(part, EDGE)
    if box is None:
        return hu
    labels = (RIGHT * lungs.right[box] + LEFT * lungs.left[box]).astype(np.uint8)
    out = hu.copy()
    out[box] = np.rint(render(hu[box].astype(np.float32), labels, part[box], density).hu)
    return out


def contrasted(hu: Volume, lungs: Lungs) -> Volume:
    """Add contrast to soft tissue between the two lungs, in rows that go through both."""
    right, left = lungs.right, lungs.left
    low, high = SOFT_HU
    between = np.logical_or.accumulate(right, axis=2)
    between &= np.flip(np.logical_or.accumulate(np.flip(left, 2), axis=2), 2)
    between &= ~(right | left) & (hu >= low) & (hu <= high)
    out = hu.copy()
    out[between] += CONTRAST_HU
    return out


def averaged(
    name: str, hu: Volume, lungs: Lungs, spacing: Spacing, shape: tuple[int, int, int], new: Spacing
) -> Trial:
    """Average scan and lungs over other voxels, with the same middle; around the image is air."""

    def mean(volume: npt.NDArray[Any], fill: float) -> npt.NDArray[Any]:
        for axis, (old, size, n) in enumerate(zip(spacing, new, shape, strict=True)):
            if (size, n) != (old, volume.shape[axis]):
                edges = (np.arange(n + 1) - n / 2) * size / old + volume.shape[axis] / 2
                volume = _means(volume, axis, edges, fill)
        return volume

    # half a voxel of lung in tissue is darker than the threshold; sums round
    right, left = (mean(lung, 0) > 0.4999 for lung in (lungs.right, lungs.left))
    return Trial(name, np.rint(mean(hu, AIR_HU)).astype(np.int16), new, Lungs(right, left & ~right))


def rows(trial: Trial, found: Lungs) -> dict[str, Row]:
    """Compare what a method found with the reference."""
    truth = trial.lungs
    pairs = [("", found.right | found.left, truth.right | truth.left)]
    if trial.sides:
        pairs += [(", right", found.right, truth.right), (", left", found.left, truth.left)]
    scores = {}
    for side, mask, lung in pairs:
        part = None if trial.part is None else trial.part & lung
        held = _share(mask & part, part) if part is not None else float("nan")
        both, total = (
            int(np.count_nonzero(mask & lung)),
            int(np.count_nonzero(mask) + np.count_nonzero(lung)),
        )
        dice = 2 * both / max(total, 1)
        scores[trial.name + side] = Row(dice, held)
    return scores


class Report(NamedTuple):
    """What a method made of one scan: rows by name, seconds of each segmentation, and what it refused."""

    rows: dict[str, Row]
    seconds: list[float]
    refused: list[str]


def measure(hu: Volume, spacing: Spacing, methods: dict[str, Method]) -> dict[str, Report]:
    """Try every method on a healthy scan; what a method finds no lung in is empty, and named."""
    reports = {name: Report({}, [], []) for name in methods}
    for trial in trials(hu, split_lungs(hu, spacing), spacing):
        for name, method in methods.items():
            start = time.perf_counter()
            try:
                found = method(trial.hu, trial.spacing)
            except ValueError as error:
                found = Lungs(*(np.zeros(trial.hu.shape, bool) for _ in range(2)))
                reports[name].refused.append(f"{trial.name}: {error}")
            reports[name].seconds.append(time.perf_counter() - start)
            reports[name].rows.update(rows(trial, found))
    return reports


def lowest(reports: list[dict[str, Report]]) -> dict[str, dict[str, Row]]:
    """Return the lowest of all scans, by method and row."""
    out: dict[str, dict[str, Row]] = {}
    for report in reports:
        for method, found in report.items():
            kept = out.setdefault(method, {})
            for name, row in found.rows.items():
                kept[name] = Row(*np.fmin(row, kept.get(name, row)).tolist())
    return out


def table(scores: dict[str, dict[str, Row]]) -> str:
    """Write Markdown: a line per row, a column per measure and method."""
    heads = [f"{measure}: {method}" for measure in ("Dice", "held") for method in scores]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name in next(iter(scores.values())):
        found = [score[name] for score in scores.values()]
        values = [row.dice for row in found] + [row.held for row in found]
        lines.append(f"| {name} | " + " | ".join("" if v != v else f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print a table per scan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scans", nargs="+", type=Path, metavar="SCANS")
    parser.add_argument(
        "--lungs",
        nargs="+",
        default=["classical", "network"],
        help="network, classical, lungmask, or weights of normnet.train --task lungs",
    )
    args = parser.parse_args()
    methods: dict[str, Method] = {name: method_of(name) for name in args.lungs}
    found = []
    for path in args.scans:
        start = time.perf_counter()
        ct = read_ct(path)
        reports = measure(ct.hu, ct.spacing, methods)
        z, y, x = ct.hu.shape
        print(
            f"{path.name}: {z} x {y} x {x} voxels of " + " x ".join(f"{s:.2f}" for s in ct.spacing) + " mm\n"
        )
        print(table({name: report.rows for name, report in reports.items()}) + "\n")
        times = ", ".join(f"{name} {np.median(report.seconds):.1f}" for name, report in reports.items())
        print(f"seconds of a segmentation: {times}; of all: {time.perf_counter() - start:.0f}")
        for name, report in reports.items():
            for text in report.refused:
                print(f"refused by {name}: {text}")
        print(flush=True)
        found.append(reports)
    if len(found) > 1:
        print(f"lowest of {len(found)} scans\n\n{table(lowest(found))}")


def _means(
    volume: npt.NDArray[Any], axis: int, edges: npt.NDArray[np.float64], fill: float
) -> npt.NDArray[np.float32]:
    """Average along an axis between edges, given in voxels from its start; beyond its ends is `fill`."""
    moved = np.moveaxis(volume, axis, 0)
    at = edges.clip(0, len(moved))
    low = np.minimum(at.astype(int), len(moved) - 1)
    weight = (at - low)[:, None, None]
    out = np.empty((len(edges) - 1, *moved.shape[1:]), np.float32)
    for first in range(0, moved.shape[1], CHUNK):
        sums = np.zeros((len(moved) + 1, *moved[0, first : first + CHUNK].shape))
        np.cumsum(moved[:, first : first + CHUNK] - float(fill), axis=0, out=sums[1:])
        reached = sums[low] * (1 - weight) + sums[low + 1] * weight
        out[:, first : first + CHUNK] = np.diff(reached, axis=0) / (edges[1] - edges[0]) + fill
    return np.moveaxis(out, 0, axis)


def _share(part: Mask, whole: Mask) -> float:
    count = int(np.count_nonzero(whole))
    return int(np.count_nonzero(part)) / count if count else float("nan")


if __name__ == "__main__":
    main()
