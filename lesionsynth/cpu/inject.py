"""Stage 4: the pair (PAPER.md eq. 1 and 9), exactly.

A = max(H, B_j) in G_j and H elsewhere; GT = (H >= tau) & ~G. The volume is read once and written once, as if
there were no lesion; then the lesions' voxels are visited, and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import overload

from lesionsynth.cpu.engine.jit import kernel
from lesionsynth.cpu.engine.rows import row_of
from lesionsynth.cpu.engine.simd import (
    LANES,
    STREAMED,
    fence,
    greatest,
    half_of,
    least,
    load,
    outside_unit,
    splat,
    store,
    store_at_least,
    store_stream,
)  # fmt: skip
from lesionsynth.cpu.engine.threads import Tickets, done, in_background, take, wait_for, work_together
from lesionsynth.cpu.merge import Lesions
from lesionsynth.cpu.texture import Textures

HALF_ONE, HALF_MINUS_ZERO = np.int16(0x3C00), np.int16(-0x8000)
"""1.0 and -0.0 as float16. For numbers that are not negative the bits of float16 are ordered as the numbers
are."""


def base_pair(
    image: npt.NDArray[Any],
    tau: float,
    hu_range: tuple[float, float],
    out: npt.NDArray[Any],
    target: npt.NDArray[np.bool_],
    threads: int | None = None,
    tickets: Tickets | None = None,
) -> Callable[[], None]:
    """Copy H and compute the target as if there were no lesion, refusing voxels outside [0, 1] on the way.

    Reading and writing a volume keeps one thread waiting for memory while others compute, so it begins here
    and ends when the answer is called.

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
    tickets : (1, 2) int64 array, optional
        See `in_background`.

    Returns
    -------
    callable
        Waits for the copy, and raises ValueError where a voxel is NaN, infinite or outside [0, 1].
    """
    where = (image.ctypes.data, *image.strides)  # `work` holds the image
    shape = image.shape
    if image[0].flags.c_contiguous:  # a slice is one long row
        shape = (len(image), 1, image[0].size)
    depth, height, width = shape
    sane = np.ones(depth * height, dtype=np.bool_)
    level = np.asarray(tau, dtype=out.dtype)[()]
    sample = np.empty(width, dtype=image.dtype)
    flat, flat_target = out.reshape(-1, width), target.reshape(-1, width).view(np.uint8)
    if image.dtype == np.int16:
        low, high = (np.float32(v) for v in hu_range)

        def rows(lo: int, hi: int) -> None:
            _window_rows(*where, height, sample, flat, flat_target, level, low, high, lo, hi)
    elif image.dtype == np.float16:
        bits = flat.view(np.int16), flat_target, level.view(np.int16), HALF_ONE, HALF_MINUS_ZERO

        def rows(lo: int, hi: int) -> None:
            _copy_rows(*where, height, sample.view(np.int16), *bits, sane, lo, hi)
    elif image.dtype == np.float32:
        stream = out.nbytes >= STREAMED and width % LANES == 0 and out.ctypes.data % 64 == 0

        def rows(lo: int, hi: int) -> None:
            _copy_float_rows(*where, height, sample, flat, flat_target, level, sane, stream, lo, hi)
    else:

        def rows(lo: int, hi: int) -> None:
            _copy_rows(*where, height, sample, flat, flat_target, level, 1.0, -0.0, sane, lo, hi)

    def work() -> npt.NDArray[Any]:
        rows(0, depth * height)
        return image

    finish_copy = in_background(work, threads, tickets)

    def finish() -> None:
        finish_copy()
        if not sane.all():
            _explain(image)

    return finish


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
    cut = lesions.runs
    width = cut.shape[2]
    field_of = np.full(len(lesions) + 1, -1, dtype=np.int64)
    field_of[textures.fields["label"]] = np.arange(len(textures.fields))
    low = int(textures.fields["start"][:, 0].min())
    high = int((textures.fields["start"][:, 0] + textures.fields["size"][:, 0]).max())
    runs = (field_of, cut.first, cut.start, cut.stop, lesions.label, cut.shape[1])
    pixels = out.view(np.int16) if out.dtype == np.float16 else out
    flat, flat_target = pixels.reshape(-1), target.reshape(-1)
    work_together(
        _inject, [high - low], textures.fields, textures.values, *runs, flat, flat_target, width, low,
        threads=threads,
    )  # fmt: skip


def _explain(image: npt.NDArray[Any]) -> None:
    finite = np.isfinite(image)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(f"image must be finite, got {image[where]} at voxel {where}")
    low, high = image.min(), image.max()  # printed in their own type, with all digits that it tells apart
    hint = (
        "; Hounsfield units are taken as int16, or through lesionsynth.window_hu"
        if low < -1.5 or high > 1.5
        else ""
    )
    raise ValueError(f"image must be in [0, 1], got values from {low} to {high}{hint}")


@kernel
def _copy_float_rows(
    base: int, dz: int, dy: int, dx: int, height: int, like: Any, out: Any, target: Any, level: Any,
    sane: Any, stream: bool, lo: int, hi: int,
) -> None:  # fmt: skip
    """Float32, sixteen voxels at a time."""
    scratch = np.empty_like(like)
    levels = splat(level)
    whole = like.size // LANES * LANES
    for r in range(lo, hi):
        row, to, bright = row_of(base, dz, dy, dx, height, r, scratch), out[r], target[r]
        strange = np.uint64(0)
        for x in range(0, whole, LANES):
            values = load(row, x)
            if stream:
                store_stream(to, x, values)
            else:
                store(to, x, values)
            store_at_least(bright, x, values, levels)
            strange |= outside_unit(values)
        good = strange == 0
        for x in range(whole, row.size):
            to[x], bright[x] = row[x], row[x] >= level
            good &= (row[x] >= 0) & (row[x] <= 1)
        sane[r] = good
    fence()


@kernel
def _copy_rows(
    base: int, dz: int, dy: int, dx: int, height: int, like: Any, out: Any, target: Any, level: Any,
    one: Any, minus_zero: Any, sane: Any, lo: int, hi: int,
) -> None:  # fmt: skip
    """Float64, or float16 by its bits; `one` and `minus_zero` are 1.0 and -0.0 in that form."""
    scratch = np.empty_like(like)
    for r in range(lo, hi):
        row, to, bright = row_of(base, dz, dy, dx, height, r, scratch), out[r], target[r]
        good = True
        for x in range(row.size):
            value = row[x]
            to[x] = value
            bright[x] = value >= level
            good &= ((value >= 0) & (value <= one)) | (value == minus_zero)  # NaN fails all
        sane[r] = good


@kernel
def _window_rows(
    base: int, dz: int, dy: int, dx: int, height: int, like: Any, out: Any, target: Any, level: Any,
    low: Any, high: Any, lo: int, hi: int,
) -> None:  # fmt: skip
    """Hounsfield units to [0, 1], as `lesionsynth.window_hu` rounds."""
    scratch = np.empty_like(like)
    span = high - low
    for r in range(lo, hi):
        row, to, bright = row_of(base, dz, dy, dx, height, r, scratch), out[r], target[r]
        for x in range(row.size):
            value = (min(max(np.float32(row[x]), low), high) - low) / span
            to[x] = value
            bright[x] = value >= level


@kernel
def _inject(
    progress: Any,
    fields: Any,
    values: Any,
    field_of: Any,
    first: Any,
    start: Any,
    stop: Any,
    label: Any,
    height: int,
    out: Any,
    target: Any,
    width: int,
    low: int,
) -> None:
    """Inject all lesions into one slice of the volume, a task."""
    z = take(progress, 0)
    while z >= 0:
        for row in range((low + z) * height, (low + z + 1) * height):
            for run in range(first[row], first[row + 1]):
                k = field_of[label[run]]
                if k >= 0:
                    field, to, n = fields[k], row * width + start[run], stop[run] - start[run]
                    line = (low + z - field.start[0]) * field.size[1] + row % height - field.start[1]
                    at = field.at + line * field.pitch + start[run] - field.start[2]
                    _raise_run(out, to, values, at, n, field.beta)
                    target[to : to + n] = False
        done(progress, 0)
        z = take(progress, 0)
    wait_for(progress, 0)


def _raise_run(out: Any, to: int, values: Any, at: int, n: int, beta: Any) -> None:
    """Raise ``out[to : to + n]`` to clip(beta b2, 0, 1), b2 = ``values[at : at + n]``."""


@overload(_raise_run)
def _raise_run_of(out: Any, to: int, values: Any, at: int, n: int, beta: Any) -> Any:
    if out.dtype == numba.float32:
        return _raise_floats
    return _raise_halves if out.dtype == numba.int16 else _raise_doubles


def _raise_floats(out: Any, to: int, values: Any, at: int, n: int, beta: Any) -> None:
    zero, one, scale = splat(np.float32(0.0)), splat(np.float32(1.0)), splat(beta)
    for x in range(0, n - LANES + 1, LANES):
        b = least(greatest(load(values, at + x) * scale, zero), one)
        store(out, to + x, greatest(load(out, to + x), b))
    x = n // LANES * LANES
    if x < n and n >= LANES:  # the last vector may repeat voxels: a maximum does not mind
        x = n - LANES
        b = least(greatest(load(values, at + x) * scale, zero), one)
        store(out, to + x, greatest(load(out, to + x), b))
        x = n
    while x < n:
        out[to + x] = max(out[to + x], min(max(values[at + x] * beta, np.float32(0.0)), np.float32(1.0)))
        x += 1


def _raise_halves(out: Any, to: int, values: Any, at: int, n: int, beta: Any) -> None:
    for x in range(n):
        b = min(max(values[at + x] * beta, np.float32(0.0)), np.float32(1.0))
        out[to + x] = max(out[to + x], half_of(b))


def _raise_doubles(out: Any, to: int, values: Any, at: int, n: int, beta: Any) -> None:
    for x in range(n):
        b = min(max(values[at + x] * beta, np.float32(0.0)), np.float32(1.0))
        out[to + x] = max(out[to + x], np.float64(b))
