"""Stage 4: the pair (PAPER.md eq. 1 and 9), exactly.

A = max(H, B_j) in G_j, or what another mode makes of H and B_j, and H elsewhere; GT = (H >= threshold) & ~G.
The volume is read once and written once, as if there were no lesion; then the lesions' voxels are visited,
and no others.

Lesions are float32, as is all that is done with them until it meets H in the type of the image; a float16 is
a float32 until it is stored. No product is fused with a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import overload

from lesionsynth.config import MODES, Range
from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.rows import row_of
from lesionsynth.cpu.engine.simd import (
    LANES,
    STREAMED,
    bits_other,
    cast,
    fence,
    greatest,
    least,
    load,
    number_of,
    ones,
    outside,
    pixel_of,
    splat,
    store,
    store_at_least,
    store_stream,
    where,
)  # fmt: skip
from lesionsynth.cpu.engine.threads import (
    Tickets,
    done,
    in_background,
    take,
    wait_for,
    work_together,
)  # fmt: skip
from lesionsynth.cpu.merge import LesionRows, Lesions
from lesionsynth.cpu.soft_edge import soft_edges
from lesionsynth.cpu.texture import Textures
from lesionsynth.plan import LesionPlan

FIRST = np.uint64(0xFFFF)
"""All lanes of a vector."""
MAX, MIN, ADD, BLEND = range(4)
"""Places in `lesionsynth.config.MODES`, which kernels cannot take: they are kept by the CPU twin's files."""


class CopyJob(NamedTuple):
    """What a copy of the healthy image reads and writes."""

    where: tuple[int, ...]
    """Address and strides of the image; whoever calls holds it."""
    height: int
    like: Any
    """A row of the image's type and width."""
    out: Any
    target: Any
    level: Any
    """Threshold, in the type of `out`; float32 for float16."""
    low: Any
    """Bounds of the voxels, in the same type; for Hounsfield units what becomes 0 and 1."""
    high: Any
    sane: Any
    """Whether each row is within bounds."""
    stream: bool
    """Whether to write past the caches."""


def base_pair(
    image: npt.NDArray[Any],
    plan: LesionPlan,
    hu_range: Range,
    out: npt.NDArray[Any],
    target: npt.NDArray[np.bool_],
    threads: int | None = None,
    tickets: Tickets | None = None,
) -> Callable[[], None]:
    """Copy H and compute the target as if there were no lesion, refusing voxels out of range on the way.

    Reading and writing a volume keeps one thread waiting for memory while others compute, so it begins here
    and ends when the answer is called.

    Parameters
    ----------
    image : (z, y, x) array
        Healthy image H, float16, float32 or float64 of any strides; or Hounsfield units in int16.
    plan : LesionPlan
        Holds the threshold, which is compared in the dtype of `out`, and the range.
    hu_range : (2,) floats
        HU that become 0 and 1.
    out : (z, y, x) array
        Receives H: the dtype of `image`, float32 for int16. C-contiguous.
    target : (z, y, x) bool array
        Receives H >= threshold. C-contiguous.
    threads : int, optional
        See `parallel_for`.
    tickets : (1, 2) int64 array, optional
        See `in_background`.

    Returns
    -------
    callable
        Waits for the copy, and raises ValueError where a voxel is NaN, infinite or out of range.
    """
    shape = image.shape
    if image[0].flags.c_contiguous:  # a slice is one long row
        shape = (len(image), 1, image[0].size)
    depth, height, width = shape
    real = np.float64 if out.dtype == np.float64 else np.float32
    low, high = (real(end) for end in (hu_range if image.dtype == np.int16 else ends_of(plan, out.dtype)))
    sample, flat = np.empty(width, dtype=image.dtype), out.reshape(-1, width)
    if image.dtype == np.float16:
        sample, flat = sample.view(np.int16), flat.view(np.int16)
    job = CopyJob(
        where=(image.ctypes.data, *image.strides),
        height=height,
        like=sample,
        out=flat,
        target=target.reshape(-1, width).view(np.uint8),
        level=real(np.asarray(plan.threshold, dtype=out.dtype)),
        low=low,
        high=high,
        sane=np.ones(depth * height, dtype=np.bool_),
        stream=out.nbytes >= STREAMED and width % LANES == 0 and out.ctypes.data % 64 == 0,
    )
    kernels = {"int16": _window_rows, "float32": _copy_vectors}
    copy = kernels.get(image.dtype.name, _copy_rows)

    def work() -> npt.NDArray[Any]:
        copy(job, 0, depth * height)
        return image

    finish_copy = in_background(work, threads, tickets)

    def finish() -> None:
        finish_copy()
        if not job.sane.all():
            _explain(image, plan.value_range)

    return finish


def ends_of(plan: LesionPlan, dtype: Any) -> Range:
    """Return the ends of the range of a plan, for images of a type."""
    return plan.ends(lambda value: float(np.asarray(value, dtype=dtype)))


