"""The arguments that every entry point shares: a healthy image and its lung mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth._dlpack import Restore, accept, library_of

_AXES = {3: "(z, y, x)", 4: "(b, z, y, x)"}


def accept_pair(
    image: Any, lung_mask: Any, ranks: tuple[int, ...], dtypes: tuple[type[np.generic], ...]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], Restore]:
    """Take an image and its mask as NumPy arrays, or say what is wrong with them.

    Parameters
    ----------
    image : array
        Values are not looked at.
    lung_mask : array of the same shape and library
        Bool, or numbers 0 and 1.
    ranks : tuple of int
        Ranks that are taken: 3, 4 or both.
    dtypes : tuple of dtype
        Dtypes of the image that are taken; int16 stands for Hounsfield units.

    Returns
    -------
    image : array
        A view.
    lung_mask : bool array
        A view where it is bool already.
    restore : callable
        Turns a NumPy array into one of the library of `image`.

    Raises
    ------
    TypeError
        An argument is no array, the two belong to different libraries, or a dtype is wrong.
    ValueError
        The rank is not among `ranks`, shapes differ, or `lung_mask` is not binary.
    """
    healthy, restore = accept(image, "image")
    mask, _ = accept(lung_mask, "lung_mask")
    if library_of(image) != library_of(lung_mask):
        raise TypeError(
            "image and lung_mask must be arrays of one library, "
            f"got {library_of(image)} and {library_of(lung_mask)}"
        )
    if healthy.ndim not in ranks:
        axes = " or ".join(_AXES[rank] for rank in ranks)
        raise ValueError(f"image must be {axes}, got shape {healthy.shape}")
    if healthy.shape != mask.shape:
        raise ValueError(f"lung_mask must have the shape of image, {healthy.shape}, got {mask.shape}")
    if healthy.size == 0:
        raise ValueError(f"image must have at least one voxel, got shape {healthy.shape}")
    if healthy.dtype not in dtypes:
        names = " or ".join(np.dtype(d).name for d in dtypes if d is not np.int16)
        if np.int16 in dtypes:
            names += ", or Hounsfield units in int16"
            hint = ""
        else:
            hint = "; for Hounsfield units use lesionsynth.window_hu first"
        raise TypeError(
            f"image must be in [0, 1] and {names}, got {healthy.dtype}"
            + (hint if healthy.dtype.kind in "iu" else "")
        )
    return healthy, _binary(mask), restore


def _binary(mask: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if mask.dtype == np.bool_:
        return mask
    if mask.dtype.kind not in "iuf":
        raise TypeError(f"lung_mask must be bool or numbers 0 and 1, got {mask.dtype}")
    if mask.dtype == np.uint8 and mask.max() <= 1:
        return mask.view(np.bool_)
    ones = mask == 1
    strange = ~(ones | (mask == 0))
    if strange.any():
        raise ValueError(
            f"lung_mask must be binary (bool, or 0 and 1), got the value {mask[strange].flat[0]}"
        )
    return np.asarray(ones)
