"""Show a thin-slice training pair as a scan with thick slices would, back on the thin grid.

Many clinical scans have slices of 5-8 mm. Resampled to the training grid, whatever is oblique to them (the
diaphragm, vessels at the hilum) is a haze along z that no thin-slice volume has, and that a network trained
on thin slices alone calls a lesion: the "gap between data sets" that PAPER.md V names as its largest source
of false positives. Lesions are blurred with their surroundings, or sharpness alone would give them away.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import lesionsynth as ls
from lesionsynth.window import HU_RANGE
from normnet.config import TrainConfig


class Profile(NamedTuple):
    """How thick slices show n thin ones.

    Attributes
    ----------
    weights : (n, n) float32 array
        Row i gives thin slice i of the result from the thin slices: a box average over the thickness around
        each thick slice (of what lies in the slab), then linear interpolation between the centres. Rows sum
        to 1.
    nearest : (n,) int64 array
        The thin slice at the centre of the thick slice nearest to each: where its mask comes from.
    """

    weights: npt.NDArray[np.float32]
    nearest: npt.NDArray[np.int64]


def draw_profile(
    config: TrainConfig, slices: int, spacing: float, chance: float, thickness: float, phase: float
) -> Profile | None:
    """Draw the profile of a sample from three numbers in [0, 1); None where its slices stay thin."""
    if chance >= config.thick_slices:
        return None
    least, most = config.thick_mm
    return slice_profile(slices, spacing, least + thickness * (most - least), phase)


def slice_profile(slices: int, spacing: float, thickness: float, phase: float) -> Profile:
    """Describe a thick-slice scan, interpolated back to thin slices.

    Parameters
    ----------
    slices : int
        Thin slices.
    spacing : float
        Their distance in mm.
    thickness : float
        Thickness t of the thick slices in mm, which lie t apart and touch.
    phase : float
        In [0, 1): the first thick slice is centred ``phase * t`` above the slab's lower end.

    Raises
    ------
    ValueError
        `slices`, `spacing` or `thickness` is not positive.
    """
    if slices < 1 or not spacing > 0 or not thickness > 0:
        given = f"{slices}, {spacing} and {thickness}"
        raise ValueError(f"slices, spacing and thickness must be positive, got {given}")
    lower = np.arange(slices) * spacing
    centres = (phase + np.arange(-1, int(np.ceil(slices * spacing / thickness)) + 1)) * thickness
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
    return Profile((hats @ boxes).astype(np.float32), nearest)


def thicken(
    hu: torch.Tensor,
    lung_mask: torch.Tensor,
    image: torch.Tensor,
    lesions: torch.Tensor,
    *,
    profile: Profile,
    tau: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give the pair that a thick-slice scan of the same chest and the same lesions would.

    Parameters
    ----------
    hu : (z, y, x) int16 tensor
        Raw Hounsfield units, tissue around the lungs included: it blurs into them.
    lung_mask, lesions : (z, y, x) bool tensors
        M and the synthetic lesions.
    image : (z, y, x) float32 tensor
        A, of `lesionsynth.LesionSynthesizer`.
    profile : Profile
        From `slice_profile`.
    tau : float
        Bright tissue is at or above it, on the scale of `image`.

    Returns
    -------
    image : float32 tensor
        A of the thick-slice scan: lesions in HU among raw HU, averaged, windowed, inside its lung mask.
    target : bool tensor
        Healthy bright tissue of the thick-slice scan, outside its lesions.
    lesions : bool tensor
        Voxels of which at least half are lesion.
    """
    weights, nearest = (torch.from_numpy(array).to(hu.device) for array in profile)
    low, high = HU_RANGE
    mask = lung_mask[nearest]

    def averaged(volume: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(weights, volume.float(), 1)  # type: ignore[no-any-return]

    found = (averaged(lesions) >= 0.5) & mask
    ill = torch.where(lesions, low + image * (high - low), hu.float())
    with_lesions, healthy = (ls.window_hu(averaged(v)) * mask for v in (ill, hu))
    return with_lesions, (healthy >= tau) & mask & ~found, found
