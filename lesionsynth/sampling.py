"""A blob: what is drawn of it (PAPER.md III-C.1 and 2), and how it is written down.

`BLOB` is the record of a blob that the plan, both backends and the kernels share; `Blob` is the same as an
object, for people. `draw_blobs` fills the records of a whole batch: it reads like the paper, a line a
parameter. Uniforms come in as words of Philox, so the draws are the same on every machine and NumPy version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth._cache import compiled
from lesionsynth.config import (
    LEAST_LENGTH,
    LEAST_MU0,
    MOST_AMPLITUDE,
    MOST_CORRELATION,
    MOST_LENGTH,
    PLACEMENTS,
    BlobClass,
    LesionConfig,
    Placement,
    Range,
)
from lesionsynth.strict import (
    check_choice,
    check_floats,
    check_integer,
    check_integers,
    check_number,
    put_checked,
)

Floats = npt.NDArray[np.float64]
Triple = tuple[float, float, float]

WORD = 2**32
"""Seeds, indices and components are 32-bit words of Philox's key and counter."""
MOST_VOXELS = 2**31 - 1
"""Largest volume: indices are 32-bit integers on a GPU."""
UNIFORMS_PER_BLOB = 24
"""Draws reserved for a blob: adding a parameter must not shift the others."""

BLOB = np.dtype(
    [
        ("component", np.uint32),
        ("placement", np.int32),  # place in `PLACEMENTS`
        ("center", np.int64, 3),  # -1: by position
        ("position", np.float64),
        ("semi_axes", np.float64, 3),
        ("rotation", np.float64, 4),
        ("warp_amplitude", np.float64),
        ("warp_correlation", np.float64),
        ("sigma_a", np.float64),
        ("a_low", np.float64),
        ("a_high", np.float64),
        ("sigma_b", np.float64),
        ("mu0", np.float64),
        ("weight", np.float64),
    ],
    align=True,
)
"""A `Blob` as the kernels see it; axis order (z, y, x)."""
NAMES = BLOB.names or ()


def extended(*fields: Any) -> np.dtype[Any]:
    """Return the type of a blob with more fields: what a stage works out besides.

    A parameter that is added to `BLOB` so reaches the kernels of every stage, by its name.
    """
    drawn = [(name, BLOB[name].base, BLOB[name].shape) for name in NAMES]
    return np.dtype([*drawn, *fields], align=True)


