"""``python -m benchmarks.training``: what synthesis costs a training step of MONAI's U-Net.

Steps with pairs made on the fly and with ready-made pairs take turns, in fp32 and bf16. The data, healthy
slabs or pairs, are on the device.
"""

from __future__ import annotations

import argparse
import json
import re
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
from benchmarks.common import machine, statistics
from benchmarks.cpu import say

RESULTS = Path(__file__).resolve().parent / "results"
CHANNELS = (16, 32, 64, 128, 256)
READY = 3
"""Ready-made batches, in turn."""


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
        "version": 1,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "machine": machine(),
        "settings": {"shape": shape, "batch": data.batch, "channels": CHANNELS, "steps": options.steps},
        "precisions": {},
    }
    for precision in ("bf16", "fp32"):
        say(f"training in {precision}")
        results["precisions"][precision] = measure(data, precision, options.steps)
    show(results)
    slug = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    path = options.output / f"training--{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"Wrote {path}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step (8)")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each kind (30)")
    parser.add_argument("--small", action="store_true", help="small slabs: shows that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


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
        pair = self.synth(self.images, self.masks, index=index)
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
            loss = loss_of(net(image).float(), target.float())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step


def measure(data: Data, precision: str, steps: int) -> dict[str, Any]:
    """Time steps of both kinds in turn, and synthesis alone."""
    step = trainer(data, precision)
    kinds: dict[str, Callable[[int], None]] = {
        "on the fly": lambda k: step(data.make, k),
        "ready-made": lambda k: step(data.ready, k),
        "synthesis alone": lambda k: (data.make(k), None)[1],
    }
    samples: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(-3, steps):  # the first warm up
        order = list(kinds) if number % 2 else list(kinds)[::-1]
        for name in order:
            seconds = clocked(data.device, kinds[name], max(number, 0))
            if number >= 0:
                samples[name].append(seconds)
    found: dict[str, Any] = {name: statistics(values) for name, values in samples.items()}
    ratios = [a / b for a, b in zip(samples["on the fly"], samples["ready-made"], strict=True)]
    found["on the fly over ready-made"] = {
        "median": float(np.median(ratios)),
        "quartiles": np.percentile(ratios, (25, 75)).tolist(),
    }
    return found


def clocked(device: torch.device, run: Callable[[int], None], number: int) -> float:
    """Seconds until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def show(results: dict[str, Any]) -> None:
    """Print medians and the ratio that counts."""
    settings = results["settings"]
    print(f"\n{results['device']}, batch of {settings['batch']} x {settings['shape']}")
    for precision, found in results["precisions"].items():
        for name in ("ready-made", "on the fly", "synthesis alone"):
            entry = found[name]
            print(
                f"{precision}  {name:16}{entry['median_s'] * 1e3:10.2f} ms "
                f"({entry['q25_s'] * 1e3:.2f} to {entry['q75_s'] * 1e3:.2f})"
            )
        print(f"{precision}  on the fly over ready-made: {found['on the fly over ready-made']['median']:.4f}")


if __name__ == "__main__":
    sys.exit(main())
