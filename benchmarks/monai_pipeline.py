"""The generator with MONAI's transforms where they can express a step.

Blobs: the rotated ellipsoid is drawn in its box and `Rand3DElastic` warps it, with `sigma` and `magnitude`
set so that correlation length and standard deviation of the displacement are the plan's. Its displacement is
dense noise smoothed by a Gaussian, not a B-spline. Its box is centred on the blob, cut to what the volume
needs.

Texture: `GaussianSmooth(approx="sampled")` has SciPy's taps but for their sum, which is not exactly 1 (within
1e-4 on each axis), and its edges are zeros: no transform of MONAI reflects as SciPy does.

Not expressible: the k-th voxel of a mask, blobs that touch (MONAI has the largest component only), salt noise
with a probability of its own at each voxel, the mean above a threshold over a mask. NumPy and SciPy do those.
"""

from __future__ import annotations

import numpy as np
import torch
from monai.transforms import GaussianSmooth, Rand3DElastic
from scipy import ndimage

from benchmarks.geometry import Field, Mask, Site, crop_to_box, ellipsoid, needed_reach, radius_of
from benchmarks.pipeline import Noise

SPLINE_WIDTH = 3**-0.5
"""Standard deviation of a cubic B-spline in units of its node spacing."""


class Monai:
    """Blobs and filters; threads are torch's."""

    cannot = (
        "placement on a mask",
        "merging of blobs that touch",
        "B-spline displacement (Gaussian instead)",
        "reflecting edges of the Gaussian (zeros instead)",
        "salt noise with a probability map",
        "thresholded mean over a mask",
    )
    smoothing_rule = "within 2e-4 of scipy.ndimage.gaussian_filter(mode='constant') in float64"
    smoothing_limit = 2e-4

    def voxels(self, site: Site, noise: Noise) -> Mask:
        """See `benchmarks.pipeline.Library`; the noise is MONAI's own."""
        radius = radius_of(site.blob)
        sigma = SPLINE_WIDTH * site.blob.warp_correlation * radius
        spread = 3**-0.5 * (2 * np.pi**0.5 * sigma) ** -1.5  # of U[-1, 1] after a Gaussian of that sigma
        magnitude = site.blob.warp_amplitude * radius / 5 / spread
        warp = Rand3DElastic(
            (sigma, sigma),
            (magnitude, magnitude),
            prob=1.0,
            spatial_size=tuple(2 * r + 1 for r in needed_reach(site)),
            mode="nearest",
            padding_mode="zeros",
        )
        warped = warp(torch.from_numpy(ellipsoid(site)[None].astype(np.float32)))
        return crop_to_box(np.asarray(warped[0]) > 0.5, site)

    def smooth(self, field: Field, sigma: tuple[float, ...]) -> Field:
        """See `benchmarks.pipeline.Library`."""
        smooth = GaussianSmooth(list(sigma), approx="sampled")
        return np.asarray(smooth(torch.from_numpy(field[None])), np.float32)[0]

    def smoothing_reference(self, field: Field, sigma: tuple[float, ...]) -> np.ndarray:
        """Return what `smooth` claims, by SciPy in float64."""
        return ndimage.gaussian_filter(field.astype(np.float64), sigma, mode="constant")
