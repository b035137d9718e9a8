"""Stage 3: lesion texture B_j on the tight bounding box of G_j (PAPER.md III-C.2, eq. 2-8).

    a1 ~ U[0, 1];  a2 = gaussian(a1, sigma_a);  a = rescale of a2 to [a_L, a_U] by its extremes on the box
    b1 = [v < a], v ~ U[0, 1];  b2 = gaussian(b1, sigma_b);  B = clip(beta b2, 0, 1)

The noise is Philox of the absolute voxel coordinate, so it depends on neither the box nor the order of
lesions. Each box is one float32 field, filtered in place. The boxes of all lesions go through rounds of tasks
together, so that one large lesion keeps every thread busy:

    noise, filtered in plane (a slice a task) -> filtered along z, extremes (a row of columns a task) ->
    salt noise, filtered in plane -> filtered along z, mean above the threshold
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.jit import inner, kernel, maker
from lesionsynth.cpu.engine.lines import aligned, kernels_of, margin_of, pitch_of, smooth
from lesionsynth.cpu.engine.memory import scratch
from lesionsynth.cpu.engine.simd import (
    LANES,
    greatest,
    greatest_lane,
    least,
    least_lane,
    load,
    one_where_less,
    splat,
    store,
)  # fmt: skip
from lesionsynth.cpu.engine.threads import done, group_of, take, wait_for, work_together
from lesionsynth.cpu.filters import gather_rows, scatter_rows, scratch_for, smooth_columns
from lesionsynth.cpu.merge import LesionRows, Lesions
from lesionsynth.cpu.philox import Stream, uniform_lines
from lesionsynth.plan import LesionPlan
from lesionsynth.sampling import extend, extended

Float32 = npt.NDArray[np.float32]

FIXED_POINT = 2.0**26
"""A float32 of [0.125, 1] is a multiple of 2**-26, so sums in this unit are exact and know no order."""

PROBABILITY, SALT = np.uint32(Stream.PROBABILITY), np.uint32(Stream.SALT)
MARGIN = 4
"""Rows to spare around scratch lines: noise comes in quads, which begin before a box and end after it."""

FIELD = extended(
    ("label", np.int64),
    ("start", np.int64, 3),  # box (z, y, x)
    ("size", np.int64, 3),
    ("pitch", np.int64),  # row length of the field
    ("at", np.int64),  # where it begins in the scratch
    ("kernels", np.int64, (2, 3, 2)),  # weights of sigma_a and sigma_b along z, y, x: start, stop
    ("low", np.float32),  # least a2 on the box
    ("slope", np.float32),  # (a_U - a_L) / (greatest - least)
    ("beta", np.float64),
    ("beta_fallback", np.bool_),  # no voxel passed the threshold of eq. 6
)
"""A lesion's first blob, and its box, as the kernels see them; axis order (z, y, x)."""


@dataclass(frozen=True)
class Textures:
    """b2 of several lesions; B is ``clip(beta b2, 0, 1)``."""

    fields: npt.NDArray[Any]
    """`FIELD` records."""
    values: Float32
    """b2, box after box, rows padded to whole vectors; the next lesions overwrite it."""
    slices: npt.NDArray[np.int64]
    """(n + 1,): slice z of the box of field k is number ``slices[k] + z`` of all."""


class TextureJob(NamedTuple):
    """What `_synthesize` reads and writes."""

    seed: Any
    sample: Any
    threshold: Any
    """t of eq. 6."""
    lesions: LesionRows
    fields: Any
    values: Any
    slices: Any
    """As in `Textures`; slice z of the box of field k is task ``slices[k] + z``."""
    columns: Any
    """(n + 1,): the columns of row y of the box of field k are task ``columns[k] + y``."""
    weights: Any
    """Of all Gaussians."""
    extremes: Any
    """(columns, 2): least and greatest a2."""
    sums: Any
    """(columns, 2): voxels above the threshold, and their sum in units of 2**-26."""


