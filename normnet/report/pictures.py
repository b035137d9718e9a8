"""Slices, overlays as in PAPER.md Fig. 5, curves and histograms, as PNG.

Colours: green is found (true positive), blue missed (false negative), red wrongly marked (false positive).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
RGB = npt.NDArray[np.uint8]

TRUE_POSITIVE, FALSE_NEGATIVE, FALSE_POSITIVE = (60, 200, 80), (60, 120, 255), (240, 70, 60)
LUNG_WINDOW = (-1100.0, 200.0)
"""HU shown as black and white; wider than the network's, so that both vessels and haze are visible."""


def grey(values: Array, window: tuple[float, float]) -> RGB:
    """Show a slice in grey.

    Parameters
    ----------
    values : (Y, X) array
        HU, or an image in [0, 1].
    window : (2,) floats
        Values shown as black and white.

    Returns
    -------
    (Y, X, 3) uint8 array

    Raises
    ------
    ValueError
        The slice is not 2-D or the window is not increasing.
    """
    low, high = window
    if values.ndim != 2:
        raise ValueError(f"values must be one slice (y, x), got shape {values.shape}")
    if not low < high:
        raise ValueError(f"window must be (low, high) with low < high, got {window}")
    scaled = np.clip((np.asarray(values, np.float32) - low) / (high - low), 0, 1)
    return np.repeat((255 * scaled + 0.5).astype(np.uint8)[..., None], 3, axis=-1)


def overlay(background: RGB, prediction: Array, truth: Array, *, opacity: float = 0.45) -> RGB:
    """Colour what was found, missed and wrongly marked (PAPER.md Fig. 5d).

    Parameters
    ----------
    background : (Y, X, 3) uint8 array
        From `grey`. Not modified.
    prediction, truth : (Y, X) bool arrays
        Lesions.
    opacity : float
        Of the colours, in [0, 1].

    Returns
    -------
    (Y, X, 3) uint8 array

    Raises
    ------
    ValueError
        Shapes differ or the opacity is out of range.
    """
    if prediction.shape != background.shape[:2] or truth.shape != background.shape[:2]:
        raise ValueError(
            f"prediction and truth must have the shape of background, {background.shape[:2]}, "
            f"got {prediction.shape} and {truth.shape}"
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie in [0, 1], got {opacity}")
    picture = background.astype(np.float32)
    for region, colour in (
        (prediction & truth, TRUE_POSITIVE),
        (~prediction & truth, FALSE_NEGATIVE),
        (prediction & ~truth, FALSE_POSITIVE),
    ):
        picture[region] = (1 - opacity) * picture[region] + opacity * np.array(colour, np.float32)
    return (picture + 0.5).astype(np.uint8)


def worst_slices(prediction: Array, truth: Array, count: int) -> list[int]:
    """Slices with most wrong voxels, worst first, kept apart so that neighbours do not repeat each other.

    Parameters
    ----------
    prediction, truth : (Z, Y, X) bool arrays
        Lesions.
    count : int
        At most so many.

    Returns
    -------
    list of int
        Slice indices; a slice without any lesion or error is never listed, fewer than `count` where there are
        none.
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


def png(picture: RGB, *, scale: int = 1) -> bytes:
    """Encode a picture; each pixel becomes `scale` x `scale` pixels."""
    from matplotlib.image import imsave

    big = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    stream = io.BytesIO()
    imsave(stream, big, format="png")
    return stream.getvalue()


def side_by_side(pictures: Sequence[RGB], *, gap: int = 3) -> RGB:
    """Join pictures of one height from left to right, with white gaps of `gap` pixels."""
    height = pictures[0].shape[0]
    if any(p.shape[0] != height for p in pictures):
        raise ValueError(f"pictures must have one height, got {[p.shape[0] for p in pictures]}")
    white = np.full((height, gap, 3), 255, np.uint8)
    parts = [part for p in pictures for part in (p, white)][:-1]
    return np.concatenate(parts, axis=1)


def lung_box(lung_mask: Array, margin: int = 6) -> tuple[slice, slice]:
    """In-plane box (y, x) around the lungs of a (Z, Y, X) mask; the whole plane where it is empty."""
    sides = []
    for axis in (1, 2):
        line = np.flatnonzero(lung_mask.any(axis=tuple({0, 1, 2} - {axis})))
        stop = lung_mask.shape[axis]
        sides.append(
            slice(max(int(line[0]) - margin, 0), min(int(line[-1]) + 1 + margin, stop))
            if line.size
            else slice(0, stop)
        )
    return sides[0], sides[1]


def case_pictures(
    hu: Array, prediction: Array, truth: Array, lung_mask: Array, *, count: int = 3
) -> list[tuple[int, bytes]]:
    """Pictures of a case's worst slices: CT beside overlay, cropped to the lungs.

    Parameters
    ----------
    hu : (Z, Y, X) array
        Hounsfield units.
    prediction, truth, lung_mask : (Z, Y, X) bool arrays
        Lesions and lungs.
    count : int
        Pictures at most.

    Returns
    -------
    list of (slice index, PNG)
        Worst first.
    """
    rows, columns = lung_box(lung_mask)
    pictures = []
    for z in worst_slices(prediction, truth, count):
        ct = grey(hu[z, rows, columns], LUNG_WINDOW)
        marked = overlay(ct, prediction[z, rows, columns], truth[z, rows, columns])
        joined = side_by_side([ct, marked])
        pictures.append((z, png(joined, scale=max(1, round(600 / joined.shape[1])))))
    return pictures


def curve(
    series: Mapping[str, tuple[Array, Array]],
    *,
    xlabel: str,
    ylabel: str,
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> bytes:
    """Draw lines as PNG.

    Parameters
    ----------
    series : mapping of str to (x, y)
        Lines by the names in the legend; NaN leaves a gap.
    xlabel, ylabel : str
        Axis labels.
    colours : sequence of (red, green, blue), optional
        Of the lines in turn, 0 to 255; matplotlib's where omitted.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(6.4, 2.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    if colours is not None:
        axes.set_prop_cycle(color=[tuple(part / 255 for part in colour) for colour in colours])
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, linewidth=1.3)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    return _encoded(figure)


