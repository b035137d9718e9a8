"""The generator with TorchIO's transforms where they can express a step.

Blobs: the rotated ellipsoid is drawn in its box and `ElasticDeformation` warps it; its cubic B-spline over
a coarse lattice has the plan's bound and, to a whole number of cells, the plan's spacing. It resamples the
image it is given, so the box is the whole blob's, with what lies outside the volume.

Texture: `Blur` is `scipy.ndimage.gaussian_filter`, behind a `Subject`.

Not expressible: the k-th voxel of a mask, blobs that touch (TorchIO keeps the largest component only), salt
noise with a probability of its own at each voxel, the mean above a threshold over a mask. NumPy and SciPy do
those.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torchio
from scipy import ndimage

import lesionsynth as ls
from benchmarks.geometry import Field, Mask, Site, crop_to_box, ellipsoid, radius_of
from benchmarks.pipeline import Noise

SPLINE_ORDER = 3


class TorchIO:
    """Blobs and filters; threads are SimpleITK's."""

    cannot = (
        "placement on a mask",
        "merging of blobs that touch",
        "evaluating a blob only inside the volume",
        "salt noise with a probability map",
        "thresholded mean over a mask",
    )
    smoothing_rule = "within 1e-6 of scipy.ndimage.gaussian_filter in float64"
    smoothing_limit = 1e-6

    def voxels(self, site: Site, noise: Noise) -> Mask:
        """See `benchmarks.pipeline.Library`."""
        shape = ellipsoid(site)
        radius = radius_of(site.blob)
        spacing = max(site.blob.warp_correlation * radius, 1.0)
        nodes = tuple(max(1, round(n / spacing)) + SPLINE_ORDER for n in shape.shape)
        bound = site.blob.warp_amplitude * radius
        parts = [
            noise.uniform(site.plan, ls.ops.Stream.WARP, 3 * site.blob.component + i, nodes, (0, 0, 0))
            for i in range(3)
        ]
        control = (2 * np.stack(parts, axis=-1).astype(np.float64) - 1) * bound
        warp = torchio.ElasticDeformation(control, (bound,) * 3, image_interpolation="nearest")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the paper's blobs may fold, and are meant to
            warped = warp(_subject(shape.astype(np.float32)))
        return crop_to_box(warped["field"].numpy()[0] > 0.5, site)

    def smooth(self, field: Field, sigma: tuple[float, ...]) -> Field:
        """See `benchmarks.pipeline.Library`."""
        smoothed = torchio.Blur(sigma)(_subject(field))
        return np.asarray(smoothed["field"].numpy()[0], np.float32)

    def smoothing_reference(self, field: Field, sigma: tuple[float, ...]) -> np.ndarray:
        """Return what `smooth` claims, by SciPy in float64."""
        return ndimage.gaussian_filter(field.astype(np.float64), sigma)


def _subject(field: Field) -> torchio.Subject:
    return torchio.Subject(field=torchio.ScalarImage(tensor=torch.from_numpy(field[None])))
