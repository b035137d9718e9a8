"""What a command works on: a slab of a CT file with its lung mask, or of the phantom."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lesionsynth import phantom

if TYPE_CHECKING:
    from lesionsynth.io import Scan

PHANTOM_SHAPE = (48, 208, 272)
PHANTOM_SPACING = (2.0, 1.4, 1.4)
"""A field of 291 x 381 mm: any phantom in its true size."""


@dataclass(frozen=True, eq=False)
class Case:
    """A slab, and where it comes from."""

    hu: npt.NDArray[np.int16]
    """(z, y, x) HU, LPS index order."""
    lung_mask: npt.NDArray[np.bool_]
    spacing: tuple[float, float, float]
    """mm, axis order z, y, x."""
    name: str
    slab: tuple[int, int]
    """First slice, and one past the last, in the volume."""
    source: dict[str, Any]
    """What a record keeps of it: file names, or the phantom's seed."""
    volume: Scan | None = None
    """The file, for results on its own grid; None for the phantom."""


def load_case(
    path: str | None,
    mask: str | None,
    *,
    phantom_seed: int = 0,
    slab: tuple[int, int] | None = None,
    middle: int | None = None,
    depth: int = 32,
) -> Case:
    """Read a volume and its lung mask, or make the phantom, and cut a slab.

    Parameters
    ----------
    path, mask : str or None
        Files; without `path`, the phantom.
    phantom_seed : int
        Which phantom.
    slab : (2,) ints, optional
        First slice and one past the last; overrides `middle` and `depth`.
    middle : int, optional
        Middle slice; where omitted, the slab with the most lung is taken.
    depth : int
        Slices; 0 takes all.

    Raises
    ------
    FileNotFoundError, ValueError, ImportError
        As `lesionsynth.io.read_ct`; no mask for a file, a mask without a file, or a slab
        outside the volume or without lung.
    """
    if path is None:
        if mask is not None:
            raise ValueError("--mask needs an INPUT volume")
        chest = phantom.chest_ct(PHANTOM_SHAPE, PHANTOM_SPACING, phantom_seed)
        source: dict[str, Any] = {"phantom_seed": phantom_seed}
        return _cut(chest.hu, chest.lung_mask, chest.spacing, "phantom", source, None, slab, middle, depth)
    if mask is None:
        raise ValueError(
            f"{path} needs a lung mask: give --mask FILE, or make one with 'python -m normnet.prepare'"
        )
    from lesionsynth import io  # needs SimpleITK, which the phantom does not

    volume = io.read_ct(path)
    lungs = io.read_mask(mask, volume)
    source = {"input": Path(path).name, "mask": Path(mask).name}
    return _cut(volume.hu, lungs, volume.spacing, volume.name, source, volume, slab, middle, depth)


def _cut(
    hu: npt.NDArray[np.int16],
    lung_mask: npt.NDArray[np.bool_],
    spacing: tuple[float, float, float],
    name: str,
    source: dict[str, Any],
    volume: Scan | None,
    slab: tuple[int, int] | None,
    middle: int | None,
    depth: int,
) -> Case:
    counts = lung_mask.sum((1, 2))
    start, stop = choose_slab(counts, middle, depth) if slab is None else slab
    if not 0 <= start < stop <= len(counts):
        raise ValueError(f"the slab {start}..{stop} must lie in the volume's {len(counts)} slices")
    if not counts[start:stop].any():
        raise ValueError(f"slices {start} to {stop - 1} of {name} hold no lung: choose another --slice")
    inside = np.ascontiguousarray(lung_mask[start:stop])
    return Case(np.ascontiguousarray(hu[start:stop]), inside, spacing, name, (start, stop), source, volume)


def choose_slab(counts: Sequence[int] | npt.NDArray[Any], middle: int | None, depth: int) -> tuple[int, int]:
    """First slice, and one past the last, of `depth` slices around `middle`, or of those with the most lung.

    Raises
    ------
    ValueError
        `depth` is negative or `middle` lies outside the volume.

    Examples
    --------
    >>> choose_slab([0, 1, 5, 5, 0], None, 2)
    (2, 4)
    >>> choose_slab([0, 1, 5, 5, 0], 0, 2)
    (0, 2)
    """
    total = len(counts)
    if depth < 0:
        raise ValueError(f"--depth must be >= 0, got {depth}")
    if middle is not None and not 0 <= middle < total:
        raise ValueError(f"--slice must be in [0, {total}), the volume's slices, got {middle}")
    if depth == 0 or depth >= total:
        return 0, total
    if middle is None:
        sums = np.convolve(np.asarray(counts, np.int64), np.ones(depth, np.int64), mode="valid")
        start = int(np.argmax(sums))
    else:
        start = min(max(middle - depth // 2, 0), total - depth)
    return start, start + depth


def checksum(array: npt.NDArray[Any]) -> str:
    """Return the CRC-32 of dtype, shape and voxels in hexadecimal: enough to tell results apart."""
    head = f"{array.shape}{array.dtype.str}".encode()
    return f"{zlib.crc32(np.ascontiguousarray(array).data, zlib.crc32(head)):08x}"
