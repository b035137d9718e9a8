"""Healthy probabilities of a volume of any length, window by window, in the memory of one slab.

The networks see overlapping slabs of slices, in plane the whole slice or overlapping tiles of it. What
several windows saw is averaged, each weighted by the distance to its ends. A slice is handed out as soon as
no later slab sees it, so nothing here grows with the volume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from normnet.config import PredictConfig
from normnet.model import Model

Image = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
ReadSlices = Callable[[int, int], Image]
"""Windowed lungs of the slices first ... last - 1, (last - first, y, x) float32."""

TILE_OVERLAP = 64
"""Least overlap of neighbouring tiles in voxels, at most half a tile: what a ramp of 32 voxels on either side
needs for a network that looks that far."""


class Windows(NamedTuple):
    """Windows along one axis.

    Attributes
    ----------
    starts : list of int
        First voxel of each.
    size : int
        Voxels of each.
    """

    starts: list[int]
    size: int

    @property
    def end(self) -> int:
        """Voxels the windows reach, padding included."""
        return self.starts[-1] + self.size


def slab_windows(depth: int, slab: int, overlap: float) -> Windows:
    """Cover `depth` slices with slabs that share `overlap` of their slices; the last one ends the volume."""
    step = max(1, round(slab * (1 - overlap)))
    last = max(depth - slab, 0)
    return Windows(sorted({*range(0, last, step), last}), slab)


def tile_windows(length: int, tile: int | None, multiple: int) -> Windows:
    """Cover a row or column with equal tiles, as few and as small as a size of at most `tile` allows.

    Parameters
    ----------
    length : int
        Voxels to cover.
    tile : int, optional
        Largest size; one window takes everything where omitted.
    multiple : int
        The size of a window is a multiple of it; what it has beyond `length` is padding.

    Returns
    -------
    Windows
        They overlap by `TILE_OVERLAP` at least, or by half a small tile.

    Raises
    ------
    ValueError
        `tile` is smaller than `multiple`.
    """
    padded = -(-length // multiple) * multiple
    if tile is None or padded <= tile:
        return Windows([0], padded)
    largest = tile // multiple * multiple
    if largest == 0:
        raise ValueError(f"tile must be at least {multiple} (product of the model's strides), got {tile}")
    shared = min(TILE_OVERLAP, largest // 2)
    count = -(-(length - shared) // (largest - shared))
    size = -(-(length + (count - 1) * shared) // count)
    size = min(-(-size // multiple) * multiple, largest)
    spare = max(length - size, 0)
    return Windows([round(k * spare / (count - 1)) for k in range(count)], size)


def triangle(size: int) -> Image:
    """Weights 1, 2, ... 2, 1: an end has seen one neighbour only and counts least."""
    return np.minimum(np.arange(1, size + 1), np.arange(size, 0, -1)).astype(np.float32)


def weights_of(windows: Windows) -> tuple[Image, Image]:
    """Weights within a window, and their sum over the windows at each voxel; ones for a single window."""
    if len(windows.starts) == 1:
        return np.ones(windows.size, np.float32), np.ones(windows.size, np.float32)
    ramp, total = triangle(windows.size), np.zeros(windows.end, np.float32)
    for start in windows.starts:
        total[start : start + windows.size] += ramp
    return ramp, total


@torch.inference_mode()
def slide(
    read: ReadSlices,
    lung_mask: Mask,
    models: Sequence[Model],
    config: PredictConfig,
    device: torch.device,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Run the networks over a volume and hand out finished slices, from the first to the last.

    Parameters
    ----------
    read : callable
        ``read(first, last)`` gives these slices of the windowed lungs.
    lung_mask : (z, y, x) bool array
        Windows without lung are skipped: their voxels have no meaning.
    models : sequence of Model
        Of the task lesions. They are moved to `device`.
    config : PredictConfig
        Slab, overlap, tile and precision.
    device : torch.device
        Where to compute.

    Yields
    ------
    first : int
        First slice of the block.
    probabilities : (models, slices, y, x) float32 tensor on `device`
        Of the slices from `first` on.

    Raises
    ------
    ValueError
        Slab or tile do not fit the networks' strides, or a network gives NaN.

    Notes
    -----
    Memory: for each model the sums of one slab, and what the network itself needs for one window.
    """
    depth, height, width = lung_mask.shape
    multiple = math.lcm(*(model.config.multiple for model in models))
    if config.slab % multiple:
        raise ValueError(
            f"slab must be a multiple of {multiple} (product of the model's strides), got {config.slab}"
        )
    slabs = slab_windows(depth, config.slab, config.overlap)
    rows, columns = (tile_windows(n, config.tile, multiple) for n in (height, width))
    ramp, plane_weight = _plane_weights(rows, columns, device)
    for model in models:
        model.to(device, config.precision)
    sums = torch.zeros((len(models), slabs.size, rows.end, columns.end), device=device)
    ramp_z, weight_z = (torch.from_numpy(w).to(device)[:, None, None] for w in weights_of(slabs))
    for start, following in pairwise([*slabs.starts, depth]):
        inside = lung_mask[start : start + slabs.size]
        if inside.any():
            image = np.zeros((slabs.size, rows.end, columns.end), np.float32)
            image[: len(inside), :height, :width] = read(start, start + len(inside))
            part = torch.from_numpy(image).to(device)
            for y, x in product(rows.starts, columns.starts):
                tile = (..., slice(y, y + rows.size), slice(x, x + columns.size))
                if inside[tile].any():
                    for total, model in zip(sums, models, strict=True):
                        chance = model.healthy_probability(part[tile][None, None])[0, 0]
                        total[tile] += chance * ramp_z * ramp
        done = following - start
        weight = weight_z[start:following] * plane_weight
        found = (sums[:, :done] / weight)[..., :height, :width]
        if not math.isfinite(float(found.sum())):
            number = int(found.flatten(1).sum(dim=1).isfinite().logical_not().nonzero()[0])
            raise ValueError(f"models must give probabilities, got NaN from models[{number}], damaged ones")
        yield start, found
        sums[:, : slabs.size - done] = sums[:, done:].clone()
        sums[:, slabs.size - done :] = 0


def probabilities(image: Image, model: Model, config: PredictConfig, device: torch.device) -> Image:
    """Healthy probability of every voxel of a volume in memory, by one model.

    Parameters
    ----------
    image : (z, y, x) float32 array
        Windowed lungs.
    model, config, device
        As in `slide`.

    Returns
    -------
    (z, y, x) float32 array
    """
    found = np.empty(image.shape, np.float32)
    everywhere = np.broadcast_to(np.True_, image.shape)
    for first, block in slide(lambda a, b: image[a:b], everywhere, [model], config, device):
        found[first : first + block.shape[1]] = block[0].cpu().numpy()
    return found


def _plane_weights(
    rows: Windows, columns: Windows, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (y, x) within a tile, and their sum over the tiles of the plane."""
    (ramp_y, sum_y), (ramp_x, sum_x) = weights_of(rows), weights_of(columns)
    ramp, total = np.outer(ramp_y, ramp_x), np.outer(sum_y, sum_x)
    return torch.from_numpy(ramp).to(device), torch.from_numpy(total).to(device)
