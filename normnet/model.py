"""The network, and weights as safetensors with their configuration: loading runs no code."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from monai.networks.nets import UNet
from safetensors import SafetensorError
from safetensors.torch import load, save

from lesionsynth.files import write_atomically
from lesionsynth.strict import build, name_of, parse_json, read_bytes, regular_file, shown
from normnet.config import (
    BUNDLED,
    OUTPUTS,
    PAPER_PROBABILITY,
    PAPER_THRESHOLD_HU,
    WEIGHTS,
    ModelConfig,
    Probability,
    Task,
    TrainConfig,
)

Built = TypeVar("Built")
Network = TypeVar("Network", bound=torch.nn.Module)

EXPORTED = "model-*.safetensors"
"""Names of weights that `normnet.export` writes."""
HEADER = "normnet"
"""Key of the safetensors header that holds architecture and calibration, as JSON."""
PROGRESS = "progress"
"""The same key of a run's state, which `normnet.trainer` writes."""
Calibration = dict[str, float]
"""What a model found best on synthetic pairs of its held-out volumes: threshold ``probability``, ``dice``."""


def build_unet(config: ModelConfig) -> torch.nn.Module:
    """Build the network: (b, 1, z, y, x) image in, (b, outputs, z, y, x) logits out.

    One output is the logit of "healthy bright tissue"; two are those of right and left lung.
    """
    network: torch.nn.Module = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=config.outputs,
        channels=config.channels,
        strides=config.strides,
        num_res_units=config.residual_units,
        norm=config.norm,
    )
    return network


def save_model(
    path: Path,
    model: torch.nn.Module,
    config: ModelConfig,
    calibration: Calibration | None = None,
    *,
    threshold_hu: float = PAPER_THRESHOLD_HU,
    inflation_hu: float | None = None,
    probability: Probability = PAPER_PROBABILITY,
    task: Task = "lesions",
) -> None:
    """Write weights, architecture, calibration, and what training settled for prediction, atomically.

    Parameters
    ----------
    path : Path
        File to write.
    model : torch.nn.Module
        The network.
    config : ModelConfig
        Its architecture.
    calibration : Calibration, optional
        From synthetic pairs.
    threshold_hu, inflation_hu, probability, task
        As in `normnet.config.TrainConfig`.
    """
    header = {
        "model": dataclasses.asdict(config),
        "calibration": calibration,
        "threshold_hu": threshold_hu,
        "inflation_hu": inflation_hu,
        "probability": probability,
        "task": task,
    }
    # one key: safetensors writes several in any order, and equal models shall be equal files
    write_tensors(path, model.state_dict(), {HEADER: json.dumps(header)})


@dataclass(frozen=True, kw_only=True)
class _Calibrated:
    """`Calibration` as a header holds it."""

    probability: float
    dice: float

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1 or not 0 <= self.dice <= 1:
            raise ValueError(
                f"calibration must have a probability in (0, 1) and a dice in [0, 1], got {self.probability} "
                f"and {self.dice}"
            )


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What the header of a weights file says; files of the first version end with the calibration."""

    model: ModelConfig
    calibration: _Calibrated | None
    threshold_hu: float = PAPER_THRESHOLD_HU
    inflation_hu: float | None = None
    probability: Probability = PAPER_PROBABILITY
    task: Task = "lesions"

    def __post_init__(self) -> None:
        # a run's own domains, where each is explained
        TrainConfig(
            threshold_hu=self.threshold_hu, inflation_hu=self.inflation_hu, probability=self.probability
        )
        if self.task not in OUTPUTS or self.model.outputs != OUTPUTS[self.task]:
            raise ValueError(f"model.outputs must fit the task {self.task}, got {self.model.outputs}")


def load_model(path: str | os.PathLike[str], task: Task = "lesions") -> torch.nn.Module:
    """Load a network for prediction.

    Parameters
    ----------
    path : path
        A run folder, or a weights file written by `save_model`.
    task : {"lesions", "lungs"}
        What it must have learned.

    Returns
    -------
    torch.nn.Module
        In evaluation mode, in float32 on the CPU; `model.config` is its `ModelConfig`, `model.calibration`
        its `Calibration`, or None where training had no held-out volume; `model.threshold_hu`,
        `model.inflation_hu` and `model.probability` are those of training, see `normnet.config.TrainConfig`.

    Raises
    ------
    ValueError
        There are no weights at `path`, or they are not ours, or of another task.
    """
    file = weights_file(Path(path))
    stored = TensorFile.open(file)
    header = stored.header(HEADER, _Header, "normnet model (its header names no architecture)")
    if header.task != task:
        raise ValueError(f"{name_of(file)}: the model's task must be {task}, got {header.task}")
    model = fill(stored, lambda: build_unet(header.model))
    # nn.Module types every attribute as a tensor or a module
    model.config = header.model  # type: ignore[assignment]
    found = header.calibration
    model.calibration = None if found is None else dataclasses.asdict(found)  # type: ignore[assignment]
    model.threshold_hu = header.threshold_hu  # type: ignore[assignment]
    model.inflation_hu = header.inflation_hu  # type: ignore[assignment]
    model.probability = header.probability  # type: ignore[assignment]
    return model.eval()


def bundled_models() -> list[Path]:
    """Return the weights that ship with the package, an ensemble.

    Raises
    ------
    ValueError
        This build ships none.
    """
    found = sorted(BUNDLED.glob(EXPORTED))
    if not found:
        raise ValueError("models must be given: this build of normnet ships no weights")
    return found


def weights_file(path: Path) -> Path:
    """Return the weights file of a run folder, or `path` itself.

    Raises
    ------
    ValueError
        There is none.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: models must be weights files or run folders with {WEIGHTS}")
    return file


