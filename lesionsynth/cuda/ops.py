"""`lesionsynth.ops` and `remove_erroneous_edges` for CUDA arrays; the caller has checked plain arguments.

Everything is done on the stream that the array's library works on, and answers in that library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cupy

from lesionsynth._arguments import check_buffer, check_pair, check_same_library
from lesionsynth.config import Range
from lesionsynth.cuda import filters, labels
from lesionsynth.cuda.arrays import DeviceArray, accept, empty, remedied, stream_of
from lesionsynth.cuda.backend import backend, byte_mask, check_cupy
from lesionsynth.cuda.device import Device
from lesionsynth.cuda.grid import Shape


def philox_uniform(device: str | int, shape: Shape, words: Sequence[int], offset: Sequence[int]) -> Any:
    """Draw noise on a device, into a CuPy array."""
    check_cupy(f"device {device!r} is a CUDA device")
    number = _number(device)
    with cupy.cuda.Device(number), remedied(number, shape):
        out = cupy.empty(shape, dtype=cupy.float32)
        filters.fill_uniform(_device(number), shape, words, offset, out.data.ptr)
    return out


def fill_uniform(out: Any, shape: Shape, words: Sequence[int], offset: Sequence[int]) -> None:
    """Draw noise into an array, on the stream of its library."""
    given = accept(out, "out")
    found = given.shape, given.kind, bool(given.view.flags.c_contiguous)
    check_buffer("out", *found, shape, "float32", "asked for")
    with stream_of(out):
        filters.fill_uniform(_device(given.device), shape, words, offset, given.view.data.ptr)


def window_hu(hu: Any, hu_range: Range) -> Any:
    """See `lesionsynth.window_hu`; any shape."""
    given = accept(hu, "hu")
    low, high = (cupy.float32(v) for v in hu_range)
    with stream_of(hu):
        out, view = empty(given, given.shape, "float32")
        scaled = view.view
        cupy.clip(given.view.astype(cupy.float32), low, high, out=scaled)
        scaled -= low
        scaled /= high - low  # in float32, as the kernels do for int16
    return out


def gaussian_filter(input: Any, sigmas: Sequence[float], truncate: float) -> Any:  # noqa: A002
    """See `lesionsynth.ops.gaussian_filter`."""

    def smooth(device: Device, volume: DeviceArray, shape: Shape, out: int) -> None:
        source = cupy.ascontiguousarray(volume.view, dtype=cupy.float32)
        filters.gaussian_filter(device, source.data.ptr, shape, sigmas, truncate, out)

    return _apply(input, "float32", smooth)


def uniform_filter(input: Any, sizes: Shape) -> Any:  # noqa: A002
    """See `lesionsynth.ops.uniform_filter`; NaN and infinity are not looked for."""

    def average(device: Device, volume: DeviceArray, shape: Shape, out: int) -> None:
        kind = "float32" if cupy.can_cast(volume.view.dtype, cupy.float32) else "float64"
        if volume.view.dtype == bool or volume.view.dtype == cupy.uint8:
            source, kind = cupy.ascontiguousarray(volume.view).view(cupy.uint8), "uint8"
        else:
            source = cupy.ascontiguousarray(volume.view, dtype=kind)
        filters.uniform_filter(device, source.data.ptr, kind, shape, sizes, out)

    return _apply(input, "float32", average)


def label(input: Any, connectivity: int) -> tuple[Any, int]:  # noqa: A002
    """See `lesionsynth.ops.label`."""
    counts: list[int] = []

    def number(device: Device, volume: DeviceArray, shape: Shape, out: int) -> None:
        counts.append(labels.label(device, _nonzero(volume).data.ptr, shape, connectivity, out))

    numbered = _apply(input, "int32", number)
    return numbered, counts[0]


def grow(input: Any, mask: Any, iterations: int, connectivity: int) -> Any:  # noqa: A002
    """See `lesionsynth.ops.grow`."""
    # the input's faults are told first, as on the CPU
    _, room = _volume("input", input), _volume("mask", mask)

    def spread(device: Device, volume: DeviceArray, shape: Shape, out: int) -> None:
        if room.shape != shape:
            raise ValueError(f"mask must have the shape of input, {shape}, got {room.shape}")
        _check_device("mask", room, "input", volume)
        region, inside = _nonzero(volume), _nonzero(room)
        labels.grow(device, region.data.ptr, inside.data.ptr, shape, iterations, connectivity, out)

    return _apply(input, "bool", spread)


def remove_erroneous_edges(
    image: Any,
    lung_mask: Any,
    threshold: float,
    contact_fraction: float,
    shell_width: int,
    connectivity: int,
) -> tuple[Any, Any]:
    """See `lesionsynth.remove_erroneous_edges`."""
    check_cupy("image and lung_mask are on a CUDA device")
    check_same_library(image, lung_mask)
    given, mask = accept(image, "image"), accept(lung_mask, "lung_mask")
    check_pair(given.shape, given.kind, mask.shape, ranks=(3,), dtypes=("float32", "float64"))
    _check_device("lung_mask", mask, "image", given)
    with stream_of(image):
        lungs = cupy.ascontiguousarray(byte_mask(mask).view).view(cupy.uint8)
        if bool((lungs > 1).any()):
            raise ValueError("lung_mask must be binary (bool, or 0 and 1), got another value")
        source = cupy.ascontiguousarray(given.view)
        out, view = empty(given, given.shape, given.kind)
        kept, kept_view = empty(given, given.shape, "bool")
        labels.remove_edges(
            _device(given.device), source.data.ptr, given.kind, lungs.data.ptr, _three(given), threshold,
            contact_fraction, shell_width, connectivity, view.view.data.ptr, kept_view.view.data.ptr,
        )  # fmt: skip
    return out, kept


def _apply(
    input: Any,  # noqa: A002
    kind: str,
    work: Callable[[Device, DeviceArray, Shape, int], None],
) -> Any:
    """Let `work` fill a new volume of a type."""
    volume = _volume("input", input)
    with stream_of(input):
        out, view = empty(volume, volume.shape, kind)
        work(_device(volume.device), volume, _three(volume), view.view.data.ptr)
    return out


def _volume(name: str, value: Any) -> DeviceArray:
    check_cupy(f"{name} is on a CUDA device")
    volume = accept(value, name)
    if len(volume.shape) != 3 or 0 in volume.shape:
        raise ValueError(f"{name} must be (z, y, x) with at least one voxel, got shape {volume.shape}")
    if volume.view.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be bool, integer or float, got {volume.kind}")
    return volume


def _three(volume: DeviceArray) -> Shape:
    z, y, x = volume.shape
    return z, y, x


def _nonzero(volume: DeviceArray) -> Any:
    """Bytes that are 0 where the volume is."""
    view = volume.view if volume.view.itemsize == 1 else volume.view != 0
    return cupy.ascontiguousarray(view).view(cupy.uint8)


def _check_device(name: str, array: DeviceArray, other_name: str, other: DeviceArray) -> None:
    if array.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, cuda:{other.device}, got cuda:{array.device}"
        )


def _device(number: int) -> Device:
    return backend().renderer(number).device


def _number(device: str | int) -> int:
    """Read "cuda", "cuda:1" or 1."""
    text = str(device).removeprefix("cuda").removeprefix(":")
    if isinstance(device, bool) or not ((text == "" and device == "cuda") or text.isdecimal()):
        raise ValueError(f"device must be 'cpu', 'cuda', 'cuda:N' or N, got {device!r}")
    number = int(text or 0)
    count = int(cupy.cuda.runtime.getDeviceCount())
    if number >= count:
        raise ValueError(f"device must be one of the {count} CUDA devices, got {device!r}")
    return number
