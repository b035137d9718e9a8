"""The generator as one would write it with NumPy and SciPy, for a plan that is given: place to inject.

Every stage works in boxes, never on whole volumes, but for the two passes that must: copying the image and
comparing it with τ. Two things are left to a `Library`, because libraries differ in them: evaluating a warped
blob and smoothing a field. `benchmarks.scipy_pipeline` is SciPy's; the others are MONAI, TorchIO and
batchgeneratorsv2. Merging is NumPy and SciPy for all of them: none has connected components of several blobs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy import ndimage

import lesionsynth as ls
from benchmarks.geometry import Box, Corner, Field, Mask, Site, blob_box, bounding_box, shifted

ROUNDING = 4e-7
"""Error of a float32 filtered field in [0, 1], and so of what decides a tie."""


class Noise(Protocol):
    """Where uniform numbers in [0, 1) come from."""

    def uniform(
        self, plan: ls.LesionPlan, stream: int, component: int, shape: Corner, start: Corner
    ) -> Field:
        """Draw a field of `shape` whose first voxel, or node, is `start`."""


class Philox:
    """The noise lesionsynth uses, so that results can be compared."""

    def uniform(
        self, plan: ls.LesionPlan, stream: int, component: int, shape: Corner, start: Corner
    ) -> Field:
        """See `Noise`."""
        return ls.ops.philox_uniform(
            shape, plan.seed, stream=stream, sample=plan.index, component=component, offset=start
        )


class Generator:
    """NumPy's generator, what one would use otherwise."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def uniform(
        self, plan: ls.LesionPlan, stream: int, component: int, shape: Corner, start: Corner
    ) -> Field:
        """See `Noise`; only `shape` matters."""
        return self._rng.random(shape, dtype=np.float32)


class Library(Protocol):
    """What libraries differ in."""

    def voxels(self, site: Site, noise: Noise) -> Mask:
        """Evaluate the warped blob in its box."""

    def smooth(self, field: Field, sigma: tuple[float, ...]) -> Field:
        """Filter a field with a Gaussian."""


@dataclass(frozen=True)
class Piece:
    """Voxels in a box: a blob, or a lesion made of `blobs`."""

    box: Box
    voxels: Mask
    blobs: tuple[int, ...]


@dataclass(frozen=True)
class Texture:
    """B of one lesion, and how many voxels rounding may decide otherwise (counted on request)."""

    values: Field
    ties: int


