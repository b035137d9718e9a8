"""The network, and weights as safetensors with their configuration: loading runs no code."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from monai.networks.nets import UNet
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from normnet.config import PAPER_PROBABILITY, PAPER_THRESHOLD_HU, WEIGHTS, ModelConfig, Probability, from_json

EXPORTED = "model-*.safetensors"
"""Names of weights that `normnet.export` writes."""
HEADER = "normnet"
"""Key of the safetensors header that holds architecture and calibration, as JSON."""
BUNDLED = Path(__file__).parent / "weights"
"""Weights that ship with the package."""
Calibration = dict[str, float]
"""What a model found best on synthetic pairs of its held-out volumes: threshold ``probability``, ``dice``."""


def build_unet(config: ModelConfig) -> torch.nn.Module:
    """Build the network: (b, 1, z, y, x) image in, (b, 1, z, y, x) logit of "healthy bright tissue" out."""
    network: torch.nn.Module = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
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
    threshold_hu, inflation_hu, probability
        As in `normnet.config.TrainConfig`.
    """
    header = {
        "model": dataclasses.asdict(config),
        "calibration": calibration,
        "threshold_hu": threshold_hu,
        "inflation_hu": inflation_hu,
        "probability": probability,
    }
    # one key: safetensors writes several in any order, and equal models shall be equal files
    write_tensors(path, model.state_dict(), {HEADER: json.dumps(header)})


def load_model(path: str | os.PathLike[str]) -> torch.nn.Module:
    """Load a network for prediction.

    Parameters
    ----------
    path : path
        A run folder, or a weights file written by `save_model`.

    Returns
    -------
    torch.nn.Module
        In evaluation mode, in float32 on the CPU; `model.config` is its `ModelConfig`, `model.calibration`
        its `Calibration`, or None where training had no held-out volume; `model.threshold_hu`,
        `model.inflation_hu` and `model.probability` are those of training, see `normnet.config.TrainConfig`.

    Raises
    ------
    ValueError
        There are no weights at `path`, or they are not ours.
    """
    file = weights_file(Path(path))
    tensors, metadata = read_tensors(file)
    if HEADER not in metadata:
        raise ValueError(f"{file}: not a normnet model (its header names no architecture)")
    header = json.loads(metadata[HEADER])
    config = from_json(ModelConfig, json.dumps(header["model"]))
    model = build_unet(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{file}: weights do not fit the architecture in the header: {error}") from error
    # nn.Module types every attribute as a tensor or a module
    model.config = config  # type: ignore[assignment]
    model.calibration = header["calibration"]
    model.threshold_hu = float(header.get("threshold_hu", PAPER_THRESHOLD_HU))  # type: ignore[assignment]
    model.inflation_hu = header.get("inflation_hu")
    model.probability = header.get("probability", PAPER_PROBABILITY)
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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # tempfile would keep it private
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file and the metadata of its header.

    Raises
    ------
    ValueError
        The file is missing, truncated or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
