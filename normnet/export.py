"""Make small weights to ship of trained runs: ``python -m normnet.export RUNS... --output FOLDER``.

Half precision: a weight keeps 11 bits, which moves a probability by less than a thousandth.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from lesionsynth.commands import run
from lesionsynth.files import claimed, refuse_foreign, same_file, write_atomically
from lesionsynth.strict import name_of
from normnet.config import PredictConfig, Probability, Task
from normnet.model import EXPORTED, find_models, load_model, save_model
from normnet.predict import healthy_threshold
from normnet.records import sha256
from normnet.stage import load
from normnet.strict_json import dumps

RECORD = "export.json"
"""Names the weights of the last export, with their SHA-256: no others are replaced or removed."""
FORMAT = "normnet.export"
HALF = torch.finfo(torch.float16).max
"""Largest number of half precision."""


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Write the weights of runs in half precision, one file each: model-0.safetensors and so on."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, folders of runs (an ensemble) or weights files."""
    output: Path
    """Folder for them, which `normnet.predict --models` takes; an earlier export in it, as its export.json
    tells, is replaced, other weights are not."""
    probability: Probability | None = None
    """Threshold that they shall vote with unless prediction is given one: a number, such as the best of the
    ensemble on synthetic lesions (docs/postprocess_sweep.py), or "calibrated", each its own; that of training
    where omitted."""
    task: Task = "lesions"
    """What they learned. Of lungs, one run is taken, and becomes model-0.safetensors."""


def export(
    runs: Sequence[Path], output: Path, probability: Probability | None = None, task: Task = "lesions"
) -> list[Path]:
    """Write weights in half precision, architecture and calibration with them.

    Parameters
    ----------
    runs : sequence of Path
        As `normnet.model.find_models` takes.
    output : Path
        Folder; made where it is missing.
    probability : float or "calibrated", optional
        Threshold that the models vote with unless prediction is given one; that of training where omitted.
    task : {"lesions", "lungs"}
        What they learned.

    Returns
    -------
    list of Path
        The files, which `normnet.model.load_model` reads.

    Raises
    ------
    ValueError
        There are no weights in `runs`, or several of lungs; a weight does not fit half precision, or the
        models were trained for another task, or for different T or inflations; `probability` is not in
        (0, 1), or a model is not calibrated; `output` holds weights that no export wrote, or an input.
        Nothing is written.
    """
    usage = PredictConfig(probability=probability)
    models: list[Any] = []
    files = find_models(runs)
    if task == "lungs" and len(files) > 1:
        raise ValueError(f"runs must be one for the task lungs, which nothing votes on, got {len(files)}")
    for file in files:
        model: Any = load_model(file, task)
        largest = max(float(weight.detach().abs().max()) for weight in model.parameters())
        if largest > HALF:
            raise ValueError(f"{file}: weights must be within half precision, got {largest:g}")
        try:
            healthy_threshold(model, usage)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        models.append(model)
    for name in ("threshold_hu", "inflation_hu"):
        found = {getattr(model, name) for model in models}
        if len(found) > 1:
            shown = ", ".join(sorted(map(str, found)))
            raise ValueError(f"runs must have one {name}, as their models vote together, got {shown}")
    names = [f"model-{number}.safetensors" for number in range(len(models))]
    _check_output(output, files)
    output.mkdir(parents=True, exist_ok=True)
    with claimed(output):
        earlier = _check_output(output, files)
        # until all is done: a call that is killed leaves no file that the next one could not tell
        _record(output, dict.fromkeys([*names, *earlier]))
        for name, model in zip(names, models, strict=True):
            save_model(
                output / name,
                _halved(model),
                model.config,
                model.calibration,
                threshold_hu=model.threshold_hu,
                inflation_hu=model.inflation_hu,
                probability=model.probability if probability is None else probability,
                task=task,
            )
        for name in earlier.keys() - set(names):  # an earlier, larger ensemble's would vote
            (output / name).unlink(missing_ok=True)
        _record(output, {name: sha256(output / name) for name in names})
    return [output / name for name in names]


def _halved(model: torch.nn.Module) -> torch.nn.Module:
    """Halve weights, and statistics of batch normalisation as far as they fit."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and float(tensor.detach().abs().max()) <= HALF:
            tensor.data = tensor.data.half()
    return model


def _record(output: Path, digests: Mapping[str, str | None]) -> None:
    write_atomically(output / RECORD, dumps({"format": FORMAT, "files": digests}))


def _check_output(output: Path, inputs: Sequence[Path]) -> dict[str, str | None]:
    """Return the files of an earlier export with their digests; refuse those of others, and inputs.

    Raises
    ------
    ValueError
        Weights are there that no export wrote, or that were changed since; or an input is among them.
    """
    refuse_foreign(output, (), ours=False, maker="an export")  # a file in its place
    record = load(output / RECORD)
    listed = record.get("files") if isinstance(record, dict) and record.get("format") == FORMAT else None
    files = listed if isinstance(listed, dict) else {}
    refuse_foreign(output, (RECORD,), ours=isinstance(listed, dict), maker="an export")
    for path in sorted(output.glob(EXPORTED)):
        refuse_foreign(output, (path.name,), ours=path.name in files, maker="an export")
        if any(same_file(path, file) for file in inputs):
            raise ValueError(f"output must not replace an input, got {output} for {path}")
        if files[path.name] not in (None, sha256(path)):
            raise ValueError(f"output holds {path.name}, changed since it was exported: move it away")
    return {path.name: files[path.name] for path in sorted(output.glob(EXPORTED))}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when done, 2 for bad input."""

    def body() -> int:
        args = tyro.cli(ExportArgs, args=argv, prog="normnet.export", description=__doc__)
        for path in export(args.runs, args.output, args.probability, args.task):
            print(f"{name_of(path)}: {path.stat().st_size / 1e6:.1f} MB")
        return 0

    return run("normnet.export", body)


if __name__ == "__main__":
    sys.exit(main())
