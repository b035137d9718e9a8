"""The arguments that every entry point shares: a healthy image and its lung mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth._dlpack import Restore, accept, library_of
from lesionsynth.plan import LesionPlan

MOST_HALF = 65504.0
"""Largest float16."""
_AXES = {3: "(z, y, x)", 4: "(b, z, y, x)"}


def accept_pair(
    image: Any, lung_mask: Any, ranks: tuple[int, ...], dtypes: tuple[str, ...]
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
    dtypes : tuple of str
        Names of the dtypes of the image that are taken; int16 stands for Hounsfield units.

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
    check_same_library(image, lung_mask)
    check_pair(healthy.shape, _kind_of(healthy), mask.shape, ranks, dtypes)
    return healthy, _binary(mask), restore


def accept_mask(lung_mask: Any, ranks: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Take a mask alone, as `accept_pair` does."""
    mask, _ = accept(lung_mask, "lung_mask")
    if len(mask.shape) not in ranks or 0 in mask.shape:
        axes = " or ".join(_AXES[rank] for rank in ranks)
        raise ValueError(f"lung_mask must be {axes} with at least one voxel, got shape {mask.shape}")
    return _binary(mask)


def check_same_library(image: Any, lung_mask: Any) -> None:
    """Raise `TypeError` unless both are arrays of one library."""
    if library_of(image) != library_of(lung_mask):
        raise TypeError(
            "image and lung_mask must be arrays of one library, "
            f"got {library_of(image)} and {library_of(lung_mask)}"
        )


def check_pair(
    shape: tuple[int, ...],
    dtype: str,
    mask_shape: tuple[int, ...],
    ranks: tuple[int, ...],
    dtypes: tuple[str, ...],
) -> None:
    """Check what every device checks; see `accept_pair`."""
    if len(shape) not in ranks:
        axes = " or ".join(_AXES[rank] for rank in ranks)
        raise ValueError(f"image must be {axes}, got shape {shape}")
    if shape != mask_shape:
        raise ValueError(f"lung_mask must have the shape of image, {shape}, got {mask_shape}")
    if 0 in shape:
        raise ValueError(f"image must have at least one voxel, got shape {shape}")
    if dtype not in dtypes:
        names = " or ".join(name for name in dtypes if name != "int16")
        if "int16" in dtypes:
            names += ", or Hounsfield units in int16"
            hint = ""
        else:
            hint = "; for Hounsfield units use lesionsynth.window_hu first"
        raise TypeError(
            f"image must be in [0, 1] and {names}, got {dtype}" + (hint if "int" in dtype else "")
        )


def check_values(dtype: str, plans: Sequence[LesionPlan]) -> None:
    """Raise `TypeError` where Hounsfield units meet a plan of other values."""
    if dtype == "int16" and any(plan.value_range != (0.0, 1.0) for plan in plans):
        raise TypeError("image must be float where a plan has a value_range, got int16")
    for low, high in (plan.value_range for plan in plans) if dtype == "float16" else ():
        if max(-low, high) > MOST_HALF:
            raise TypeError(
                f"image must be float32 or float64 for value_range {(low, high)}, got float16, which ends at "
                f"{MOST_HALF:g}"
            )


def accept_out(
    out: Any, image: npt.NDArray[Any], dtype: np.dtype[Any], mask: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Take the buffers of a pair in CPU memory, or say what is wrong with them; see `check_buffer`."""
    buffers = []
    for name, buffer, kind in zip(
        ("out image", "out target"), pair_of(out), (dtype, np.dtype(bool)), strict=True
    ):
        array = accept_buffer(buffer, name, image.shape, kind.name)
        if np.may_share_memory(array, image) or np.may_share_memory(array, mask):
            raise ValueError(f"{name} must not share memory with image or lung_mask, which are never written")
        buffers.append(array)
    if np.may_share_memory(buffers[0], buffers[1]):
        raise ValueError("out image must not share memory with out target")
    return buffers[0], buffers[1]


def accept_buffer(
    buffer: Any, name: str, shape: tuple[int, ...], kind: str, whose: str = "of image"
) -> npt.NDArray[Any]:
    """Take a buffer in CPU memory for a result, or say what is wrong with it; see `check_buffer`."""
    array, _ = accept(buffer, name)
    check_buffer(name, array.shape, _kind_of(array), array.flags.c_contiguous, shape, kind, whose)
    if not array.flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array")
    return array


def _kind_of(array: npt.NDArray[Any]) -> str:
    """Name of a dtype, with its byte order where that is the other one."""
    return array.dtype.name if array.dtype.isnative else str(array.dtype)


def pair_of(out: Any) -> tuple[Any, Any]:
    """Return the image and the target buffer of ``out=``: a `LesionPair`, or the two in a tuple."""
    if isinstance(out, tuple) and len(out) == 2:
        return out
    if hasattr(out, "image") and hasattr(out, "target"):
        return out.image, out.target
    raise TypeError(f"out must be a LesionPair or (image, target), got {type(out).__name__}")


def check_buffer(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    contiguous: bool,
    wanted: tuple[int, ...],
    kind: str,
    whose: str = "of image",
) -> None:
    """Raise unless a buffer can take a result; `whose` shape is wanted, for the message."""
    if shape != wanted:
        raise ValueError(f"{name} must have the shape {whose}, {wanted}, got {shape}")
    if dtype != kind:
        raise TypeError(f"{name} must be {kind}, got {dtype}")
    if not contiguous:
        raise ValueError(f"{name} must be C-contiguous, got an array with other strides")


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
