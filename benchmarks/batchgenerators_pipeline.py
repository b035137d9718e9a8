"""The generator with batchgeneratorsv2's transforms where they can express a step.

Blobs: the rotated ellipsoid is drawn in its box and `SpatialTransform` warps it: dense noise, smoothed by a
Gaussian in Fourier space and scaled to a largest displacement, here three of the plan's standard
deviations. Its box is centred on the blob, cut to what the volume needs.

Texture: `GaussianBlurTransform` ends its kernel at 3 sigma, not 4, and mirrors at the edge voxel's middle.
torch mirrors once only, so boxes thinner than the kernel's radius are extended by NumPy first.

Not expressible: the k-th voxel of a mask, blobs that touch, salt noise with a probability of its own at each
voxel, the mean above a threshold over a mask. NumPy and SciPy do those.
"""

from __future__ import annotations

import numpy as np
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, _compute_kernel_size
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from scipy import ndimage

from benchmarks.geometry import Field, Mask, Site, crop_to_box, ellipsoid, needed_reach, radius_of
from benchmarks.pipeline import Noise

SPLINE_WIDTH = 3**-0.5
"""Standard deviation of a cubic B-spline in units of its node spacing."""
FULL_WIDTH = 6
"""Kernel size in standard deviations: `truncate` of `blur_dimension`."""


class BatchGenerators:
    """Blobs and filters; threads are torch's."""

    cannot = (
        "placement on a mask",
        "merging of blobs that touch",
        "B-spline displacement (Gaussian instead)",
        "kernels of 4 standard deviations (3 instead)",
        "boxes thinner than the kernel's radius (extended by NumPy)",
        "salt noise with a probability map",
        "thresholded mean over a mask",
    )
    smoothing_rule = "within 1e-6 of scipy.ndimage.gaussian_filter(mode='mirror', radius=3 sigma) in float64"
    smoothing_limit = 1e-6

    def voxels(self, site: Site, noise: Noise) -> Mask:
        """See `benchmarks.pipeline.Library`; the noise is the library's own."""
        radius = radius_of(site.blob)
        sigma = SPLINE_WIDTH * site.blob.warp_correlation * radius
        size = tuple(2 * r + 1 for r in needed_reach(site))
        warp = SpatialTransform(
            size,
            0,
            random_crop=False,
            p_elastic_deform=float(site.blob.warp_amplitude > 0),
            elastic_deform_scale=lambda *_, dim, patch_size, **__: sigma / patch_size[dim],
            elastic_deform_magnitude=3 * site.blob.warp_amplitude * radius / 5,
            mode_image="nearest",
        )
        warped = warp(image=torch.from_numpy(ellipsoid(site)[None].astype(np.float32)))["image"]
        return crop_to_box(warped[0].numpy() > 0.5, site)

    def smooth(self, field: Field, sigma: tuple[float, ...]) -> Field:
        """See `benchmarks.pipeline.Library`."""
        blur = GaussianBlurTransform(
            blur_sigma=lambda *_, dim, **__: sigma[dim - 1], synchronize_axes=False, p_per_channel=1.0
        )
        extended = _extended(field, sigma)
        if extended is field:
            extended = field.copy()  # the transform writes its input
        blurred = blur(image=torch.from_numpy(extended[None]))["image"][0].numpy()
        return np.ascontiguousarray(blurred[tuple(slice(0, n) for n in field.shape)])

    def smoothing_reference(self, field: Field, sigma: tuple[float, ...]) -> np.ndarray:
        """Return what `smooth` claims, by SciPy in float64."""
        extended = _extended(field, sigma).astype(np.float64)
        smoothed = ndimage.gaussian_filter(extended, sigma, mode="mirror", radius=_radii(sigma))
        return smoothed[tuple(slice(0, n) for n in field.shape)]


def _radii(sigma: tuple[float, ...]) -> list[int]:
    return [_compute_kernel_size(s, truncate=FULL_WIDTH) // 2 for s in sigma]


def _extended(field: Field, sigma: tuple[float, ...]) -> Field:
    missing = [max(r + 1 - n, 0) for r, n in zip(_radii(sigma), field.shape, strict=True)]
    return np.pad(field, [(0, m) for m in missing], mode="symmetric") if any(missing) else field
