"""The generator's building blocks as functions: SciPy's names, arguments and meaning, for NumPy and DLPack arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lesionsynth._dlpack import Restore, accept
from lesionsynth.config import CONNECTIVITIES
from lesionsynth.cpu import filters, philox
from lesionsynth.plan import check_word

Stream = philox.Stream


def philox_uniform(
    shape: Sequence[int],
    seed: int,
    *,
    stream: int = Stream.FREE,
    sample: int = 0,
    component: int = 0,
    offset: Sequence[int] = (0, 0, 0),
) -> npt.NDArray[np.float32]:
    """Uniform noise in [0, 1) that depends on the voxel's coordinate alone (Philox4x32-10).

    Parameters
    ----------
    shape : (3,) ints
        (z, y, x); z and y end below 2**16.
    seed, stream : int
        Key words in [0, 2**32).
    sample, component : int
        Counter words in [0, 2**32).
    offset : (3,) ints
        Coordinate of the first voxel: a crop of a field is the field of the crop.

    Returns
    -------
    (z, y, x) float32 array
        Multiples of 2**-24.

    Raises
    ------
    TypeError, ValueError
        An argument is no integer or out of its range.
    """
    for name, word in (("seed", seed), ("stream", int(stream)), ("sample", sample), ("component", component)):
        check_word(name, word)
    size, start = tuple(int(n) for n in shape), tuple(int(n) for n in offset)
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"shape must be three positive integers (z, y, x), got {tuple(shape)}")
    if len(start) != 3 or min(start) < 0:
        raise ValueError(f"offset must be three integers >= 0 (z, y, x), got {tuple(offset)}")
    for axis, limit in enumerate((2**16, 2**16, 2**32)):
        if start[axis] + size[axis] > limit:
            raise ValueError(f"offset + shape must stay within {limit} along axis {axis}, got {start} + {size}")
    out = np.empty(size, dtype=np.float32)
    philox.fill_uniform(out, seed, int(stream), sample, component, *start)
    return out


def gaussian_filter(
    input: Any,  # noqa: A002  # SciPy's name
    sigma: float | Sequence[float],
    *,
    truncate: float = 4.0,
    mode: str = "reflect",
) -> Any:
    """Smooth a volume, as `scipy.ndimage.gaussian_filter`, in float32.

    Parameters
    ----------
    input : (z, y, x) array
        Float; never modified.
    sigma : float or (3,) floats
        Standard deviation in voxels; 0 leaves an axis alone.
    truncate : float
        Radius in standard deviations.
    mode : {"reflect"}
        Edges.

    Returns
    -------
    (z, y, x) float32 array
        In the library of `input`.

    Raises
    ------
    TypeError, ValueError
        Wrong rank, dtype, sigma < 0, truncate <= 0 or another mode.
    """
    volume, restore = _volume(input)
    _check_mode(mode)
    sigmas = tuple(float(s) for s in np.broadcast_to(np.asarray(sigma, dtype=float), 3))
    if not all(np.isfinite(s) and s >= 0 for s in sigmas):
        raise ValueError(f"sigma must be finite and >= 0, got {sigma}")
    if not truncate > 0:
        raise ValueError(f"truncate must be > 0, got {truncate}")
    return restore(filters.gaussian_filter(np.ascontiguousarray(volume, dtype=np.float32), sigmas, truncate))


def uniform_filter(
    input: Any,  # noqa: A002  # SciPy's name
    size: int | Sequence[int] = 3,
    *,
    mode: str = "reflect",
) -> Any:
    """Mean over a box, as `scipy.ndimage.uniform_filter`, computed in float64 and returned in float32.

    Parameters
    ----------
    input : (z, y, x) array
        Float, integer or bool; never modified.
    size : int or (3,) ints
        Voxels of the box.
    mode : {"reflect"}
        Edges.

    Returns
    -------
    (z, y, x) float32 array
        In the library of `input`.

    Raises
    ------
    TypeError, ValueError
        Wrong rank, size < 1 or another mode.
    """
    volume, restore = _volume(input)
    _check_mode(mode)
    sizes = tuple(int(n) for n in np.broadcast_to(np.asarray(size), 3))
    if min(sizes) < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    mean = ndimage.uniform_filter(volume, sizes, mode="reflect", output=np.float64)
    return restore(mean.astype(np.float32))


def label(
    input: Any,  # noqa: A002  # SciPy's name
    *,
    connectivity: int = 6,
) -> tuple[Any, int]:
    """Label connected components, as `scipy.ndimage.label`.

    Parameters
    ----------
    input : (z, y, x) array
        Nonzero voxels are labelled.
    connectivity : {6, 18, 26}
        Neighbourhood; SciPy's default is 6.

    Returns
    -------
    labels : (z, y, x) int32 array
        0 background, 1..n in C order of first voxels; in the library of `input`.
    n : int
        Number of components.

    Raises
    ------
    TypeError, ValueError
        Wrong rank or connectivity.
    """
    volume, restore = _volume(input)
    labels, count = ndimage.label(volume, _structure(connectivity), output=np.int32)
    return restore(labels), int(count)


def grow(
    input: Any,  # noqa: A002  # SciPy's name
    mask: Any,
    *,
    iterations: int = 1,
    connectivity: int = 6,
) -> Any:
    """Grow a region inside a mask, step by step: `scipy.ndimage.binary_dilation` with ``mask``.

    Parameters
    ----------
    input : (z, y, x) bool array
        Region to start from. Its voxels outside `mask` are kept and grow too.
    mask : (z, y, x) bool array
        Where it may grow.
    iterations : int
        Steps; below 1, until nothing changes.
    connectivity : {6, 18, 26}
        Neighbourhood of a step.

    Returns
    -------
    (z, y, x) bool array
        In the library of `input`.

    Raises
    ------
    TypeError, ValueError
        Wrong rank, shapes that differ, wrong connectivity.
    """
    region, restore = _volume(input)
    allowed, _ = accept(mask, "mask")
    if allowed.shape != region.shape:
        raise ValueError(f"mask must have the shape of input, got {allowed.shape} and {region.shape}")
    grown = ndimage.binary_dilation(
        region.astype(np.bool_), _structure(connectivity), iterations=max(iterations, 0), mask=allowed.astype(np.bool_)
    )
    return restore(grown)


def _volume(input: Any) -> tuple[npt.NDArray[Any], Restore]:  # noqa: A002
    volume, restore = accept(input, "input")
    if volume.ndim != 3:
        raise ValueError(f"input must be (z, y, x), got shape {volume.shape}")
    if volume.dtype.kind not in "biuf":
        raise TypeError(f"input must be bool, integer or float, got {volume.dtype}")
    return volume, restore


def _check_mode(mode: str) -> None:
    if mode != "reflect":
        raise ValueError(f"mode must be 'reflect', got {mode!r}")


def _structure(connectivity: int) -> npt.NDArray[np.bool_]:
    if connectivity not in CONNECTIVITIES:
        raise ValueError(f"connectivity must be one of {CONNECTIVITIES}, got {connectivity}")
    return np.asarray(ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connectivity]))
