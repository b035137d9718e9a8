"""A picture of training pairs: input, with lesions, target, labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth import files
from lesionsynth.commands import optional
from lesionsynth.synthesizer import LesionPair
from lesionsynth.window import window_hu

COLUMNS = ("input", "with lesions", "target", "labels")
BODY_HU = (-1000.0, 400.0)
"""Window of the surroundings; inside the lungs the picture shows the pair as it is."""
BODY_DIM = 0.45
"""Brightness of the surroundings."""


def choose_slices(labels: npt.NDArray[Any], lung_mask: npt.NDArray[Any], count: int) -> list[int]:
    """Slices, from feet to head, at equal steps of lesion volume (of lung volume where there is no lesion).

    Raises
    ------
    ValueError
        `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"--rows must be >= 1, got {count}")
    amount = (labels > 0).sum((1, 2))
    if not amount.any():
        amount = np.asarray(lung_mask).sum((1, 2))
    share = np.cumsum(amount) / amount.sum()
    wanted = (np.arange(count) + 0.5) / count
    return [int(z) for z in np.searchsorted(share, wanted)]


def save_preview(
    path: Path,
    hu: npt.NDArray[Any],
    lung_mask: npt.NDArray[np.bool_],
    healthy: npt.NDArray[np.float32],
    pair: LesionPair,
    *,
    spacing: tuple[float, float, float],
    first_slice: int = 0,
    rows: int = 3,
    title: str | None = None,
) -> None:
    """Write the picture of one pair as PNG, atomically.

    Parameters
    ----------
    path : Path
        Ends in ``.png``; its folder is created.
    hu, lung_mask, healthy : (Z, Y, X) arrays
        The slab in HU, its mask, and H in [0, 1].
    pair : LesionPair
        Rendered on `healthy`.
    spacing : (3,) floats
        Voxel size in mm, for the picture's proportions.
    first_slice : int
        Number of the slab's first slice in its volume, for the captions.
    rows : int
        Slices shown.
    title : str, optional
        Line above the picture.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    ValueError
        `rows` is not positive, or as `check_output`.
    """
    check_output(path)
    slices = choose_slices(pair.labels, lung_mask, rows)
    figure = _figure(hu, lung_mask, healthy, pair, slices, spacing, first_slice, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as beside:
        figure.savefig(beside, format="png", facecolor="black", metadata={"Software": files.SOFTWARE})


def check_output(path: Path) -> None:
    """Refuse a file that is no picture of ours.

    Raises
    ------
    ValueError
        `path` does not end in ``.png``, or something else is there.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, got {path}")
    if os.path.lexists(path) and not files.is_picture(path):
        raise ValueError(f"--output must be a new file or an earlier preview, got {path}: name another file")


def _figure(
    hu: npt.NDArray[Any],
    lung_mask: npt.NDArray[np.bool_],
    healthy: npt.NDArray[np.float32],
    pair: LesionPair,
    slices: list[int],
    spacing: tuple[float, float, float],
    first_slice: int,
    title: str | None,
) -> Any:
    figures: Any = optional("matplotlib.figure", "preview needs matplotlib: pip install 'lesionsynth[io]'")
    height = hu.shape[1] * spacing[1] / (hu.shape[2] * spacing[2])
    figure = figures.Figure(figsize=(4 * 3.4, (3.4 * height + 0.05) * len(slices) + 0.5), dpi=110)
    axes = figure.subplots(len(slices), 4, squeeze=False)
    colours = _colours(int(pair.labels.max()))
    for row, z in zip(axes, slices, strict=True):
        body = BODY_DIM * window_hu(hu[z], BODY_HU)
        panels = _panels(
            body, lung_mask[z], healthy[z], pair.image[z], pair.target[z], pair.labels[z], colours
        )
        for axis, panel in zip(row, panels, strict=True):
            axis.imshow(panel, aspect=spacing[1] / spacing[2], interpolation="bilinear")
            axis.set_axis_off()
        caption = f"slice {first_slice + z}"
        row[0].text(0.02, 0.02, caption, color="0.7", fontsize=8, transform=row[0].transAxes)
    for axis, name in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(name, color="white", fontsize=11)
    if title:
        figure.text(0.005, 0.995, title, color="0.6", fontsize=8, va="top")
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 0.5 / figure.get_size_inches()[1], 0.01, 0.01)
    return figure


def _panels(
    body: npt.NDArray[Any],
    mask: npt.NDArray[Any],
    healthy: npt.NDArray[Any],
    image: npt.NDArray[Any],
    target: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    colours: npt.NDArray[Any],
) -> list[npt.NDArray[Any]]:
    """One row of (y, x, 3) pictures."""
    grey = [np.repeat(np.where(mask, view, body)[..., None], 3, axis=2) for view in (healthy, image)]
    wanted = np.where(mask[..., None], 0.12 + 0.88 * target[..., None], 0.6 * body[..., None])
    over = grey[1].copy()
    lesion = labels > 0
    over[lesion] = 0.55 * over[lesion] + 0.45 * colours[labels[lesion]]
    return [*grey, np.repeat(wanted, 3, axis=2), over]


def _colours(count: int) -> npt.NDArray[np.float64]:
    """(count + 1, 3) colours far apart for consecutive labels: hues a golden section apart."""
    hue = (np.arange(count + 1) * 0.61803398875)[:, None] + np.array([0.0, 1 / 3, 2 / 3])
    return np.asarray(0.5 + 0.5 * np.cos(2 * np.pi * hue))