def find_models(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the weights files of run folders, folders of runs (an ensemble), exported folders and files.

    Raises
    ------
    ValueError
        A path holds no model, or no path is given.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        inside: list[Path] = []
        if path.is_dir() and not (path / WEIGHTS).exists():
            inside = sorted(path.glob(f"*/{WEIGHTS}")) or sorted(path.glob(EXPORTED))
        found += inside or [weights_file(path)]
    if not found:
        raise ValueError("models must name at least one weights file or run folder, got none")
    return found


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file beside its place and rename it: a reader sees the old file or the new one."""
    content = save({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, dict(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


MOST_HEADER = 2**22
"""Longest header of a safetensors file in bytes; that of five bundled networks takes 0.02 million."""
MOST_TENSORS = 2**14
"""Tensors of a file; the state of a run with the largest network has some thousands."""
MOST_FILE = 2**32
"""Longest safetensors file in bytes."""
LARGEST = 1e9
"""Largest weight: far beyond those of a network that was trained, and far from where float32 ends."""
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}
"""Types of tensors that a file of ours may hold, by the name in a header, with the size of an element."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class TensorFile:
    """A safetensors file whose header was checked: nothing was allocated for its tensors yet.

    Attributes
    ----------
    path : Path
    entries : dict
        Type and shape of every tensor, by name.
    metadata : dict of str to str
    """

    def __init__(self, path: Path, head: bytes, size: int) -> None:
        self.path, self._head, self._size = path, head, size
        self.entries, self.metadata = self._parse()

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header of a file.

        Raises
        ------
        ValueError
            It is missing, no regular file, truncated, too long, or of another kind; the message names it.
        """
        try:
            with regular_file(path, MOST_FILE) as (stream, size):
                head = stream.read(8)
                head += stream.read(min(int.from_bytes(head, "little"), MOST_HEADER))
        except OSError as error:
            raise ValueError(f"{name_of(path)}: not a readable safetensors file: {error}") from error
        return cls(path, head, size)

    def header(self, key: str, cls: type[Built], what: str) -> Built:
        """Read the JSON that the metadata holds under `key`, its only one, as a dataclass.

        Raises
        ------
        ValueError
            There is none, or it is something else; the message names file and field.
        """
        if key not in self.metadata:
            raise ValueError(f"{name_of(self.path)}: not a {what}")
        if others := sorted(self.metadata.keys() - {key, "format"}):
            raise ValueError(
                f"{name_of(self.path)}: the header must hold {key} alone, got {shown(others[0])}"
            )
        try:
            record = parse_json(self.metadata[key], nan=key == PROGRESS)
            return build(cls, record, "header")
        except ValueError as error:
            raise ValueError(f"{name_of(self.path)}: {error}") from error

    def expect(self, tensors: Mapping[str, torch.Tensor], *, missing_ok: bool = False) -> None:
        """Compare with what a network or an optimiser holds; tensors may be without memory.

        Raises
        ------
        ValueError
            A tensor is missing, unknown, or has another shape or another kind of number.
        """
        for name in sorted(tensors.keys() ^ self.entries.keys()):
            if name in self.entries:
                raise self._wrong(
                    name, "must not be there: weights do not fit the architecture in the header"
                )
            if not missing_ok:
                raise self._wrong(name, "is missing: weights do not fit the architecture in the header")
        for name, entry in self.entries.items():
            shape = tuple(tensors[name].shape)
            if entry.shape != shape:
                raise self._wrong(
                    name,
                    f"must have the shape {shape}: weights do not fit the architecture in the header, got "
                    f"{shown(entry.shape)}",
                )
            real = tensors[name].is_floating_point()
            if (entry.dtype in ("F32", "F16", "BF16")) != real or entry.dtype == "F64":
                rule = "F32, F16 or BF16" if real else "I64"
                raise self._wrong(name, f"must be of type {rule}, got {entry.dtype}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors in float32 and int64, after `expect`.

        Raises
        ------
        ValueError
            A number is NaN, infinite or beyond `LARGEST`, or negative where it counts or is a variance; or
            the file was changed since its header was read.
        """
        try:
            content = read_bytes(self.path, MOST_FILE)
            if len(content) != self._size or not content.startswith(self._head):
                raise ValueError("it was changed while it was read")
            found = load(content)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name_of(self.path)}: not a readable safetensors file: {error}") from error
        for name, tensor in found.items():
            # NumPy's conversion: torch wakes all its threads for every one of these small tensors
            values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
            values = values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
            found[name] = torch.from_numpy(values)
            if not values.size:
                continue
            low, high = float(values.min()), float(values.max())
            positive = name.endswith(("running_var", "num_batches_tracked", "step", "exp_avg_sq"))
            limit = LARGEST if tensor.is_floating_point() and not name.endswith(".step") else float(2**53)
            least = 0.0 if positive else -limit
            if not least <= low <= high <= limit:  # NaN is the least and the largest of what it is in
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise self._wrong(name, "must be finite, got NaN or infinity")
                raise self._wrong(name, f"must be in [{least:g}, {limit:g}], got {low:g} to {high:g}")
        return found

    def _wrong(self, name: str, rule: str) -> ValueError:
        return ValueError(f"{name_of(self.path)}: tensor {name_of(name)[:200]} {rule}")

    def _parse(self) -> tuple[dict[str, _Entry], dict[str, str]]:
        """Check what the reader would, and what it would not: one tensor a place, no byte without one."""
        head, name = self._head, name_of(self.path)
        size = int.from_bytes(head[:8], "little")
        if len(head) < 10 or not 2 <= size <= min(MOST_HEADER, self._size - 8):
            kind = (
                " (a pickle, which may run code, is not read)"
                if (head[:2] == b"PK" or head[:1] == b"\x80")
                else ""
            )
            raise ValueError(
                f"{name}: not a readable safetensors file{kind}: its header must have 2 to {MOST_HEADER} "
                f"bytes, within the file of {self._size}, got {size if len(head) >= 8 else 'none'}"
            )
        try:
            record = parse_json(head[8:].decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError(f"the header must be a JSON object, got {type(record).__name__}")
            metadata = record.pop("__metadata__", {})
            if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
                raise ValueError(f"__metadata__ must be text by name, got {shown(metadata)}")
            if len(record) > MOST_TENSORS:
                raise ValueError(f"it must have at most {MOST_TENSORS} tensors, got {len(record)}")
            entries = {key: build(_Entry, entry, shown(key)) for key, entry in record.items()}
            self._check_places(entries, self._size - len(head))
        except ValueError as error:  # UnicodeDecodeError is one
            raise ValueError(f"{name}: not a readable safetensors file: {error}") from error
        return entries, metadata

    @staticmethod
    def _check_places(entries: Mapping[str, _Entry], room: int) -> None:
        end = 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            if entry.dtype not in _BYTES:
                raise ValueError(
                    f"{shown(key)}.dtype must be one of {', '.join(_BYTES)}, got {shown(entry.dtype)}"
                )
            if len(entry.shape) > 8 or not all(0 <= n < 2**31 for n in entry.shape):
                raise ValueError(
                    f"{shown(key)}.shape must be sizes of at most 8 axes, got {shown(entry.shape)}"
                )
            start, stop = entry.data_offsets
            if start != end or stop - start != math.prod(entry.shape) * _BYTES[entry.dtype]:
                raise ValueError(
                    f"{shown(key)}.data_offsets must begin at {end} and fit the shape, got "
                    f"{shown(entry.data_offsets)}"
                )
            end = stop
        if end != room:
            raise ValueError(f"its tensors must fill the file, {room} bytes behind the header, got {end}")


def fill(stored: TensorFile, make: Callable[[], Network]) -> Network:
    """Build a network and give it the tensors of a file; it is built without memory first, and compared.

    Parameters
    ----------
    stored : TensorFile
        Weights.
    make : callable
        Returns a network.

    Returns
    -------
    torch.nn.Module
        On the CPU, in float32.

    Raises
    ------
    ValueError
        The tensors are not the network's, or not its numbers.
    """
    with torch.device("meta"):
        network = make()
    stored.expect(network.state_dict())
    network.load_state_dict(stored.tensors(), assign=True)
    return network


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file and the metadata of its header, whatever network it belongs to.

    Raises
    ------
    ValueError
        The file is missing, truncated or of another kind, or holds what is no number.
    """
    stored = TensorFile.open(path)
    return stored.tensors(), stored.metadata
