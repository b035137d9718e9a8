"""Command line of `normnet.baselines`: train a method, or predict with it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from lesionsynth.commands import plainly, run
from lesionsynth.strict import name_of
from normnet.baselines.config import METHODS, PRESETS, BaselineConfig, Method
from normnet.baselines.predict import BaselinePredictArgs, predict
from normnet.baselines.train import train_baseline
from normnet.settings import settings

PROGRAM = "python -m normnet.baselines"
HELP = """Train a comparison method of the paper (IV-C, Table III) on healthy slices.

`python -m normnet.baselines NAME [--data STORE] [--output RUN]` trains; `python -m normnet.baselines predict
RUN IN... --output MAPS` maps anomalies, for `python -m normnet.evaluate`. Numbers in brackets are the paper's
sections; --preset paper gives its values.

Exit status: 0 when done, 1 when training failed on the way, 2 for a wrong call."""


@settings
class TrainArgs(BaselineConfig):
    """What the command takes: `BaselineConfig` and a preset."""

    method: Annotated[Method, tyro.conf.Positional]
    """Which of the ten detectors."""
    preset: Literal["small", "paper"] = "small"
    """Defaults of the other flags: minutes on a CPU, or the paper's."""


def parse(argv: Sequence[str]) -> BaselineConfig:
    """Read the command line of training; the preset gives the defaults that the other flags change.

    Raises
    ------
    ValueError
        A value is out of its range.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="small")
    preset = early.parse_known_args(list(argv))[0].preset
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    asks_help = "--help" in argv or "-h" in argv
    method = next((name for name in METHODS if argv and argv[0] == name), METHODS[0] if asks_help else None)
    if method is None:
        first = repr(argv[0]) if argv else "nothing"
        raise ValueError(f"NAME must come first and be predict or one of {', '.join(METHODS)}, got {first}")
    base = PRESETS[preset](method)
    given = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    default = TrainArgs(**given, preset=preset)
    args = tyro.cli(TrainArgs, args=list(argv), default=default, prog=PROGRAM, description=HELP)
    return BaselineConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(BaselineConfig)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)

    def body() -> int:
        if argv[:1] == ["predict"]:
            return _predict(argv[1:])
        result = train_baseline(parse(argv), progress_bar=True)
        for phase, losses in result.losses.items():
            print(f"{phase}: {len(losses)} iterations, loss {losses[0]:.4g} to {losses[-1]:.4g}")
        print(f"{result.seconds:.0f} s; threshold {result.baseline.calibration['threshold']:.4f}")
        print(f"weights: {name_of(result.weights)}")
        return 0

    return run("normnet.baselines", body, failed=(FloatingPointError,))


def _predict(argv: Sequence[str]) -> int:
    args = tyro.cli(BaselinePredictArgs, args=argv, prog=f"{PROGRAM} predict")
    with plainly():
        summary = predict(args, progress_bar=True)
    return summary.tell("normnet.baselines", args.output)


if __name__ == "__main__":
    sys.exit(main())
