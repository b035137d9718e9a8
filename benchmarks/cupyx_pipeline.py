"""The generator as one would write it with CuPy and `cupyx.scipy.ndimage`, for a plan that is given.

The array module and the filters are arguments, so the same lines run with NumPy and SciPy, where tests hold
them to lesionsynth. Blobs are evaluated in their boxes with matrix products, lesions are the connected
components of their union, filters are `gaussian_filter`, noise is the array module's own. Centres and boxes
come to the host, as they must where shapes of arrays depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import lesionsynth as ls
from benchmarks.geometry import blob_box, radius_of, rotation_matrix
from benchmarks.scipy_pipeline import NODE_ORIGIN, SURFACE, cubic_bspline


@dataclass
class Pipeline:
    """A pair at a time.

    Parameters
    ----------
    xp : module
        `cupy` or `numpy`.
    ndimage : module
        `cupyx.scipy.ndimage` or `scipy.ndimage`.
    """

    xp: Any
    ndimage: Any

    def render(self, plan: ls.LesionPlan, image: Any, mask: Any) -> tuple[Any, Any, Any]:
        """Return image, target and labels."""
        xp = self.xp
        out, target = image.copy(), image >= np.float32(plan.tau)
        inside = xp.flatnonzero(mask)
        union = xp.zeros(mask.shape, dtype=bool)
        for blob in plan.blobs:
            k = int(inside[min(int(blob.position * inside.size), inside.size - 1)])
            center = blob.center or tuple(int(n) for n in np.unravel_index(k, mask.shape))
            box = blob_box(plan, blob, center, mask.shape)
            union[box] |= self._blob(plan, blob, center, box) & mask[box]
        structure = self.ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[plan.connectivity])
        labels, count = self.ndimage.label(union, structure)
        for number in range(1, int(count) + 1):
            lesion = labels == number
            box = self._box(lesion)
            voxels = lesion[box]
            texture = self._texture(plan, plan.blobs[(number - 1) % len(plan.blobs)], voxels)
            out[box] = xp.where(voxels, xp.maximum(out[box], texture), out[box])
        target &= ~union
        return out, target, labels

    def _blob(self, plan: ls.LesionPlan, blob: ls.Blob, center: Any, box: Any) -> Any:
        """Warp and rotate, and compare with the surface, in float64 as lesionsynth does."""
        xp = self.xp
        axes = [
            (np.arange(s.start, s.stop) - c) * step
            for s, c, step in zip(box, center, plan.scale, strict=True)
        ]
        position = [xp.asarray(axis) for axis in np.ix_(*axes)]
        turn = (rotation_matrix(blob.rotation) / np.array(blob.semi_axes)).T
        parts = [p + d for p, d in zip(position, self._displacement(plan, blob, axes), strict=True)]
        level = sum((row[0] * parts[0] + row[1] * parts[1] + row[2] * parts[2]) ** 2 for row in turn.tolist())
        return level <= 1 + SURFACE

    def _displacement(self, plan: ls.LesionPlan, blob: ls.Blob, axes: list[Any]) -> list[Any]:
        """Cubic B-spline over a lattice of lesionsynth's own noise, so that shapes can be compared."""
        xp, radius = self.xp, radius_of(blob)
        spacing = blob.warp_correlation * radius
        nodes, weights = [], []
        for offsets in axes:
            t = offsets / spacing
            n = np.arange(np.floor(t.min()) - 1, np.floor(t.max()) + 3)
            nodes.append(n.astype(np.int64))
            weights.append(xp.asarray(cubic_bspline(t[:, None] - n)))
        start = tuple(int(n[0]) + origin for n, origin in zip(nodes, NODE_ORIGIN, strict=True))
        parts = []
        for i in range(3):
            u = ls.ops.philox_uniform(
                tuple(n.size for n in nodes), plan.seed, stream=ls.ops.Stream.WARP, sample=plan.index,
                component=3 * blob.component + i, offset=start,
            )  # fmt: skip
            c = (2 * xp.asarray(u, dtype=np.float64) - 1) * (blob.warp_amplitude * radius)
            c = xp.tensordot(weights[0], c, axes=(1, 0))
            parts.append(xp.matmul(xp.matmul(weights[1], c), weights[2].T))
        return parts

    def _box(self, lesion: Any) -> tuple[slice, ...]:
        """Tight bounding box."""
        box = []
        for axis in range(3):
            others = tuple(k for k in range(3) if k != axis)
            found = self.xp.flatnonzero(lesion.any(axis=others))
            box.append(slice(int(found[0]), int(found[-1]) + 1))
        return tuple(box)

    def _texture(self, plan: ls.LesionPlan, blob: ls.Blob, voxels: Any) -> Any:
        """Salt noise, smoothed and scaled (PAPER.md eq. 2-8)."""
        xp = self.xp
        random = xp.random.random

        def noise() -> Any:
            return random(voxels.shape).astype(np.float32)

        a = self.ndimage.gaussian_filter(noise() - np.float32(0.5), [blob.sigma_a / s for s in plan.scale])
        low, high = float(a.min()), float(a.max())
        a = (a - low) * ((blob.a_high - blob.a_low) / max(high - low, 1e-12)) + blob.a_low
        salt = (noise() < a).astype(np.float32)
        b = self.ndimage.gaussian_filter(salt, [blob.sigma_b / s for s in plan.scale])
        bright = b[voxels & (b > plan.mean_threshold)]
        mean = float(bright.mean()) if bright.size else plan.mean_threshold
        return xp.minimum(b * np.float32(blob.mu0 / mean), np.float32(1))
