"""Every picture of the package, as PNG: overlays as in PAPER.md Fig. 5, outlines, curves, histograms.

Green is found (true positive), blue missed (false negative), red wrongly marked (false positive); lesions are
orange where no truth is known. Slices are (Y, X) in LPS order: the patient's right is on the left.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lesionsynth.files import SOFTWARE
from normnet.config import PAPER_THRESHOLD_HU
from normnet.metrics import bright_voxels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
RGB = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

TRUE_POSITIVE, FALSE_NEGATIVE, FALSE_POSITIVE = (60, 200, 80), (60, 120, 255), (240, 70, 60)
LESION, OUTLINE, OPACITY = (255, 127, 14), (0, 150, 255), 0.45
DASHES, DASH = ((255, 225, 0), (0, 0, 0)), 4
"""Yellow and black of a second outline, so many voxels each: one of them stands out from air and from dense
disease, and any colour vision tells yellow from blue, and dashes from a line."""
LUNG_WINDOW = (-1100.0, 200.0)
"""HU shown as black and white; wider than the network's, so that both vessels and haze are visible."""
BINS = 60
"""Of the probability in `VoxelCounts`: 0.95, the paper's threshold, is an edge."""
HU_EDGES = np.array([-np.inf, *np.linspace(*LUNG_WINDOW, 66), np.inf])
"""Of its HU: 20 HU a bin."""


def grey(values: Array, window: tuple[float, float]) -> RGB:
    """Show a (Y, X) slice in grey, (Y, X, 3): HU or other values, from black to white over a window.

    Raises
    ------
    ValueError
        `values` are no slice, or the window does not increase.
    """
    low, high = window
    if values.ndim != 2:
        raise ValueError(f"values must be one slice (y, x), got shape {values.shape}")
    if not low < high:
        raise ValueError(f"window must be (low, high) with low < high, got {window}")
    scaled = np.clip((np.asarray(values, np.float32) - low) / (high - low), 0, 1)
    return np.repeat((255 * scaled + 0.5).astype(np.uint8)[..., None], 3, axis=-1)


def overlay(background: RGB, prediction: Array, truth: Array, *, opacity: float = OPACITY) -> RGB:
    """Colour what was found, missed and wrongly marked (PAPER.md Fig. 5d), on a copy of `background`.

    Parameters
    ----------
    background : (Y, X, 3) uint8 array
        From `grey`.
    prediction, truth : (Y, X) bool arrays
        Lesions. ValueError where shapes differ.
    opacity : float
        Of the colours, in [0, 1].
    """
    if prediction.shape != background.shape[:2] or truth.shape != background.shape[:2]:
        raise ValueError(
            f"prediction and truth must have the shape of background, {background.shape[:2]}, "
            f"got {prediction.shape} and {truth.shape}"
        )
    wrong = ((~prediction & truth, FALSE_NEGATIVE), (prediction & ~truth, FALSE_POSITIVE))
    return _tinted(background, ((prediction & truth, TRUE_POSITIVE), *wrong), opacity)


