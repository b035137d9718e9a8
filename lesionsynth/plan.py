"""What was drawn: every random parameter of one sample, as data that can be saved, edited and replayed.

A plan is a pure function of (config, seed, index, lung fraction). With the image and the mask it determines
the pair; the per-voxel noise it does not list is Philox of (seed, index, voxel).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from lesionsynth.config import CONNECTIVITIES, check_spacing

FORMAT = "lesionsynth.plan"
VERSION = 1
WORD = 2**32
"""Seeds and indices are 32-bit words of Philox's key and counter."""

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
        check_word("component", self.component)
        if self.component >= WORD // 3:  # the three parts of the warp are components of their own
            raise ValueError(f"component must be below 2**32 // 3, got {self.component}")
        _check_all("semi_axes", self.semi_axes, 3, lambda v: v > 0, "> 0")
        _check_all("rotation", self.rotation, 4, math.isfinite, "finite")
        norm = math.sqrt(sum(v * v for v in self.rotation))
        if abs(norm - 1.0) > 1e-6:  # a hand-written quaternion carries about seven digits
            raise ValueError(f"rotation must be a unit quaternion, got norm {norm:g}")
        _check_number("position", self.position, lambda v: 0 <= v < 1, "in [0, 1)")
        if self.center is not None:
            _check_all(
                "center", self.center, 3, lambda v: isinstance(v, int) and v >= 0, "a whole number >= 0"
            )
        _check_number("warp_amplitude", self.warp_amplitude, lambda v: v >= 0, ">= 0")
        _check_number("warp_correlation", self.warp_correlation, lambda v: v >= 0.1, ">= 0.1")
        for name in ("sigma_a", "sigma_b", "mu0"):
            _check_number(name, getattr(self, name), lambda v: v > 0, "> 0")
        for name in ("a_low", "a_high"):
            _check_number(name, getattr(self, name), lambda v: 0 <= v <= 1, "in [0, 1]")
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
        check_word("seed", self.seed)
        check_word("index", self.index)
        check_lung_fraction(self.lung_fraction)
        if self.shape is not None:
            _check_all("shape", self.shape, 3, lambda v: v >= 1, ">= 1")
        check_spacing(self.scale, "scale")
        if self.connectivity not in CONNECTIVITIES:
            raise ValueError(f"connectivity must be one of {CONNECTIVITIES}, got {self.connectivity}")
        for name in ("tau", "mean_threshold"):
            _check_number(name, getattr(self, name), lambda v: 0 < v < 1, "in (0, 1)")
        if not isinstance(self.blobs, tuple) or not all(isinstance(blob, Blob) for blob in self.blobs):
            raise TypeError(f"blobs must be a tuple of Blob, got {self.blobs!r}")

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
            record = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise ValueError(f"a plan must be JSON: {error}") from error
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise ValueError(f"a plan must be a JSON object with format {FORMAT!r}")
        version = record.pop("version", None)
        if version != VERSION:
            raise ValueError(f"plan version must be {VERSION}, got {version!r}")
        record = _fields_of(cls, record, "plan")
        try:
            record["blobs"] = tuple(
                Blob(**_fields_of(Blob, b, f"blobs[{i}]")) for i, b in _items(record, "blobs")
            )
            if record["components"] is not None:
                record["components"] = tuple(
                    Component(**_fields_of(Component, c, f"components[{i}]"))
                    for i, c in _items(record, "components")
                )
            return cls(**record)
        except TypeError as error:  # a field of the wrong type, which in a text is a wrong value
            raise ValueError(f"a plan's {error}") from error


def check_word(name: str, value: Any) -> None:
    """Raise unless `value` is an integer in [0, 2**32)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not 0 <= value < WORD:
        raise ValueError(f"{name} must be in [0, 2**32), got {value}")


def check_lung_fraction(value: Any) -> None:
    """Raise unless λ is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"lung_fraction must be a number, got {type(value).__name__}")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"lung_fraction must be in (0, 1], got {value}")


def _check_number(name: str, value: Any, rule: Any, text: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and rule(value)):
        raise ValueError(f"{name} must be {text}, got {value}")


def _check_all(name: str, values: Any, count: int, rule: Any, text: str) -> None:
    if not isinstance(values, tuple) or len(values) != count:
        raise ValueError(f"{name} must have {count} values, got {values!r}")
    for value in values:
        _check_number(name, value, rule, text)


def _items(record: dict[str, Any], name: str) -> list[tuple[int, Any]]:
    if not isinstance(record[name], list):
        raise ValueError(f"plan field {name} must be a list, got {type(record[name]).__name__}")
    return list(enumerate(record[name]))


def _fields_of(cls: type, record: Any, where: str) -> dict[str, Any]:
    """Keep exactly the fields of a dataclass; JSON lists become tuples."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(record).__name__}")
    names = {f.name for f in fields(cls)}
    if missing := sorted(names - record.keys()):
        raise ValueError(f"{where} lacks the field {missing[0]!r}")
    if unknown := sorted(record.keys() - names):
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}")
    nested = ("blobs", "components")  # lists of objects, read by the caller
    return {
        name: value if name in nested and cls is LesionPlan else _tuples(value)
        for name, value in record.items()
    }


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"a plan must hold finite numbers, got {name}")