def synthesize_textures(plan: LesionPlan, lesions: Lesions, threads: int | None = None) -> Iterator[Textures]:
    """Synthesise the textures of all lesions, as many at a time as one volume of scratch holds.

    Parameters
    ----------
    plan : LesionPlan
        Holds the texture parameters; those of a lesion's first blob count.
    lesions : Lesions
        Merged lesions.
    threads : int, optional
        See `parallel_for`.

    Yields
    ------
    Textures
        Every lesion once.
    """
    everything, weights = _fields(plan, lesions)
    groups = list(_groups(everything, math.prod(lesions.runs.shape)))
    values = scratch("texture.values", max(map(_room, groups), default=0), np.float32)
    for fields in groups:
        slices = np.concatenate([[0], np.cumsum(fields["size"][:, 0])])
        columns = np.concatenate([[0], np.cumsum(fields["size"][:, 1])])
        job = TextureJob(
            np.uint32(plan.seed), np.uint32(plan.index), np.float32(plan.mean_threshold), lesions.rows,
            fields, values, slices, columns, weights,
            extremes=np.empty((columns[-1], 2), dtype=np.float32),
            sums=np.zeros((columns[-1], 2), dtype=np.int64),
        )  # fmt: skip
        rounds = int(slices[-1]), int(columns[-1]), 1, int(slices[-1]), int(columns[-1])
        work_together(_synthesize, rounds, job, threads=threads)
        _find_beta(job, plan.mean_threshold)
        yield Textures(fields, values, slices)


