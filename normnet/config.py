"""Every setting, with the paper's value as default and its section cited; and the presets.

A run writes its configuration as JSON beside its weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lesionsynth import presets as lesion_presets
from lesionsynth.window import HU_RANGE
from normnet.settings import File, check, settings
from normnet.settings import from_json as from_json
from normnet.settings import json_schema as json_schema
from normnet.settings import read_config as read_config
from normnet.settings import to_json as to_json

MOST_WEIGHTS = 2**27
"""Of a network, half a gigabyte; the paper's has 4.8 million."""

Task = Literal["lesions", "lungs"]
OUTPUTS: dict[Task, int] = {"lesions": 1, "lungs": 2}
"""Logits that a network of each task has for a voxel."""
Probability = Annotated[float, Field(gt=0, lt=1)] | Literal["calibrated"]
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


def model_name(file: Path) -> str:
    """Name weights: by their run, or by their file."""
    return file.resolve().parent.name if file.name == WEIGHTS else file.stem


# Bounds are far beyond use: they bound work and memory.
Size = Annotated[int, Field(ge=1, le=4096)]
Levels = Annotated[tuple[Size, ...], Field(min_length=1, max_length=10, fail_fast=True)]
Shape = tuple[Size, Size, Size]
Mm = Annotated[float, Field(ge=0.01, le=100)]
Spacing = tuple[Mm, Mm, Mm]
Share = Annotated[float, Field(ge=0, le=1)]
Thickness = Annotated[float, Field(ge=1e-3, le=100)]
Phantoms = Annotated[int, Field(ge=1, le=1000)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
Minutes = Annotated[float, Field(gt=0, le=1e6)]
LearningRate = Annotated[float, Field(ge=1e-12, le=10)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
ThresholdHU = Annotated[float, Field(gt=-800, lt=100)]
HealthyHU = Annotated[float, Field(ge=HEALTHY_HU[0], le=HEALTHY_HU[1])]
Precision = Literal["auto", "fp32", "bf16"]


@settings
class ModelConfig:
    """MONAI's 3-D `UNet` (PAPER.md IV-B.3), which prints no widths: these are MONAI's usual ones."""

    channels: Levels = (16, 32, 64, 128, 256)
    """Feature maps of each level."""
    strides: Annotated[tuple[Annotated[int, Field(ge=1, le=8)], ...], Field(fail_fast=True)] = (2, 2, 2, 2)
    """Down-sampling between levels, the same on the three axes."""
    residual_units: Annotated[int, Field(ge=0, le=16)] = 2
    """Residual units of a level; 0 gives plain convolutions."""
    norm: Literal["batch", "instance"] = "batch"
    """Normalisation. Instance norm would tie a voxel's answer to the content of its window."""
    activation: Literal["prelu", "leakyrelu"] = "prelu"
    """Of every unit: MONAI's PReLU; or a leaky one of slope 0.01, a sixth less work for a CPU in training."""
    head: Annotated[int, Field(ge=0, le=64)] = 0
    """Features at full resolution, of which a last convolution makes the logits. 0 is MONAI's `UNet` as it
    stands: as many as there are outputs, normalised, so that logits of one output grow but slowly."""
    outputs: Annotated[int, Field(ge=1, le=2)] = 1
    """Logits a voxel: 1, healthy bright tissue; or 2, right and left lung."""

    def __post_init__(self) -> None:
        """Check what a network of these sizes comes to."""
        steps = len(self.channels) - 1
        check("channels", self.channels, steps >= 1, "at least two widths")
        check("strides", self.strides, len(self.strides) == steps, f"{steps}, one less than channels")
        rule = f"of a product of at most 256, not {self.multiple}"
        check("strides", self.strides, self.multiple <= 256, rule)
        rule = f"such that there are at most {MOST_WEIGHTS} weights, not about {self.weights}"
        check("channels", self.channels, self.weights <= MOST_WEIGHTS, rule)

    @property
    def multiple(self) -> int:
        """Every axis of an input must be a multiple of this."""
        return math.prod(self.strides)

    @property
    def weights(self) -> int:
        """Number of weights, roughly: what bounds memory before a network is built."""
        units = max(1, self.residual_units)
        inner = sum(27 * b * (a + (units - 1) * b) for a, b in pairwise((1, *self.channels)))
        outer = sum(27 * a * (2 * b + a * min(units, 1)) for a, b in pairwise(self.channels))
        return inner + outer


@settings
class AugmentConfig:
    """How healthy slabs vary beyond the volumes at hand; all off, as in the paper (`normnet.augment`).

    Each sample draws its own amounts, uniformly up to these.
    """

    rotate: Annotated[float, Field(ge=0, le=360)] = 0.0
    """Turn in plane by up to so many degrees, to either side."""
    zoom: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Scale in plane by up to 1 + this, and down to its inverse."""
    deflation: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the lungs' air taken away everywhere: scans after breathing out."""
    dependent: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the lungs' air taken away at the back, and less towards the front: dependent lung."""
    blur: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Standard deviation in voxels of an in-plane Gaussian: softer reconstruction kernels."""
    noise: Annotated[float, Field(ge=0, le=10_000)] = 0.0
    """Standard deviation in HU of added noise."""
    offset: Annotated[float, Field(ge=0, le=10_000)] = 0.0
    """HU added or subtracted everywhere: calibration."""
    border: Annotated[int, Field(ge=0, le=100)] = 0
    """Lung masks shrunk or grown in plane by up to so many voxels: lungs segmented in another way."""
    gain: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Contrast to air, hu + 1000, times up to 1 + this or down to 1 - this: pictures that were windowed."""

    @property
    def active(self) -> bool:
        """Whether anything varies."""
        return any(dataclasses.astuple(self))


@settings
class ChestConfig:
    """How chests vary in the training of the lung network, beside `AugmentConfig` (`normnet.chests`)."""

    diseased: Share = 0.85
    """Share of the samples that disease is painted into (`normnet.painting`)."""
    tilt: Annotated[float, Field(ge=0, le=90)] = 8.0
    """Turn about the other two axes by up to so many degrees, to either side."""
    stretch: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Scale each axis by up to 1 + this, and down to its inverse."""
    bend: Annotated[float, Field(ge=0, le=8)] = 3.0
    """Bend by up to so many voxels."""
    contrast: Share = 0.3
    """Share of the samples whose soft tissue is given contrast."""
    gas: Share = 0.3
    """Share with gas in the tissue below the lungs, as in bowel and stomach: air that is no lung."""
    arms: Share = 0.2
    """Share with an arm beside the body."""
    cropped: Share = 0.35
    """Share whose field of view is cut, and filled as files are."""
    emphasis: Annotated[float, Field(ge=1, le=100)] = 5.0
    """Weight of diseased voxels in the cross-entropy; of all others it is 1. They are few, and hard."""


@settings
class TrainConfig:
    """One training run (PAPER.md IV-B.3)."""

    task: Task = "lesions"
    """What to learn: healthy tissue behind lesions, as the paper; or right and left lung behind dense disease
    (`normnet.chests`), which `lesions`, `threshold_hu`, `inflation_hu` and `probability` do not concern."""
    data: File | None = None
    """Store written by `normnet.prepare` for the same task; the built-in phantom where omitted."""
    output: File = Path("runs/normnet")
    """Run folder: weights, configuration, metrics."""
    model: ModelConfig = ModelConfig()
    """Network."""
    lesions: str = "covid_lung"
    """Preset of `lesionsynth.presets` in the paper's window: its generator, a Table V switch, other lungs."""
    threshold_hu: ThresholdHU = PAPER_THRESHOLD_HU
    """T: the network answers for tissue at or above it, in HU (III-A, Table VI)."""
    inflation_hu: HealthyHU | None = None
    """Density in HU that healthy lung is brought to (`normnet.inflation`); the paper leaves it as it is."""
    probability: Probability = PAPER_PROBABILITY
    """Threshold of these weights in prediction: a number, or what is best on held-out synthetic pairs."""
    iterations: Steps = 3500
    """Optimiser steps (IV-B.3)."""
    minutes: Minutes | None = None
    """Stop after this much training time, should it come first."""
    batch_size: Size = 8
    """Pairs of a step, over all processes (IV-B.3)."""
    accumulate: Size = 1
    """Parts that a step is computed in, for small devices; normalisation and Dice are those of a part."""
    learning_rate: LearningRate = 3e-4
    """Adam's (IV-B.3)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate: constant, as the paper's, or falling to 0 over `iterations` along half a cosine."""
    slab: Size = 32
    """Slices of a training slab (III-C.1)."""
    crop: Size | None = None
    """In-plane size of a crop around a lung voxel; None takes the whole slice, the paper's 512."""
    mirror: bool = False
    """Flip half of the slabs left to right. The paper, with 453 volumes, needs no augmentation; few do."""
    thick_slices: Share = 0.0
    """Share of the slabs shown as in thick slices, the paper's largest source of false positives (V)."""
    thick_mm: tuple[Thickness, Thickness] = (3.0, 8.0)
    """Least and largest thickness of those slices in mm."""
    augment: AugmentConfig = AugmentConfig()
    """Variation of the healthy anatomy. The paper, with 453 volumes, has none."""
    chest: ChestConfig = ChestConfig()
    """More of it, for the lung network."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the running average of the weights that is saved; 0 saves the last weights, as the paper."""
    precision: Precision = "auto"
    """Arithmetic of the network; "auto" takes bf16 where the hardware has it."""
    device: str = "auto"
    """"auto" takes CUDA where there is some, else the CPU."""
    cache: Literal["auto", "device", "memory", "disk"] = "auto"
    """Where volumes are kept, disk reading slab by slab; "auto" takes the first that has twice the room."""
    seed: Seed = 0
    """Of initial weights, slabs and lesions; ensembles use several."""
    held_out: Annotated[int, Field(ge=0, le=100_000)] = 1
    """Volumes kept for validation on synthetic pairs: those with the fewest slabs."""
    folds: File | None = None
    """CSV of case,fold, folds from 0 on, for cross-validation: the fold numbered seed modulo their number is
    kept for validation, in place of `held_out` volumes. An ensemble of as many seeds holds out each once."""
    validate_every: Annotated[int, Field(ge=0, le=10**9)] = 250
    """Iterations between validations; 0 for none but the last."""
    validation_pairs: Count = 8
    """Synthetic pairs of a validation."""
    checkpoint_every: Steps = 100
    """Iterations between saves of the state that `resume` continues from."""
    resume: bool = False
    """Continue the run in `output`; the result equals an uninterrupted run's."""
    threads: Threads | None = None
    """CPU threads; all cores where omitted."""
    phantoms: Phantoms = 6
    """Phantom volumes to train on, without `data`; for lungs beside it."""
    phantom_shape: Shape = (64, 512, 512)
    """Their size (z, y, x)."""
    phantom_spacing: Spacing = (1.0, 0.8, 0.8)
    """Their voxel size (z, y, x) in mm."""

    def __post_init__(self) -> None:
        """Check what fields ask of each other."""
        fits = self.batch_size % self.accumulate == 0
        check("batch_size", self.batch_size, fits, f"a multiple of accumulate={self.accumulate}")
        by_steps = self.schedule == "constant" or self.minutes is None
        check("minutes", self.minutes, by_steps, "None with a schedule, which counts iterations")
        held = self.probability != "calibrated" or self.held_out >= 1 or self.folds is not None
        check("held_out", self.held_out, held, ">= 1 to calibrate the probability on")
        check("thick_mm", self.thick_mm, self.thick_mm[0] <= self.thick_mm[1], "the smaller length first")
        known = [name for name, preset in lesion_presets.BY_NAME.items() if preset().window == HU_RANGE]
        check("lesions", self.lesions, self.lesions in known, f"one of {', '.join(known)}")
        rule = f"a multiple of {self.model.multiple} (product of model.strides)"
        for name, size in (("slab", self.slab), ("crop", self.crop)):
            check(name, size, size is None or size % self.model.multiple == 0, rule)
        outputs, wanted = self.model.outputs, OUTPUTS[self.task]
        check("model.outputs", outputs, outputs == wanted, f"{wanted} for the task {self.task}")
        folds = self.folds is None or self.task == "lesions"
        check("folds", self.folds, folds, "None for the task lungs")
        check("crop", self.crop, self.task != "lungs" or self.crop is not None, "given for the task lungs")
        check_phantoms(self.phantom_shape)


def check_phantoms(shape: tuple[int, int, int]) -> None:
    """Raise `ValueError` unless phantoms have a size that can be made."""
    rule = f"three sizes of at most {2**28} voxels together"
    check("phantom_shape", shape, math.prod(shape) <= 2**28, rule)


@settings
class PostprocessConfig:
    """From healthy voxels to lesions (PAPER.md III-D, IV-B.3)."""

    threshold_hu: ThresholdHU | None = None
    """T: bright voxels are at or above it; that of the models' training where omitted."""
    bright_size: Annotated[int, Field(ge=1, le=255)] = 9
    """Mean filter on the bright lesion voxels (Fig. 4d to 4e)."""
    bright_threshold: Share = 0.2
    """Its threshold."""
    full_size: Annotated[int, Field(ge=1, le=255)] = 7
    """Mean filter on all lung voxels that are not healthy, as intensities (Fig. 4f to 4g)."""
    full_threshold: Share | None = None
    """Its threshold, of intensities. None takes the paper's 0.15, but no more than three quarters of τ (from
    T = -620 HU down), which would else filter away what the network found."""
    growth_iterations: Annotated[int, Field(ge=-(10**6), le=10**6)] = 8
    """Steps that 4e grows inside 4g; 0 for none, negative until nothing changes. The paper has no number:
    on phantom pneumonia Dice levels off here (docs/postprocess_sweep.py)."""
    connectivity: Literal[6, 18, 26] = 6
    """Neighbourhood of one step: 6, 18 or 26."""


@settings
class PredictConfig:
    """From a volume to lesions (PAPER.md III-A, IV-B.3)."""

    probability: Probability | None = None
    """A voxel is healthy for a model where its probability exceeds this, or the model's own calibration; None
    takes what its training settled (`TrainConfig.probability`), the paper's 0.95 unless it chose another."""
    slab: Size = 32
    """Slices the network sees at once, as in training."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a slab that the next one sees again; probabilities are averaged."""
    tile: Annotated[int, Field(ge=32, le=65_536)] | None = 320
    """In-plane size of the overlapping tiles that the network sees; None takes whole slices, and memory."""
    precision: Precision = "auto"
    """Arithmetic of the network; "auto" takes bf16 where the hardware has it."""
    postprocess: PostprocessConfig = PostprocessConfig()
    """What follows the vote."""


def paper() -> TrainConfig:
    """Return the paper's settings: a GPU's work."""
    return TrainConfig()


def laptop() -> TrainConfig:
    """Return a 1.2 M-parameter network on crops: 15 minutes on two CPU cores."""
    return TrainConfig(
        model=ModelConfig(channels=(16, 32, 64, 128), strides=(2, 2, 2)),
        crop=144, batch_size=2, mirror=True,
        iterations=100_000, minutes=15.0, learning_rate=1e-3, average=0.995,
    )  # fmt: skip


def few() -> TrainConfig:
    """Return what the shipped weights were trained with: `laptop` for a handful of healthy volumes.

    Departs from the paper: T = -700 HU and fainter lesions, as ground glass often is; healthy lung at one
    density, so that T means the same in every patient; thick slices and varied anatomy, in place of 453
    volumes; a calibrated threshold instead of 0.95.
    """
    return replace(
        laptop(),
        iterations=3000, minutes=None, schedule="cosine",
        lesions="faint", threshold_hu=-700.0, inflation_hu=-870.0, probability="calibrated",
        thick_slices=0.5,
        augment=AugmentConfig(
            rotate=10.0, zoom=0.15, deflation=0.12, dependent=0.12,
            blur=0.6, noise=10.0, offset=20.0, border=2, gain=0.03,
        ),
        validate_every=500, validation_pairs=32,
    )  # fmt: skip


def many() -> TrainConfig:
    """Return `few` for some twenty volumes and every kind of lesion; no weights of it ship yet.

    Departs from `few`: the mixture of lesions `lung_disease`; slices of up to 10 mm; a network with features
    at full resolution and a faster activation.
    """
    return replace(
        few(),
        model=replace(few().model, activation="leakyrelu", head=4),
        iterations=2000, learning_rate=2e-3,
        lesions="lung_disease",
        thick_mm=(3.0, 10.0),
    )  # fmt: skip


def lungs() -> TrainConfig:
    """Return what the shipped lung network was trained with: two hours on two CPU cores.

    Samples are whole chests on a coarse grid (`normnet.prepare.network`), so voxels are 3 mm of an adult.
    """
    return TrainConfig(
        task="lungs", output=Path("runs/lungs"),
        model=ModelConfig(channels=(16, 32, 64, 128, 128), strides=(2, 2, 2, 2), outputs=2),
        slab=64, crop=112, batch_size=2, mirror=True,
        iterations=12_000, learning_rate=1e-3, schedule="cosine", average=0.995,
        thick_slices=0.35, thick_mm=(4.0, 10.0),
        augment=AugmentConfig(rotate=15.0, zoom=0.35, blur=1.2, noise=80.0, offset=40.0, gain=0.05),
        validate_every=500, validation_pairs=16, held_out=1,
        phantoms=3, phantom_shape=(96, 96, 128), phantom_spacing=(3.0, 3.0, 3.0),
    )  # fmt: skip


def phantom() -> TrainConfig:
    """Return the embedded default: `laptop` for four minutes on the built-in phantom."""
    return replace(laptop(), minutes=4.0, phantoms=4, phantom_shape=(64, 320, 400))


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "paper": paper, "laptop": laptop, "few": few, "many": many, "lungs": lungs, "phantom": phantom,
}  # fmt: skip
"""Every preset, by the name the command line uses."""
