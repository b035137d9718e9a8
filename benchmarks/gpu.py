"""``python -m benchmarks.gpu``: the generator on a GPU, beside its CPU twin, CuPy's own filters and SciPy.

Correctness first: the CPU twin's pairs are compared before anything is timed. ``--count`` needs no GPU: it
counts what a batch costs at least.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import counted, gpu_report, volumes
from benchmarks.common import Checks, installed, machine, slug, write_json
from benchmarks.cpu import say
from benchmarks.gpu_inputs import batch_of, indices, synthesizer

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, show and write; 1 where a comparison failed, 2 where there is no GPU."""
    options = parse(arguments)
    shape = volumes.QUICK_SHAPE if options.quick else volumes.SHAPE
    if options.count:
        return count(options, shape)
    try:
        from lesionsynth.cuda.backend import check_cupy

        check_cupy("benchmarks.gpu measures a CUDA device")
    except RuntimeError as error:
        print(f"{error}; `python -m benchmarks.gpu --count` needs none", file=sys.stderr)
        return 2
    results, path = measure(options, volumes.phantom(shape))
    gpu_report.show(results)
    print(f"Wrote {path}")
    if installed("matplotlib"):
        print(f"Wrote {gpu_report.draw(results, path)}")
    return 0 if results["correctness"]["passed"] else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--plans", type=int, default=200, help="plans compared with the CPU twin (200)")
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each kind (100)")
    parser.add_argument(
        "--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 8, 16],
        help="batch sizes (1,2,8,16)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a small volume; its times mean nothing")
    parser.add_argument("--count", action="store_true", help="count bytes and operations, without a GPU")
    return parser.parse_args(arguments)


def count(options: argparse.Namespace, shape: tuple[int, int, int]) -> int:
    """Count a batch of eight; print and write it."""
    slab = volumes.phantom(shape)
    needs = counted.count(synthesizer(), slab.image, slab.mask, range(8))
    print(counted.table(needs, counted.H100))
    record = {"shape": list(shape), "preset": "covid_lung", **counted.as_record(needs, counted.H100)}
    print(f"Wrote {write_json(record, options.output / 'gpu-counted.json')}")
    return 0


def measure(options: argparse.Namespace, slab: volumes.Volume) -> tuple[dict[str, Any], Path]:
    """Check and time; the file is written after every section, so that a killed run leaves what it has."""
    import cupy

    from benchmarks import gpu_batches, rivals
    from benchmarks.device_time import CupyClock, Gate

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    path = options.output / f"gpu--{slug(name)}.json"
    checks, gate, rounds = Checks(), Gate(CupyClock()), options.rounds
    say(f"checking {options.plans} plans on {name}")
    twin = check(slab, options.plans, checks)
    results: dict[str, Any] = {
        "format": "lesionsynth.gpu-benchmark",
        "version": 2,
        "complete": False,
        "gpu": name,
        "machine": machine() | {"cupy": cupy.__version__, "cuda": cupy.cuda.runtime.runtimeGetVersion()},
        "settings": {"plans": options.plans, "rounds": rounds, "shape": list(slab.image.shape)},
        "correctness": checks.summary() | {"digest": twin},
        "bandwidth_bytes_s": gpu_batches.bandwidth(gate, rounds),
        "batches": {},
    }
    for n in options.batches:
        say(f"timing batches of {n}")
        results["batches"][str(n)] = gpu_batches.batches(slab, n, gate, rounds)
        results["floor"], results["goals"] = gpu_report.floor(results), gpu_report.goals(results)
        write_json(results, path)
    say("timing kernels")
    results["stages"] = gpu_batches.stages(slab, gate, rounds)
    needs = counted.count(synthesizer(), slab.image, slab.mask, range(gpu_batches.BATCH))
    results["counted"] = counted.as_record(needs, rates(results["bandwidth_bytes_s"]["median"]))
    write_json(results, path)
    say("timing variants")
    results["tuning"] = gpu_batches.tuned(slab, gate, rounds)
    write_json(results, path)
    say("timing others")
    results["others"] = rivals.others(slab, rounds)
    results["first_pair"] = rivals.first_pair(slab.image.shape)
    return results | {"complete": True}, write_json(results | {"complete": True}, path)


def rates(bandwidth: float | None) -> counted.Rates:
    """Return the data sheet's rates, with the bandwidth that was measured where it was."""
    if bandwidth is None:
        return counted.H100
    name = "an H100's operations by its data sheet, the copy's bandwidth as measured"
    return replace(counted.H100, name=name, bytes_s=bandwidth)


def check(slab: volumes.Volume, plans: int, checks: Checks) -> str:
    """Compare with the CPU twin, and with itself; returns the digest of the twin's first batch."""
    import cupy

    from benchmarks.replay import digest

    synth, (image, mask) = synthesizer(), batch_of(slab, 8)
    host_image, host_mask = cupy.asnumpy(image), cupy.asnumpy(mask)
    differ = dict.fromkeys(("labels", "target", "image", "plan", "again"), 0)
    largest, voxels, twin = 0.0, 0, ""
    for number in range(-(-plans // 8)):
        index = indices(8, number)
        pair = synth(image, mask, index=index, lung_fraction=1.0)
        want = synth(host_image, host_mask, index=index, lung_fraction=1.0)
        twin = twin or digest(want.image, want.target)
        for part in ("labels", "target", "image"):
            got, expected = getattr(pair, part), cupy.asarray(getattr(want, part))
            differ[part] += int((got != expected).sum())
            if part == "image":
                largest = max(largest, float(abs(got - expected).max()))
        voxels += image.size
        differ["plan"] += pair.plan != want.plan
        differ["again"] += int((synth(image, mask, index=index, lung_fraction=1.0).image != pair.image).sum())
    checks.add("labels", "equal to the CPU twin's", differ["labels"])
    checks.add("targets", "equal to the CPU twin's", differ["target"])
    checks.add(
        "images", "at most one voxel in 10^6 differs from the CPU twin's", differ["image"] / voxels, 1e-6
    )
    checks.add("images, bit for bit", "the aim: no voxel differs", differ["image"])
    checks.add("images, largest difference", "1e-5 but for ties", largest, 1e-5)
    checks.add("plans", "lesions, boxes and beta equal", differ["plan"])
    checks.add("repeated", "the same bits again", differ["again"])
    return twin


if __name__ == "__main__":
    sys.exit(main())
