"""Stage 2: blobs that touch become one (PAPER.md III-C.1, "merge connected blobs").

A row of a blob is a run or two, so merging works on runs. The runs of a row, in order of their first voxel,
join where they overlap or follow each other; a run of one row joins those of neighbouring rows within reach.
The union-find runs over blobs, not voxels, so a blob that falls apart stays one. Nothing has the size of the
volume, and a hundred blobs cost what their voxels cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.bits import count_runs, next_clear, next_set
from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.threads import done, take, wait_for, work_together
from lesionsynth.cpu.label import REACH, Runs, paint, root_of, unite
from lesionsynth.cpu.shapes import Shapes

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


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

    def box(self, k: int) -> Box:
        """Tight bounding box of lesion k, counted from 0."""
        (z0, z1), (y0, y1), (x0, x1) = self.boxes[k].tolist()
        return (z0, z1), (y0, y1), (x0, x1)

    def paint(self, out: npt.NDArray[np.int32], threads: int | None = None) -> None:
        """Write the (z, y, x) volume of labels: 0 background, 1..n the lesions."""
        paint(self.runs, self.label, out, threads)


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
    start, stop, blob = (np.empty(room[-1], dtype=np.int32) for _ in range(3))
    span = np.zeros((depth * height, 2), dtype=np.int64)  # runs of a row: where they begin and end
    # Each slice joins blobs in a table of its own; so no thread waits for another.
    parent = np.tile(np.arange(n, dtype=np.int32), (depth, 1))
    slices = np.flatnonzero(np.diff(room))
    work_together(
        _collect_and_join, [len(slices), len(slices)], slices, shapes.blobs, shapes.bits, room, height, start,
        stop, blob, span, parent, *REACH[connectivity], threads=threads,
    )  # fmt: skip
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
    _finish(
        span, start, stop, blob, label_of, height, first, starts, stops, labels, boxes, voxels
    )  # fmt: skip
    runs = Runs(shape, first, starts, stops)
    return Lesions(runs, labels, boxes, voxels, tuple(map(tuple, members)))


@kernel
def _collect_and_join(
    progress: Any,
    slices: Any,
    blobs: Any,
    bits: Any,
    room: Any,
    height: int,
    start: Any,
    stop: Any,
    blob: Any,
    span: Any,
    parent: Any,
    face: int,
    edge: int,
) -> None:
    """Collect the runs of each slice; then join those of neighbouring rows and slices. A task is a slice."""
    count = np.empty(height, dtype=np.int64)
    t = take(progress, 0)
    while t >= 0:
        z = slices[t]
        _collect_slice(blobs, bits, z, height, room[z], start, stop, blob, span, parent[z], count)
        done(progress, 0)
        t = take(progress, 0)
    wait_for(progress, 0)
    t = take(progress, 1)
    while t >= 0:
        _join_slice(slices[t], height, start, stop, blob, span, parent[slices[t]], face, edge)
        done(progress, 1)
        t = take(progress, 1)
    wait_for(progress, 1)


@inner
def _collect_slice(
    blobs: Any, bits: Any, z: int, height: int, at: int, start: Any, stop: Any, blob: Any, span: Any,
    parent: Any, count: Any,
) -> None:  # fmt: skip
    """Write the runs of each row of a slice, joined where they overlap or follow each other."""
    count[:] = 0
    for b in range(blobs.size):
        _count_rows(blobs[b], bits, z, count)
    for y in range(height):
        span[z * height + y] = at
        at += count[y]
    for b in range(blobs.size):
        _insert_runs(blobs[b], b, bits, z, height, start, stop, blob, span)
    for row in range(z * height, (z + 1) * height):
        if span[row, 0] < span[row, 1]:
            span[row, 1] = _join_overlapping(span[row, 0], span[row, 1], start, stop, blob, parent)


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
def _insert_runs(
    one: Any, b: int, bits: Any, z: int, height: int, start: Any, stop: Any, blob: Any, span: Any
) -> None:
    """Insert the runs of blob b in slice z into their rows, in order of their first voxel."""
    line, first, words = z - one.start[0], z * height + one.start[1], one.words
    if not 0 <= line < one.size[0]:
        return
    base, x0 = one.bits + line * one.size[1] * words, 64 * one.word
    for y in range(one.size[1]):
        row = bits[base + y * words : base + (y + 1) * words]
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
def _join_overlapping(at: int, end: int, start: Any, stop: Any, blob: Any, parent: Any) -> int:
    """Turn sorted runs into ones that lie apart, in place; returns their end."""
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
def _join_slice(
    z: int, height: int, start: Any, stop: Any, blob: Any, span: Any, parent: Any, face: int, edge: int
) -> None:
    """Join the runs of each row with those of the rows before it, in its slice and in the last one."""
    for y in range(height):
        row = z * height + y
        if span[row, 0] == span[row, 1]:
            continue
        if y > 0:
            _join_rows(span[row], span[row - 1], start, stop, blob, parent, face)
        if z > 0:
            other = row - height
            _join_rows(span[row], span[other], start, stop, blob, parent, face)
            if edge >= 0 and y > 0:
                _join_rows(span[row], span[other - 1], start, stop, blob, parent, edge)
            if edge >= 0 and y + 1 < height:
                _join_rows(span[row], span[other + 1], start, stop, blob, parent, edge)


@inner
def _join_rows(one: Any, other: Any, start: Any, stop: Any, blob: Any, parent: Any, reach: int) -> None:
    """Unite the runs of two rows that lie within `reach` of each other, walking both rows once."""
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
def _finish(
    span: Any, start: Any, stop: Any, blob: Any, label_of: Any, height: int, first: Any, starts: Any,
    stops: Any, labels: Any, boxes: Any, voxels: Any,
) -> None:  # fmt: skip
    """Close the gaps between rows, name the lesions, and measure them."""
    boxes[:, :, 0], boxes[:, :, 1] = 2**62, 0
    for row in range(span.shape[0]):
        z, y, at = row // height, row % height, first[row]
        for k in range(span[row, 0], span[row, 1]):
            label = label_of[blob[k]]
            starts[at], stops[at], labels[at] = start[k], stop[k], label
            at += 1
            box = boxes[label - 1]
            box[0, 0], box[0, 1] = min(box[0, 0], z), max(box[0, 1], z + 1)
            box[1, 0], box[1, 1] = min(box[1, 0], y), max(box[1, 1], y + 1)
            box[2, 0], box[2, 1] = min(box[2, 0], start[k]), max(box[2, 1], stop[k])
            voxels[label - 1] += stop[k] - start[k]
