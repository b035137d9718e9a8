"""Bring lungs to one inflation: scale HU so that healthy lung has the density that a network was trained at.

In full inspiration healthy lung lies near -900 HU and ground glass may stay below -700, which healthy lung
itself reaches after breathing out: one threshold T in HU (PAPER.md III-A) misses the lesions of the one and
marks the lungs of the other. Less air scales HU towards 0, water, so ``hu * factor`` takes one state to the
other, and leaves what holds no air. The paper does nothing of the kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d

import lesionsynth as ls
from lesionsynth.io import AIR_HU
from normnet.config import HEALTHY_HU

SMOOTH = 15.0
"""Standard deviation in HU of the filter on the histogram: far below the width of its peak, about 50."""


def healthy_density(hu: npt.NDArray[Any], lung_mask: npt.NDArray[np.bool_]) -> float | None:
    """Density in HU of a patient's healthy lung: where the histogram of the lungs peaks, within `HEALTHY_HU`.

    Disease makes lung denser, so of several peaks it is the first that has half of the highest one's height;
    a mean or a median would move. None where there is no peak: hardly any healthy lung, or no lung.

    Parameters
    ----------
    hu : (z, y, x) array
        Not modified.
    lung_mask : (z, y, x) bool array
        Lungs, lesions included.
    """
    low, high = (int(level) for level in HEALTHY_HU)
    edge = round(4 * SMOOTH)
    values = np.zeros(high - low + 1 + 2 * edge)
    for slab, lungs in zip(hu, lung_mask, strict=True):  # by slices: no copy of a long scan's lungs
        bins = np.rint(slab[lungs]).astype(np.int64) - (low - edge)
        values += np.bincount(bins[(bins >= 0) & (bins < len(values))], minlength=len(values))
    smooth = gaussian_filter1d(values, SMOOTH)
    inner = np.arange(edge, len(values) - edge)
    peaks = inner[(smooth[inner] > smooth[inner - 1]) & (smooth[inner] >= smooth[inner + 1])]
    if not peaks.size:
        return None
    first = peaks[smooth[peaks] >= 0.5 * smooth[peaks].max()][0]
    return float(low - edge + int(first))


def inflation_factor(
    hu: npt.NDArray[Any], lung_mask: npt.NDArray[np.bool_], inflation_hu: float | None
) -> float:
    """Return the factor that takes a patient's healthy lung to `inflation_hu`.

    1 where that is None, or where there is no healthy lung to tell: nothing is scaled then.
    """
    density = None if inflation_hu is None else healthy_density(hu, lung_mask)
    return 1.0 if inflation_hu is None or density is None else inflation_hu / density


def inflate(hu: Any, lung_mask: Any, factor: float) -> Any:
    """Scale the lungs' HU below 0, in the dtype of `hu`, and not below `AIR_HU`.

    Parameters
    ----------
    hu : (z, y, x) int16 or float32 array
        Not below `AIR_HU`, as `lesionsynth.io` reads it. Not modified.
    lung_mask : (z, y, x) bool array
        Other tissue is left.
    factor : float
        From `inflation_factor`; 1 gives `hu` itself, of whatever library.
    """
    if factor == 1:
        return hu
    scaled = hu.astype(np.float32) * np.float32(factor)
    if np.issubdtype(hu.dtype, np.integer):
        scaled = np.rint(scaled)
    return np.where(lung_mask & (hu < 0), np.maximum(scaled, AIR_HU), hu).astype(hu.dtype)


def windowed_lungs(
    hu: npt.NDArray[Any], lung_mask: npt.NDArray[np.bool_], factor: float
) -> npt.NDArray[np.float32]:
    """Return what a network sees: the lungs, scaled as by `inflate` and windowed to [0, 1], 0 around them."""
    image: npt.NDArray[np.float32] = ls.window_hu(inflate(hu, lung_mask, factor))
    image *= lung_mask
    return image
