"""`Model`: a network with what its use needs, in a safetensors file: loading runs no code.

``python -m normnet.model RUNS... --output FOLDER`` makes small weights to ship.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Self, TypeVar

import numpy as np
import torch
import tyro
from monai.networks.nets import UNet
from safetensors.torch import load, save

from lesionsynth.commands import one_line, run
from lesionsynth.files import claimed, refuse_foreign, same_file, sha256, write_atomically
from lesionsynth.strict import build, hints_of, name_of, parse_json, read_bytes, read_json, shown
from normnet.config import (
    BUNDLED,
    OUTPUTS,
    PAPER_PROBABILITY,
    PAPER_THRESHOLD_HU,
    WEIGHTS,
    HealthyHU,
    ModelConfig,
    Probability,
    Task,
    ThresholdHU,
    model_name,
)
from normnet.device import use_bf16
from normnet.settings import naming, settings

Built = TypeVar("Built")
Calibration = dict[str, float]
"""What a model found best on synthetic pairs of its held-out volumes: threshold ``probability``, ``dice``."""
Tensors = dict[str, torch.Tensor]
HEADER = "normnet"
"""Key of the safetensors metadata that holds architecture and settings, as JSON."""
MOST_FILE, MOST_HEADER = 2**30, 2**22
"""Longest file, twice the largest network in float32, and longest header, which names every tensor; bytes."""
LARGEST, HALF = 1e9, torch.finfo(torch.float16).max
"""Largest weight, far beyond those of a network that was trained; and largest in half precision."""
EXPORTED, RECORD, FORMAT = "model-*.safetensors", "export.json", "normnet.export"
"""Exported weights; the file that lists them with their SHA-256; what it says it is."""


@settings
class _Header:
    """What a file says of its model; the first ones end with the calibration."""

    model: ModelConfig
    calibration: Calibration | None
    threshold_hu: ThresholdHU = PAPER_THRESHOLD_HU
    inflation_hu: HealthyHU | None = None
    probability: Probability = PAPER_PROBABILITY
    task: Task = "lesions"


@dataclass(eq=False)
class Model:
    """A network with T, inflation, calibration and threshold; `ValueError` where these are out of domain."""

    network: torch.nn.Module = field(repr=False)
    """(n, 1, z, y, x) images to (n, outputs, z, y, x) logits."""
    config: ModelConfig
    """Its architecture."""
    task: Task = "lesions"
    """What it learned."""
    threshold_hu: float = PAPER_THRESHOLD_HU
    """T in HU: it answers for tissue at or above it."""
    inflation_hu: float | None = None
    """Density in HU that it expects of healthy lung, if any (`normnet.inflation`)."""
    calibration: Calibration | None = None
    """None where training had no held-out volume."""
    probability: Probability = PAPER_PROBABILITY
    """Threshold that it votes with unless prediction is given one: a number, or "calibrated"."""
    name: str = ""
    """Of its run, or of its file."""
    sha256: str = ""
    """Of the file that it was read from, in hexadecimal."""
    bf16: bool = field(default=False, init=False)
    """Whether it computes in bfloat16; see `to`."""

    def __post_init__(self) -> None:
        """Refuse what no file may say, and make NumPy's numbers Python's."""
        if self.config.outputs != OUTPUTS.get(self.task):
            raise ValueError(f"model.outputs must fit the task {self.task}, got {self.config.outputs}")
        check_calibration(self.calibration)
        header = self._header()
        self.threshold_hu, self.inflation_hu = header.threshold_hu, header.inflation_hu
        self.probability = header.probability

    @classmethod
    def load(cls, path: str | os.PathLike[str], task: Task = "lesions") -> Self:
        """Read the model of a run folder or weights file, in evaluation mode, in float32 on the CPU.

        `ValueError` where there are no weights at `path`, or they are not ours, or of another task.
        """
        file = weights_file(Path(path))
        tensors, metadata = read_tensors(file)
        with naming(file):
            header = dict(vars(read_header(metadata, HEADER, _Header)))
            with torch.device("meta"):  # no memory before all is known to fit
                network = build_unet(config := header.pop("model")).eval()
            model = cls(network, config, **header, name=model_name(file), sha256=sha256(file))
            if model.task != task:
                raise ValueError(f"the model's task must be {task}, got {model.task}")
            network.load_state_dict(fitted(tensors, network.state_dict()), assign=True)
        return model

    def save(self, path: Path) -> None:
        """Write it, atomically; equal models are equal files."""
        self._write(path, self.network.state_dict())

    def export(self, path: Path) -> None:
        """Write it in half precision, which moves a probability by less than 0.001.

        `ValueError` where a weight is too large.
        """
        self._write(path, self._halved())

    def threshold(self, probability: Probability | None = None) -> float:
        """Return the probability above which a voxel is healthy: as asked for, else as training settled.

        `ValueError` where that is "calibrated", and the model is not.
        """
        wanted = self.probability if probability is None else probability
        if not isinstance(wanted, str):
            return wanted
        if self.calibration is None:
            raise ValueError("probability: this model carries no calibration (no volumes were held out)")
        return self.calibration["probability"]

    def to(self, device: torch.device | str, precision: str = "auto") -> Self:
        """Move the network to where it shall predict, and choose its arithmetic: auto, fp32 or bf16."""
        self.bf16 = use_bf16(precision, torch.device(device))
        self.network.to(device)
        if self.bf16:  # the layout bf16 convolutions are fastest in
            self.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return self

    @torch.inference_mode()
    def healthy_probability(self, slab: torch.Tensor) -> torch.Tensor:
        """Ask the network, in evaluation mode and without gradients.

        Parameters
        ----------
        slab : (n, 1, z, y, x) float tensor
            Windowed lungs, on the network's device; axes are multiples of ``config.multiple``.

        Returns
        -------
        (n, outputs, z, y, x) float32 tensor
            Of healthy tissue; for the task lungs, of right and left lung.
        """
        with torch.autocast(slab.device.type, torch.bfloat16, enabled=self.bf16):
            logits: torch.Tensor = self.network.eval()(slab)
        return torch.sigmoid(logits.float())

    def _header(self) -> _Header:
        given = {name: getattr(self, name) for name in hints_of(_Header) if name != "model"}
        return _Header(model=self.config, **given)

    def _write(self, path: Path, tensors: Tensors) -> None:
        # one key: safetensors writes several in any order
        write_tensors(path, tensors, {HEADER: json.dumps(asdict(self._header()))})

    def _halved(self) -> Tensors:
        halved = self.network.state_dict()
        for name, tensor in halved.items():
            if not tensor.is_floating_point():
                continue
            if (largest := float(tensor.abs().max())) <= HALF:
                halved[name] = tensor.half()
            elif not name.endswith(("running_mean", "running_var")):  # statistics may stay as they are
                raise ValueError(f"weights must be within half precision, got {largest:g}")
        return halved


def check_calibration(found: Calibration | None, name: str = "calibration") -> None:
    """Raise `ValueError` unless this is None or a calibration."""
    if found is not None and not (
        found.keys() == {"probability", "dice"} and 0 < found["probability"] < 1 and 0 <= found["dice"] <= 1
    ):
        rule = "have a probability in (0, 1) and a dice in [0, 1]"
        raise ValueError(f"{name} must {rule}, got {shown(found)}")


def build_unet(config: ModelConfig) -> torch.nn.Module:
    """Build the network: (b, 1, z, y, x) image in, (b, outputs, z, y, x) logits out.

    One output is the logit of "healthy bright tissue"; two are those of right and left lung.
    """
    network: torch.nn.Module = UNet(
        3, 1, config.head or config.outputs, config.channels, config.strides,
        num_res_units=config.residual_units, norm=config.norm, act=config.activation,
    )  # fmt: skip
    return (
        torch.nn.Sequential(network, torch.nn.Conv3d(config.head, config.outputs, 1))
        if config.head
        else network
    )


def bundled_models() -> list[Path]:
    """Return the weights that ship with the package, an ensemble; `ValueError` where this build has none."""
    if found := sorted(BUNDLED.glob(EXPORTED)):
        return found
    raise ValueError("models must be given: this build of normnet ships no weights")


def weights_file(path: Path) -> Path:
    """Return the weights of a run folder, or `path` itself; `ValueError` where there are none."""
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: models must be weights files or run folders with {WEIGHTS}")
    return file


def find_models(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the weights of run folders, folders of runs (an ensemble), exported folders and files.

    `ValueError` where a path holds none, or no path is given.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        runs = sorted(path.glob(f"*/{WEIGHTS}")) or sorted(path.glob(EXPORTED))
        found += runs if runs and not (path / WEIGHTS).exists() else [weights_file(path)]
    if not found:
        raise ValueError("models must name at least one weights file or run folder, got none")
    return found


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file beside its place and rename it: a reader sees the old file or the new one."""
    content = save({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, dict(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def read_tensors(path: Path, most: int = MOST_FILE) -> tuple[Tensors, dict[str, str]]:
    """Read a safetensors file of at most `most` bytes, and its metadata; `ValueError` for any other file."""
    content = read_bytes(path, most)
    size = int.from_bytes(content[:8], "little")
    try:
        if MOST_HEADER < size < len(content):
            raise ValueError(f"its header must have at most {MOST_HEADER} bytes, got {size}")
        return load(content), parse_json(content[8 : 8 + size].decode()).get("__metadata__") or {}
    except Exception as error:  # the library has many kinds
        pickled = size > len(content) and content.startswith((b"PK", b"\x80"))
        hint = " (a pickle, which may run code, is not read)" if pickled else ""
        said = f"not a readable safetensors file{hint}: {one_line(error)[:300]}"
        raise ValueError(f"{name_of(path)}: {said}") from error


def read_header(metadata: Mapping[str, str], key: str, cls: type[Built]) -> Built:
    """Read what metadata hold under `key` as a dataclass, which knows where NaN may be; or `ValueError`."""
    if key not in metadata:
        raise ValueError(f"another kind of file: its header lacks the key {key!r}")
    return build(cls, parse_json(metadata[key], nan=True), "header")


def fitted(tensors: Tensors, wanted: Tensors) -> Tensors:
    """Return the tensors of a file, in float32 and int64, if they are those of a network or an optimiser.

    `ValueError` where names, shapes or kinds are not those of `wanted`, which may be on the device "meta"; or
    where a number is NaN, infinite, beyond `LARGEST`, or negative though it counts or is a variance.
    """
    found, unfit = Tensors(), "weights do not fit the architecture in the header"
    for name in sorted(tensors.keys() ^ wanted.keys()):
        rule = "must not be there" if name in tensors else "is missing"
        raise ValueError(f"tensor {name_of(name)[:200]} {rule}: {unfit}")
    for name, tensor in tensors.items():
        here, shape = f"tensor {name_of(name)[:200]} must", tuple(wanted[name].shape)
        real = wanted[name].is_floating_point()
        kinds = (torch.float32, torch.float16, torch.bfloat16) if real else (torch.int64,)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{here} have the shape {shape}: {unfit}, got {shown(tuple(tensor.shape))}")
        if tensor.dtype not in kinds:
            raise ValueError(f"{here} be {' or '.join(map(str, kinds))}, got {tensor.dtype}")
        # NumPy's conversion: torch wakes all its threads for every one of these small tensors
        values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        values = values.astype(np.float32 if real else np.int64)
        counts = not real or name.endswith(".step")
        most = 2.0**53 if counts else LARGEST
        least = 0.0 if counts or name.endswith(("running_var", "exp_avg_sq")) else -most
        low, high = (values.min(), values.max()) if values.size else (least, most)
        if not least <= low <= high <= most:  # nor is NaN
            raise ValueError(f"{here} be in [{least:g}, {most:g}], got {low:g} to {high:g}")
        found[name] = torch.from_numpy(values)
    return found


def export_models(
    runs: Annotated[Sequence[Path], tyro.conf.Positional],
    output: Path,
    probability: Probability | None = None,
    task: Task = "lesions",
) -> list[Path]:
    """Write the weights of runs in half precision, one file each: model-0.safetensors and so on.

    `ValueError` where models do not go together or into half precision; nothing is written then.

    Parameters
    ----------
    runs : sequence of Path
        Run folders, folders of runs (an ensemble) or weights files.
    output : Path
        Folder for them, as `normnet.predict --models` takes; only an earlier export is replaced in it.
    probability : float or "calibrated", optional
        Threshold that they vote with (`Model.probability`); that of training where omitted.
    task : {"lesions", "lungs"}
        What they learned; of lungs, one run is taken.
    """
    files, models = find_models(runs), list[Model]()
    if task == "lungs" and len(files) > 1:
        raise ValueError(f"runs must be one for the task lungs, which nothing votes on, got {len(files)}")
    for file in files:
        model = Model.load(file, task)
        models.append(model if probability is None else replace(model, probability=probability))
        with naming(file):
            models[-1].threshold()
            models[-1]._halved()
    for name in ("threshold_hu", "inflation_hu"):
        if len(levels := sorted({str(getattr(model, name)) for model in models})) > 1:
            rule = f"runs must have one {name}, as their models vote together"
            raise ValueError(f"{rule}, got {', '.join(levels)}")
    names = [f"model-{number}.safetensors" for number in range(len(models))]
    refuse_foreign(output, (), ours=False, maker="an export")  # a file in its place
    output.mkdir(parents=True, exist_ok=True)
    with claimed(output):
        earlier = _earlier(output, files)
        # until all is done: a call that is killed leaves no file that the next one could not tell
        _record(output, dict.fromkeys([*names, *earlier]))
        for name, model in zip(names, models, strict=True):
            model.export(output / name)
        for name in earlier - set(names):  # an earlier, larger ensemble's would vote
            (output / name).unlink(missing_ok=True)
        _record(output, {name: sha256(output / name) for name in names})
    return [output / name for name in names]


def _record(output: Path, digests: Mapping[str, str | None]) -> None:
    write_atomically(output / RECORD, json.dumps({"format": FORMAT, "files": digests}, indent=2) + "\n")


def _earlier(output: Path, inputs: Sequence[Path]) -> set[str]:
    """Return the files of an earlier export; `ValueError` where weights of others or an input are there."""
    names, record = {path.name for path in output.glob(EXPORTED)}, None
    with suppress(OSError, ValueError, KeyError, TypeError):  # it is none of ours
        found = read_json(output / RECORD)
        record = dict(found["files"]) if found["format"] == FORMAT else None
    refuse_foreign(output, (RECORD,), ours=record is not None, maker="an export")
    known = record or {}
    for name in sorted(names):
        refuse_foreign(output, (name,), ours=name in known, maker="an export")
        if any(same_file(output / name, file) for file in inputs):
            raise ValueError(f"output must not replace an input, got {output} for {output / name}")
        if known[name] not in (None, sha256(output / name)):
            raise ValueError(f"output holds {name}, changed since it was exported: move it away")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when done, 2 for bad input."""

    def body() -> int:
        for path in tyro.cli(export_models, args=argv, prog="normnet.model"):
            print(f"{name_of(path)}: {path.stat().st_size / 1e6:.1f} MB")
        return 0

    return run("normnet.model", body)


if __name__ == "__main__":
    sys.exit(main())
