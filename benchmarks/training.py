"""``python -m benchmarks.training``: what synthesis costs a training step of MONAI's U-Net.

Steps with pairs made on the fly and with ready-made pairs take turns, in fp32 and bf16. The data, healthy
slabs or pairs, are on the device. Steps are timed one at a time, each waited for, and in a row, as a training
loop queues them: there the host draws the next plans while the device still works on the last step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

import lesionsynth as ls
from benchmarks.common import goal, goal_line, machine, slug, statistics, write_json
from benchmarks.cpu import say

RESULTS = Path(__file__).resolve().parent / "results"
CHANNELS = (16, 32, 64, 128, 256)
READY = 3
"""Ready-made batches, in turn."""
FLY, STORED, AGAIN, ALONE = "on the fly", "ready-made", "ready-made, again", "synthesis alone"
"""What is timed. The second ready-made one shows what the ratio of equals comes to: the noise."""
GOAL = 1.02
"""A step on the fly over a ready-made one, in a row."""
WARMUP = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Time, show and write; 2 where the device is not there."""
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.training: torch sees no CUDA device; try --device cpu --small", file=sys.stderr)
        return 2
    shape = (16, 64, 64) if options.small else (32, 512, 512)
    data = Data(shape, 2 if options.small else options.batch, device)
    results: dict[str, Any] = {
        "format": "lesionsynth.training-benchmark",
        "version": 2,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "machine": machine(),
        "settings": {
            "shape": shape,
            "batch": data.batch,
            "channels": CHANNELS,
            "steps": options.steps,
            "row": options.row,
            "tf32_convolutions": bool(torch.backends.cudnn.allow_tf32),
            "cuda": torch.version.cuda,
        },
        "precisions": {},
        "goals": [],
    }
    path = options.output / f"training--{slug(results['device'])}.json"
    for precision in ("bf16", "fp32"):
        say(f"training in {precision}")
        found = measure(data, precision, options.steps, options.row)
        results["precisions"][precision] = found
        ratio = found["in a row"][ratio_of(FLY)]["median"]
        results["goals"].append(goal(f"{precision}: step on the fly over ready-made, in a row", ratio, GOAL))
        write_json(results, path)
    show(results)
    print(f"Wrote {path}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step (8)")
    parser.add_argument("--steps", type=int, default=20, help="timed samples of each kind (20)")
    parser.add_argument("--row", type=int, default=5, help="steps of a sample that are queued in a row (5)")
    parser.add_argument("--small", action="store_true", help="small slabs: shows that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for name in ("batch", "steps", "row"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(options, name)}")
    return options


class Data:
    """Healthy slabs on the device, and pairs of them: ready, or made when asked for."""

    def __init__(self, shape: tuple[int, int, int], batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        chest = ls.phantom.chest_ct(shape=shape, seed=1)
        image = ls.window_hu(chest.hu) * chest.lung_mask
        self.images = torch.from_numpy(np.stack([image] * batch)).to(device)
        self.masks = torch.from_numpy(np.stack([chest.lung_mask] * batch)).to(device)
        self.synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)
        self._pairs = [self.make(k) for k in range(READY)]

    def make(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Synthesise a batch."""
        index = list(range(step * self.batch, (step + 1) * self.batch))
        pair = self.synth(self.images, self.masks, index=index, lung_fraction=1.0)
        return pair.image[:, None], pair.target[:, None]

    def ready(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch made before."""
        return self._pairs[step % READY]


def trainer(data: Data, precision: str) -> Callable[[Callable[[int], Any], int], None]:
    """Return a function that takes a training step on a batch."""
    torch.manual_seed(0)
    net = UNet(3, 1, 1, CHANNELS, strides=(2,) * (len(CHANNELS) - 1)).to(data.device)
    loss_of, optimiser = DiceCELoss(sigmoid=True), torch.optim.Adam(net.parameters(), lr=3e-4)

    def step(batch: Callable[[int], Any], number: int) -> None:
        image, target = batch(number)
        with torch.autocast(data.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(image).float()
        loss = loss_of(logits, target.float())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step


def measure(data: Data, precision: str, samples: int, row: int) -> dict[str, Any]:
    """Time steps of all kinds in turn, one at a time and in a row; seconds are those of one step."""
    step = trainer(data, precision)
    kinds: dict[str, Callable[[int], Any]] = {
        FLY: lambda k: step(data.make, k),
        STORED: lambda k: step(data.ready, k),
        AGAIN: lambda k: step(data.ready, k),
        ALONE: data.make,
    }
    for number in range(WARMUP):
        for run in kinds.values():
            clocked(data.device, run, range(number, number + 1))
    found = {"one at a time": compared(data.device, kinds, samples, 1)}
    found["in a row"] = compared(data.device, kinds, -(-samples // 2), row)
    return found


def compared(
    device: torch.device, kinds: dict[str, Callable[[int], Any]], samples: int, row: int
) -> dict[str, Any]:
    """Time rows of steps, the kinds in turn, and take the ratios turn by turn."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(samples):
        # Each turn begins with another kind, so that no kind always follows the same one.
        order = [*list(kinds)[number % len(kinds) :], *list(kinds)[: number % len(kinds)]]
        for name in order if number % 2 else order[::-1]:
            steps = range(number * row, (number + 1) * row)
            seconds[name].append(clocked(device, kinds[name], steps) / row)
    found: dict[str, Any] = {name: statistics(values) for name, values in seconds.items()}
    for name in (FLY, AGAIN):
        ratios = np.divide(seconds[name], seconds[STORED])
        found[ratio_of(name)] = {
            "median": float(np.median(ratios)),
            "quartiles": np.percentile(ratios, (25, 75)).tolist(),
        }
    return found


def ratio_of(name: str) -> str:
    """Name the ratio of a kind to ready-made pairs."""
    return f"{name} over {STORED}"


def clocked(device: torch.device, run: Callable[[int], Any], numbers: Sequence[int]) -> float:
    """Seconds until the device is done with all of these."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for number in numbers:
        run(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def show(results: dict[str, Any]) -> None:
    """Print medians and the ratio that counts, beside the ratio of equals."""
    settings = results["settings"]
    print(f"\n{results['device']}, batch of {settings['batch']} x {settings['shape']}")
    for precision, modes in results["precisions"].items():
        for mode, found in modes.items():
            for name in (STORED, FLY, ALONE):
                entry = found[name]
                print(
                    f"{precision}  {mode:14}{name:16}{entry['median_s'] * 1e3:10.2f} ms "
                    f"({entry['q25_s'] * 1e3:.2f} to {entry['q75_s'] * 1e3:.2f})"
                )
            for name in (FLY, AGAIN):
                entry = found[ratio_of(name)]
                low, high = entry["quartiles"]
                print(
                    f"{precision}  {mode:14}{ratio_of(name)}: {entry['median']:.4f} ({low:.4f} to {high:.4f})"
                )
    for entry in results["goals"]:
        print(goal_line(entry))


if __name__ == "__main__":
    sys.exit(main())