class InjectJob(NamedTuple):
    """What `_inject` reads and writes."""

    mode: int
    """Place in `MODES`."""
    low: Any
    """Value that stands for 0, and how far from there the one that stands for 1 is, in float32."""
    span: Any
    least: Any
    """The same two as the image holds them, float32 for float16."""
    most: Any
    lesions: LesionRows
    fields: Any
    """As in `Textures`."""
    values: Any
    soft: bool
    """Whether `edges` are laid out as the values."""
    edges: Any
    """e of the voxels; where they are hard, of any run."""
    image: Any
    """All voxels, which hold H and will hold A; float16 by its bits."""
    target: Any
    first: int
    """Slice of the volume that is the first task."""
    field_of: Any
    """Field of each label; -1 for lesions of other groups."""
    changed: Any
    """(slices of the volume, fields): voxels that become another."""


def inject(
    plan: LesionPlan,
    textures: Textures,
    lesions: Lesions,
    out: npt.NDArray[Any],
    target: npt.NDArray[np.bool_],
    threads: int | None = None,
) -> npt.NDArray[np.int64]:
    """Put lesions in: A to `out` and False to `target` in their voxels, in place (eq. 1 and 9).

    Parameters
    ----------
    plan : LesionPlan
        Holds the mode, the range and the edge.
    textures : Textures
        Some of the lesions.
    lesions : Lesions
        All of them.
    out, target : (z, y, x) arrays
        See `base_pair`.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    (n,) int64 array
        Voxels of each of these lesions whose value is another now.
    """
    low, high = plan.value_range
    real = np.float64 if out.dtype == np.float64 else np.float32
    bottom, top = (real(end) for end in ends_of(plan, out.dtype))
    fields = textures.fields
    hard = np.ones(fields["pitch"].max(), dtype=np.float32)
    soft = bool(np.float32(plan.edge) > 0)
    edges = soft_edges(plan, textures, lesions, threads) if soft else hard
    first, last = fields["start"][:, 0].min(), (fields["start"] + fields["size"])[:, 0].max()
    field_of = np.full(len(lesions) + 1, -1, dtype=np.int64)
    field_of[fields["label"]] = np.arange(len(fields))
    job = InjectJob(
        MODES.index(plan.mode), np.float32(low), np.float32(high - low), bottom, top, lesions.rows,
        fields, textures.values, soft, edges,
        image=(out.view(np.int16) if out.dtype == np.float16 else out).reshape(-1),
        target=target.reshape(-1),
        first=int(first),
        field_of=field_of,
        changed=np.zeros((last - first, len(fields)), dtype=np.int64),
    )  # fmt: skip
    work_together(_inject, [len(job.changed)], job, threads=threads)
    return np.asarray(job.changed.sum(axis=0))


def _explain(image: npt.NDArray[Any], value_range: Range) -> None:
    finite = np.isfinite(image)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(f"image must be finite, got {image[where]} at voxel {where}")
    low, high = image.min(), image.max()  # printed in their own type, with all digits that it tells apart
    hint = ""
    if value_range == (0.0, 1.0) and (low < -1.5 or high > 1.5):
        hint = "; Hounsfield units are taken as int16, or through lesionsynth.window_hu"
    bounds = "{:.9g}, {:.9g}".format(*value_range)
    raise ValueError(f"image must be in [{bounds}], got values from {low} to {high}{hint}")


@kernel
def _copy_vectors(job: Any, lo: int, hi: int) -> None:
    """Float32, sixteen voxels at a time."""
    scratch = np.empty_like(job.like)
    level, low, high, stream = job.level, job.low, job.high, job.stream
    levels, lows, highs = splat(level), splat(low), splat(high)
    whole = scratch.size // LANES * LANES
    for r in range(lo, hi):
        row, to, bright = row_of(*job.where, job.height, r, scratch), job.out[r], job.target[r]
        strange = np.uint64(0)
        for x in range(0, whole, LANES):
            values = load(row, x)
            if stream:
                store_stream(to, x, values)
            else:
                store(to, x, values)
            store_at_least(bright, x, values, levels)
            strange |= outside(values, lows, highs)
        good = strange == 0
        for x in range(whole, row.size):
            to[x], bright[x] = row[x], row[x] >= level
            good &= (row[x] >= low) & (row[x] <= high)
        job.sane[r] = good
    fence()


@kernel
def _copy_rows(job: Any, lo: int, hi: int) -> None:
    """Float64, or float16 by its bits."""
    scratch = np.empty_like(job.like)
    level, low, high = job.level, job.low, job.high
    for r in range(lo, hi):
        row, to, bright = row_of(*job.where, job.height, r, scratch), job.out[r], job.target[r]
        good = True
        for x in range(row.size):
            to[x] = row[x]
            value = number_of(row[x])
            bright[x] = value >= level
            good &= (value >= low) & (value <= high)  # NaN fails
        job.sane[r] = good


