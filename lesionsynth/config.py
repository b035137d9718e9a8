"""What to synthesise: the paper's distributions (PAPER.md III-C) as frozen dataclasses.

Nothing is drawn here. `lesionsynth.plan` draws from these ranges and `lesionsynth.synthesizer` renders what
was drawn. Every ``(low, high)`` pair is the closed range of a uniform distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

from lesionsynth.strict import check_choice, hints_of, plain_number, settle, shown

Range = tuple[float, float]
"""Bounds of a uniform distribution."""

CONNECTIVITIES = (6, 18, 26)
"""Voxel neighbourhoods: faces, faces and edges, faces and edges and corners."""

Mode = Literal["max", "min", "add", "blend"]
"""How a lesion enters the image; `LesionConfig.mode` says what each does."""
MODES: tuple[Mode, ...] = get_args(Mode)
Placement = Literal["uniform", "surface", "depth"]
"""Where a blob's centre may lie; see `BlobClass.placement`."""
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
SOFT_MODES = ("add", "blend")
"""Modes that may have a soft edge."""

MOST_BLOBS = 1024
"""Ellipsoids of a sample; the paper has 21 at most."""
LEAST_LENGTH, MOST_LENGTH = 1e-9, 1e4
"""Bounds of every radius and sigma, in voxels or mm."""
LEAST_SPACING, MOST_SPACING = 1e-3, 1e3
"""Bounds of a voxel's size in mm."""
LEAST_FLATNESS, MOST_FLATNESS = 0.01, 100.0
"""Bounds of the factor of a semi-axis."""
MOST_AMPLITUDE, MOST_CORRELATION = 1e4, 1e4
"""Largest warp, in units of a blob's radius."""
LEAST_MU0 = 1e-6
"""Least mean intensity."""
LEAST_THRESHOLD = 1e-6
"""Least τ and mean_threshold: intensities are divided by them, in float32."""
MOST_HU = 1e5
"""Largest bound of a window, to either side."""
LEAST_HU = 1e-2
"""Least width of a window; intensities are divided by it, in float32, which tells its ends apart."""
LEAST_LOAD, MOST_LOAD = 1e-5, 0.9
"""Bounds of a wanted share of the organ."""
PAPER_LUNG = 1.6e6
"""Voxels of lung in a slab that counts as λ = 1 where nobody says what the largest is. The paper's slab has
32 x 512 x 512 voxels of 1 x 0.8 x 0.8 mm; in phantom chests 1.40 to 1.65 million of them are lung."""
PAPER_VOXEL = 1.0 * 0.8 * 0.8
"""Volume of such a voxel in mm³."""


