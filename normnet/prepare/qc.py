"""One picture per prepared case: nobody trains well on masks that nobody looked at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.files import SOFTWARE, write_atomically
from normnet.prepare.morphology import Mask, Spacing, bounding_box

AXIAL = 14
Line = Mapping[str, Any]
SOLID: tuple[Line, ...] = ({"colors": "cyan", "linewidths": 0.7, "linestyles": ["solid"]},)
"""Outline of the mask: arguments of contours, one over the other."""
COVERING: tuple[Line, ...] = ({**SOLID[0], "linewidths": 1.3},)
"""The same over `DASHED`, wide enough to hide it where both are one."""
DASHED: tuple[Line, ...] = (
    {"colors": "black", "linewidths": 0.8, "linestyles": ["solid"]},
    {"colors": "yellow", "linewidths": 0.8, "linestyles": [(0, (4, 4))]},
)
"""That of the lungs by thresholds: yellow stands out from air, black from dense disease."""


def write_picture(
    path: Path,
    hu: npt.NDArray[np.int16],
    mask: Mask,
    removed: Mask,
    *,
    spacing: Spacing,
    segments: Sequence[tuple[int, int]],
    title: str,
    classical: Mask | None = None,
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
    classical : (Z, Y, X) bool array, optional
        The lungs by thresholds, where `mask` is a network's: outlined, too, with a legend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    box = bounding_box(mask | removed if classical is None else mask | removed | classical) or (
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

    def draw(axis: Any, view: Any, aspect: float) -> None:
        _slice(axis, hu[view], removed[view], aspect)
        if classical is not None:
            _outline(axis, classical[view], DASHED)
        _outline(axis, mask[view], SOLID if classical is None else COVERING)

    for axis, z in zip(
        axes, np.linspace(box[0].start, box[0].stop - 1, AXIAL).round().astype(int), strict=False
    ):
        draw(axis, (z, y, x), 1.0)
        axis.set_title(f"z {z}" + ("" if used[z] else " left out"), fontsize=8, color="k" if used[z] else "r")
    upright = spacing[0] / spacing[2]
    for axis, part in zip(axes[AXIAL:], (0.35, 0.65, 0.25, 0.75), strict=True):
        coronal = axis in axes[AXIAL : AXIAL + 2]
        side = box[1] if coronal else box[2]
        at = int(side.start + part * (side.stop - side.start - 1))
        view: Any = (slice(None, None, -1), at, x) if coronal else (slice(None, None, -1), y, at)
        draw(axis, view, upright)
        axis.set_title(f"{'y' if coronal else 'x'} {at}", fontsize=8)
    figure.suptitle(title, fontsize=12)
    if classical is not None:
        _legend(figure)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.93, 0.02, 0.1)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=70, format="png", metadata={"Software": SOFTWARE})
    write_atomically(path, picture.getvalue())


def _slice(axis: Any, hu: npt.NDArray[np.int16], removed: Mask, aspect: float) -> None:
    axis.imshow(hu, cmap="gray", vmin=-1100, vmax=300, aspect=aspect, interpolation="nearest")
    if removed.any():
        overlay = np.zeros((*hu.shape, 4))
        overlay[removed] = (1.0, 0.6, 0.0, 0.9)
        axis.imshow(overlay, aspect=aspect, interpolation="nearest")
    axis.axis("off")


def _outline(axis: Any, mask: Mask, lines: Sequence[Line]) -> None:
    if mask.any() and not mask.all():
        for line in lines:
            axis.contour(mask, [0.5], **line)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    drawn = [
        tuple(Line2D([], [], color=line["colors"], linestyle=line["linestyles"][0]) for line in lines)
        for lines in (COVERING, DASHED)
    ]
    figure.legend(
        drawn, ["the lung network", "thresholds"], title="lungs by", loc="upper right", facecolor="0.5"
    )