def extend(blobs: npt.NDArray[Any], kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """Copy blobs into records of an `extended` type, whose other fields are 0."""
    records = np.zeros(len(blobs), dtype=kind)
    for name in NAMES:
        records[name] = blobs[name]
    return records


_LENGTH = f"> 0, at least {LEAST_LENGTH:g} and at most {MOST_LENGTH:g}"
BELOW_1 = math.nextafter(1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Blob:
    """One ellipsoid with its warp, place and texture; lengths in the plan's unit, axis order (z, y, x)."""

    component: int
    """Philox component of the blob's noise, its number from 0."""
    semi_axes: Triple
    """Semi-axes before rotation."""
    rotation: tuple[float, float, float, float]
    """Unit quaternion (w, x, y, z), where x, y, z stand for the array axes 0, 1, 2."""
    position: float
    """u in [0, 1): the floor(u * |M|)-th voxel of the mask in C order is the centre, or leads to it."""
    placement: Placement = "uniform"
    """How that voxel leads to the centre; see `BlobClass.placement`."""
    center: tuple[int, int, int] | None = None
    """Centre voxel (z, y, x); when given, it replaces `position` and `placement`."""
    warp_amplitude: float
    """Bound of each displacement component, in units of the geometric-mean radius."""
    warp_correlation: float
    """Spacing of the displacement's control lattice, in the same unit."""
    sigma_a: float
    """Standard deviation of the Gaussian on the white noise (eq. 7)."""
    a_low: float
    """a_L of eq. 8."""
    a_high: float
    """a_U of eq. 8."""
    sigma_b: float
    """Standard deviation of the Gaussian on the salt noise (eq. 3-4)."""
    mu0: float
    """Mean intensity aimed at (eq. 6)."""
    weight: float = 1.0
    """Factor of what the lesion does to the image: α of mode "blend", the sign of mode "add"."""

    def __post_init__(self) -> None:
        """Check that an edited blob can be rendered."""
        put = partial(put_checked, self)
        # the three parts of the warp are components of their own
        rule = "in [0, 2**32 // 3), an integer"
        put("component", check_integer("component", self.component, 0, WORD // 3 - 1, rule))
        put("semi_axes", check_floats("semi_axes", self.semi_axes, 3, LEAST_LENGTH, MOST_LENGTH, _LENGTH))
        put("rotation", check_floats("rotation", self.rotation, 4, -2.0, 2.0))
        norm = math.sqrt(sum(v * v for v in self.rotation))
        if not abs(norm - 1.0) <= 1e-6:  # a hand-written quaternion carries about seven digits
            raise ValueError(f"rotation must be a unit quaternion, got norm {norm}")
        put("position", check_number("position", self.position, 0.0, BELOW_1, "in [0, 1)"))
        check_choice("placement", self.placement, PLACEMENTS)
        if self.center is not None:
            put("center", check_integers("center", self.center, 3, 0, MOST_VOXELS))
        put("warp_amplitude", check_number("warp_amplitude", self.warp_amplitude, 0.0, MOST_AMPLITUDE))
        put(
            "warp_correlation", check_number("warp_correlation", self.warp_correlation, 0.1, MOST_CORRELATION)
        )
        for name in ("sigma_a", "sigma_b"):
            put(name, check_number(name, getattr(self, name), LEAST_LENGTH, MOST_LENGTH, _LENGTH))
        for name in ("a_low", "a_high"):
            put(name, check_number(name, getattr(self, name), 0.0, 1.0))
        put("mu0", check_number("mu0", self.mu0, LEAST_MU0, 10.0, "> 0, at least 1e-06 and at most 10"))
        put("weight", check_number("weight", self.weight, -1.0, 1.0))
        if self.a_low > self.a_high:
            raise ValueError(
                f"a_low and a_high must satisfy 0 <= a_low <= a_high <= 1, got {self.a_low}, {self.a_high}"
            )


def records_of(blobs: Sequence[Blob]) -> npt.NDArray[Any]:
    """Write blobs as (n,) `BLOB` records."""
    records = np.zeros(len(blobs), dtype=BLOB)
    for name in NAMES:
        if blobs:
            records[name] = [_value(blob, name) for blob in blobs]
    return records


def _value(blob: Blob, name: str) -> Any:
    value = getattr(blob, name)
    if name == "placement":
        return PLACEMENTS.index(value)
    return (-1, -1, -1) if value is None else value


def blobs_of(records: npt.NDArray[Any]) -> tuple[Blob, ...]:
    """Read (n,) `BLOB` records as blobs."""
    columns = {name: records[name].tolist() for name in NAMES}
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return tuple(Blob(**{name: _plain(name, value) for name, value in row.items()}) for row in rows)


def _plain(name: str, value: Any) -> Any:
    if name == "placement":
        return PLACEMENTS[value]
    if name == "center" and value[0] < 0:
        return None
    return tuple(value) if isinstance(value, list) else value


# --- The laws ---


def draw_part(config: LesionConfig, u: Floats) -> LesionConfig:
    """Draw the kind of lesions of a sample with uniforms u; the configuration itself without a mixture."""
    if not config.mixture:
        return config
    return config.parts[int(_in_proportion([part.share for part in config.mixture], u[_PART]))]


def draw_numbers(config: LesionConfig, u: Floats, lung_fraction: float) -> list[int]:
    """Draw N of each class: N_s, N_m ~ round(U[5λ, 10λ]), N_l = 1 with probability 0.2λ in the paper.

    Parameters
    ----------
    config : LesionConfig
    u : (UNIFORMS_PER_BLOB,) float64 array
        Uniforms of the sample.
    lung_fraction : float
        λ; above 1 where a `load` asks for more than the paper's.

    Returns
    -------
    list of int
        One of each class in use; one in all where the configuration has a `count`.
    """
    if config.count is not None:
        return [_whole(config.count, u[_COUNT])]
    return [_number(kind, x, lung_fraction) for kind, x in zip(config.blob_classes, u.tolist(), strict=False)]


def least_fraction(config: LesionConfig, u: Floats) -> float:
    """Return the least λ with which a sample has an ellipsoid; 1 where it has none even then."""
    if config.count is not None:
        return 0.0
    least = 1.0
    for kind, x in zip(config.blob_classes, u.tolist(), strict=False):
        if kind.count is None:  # x < probability λ
            fraction = x / kind.probability if kind.probability else math.inf
        else:  # round(number λ) >= 1
            number = float(_lerp(kind.count, x))
            fraction = 0.5 / number if number else math.inf
        if not kind.scale_by_lung and fraction < 1.0:
            return 0.0
        if kind.scale_by_lung:
            least = min(least, fraction * (1.0 + 1e-12))  # rounding must not miss it
    return least


def draw_load(load: Range, u: Floats) -> float:
    """Draw the wanted share of the organ."""
    return float(_lerp(load, u[_LOAD]))


def draw_kinds(config: LesionConfig, numbers: Sequence[int], u: Floats) -> npt.NDArray[np.intp]:
    """Return the class of each blob: one after another or, of a `count`, in proportion to their means."""
    if config.count is None:
        return np.repeat(np.arange(len(numbers)), numbers)
    return _in_proportion([kind.mean_count for kind in config.blob_classes], u[:, 15])


def draw_blobs(config: LesionConfig, kinds: npt.NDArray[np.intp], u: Floats) -> npt.NDArray[Any]:
    """Draw blobs, perhaps those of several samples (PAPER.md III-C).

    Parameters
    ----------
    config : LesionConfig
    kinds : (n,) int array
        Class of each, a place in `config.blob_classes`.
    u : (n, UNIFORMS_PER_BLOB) float64 array
        Uniforms in [0, 1).

    Returns
    -------
    (n,) `BLOB` records
        Their components are left to the caller, who knows which sample they belong to.
    """
    classes, warp, t = config.blob_classes, config.warp, config.texture
    radii = np.array([kind.radii for kind in classes]).reshape(-1, 2).T[:, kinds]
    spherical = np.array([kind.spherical for kind in classes], dtype=bool)[kinds]
    b = np.empty(len(kinds), dtype=BLOB)
    flatness = np.array([kind.flatness for kind in classes]).reshape(-1, 2).T[:, kinds]
    # III-C.1: shape and place
    b["semi_axes"] = _lerp(radii[:, :, None], np.where(spherical[:, None], u[:, :1], u[:, :3]))
    b["semi_axes"][:, 0] *= _lerp(flatness, u[:, 17])
    _quaternions(np.ascontiguousarray(u[:, 3:6]), b["rotation"])
    b["position"] = u[:, 6]
    b["center"] = -1
    b["placement"] = np.array([PLACEMENTS.index(kind.placement) for kind in classes], dtype=np.int32)[kinds]
    b["warp_amplitude"] = _lerp(warp.amplitude, u[:, 7])
    b["warp_correlation"] = _lerp(warp.correlation, u[:, 8])
    # III-C.2: texture. (a_L, a_U) are independent uniforms given that a_U - a_L exceeds the gap. Redrawing
    # until the gap is met leaves the uniform law on a triangle; sorting two uniforms gives that at once.
    b["sigma_a"] = _lerp(t.sigma_a, u[:, 9])
    (low, high), gap = t.a_range, t.a_min_gap
    slack = high - low - gap
    b["a_low"] = low + slack * np.minimum(u[:, 10], u[:, 11])
    b["a_high"] = np.minimum(low + gap + slack * np.maximum(u[:, 10], u[:, 11]), high)
    common = u[:, 12] < t.p_sigma_b_low
    b["sigma_b"] = np.where(common, _lerp(t.sigma_b_low, u[:, 13]), _lerp(t.sigma_b_high, u[:, 13]))
    b["mu0"] = _lerp(config.mu0, u[:, 14])
    b["weight"] = _lerp(config.weight, u[:, 16])
    return b


_COUNT, _LOAD, _PART = 3, 4, 5
"""Uniforms of a sample behind those of its three classes."""


def _in_proportion(weights: Sequence[float], u: Any) -> Any:
    """Places in `weights`, each as likely as its weight."""
    shares = np.cumsum(weights)
    return np.searchsorted(shares / shares[-1], u, side="right").astype(np.intp)


def _lerp(bounds: Any, u: Any) -> Any:
    """U[low, high]; rounding must not leave the range."""
    low, high = bounds
    return np.minimum(low + (high - low) * u, high)


def _number(kind: BlobClass, u: float, lung_fraction: float) -> int:
    factor = lung_fraction if kind.scale_by_lung else 1.0
    if kind.probability is not None:
        return int(u < kind.probability * factor)
    assert kind.count is not None  # BlobClass holds exactly one of the two
    return _whole((kind.count[0] * factor, kind.count[1] * factor), u)


def _whole(bounds: Range, u: float) -> int:
    return math.floor(float(_lerp(bounds, u)) + 0.5)


@compiled
def _quaternions(u: Any, out: Any) -> None:
    """Uniform random rotations as unit quaternions (Shoemake, Graphics Gems III, 1992).

    Compiled for the mathematical library that is the same on every machine, which NumPy's vectors are not.
    """
    for k in range(u.shape[0]):
        a, b = math.sqrt(1.0 - u[k, 0]), math.sqrt(u[k, 0])
        s, t = 2.0 * math.pi * u[k, 1], 2.0 * math.pi * u[k, 2]
        out[k, 0], out[k, 1] = a * math.sin(s), a * math.cos(s)
        out[k, 2], out[k, 3] = b * math.sin(t), b * math.cos(t)
