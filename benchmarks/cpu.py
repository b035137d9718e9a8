"""``python -m benchmarks.cpu``: lesionsynth on this CPU beside SciPy, MONAI, TorchIO and batchgeneratorsv2.

Whatever is timed has been compared first, in the same run. docs/benchmarks.md says what each section means.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import floors, libraries, ops, pairs, table, volumes, workers
from benchmarks.common import Checks, installed, machine, usable_cores, write

REPOSITORY = Path(__file__).resolve().parent.parent
SKIPPED = {"skipped": "left out by --skip-workers"}
CHECKED_PAIRS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything, show it, and write it; 1 where a comparison failed."""
    options = parse(arguments)
    quick = options.quick
    plans = min(options.plans, 2) if quick else options.plans
    threads, checks = options.threads, Checks()
    found = libraries.load()
    slabs = prepare(options.data, quick=quick)

    results: dict[str, Any] = {
        "format": "lesionsynth.benchmark",
        "version": 1,
        "machine": machine(),
        "settings": {"plans": plans, "threads": list(threads), "quick": quick, "preset": "covid_lung"},
        "libraries": found.describe(),
        "volumes": {slab.name: slab.describe() for slab in slabs},
    }
    for slab in slabs:
        say(f"checking pairs, {slab.name}")
        pairs.check(slab, found, threads, min(plans, CHECKED_PAIRS), checks)
    results["pairs"], results["stages"] = {}, {}
    for slab in slabs:
        say(f"timing pairs and stages, {slab.name}")
        results["pairs"][slab.name] = pairs.time_pairs(slab, found, threads, plans)
        results["stages"][slab.name] = pairs.time_stages(slab, threads, plans)
    results["scaling"] = {
        name: workers.scaling(timings, threads) for name, timings in results["pairs"].items()
    }
    say("measuring the machine")
    rates = floors.rates(threads, quick=quick)
    counted = {
        slab.name: floors.floors(slab, threads, plans, rates, results["stages"][slab.name]) for slab in slabs
    }
    results["floors"] = {"rates": rates, "volumes": counted}
    say("checking and timing operations")
    results["ops"] = ops.measure(slabs, threads, 2 if quick else 20, checks, quick=quick)
    say("many blobs")
    results["many_blobs"] = workers.many_blobs(slabs[0], threads, 2 if quick else 10, quick=quick)
    say("processes" if not options.skip_workers else "no processes")
    results["processes"] = (
        SKIPPED if options.skip_workers else workers.processes(slabs[0].image.shape, quick=quick)
    )
    results["correctness"] = checks.summary()

    path = write(results, options.output)
    table.show(results)
    print(f"\nWrote {path}")
    if installed("matplotlib"):
        from benchmarks.plot import draw

        print(f"Wrote {draw(results, path)}")
    return 0 if results["correctness"]["passed"] else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    cores = usable_cores()
    parser.add_argument("--plans", type=int, default=50, help="pairs of each contestant (50)")
    parser.add_argument("--threads", type=_counts, default=sorted({1, cores}), help="such as 1,2 (1 and all)")
    parser.add_argument("--data", type=Path, help="folder with healthy_lidc_0002.nii.gz; ../shared/data")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument(
        "--quick", action="store_true", help="a small volume, few pairs: seconds, not minutes"
    )
    parser.add_argument("--skip-workers", action="store_true", help="nothing that starts processes")
    options = parser.parse_args(arguments)
    if options.plans < 1:
        parser.error(f"--plans must be >= 1, got {options.plans}")
    if options.data is not None and not (options.data / volumes.REAL).is_file():
        parser.error(f"--data must hold {volumes.REAL}, got {options.data}")
    beside = REPOSITORY.parent / "shared" / "data"
    if options.data is None and (beside / volumes.REAL).is_file():
        options.data = beside
    return options


def prepare(data: Path | None, *, quick: bool) -> list[volumes.Volume]:
    """Make the slabs: the phantom, and real lungs unless there are none or time is short."""
    say("drawing the phantom")
    slabs = [volumes.phantom(volumes.QUICK_SHAPE if quick else volumes.SHAPE)]
    if data is not None and not quick:
        say("segmenting real lungs")
        slabs.append(volumes.real_lungs(data, volumes.SHAPE))
    return slabs


def say(what: str) -> None:
    """Tell what is being done, and when."""
    print(time.strftime("%H:%M:%S"), what, file=sys.stderr, flush=True)


def _counts(text: str) -> list[int]:
    counts = sorted({int(part) for part in text.split(",")})
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"thread counts must be >= 1, got {text}")
    return counts


if __name__ == "__main__":
    sys.exit(main())
