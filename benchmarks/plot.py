"""Pictures of a result file: whole pairs, and stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, THEIRS = "#1b6ca8", "#b0b0b0"


def draw(results: dict[str, Any], path: Path) -> Path:
    """Write a PNG beside the result file: bars of medians with quartiles, time on a logarithmic axis."""
    volumes = list(results["pairs"])
    figure, axes = plt.subplots(
        len(volumes), 2, figsize=(13, 4.8 * len(volumes)), squeeze=False, layout="constrained"
    )
    for (left, right), volume in zip(axes, volumes, strict=True):
        _pairs(left, results["pairs"][volume], f"One pair, {volume}")
        _stages(right, results["stages"][volume], f"Stages, {volume}")
    info = results["machine"]
    figure.suptitle(f"{info['cpu']}, {info['usable_cores']} cores, {info['date'][:10]}: median and quartiles")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return picture


def _pairs(axis: Any, timings: dict[str, Any], title: str) -> None:
    names = sorted(timings, key=lambda name: timings[name]["median_s"], reverse=True)
    entries = [timings[name] for name in names]
    colours = [OURS if name.startswith("lesionsynth") else THEIRS for name in names]
    bars = axis.barh(names, [1e3 * e["median_s"] for e in entries], color=colours, xerr=_quartiles(entries))
    axis.bar_label(bars, [f" {1e3 * e['median_s']:.3g} ms" for e in entries], padding=6, fontsize=8)
    axis.set(xscale="log", xlabel="ms per pair", title=title)
    axis.set_xlim(right=8e3 * max(e["q75_s"] for e in entries))  # room for the longest bar's number
    axis.grid(axis="x", which="both", alpha=0.25)


def _stages(axis: Any, stages: dict[str, Any], title: str) -> None:
    """Group by contestant: stages of ours and of SciPy's bear their own methods' names."""
    rows = [(f"{stage} ({name})", name, entry) for name, s in stages.items() for stage, entry in s.items()]
    rows.reverse()
    entries = [entry for _, _, entry in rows]
    colours = [OURS if name.startswith("lesionsynth") else THEIRS for _, name, _ in rows]
    labels = [label for label, _, _ in rows]
    axis.barh(labels, [1e3 * e["median_s"] for e in entries], color=colours, xerr=_quartiles(entries))
    axis.set(xscale="log", xlabel="ms per pair", title=title)
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(axis="x", which="both", alpha=0.25)


def _quartiles(entries: list[dict[str, Any]]) -> list[list[float]]:
    low = [1e3 * (e["median_s"] - e["q25_s"]) for e in entries]
    high = [1e3 * (e["q75_s"] - e["median_s"]) for e in entries]
    return [low, high]