def histogram(
    series: Mapping[str, Array],
    *,
    xlabel: str,
    ylabel: str = "share",
    bins: int = 60,
    range: tuple[float, float] | None = None,  # noqa: A002 - NumPy's name
) -> bytes:
    """Draw histograms over each other as PNG, each normalised to the shares of its own values.

    Parameters
    ----------
    series : mapping of str to array
        Values of any shape by the names in the legend, drawn in this order; empty ones are left out.
    xlabel, ylabel : str
        Axis labels.
    bins : int
        Number of bins, of equal width.
    range : (2,) floats, optional
        First and last edge. Values outside count in the shares and are not shown. From the lowest to the
        highest value of all series where omitted.

    Returns
    -------
    bytes
        PNG.

    Raises
    ------
    ValueError
        There is no bin, the range is not increasing, or it is omitted and a value is not finite.
    """
    from matplotlib.figure import Figure

    edges, heights = shares(series, bins, range)
    figure = Figure(figsize=(6.4, 2.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, height in heights.items():
        drawn = axes.stairs(height, edges, label=name, linewidth=1.3)
        axes.stairs(height, edges, fill=True, alpha=0.25, color=drawn.get_edgecolor())
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(edges[0], edges[-1]))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(heights) > 1:
        axes.legend()
    return _encoded(figure)


def shares(
    series: Mapping[str, Array], bins: int, limits: tuple[float, float] | None
) -> tuple[Array, dict[str, Array]]:
    """Edges (bins + 1,) and, for every series that is not empty, the share of its values in each bin (bins,).

    Parameters and errors are those of `histogram`.
    """
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    filled = {name: values for name, values in series.items() if values.size}
    if limits is None:
        ends = [end for values in filled.values() for end in (float(values.min()), float(values.max()))]
        if not np.isfinite(ends).all():
            raise ValueError(f"series must be finite where range is omitted, got values up to {ends}")
        low, high = min(ends, default=0.0), max(ends, default=0.0)
        limits = (low, high) if low < high else (low - 0.5, low + 0.5)  # as NumPy does for a single value
    if not limits[0] < limits[1]:
        raise ValueError(f"range must be (low, high) with low < high, got {limits}")
    edges = np.linspace(*limits, bins + 1)
    return edges, {name: np.histogram(values, edges)[0] / values.size for name, values in filled.items()}


def _encoded(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
