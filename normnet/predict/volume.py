"""Segment an array: the networks vote in slabs, post-processing makes lesions (PAPER.md III-A, III-D)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import lesionsynth as ls
from normnet.config import PredictConfig
from normnet.device import choose_device
from normnet.inflation import inflation_factor, windowed_lungs
from normnet.model import Model
from normnet.postprocess import Mask, postprocess_slices
from normnet.sliding import slide


@dataclass(frozen=True)
class Prediction:
    """What `predict_volume` found, on the grid of its input (z, y, x)."""

    lesions: Mask
    """Final lesions."""
    lesions_without_growing: Mask
    """Before region growing (Table III, "w/o growing")."""
    healthy: Mask
    """Bright lung voxels that the majority of the models calls healthy."""
    probability: npt.NDArray[np.float32] | None
    """Mean healthy probability of the models; 0 outside the lung. None where it was not asked for."""
    inflation: float
    """What HU in the lungs were multiplied with (`normnet.inflation`); 1 where the models ask for nothing."""


def checked_volume(hu: Any, lung_mask: Any) -> tuple[npt.NDArray[Any], Mask]:
    """Return a volume and its lungs as arrays.

    Raises
    ------
    ValueError
        Shapes differ or are not (z, y, x), or the mask is empty.
    """
    volume, mask = np.asarray(hu), np.asarray(lung_mask, dtype=np.bool_)
    if volume.ndim != 3 or volume.shape != mask.shape:
        shapes = f"{volume.shape} and {mask.shape}"
        raise ValueError(f"hu and lung_mask must be (z, y, x) and alike, got shapes {shapes}")
    if not mask.any():
        raise ValueError("lung_mask must contain at least one voxel, got an empty mask")
    return volume, mask


def predict_volume(
    hu: Any,
    lung_mask: Any,
    models: Sequence[Model],
    config: PredictConfig,
    *,
    device: str = "auto",
    keep_probability: bool = True,
) -> Prediction:
    """Segment one volume.

    Parameters
    ----------
    hu : (z, y, x) array
        Hounsfield units on the training grid, 1.0 x 0.8 x 0.8 mm.
    lung_mask : (z, y, x) bool array
        Lungs, lesions included.
    models : sequence of Model
        They are moved to `device`.
    config : PredictConfig
        Threshold, slabs, tiles and post-processing.
    device : str
        Where the networks run; "auto" takes CUDA where there is some.
    keep_probability : bool
        Also return the mean probability, four bytes a voxel.

    Returns
    -------
    Prediction

    Raises
    ------
    ValueError
        Shapes differ, the mask is empty, there is no model, or slab or tile do not fit the models.

    Notes
    -----
    Memory: the results, and for each model the probabilities of one slab; see `normnet.sliding.slide`. The
    networks see the lungs' bounding box, zero around it as in training; a volume shorter than a slab is
    padded with empty slices.
    """
    volume, mask = checked_volume(hu, lung_mask)
    if not models:
        raise ValueError("models must hold at least one network, got none")
    where = choose_device(device)
    levels = torch.tensor([model.threshold(config.probability) for model in models], device=where)
    level = bright_threshold(models, config)
    settings, tau = replace(config.postprocess, threshold_hu=level), np.float32(ls.threshold(level))
    factor = inflation_factor(volume, mask, inflation_of(models))
    healthy = np.zeros(mask.shape, dtype=np.bool_)
    mean = np.zeros(mask.shape, dtype=np.float32) if keep_probability else None
    plane = _lung_box(mask)

    def read(first: int, last: int) -> npt.NDArray[np.float32]:
        return windowed_lungs(volume[first:last], mask[first:last], factor)

    def read_lungs(first: int, last: int) -> npt.NDArray[np.float32]:
        return read(first, last)[:, *plane]

    for first, chances in slide(read_lungs, mask[:, *plane], models, config, where):
        last = first + chances.shape[1]
        part = (slice(first, last), *plane)
        votes = (chances > levels[:, None, None, None]).sum(dim=0)
        majority = (2 * votes > len(models)).cpu().numpy()
        healthy[part] = majority & (read_lungs(first, last) >= tau) & mask[part]
        if mean is not None:
            mean[part] = np.where(mask[part], chances.mean(dim=0).cpu().numpy(), 0)
    lesions = postprocess_slices(read, mask, healthy, settings)
    return Prediction(lesions.final, lesions.core, healthy, mean, factor)


def bright_threshold(models: Sequence[Model], config: PredictConfig) -> float:
    """Return T in HU, at or above which voxels are bright: the models' own unless `config` has another.

    Raises
    ------
    ValueError
        The models were trained with different T, and `config` has none.
    """
    if config.postprocess.threshold_hu is not None:
        return config.postprocess.threshold_hu
    levels = {model.threshold_hu for model in models}
    if len(levels) > 1:
        shown = ", ".join(f"{level:g}" for level in sorted(levels))
        raise ValueError(
            f"models must have one threshold_hu unless postprocess.threshold_hu is given, got {shown}"
        )
    return levels.pop()


def inflation_of(models: Sequence[Model]) -> float | None:
    """Return the density in HU that the models expect healthy lung to have; None where they expect nothing.

    Raises
    ------
    ValueError
        They expect different ones.
    """
    levels = {model.inflation_hu for model in models}
    if len(levels) > 1:
        raise ValueError(f"models must have one inflation_hu, got {', '.join(sorted(map(str, levels)))}")
    return levels.pop()


def _lung_box(mask: Mask) -> tuple[slice, slice]:
    """Box of the lungs in plane, over all slices."""
    rows, columns = np.flatnonzero(mask.any(axis=2).any(axis=0)), np.flatnonzero(mask.any(axis=1).any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