def mark(background: RGB, lesions: Array, lung: Array, classical: Array | None = None) -> RGB:
    """Colour lesions and draw the outline of the lungs, on a copy of `background` from `grey`.

    The outline lies on the voxels around the lung, so that it hides none inside. That of `classical`, other
    lungs, is dashed where the two differ. All are (Y, X) bool arrays.
    """
    picture = _tinted(background, [(lesions, LESION)], OPACITY)
    if classical is not None:
        y, x = np.nonzero(_around(classical))
        picture[y, x] = np.array(DASHES, np.uint8)[(y // DASH + x // DASH) % 2]
    picture[_around(lung)] = OUTLINE
    return picture


def _tinted(background: RGB, regions: Iterable[tuple[Array, Colour]], opacity: float) -> RGB:
    picture = background.copy()
    for region, colour in regions:
        mixed = (1 - opacity) * background[region] + opacity * np.array(colour)
        picture[region] = (mixed + 0.5).astype(np.uint8)
    return picture


def _around(mask: Array) -> Array:
    """Voxels that share a side with a (Y, X) mask and lie outside it."""
    from scipy.ndimage import binary_dilation

    return np.asarray(binary_dilation(mask) & ~mask)


def worst_slices(prediction: Array, truth: Array, count: int) -> list[int]:
    """Choose at most `count` slices of (Z, Y, X) bool maps with most wrong voxels, worst first.

    They are apart, so that neighbours do not repeat each other; none is without any lesion or error.
    """
    wrong = np.count_nonzero(prediction ^ truth, axis=(1, 2))
    marked = np.count_nonzero(prediction | truth, axis=(1, 2))
    apart = max(1, len(wrong) // (3 * max(count, 1)))
    chosen: list[int] = []
    # lexsort: most errors first, then most lesion, then the lowest slice
    for z in np.lexsort((np.arange(len(wrong)), -marked, -wrong)):
        if marked[z] and len(chosen) < count and all(abs(int(z) - other) >= apart for other in chosen):
            chosen.append(int(z))
    return chosen


def shown_slices(lesions: Array, lung: Array, count: int, classical: Array | None = None) -> list[int]:
    """Choose at most `count` slices of a case without known truth: most lesion first, kept apart.

    Without lesions it is the middle slice of the lungs, so that these can be checked. The slice in which they
    differ most from `classical`, other lungs, is among them, at the end where it has not most lesion. All are
    (Z, Y, X) bool arrays; the lung is not empty.
    """
    chosen = worst_slices(lesions, np.zeros((1, 1, 1), bool), count)
    if not chosen and count:
        inside = np.flatnonzero(lung.any(axis=(1, 2)))
        chosen = [int(inside[len(inside) // 2])]
    if classical is not None and count and (z := most_apart(lung, classical)) not in chosen:
        chosen = [*chosen[: count - 1], z]
    return chosen


def most_apart(lung: Array, classical: Array) -> int:
    """Slice in which two (Z, Y, X) masks differ most; the lowest of several."""
    return int(np.count_nonzero(lung != classical, axis=(1, 2)).argmax())


def png(picture: RGB, *, scale: int = 1) -> bytes:
    """Encode a picture; each pixel becomes `scale` x `scale` pixels."""
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, picture.repeat(scale, axis=0).repeat(scale, axis=1), format="png")
    return stream.getvalue()


def side_by_side(pictures: Sequence[RGB]) -> RGB:
    """Join pictures of one height from left to right, with white gaps of 3 pixels."""
    height = pictures[0].shape[0]
    if any(p.shape[0] != height for p in pictures):
        raise ValueError(f"pictures must have one height, got {[p.shape[0] for p in pictures]}")
    white = np.full((height, 3, 3), 255, np.uint8)
    return np.concatenate([part for p in pictures for part in (p, white)][:-1], axis=1)


def lung_box(lung_mask: Array, margin: int = 6) -> tuple[slice, slice]:
    """In-plane box (y, x) around the lungs of a (Z, Y, X) mask; the whole plane where it is empty."""
    return _side(lung_mask, 1, margin), _side(lung_mask, 2, margin)


def _side(mask: Array, axis: int, margin: int = 0) -> slice:
    line, size = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))), mask.shape[axis]
    if not line.size:
        return slice(0, size)
    return slice(max(int(line[0]) - margin, 0), min(int(line[-1]) + 1 + margin, size))


def case_pictures(
    hu: Array, prediction: Array, truth: Array, lung_mask: Array, *, count: int = 3
) -> list[tuple[int, bytes]]:
    """Draw the `worst_slices` of a case, each as (slice, PNG): CT beside overlay, cropped to the lungs.

    All are (Z, Y, X) arrays: Hounsfield units, and bool lesions and lungs.
    """
    box, pictures = lung_box(lung_mask), []
    for z in worst_slices(prediction, truth, count):
        ct = grey(hu[z][box], LUNG_WINDOW)
        pictures.append((z, _enlarged([ct, overlay(ct, prediction[z][box], truth[z][box])], 600)))
    return pictures


def finding_pictures(
    hu: Array, lesions: Array, lung: Array, spacing: Sequence[float], *, count: int = 3,
    classical: Array | None = None,
) -> list[tuple[int, bytes]]:  # fmt: skip
    """Draw the `shown_slices` of a case, each as (slice, PNG): CT beside `mark`, cropped to the lungs.

    As in `case_pictures`; `spacing` in mm (z, y, x) makes pixels square.
    """
    box, pictures = lung_box(lung if classical is None else lung | classical), []
    for z in shown_slices(lesions, lung, count, classical):
        ct, other = grey(hu[z][box], LUNG_WINDOW), None if classical is None else classical[z][box]
        both = (ct, mark(ct, lesions[z][box], lung[z][box], other))
        pictures.append((z, _enlarged([_square(p, spacing[1:]) for p in both], 700)))
    return pictures


def _enlarged(pictures: Sequence[RGB], width: int) -> bytes:
    """Join pictures and enlarge them to about `width`: whole pixels per voxel."""
    joined = side_by_side(pictures)
    return png(joined, scale=max(1, round(width / joined.shape[1])))


def _square(picture: RGB, spacing: Sequence[float]) -> RGB:
    """Repeat rows or columns of oblong voxels so that pixels are square."""
    rows, columns = (
        np.minimum((np.arange(round(n * s / min(spacing))) + 0.5) * min(spacing) / s, n - 1).astype(int)
        for n, s in zip(picture.shape, spacing, strict=False)
    )
    square: RGB = picture[rows][:, columns]
    return square


def curve(
    series: Mapping[str, tuple[Array, Array]], *, xlabel: str, ylabel: str,
    colours: Sequence[Colour] | None = None,
) -> bytes:  # fmt: skip
    """Draw lines.

    Parameters
    ----------
    series : mapping of str to (x, y)
        By the names in the legend; NaN leaves a gap.
    colours : sequence of (red, green, blue), optional
        Of the lines in turn, 0 to 255; matplotlib's where omitted.
    """
    figure, axes = _chart(xlabel, ylabel)
    if colours is not None:
        axes.set_prop_cycle(color=[tuple(part / 255 for part in colour) for colour in colours])
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, linewidth=1.3)
    if len(series) > 1:
        axes.legend()
    return _encoded(figure)


def histogram(series: Mapping[str, Array], edges: Array, *, xlabel: str, ylabel: str = "share") -> bytes:
    """Draw histograms over each other, each normalised to the shares of its own values.

    Parameters
    ----------
    series : mapping of str to (n,) integer array
        Counts per bin by the names in the legend, drawn in this order; what has no count is left out.
    edges : (n + 1,) array
        Of the bins. The first and the last may be infinite: what lies beyond the others counts in the shares
        and is not shown. ValueError where they do not increase, or do not fit the counts.
    """
    shown = np.flatnonzero(np.isfinite(edges))
    if len(shown) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"edges must increase, two of them finite, got {np.asarray(edges).tolist()}")
    if wrong := {name: len(counts) for name, counts in series.items() if len(counts) != len(edges) - 1}:
        raise ValueError(f"series must have one count per bin, {len(edges) - 1}, got {wrong}")
    figure, axes = _chart(xlabel, ylabel)
    filled = {name: counts for name, counts in series.items() if counts.any()}
    for name, counts in filled.items():
        height = counts[shown[0] : shown[-1]] / counts.sum()
        drawn = axes.stairs(height, edges[shown], label=name, linewidth=1.3)
        axes.stairs(height, edges[shown], fill=True, alpha=0.25, color=drawn.get_edgecolor())
    axes.set_xlim(edges[shown[0]], edges[shown[-1]])
    axes.set_ylim(bottom=0)
    if len(filled) > 1:
        axes.legend()
    return _encoded(figure)


