"""Stage 2: blobs that touch become one (PAPER.md III-C.1, "merge connected blobs").

A row of a blob is a run or two, so merging works on runs. The runs of a row, in order of their first voxel,
join where they overlap or follow each other; a run of one row joins those of neighbouring rows within reach.
The union-find runs over blobs, not voxels, so a blob that falls apart stays one. Nothing has the size of the
volume, and a hundred blobs cost what their voxels cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.bits import count_runs, next_clear, next_set
from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.threads import done, take, wait_for, work_together
from lesionsynth.cpu.label import REACH, Runs, paint, root_of, unite
from lesionsynth.cpu.shapes import Shapes
from lesionsynth.plan import Component


@dataclass(frozen=True)
class Lesions:
    """The non-adjacent lesions G_j."""

    runs: Runs
    """Their voxels."""
    label: npt.NDArray[np.int32]
    """Lesion of each run, 1..n."""
    boxes: npt.NDArray[np.int64]
    """(n, 3, 2): tight bounding boxes, (start, stop) along z, y, x."""
    voxels: npt.NDArray[np.int64]
    """(n,): sizes."""
    members: tuple[tuple[int, ...], ...]
    """The blobs of each lesion, ascending. Blobs without a voxel are in none."""

    def __len__(self) -> int:
        """Return the number of lesions."""
        return len(self.members)

    @property
    def rows(self) -> LesionRows:
        """The runs and labels, for kernels."""
        return LesionRows(self.runs.first, self.runs.start, self.runs.stop, self.label, *self.runs.shape)

    def component(self, field: Any, changed: int) -> Component:
        """Tell of a lesion, given its `FIELD` record of `texture` and how many voxels it changed."""
        label = int(field["label"])
        (z0, z1), (y0, y1), (x0, x1) = self.boxes[label - 1].tolist()
        return Component(
            label=label, blobs=self.members[label - 1], box=((z0, z1), (y0, y1), (x0, x1)),
            voxels=int(self.voxels[label - 1]), beta=float(field["beta"]),
            beta_fallback=bool(field["beta_fallback"]), changed=changed,
        )  # fmt: skip

    def paint(self, out: npt.NDArray[np.int32], threads: int | None = None) -> None:
        """Write the (z, y, x) volume of labels: 0 background, 1..n the lesions."""
        paint(self.runs, self.label, out, threads)


class LesionRows(NamedTuple):
    """The lesions' runs as kernels see them; see `Lesions` and `Runs`."""

    first: Any
    start: Any
    stop: Any
    label: Any
    depth: int
    height: int
    width: int


class MergeJob(NamedTuple):
    """What `_collect_and_join` reads and writes."""

    slices: Any
    """Those that have runs."""
    blobs: Any
    bits: Any
    room: Any
    """(depth + 1,): where the runs of each slice begin."""
    height: int
    start: Any
    """Runs, and the blob of each."""
    stop: Any
    blob: Any
    span: Any
    """(z y, 2): runs of a row, where they begin and end."""
    parent: Any
    """(depth, n): each slice joins blobs in a table of its own, so no thread waits for another."""
    face: int
    """Voxels within which runs of rows that share a face, or an edge, touch; -1 where they never do."""
    edge: int


class FoundJob(NamedTuple):
    """What `_finish` makes of them."""

    label_of: Any
    """(n,): lesion of each blob."""
    first: Any
    start: Any
    stop: Any
    label: Any
    boxes: Any
    voxels: Any


