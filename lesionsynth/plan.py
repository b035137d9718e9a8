"""What was drawn: every random parameter of one sample, as data that can be saved, edited and replayed.

A plan is a pure function of (config, seed, index, lung fraction). With the image and the mask it determines
the pair; the per-voxel noise it does not list is Philox of (seed, index, voxel).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.config import (
    CONNECTIVITIES,
    LEAST_LENGTH,
    LEAST_THRESHOLD,
    MOST_AMPLITUDE,
    MOST_BLOBS,
    MOST_CORRELATION,
    MOST_LENGTH,
    checked_spacing,
)
from lesionsynth.strict import check_integer, check_number, parse_json, plain_number, shown

FORMAT = "lesionsynth.plan"
VERSION = 1
WORD = 2**32
"""Seeds and indices are 32-bit words of Philox's key and counter."""

MOST_VOXELS = 2**31 - 1
"""Largest volume: indices are 32-bit integers on a GPU."""
MOST_BOXES = 2**29
"""Voxels of all blobs' boxes together, or `BOXES` volumes where that is more: a few seconds' work."""
BOXES = 16
MOST_NODES = 2**24
"""Nodes of all control lattices together, 0.4 GB; the paper's blobs need some thousands each."""
MOST_NODES_OF_A_LINE = 2**15
"""Nodes along an axis: what the counter of their noise holds."""
MOST_WEIGHTS = 2**28
"""Weights of all Gaussians together, 1 GB on a GPU; the paper's need a thousandth."""

_LENGTH = f"> 0, at least {LEAST_LENGTH:g} and at most {MOST_LENGTH:g}"
_BELOW_1 = math.nextafter(1.0, 0.0)

MOST_TAPS = 2**16
"""Taps of a Gaussian on one side: a standard deviation of 16,384 voxels."""