class Stages:
    """One method per stage; what passes between them is plain arrays."""

    def __init__(self, library: Library, noise: Noise, *, count_ties: bool = False) -> None:
        self._library = library
        self._noise = noise
        self._count_ties = count_ties

    def copy(self, plan: ls.LesionPlan, image: Field) -> tuple[Field, Mask]:
        """Write the pair without lesions."""
        return image.copy(), image >= np.float32(plan.tau)

    def place(self, plan: ls.LesionPlan, mask: Mask) -> list[Corner]:
        """Find the k-th voxel of the mask, k = floor(u |M|), slice by slice."""
        ends = np.cumsum([np.count_nonzero(plane) for plane in mask])
        inside: dict[int, npt.NDArray[np.intp]] = {}
        centers: list[Corner] = []
        for blob in plan.blobs:
            if blob.center is not None:
                centers.append(blob.center)
                continue
            k = int(blob.position * ends[-1])
            z = int(np.searchsorted(ends, k, side="right"))
            if z not in inside:
                inside[z] = np.flatnonzero(mask[z])
            y, x = divmod(int(inside[z][k - (ends[z - 1] if z else 0)]), mask.shape[2])
            centers.append((z, y, x))
        return centers

    def draw(self, plan: ls.LesionPlan, centers: list[Corner], mask: Mask) -> list[Piece]:
        """Evaluate every blob in its box and cut it to the tight box of what lies in the mask."""
        pieces = []
        for number, (blob, center) in enumerate(zip(plan.blobs, centers, strict=True)):
            box = blob_box(plan, blob, center, mask.shape)
            voxels = self._library.voxels(Site(plan, blob, center, box, mask.shape), self._noise) & mask[box]
            if tight := bounding_box(voxels):
                pieces.append(Piece(shifted(tight, box), voxels[tight], (number,)))
        return pieces

    def merge(self, plan: ls.LesionPlan, pieces: list[Piece]) -> list[Piece]:
        """Join blobs that touch: pairs whose boxes do are compared where the boxes overlap."""
        structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[plan.connectivity])
        root = list(range(len(pieces)))
        for i, j in itertools.combinations(range(len(pieces)), 2):
            if root[i] != root[j] and touch(pieces[i], pieces[j], structure):
                low, high = sorted((root[i], root[j]))
                root = [low if r == high else r for r in root]
        groups = [[p for p, r in zip(pieces, root, strict=True) if r == k] for k in sorted(set(root))]
        return [group[0] if len(group) == 1 else _union(group) for group in groups]

    def texture(self, plan: ls.LesionPlan, lesions: list[Piece]) -> list[Texture]:
        """Salt noise, smoothed and scaled (PAPER.md eq. 2-8)."""
        return [self._texture(plan, lesion) for lesion in lesions]

    def inject(self, lesions: list[Piece], textures: list[Texture], out: Field, target: Mask) -> None:
        """Write A = max(H, B) and GT = False inside lesions, in place."""
        for lesion, texture in zip(lesions, textures, strict=True):
            part = out[lesion.box]
            np.maximum(part, texture.values, out=part, where=lesion.voxels)
            target[lesion.box] &= ~lesion.voxels

    def paint(self, lesions: list[Piece], shape: Corner) -> npt.NDArray[np.int32]:
        """Paint lesion k with k, from 1."""
        labels = np.zeros(shape, np.int32)
        for number, lesion in enumerate(lesions, start=1):
            labels[lesion.box][lesion.voxels] = number
        return labels

    def _texture(self, plan: ls.LesionPlan, lesion: Piece) -> Texture:
        blob = plan.blobs[lesion.blobs[0]]
        start, shape = tuple(s.start for s in lesion.box), lesion.voxels.shape
        white = self._noise.uniform(plan, ls.ops.Stream.PROBABILITY, blob.component, shape, start)
        white -= np.float32(0.5)  # the rescaling forgets the mean, and float32 is finer around 0
        a = self._library.smooth(white, tuple(blob.sigma_a / s for s in plan.scale))
        low, spread = a.min(), float(np.ptp(a))
        gap = blob.a_high - blob.a_low
        a -= low
        a *= np.float32(gap / spread if spread > ROUNDING else 0.0)
        a += np.float32(blob.a_low)
        v = self._noise.uniform(plan, ls.ops.Stream.SALT, blob.component, shape, start)
        b = self._library.smooth((v < a).astype(np.float32), tuple(blob.sigma_b / s for s in plan.scale))
        inside = b[lesion.voxels]
        bright = inside[inside > plan.mean_threshold]
        mean = float(bright.mean(dtype=np.float64)) if bright.size else plan.mean_threshold
        ties = 0
        if self._count_ties:
            margin = ROUNDING * (1 + gap / max(spread, ROUNDING))
            ties = np.count_nonzero(np.abs(v - a) <= margin)
            ties += np.count_nonzero(np.abs(inside - plan.mean_threshold) <= ROUNDING)
        b *= np.float32(blob.mu0 / mean)
        return Texture(np.minimum(b, np.float32(1), out=b), ties)


@dataclass(frozen=True)
class Pair:
    """What `render` makes."""

    image: Field
    target: Mask
    labels: npt.NDArray[np.int32]
    lesions: list[Piece]
    textures: list[Texture]


def render(stages: Any, plan: ls.LesionPlan, image: Field, mask: Mask) -> Pair:
    """Run the stages in order; `stages` is a `Stages` or a clock around one."""
    out, target = stages.copy(plan, image)
    pieces = stages.draw(plan, stages.place(plan, mask), mask)
    lesions = stages.merge(plan, pieces)
    textures = stages.texture(plan, lesions)
    stages.inject(lesions, textures, out, target)
    return Pair(out, target, stages.paint(lesions, image.shape), lesions, textures)


def touch(one: Piece, other: Piece, structure: Mask) -> bool:
    """Whether two pieces overlap or are neighbours."""
    starts = [max(a.start, b.start) - 1 for a, b in zip(one.box, other.box, strict=True)]
    stops = [min(a.stop, b.stop) + 1 for a, b in zip(one.box, other.box, strict=True)]
    if any(stop - start < 2 for start, stop in zip(starts, stops, strict=True)):
        return False
    a, b = (_window(piece, starts, stops) for piece in (one, other))
    return bool((a & b).any() or (ndimage.binary_dilation(a, structure) & b).any())


def _window(piece: Piece, starts: list[int], stops: list[int]) -> Mask:
    out = np.zeros([b - a for a, b in zip(starts, stops, strict=True)], np.bool_)
    common = [(max(a, s.start), min(b, s.stop)) for a, b, s in zip(starts, stops, piece.box, strict=True)]
    source = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(common, piece.box, strict=True))
    to = tuple(slice(a - start, b - start) for (a, b), start in zip(common, starts, strict=True))
    out[to] = piece.voxels[source]
    return out


def _union(group: list[Piece]) -> Piece:
    corners = [[(s.start, s.stop) for s in piece.box] for piece in group]
    box = tuple(
        slice(min(c[axis][0] for c in corners), max(c[axis][1] for c in corners)) for axis in range(3)
    )
    voxels = np.zeros([s.stop - s.start for s in box], np.bool_)
    for piece in group:
        inner = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(piece.box, box, strict=True))
        voxels[inner] |= piece.voxels
    return Piece(box, voxels, tuple(sorted(k for piece in group for k in piece.blobs)))
