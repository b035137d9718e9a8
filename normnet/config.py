"""Every setting, as frozen dataclasses with the paper's value as default and its section cited.

Presets are values: `paper`, `laptop`, `few`, `lungs` and `phantom`. A run writes its configuration as JSON
beside its weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from lesionsynth import presets as lesion_presets
from lesionsynth.strict import build, check_fields, name_of, parse_json, read_json, settle, shown

Config = TypeVar("Config")

MOST_THREADS = 1024
MOST_LEVELS = 10
"""Of a network."""
MOST_WEIGHTS = 2**27
"""Of a network, half a gigabyte; the paper's has 4.8 million."""

Task = Literal["lesions", "lungs"]
OUTPUTS: dict[Task, int] = {"lesions": 1, "lungs": 2}
"""Logits that a network of each task has for a voxel."""
Probability = float | Literal["calibrated"]
"""Threshold of the healthy probability: a number, or a model's own calibration."""

PAPER_THRESHOLD_HU = -500.0
"""T (PAPER.md III-A, Table VI)."""
HEALTHY_HU = (-950.0, -700.0)
"""Where healthy lung may lie: deep inspiration or emphysema to expiration (`normnet.inflation`)."""
PAPER_PROBABILITY = 0.95
"""A voxel is healthy for a model where its probability exceeds this (PAPER.md IV-B.3)."""
PAPER_FULL_THRESHOLD = 0.15
"""What the mean filter of Fig. 4f to 4g must exceed (IV-B.3), an intensity, as τ is: T = -500 HU is 1/3."""
WEIGHTS = "model.safetensors"
"""Name of the weights in a run folder. Here, as what reads a folder of maps needs no torch."""
BUNDLED = Path(__file__).parent / "weights"
"""Weights that ship with the package."""
BUNDLED_LUNGS = BUNDLED / "lungs.safetensors"
"""Those of the lung network."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """MONAI's 3-D `UNet` (PAPER.md IV-B.3), which prints no widths: these are MONAI's usual ones."""

    channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Feature maps of each level."""
    strides: tuple[int, ...] = (2, 2, 2, 2)
    """Down-sampling between levels, the same on the three axes."""
    residual_units: int = 2
    """Residual units of a level; 0 gives plain convolutions."""
    norm: Literal["batch", "instance"] = "batch"
    """Normalisation. Instance norm would tie a voxel's answer to the content of its window."""
    outputs: int = 1
    """Logits a voxel: 1, healthy bright tissue; or 2, right and left lung."""

    def __post_init__(self) -> None:
        """Check sizes."""
        settle(self)
        if len(self.channels) < 2 or min(self.channels) < 1:
            raise ValueError(
                f"model.channels must be at least two positive widths, got {shown(self.channels)}"
            )
        if len(self.strides) != len(self.channels) - 1 or min(self.strides) < 1:
            count = len(self.channels) - 1
            raise ValueError(f"model.strides must be {count} positive integers, got {shown(self.strides)}")
        if self.residual_units < 0:
            raise ValueError(f"model.residual_units must be >= 0, got {shown(self.residual_units)}")
        if self.norm not in ("batch", "instance"):
            raise ValueError(f"model.norm must be 'batch' or 'instance', got {shown(self.norm)}")
        if len(self.channels) > MOST_LEVELS:
            raise ValueError(f"model.channels must be at most {MOST_LEVELS} widths, got {len(self.channels)}")
        domains = {"channels": (1, 4096), "strides": (1, 8), "residual_units": (0, 16), "outputs": (1, 2)}
        check_fields(self, domains, "model.")
        if self.multiple > 256:
            raise ValueError(f"model.strides must have a product of at most 256, got {self.multiple}")
        if (weights := self.weights) > MOST_WEIGHTS:
            raise ValueError(
                f"model.channels must give at most {MOST_WEIGHTS} weights, got about {weights} "
                f"with {self.channels} and residual_units {self.residual_units}"
            )

    @property
    def multiple(self) -> int:
        """Every axis of an input must be a multiple of this."""
        product = 1
        for stride in self.strides:
            product *= stride
        return product

    @property
    def weights(self) -> int:
        """Number of weights, roughly: what bounds memory before a network is built."""
        units = max(1, self.residual_units)
        inner = sum(27 * b * (a + (units - 1) * b) for a, b in pairwise((1, *self.channels)))
        outer = sum(27 * a * (2 * b + a * min(units, 1)) for a, b in pairwise(self.channels))
        return inner + outer


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How healthy slabs vary beyond the volumes at hand; all off, as in the paper (`normnet.augment`).

    Each sample draws its own amounts, uniformly up to these.
    """

    rotate: float = 0.0
    """Turn in plane by up to so many degrees, to either side."""
    zoom: float = 0.0
    """Scale in plane by up to 1 + this, and down to its inverse."""
    deflation: float = 0.0
    """Share of the lungs' air taken away everywhere: scans after breathing out."""
    dependent: float = 0.0
    """Share of the lungs' air taken away at the back, and less towards the front: dependent lung, where
    blood gathers and air does not."""
    blur: float = 0.0
    """Standard deviation in voxels of an in-plane Gaussian: softer reconstruction kernels."""
    noise: float = 0.0
    """Standard deviation in HU of added noise."""
    offset: float = 0.0
    """HU added or subtracted everywhere: calibration."""
    border: int = 0
    """Lung masks shrunk or grown in plane by up to so many voxels: lungs segmented in another way have more
    or less of the chest wall, the diaphragm and the hilum at their edge."""
    gain: float = 0.0
    """Contrast to air, hu + 1000, times up to 1 + this or down to 1 - this: pictures that were windowed."""

    def __post_init__(self) -> None:
        """Check ranges."""
        settle(self)
        for name in ("rotate", "zoom", "blur", "noise", "offset", "border"):
            value = getattr(self, name)
            _check(f"augment.{name}", value, 0 <= value < math.inf, ">= 0")
        for name in ("deflation", "dependent", "gain"):
            value = getattr(self, name)
            _check(f"augment.{name}", value, 0 <= value <= 0.5, "in [0, 0.5]")
        domains = {
            "rotate": 360.0,
            "zoom": 10.0,
            "blur": 100.0,
            "noise": 10_000.0,
            "offset": 10_000.0,
            "border": 100,
        }
        check_fields(self, {name: (0, most) for name, most in domains.items()}, "augment.")

    @property
    def active(self) -> bool:
        """Whether anything varies."""
        return any(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True)
