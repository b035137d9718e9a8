"""Show a thin-slice training pair as a scan with thick slices would, back on the thin grid.

Many clinical scans have slices of 5-8 mm. Resampled to the training grid, whatever is oblique to them (the
diaphragm, vessels at the hilum) is a haze along z that no thin-slice volume has, and that a network trained
on thin slices alone calls a lesion: the "gap between data sets" that PAPER.md V names as its largest source
of false positives. Lesions are blurred with their surroundings, or sharpness alone would give them away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import lesionsynth as ls
from lesionsynth.window import HU_RANGE

Array = Any
"""A NumPy array or a torch tensor."""


def slice_profile(
    slices: int, spacing: float, thickness: float, phase: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Describe a thick-slice scan, interpolated back to thin slices.

    Parameters
    ----------
    slices : int
        Thin slices n.
    spacing : float
        Their distance in mm.
    thickness : float
        Thickness t of the thick slices in mm, which lie t apart and touch.
    phase : float
        In [0, 1): the first thick slice is centred ``phase * t`` above the slab's lower end.

    Returns
    -------
    weights : (n, n) float32 array
        Row i gives thin slice i of the result from the thin slices: a box average over t around each thick
        slice (of what lies in the slab), then linear interpolation between the centres. Rows sum to 1.
    nearest : (n,) int64 array
        The thin slice at the centre of the thick slice nearest to each: where its mask comes from.

    Raises
    ------
    ValueError
        `slices`, `spacing` or `thickness` is not positive.
    """
    if slices < 1 or not spacing > 0 or not thickness > 0:
        given = f"{slices}, {spacing} and {thickness}"
        raise ValueError(f"slices, spacing and thickness must be positive, got {given}")
    lower = np.arange(slices) * spacing
    length = slices * spacing
    centres = (phase + np.arange(-1, int(np.ceil(length / thickness)) + 1)) * thickness
    inside = np.minimum(lower + spacing, centres[:, None] + thickness / 2) - np.maximum(
        lower, centres[:, None] - thickness / 2
    )
    boxes = np.clip(inside, 0, None)
    used = boxes.sum(axis=1) > 1e-6 * thickness
    boxes, centres = boxes[used], centres[used]
    boxes /= boxes.sum(axis=1, keepdims=True)
    middle = lower + spacing / 2
    hats = np.stack([np.interp(middle, centres, unit) for unit in np.eye(len(centres))], axis=1)
    at = centres[np.abs(middle[:, None] - centres).argmin(axis=1)]
    nearest = np.clip(np.floor(at / spacing), 0, slices - 1).astype(np.int64)
    return (hats @ boxes).astype(np.float32), nearest


def thicken(
    hu: Array,
    lung_mask: Array,
    image: Array,
    lesions: Array,
    *,
    profile: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]],
    tau: float,
) -> tuple[Array, Array, Array]:
    """Give the pair that a thick-slice scan of the same chest and the same lesions would.

    Parameters
    ----------
    hu : (z, y, x) int16 array
        Raw Hounsfield units, tissue around the lungs included: it blurs into them.
    lung_mask, lesions : (z, y, x) bool arrays
        M and the synthetic lesions.
    image : (z, y, x) float32 array
        A, of `lesionsynth.LesionSynthesizer`.
    profile : (weights, nearest)
        From `slice_profile`.
    tau : float
        Bright tissue is at or above it, on the scale of `image`.

    Returns
    -------
    image : float32 array
        A of the thick-slice scan: lesions in HU among raw HU, averaged, windowed, inside its lung mask.
    target : bool array
        Healthy bright tissue of the thick-slice scan, outside its lesions.
    lesions : bool array
        Voxels of which at least half are lesion.
    """
    low, high = HU_RANGE
    raw = _float(hu)
    ill = _where(lesions, low + image * (high - low), raw)
    mask = lung_mask[_like(profile[1], lung_mask)]
    found = (_along_z(profile[0], _float(lesions)) >= 0.5) & mask
    with_lesions, healthy = (_window(_along_z(profile[0], v)) * mask for v in (ill, raw))
    return with_lesions, (healthy >= tau) & mask & ~found, found


def _along_z(weights: npt.NDArray[np.float32], volume: Array) -> Array:
    flat = _like(weights, volume) @ volume.reshape(volume.shape[0], -1)
    return flat.reshape(volume.shape)


def _window(hu: Array) -> Array:
    low, high = HU_RANGE
    return ls.window_hu(hu) if isinstance(hu, np.ndarray) else ((hu - low) / (high - low)).clamp(0, 1)


def _where(condition: Array, one: Array, other: Array) -> Array:
    pick: Any = np.where if isinstance(one, np.ndarray) else torch.where
    return pick(condition, one, other)


def _float(array: Array) -> Array:
    return array.astype(np.float32) if isinstance(array, np.ndarray) else array.float()


def _like(array: npt.NDArray[Any], other: Array) -> Array:
    """`array` in the library and on the device of `other`."""
    return array if isinstance(other, np.ndarray) else torch.from_numpy(array).to(other.device)
