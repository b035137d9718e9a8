"""What to synthesise: the paper's distributions (PAPER.md III-C) as frozen dataclasses.

Nothing is drawn here. `lesionsynth.plan` draws from these ranges and `lesionsynth.synthesizer` renders what
was drawn. Every ``(low, high)`` pair is the closed range of a uniform distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lesionsynth.strict import hints_of, plain_number, settle, shown

Range = tuple[float, float]
"""Bounds of a uniform distribution."""

CONNECTIVITIES = (6, 18, 26)
"""Voxel neighbourhoods: faces, faces and edges, faces and edges and corners."""

MOST_BLOBS = 1024
"""Ellipsoids of a sample; the paper has 21 at most."""
LEAST_LENGTH, MOST_LENGTH = 1e-9, 1e4
"""Bounds of every radius and sigma, in voxels or mm."""
LEAST_SPACING, MOST_SPACING = 1e-3, 1e3
"""Bounds of a voxel's size in mm."""
MOST_AMPLITUDE, MOST_CORRELATION = 1e4, 1e4
"""Largest warp, in units of a blob's radius."""
LEAST_THRESHOLD = 1e-6
"""Least τ and mean_threshold: intensities are divided by them, in float32."""
MOST_HU = 1e5
"""Largest bound of a window, to either side."""
LEAST_HU = 1e-2
"""Least width of a window; intensities are divided by it, in float32, which tells its ends apart."""


@dataclass(frozen=True, kw_only=True)
class BlobClass:
    """Ellipsoids of one size class (PAPER.md III-C.1).

    Exactly one of `count` and `probability` is given.
    """

    radius: Range
    """Semi-axes; each of the three is drawn on its own (all three together when `spherical`)."""
    count: Range | None = None
    """N = round(U[low * λ, high * λ]) ellipsoids."""
    probability: float | None = None
    """One ellipsoid with this probability, times λ."""
    scale_by_lung: bool = True
    """Multiply `count` or `probability` by λ, the slab's share of the largest lung."""
    spherical: bool = False
    """Draw one radius for all three semi-axes."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _settle(self)
        _check_range("radius", self.radius, above=0.0, least=LEAST_LENGTH, most=MOST_LENGTH)
        if (self.count is None) == (self.probability is None):
            raise ValueError(
                f"exactly one of count and probability must be given, got count={self.count}, "
                f"probability={self.probability}"
            )
        if self.count is not None:
            _check_range("count", self.count, least=0.0, most=MOST_BLOBS)
        if self.probability is not None and not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")


@dataclass(frozen=True, kw_only=True)
class Warp:
    """Smooth random displacement of a blob, in units of its radius (geometric mean of the semi-axes).

    The paper says "elastic transformation with random parameters" and gives none: these are ours
    (docs/generator.md).
    """

    amplitude: Range = (0.2, 1.0)
    """Bound of each displacement component. Its standard deviation is about a fifth of this."""
    correlation: Range = (0.5, 1.2)
    """Spacing of the B-spline control lattice: the length over which the displacement changes."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _settle(self)
        _check_range("warp.amplitude", self.amplitude, least=0.0, most=MOST_AMPLITUDE)
        # Below a tenth of the radius the lattice is finer than a voxel for the paper's blobs, and grows as
        # its cube.
        _check_range("warp.correlation", self.correlation, least=0.1, most=MOST_CORRELATION)


