"""Stage 4: the pair (PAPER.md eq. 1 and 9), exactly.

A = max(H, B_j) in G_j and H elsewhere; GT = (H >= tau) & ~G. The volume is read once and written once, as if
there were no lesion; then the lesions' voxels are visited, and no others.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lesionsynth.cpu._threads import parallel_for
from lesionsynth.cpu.merge import Lesions
from lesionsynth.cpu.simd import half_of, pointer
from lesionsynth.cpu.texture import Textures

HALF_ONE = np.int16(0x3C00)
"""1.0 as float16. For numbers that are not negative the bits of float16 are ordered as the numbers are."""


def base_pair(
    image: npt.NDArray[Any],
    tau: float,
    hu_range: tuple[float, float],
    out: npt.NDArray[Any],
    target: npt.NDArray[np.bool_],
    threads: int | None = None,
) -> None:
    """Copy H and compute the target as if there were no lesion, refusing voxels outside [0, 1] on the way.

    Parameters
    ----------
    image : (z, y, x) array
        Healthy image H, float16, float32 or float64 of any strides; or Hounsfield units in int16.
    tau : float
        Threshold, compared in the dtype of `out`.
    hu_range : (2,) floats
        HU that become 0 and 1.
    out : (z, y, x) array
        Receives H: the dtype of `image`, float32 for int16. C-contiguous.
    target : (z, y, x) bool array
        Receives H >= tau. C-contiguous.
    threads : int, optional
        See `parallel_for`.

    Raises
    ------
    ValueError
        A voxel is NaN, infinite or outside [0, 1].
    """
    depth, height, width = image.shape
    sane = np.ones(depth * height, dtype=np.bool_)
    level = np.asarray(tau, dtype=out.dtype)[()]
    where = (image.ctypes.data, *image.strides, height)
    sample = np.empty(width, dtype=image.dtype)
    flat, flat_target = out.reshape(-1, width), target.reshape(-1, width).view(np.uint8)
    if image.dtype == np.int16:
        low, high = (np.float32(v) for v in hu_range)

        def rows(lo: int, hi: int) -> None:
            _window_rows(*where, sample, flat, flat_target, level, low, high, lo, hi)
    elif image.dtype == np.float16:
        bits = flat.view(np.int16), flat_target, level.view(np.int16), sane

        def rows(lo: int, hi: int) -> None:
            _copy_half_rows(*where, sample.view(np.int16), *bits, lo, hi)
    else:

        def rows(lo: int, hi: int) -> None:
            _copy_rows(*where, sample, flat, flat_target, level, sane, lo, hi)

    parallel_for(depth * height, rows, threads)
    if not sane.all():
        _explain(image)


def inject(
    textures: Textures,
    lesions: Lesions,
    out: npt.NDArray[Any],
    target: npt.NDArray[np.bool_],
    threads: int | None = None,
) -> None:
    """Put lesions in: out = max(out, B) and target = False in their voxels, in place (eq. 1 and 9).

    Parameters
    ----------
    textures : Textures
        Some of the lesions.
    lesions : Lesions
        All of them.
    out, target : (z, y, x) arrays
        See `base_pair`.
    threads : int, optional
        See `parallel_for`.
    """
    width = lesions.shape[2]
    field_of = np.full(len(lesions) + 1, -1, dtype=np.int64)
    field_of[textures.fields["label"]] = np.arange(len(textures.fields))
    low = int(textures.fields["start"][:, 0].min())
    high = int((textures.fields["start"][:, 0] + textures.fields["size"][:, 0]).max())
    runs = (field_of, lesions.first, lesions.start, lesions.stop, lesions.label, lesions.shape[1])
    flat, flat_target = out.reshape(-1, width), target.reshape(-1, width)
    kernel = _inject_half_slices if out.dtype == np.float16 else _inject_slices
    pixels = flat.view(np.int16) if out.dtype == np.float16 else flat
    parallel_for(
        high - low,
        lambda lo, hi: kernel(
            textures.fields, textures.values, *runs, pixels, flat_target, low + lo, low + hi
        ),
        threads,
    )


def _explain(image: npt.NDArray[Any]) -> None:
    finite = np.isfinite(image)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(f"image must be finite, got {image[where]} at voxel {where}")
    low, high = float(image.min()), float(image.max())
    hint = (
        "; Hounsfield units are taken as int16, or through lesionsynth.window_hu"
        if low < -1.5 or high > 1.5
        else ""
    )
    raise ValueError(f"image must be in [0, 1], got values from {low:g} to {high:g}{hint}")


@numba.njit(nogil=True, cache=True)
def _row(base: int, dz: int, dy: int, dx: int, height: int, row: int, scratch: Any) -> Any:
    """Row of a strided volume at an address: a view where it is contiguous, else copied to `scratch`."""
    at = base + (row // height) * dz + (row % height) * dy
    if dx == scratch.itemsize:
        return numba.carray(pointer(np.uint64(at)), scratch.size, scratch.dtype)
    for x in range(scratch.size):
        scratch[x] = numba.carray(pointer(np.uint64(at + x * dx)), 1, scratch.dtype)[0]
    return scratch


@numba.njit(nogil=True, cache=True)
def _copy_rows(
    base: int, dz: int, dy: int, dx: int, height: int, like: Any, out: Any, target: Any, level: Any,
    sane: Any, lo: int, hi: int,
) -> None:  # fmt: skip
    scratch = np.empty_like(like)
    for r in range(lo, hi):
        row, to, bright = _row(base, dz, dy, dx, height, r, scratch), out[r], target[r]
        good = True
        for x in range(row.size):
            value = row[x]
            to[x] = value
            bright[x] = value >= level
            good &= (value >= 0) & (value <= 1)  # NaN fails both
        sane[r] = good


@numba.njit(nogil=True, cache=True)
def _copy_half_rows(
    base: int, dz: int, dy: int, dx: int, height: int, like: Any, out: Any, target: Any, level: Any,
    sane: Any, lo: int, hi: int,
) -> None:  # fmt: skip
    """Float16 by its bits; -0.0 is the least int16."""
    scratch = np.empty_like(like)
    for r in range(lo, hi):
        row, to, bright = _row(base, dz, dy, dx, height, r, scratch), out[r], target[r]
        good = True
        for x in range(row.size):
            value = row[x]
            to[x] = value
            bright[x] = value >= level
            good &= ((value >= 0) & (value <= HALF_ONE)) | (value == np.int16(-32768))
        sane[r] = good


@numba.njit(nogil=True, cache=True)
def _window_rows(
    base: int, dz: int, dy: int, dx: int, height: int, like: Any, out: Any, target: Any, level: Any,
    low: Any, high: Any, lo: int, hi: int,
) -> None:  # fmt: skip
    """Hounsfield units to [0, 1], as `lesionsynth.window_hu` rounds."""
    scratch = np.empty_like(like)
    span = high - low
    for r in range(lo, hi):
        row, to, bright = _row(base, dz, dy, dx, height, r, scratch), out[r], target[r]
        for x in range(row.size):
            value = (min(max(np.float32(row[x]), low), high) - low) / span
            to[x] = value
            bright[x] = value >= level


@numba.njit(nogil=True, cache=True)
def _inject_slices(
    fields: Any, values: Any, field_of: Any, first: Any, start: Any, stop: Any, label: Any, height: int,
    out: Any, target: Any, lo: int, hi: int,
) -> None:  # fmt: skip
    for row in range(lo * height, hi * height):
        for run in range(first[row], first[row + 1]):
            k = field_of[label[run]]
            if k >= 0:
                at = _value_at(fields[k], row // height, row % height, start[run])
                beta = fields[k].beta
                to, bright = out[row, start[run] : stop[run]], target[row, start[run] : stop[run]]
                b = values[at : at + to.size]
                for x in range(to.size):
                    texture = min(max(b[x] * beta, np.float32(0.0)), np.float32(1.0))
                    to[x] = max(to[x], texture)
                    bright[x] = False


@numba.njit(nogil=True, cache=True)
def _inject_half_slices(
    fields: Any, values: Any, field_of: Any, first: Any, start: Any, stop: Any, label: Any, height: int,
    out: Any, target: Any, lo: int, hi: int,
) -> None:  # fmt: skip
    for row in range(lo * height, hi * height):
        for run in range(first[row], first[row + 1]):
            k = field_of[label[run]]
            if k >= 0:
                at = _value_at(fields[k], row // height, row % height, start[run])
                for x in range(start[run], stop[run]):
                    b = min(max(values[at] * fields[k].beta, np.float32(0.0)), np.float32(1.0))
                    out[row, x] = max(out[row, x], half_of(b))
                    target[row, x] = False
                    at += 1


@numba.njit(nogil=True, cache=True)
def _value_at(field: Any, z: int, y: int, x: int) -> int:
    """Place of a voxel in the field."""
    line = (z - field.start[0]) * field.size[1] + y - field.start[1]
    return field.at + line * field.pitch + x - field.start[2]
