"""The generator's building blocks as functions: SciPy's names, arguments and meaning, for NumPy and DLPack.

Each takes a (z, y, x) volume of any strides, never writes it, and answers in its library and on its device: a
volume on a CUDA device is worked on there, on the stream its library uses. Results are the same bits on both,
where nothing else is said. The number of threads cannot change a result; a GPU does not look at it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth._arguments import accept_buffer
from lesionsynth._dlpack import DLPACK_CUDA, DLPackArray, Restore, accept, device_kind, library_of, untraced
from lesionsynth.cpu import filters, philox
from lesionsynth.cpu.engine.memory import output
from lesionsynth.cpu.engine.threads import check_threads
from lesionsynth.cpu.grow import grow as _grow
from lesionsynth.cpu.label import check_connectivity
from lesionsynth.cpu.label import label as _label
from lesionsynth.plan import check_word
from lesionsynth.strict import check_number, plain_number, shown

Stream = philox.Stream

MOST_TAPS = 2**20
"""Reach of a filter in voxels, far beyond any volume: what more would take is memory."""

__all__ = ["Stream", "gaussian_filter", "grow", "label", "philox_uniform", "uniform_filter"]


@untraced
def philox_uniform(
    shape: Sequence[int],
    seed: int,
    *,
    stream: int = Stream.FREE,
    sample: int = 0,
    component: int = 0,
    offset: Sequence[int] = (0, 0, 0),
    threads: int | None = None,
    device: str | int = "cpu",
    out: DLPackArray | None = None,
) -> Any:
    """Draw uniform noise in [0, 1) that depends on the voxel's coordinate alone (Philox4x32-10).

    Parameters
    ----------
    shape : (3,) ints
        (z, y, x).
    seed, stream : int
        Key words in [0, 2**32).
    sample, component : int
        Counter words in [0, 2**32).
    offset : (3,) ints
        Coordinate of the first voxel: a crop of a field is the field of the crop. ``offset + shape`` is at
        most 2**16 along z and y, and 2**32 along x.
    threads : int, optional
        CPU threads. Where omitted, ``NUMBA_NUM_THREADS``; else one in a torch ``DataLoader`` worker; else
        ``OMP_NUM_THREADS``; else all cores.
    device : str or int
        "cpu"; or "cuda", "cuda:1" or 1 for an array on a GPU, drawn on CuPy's current stream.
    out : (z, y, x) float32 array, optional
        C-contiguous, to be filled where it is, on the stream of its library: of torch, say.

    Returns
    -------
    (z, y, x) float32 array
        Multiples of 2**-24; `out`, or NumPy, or CuPy on a GPU.

    Raises
    ------
    TypeError, ValueError
        An argument is no integer or out of its range; `out` has another shape or type; `device` and `out` are
        both given.

    Examples
    --------
    >>> import numpy as np
    >>> from lesionsynth import ops
    >>> field = ops.philox_uniform((4, 5, 6), seed=1)
    >>> crop = ops.philox_uniform((2, 2, 2), seed=1, offset=(1, 3, 2))
    >>> bool(np.array_equal(crop, field[1:3, 3:5, 2:4]))
    True
    """
    seed, stream, sample, component = (
        _word(name, word)
        for name, word in (("seed", seed), ("stream", stream), ("sample", sample), ("component", component))
    )
    size, start = _three("shape", shape), _three("offset", offset)
    if min(size) < 1:
        raise ValueError(f"shape must be three integers >= 1 (z, y, x), got {shown(size)}")
    if min(start) < 0:
        raise ValueError(f"offset must be three integers >= 0 (z, y, x), got {shown(start)}")
    for axis, first, n, limit in zip("zyx", start, size, (2**16, 2**16, 2**32), strict=True):
        if first + n > limit:
            raise ValueError(
                f"offset + shape must be <= {limit} along {axis}, got {shown(first)} + {shown(n)}"
            )
    check_threads(threads)
    words = seed, stream, sample, component
    cpu = isinstance(device, str) and device == "cpu"
    if not cpu and (isinstance(device, bool) or not isinstance(device, str | int | np.integer)):
        raise TypeError(f"device must be 'cpu', 'cuda', 'cuda:N' or N, got {shown(device)}")
    if out is None:
        if not cpu:
            return _on_cuda().philox_uniform(device, size, words, start)
        field = output(size, np.float32)
        philox.fill_uniform(field, *words, start, threads)
        return field
    if not cpu:
        raise ValueError(f"device must be left out where out is given, got {shown(device)}")
    if device_kind(out) == DLPACK_CUDA:
        _on_cuda().fill_uniform(out, size, words, start)
        return out
    philox.fill_uniform(accept_buffer(out, "out", size, "float32", "asked for"), *words, start, threads)
    return out


@untraced
def gaussian_filter(
    input: DLPackArray,  # noqa: A002  # SciPy's name
    sigma: float | Sequence[float],
    *,
    mode: str = "reflect",
    truncate: float = 4.0,
    threads: int | None = None,
) -> Any:
    r"""Smooth a volume, as `scipy.ndimage.gaussian_filter`, in float32.

    Parameters
    ----------
    input : (z, y, x) array
        Bool, integer or float, read as float32. A NaN spreads as far as the kernel reaches.
    sigma : float or (3,) floats
        Standard deviation in voxels; 0 leaves an axis alone.
    mode : {"reflect"}
        Edges: d c b a | a b c d | d c b a, repeated where the kernel is wider than the volume.
    truncate : float
        Radius of the kernel in standard deviations.
    threads : int, optional
        See `philox_uniform`.

    Returns
    -------
    (z, y, x) float32 array
        In the library of `input`; never shares its memory.

    Raises
    ------
    TypeError, ValueError
        Wrong rank or dtype, sigma < 0, truncate <= 0 or another mode.

    Notes
    -----
    :math:`w_k \propto e^{-k^2/2\sigma^2}`, :math:`|k| \le \lfloor t\sigma + 1/2 \rfloor`, t = `truncate`.
    Within 1e-6 of SciPy's float64 result for values in [0, 1]. An axis of n voxels costs at most
    min(r, n / 2) multiply-adds a voxel, r = tσ, which hardly shows beside reading and writing it.
    """
    _check_mode(mode)
    sigmas = _three_floats("sigma", sigma)
    truncate = float(check_number("truncate", truncate, 0.0, MOST_TAPS, "finite and > 0"))
    if truncate == 0:
        raise ValueError(f"truncate must be finite and > 0, got {truncate}")
    if truncate * max(sigmas) > MOST_TAPS:
        raise ValueError(
            f"sigma times truncate must be at most {MOST_TAPS}, got {shown(sigma)} times {truncate}"
        )
    check_threads(threads)
    if device_kind(input) == DLPACK_CUDA:
        return _on_cuda().gaussian_filter(input, sigmas, truncate)
    volume, restore = _volume("input", input)
    return restore(filters.gaussian_filter(volume, sigmas, truncate, threads))


@untraced
def uniform_filter(
    input: DLPackArray,  # noqa: A002  # SciPy's name
    size: int | Sequence[int] = 3,
    *,
    mode: str = "reflect",
    threads: int | None = None,
) -> Any:
    """Average over a box, as `scipy.ndimage.uniform_filter`, summed in float64 and returned in float32.

    Parameters
    ----------
    input : (z, y, x) array
        Bool, integer or float; finite.
    size : int or (3,) ints
        Voxels of the box; it starts at ``i - size // 2``. The cost does not depend on it.
    mode : {"reflect"}
        Edges, as for `gaussian_filter`.
    threads : int, optional
        See `philox_uniform`.

    Returns
    -------
    (z, y, x) float32 array
        In the library of `input`.

    Raises
    ------
    TypeError, ValueError
        Wrong rank or dtype, NaN or infinity, which would spread along whole rows, size < 1 or another mode. A
        GPU does not look for NaN and infinity.
    """
    _check_mode(mode)
    sizes = _three("size", size)
    if min(sizes) < 1:
        raise ValueError(f"size must be >= 1, got {shown(size)}")
    if max(sizes) > 2 * MOST_TAPS:
        raise ValueError(f"size must be at most {2 * MOST_TAPS}, got {shown(size)}")
    check_threads(threads)
    if device_kind(input) == DLPACK_CUDA:
        return _on_cuda().uniform_filter(input, sizes)
    volume, restore = _volume("input", input)
    low, high = volume.min(), volume.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"input must be finite, got values from {low} to {high}")
    exact = np.float32 if np.can_cast(volume.dtype, np.float32) else np.float64
    return restore(filters.uniform_filter(np.ascontiguousarray(volume, dtype=exact), sizes, threads))


@untraced
def label(
    input: DLPackArray,  # noqa: A002  # SciPy's name
    structure: npt.ArrayLike | None = None,
    *,
    connectivity: int | None = None,
    threads: int | None = None,
) -> tuple[Any, int]:
    """Label connected components, as `scipy.ndimage.label`.

    Parameters
    ----------
    input : (z, y, x) array
        Voxels other than 0 are labelled.
    structure : (3, 3, 3) array, optional
        SciPy's way to say `connectivity`: one of ``scipy.ndimage.generate_binary_structure(3, 1 | 2 | 3)``.
    connectivity : {6, 18, 26}, optional
        Neighbours by faces; and edges; and corners. 6 where neither is given, as in SciPy.
    threads : int, optional
        See `philox_uniform`.

    Returns
    -------
    labels : (z, y, x) int32 array
        0 background, 1..n in C order of the components' first voxels; in the library of `input`.
    n : int
        Number of components; a GPU is waited for.

    Raises
    ------
    TypeError, ValueError
        Wrong rank or dtype, another structure or connectivity, or both given.
    """
    if structure is not None:
        if connectivity is not None:
            raise ValueError(f"connectivity must be left out beside structure, got {shown(connectivity)}")
        connectivity = _connectivity_of(structure)
    connectivity = 6 if connectivity is None else connectivity
    check_connectivity(connectivity)
    check_threads(threads)
    if device_kind(input) == DLPACK_CUDA:
        labelled: tuple[Any, int] = _on_cuda().label(input, connectivity)
        return labelled
    volume, restore = _volume("input", input)
    labels, count = _label(_mask(volume), connectivity, threads)
    return restore(labels), count


@untraced
def grow(
    input: DLPackArray,  # noqa: A002  # SciPy's name
    mask: DLPackArray,
    *,
    iterations: int = 1,
    connectivity: int = 6,
    threads: int | None = None,
) -> Any:
    """Grow a region inside a mask, step by step: `scipy.ndimage.binary_dilation` with ``mask``.

    A step adds the voxels of `mask` that have a neighbour in the region. As in SciPy, voxels of `input`
    outside `mask` are kept, and have neighbours too.

    Parameters
    ----------
    input : (z, y, x) array
        Region to start from: its voxels other than 0.
    mask : (z, y, x) array
        Where it may grow: voxels other than 0. In the library of `input`.
    iterations : int
        Steps; below 1, until nothing changes (`scipy.ndimage.binary_propagation`).
    connectivity : {6, 18, 26}
        Neighbours by faces; and edges; and corners.
    threads : int, optional
        See `philox_uniform`.

    Returns
    -------
    (z, y, x) bool array
        In the library of `input`.

    Raises
    ------
    TypeError, ValueError
        Wrong rank or dtype, shapes or libraries that differ, another connectivity, `iterations` no integer.
    """
    if library_of(input) != library_of(mask):
        raise TypeError(
            f"input and mask must be arrays of one library, got {library_of(input)} and {library_of(mask)}"
        )
    check_connectivity(connectivity)
    check_threads(threads)
    steps = _integer("iterations", iterations)
    if device_kind(input) == DLPACK_CUDA:
        return _on_cuda().grow(input, mask, steps, connectivity)
    region, restore = _volume("input", input)
    room, _ = _volume("mask", mask)
    if room.shape != region.shape:
        raise ValueError(f"mask must have the shape of input, {region.shape}, got {room.shape}")
    return restore(_grow(_mask(region), _mask(room), steps, connectivity, threads))


def _on_cuda() -> Any:
    """Return the same functions for CUDA arrays; CuPy is imported here, and not before.

    Raises
    ------
    RuntimeError
        CuPy is not installed, or there is no device.
    """
    from lesionsynth.cuda.backend import check_cupy

    check_cupy("the array is on a CUDA device")
    from lesionsynth.cuda import ops as cuda_ops

    return cuda_ops


def _volume(name: str, value: Any) -> tuple[npt.NDArray[Any], Restore]:
    volume, restore = accept(value, name)
    if volume.ndim != 3 or volume.size == 0:
        raise ValueError(f"{name} must be (z, y, x) with at least one voxel, got shape {volume.shape}")
    if volume.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be bool, integer or float, got {volume.dtype}")
    return volume, restore


def _mask(volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a volume of bytes that are 0 where it is 0: bytes as they are, whatever their strides."""
    return volume if volume.dtype.itemsize == 1 else volume != 0