@dataclass(frozen=True, kw_only=True)
class Texture:
    """Salt noise, filtered and scaled (PAPER.md III-C.2, eq. 2-8)."""

    sigma_a: Range = (2.0, 20.0)
    """Standard deviation of the Gaussian that makes a2 from white noise (eq. 7)."""
    a_range: Range = (0.0, 0.3)
    """Range of a_L and a_U, the bounds of the salt probability a(x) (eq. 8)."""
    a_min_gap: float = 0.15
    """Least a_U - a_L."""
    sigma_b_low: Range = (0.8, 2.0)
    """Standard deviation of the Gaussian on the salt noise, the common case (eq. 4)."""
    sigma_b_high: Range = (2.0, 5.0)
    """The same, the rare case."""
    p_sigma_b_low: float = 0.7
    """Probability of the common case."""
    mu0: Range = (0.4, 0.8)
    """Mean intensity that the voxels above `mean_threshold` are scaled to (eq. 6)."""
    mean_threshold: float = 0.2
    """Threshold t of mean_t in eq. 6."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _settle(self)
        for name in ("sigma_a", "sigma_b_low", "sigma_b_high"):
            value = getattr(self, name)
            _check_range(f"texture.{name}", value, above=0.0, least=LEAST_LENGTH, most=MOST_LENGTH)
        _check_range("texture.mu0", self.mu0, above=0.0, least=1e-6, most=1.0)
        _check_range("texture.a_range", self.a_range, least=0.0, most=1.0)
        low, high = self.a_range
        if not 0.0 <= self.a_min_gap <= high - low:
            raise ValueError(
                f"texture.a_min_gap must be in [0, {high - low}], the width of a_range, got {self.a_min_gap}"
            )
        if not 0.0 <= self.p_sigma_b_low <= 1.0:
            raise ValueError(f"texture.p_sigma_b_low must be in [0, 1], got {self.p_sigma_b_low}")
        if not LEAST_THRESHOLD <= self.mean_threshold < 1.0:
            raise ValueError(
                f"texture.mean_threshold must be in [{LEAST_THRESHOLD:g}, 1), got {self.mean_threshold}"
            )


@dataclass(frozen=True, kw_only=True)
class LesionConfig:
    """Distribution of synthetic lesions; the defaults are the paper's.

    Raises
    ------
    ValueError
        A range is reversed or leaves its domain; the message names the field, the rule and the value.
    """

    small: BlobClass | None = field(default_factory=lambda: BlobClass(count=(5.0, 10.0), radius=(3.0, 10.0)))
    """Small ellipsoids, N_s ~ U[5λ, 10λ]."""
    medium: BlobClass | None = field(
        default_factory=lambda: BlobClass(count=(5.0, 10.0), radius=(10.0, 32.0))
    )
    """Medium ellipsoids, N_m ~ U[5λ, 10λ]."""
    large: BlobClass | None = field(default_factory=lambda: BlobClass(probability=0.2, radius=(32.0, 64.0)))
    """One large ellipsoid with probability 0.2λ."""
    warp: Warp = field(default_factory=Warp)
    """Elastic deformation."""
    texture: Texture = field(default_factory=Texture)
    """Salt noise and its filters."""
    connectivity: int = 26
    """Blobs that touch in this neighbourhood become one (6, 18 or 26)."""
    hu_range: Range = (-800.0, 100.0)
    """Window that maps HU to [0, 1] (PAPER.md III-A)."""
    hu_threshold: float = -500.0
    """T: voxels at or above it are the tissue to recover (eq. 1)."""
    lengths: Literal["voxel", "mm"] = "voxel"
    """Unit of every radius and sigma. With "mm", `spacing` converts, so thick slices keep lesions round."""
    spacing: tuple[float, float, float] = (1.0, 0.8, 0.8)
    """Voxel size (z, y, x) in mm; the paper's. Used only where `lengths` is "mm"; calls can override it."""

    def __post_init__(self) -> None:
        """Check what the parts cannot."""
        for name in ("small", "medium", "large"):
            if not isinstance(getattr(self, name), BlobClass | None):
                raise TypeError(f"{name} must be a BlobClass or None, got {shown(getattr(self, name))}")
        for name, kind in (("warp", Warp), ("texture", Texture)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {shown(getattr(self, name))}")
        object.__setattr__(self, "spacing", checked_spacing(self.spacing))
        _settle(self)
        most = sum(1.0 if c.count is None else c.count[1] for c in self.blob_classes)
        if most > MOST_BLOBS:
            raise ValueError(f"count must be at most {MOST_BLOBS} over all classes, got {most}")
        if self.connectivity not in CONNECTIVITIES:
            raise ValueError(f"connectivity must be one of {CONNECTIVITIES}, got {self.connectivity}")
        _check_range("hu_range", self.hu_range, least=-MOST_HU, most=MOST_HU)
        low, high = self.hu_range
        if high - low < LEAST_HU:
            raise ValueError(f"hu_range must be at least {LEAST_HU:g} HU wide, got {self.hu_range}")
        if not low < self.hu_threshold < high:
            raise ValueError(
                f"hu_threshold must lie inside hu_range {self.hu_range}, got {self.hu_threshold}"
            )
        if not LEAST_THRESHOLD <= self.tau < 1.0:
            raise ValueError(
                f"hu_threshold must be a share of hu_range {self.hu_range} in [{LEAST_THRESHOLD:g}, 1), "
                f"got {self.tau}"
            )
        if self.lengths not in ("voxel", "mm"):
            raise ValueError(f"lengths must be 'voxel' or 'mm', got {shown(self.lengths)}")

    @property
    def tau(self) -> float:
        """`hu_threshold` on the [0, 1] scale: (T - low) / (high - low), 1/3 by default."""
        low, high = self.hu_range
        return (self.hu_threshold - low) / (high - low)

    @property
    def blob_classes(self) -> tuple[BlobClass, ...]:
        """The classes in use, in the order in which blobs are numbered: small, medium, large."""
        return tuple(c for c in (self.small, self.medium, self.large) if c is not None)


def checked_spacing(spacing: Any, name: str = "spacing") -> tuple[float, float, float]:
    """Return three lengths (z, y, x) in mm as Python's numbers.

    Raises
    ------
    ValueError
        They are others than three, or lie outside `LEAST_SPACING` ... `MOST_SPACING`.
    """
    found: list[float] = []
    try:
        if len(spacing) == 3:
            found = [v for s in spacing if (v := plain_number(s)) is not None]
    except TypeError:
        pass
    good = len(found) == 3 and all(LEAST_SPACING <= v <= MOST_SPACING for v in found)
    if not good:
        raise ValueError(
            f"{name} must be three positive lengths (z, y, x) in mm, from {LEAST_SPACING:g} to "
            f"{MOST_SPACING:g}, got {shown(spacing)}"
        )
    return found[0], found[1], found[2]


def check_spacing(spacing: Any, name: str = "spacing") -> None:
    """Raise `ValueError` unless `spacing` is as `checked_spacing` takes it."""
    checked_spacing(spacing, name)


def _settle(part: Any) -> None:
    """Take NumPy's numbers as Python's, and refuse what is of another type."""
    for name, kind in hints_of(type(part)).items():
        value = getattr(part, name)
        pair = isinstance(value, tuple) and len(value) == 2
        if not pair and (kind == Range or (kind == Range | None and value is not None)):
            raise ValueError(f"{name} must be a (low, high) pair, got {shown(value)}")
    try:
        settle(part)
    except TypeError as error:  # as for a value out of its domain: callers have always caught that
        raise ValueError(str(error)) from error


def _check_range(
    name: str,
    value: Range,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    low, high = value
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} must be finite, got {value}")
    if low > high:
        raise ValueError(f"{name} must be (low, high) with low <= high, got {value}")
    if above is not None and low <= above:
        raise ValueError(f"{name} must be > {above:g}, got {value}")
    if least is not None and low < least:
        raise ValueError(f"{name} must be >= {least:g}, got {value}")
    if most is not None and high > most:
        raise ValueError(f"{name} must be <= {most:g}, got {value}")