@kernel
def _window_rows(job: Any, lo: int, hi: int) -> None:
    """Hounsfield units to [0, 1], as `lesionsynth.window_hu` rounds."""
    scratch = np.empty_like(job.like)
    level, low, high = job.level, job.low, job.high
    span = high - low
    for r in range(lo, hi):
        row, to, bright = row_of(*job.where, job.height, r, scratch), job.out[r], job.target[r]
        for x in range(row.size):
            value = (min(max(np.float32(row[x]), low), high) - low) / span
            to[x] = value
            bright[x] = value >= level


@kernel
def _inject(progress: Any, job: Any) -> None:
    """Inject into a slice of the volume, a task."""
    z = take(progress, 0)
    while z >= 0:
        _inject_slice(job.first + z, job, job.changed[z])
        done(progress, 0)
        z = take(progress, 0)
    wait_for(progress, 0)


@inner
def _inject_slice(z: int, job: Any, changed: Any) -> None:
    """Inject all lesions into a slice of the volume; counts the voxels of each that become another."""
    runs, fields = job.lesions, job.fields
    end = (z + 1) * runs.height * runs.width
    for row in range(z * runs.height, (z + 1) * runs.height):
        for run in range(runs.first[row], runs.first[row + 1]):
            k = job.field_of[runs.label[run]]
            if k >= 0:
                field, start, n = fields[k], runs.start[run], runs.stop[run] - runs.start[run]
                line = (z - field.start[0]) * field.size[1] + row % runs.height - field.start[1]
                at = field.at + line * field.pitch + start - field.start[2]
                how = Blending(
                    job.mode, job.low, job.span, job.least, job.most, np.float32(field.beta),
                    np.float32(field.weight),
                )  # fmt: skip
                to = row * runs.width + start
                changed[k] += _inject_run(job.image, job, how, to, n, end, at)
                job.target[to : to + n] = False


class Blending(NamedTuple):
    """How a lesion enters the image: of the job, and of the lesion; float32 but for mode and ends."""

    mode: int
    low: Any
    span: Any
    least: Any
    most: Any
    beta: Any
    weight: Any


@inner
def blend(how: Any, h: Any, b: Any, e: Any) -> Any:
    """Make A of H, b2 and the soft edge e; of one voxel, or of a vector of them.

    A is rounded where it is stored, which keeps the order: so a lesion that wins is compared with H as if it
    had been rounded before.
    """
    zero, one = cast(np.float32(0.0), b), cast(np.float32(1.0), b)
    low, span = cast(how.low, b), cast(how.span, b)
    b = least(greatest(b * cast(how.beta, b), zero), one)
    bottom, top = cast(how.least, h), cast(how.most, h)  # which rounding must not leave
    if how.mode == MAX:
        return greatest(least(greatest(cast(b * span + low, h), bottom), top), h)
    if how.mode == MIN:
        return least(least(greatest(cast((one - b) * span + low, h), bottom), top), h)
    share = cast(how.weight, b) * e
    if how.mode == ADD:
        a = h + cast(share * b * span, h)
    else:
        a = h + cast(share, h) * (cast(b * span + low, h) - h)
    return least(greatest(a, bottom), top)


def _inject_run(image: Any, job: Any, how: Any, to: int, n: int, end: int, at: int) -> int:
    """Blend ``image[to : to + n]`` with b2 = ``values[at : at + n]``; counts the voxels that change.

    What follows may be written as it is, up to `end`.
    """
    raise NotImplementedError


@overload(_inject_run, jit_options={"forceinline": True})  # a call of it takes as long as a short run
def _inject_run_of(image: Any, job: Any, how: Any, to: int, n: int, end: int, at: int) -> Any:
    return _inject_vectors if image.dtype == numba.float32 else _inject_voxels


def _inject_vectors(image: Any, job: Any, how: Any, to: int, n: int, end: int, at: int) -> int:
    values, edges, soft = job.values, job.edges, at if job.soft else 0
    changed = 0
    for x in range(0, n, LANES):
        if to + x + LANES > end:  # beyond is another thread's
            return changed + _inject_rest(image, job, how, to + x, n - x, end, at + x)
        h = load(image, to + x)
        a = blend(how, h, load(values, at + x), load(edges, soft + x))
        a = where(FIRST >> np.uint64(max(x + LANES - n, 0)), a, h)
        store(image, to + x, a)
        changed += ones(bits_other(a, h))
    return changed


def _inject_voxels(image: Any, job: Any, how: Any, to: int, n: int, end: int, at: int) -> int:
    values, edges, soft = job.values, job.edges, at if job.soft else 0
    changed = 0
    for x in range(n):
        h = number_of(image[to + x])
        pixel = pixel_of(blend(how, h, values[at + x], edges[soft + x]), image[to + x])
        image[to + x] = pixel
        changed += number_of(pixel) != h
    return changed


_inject_rest = inner(_inject_voxels)
"""Of a run of vectors, what would reach beyond `end`."""