def _check_mode(mode: str) -> None:
    if not isinstance(mode, str) or mode != "reflect":
        raise ValueError(f"mode must be 'reflect', got {shown(mode)}")


def _connectivity_of(structure: Any) -> int:
    steps = np.abs(np.indices((3, 3, 3)) - 1).sum(axis=0)
    for rank, connectivity in ((1, 6), (2, 18), (3, 26)):
        if np.array_equal(np.asarray(structure) != 0, steps <= rank):
            return connectivity
    raise ValueError(
        "structure must be scipy.ndimage.generate_binary_structure(3, 1 | 2 | 3), "
        f"got an array of shape {np.shape(structure)}"
    )


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from None


def _word(name: str, value: Any) -> int:
    word = _integer(name, value)
    check_word(name, word)
    return word


def _per_axis(value: Any) -> tuple[Any, ...]:
    try:
        several = np.ndim(value) == 1
    except ValueError:  # a list of lists
        several = True
    return tuple(value) if several else (value,) * 3


def _three(name: str, value: Any) -> tuple[int, int, int]:
    values = _per_axis(value)
    if len(values) != 3:
        raise ValueError(f"{name} must be one integer per axis (z, y, x), got {shown(value)}")
    z, y, x = (_integer(name, n) for n in values)
    return z, y, x


def _three_floats(name: str, value: Any) -> tuple[float, float, float]:
    values = _per_axis(value)
    if len(values) != 3:
        raise ValueError(f"{name} must be a number or one per axis (z, y, x), got {shown(value)}")
    if any(plain_number(n) is None for n in values):
        raise TypeError(f"{name} must be a number or one per axis (z, y, x), got {shown(value)}")
    z, y, x = (float(check_number(name, n, 0.0, MOST_TAPS, f">= 0 and at most {MOST_TAPS}")) for n in values)
    return z, y, x