class ChestConfig:
    """How chests vary in the training of the lung network, beside `AugmentConfig` (`normnet.chests`)."""

    diseased: float = 0.85
    """Share of the samples that disease is painted into (`normnet.painting`)."""
    tilt: float = 8.0
    """Turn about the other two axes by up to so many degrees, to either side."""
    stretch: float = 0.1
    """Scale each axis by up to 1 + this, and down to its inverse."""
    bend: float = 3.0
    """Bend by up to so many voxels."""
    contrast: float = 0.3
    """Share of the samples whose soft tissue is given contrast."""
    gas: float = 0.3
    """Share with gas in the tissue below the lungs, as in bowel and stomach: air that is no lung."""
    arms: float = 0.2
    """Share with an arm beside the body."""
    cropped: float = 0.35
    """Share whose field of view is cut, and filled as files are."""
    emphasis: float = 5.0
    """Weight of diseased voxels in the cross-entropy; of all others it is 1. They are few, and hard."""

    def __post_init__(self) -> None:
        """Check ranges."""
        settle(self)
        for name in ("diseased", "contrast", "gas", "arms", "cropped"):
            value = getattr(self, name)
            _check(f"chest.{name}", value, 0 <= value <= 1, "in [0, 1]")
        domains = {"tilt": (0, 90.0), "stretch": (0, 1.0), "bend": (0, 8.0), "emphasis": (1.0, 100.0)}
        check_fields(self, domains, "chest.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run (PAPER.md IV-B.3)."""

    task: Task = "lesions"
    """What to learn: the healthy tissue behind lesions, the paper's; or "lungs", the right and the left lung
    behind dense disease (`normnet.chests`), which `lesions`, `threshold_hu`, `inflation_hu` and `probability`
    say nothing about."""
    data: Path | None = None
    """Store written by `normnet.prepare`, for lungs by ``--task lungs``; the built-in phantom where
    omitted."""
    output: Path = Path("runs/normnet")
    """Run folder: weights, configuration, metrics."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""
    lesions: str = "covid_lung"
    """Preset of `lesionsynth.presets`: the paper's generator or a Table V switch."""
    threshold_hu: float = PAPER_THRESHOLD_HU
    """T: the network answers for tissue at or above it, in HU (III-A, Table VI)."""
    inflation_hu: float | None = None
    """Density in HU that the healthy lung of every volume is brought to, here and in prediction
    (`normnet.inflation`); None leaves HU as they are, as the paper does."""
    probability: Probability = PAPER_PROBABILITY
    """What prediction takes as the threshold of these weights unless it is given one: a number, or what
    suits the synthetic pairs of the held-out volumes best."""
    iterations: int = 3500
    """Optimiser steps (IV-B.3)."""
    minutes: float | None = None
    """Stop after this much training time, should it come first."""
    batch_size: int = 8
    """Pairs of a step, over all processes (IV-B.3)."""
    accumulate: int = 1
    """Parts that a step's pairs are computed in, for devices too small for all at once; normalisation and
    Dice are then those of a part."""
    learning_rate: float = 3e-4
    """Adam's (IV-B.3)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate: constant, as the paper's, or falling to 0 over `iterations` along half a cosine, which
    makes more of few iterations."""
    slab: int = 32
    """Slices of a training slab (III-C.1)."""
    crop: int | None = None
    """In-plane size of a crop around a lung voxel; None takes the whole slice, the paper's 512."""
    mirror: bool = False
    """Flip half of the slabs left to right. The paper, with 453 volumes, needs no augmentation; few do."""
    thick_slices: float = 0.0
    """Share of the slabs shown as a scan with thick slices would. The paper names such scans as the largest
    source of its false positives (V) and has no such option."""
    thick_mm: tuple[float, float] = (3.0, 8.0)
    """Least and largest thickness of those slices in mm."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Variation of the healthy anatomy. The paper, with 453 volumes, has none."""
    chest: ChestConfig = field(default_factory=ChestConfig)
    """More of it, for the lung network."""
    average: float = 0.0
    """Decay of the running average of the weights that is saved; 0 saves the last weights, as the paper."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network; "auto" takes bf16 where the hardware has it."""
    device: str = "auto"
    """"auto" takes CUDA where there is some, else the CPU."""
    cache: Literal["auto", "device", "memory", "disk"] = "auto"
    """Where volumes are kept: on the training device, in main memory, or read slab by slab; "auto" takes the
    first that has twice the room."""
    seed: int = 0
    """Of initial weights, slabs and lesions; ensembles use several."""
    held_out: int = 1
    """Volumes kept for validation on synthetic pairs."""
    validate_every: int = 250
    """Iterations between validations; 0 for none but the last."""
    validation_pairs: int = 8
    """Synthetic pairs of a validation."""
    checkpoint_every: int = 100
    """Iterations between saves of the state that `resume` continues from."""
    resume: bool = False
    """Continue the run in `output`; the result equals an uninterrupted run's."""
    threads: int | None = None
    """CPU threads; all cores where omitted."""
    phantoms: int = 6
    """Phantom volumes to train on, without `data`; for lungs beside it."""
    phantom_shape: tuple[int, int, int] = (64, 512, 512)
    """Their size (z, y, x)."""
    phantom_spacing: tuple[float, float, float] = (1.0, 0.8, 0.8)
    """Their voxel size (z, y, x) in mm."""

    def __post_init__(self) -> None:
        """Check ranges."""
        settle(self)
        counts = ("iterations", "batch_size", "accumulate", "slab")
        for name in (*counts, "validation_pairs", "checkpoint_every", "phantoms"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        fits = self.batch_size % self.accumulate == 0
        _check("batch_size", self.batch_size, fits, f"a multiple of accumulate={self.accumulate}")
        for name in ("held_out", "validate_every"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        _check("minutes", self.minutes, self.minutes is None or self.minutes > 0, "> 0")
        by_steps = self.schedule == "constant" or self.minutes is None
        _check("minutes", self.minutes, by_steps, "None with a schedule, which counts iterations")
        _check("learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")
        _check("schedule", self.schedule, self.schedule in ("constant", "cosine"), "constant or cosine")
        _check("threshold_hu", self.threshold_hu, -800 < self.threshold_hu < 100, "between -800 and 100 HU")
        _check("thick_slices", self.thick_slices, 0 <= self.thick_slices <= 1, "in [0, 1]")
        level = self.inflation_hu
        low, high = HEALTHY_HU
        rule = f"None or in [{low:g}, {high:g}] HU"
        _check("inflation_hu", level, level is None or low <= level <= high, rule)
        check_probability(self.probability)
        held = self.probability != "calibrated" or self.held_out >= 1
        _check("held_out", self.held_out, held, ">= 1 to calibrate the probability on")
        thin, thick = self.thick_mm
        _check("thick_mm", self.thick_mm, 0 < thin <= thick, "two lengths > 0, the smaller first")
        caches = ("auto", "device", "memory", "disk")
        _check("cache", self.cache, self.cache in caches, f"one of {', '.join(caches)}")
        _check("average", self.average, 0 <= self.average < 1, "in [0, 1)")
        _check("seed", self.seed, 0 <= self.seed < 2**32, "in [0, 2**32)")
        _check("threads", self.threads, self.threads is None or self.threads >= 1, ">= 1")
        known = list(lesion_presets.BY_NAME)
        _check("lesions", self.lesions, self.lesions in known, f"one of {known}")
        _check("precision", self.precision, self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")
        multiple = self.model.multiple
        rule = f"a multiple of {multiple} (product of model.strides)"
        _check("slab", self.slab, self.slab % multiple == 0, rule)
        if self.crop is not None:
            _check("crop", self.crop, self.crop >= multiple and self.crop % multiple == 0, rule)
        _check("task", self.task, self.task in OUTPUTS, f"one of {', '.join(OUTPUTS)}")
        wanted = OUTPUTS[self.task]
        rule = f"{wanted} for the task {self.task}"
        _check("model.outputs", self.model.outputs, self.model.outputs == wanted, rule)
        _check("crop", self.crop, self.task != "lungs" or self.crop is not None, "given for the task lungs")
        check_fields(self, _TRAIN)
        check_phantoms(self.phantom_shape)


_TRAIN: dict[str, tuple[float, float]] = {
    "iterations": (1, 10**9),
    "minutes": (0.0, 1e6),
    "batch_size": (1, 4096),
    "accumulate": (1, 4096),
    "learning_rate": (1e-12, 10.0),
    "slab": (1, 4096),
    "crop": (1, 4096),
    "thick_mm": (1e-3, 100.0),
    "held_out": (0, 100_000),
    "validate_every": (0, 10**9),
    "validation_pairs": (1, 100_000),
    "checkpoint_every": (1, 10**9),
    "threads": (1, MOST_THREADS),
    "phantoms": (1, 1000),
    "phantom_spacing": (0.01, 100.0),
}
"""Domains, far beyond use, that bound work and memory."""


def check_phantoms(shape: tuple[int, int, int], name: str = "phantom_shape") -> None:
    """Raise `ValueError` unless phantoms have a size that can be made."""
    good = all(1 <= n <= 4096 for n in shape) and math.prod(shape) <= 2**28
    _check(name, shape, good, f"three sizes of at most 4096, and at most {2**28} voxels")


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """From healthy voxels to lesions (PAPER.md III-D, IV-B.3)."""

    threshold_hu: float | None = None
    """T: bright voxels are at or above it; where omitted what the models were trained with, -500 HU in the
    paper."""
    bright_size: int = 9
    """Mean filter on the bright lesion voxels (Fig. 4d to 4e)."""
    bright_threshold: float = 0.2
    """Its threshold."""
    full_size: int = 7
    """Mean filter on all lung voxels that are not healthy, as intensities (Fig. 4f to 4g)."""
    full_threshold: float | None = None
    """Its threshold. None takes the paper's 0.15, but no more than three quarters of τ (0.15 holds down to
    T = -620 HU): it is compared with intensities, and would else filter away what the network found."""
    growth_iterations: int = 8
    """Steps that 4e grows inside 4g; 0 for none, negative until nothing changes. The paper has no number:
    on phantom pneumonia Dice levels off here (docs/postprocess_sweep.py)."""
    connectivity: int = 6
    """Neighbourhood of one step: 6, 18 or 26."""

    def __post_init__(self) -> None:
        """Check ranges."""
        settle(self)
        level = self.threshold_hu
        _check("threshold_hu", level, level is None or -800 < level < 100, "between -800 and 100 HU")
        for name in ("bright_size", "full_size"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        full = self.full_threshold
        _check("bright_threshold", self.bright_threshold, 0 <= self.bright_threshold <= 1, "in [0, 1]")
        _check("full_threshold", full, full is None or 0 <= full <= 1, "in [0, 1]")
        _check("connectivity", self.connectivity, self.connectivity in (6, 18, 26), "6, 18 or 26")
        sizes = {"bright_size": (1, 255), "full_size": (1, 255), "growth_iterations": (-(10**6), 10**6)}
        check_fields(self, sizes)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """From a volume to lesions (PAPER.md III-A, IV-B.3)."""

    probability: Probability | None = None
    """A voxel is healthy for a model where its probability exceeds this; "calibrated" takes what each model
    found best on synthetic pairs of its held-out volumes. None takes what each model's training settled
    (`TrainConfig.probability`): the paper's 0.95 (IV-B.3) unless it chose otherwise."""
    slab: int = 32
    """Slices the network sees at once, as in training."""
    overlap: float = 0.5
    """Share of a slab that the next one sees again; probabilities are averaged."""
    tile: int | None = 320
    """In-plane size of what the network sees at once, which bounds its memory; wider lungs are cut into
    overlapping tiles. None takes whole slices."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network; "auto" takes bf16 where the hardware has it."""
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    """What follows the vote."""

    def __post_init__(self) -> None:
        """Check ranges."""
        settle(self)
        if self.probability is not None:
            check_probability(self.probability)
        _check("tile", self.tile, self.tile is None or self.tile >= 32, ">= 32")
        _check("slab", self.slab, self.slab >= 1, ">= 1")
        _check("overlap", self.overlap, 0 <= self.overlap < 1, "in [0, 1)")
        check_fields(self, {"tile": (32, 65_536), "slab": (1, 4096)})
        _check("precision", self.precision, self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")


def paper() -> TrainConfig:
    """Return the paper's settings: a GPU's work."""
    return TrainConfig()


def laptop() -> TrainConfig:
    """Return a 1.2 M-parameter network on crops: 15 minutes on two CPU cores."""
    return replace(
        paper(),
        model=ModelConfig(channels=(16, 32, 64, 128), strides=(2, 2, 2)),
        crop=144,
        batch_size=2,
        iterations=100_000,
        minutes=15.0,
        learning_rate=1e-3,
        mirror=True,
        average=0.995,
    )


def few() -> TrainConfig:
    """Return what the shipped weights were trained with: `laptop` for a handful of healthy volumes.

    Departs from the paper: T = -700 HU and fainter lesions, as ground glass is often fainter than the paper's
    -500 HU; healthy lung brought to one density, so that T means the same in every patient; thick slices and
    varied anatomy, in place of its 453 volumes; a calibrated threshold instead of 0.95.
    """
    return replace(
        laptop(),
        iterations=3000,
        minutes=None,
        schedule="cosine",
        lesions="faint",
        threshold_hu=-700.0,
        inflation_hu=-870.0,
        probability="calibrated",
        thick_slices=0.5,
        augment=AugmentConfig(
            rotate=10.0,
            zoom=0.15,
            deflation=0.12,
            dependent=0.12,
            blur=0.6,
            noise=10.0,
            offset=20.0,
            border=2,
            gain=0.03,
        ),
        validate_every=500,
        validation_pairs=32,
    )


def lungs() -> TrainConfig:
    """Return what the shipped lung network was trained with: two hours on two CPU cores.

    Samples are whole chests on a coarse grid (`normnet.prepare.chest`), so voxels are 3 mm of an adult.
    """
    return TrainConfig(
        task="lungs",
        output=Path("runs/lungs"),
        model=ModelConfig(channels=(16, 32, 64, 128, 128), strides=(2, 2, 2, 2), outputs=2),
        slab=64,
        crop=112,
        batch_size=2,
        iterations=12_000,
        learning_rate=1e-3,
        schedule="cosine",
        mirror=True,
        average=0.995,
        thick_slices=0.35,
        thick_mm=(4.0, 10.0),
        augment=AugmentConfig(rotate=15.0, zoom=0.35, blur=1.2, noise=80.0, offset=40.0, gain=0.05),
        validate_every=500,
        validation_pairs=16,
        held_out=1,
        phantoms=3,
        phantom_shape=(96, 96, 128),
        phantom_spacing=(3.0, 3.0, 3.0),
    )


def phantom() -> TrainConfig:
    """Return the embedded default: `laptop` for four minutes on the built-in phantom."""
    return replace(laptop(), minutes=4.0, phantoms=4, phantom_shape=(64, 320, 400))


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "paper": paper,
    "laptop": laptop,
    "few": few,
    "lungs": lungs,
    "phantom": phantom,
}
"""Every preset, by the name the command line uses."""


def to_json(config: Any) -> str:
    """Return a configuration as JSON; `from_json` gives back an equal one."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)


def from_json(cls: type[Config], text: str) -> Config:
    """Read a configuration written by `to_json`.

    Raises
    ------
    ValueError
        `text` is not a JSON object, a field is unknown, or a value is out of its range.
    """
    try:
        record = parse_json(text)
    except ValueError as error:
        raise ValueError(f"a configuration must be JSON: {str(error).removeprefix('not JSON: ')}") from error
    return build(cls, record, cls.__name__)


def read_config(cls: type[Config], path: Path) -> Config:
    """Read the file of a configuration written by `to_json`.

    Raises
    ------
    OSError
        It cannot be opened or read.
    ValueError
        As `from_json`, or it is no regular file; the message starts with its name.
    """
    record = read_json(path)
    try:
        return build(cls, record, cls.__name__)
    except ValueError as error:
        raise ValueError(f"{name_of(path)}: {error}") from error


def check_probability(value: Any) -> None:
    """Raise `ValueError` unless a threshold lies in (0, 1), or is "calibrated"."""
    good = value == "calibrated" if isinstance(value, str) else 0 < value < 1
    _check("probability", value, good, "in (0, 1) or 'calibrated'")


def _check(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        text = shown(value)
        raise ValueError(f"{name} must be {rule}, got {text[1:-1] if isinstance(value, str) else text}")