def _chart(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(6.4, 2.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _encoded(figure: Figure, **how: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", **how)
    return stream.getvalue()


class VoxelCounts:
    """Voxels counted case after case, for two histograms: a test set has gigabytes of them.

    Attributes
    ----------
    probability : dict of str to (60,) int64 array
        Lung voxels that the method judges by healthy probability, for healthy and lesion.
    hu : dict of str to (67,) int64 array
        Voxels by HU (`HU_EDGES`), for found, missed and wrongly marked.
    """

    def __init__(self) -> None:
        self.probability = {name: np.zeros(BINS, np.int64) for name in ("healthy", "lesion")}
        kinds = ("found", "missed", "wrongly marked")
        self.hu = {name: np.zeros(len(HU_EDGES) - 1, np.int64) for name in kinds}
        self.judged: set[float | None] = set()

    def add(
        self, hu: Array, prediction: Array, truth: Array, lung_mask: Array, probability: Array | None, *,
        threshold_hu: float | None = PAPER_THRESHOLD_HU,
    ) -> None:  # fmt: skip
        """Count a case.

        All are (Z, Y, X) arrays: Hounsfield units, bool lesions and lungs, healthy probability. The method
        judges lung voxels at or above `threshold_hu`; None for all of them.
        """
        regions = (prediction & truth, ~prediction & truth, prediction & ~truth)
        for counts, region in zip(self.hu.values(), regions, strict=True):
            counts += np.histogram(hu[region], HU_EDGES)[0]
        if probability is None:
            return
        self.judged.add(threshold_hu)
        judged = bright_voxels(hu, lung_mask, threshold_hu)
        for counts, region in zip(self.probability.values(), (judged & ~truth, judged & truth), strict=True):
            counts += np.histogram(probability[region], BINS, (0.0, 1.0))[0]

    def pictures(self) -> dict[str, bytes]:
        """Draw what was counted, by caption; a histogram without a voxel is left out."""
        drawn = {}
        if any(counts.any() for counts in self.probability.values()):
            caption, edges = f"{self._judged()} by healthy probability", np.linspace(0, 1, BINS + 1)
            drawn[caption] = histogram(self.probability, edges, xlabel="healthy probability")
        if any(counts.any() for counts in self.hu.values()):
            caption = "lesion voxels that were found or missed, and voxels that were wrongly marked, by HU"
            drawn[caption] = histogram(self.hu, HU_EDGES, xlabel="HU")
        return drawn

    def _judged(self) -> str:
        levels = sorted({round(level) for level in self.judged if level is not None})
        parts = [f"lung voxels of at least {level} HU" for level in levels]
        if len(levels) > 2:
            parts = [f"lung voxels of at least {levels[0]} to {levels[-1]} HU, by case,"]
        return " or ".join([*parts, *(["all lung voxels"] if None in self.judged else [])])


def prepared_picture(
    hu: Array, mask: Array, removed: Array, *, spacing: Sequence[float],
    segments: Sequence[tuple[int, int]], title: str, classical: Array | None = None,
) -> bytes:  # fmt: skip
    """Draw axial, coronal and sagittal slices of a prepared case: nobody trains well on masks not looked at.

    Parameters
    ----------
    hu, mask, removed : (Z, Y, X) arrays
        Working grid: HU, lung mask, wrong edges that were taken out of it (drawn in orange).
    spacing : (3,) floats
        mm, axis order z, y, x.
    segments : sequence of (z0, z1)
        Slices in use; titles of the others say "left out".
    classical : (Z, Y, X) bool array, optional
        The lungs by thresholds, where `mask` is a network's: outlined, too, with a legend.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    # outlines as lines over each other: colour, width, style; where both are one, cyan hides the dashes
    cyan: list[tuple[str, float, Any]] = [("cyan", 0.7 if classical is None else 1.3, "solid")]
    outlines = {"the lung network": (mask, cyan)}
    if classical is not None:
        dashed = [("black", 0.8, "solid"), ("yellow", 0.8, (0, (4, 4)))]
        outlines = {"thresholds": (classical, dashed), **outlines}
    shown = np.logical_or.reduce([removed, *(outline for outline, _ in outlines.values())])
    box, (y, x), up = [_side(shown, axis) for axis in range(3)], lung_box(shown, 25), slice(None, None, -1)
    axial = np.linspace(box[0].start, box[0].stop - 1, 14).round().astype(int)
    views: list[tuple[Any, str]] = []
    for z in axial:
        used = any(first <= z < last for first, last in segments)
        views.append(((z, y, x), f"z {z}" if used else f"z {z} left out"))
    for axis, part in ((1, 0.35), (1, 0.65), (2, 0.25), (2, 0.75)):
        at = int(box[axis].start + part * (box[axis].stop - box[axis].start - 1))
        views.append(((up, at, x) if axis == 1 else (up, y, at), f"{'zyx'[axis]} {at}"))
    figure = Figure(figsize=(20, 12))
    for axes, (view, name) in zip(figure.subplots(3, 6).ravel(), views, strict=True):
        how = {"aspect": 1.0 if name[0] == "z" else spacing[0] / spacing[2], "interpolation": "nearest"}
        axes.imshow(hu[view], cmap="gray", vmin=-1100, vmax=300, **how)
        if removed[view].any():
            axes.imshow(removed[view][..., None] * (1.0, 0.6, 0.0, 0.9), **how)
        for outline, lines in outlines.values():
            for colour, width, style in lines if 0 < outline[view].mean() < 1 else ():
                axes.contour(outline[view], [0.5], colors=colour, linewidths=width, linestyles=[style])
        axes.set_title(name, fontsize=8, color="r" if name.endswith("left out") else "k")
        axes.axis("off")
    figure.suptitle(title, fontsize=12)
    if classical is not None:
        keys: dict[str, Any] = {
            name: tuple(Line2D([], [], color=colour, ls=style) for colour, _, style in lines)
            for name, (_, lines) in reversed(outlines.items())
        }
        figure.legend(list(keys.values()), list(keys), title="lungs by", loc="upper right", facecolor="0.5")
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.93, 0.02, 0.1)
    return _encoded(figure, dpi=70, metadata={"Software": SOFTWARE})