def merge(
    shapes: Shapes, shape: tuple[int, int, int], connectivity: int, threads: int | None = None
) -> Lesions:
    """Merge blobs into non-adjacent lesions G_j.

    Parameters
    ----------
    shapes : Shapes
        The blobs' voxels.
    shape : (3,) ints
        Volume (z, y, x).
    connectivity : {6, 18, 26}
        Neighbourhood in which two blobs touch.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    Lesions
        Numbered by their lowest-numbered blob.
    """
    depth, height, _ = shape
    n = len(shapes.blobs)
    room = np.concatenate([[0], np.cumsum(shapes.runs.sum(axis=0))])  # runs of a slice before merging
    slices = np.flatnonzero(np.diff(room))
    start, stop, blob = (np.empty(room[-1], dtype=np.int32) for _ in range(3))
    span = np.zeros((depth * height, 2), dtype=np.int64)
    parent = np.tile(np.arange(n, dtype=np.int32), (depth, 1))
    face, edge = REACH[connectivity]
    job = MergeJob(
        slices, shapes.blobs, shapes.bits, room, height, start, stop, blob, span, parent, face, edge
    )
    work_together(_collect_and_join, [len(slices), len(slices)], job, threads=threads)
    roots = np.arange(n, dtype=np.int32)
    _combine(parent, slices, roots)
    seen = shapes.runs.any(axis=1)
    kept, label = np.unique(roots[seen], return_inverse=True)
    label_of = np.zeros(n, dtype=np.int32)
    label_of[seen] = label + 1
    boxes = np.empty((len(kept), 3, 2), dtype=np.int64)
    voxels = np.zeros(len(kept), dtype=np.int64)
    first = np.zeros(depth * height + 1, dtype=np.int64)
    np.cumsum(span[:, 1] - span[:, 0], out=first[1:])
    starts, stops, labels = (np.empty(first[-1], dtype=np.int32) for _ in range(3))
    members: list[list[int]] = [[] for _ in kept]
    for b in np.flatnonzero(seen).tolist():
        members[label_of[b] - 1].append(b)
    _finish(job, FoundJob(label_of, first, starts, stops, labels, boxes, voxels))
    runs = Runs(shape, first, starts, stops)
    return Lesions(runs, labels, boxes, voxels, tuple(map(tuple, members)))


@kernel
def _collect_and_join(progress: Any, job: Any) -> None:
    """Collect the runs of each slice; then join those of neighbouring rows and slices. A task is a slice."""
    count = np.empty(job.height, dtype=np.int64)
    t = take(progress, 0)
    while t >= 0:
        _collect_slice(job, job.slices[t], count)
        done(progress, 0)
        t = take(progress, 0)
    wait_for(progress, 0)
    t = take(progress, 1)
    while t >= 0:
        _join_slice(job, job.slices[t])
        done(progress, 1)
        t = take(progress, 1)
    wait_for(progress, 1)


@inner
def _collect_slice(job: Any, z: int, count: Any) -> None:
    """Write the runs of each row of a slice, joined where they overlap or follow each other."""
    blobs, span, height, at = job.blobs, job.span, job.height, job.room[z]
    count[:] = 0
    for b in range(blobs.size):
        _count_rows(blobs[b], job.bits, z, count)
    for y in range(height):
        span[z * height + y] = at
        at += count[y]
    for b in range(blobs.size):
        _insert_runs(job, b, z)
    for row in range(z * height, (z + 1) * height):
        if span[row, 0] < span[row, 1]:
            span[row, 1] = _join_overlapping(job, span[row, 0], span[row, 1], job.parent[z])


@inner
def _count_rows(blob: Any, bits: Any, z: int, count: Any) -> None:
    """Add the runs of a blob in slice z to those of the rows."""
    line, first = z - blob.start[0], blob.start[1]
    if 0 <= line < blob.size[0]:
        words, at = blob.words, blob.bits + line * blob.size[1] * blob.words
        for y in range(blob.size[1]):
            count[first + y] += count_runs(bits[at : at + words])
            at += words


