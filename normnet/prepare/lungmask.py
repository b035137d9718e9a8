"""Lungs from the network of the package ``lungmask``, where it is installed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.commands import optional
from normnet.prepare.lungs import Lungs
from normnet.prepare.morphology import Spacing

RIGHT, LEFT = 1, 2
"""Labels of the network R231."""


def split_by_lungmask(hu: npt.NDArray[np.int16], spacing: Spacing) -> Lungs:
    """Segment the lungs with ``lungmask.LMInferer`` and tell right from left.

    Parameters
    ----------
    hu : (Z, Y, X) int16 array
        Hounsfield units in LPS index order.
    spacing : (3,) floats
        Voxel size in mm, axis order z, y, x.

    Returns
    -------
    Lungs

    Raises
    ------
    ImportError
        ``lungmask`` is not installed.
    ValueError
        It finds no lung.

    References
    ----------
    .. [1] J. Hofmanninger et al., "Automatic lung segmentation in routine imaging is primarily a data
       diversity problem, not a methodology problem", European Radiology Experimental, 2020.
    """
    import SimpleITK as sitk

    # LPS index order is ITK's identity direction: the network sees patients upright
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing[::-1])
    labels = np.asarray(_inferer(check_installed()).apply(image))
    if labels.shape != hu.shape:
        raise ValueError(f"lungmask must label every voxel of {hu.shape}, got {labels.shape}")
    lungs = Lungs(labels == RIGHT, labels == LEFT)
    if not lungs.right.any() and not lungs.left.any():
        raise ValueError("no lung found by lungmask")
    return lungs


def check_installed() -> Any:
    """Give the package's class of networks.

    Raises
    ------
    ImportError
        It is not installed; says how to install it.
    """
    advice = "lungs='lungmask' needs the package lungmask: pip install lungmask; or use lungs='network'"
    return optional("lungmask", advice).LMInferer


@functools.cache
def _inferer(inferer: Any) -> Any:
    """Load the network once per process."""
    return inferer()
