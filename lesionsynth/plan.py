"""What was drawn: every random parameter of one sample, as data that can be saved, edited and replayed.

A plan is a pure function of (config, seed, index, lung fraction). With the image and the mask it determines
the pair; the per-voxel noise it does not list is Philox of (seed, index, voxel).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lesionsynth._kept import kept
from lesionsynth.config import (
    CONNECTIVITIES,
    LEAST_HU,
    LEAST_LOAD,
    LEAST_THRESHOLD,
    MODES,
    MOST_BLOBS,
    MOST_HU,
    MOST_LENGTH,
    MOST_LOAD,
    SOFT_MODES,
    Mode,
    Range,
    checked_spacing,
)
from lesionsynth.sampling import (
    BELOW_1,
    MOST_VOXELS,
    WORD,
    Blob,
    Triple,
    blobs_of,
    records_of,
)
from lesionsynth.strict import (
    check_choice,
    check_integer,
    check_integers,
    check_number,
    parse_json,
    plain_number,
    put_checked,
    shown,
)

FORMAT = "lesionsynth.plan"
VERSION = 2
"""Version 1 had lesions of the paper's kind alone: the defaults of the fields that it lacks."""
MOST_BOXES = 2**29
"""Voxels of all blobs' boxes together, or `BOXES` volumes where that is more: a few seconds' work."""
BOXES = 16
MOST_NODES = 2**24
"""Nodes of all control lattices together, 0.4 GB; the paper's blobs need some thousands each."""
MOST_NODES_OF_A_LINE = 2**15
"""Nodes along an axis: what the counter of their noise holds."""
MOST_WEIGHTS = 2**28
"""Weights of all Gaussians together, 1 GB on a GPU; the paper's need a thousandth."""
MOST_EDGE = 64
"""Voxels of a soft edge along an axis, at most: each is looked for its way out."""
MOST_TAPS = 2**16
"""Taps of a Gaussian on one side: a standard deviation of 16,384 voxels."""


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
    changed: int | None = None
    """Voxels whose value the lesion changed; None in plans of version 1."""

    def __post_init__(self) -> None:
        """Check what a file may say."""
        put = partial(put_checked, self)
        put("label", check_integer("label", self.label, 1, MOST_BLOBS))
        put("blobs", check_integers("blobs", self.blobs, None, 0, MOST_BLOBS - 1))
        if not self.blobs or any(a >= b for a, b in pairwise(self.blobs)):
            raise ValueError(f"blobs must be at least one place, ascending, got {shown(self.blobs)}")
        if not isinstance(self.box, tuple) or len(self.box) != 3:
            raise ValueError(f"box must have 3 (start, stop) pairs, got {shown(self.box)}")
        put("box", tuple(check_integers("box", side, 2, 0, MOST_VOXELS) for side in self.box))
        if not all(start < stop for start, stop in self.box):
            raise ValueError(f"box must have start < stop along each axis, got {shown(self.box)}")
        put("voxels", check_integer("voxels", self.voxels, 1, MOST_VOXELS))
        put("beta", check_number("beta", self.beta, 0.0, 1e9))
        if not isinstance(self.beta_fallback, bool):
            raise TypeError(f"beta_fallback must be true or false, got {shown(self.beta_fallback)}")
        if self.changed is not None:
            put("changed", check_integer("changed", self.changed, 0, self.voxels, "at most voxels"))


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
    """λ in (0, 1]; without meaning where `load` is given."""
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
    mode: Mode = "max"
    """How lesions enter the image; see `LesionConfig.mode`."""
    edge: float = 0.0
    """Width of a soft edge, in the unit of the blobs."""
    value_range: Range = (0.0, 1.0)
    """Values of the image that stand for 0 and 1."""
    load: float | None = None
    """Share of the organ that was asked for."""
    blobs: tuple[Blob, ...]
    """Small, medium and large ellipsoids, in drawing order."""
    components: tuple[Component, ...] | None = None
    """The lesions of a rendering, None before. Rendering again replaces them."""

    def __post_init__(self) -> None:
        """Check that an edited plan can be rendered."""
        put = partial(put_checked, self)
        put("seed", check_word("seed", self.seed))
        put("index", check_word("index", self.index))
        put("lung_fraction", check_lung_fraction(self.lung_fraction))
        if self.shape is not None:
            put("shape", check_integers("shape", self.shape, 3, 1, MOST_VOXELS))
            if math.prod(self.shape) > MOST_VOXELS:
                raise ValueError(f"shape must have fewer than 2**31 voxels, got {self.shape}")
        put("scale", checked_spacing(self.scale, "scale"))
        if plain_number(self.connectivity) not in CONNECTIVITIES:
            raise ValueError(f"connectivity must be one of {CONNECTIVITIES}, got {shown(self.connectivity)}")
        put("connectivity", int(self.connectivity))
        put("tau", check_number("tau", self.tau, LEAST_THRESHOLD, BELOW_1, "in (0, 1)"))
        put(
            "mean_threshold",
            check_number(
                "mean_threshold", self.mean_threshold, LEAST_THRESHOLD, BELOW_1, "in (0, 1), at least 1e-06"
            ),
        )
        self._check_injection()
        if not isinstance(self.blobs, tuple) or not all(isinstance(blob, Blob) for blob in self.blobs):
            raise TypeError(f"blobs must be a tuple of Blob, got {shown(self.blobs)}")
        _check_count("blobs", self.blobs)
        if self.mode == "blend":
            for place, blob in enumerate(self.blobs):
                if blob.weight < 0.0:
                    raise ValueError(f"blobs[{place}].weight must be >= 0 in mode 'blend', got {blob.weight}")
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

    def _check_injection(self) -> None:
        put = partial(put_checked, self)
        check_choice("mode", self.mode, MODES)
        put("edge", check_number("edge", self.edge, 0.0, MOST_LENGTH))
        if self.edge and self.mode not in SOFT_MODES:
            raise ValueError(f"edge must be 0 in mode {self.mode!r}, got {self.edge}")
        check_edge(self.edge, self.scale)
        if not isinstance(self.value_range, tuple) or len(self.value_range) != 2:
            raise ValueError(f"value_range must be (low, high), got {shown(self.value_range)}")
        bounds = tuple(check_number("value_range", value, -MOST_HU, MOST_HU) for value in self.value_range)
        if bounds[1] - bounds[0] < LEAST_HU:
            raise ValueError(
                f"value_range must have low < high, at least {LEAST_HU:g} apart, got {self.value_range}"
            )
        put("value_range", bounds)
        if self.load is not None:
            put("load", check_number("load", self.load, LEAST_LOAD, MOST_LOAD))

    @classmethod
    def of_records(cls, records: npt.NDArray[Any], **fields: Any) -> LesionPlan:
        """Make a plan of `BLOB` records that were drawn, and so are in their domains.

        Drawing a batch and sending it up takes microseconds, making its objects a millisecond: they are made
        when somebody looks at `blobs`.
        """
        plan = object.__new__(cls)
        plan.__dict__.update(fields, records=records, components=None)
        return plan

    def with_records(self, records: npt.NDArray[Any]) -> LesionPlan:
        """Return the plan with other blobs, as `of_records` takes them."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("blobs", "components")}
        return LesionPlan.of_records(records, **own)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Make the blobs of a plan `of_records`."""
            if name != "blobs" or "records" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return self.__dict__.setdefault(name, blobs_of(self.records))

    @kept
    def records(self) -> npt.NDArray[Any]:
        """The blobs as (n,) records of named fields, `lesionsynth.sampling.BLOB`."""  # noqa: D401
        return records_of(self.blobs)

    @property
    def threshold(self) -> float:
        """τ as the image's values measure it."""
        low, high = self.value_range
        return self.tau if self.value_range == (0.0, 1.0) else low + self.tau * (high - low)

    def ends(self, rounded: Callable[[float], float]) -> Range:
        """Return the ends of `value_range` for images of a type, given how that rounds.

        An image may hold them as its own type does or, converted, as float32 does: the wider ones count.
        """
        low, high = self.value_range
        least, most = min(rounded(low), float(np.float32(low))), max(rounded(high), float(np.float32(high)))
        return least, most

    def rendered(self, components: tuple[Component, ...] | None) -> LesionPlan:
        """Return the plan with what it became; None says that there was no lung."""
        return self.without_lesions() if components is None else replace(self, components=components)

    def without_lesions(self) -> LesionPlan:
        """Return the plan of an item without lung: no blob, no lesion."""
        return replace(self, blobs=(), components=())

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
        if isinstance(version, bool) or version not in (1, VERSION):
            raise ValueError(f"plan version must be 1 or {VERSION}, got {shown(version)}")
        record = _fields_of(cls, record, "plan")
        record["blobs"] = _parts(Blob, record, "blobs")
        if record.get("components") is not None:
            record["components"] = _parts(Component, record, "components")
        try:
            plan = cls(**record)
        except TypeError as error:  # a field of the wrong type, which in a text is a wrong value
            raise ValueError(str(error)) from error
        if plan.shape is not None:
            plan.check_work(plan.shape)
        return plan

    def check_centers(self, shape: tuple[int, ...]) -> None:
        """Raise `ValueError` unless every centre that the plan gives lies in a volume (z, y, x)."""
        outside = (self.records["center"] >= shape).any(axis=1)
        if outside.any():
            number = int(outside.argmax())
            center = tuple(self.records["center"][number].tolist())
            raise ValueError(f"blobs[{number}].center must lie in the volume {tuple(shape)}, got {center}")

    def check_work(self, shape: tuple[int, int, int]) -> None:
        """Check that the plan can be rendered in a volume (z, y, x) within seconds and gigabytes.

        Raises
        ------
        ValueError
            Boxes, lattices or Gaussians of the blobs are too large together.
        """
        check_work(self.records, self.scale, shape)