@dataclass(frozen=True, kw_only=True)
class BlobClass:
    """Ellipsoids of one size class (PAPER.md III-C.1).

    Exactly one of `radius` and `radius_mm`, and one of `count` and `probability`, is given.
    """

    radius: Range | None = None
    """Semi-axes, in the unit of `LesionConfig.lengths`; each of the three is drawn on its own (all three
    together when `spherical`)."""
    radius_mm: Range | None = None
    """The same in mm. In a configuration whose classes all have it, every length is in mm."""
    count: Range | None = None
    """N = round(U[low * λ, high * λ]) ellipsoids."""
    probability: float | None = None
    """One ellipsoid with this probability, times λ."""
    scale_by_lung: bool = True
    """Multiply `count` or `probability` by λ, the slab's share of the largest lung."""
    spherical: bool = False
    """Draw one radius for all three semi-axes."""
    flatness: Range = (1.0, 1.0)
    """Factor of the first semi-axis: plates below 1, rods above. They lie as they are turned, any way."""
    placement: Placement = "uniform"
    """Where centres lie. "uniform": any voxel of the mask. "surface": from such a voxel straight on, in the
    plane of a slice, to the last voxel before the organ ends. "depth": from such a voxel to the middle of
    the organ along x, then along y. What lies beyond the array does not count as the organ's end."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _settle(self)
        if (self.radius is None) == (self.radius_mm is None):
            raise ValueError(
                f"exactly one of radius and radius_mm must be given, got radius={self.radius}, "
                f"radius_mm={self.radius_mm}"
            )
        name = "radius" if self.radius_mm is None else "radius_mm"
        _check_range(name, self.radii, above=0.0, least=LEAST_LENGTH, most=MOST_LENGTH)
        _check_range("flatness", self.flatness, least=LEAST_FLATNESS, most=MOST_FLATNESS)
        low, high = (r * f for r, f in zip(self.radii, self.flatness, strict=True))
        _check_range(f"{name} * flatness", (low, high), least=LEAST_LENGTH, most=MOST_LENGTH)
        check_choice("placement", self.placement, PLACEMENTS)
        if (self.count is None) == (self.probability is None):
            raise ValueError(
                f"exactly one of count and probability must be given, got count={self.count}, "
                f"probability={self.probability}"
            )
        if self.count is not None:
            _check_range("count", self.count, least=0.0, most=MOST_BLOBS)
        if self.probability is not None and not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")

    @property
    def radii(self) -> Range:
        """`radius`, or `radius_mm` where that is given."""
        radii = self.radius if self.radius_mm is None else self.radius_mm
        assert radii is not None
        return radii

    @property
    def mean_count(self) -> float:
        """Ellipsoids of a sample in the mean, at λ = 1."""
        return sum(self.count) / 2.0 if self.count is not None else self.probability or 0.0

    @property
    def most_count(self) -> int:
        """Ellipsoids of a sample at most."""
        return 1 if self.count is None else math.ceil(self.count[1])


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
    """Mean intensity that the voxels above `mean_threshold` are scaled to (eq. 6). In mode "min" it is 1
    minus the intensity, in mode "add" what is added."""
    level_hu: Range | None = None
    """The mean in HU, in place of `mu0`: for every mode but "add"."""
    contrast_hu: Range | None = None
    """What mode "add" adds in the mean, in HU, in place of `mu0`; below 0 the lesion is darker."""
    mean_threshold: float = 0.2
    """Threshold t of mean_t in eq. 6."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _settle(self)
        for name in ("sigma_a", "sigma_b_low", "sigma_b_high"):
            value = getattr(self, name)
            _check_range(f"texture.{name}", value, above=0.0, least=LEAST_LENGTH, most=MOST_LENGTH)
        _check_range("texture.mu0", self.mu0, above=0.0, least=LEAST_MU0, most=1.0)
        if self.level_hu is not None and self.contrast_hu is not None:
            raise ValueError(
                f"at most one of texture.level_hu and texture.contrast_hu must be given, got {self.level_hu} "
                f"and {self.contrast_hu}"
            )
        for name in ("level_hu", "contrast_hu"):
            if (bounds := getattr(self, name)) is not None:
                _check_range(f"texture.{name}", bounds, least=-MOST_HU, most=MOST_HU)
        if self.contrast_hu is not None and self.contrast_hu[0] <= 0.0 <= self.contrast_hu[1]:
            raise ValueError(f"texture.contrast_hu must not contain 0, got {self.contrast_hu}")
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
class Part:
    """One kind of lesions in a mixture (`LesionConfig.mixture`).

    Examples
    --------
    Faint lesions in three samples of four, nodules in the fourth:

    >>> import lesionsynth as ls
    >>> faint = ls.Part(name="faint", share=3, lesions=ls.presets.faint())
    >>> nodules = ls.Part(name="nodules", share=1, lesions=ls.presets.nodules())
    >>> synth = ls.LesionSynthesizer(ls.LesionConfig(mixture=(faint, nodules)), seed=0)
    >>> [synth.sample(index=k).mode for k in range(6)]
    ['max', 'blend', 'max', 'max', 'max', 'max']
    """

    share: float
    """Of the samples, in proportion to the shares of the other parts."""
    lesions: LesionConfig
    """What samples of this kind are drawn from; it has no mixture of its own."""
    name: str = ""
    """For people."""

    def __post_init__(self) -> None:
        """Check that it can be drawn."""
        if not isinstance(self.lesions, LesionConfig):
            raise TypeError(f"lesions must be a LesionConfig, got {shown(self.lesions)}")
        _settle(self)
        if not (0.0 < self.share < math.inf):
            raise ValueError(f"share must be > 0 and finite, got {self.share}")
        if self.lesions.mixture:
            raise ValueError(
                f"lesions must have no mixture of their own, got {len(self.lesions.mixture)} parts"
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
    count: Range | None = None
    """N = round(U[low, high]) ellipsoids in all, whatever λ is; each is of a class in proportion to the mean
    counts of the classes. Ellipsoids that touch become one lesion."""
    load: Range | None = None
    """Share of the organ that lesions are to fill, U[low, high], in place of λ: the number of ellipsoids
    follows from it, and a factor of all radii meets it within a tenth, where the organ allows."""
    mode: Mode = "max"
    """How a lesion B, in [0, 1], enters the image H. "max": max(H, B), the paper's. "min": min(H, 1 - B).
    "add": H + B, or H - B for a `contrast_hu` below 0. "blend": H + αe (B - H). All stay in [0, 1]."""
    alpha: Range = (1.0, 1.0)
    """α of mode "blend", drawn per lesion: the share of B."""
    edge: float = 0.0
    """Width of a soft edge, in the unit of `lengths`, for modes "add" and "blend": what a lesion does to a
    voxel rises from 0 outside to the whole at this depth, e = min(1, depth / edge)."""
    value_range: Range | None = None
    """Values of the image that stand for 0 and 1, where they are no HU: (-3, 5) for MR in standard
    deviations, say. `hu_threshold`, `level_hu` and `contrast_hu` are in its unit, and voxels outside it are
    refused. None: images lie in [0, 1], and `hu_range` says which HU these are."""
    mixture: tuple[Part, ...] = ()
    """Several kinds of lesions: each sample is of one of them, by its share, in place of what is said above.
    Window, `hu_threshold`, `connectivity`, `spacing` and lengths in mm are this configuration's for all."""

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
        self._check_lengths()
        self._check_numbers()
        if self.connectivity not in CONNECTIVITIES:
            raise ValueError(f"connectivity must be one of {CONNECTIVITIES}, got {self.connectivity}")
        self._check_window()
        self._check_mode()
        self._check_mixture()

    def _check_lengths(self) -> None:
        """Settle the unit of lengths: mm where the classes say so."""
        check_choice("lengths", self.lengths, ("voxel", "mm"))
        in_mm = [c.radius_mm is not None for c in self.blob_classes]
        if any(in_mm) and self.lengths == "voxel":
            if not all(in_mm):
                raise ValueError(
                    "radius_mm must be given by every class or by none, unless lengths is 'mm', got "
                    f"{[c.radii for c in self.blob_classes]} of which {sum(in_mm)} are radius_mm"
                )
            object.__setattr__(self, "lengths", "mm")

    def _check_numbers(self) -> None:
        """Check counts and `load`."""
        most = sum(1.0 if c.count is None else c.count[1] for c in self.blob_classes)
        if most > MOST_BLOBS:
            raise ValueError(f"count must be at most {MOST_BLOBS} over all classes, got {most}")
        if self.count is not None:
            _check_range("count", self.count, least=0.0, most=MOST_BLOBS)
        if self.load is not None:
            _check_range("load", self.load, least=LEAST_LOAD, most=MOST_LOAD)
        for name in ("count", "load"):
            if getattr(self, name) is not None and not any(c.mean_count for c in self.blob_classes):
                raise ValueError(f"{name} must be None where no class has lesions, got {getattr(self, name)}")

    def _check_window(self) -> None:
        """Check the window and what is measured in its unit."""
        _check_range("hu_range", self.hu_range, least=-MOST_HU, most=MOST_HU)
        name = "hu_range"
        if self.value_range is not None:
            name = "value_range"
            _check_range(name, self.value_range, least=-MOST_HU, most=MOST_HU)
        for what, (low, high) in (("hu_range", self.hu_range), (name, self.window)):
            if high - low < LEAST_HU:
                raise ValueError(f"{what} must be at least {LEAST_HU:g} HU wide, got {(low, high)}")
        low, high = self.window
        if not low < self.hu_threshold < high:
            raise ValueError(f"hu_threshold must lie inside {name} {self.window}, got {self.hu_threshold}")
        if not LEAST_THRESHOLD <= self.tau < 1.0:
            raise ValueError(
                f"hu_threshold must be a share of {name} {self.window} in [{LEAST_THRESHOLD:g}, 1), "
                f"got {self.tau}"
            )

    def _check_mode(self) -> None:
        """Check that what the texture and the edge say has a meaning in this mode."""
        check_choice("mode", self.mode, MODES)
        _check_range("alpha", self.alpha, above=0.0, most=1.0)
        if self.alpha != (1.0, 1.0) and self.mode != "blend":
            raise ValueError(f"alpha must be (1, 1) in mode {self.mode!r}, got {self.alpha}")
        if not 0.0 <= self.edge <= MOST_LENGTH:
            raise ValueError(f"edge must be in [0, {MOST_LENGTH:g}], got {self.edge}")
        if self.edge and self.mode not in SOFT_MODES:
            raise ValueError(f"edge must be 0 in mode {self.mode!r}, got {self.edge}")
        texture = self.texture
        if texture.contrast_hu is not None and self.mode != "add":
            raise ValueError(
                f"texture.contrast_hu must be None in mode {self.mode!r}, got {texture.contrast_hu}"
            )
        if texture.level_hu is not None and self.mode == "add":
            raise ValueError(f"texture.level_hu must be None in mode 'add', got {texture.level_hu}")
        low, high = self.mu0
        if not (low >= LEAST_MU0 and high <= 1.0):
            name = "level_hu" if texture.contrast_hu is None else "contrast_hu"
            raise ValueError(
                f"texture.{name} must lie within the window {self.window}, got {getattr(texture, name)}"
            )

    def _check_mixture(self) -> None:
        """Check that the parts go with the window that they share."""
        for number, part in enumerate(self.mixture):
            try:
                self._shared(part.lesions)
            except ValueError as error:
                raise ValueError(f"mixture[{number}]: {error}") from error

    def _shared(self, lesions: LesionConfig) -> LesionConfig:
        return replace(
            lesions,
            connectivity=self.connectivity,
            hu_range=self.hu_range,
            hu_threshold=self.hu_threshold,
            lengths="mm" if self.lengths == "mm" else lesions.lengths,
            spacing=self.spacing,
            value_range=self.value_range,
        )

    @cached_property
    def parts(self) -> tuple[LesionConfig, ...]:
        """What samples are drawn from: the kinds of the mixture, or this alone."""
        return tuple(self._shared(part.lesions) for part in self.mixture) or (self,)

    @property
    def window(self) -> Range:
        """Values that stand for 0 and 1: `value_range`, or `hu_range` where there is none."""
        return self.hu_range if self.value_range is None else self.value_range

    @property
    def mu0(self) -> Range:
        """Range of μ0 (eq. 6): the texture's own, or what its `level_hu` or `contrast_hu` are in [0, 1]."""
        low, high = self.window
        if self.texture.contrast_hu is not None:
            least, most = sorted(abs(hu) / (high - low) for hu in self.texture.contrast_hu)
            return least, most
        if self.texture.level_hu is not None:
            least, most = ((hu - low) / (high - low) for hu in self.texture.level_hu)
            return (1.0 - most, 1.0 - least) if self.mode == "min" else (least, most)
        return self.texture.mu0

    @property
    def weight(self) -> Range:
        """Range of a lesion's weight: α for "blend", 1 or -1 for "add", 1 for the others."""
        if self.texture.contrast_hu is not None and self.texture.contrast_hu[0] < 0.0:
            return (-1.0, -1.0)
        return self.alpha

    @property
    def tau(self) -> float:
        """`hu_threshold` on the [0, 1] scale: (T - low) / (high - low), 1/3 by default."""
        low, high = self.window
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
