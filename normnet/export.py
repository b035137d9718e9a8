"""Make small weights to ship of trained runs: ``python -m normnet.export RUNS... --output FOLDER``.

Half precision: a weight keeps 11 bits, which moves a probability by less than a thousandth.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from normnet.config import PredictConfig, Probability
from normnet.model import EXPORTED, find_models, load_model, save_model
from normnet.predict import healthy_threshold


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Write the weights of runs in half precision, one file each: model-0.safetensors and so on."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, folders of runs (an ensemble) or weights files."""
    output: Path
    """Folder for them, which `normnet.predict --models` takes; an earlier export in it is replaced."""
    probability: Probability | None = None
    """Threshold that they shall vote with unless prediction is given one: a number, such as the best of the
    ensemble on synthetic lesions (docs/postprocess_sweep.py), or "calibrated", each its own; that of training
    where omitted."""


def export(runs: Sequence[Path], output: Path, probability: Probability | None = None) -> list[Path]:
    """Write weights in half precision, architecture and calibration with them.

    Parameters
    ----------
    runs : sequence of Path
        As `normnet.model.find_models` takes.
    output : Path
        Folder; made where it is missing.
    probability : float or "calibrated", optional
        Threshold that the models vote with unless prediction is given one; that of training where omitted.

    Returns
    -------
    list of Path
        The files, which `normnet.model.load_model` reads.

    Raises
    ------
    ValueError
        There are no weights in `runs`, a weight does not fit half precision, or the models were trained for
        different T or inflations; `probability` is not in (0, 1), or a model is not calibrated. Nothing is
        written.
    """
    usage = PredictConfig(probability=probability)
    models: list[Any] = []
    for file in find_models(runs):
        model: Any = load_model(file)
        largest = max(float(t.abs().max()) for t in model.state_dict().values() if t.is_floating_point())
        if largest > torch.finfo(torch.float16).max:
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
    written = []
    for number, model in enumerate(models):
        path = output / f"model-{number}.safetensors"
        save_model(
            path,
            model.half(),
            model.config,
            model.calibration,
            threshold_hu=model.threshold_hu,
            inflation_hu=model.inflation_hu,
            probability=model.probability if probability is None else probability,
        )
        written.append(path)
    for path in set(output.glob(EXPORTED)) - set(written):  # an earlier, larger ensemble's would vote
        path.unlink()
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when done, 2 for bad input."""
    args = tyro.cli(ExportArgs, args=argv, prog="normnet.export", description=__doc__)
    try:
        for path in export(args.runs, args.output, args.probability):
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    except (ValueError, OSError) as error:
        print(f"normnet.export: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
