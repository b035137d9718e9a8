"""One picture per prepared case: nobody trains well on masks that nobody looked at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.files import SOFTWARE, write_atomically
from normnet.prepare.morphology import Mask, Spacing, bounding_box

AXIAL = 14


def write_picture(
    path: Path,
    hu: npt.NDArray[np.int16],
    mask: Mask,
    removed: Mask,
    *,
    spacing: Spacing,
    segments: Sequence[tuple[int, int]],
    title: str,
) -> None:
    """Draw axial, coronal and sagittal slices with the mask's outline.

    Parameters
    ----------
    path : Path
        PNG file; replaced atomically.
    hu, mask, removed : (Z, Y, X) arrays
        Working grid: HU, lung mask, wrong edges that were taken out of it (drawn in orange).
    spacing : (3,) floats
        mm, axis order z, y, x.
    segments : sequence of (z0, z1)
        Slices in use; titles of the others say "left out".
    title : str
        Figure title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    box = bounding_box(mask | removed) or (
        slice(0, hu.shape[0]),
        slice(0, hu.shape[1]),
        slice(0, hu.shape[2]),
    )
    y, x = (slice(max(s.start - 25, 0), s.stop + 25) for s in box[1:])
    figure = Figure(figsize=(20, 12))
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 6).ravel()
    used = np.zeros(hu.shape[0], bool)
    for z0, z1 in segments:
        used[z0:z1] = True
    for axis, z in zip(
        axes, np.linspace(box[0].start, box[0].stop - 1, AXIAL).round().astype(int), strict=False
    ):
        _slice(axis, hu[z, y, x], mask[z, y, x], removed[z, y, x], 1.0)
        axis.set_title(f"z {z}" + ("" if used[z] else " left out"), fontsize=8, color="k" if used[z] else "r")
    upright = spacing[0] / spacing[2]
    for axis, part in zip(axes[AXIAL:], (0.35, 0.65, 0.25, 0.75), strict=True):
        coronal = axis in axes[AXIAL : AXIAL + 2]
        side = box[1] if coronal else box[2]
        at = int(side.start + part * (side.stop - side.start - 1))
        view: Any = (slice(None, None, -1), at, x) if coronal else (slice(None, None, -1), y, at)
        _slice(axis, hu[view], mask[view], removed[view], upright)
        axis.set_title(f"{'y' if coronal else 'x'} {at}", fontsize=8)
    figure.suptitle(title, fontsize=12)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.93, 0.02, 0.1)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=70, format="png", metadata={"Software": SOFTWARE})
    write_atomically(path, picture.getvalue())


def _slice(axis: Any, hu: npt.NDArray[np.int16], mask: Mask, removed: Mask, aspect: float) -> None:
    axis.imshow(hu, cmap="gray", vmin=-1100, vmax=300, aspect=aspect, interpolation="nearest")
    if removed.any():
        overlay = np.zeros((*hu.shape, 4))
        overlay[removed] = (1.0, 0.6, 0.0, 0.9)
        axis.imshow(overlay, aspect=aspect, interpolation="nearest")
    if mask.any() and not mask.all():
        axis.contour(mask, [0.5], colors="cyan", linewidths=0.7)
    axis.axis("off")