Triple = tuple[float, float, float]


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
    """u in [0, 1): the centre is the floor(u * |M|)-th voxel of the mask in C order."""
    center: tuple[int, int, int] | None = None
    """Centre voxel (z, y, x); when given, it replaces `position`."""
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

    def __post_init__(self) -> None:
        """Check that an edited blob can be rendered."""
        put = partial(_put, self)
        # the three parts of the warp are components of their own
        rule = "in [0, 2**32 // 3), an integer"
        put("component", check_integer("component", self.component, 0, WORD // 3 - 1, rule))
        put("semi_axes", _tuple("semi_axes", self.semi_axes, 3, LEAST_LENGTH, MOST_LENGTH, _LENGTH))
        put("rotation", _tuple("rotation", self.rotation, 4, -2.0, 2.0))
        norm = math.sqrt(sum(v * v for v in self.rotation))
        if not abs(norm - 1.0) <= 1e-6:  # a hand-written quaternion carries about seven digits
            raise ValueError(f"rotation must be a unit quaternion, got norm {norm}")
        put("position", check_number("position", self.position, 0.0, _BELOW_1, "in [0, 1)"))
        if self.center is not None:
            put("center", _integers("center", self.center, 3, 0, MOST_VOXELS))
        put("warp_amplitude", check_number("warp_amplitude", self.warp_amplitude, 0.0, MOST_AMPLITUDE))
        put(
            "warp_correlation", check_number("warp_correlation", self.warp_correlation, 0.1, MOST_CORRELATION)
        )
        for name in ("sigma_a", "sigma_b"):
            put(name, check_number(name, getattr(self, name), LEAST_LENGTH, MOST_LENGTH, _LENGTH))
        for name in ("a_low", "a_high"):
            put(name, check_number(name, getattr(self, name), 0.0, 1.0))
        put("mu0", check_number("mu0", self.mu0, 1e-6, 10.0, "> 0, at least 1e-06 and at most 10"))
        if self.a_low > self.a_high:
            raise ValueError(
                f"a_low and a_high must satisfy 0 <= a_low <= a_high <= 1, got {self.a_low}, {self.a_high}"
            )


@dataclass(frozen=True, kw_only=True)
class Component:
    """What became of the blobs in a rendering: one merged lesion G_j."""

    label: int
    """Value in `labels`."""
    blobs: tuple[int, ...]
    """Places in `LesionPlan.blobs` of the ellipsoids that merged, ascending; the first gives the texture."""
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    """Tight bounding box: (start, stop) along z, y, x."""
    voxels: int
    """Size."""
    beta: float
    """β of eq. 6."""
    beta_fallback: bool
    """No voxel passed `mean_threshold`, so β = μ0 / mean_threshold, the continuous limit."""

    def __post_init__(self) -> None:
        """Check what a file may say."""
        put = partial(_put, self)
        put("label", check_integer("label", self.label, 1, MOST_BLOBS))
        put("blobs", _integers("blobs", self.blobs, None, 0, MOST_BLOBS - 1))
        if not self.blobs or any(a >= b for a, b in pairwise(self.blobs)):
            raise ValueError(f"blobs must be at least one place, ascending, got {shown(self.blobs)}")
        if not isinstance(self.box, tuple) or len(self.box) != 3:
            raise ValueError(f"box must have 3 (start, stop) pairs, got {shown(self.box)}")
        put("box", tuple(_integers("box", side, 2, 0, MOST_VOXELS) for side in self.box))
        if not all(start < stop for start, stop in self.box):
            raise ValueError(f"box must have start < stop along each axis, got {shown(self.box)}")
        put("voxels", check_integer("voxels", self.voxels, 1, MOST_VOXELS))
        put("beta", check_number("beta", self.beta, 0.0, 1e9))
        if not isinstance(self.beta_fallback, bool):
            raise TypeError(f"beta_fallback must be true or false, got {shown(self.beta_fallback)}")


@dataclass(frozen=True, kw_only=True)
class LesionPlan:
    """Everything drawn for one sample.

    Raises
    ------
    ValueError
        A field leaves its domain; the message names it.
    """

    seed: int
    """Philox key, 0 <= seed < 2**32."""
    index: int
    """Sample index, 0 <= index < 2**32."""
    lung_fraction: float
    """λ in (0, 1]."""
    shape: tuple[int, int, int] | None
    """Volume (z, y, x) the plan was drawn for; None fits any."""
    scale: Triple
    """Length of one voxel step (z, y, x) in the unit of the blobs: 1 for lengths in voxels, the spacing for
    mm."""
    connectivity: int
    """Neighbourhood in which blobs merge."""
    tau: float
    """Threshold of the target (eq. 1)."""
    mean_threshold: float
    """t of mean_t (eq. 6)."""
    blobs: tuple[Blob, ...]
    """Small, medium and large ellipsoids, in drawing order."""
    components: tuple[Component, ...] | None = None
    """The lesions of a rendering, None before. Rendering again replaces them."""

    def __post_init__(self) -> None:
        """Check that an edited plan can be rendered."""
        put = partial(_put, self)
        put("seed", check_word("seed", self.seed))
        put("index", check_word("index", self.index))
        put("lung_fraction", check_lung_fraction(self.lung_fraction))
        if self.shape is not None:
            put("shape", _integers("shape", self.shape, 3, 1, MOST_VOXELS))
            if math.prod(self.shape) > MOST_VOXELS:
                raise ValueError(f"shape must have fewer than 2**31 voxels, got {self.shape}")
        put("scale", checked_spacing(self.scale, "scale"))
        if plain_number(self.connectivity) not in CONNECTIVITIES:
            raise ValueError(f"connectivity must be one of {CONNECTIVITIES}, got {shown(self.connectivity)}")
        put("connectivity", int(self.connectivity))
        put("tau", check_number("tau", self.tau, LEAST_THRESHOLD, _BELOW_1, "in (0, 1)"))
        put(
            "mean_threshold",
            check_number(
                "mean_threshold", self.mean_threshold, LEAST_THRESHOLD, _BELOW_1, "in (0, 1), at least 1e-06"
            ),
        )
        if not isinstance(self.blobs, tuple) or not all(isinstance(blob, Blob) for blob in self.blobs):
            raise TypeError(f"blobs must be a tuple of Blob, got {shown(self.blobs)}")
        _check_count("blobs", self.blobs)
        if self.components is None:
            return
        if not isinstance(self.components, tuple) or not all(
            isinstance(c, Component) for c in self.components
        ):
            raise TypeError(f"components must be None or a tuple of Component, got {shown(self.components)}")
        for place, component in enumerate(self.components):
            if component.blobs[-1] >= len(self.blobs):
                raise ValueError(
                    f"components[{place}].blobs must be places in blobs, which has {len(self.blobs)}, "
                    f"got {shown(component.blobs)}"
                )

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the plan as JSON; `from_json` gives back an equal plan."""
        record = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(record, indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> LesionPlan:
        """Read a plan written by `to_json`.

        Raises
        ------
        ValueError
            `text` is not JSON, not a plan, of another version, or a field is missing, unknown or out of its
            domain.
        """
        try:
            record = parse_json(text)
        except ValueError as error:
            raise ValueError(f"a plan must be JSON: {str(error).removeprefix('not JSON: ')}") from error
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise ValueError(f"a plan must be a JSON object with format {FORMAT!r}")
        version = record.pop("version", None)
        if isinstance(version, bool) or version != VERSION:
            raise ValueError(f"plan version must be {VERSION}, got {shown(version)}")
        record = _fields_of(cls, record, "plan")
        record["blobs"] = _parts(Blob, record, "blobs")
        if record["components"] is not None:
            record["components"] = _parts(Component, record, "components")
        try:
            plan = cls(**record)
        except TypeError as error:  # a field of the wrong type, which in a text is a wrong value
            raise ValueError(str(error)) from error
        if plan.shape is not None:
            plan.check_work(plan.shape)
        return plan

    def check_work(self, shape: tuple[int, int, int]) -> None:
        """Check that the plan can be rendered in a volume (z, y, x) within seconds and gigabytes.

        Raises
        ------
        ValueError
            Boxes, lattices or Gaussians of the blobs are too large together.
        """
        rows = [
            (*b.semi_axes, b.warp_amplitude, b.warp_correlation, b.sigma_a, b.sigma_b) for b in self.blobs
        ]
        check_work(np.array(rows).reshape(-1, 7), self.scale, shape)


def check_work(rows: npt.NDArray[np.float64], scale: Triple, shape: tuple[int, int, int]) -> None:
    """Check that blobs can be rendered within seconds and gigabytes; see `LesionPlan.check_work`.

    Parameters
    ----------
    rows : (n, 7) float64 array
        Semi-axes, amplitude, correlation, sigma_a and sigma_b of each.
    scale, shape
        See `too_much`.
    """
    if not len(rows):
        return
    axes, amplitude, correlation, sigmas = rows[:, :3], rows[:, 3], rows[:, 4], rows[:, 5:]
    radius = np.cbrt(axes.prod(axis=1))
    extents = 2.0 * (axes.max(axis=1) + radius * amplitude)
    if reason := too_much(extents, radius * correlation, sigmas, scale, shape):
        raise ValueError(
            f"{reason}; the largest of {len(rows)} has semi_axes {axes.max():g}, warp_amplitude "
            f"{amplitude.max():g}, sigma {sigmas.max():g}; the least warp_correlation is "
            f"{correlation.min():g}"
        )


def too_much(
    extents: npt.NDArray[np.float64],
    steps: npt.NDArray[np.float64],
    sigmas: npt.NDArray[np.float64],
    scale: Triple,
    shape: tuple[int, int, int],
) -> str | None:
    """Tell what is too much of blobs that are each within bounds; every size is an upper bound.

    Parameters
    ----------
    extents, steps, sigmas : (n,), (n,) and (n, 2) arrays
        Largest diameters of the warped blobs, steps of their control lattices, Gaussians.
    scale : (3,) floats
        As in `LesionPlan`.
    shape : (3,) ints
        Volume (z, y, x).

    Returns
    -------
    str or None
        Fields, rule and size; None where all is well.
    """
    voxel, size = np.array(scale), np.array(shape, dtype=np.float64)
    boxes = float(np.minimum(extents[:, None] / voxel + 1.0, size).prod(axis=1).sum())
    most = max(MOST_BOXES, BOXES * math.prod(shape))
    if boxes > most:
        return (
            f"blobs must have boxes of at most {most} voxels together (semi_axes, warp_amplitude), "
            f"got {boxes:.3g}"
        )
    nodes = np.minimum(extents[:, None], size * voxel) / steps[:, None] + 5.0
    line, lattices = float(nodes.max()), float(nodes.prod(axis=1).sum())
    if line > MOST_NODES_OF_A_LINE or lattices > MOST_NODES:
        return (
            f"blobs must have lattices of at most {MOST_NODES} nodes together and {MOST_NODES_OF_A_LINE} "
            f"along an axis (warp_correlation, warp_amplitude, semi_axes), got {lattices:.3g} and {line:.3g}"
        )
    taps = 4.0 * sigmas[:, :, None] / voxel + 1.0
    weights = float((np.minimum(taps, size / 2.0 + 1.0) ** 2).sum() + taps.sum())
    if weights > MOST_WEIGHTS or taps.max() > MOST_TAPS:
        return (
            f"blobs must have sigma_a and sigma_b of at most {MOST_TAPS // 4} voxels, and {MOST_WEIGHTS} "
            f"weights of Gaussians together, got {taps.max() / 4.0:.3g} and {weights:.3g}"
        )
    return None


def check_word(name: str, value: Any) -> int:
    """Return `value`, an integer in [0, 2**32), as Python's, or raise."""
    return check_integer(name, value, 0, WORD - 1, "in [0, 2**32)")


def check_lung_fraction(value: Any) -> int | float:
    """Return λ, a number in (0, 1], as Python's, or raise."""
    return check_number("lung_fraction", value, math.ulp(0.0), 1.0, "in (0, 1]")


def _put(instance: Any, name: str, value: Any) -> None:
    """Store a checked value where it is another object than was given: NumPy's number, or a list."""
    if getattr(instance, name) is not value:
        object.__setattr__(instance, name, value)


def _tuple(name: str, values: Any, count: int, least: float, most: float, rule: str = "") -> Any:
    if not isinstance(values, tuple) or len(values) != count:
        raise ValueError(f"{name} must have {count} values, got {shown(values)}")
    for value in values:
        if type(value) is not float or not least <= value <= most:
            return tuple(check_number(name, value, least, most, rule) for value in values)
    return values


def _integers(name: str, values: Any, count: int | None, least: int, most: int) -> Any:
    if not isinstance(values, tuple) or (count is not None and len(values) != count):
        raise ValueError(f"{name} must have {count or 'some'} values, got {shown(values)}")
    for value in values:
        if type(value) is not int or not least <= value <= most:
            return tuple(check_integer(name, value, least, most) for value in values)
    return values


def _check_count(name: str, parts: Any) -> None:
    if len(parts) > MOST_BLOBS:
        raise ValueError(f"{name} must be at most {MOST_BLOBS}, got {len(parts)}")


def _parts(cls: type, record: dict[str, Any], name: str) -> tuple[Any, ...]:
    """Read a list of objects; an error says in which it is."""
    if not isinstance(record[name], list):
        raise ValueError(f"plan field {name} must be a list, got {type(record[name]).__name__}")
    _check_count(name, record[name])
    parts = []
    for place, part in enumerate(record[name]):
        values = _fields_of(cls, part, f"{name}[{place}]")
        try:
            parts.append(cls(**values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}[{place}].{error}") from error
    return tuple(parts)


def _fields_of(cls: type, record: Any, where: str) -> dict[str, Any]:
    """Keep exactly the fields of a dataclass; JSON lists become tuples."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(record).__name__}")
    names = {f.name for f in fields(cls)}
    if missing := sorted(names - record.keys()):
        raise ValueError(f"{where} lacks the field {missing[0]!r}")
    if unknown := sorted(record.keys() - names):
        raise ValueError(f"{where} has an unknown field {shown(unknown[0])}")
    nested = ("blobs", "components")  # lists of objects, read by the caller
    return {
        name: value if name in nested and cls is LesionPlan else _tuples(value)
        for name, value in record.items()
    }


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