def _fields(plan: LesionPlan, lesions: Lesions) -> tuple[npt.NDArray[Any], Float32]:
    """Return the boxes, largest slices first so that none is left for the end, and all weights."""
    if not len(lesions):
        return np.zeros(0, dtype=FIELD), np.empty(0, dtype=np.float32)
    fields = extend(plan.records[[members[0] for members in lesions.members]], FIELD)
    fields["label"] = np.arange(1, len(lesions) + 1)
    fields["start"] = lesions.boxes[:, :, 0]
    fields["size"] = lesions.boxes[:, :, 1] - lesions.boxes[:, :, 0]
    fields["pitch"] = -(-fields["size"][:, 2] // LANES) * LANES
    sigmas = np.stack([fields["sigma_a"], fields["sigma_b"]], axis=1)[:, :, None] / np.array(plan.scale)
    lengths = np.broadcast_to(fields["size"][:, None, :], sigmas.shape)
    weights, ends = kernels_of(lengths.ravel(), sigmas.ravel())
    fields["kernels"] = np.stack([ends[:-1], ends[1:]], axis=1).reshape(len(fields), 2, 3, 2)
    order = np.argsort(-fields["size"][:, 1] * fields["pitch"], kind="stable")
    return fields[order], weights


def _groups(fields: npt.NDArray[Any], most: int) -> Iterator[npt.NDArray[Any]]:
    """Cut the fields into groups of at most `most` voxels, or of one field, and lay each group out."""
    first = at = 0
    for k, field in enumerate(fields):
        volume = int(field["size"][0] * field["size"][1] * field["pitch"])
        if k > first and at + volume > most:
            yield fields[first:k]
            first, at = k, 0
        field["at"] = at
        at += volume
    if first < len(fields):
        yield fields[first:]


def _room(fields: npt.NDArray[Any]) -> int:
    """Floats that a group takes."""
    size = int((fields["size"][:, 0] * fields["size"][:, 1] * fields["pitch"]).sum())
    return size + LANES * int(fields["pitch"].max())  # `gather_rows` reads up to 15 rows on


def _find_beta(job: TextureJob, threshold: float) -> None:
    """Compute beta of each lesion (eq. 6)."""
    totals = np.add.reduceat(job.sums, job.columns[:-1], axis=0)
    for field, (passing, total) in zip(job.fields, totals.tolist(), strict=True):
        field["beta"] = field["mu0"] / (total / FIXED_POINT / passing if passing else threshold)
        field["beta_fallback"] = passing == 0


@inner
def _kernel(field: Any, which: int, axis: int) -> tuple[int, int]:
    """First weight of sigma_a or sigma_b along an axis, and the one after the last."""
    return field.kernels[which, axis, 0], field.kernels[which, axis, 1]


@maker
def _scratch(job: Any) -> tuple[Any, Any]:
    """Lines and outputs that are long enough for every axis of every field."""
    fields = job.fields
    lines, out = 0, 0
    for k in range(fields.size):
        for axis in range(3):
            n = fields[k].size[axis]
            out = max(out, pitch_of(n) * LANES)
            for which in range(2):
                begin, end = _kernel(fields[k], which, axis)
                lines = max(lines, scratch_for(job.weights[begin:end], n))
    return aligned(lines), aligned(out)


@kernel
def _synthesize(progress: Any, job: Any) -> None:
    """Go through the rounds."""
    fields, slices, columns = job.fields, job.slices, job.columns
    lines, out = _scratch(job)
    t = take(progress, 0)
    while t >= 0:
        k = group_of(slices, t)
        _noise_slice(fields[k], t - slices[k], job, False, lines, out)
        done(progress, 0)
        t = take(progress, 0)
    wait_for(progress, 0)
    t = take(progress, 1)
    while t >= 0:
        k = group_of(columns, t)
        _smooth_noise(fields[k], t - columns[k], job, job.extremes[t], lines, out)
        done(progress, 1)
        t = take(progress, 1)
    wait_for(progress, 1)
    if take(progress, 2) >= 0:
        _rescale(job)
        done(progress, 2)
    wait_for(progress, 2)
    t = take(progress, 3)
    while t >= 0:
        k = group_of(slices, t)
        _noise_slice(fields[k], t - slices[k], job, True, lines, out)
        done(progress, 3)
        t = take(progress, 3)
    wait_for(progress, 3)
    t = take(progress, 4)
    while t >= 0:
        k = group_of(columns, t)
        _smooth_salt(fields[k], t - columns[k], job, lines, out)
        job.sums[t, 0], job.sums[t, 1] = _sum_above(fields[k], t - columns[k], job)
        done(progress, 4)
        t = take(progress, 4)
    wait_for(progress, 4)


@inner
def _noise_slice(field: Any, z: int, job: Any, salt: bool, lines: Any, out: Any) -> None:
    """Fill a slice of a box with a1 or, where `salt`, with b1 under the a2 it holds; filter in plane."""
    values, height, width, pitch = job.values, field.size[1], field.size[2], field.pitch
    at = field.at + z * height * pitch
    (y0, y1), (x0, x1) = _kernel(field, int(salt), 1), _kernel(field, int(salt), 2)
    along_y, along_x = job.weights[y0:y1], job.weights[x0:x1]
    margin = margin_of(along_x, width) + MARGIN
    stream = SALT if salt else PROBABILITY
    for y in range(0, height, LANES):
        if salt:
            gather_rows(values, at + y * pitch, pitch, out, 0)
        _draw_lines(field, z, y, job, stream, lines, margin)
        if salt:
            _threshold_lines(field, width, out, lines, margin)
        else:
            _centre_lines(width, lines, margin)
        smooth(lines, margin, width, along_x, out)
        scatter_rows(out, width, values, at + y * pitch, pitch, min(LANES, height - y), lines)
    smooth_columns(values, at, height, pitch, pitch, along_y, lines, out)


@inner
def _draw_lines(field: Any, z: int, y: int, job: Any, stream: Any, lines: Any, margin: int) -> None:
    """Uniforms of sixteen rows of a box, from the quad of its first voxel to that of its last."""
    x0 = field.start[2]
    first = x0 >> 2
    quads = ((x0 + field.size[2] - 1) >> 2) - first + 1
    plane = np.uint32(((field.start[0] + z) << 16) | (field.start[1] + y))
    words = job.sample, field.component, job.seed, stream
    uniform_lines(lines, margin + 4 * first - x0, first, quads, plane, *words)


@inner
def _centre_lines(width: int, lines: Any, margin: int) -> None:
    """Subtract the mean, 1/2.

    The rescale of eq. 8 forgets it, and a wide filter on a small box leaves a range near 1e-5, which float32
    resolves around 0 but not around 1/2.
    """
    for x in range(margin, margin + width):
        store(lines, x * LANES, load(lines, x * LANES) - splat(np.float32(0.5)))


@inner
def _threshold_lines(field: Any, width: int, a2: Any, lines: Any, margin: int) -> None:
    """Turn uniforms v into salt noise [v < a], with a rescaled from a2 (eq. 2 and 8)."""
    low, slope, a_low = splat(field.low), splat(field.slope), splat(np.float32(field.a_low))
    for x in range(width):
        a = (load(a2, x * LANES) - low) * slope + a_low
        at = (margin + x) * LANES
        store(lines, at, one_where_less(load(lines, at), a))


@inner
def _smooth_noise(field: Any, y: int, job: Any, extremes: Any, lines: Any, out: Any) -> None:
    """Filter the columns of one y along z, and find their least and greatest value."""
    values, depth, step = job.values, field.size[0], field.size[1] * field.pitch
    at = field.at + y * field.pitch
    begin, end = _kernel(field, 0, 0)
    smooth_columns(values, at, depth, step, field.pitch, job.weights[begin:end], lines, out)
    low = high = load(values, at)
    for z in range(depth):
        for x in range(at + z * step, at + z * step + field.pitch, LANES):
            low, high = least(low, load(values, x)), greatest(high, load(values, x))
    extremes[0], extremes[1] = least_lane(low), greatest_lane(high)


@inner
def _rescale(job: Any) -> None:
    """Find the map of a2 to [a_L, a_U]; a field without range (one voxel, say) becomes a_L everywhere."""
    fields, columns, extremes = job.fields, job.columns, job.extremes
    for k in range(fields.size):
        low, high = np.float32(np.inf), np.float32(-np.inf)
        for t in range(columns[k], columns[k + 1]):
            low, high = min(low, extremes[t, 0]), max(high, extremes[t, 1])
        fields[k].low = low
        span = np.float64(high) - np.float64(low)
        a_range = fields[k].a_high - fields[k].a_low
        fields[k].slope = np.float32(a_range / span) if span > 0.0 else np.float32(0.0)


@inner
def _smooth_salt(field: Any, y: int, job: Any, lines: Any, out: Any) -> None:
    """Filter the columns of one y along z."""
    at, step = field.at + y * field.pitch, field.size[1] * field.pitch
    begin, end = _kernel(field, 1, 0)
    smooth_columns(job.values, at, field.size[0], step, field.pitch, job.weights[begin:end], lines, out)


@inner
def _sum_above(field: Any, y: int, job: Any) -> tuple[int, int]:
    """Count b2 above the threshold in the lesion's voxels of one y, and sum it in units of 2**-26."""
    values, runs, threshold = job.values, job.lesions, job.threshold
    passing, total = 0, 0
    for z in range(field.size[0]):
        row = (field.start[0] + z) * runs.height + field.start[1] + y
        shift = field.at + (z * field.size[1] + y) * field.pitch - field.start[2]
        for run in range(runs.first[row], runs.first[row + 1]):
            if runs.label[run] == field.label:
                b2 = values[shift + runs.start[run] : shift + runs.stop[run]]
                for x in range(b2.size):
                    above = b2[x] > threshold
                    passing += above
                    unit = math.floor(np.float64(b2[x]) * FIXED_POINT + 0.5)
                    total += unit if above else 0
    return passing, total
