"""Slices of a case without known truth: CT beside the same with lesions and the outline of the lungs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from normnet.report.pictures import LUNG_WINDOW, RGB, Array, grey, lung_box, png, side_by_side, worst_slices

LESION = (255, 127, 14)
"""Orange: neither of the colours that stand for right and wrong where a truth is known."""
OUTLINE = (0, 150, 255)
DASHES = ((255, 225, 0), (0, 0, 0))
"""Yellow and black of the second outline, so that one of them stands out from air and from dense disease.
Readers of any colour vision tell yellow from blue, and dashes from a line."""
DASH = 4
"""Voxels of a dash."""
OPACITY = 0.45
WIDTH = 700
"""Pixels a picture is enlarged to, roughly: whole pixels per voxel."""


def shown_slices(lesions: Array, lung: Array, count: int, classical: Array | None = None) -> list[int]:
    """Choose the slices to look at.

    Parameters
    ----------
    lesions, lung : (Z, Y, X) bool arrays
        Maps; the lung is not empty.
    count : int
        At most so many.
    classical : (Z, Y, X) bool array, optional
        Other lungs; may be empty.

    Returns
    -------
    list of int
        Most lesion first, kept apart; without lesions the middle slice of the lungs, so that these can be
        checked. The slice in which the two lungs differ most is among them, at the end where it has not most
        lesion.
    """
    nothing = np.broadcast_to(np.False_, lesions.shape)
    chosen = worst_slices(lesions, nothing, count)
    if not chosen and count:
        inside = np.flatnonzero(lung.any(axis=(1, 2)))
        chosen = [int(inside[len(inside) // 2])]
    if classical is not None and count and (z := most_apart(lung, classical)) not in chosen:
        chosen = [*chosen[: count - 1], z]
    return chosen


def most_apart(lung: Array, classical: Array) -> int:
    """Slice in which two (Z, Y, X) masks differ most; the lowest of several."""
    return int(np.count_nonzero(lung != classical, axis=(1, 2)).argmax())


def mark(background: RGB, lesions: Array, lung: Array, classical: Array | None = None) -> RGB:
    """Colour lesions and draw the outline of the lungs.

    Parameters
    ----------
    background : (Y, X, 3) uint8 array
        From `grey`. Not modified.
    lesions, lung : (Y, X) bool arrays
        Maps. The outline lies on the voxels around the lung, so that it hides none inside.
    classical : (Y, X) bool array, optional
        Other lungs: a dashed outline, where it is not that of `lung`.

    Returns
    -------
    (Y, X, 3) uint8 array
    """
    picture = background.copy()
    mixed = (1 - OPACITY) * background[lesions] + OPACITY * np.array(LESION)
    picture[lesions] = (mixed + 0.5).astype(np.uint8)
    if classical is not None:
        y, x = np.nonzero(_around(classical))
        picture[y, x] = np.array(DASHES, np.uint8)[(y // DASH + x // DASH) % 2]
    picture[_around(lung)] = OUTLINE
    return picture


def _around(mask: Array) -> Array:
    """Voxels that share a side with a (Y, X) mask and lie outside it."""
    around = np.zeros_like(mask)
    around[1:] |= mask[:-1]
    around[:-1] |= mask[1:]
    around[:, 1:] |= mask[:, :-1]
    around[:, :-1] |= mask[:, 1:]
    outside: Array = around & ~mask
    return outside


def finding_pictures(
    hu: Array,
    lesions: Array,
    lung: Array,
    spacing: Sequence[float],
    *,
    count: int = 3,
    classical: Array | None = None,
) -> list[tuple[int, bytes]]:
    """Pictures of the slices with most lesion, cropped to the lungs.

    Parameters
    ----------
    hu : (Z, Y, X) array
        Hounsfield units, in LPS order: the patient's right is on the left of the picture.
    lesions, lung : (Z, Y, X) bool arrays
        Maps; the lung is not empty.
    spacing : (3,) floats
        Voxel size in mm, (z, y, x).
    count : int
        Pictures at most.
    classical : (Z, Y, X) bool array, optional
        Other lungs to outline.

    Returns
    -------
    list of (slice index, PNG)
        In the order of `shown_slices`.
    """
    box = lung_box(lung if classical is None else lung | classical)
    pictures = []
    for z in shown_slices(lesions, lung, count, classical):
        ct = grey(hu[z][box], LUNG_WINDOW)
        other = None if classical is None else classical[z][box]
        marked = mark(ct, lesions[z][box], lung[z][box], other)
        joined = side_by_side([_square(p, spacing[1:]) for p in (ct, marked)])
        pictures.append((z, png(joined, scale=max(1, round(WIDTH / joined.shape[1])))))
    return pictures


def _square(picture: RGB, spacing: Sequence[float]) -> RGB:
    """Repeat rows or columns of oblong voxels so that pixels are square."""
    rows, columns = (
        np.minimum((np.arange(round(n * s / min(spacing))) + 0.5) * min(spacing) / s, n - 1).astype(int)
        for n, s in zip(picture.shape, spacing, strict=False)
    )
    square: RGB = picture[rows][:, columns]
    return square