def check_work(blobs: npt.NDArray[Any], scale: Triple, shape: tuple[int, int, int]) -> None:
    """Check that `BLOB` records can be rendered within seconds and gigabytes; see `LesionPlan.check_work`."""
    if not len(blobs):
        return
    axes, amplitude, correlation = (blobs[n] for n in ("semi_axes", "warp_amplitude", "warp_correlation"))
    sigmas = np.stack([blobs["sigma_a"], blobs["sigma_b"]], axis=1)
    radius = np.cbrt(axes.prod(axis=1))
    extents = 2.0 * (axes.max(axis=1) + radius * amplitude)
    if reason := too_much(extents, radius * correlation, sigmas, scale, shape):
        raise ValueError(
            f"{reason}; the largest of {len(blobs)} has semi_axes {axes.max():g}, warp_amplitude "
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


def check_edge(edge: float, scale: Triple) -> None:
    """Raise `ValueError` where a soft edge is too many voxels wide."""
    if edge > MOST_EDGE * min(scale):
        raise ValueError(
            f"edge must be at most {MOST_EDGE} voxels along each axis, got {edge} with steps {scale}"
        )


def check_word(name: str, value: Any) -> int:
    """Return `value`, an integer in [0, 2**32), as Python's, or raise."""
    return check_integer(name, value, 0, WORD - 1, "in [0, 2**32)")


def check_lung_fraction(value: Any) -> int | float:
    """Return λ, a number in (0, 1], as Python's, or raise."""
    return check_number("lung_fraction", value, math.ulp(0.0), 1.0, "in (0, 1]")


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
    """Keep the fields of a dataclass, of which those with a default may be missing; lists become tuples."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(record).__name__}")
    needed = {f.name: f.default is MISSING for f in fields(cls)}
    if missing := sorted(name for name in needed if needed[name] and name not in record):
        raise ValueError(f"{where} lacks the field {missing[0]!r}")
    if unknown := sorted(record.keys() - needed.keys()):
        raise ValueError(f"{where} has an unknown field {shown(unknown[0])}")
    nested = ("blobs", "components")  # lists of objects, read by the caller
    return {
        name: value if name in nested and cls is LesionPlan else _tuples(value)
        for name, value in record.items()
    }


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