@inner
def _insert_runs(job: Any, b: int, z: int) -> None:
    """Insert the runs of blob b in slice z into their rows, in order of their first voxel."""
    one, start, stop, blob, span = job.blobs[b], job.start, job.stop, job.blob, job.span
    line, first, words = z - one.start[0], z * job.height + one.start[1], one.words
    if not 0 <= line < one.size[0]:
        return
    base, x0 = one.bits + line * one.size[1] * words, 64 * one.word
    for y in range(one.size[1]):
        row = job.bits[base + y * words : base + (y + 1) * words]
        x = next_set(row, 0)
        while x < 64 * words:
            past = next_clear(row, x)
            at, k = span[first + y, 0], span[first + y, 1]
            while k > at and start[k - 1] > x0 + x:
                start[k], stop[k], blob[k] = start[k - 1], stop[k - 1], blob[k - 1]
                k -= 1
            start[k], stop[k], blob[k] = x0 + x, x0 + past, b
            span[first + y, 1] += 1
            x = next_set(row, past)


@inner
def _join_overlapping(job: Any, at: int, end: int, parent: Any) -> int:
    """Turn sorted runs into ones that lie apart, in place; returns their end."""
    start, stop, blob = job.start, job.stop, job.blob
    last = at
    for k in range(at + 1, end):
        if start[k] <= stop[last]:
            unite(parent, blob[last], blob[k])
            stop[last] = max(stop[last], stop[k])
        else:
            last += 1
            start[last], stop[last], blob[last] = start[k], stop[k], blob[k]
    return last + 1


@inner
def _join_slice(job: Any, z: int) -> None:
    """Join the runs of each row with those of the rows before it, in its slice and in the last one."""
    height, span, parent, edge = job.height, job.span, job.parent[z], job.edge
    for y in range(height):
        row = z * height + y
        if span[row, 0] == span[row, 1]:
            continue
        if y > 0:
            _join_rows(job, span[row], span[row - 1], parent, job.face)
        if z > 0:
            other = row - height
            _join_rows(job, span[row], span[other], parent, job.face)
            if edge >= 0 and y > 0:
                _join_rows(job, span[row], span[other - 1], parent, edge)
            if edge >= 0 and y + 1 < height:
                _join_rows(job, span[row], span[other + 1], parent, edge)


@inner
def _join_rows(job: Any, one: Any, other: Any, parent: Any, reach: int) -> None:
    """Unite the runs of two rows that lie within `reach` of each other, walking both rows once."""
    start, stop, blob = job.start, job.stop, job.blob
    a, b = one[0], other[0]
    while a < one[1] and b < other[1]:
        if start[a] < stop[b] + reach and start[b] < stop[a] + reach:
            unite(parent, blob[a], blob[b])
        if stop[a] < stop[b]:
            a += 1
        else:
            b += 1


@kernel
def _combine(parent: Any, slices: Any, roots: Any) -> None:
    """Unite what any slice united, and point every blob at its root."""
    for z in slices:
        for b in range(roots.size):
            unite(roots, b, parent[z, b])
    for b in range(roots.size):
        roots[b] = root_of(roots, b)


@kernel
def _finish(job: Any, found: Any) -> None:
    """Close the gaps between rows, name the lesions, and measure them."""
    span, start, stop, boxes, height = job.span, job.start, job.stop, found.boxes, job.height
    boxes[:, :, 0], boxes[:, :, 1] = 2**62, 0
    for row in range(span.shape[0]):
        z, y, at = row // height, row % height, found.first[row]
        for k in range(span[row, 0], span[row, 1]):
            label = found.label_of[job.blob[k]]
            found.start[at], found.stop[at], found.label[at] = start[k], stop[k], label
            at += 1
            box = boxes[label - 1]
            box[0, 0], box[0, 1] = min(box[0, 0], z), max(box[0, 1], z + 1)
            box[1, 0], box[1, 1] = min(box[1, 0], y), max(box[1, 1], y + 1)
            box[2, 0], box[2, 1] = min(box[2, 0], start[k]), max(box[2, 1], stop[k])
            found.voxels[label - 1] += stop[k] - start[k]
