"""``python -m benchmarks.gpu``: the generator on a GPU, beside its CPU twin, CuPy's own filters and SciPy.

Correctness first: the CPU twin's pairs are compared before anything is timed. ``--count`` needs no GPU: it
counts what a batch costs at least.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import lesionsynth as ls
from benchmarks import counted, volumes
from benchmarks.common import Checks, machine, statistics, timed
from benchmarks.cpu import say

RESULTS = Path(__file__).resolve().parent / "results"
INPUT_SETS = 3
"""Different inputs in turn, so that no cache holds them: three batches of one are 126 MB."""
COPY_BYTES = 2**30


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
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    slab, checks = volumes.phantom(shape), Checks()
    say(f"checking {options.plans} plans on {name}")
    check(slab, options.plans, checks)
    results: dict[str, Any] = {
        "format": "lesionsynth.gpu-benchmark",
        "version": 1,
        "gpu": name,
        "machine": machine() | {"cupy": cupy.__version__, "cuda": cupy.cuda.runtime.runtimeGetVersion()},
        "settings": {"plans": options.plans, "rounds": options.rounds, "shape": list(shape)},
        "correctness": checks.summary(),
    }
    say("timing batches")
    results["bandwidth_bytes_s"] = bandwidth(options.rounds)
    results["batches"] = {n: batches(slab, n, options.rounds) for n in options.batches}
    say("timing stages")
    results["stages"] = stages(slab, 8, options.rounds)
    synth = synthesizer()
    needs = counted.count(synth, slab.image, slab.mask, range(8))
    results["counted"] = counted.as_record(needs, counted.H100)
    say("timing others")
    results["others"] = others(slab, options.rounds)
    results["first_pair"] = first_pair(shape)
    results["memory"] = ls.cuda.memory_report()
    path = write(results, options.output, f"gpu--{name}")
    show(results)
    print(f"Wrote {path} and {draw(results, path)}")
    return 0 if results["correctness"]["passed"] else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--plans", type=int, default=200, help="plans compared with the CPU twin (200)")
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each contestant (100)")
    parser.add_argument(
        "--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 8, 16],
        help="batch sizes (1,2,8,16)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a small volume; its times mean nothing")
    parser.add_argument("--count", action="store_true", help="count bytes and operations, without a GPU")
    return parser.parse_args(arguments)


def synthesizer() -> ls.LesionSynthesizer:
    """Return the generator that is measured."""
    return ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)


def count(options: argparse.Namespace, shape: tuple[int, int, int]) -> int:
    """Count a batch of eight; print and write it."""
    slab = volumes.phantom(shape)
    needs = counted.count(synthesizer(), slab.image, slab.mask, range(8))
    print(counted.table(needs, counted.H100))
    record = {"shape": list(shape), "preset": "covid_lung", **counted.as_record(needs, counted.H100)}
    print(f"Wrote {write(record, options.output, 'gpu-counted')}")
    return 0


def batch_of(slab: volumes.Volume, n: int) -> tuple[Any, Any]:
    """Return a batch on the device, each item mirrored and scaled in its own way."""
    import cupy

    image = np.stack([slab.image[:, :: (-1) ** k] * np.float32(1 - 0.01 * k) for k in range(n)])
    return cupy.asarray(image), cupy.asarray(np.stack([slab.mask[:, :: (-1) ** k] for k in range(n)]))


def check(slab: volumes.Volume, plans: int, checks: Checks) -> None:
    """Compare with the CPU twin, and with itself."""
    import cupy

    synth, (image, mask) = synthesizer(), batch_of(slab, 8)
    host_image, host_mask = cupy.asnumpy(image), cupy.asnumpy(mask)
    differ = {"labels": 0, "target": 0, "image": 0, "plan": 0, "again": 0}
    largest, voxels = 0.0, 0
    for first in range(0, plans, 8):
        index = list(range(first, first + 8))
        pair, want = synth(image, mask, index=index), synth(host_image, host_mask, index=index)
        for part in ("labels", "target", "image"):
            got, expected = cupy.asnumpy(getattr(pair, part)), getattr(want, part)
            differ[part] += int((got != expected).sum())
        largest = max(largest, float(np.abs(cupy.asnumpy(pair.image) - want.image).max()))
        voxels += want.image.size
        differ["plan"] += pair.plan != want.plan
        differ["again"] += int((synth(image, mask, index=index).image != pair.image).sum())
    checks.add("labels", "equal to the CPU twin's", differ["labels"])
    checks.add("targets", "equal to the CPU twin's", differ["target"])
    checks.add(
        "images", "at most one voxel in 10^6 differs from the CPU twin's", differ["image"] / voxels, 1e-6
    )
    checks.add("images, bit for bit", "the aim: no voxel differs", differ["image"])
    checks.add("images, largest difference", "1e-5 but for ties", largest, 1e-5)
    checks.add("plans", "lesions, boxes and beta equal", differ["plan"])
    checks.add("repeated", "the same bits again", differ["again"])


# --- time ---


def events(run: Callable[[int], Any], rounds: int) -> list[float]:
    """Seconds on the device of each of `rounds` calls, by events, queued without waiting in between."""
    import cupy

    marks = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(rounds)]
    for k in range(5):
        run(k)
    cupy.cuda.Device().synchronize()
    for k, (start, stop) in enumerate(marks):
        start.record()
        run(k)
        stop.record()
    cupy.cuda.Device().synchronize()
    return [cupy.cuda.get_elapsed_time(start, stop) / 1e3 for start, stop in marks]


def bandwidth(rounds: int) -> dict[str, Any]:
    """Bytes read and written a second by a copy on the device."""
    import cupy

    source, target = (cupy.empty(COPY_BYTES, cupy.uint8) for _ in range(2))
    source[:] = 7
    samples = events(lambda _: cupy.copyto(target, source), min(rounds, 30))
    return {"median": 2 * COPY_BYTES / float(np.median(samples)), "seconds": statistics(samples)}


def batches(slab: volumes.Volume, n: int, rounds: int) -> dict[str, Any]:
    """Time batches of `n` into the caller's buffers: graphs and single launches, warm and cold inputs."""
    import cupy

    from lesionsynth.cuda.backend import CudaBackend

    sets = [batch_of(slab, n) for _ in range(INPUT_SETS)]
    outs = [(cupy.empty_like(image), cupy.empty_like(mask)) for image, mask in sets]
    found: dict[str, Any] = {}
    for name, graphs, turns in (
        ("graph", True, INPUT_SETS),
        ("graph, same input", True, 1),
        ("launches", False, INPUT_SETS),
    ):
        synth = synthesizer()
        cuda = CudaBackend(graphs=graphs)
        synth._backends.of = lambda image, cuda=cuda: cuda

        def run(k: int, synth: Any = synth, turns: int = turns) -> None:
            image, mask = sets[k % turns]
            synth(image, mask, index=list(range(n * k, n * k + n)), out=outs[k % turns])

        found[name] = {"device": statistics(events(run, rounds)), "wall": statistics(wall(run, rounds))}
        found[name]["host"] = statistics(host(run, rounds))
        median = max(found[name]["device"]["median_s"], found[name]["host"]["median_s"])
        found[name]["pairs_per_second"] = n / median
    return found


def wall(run: Callable[[int], Any], rounds: int) -> list[float]:
    """Seconds from the call until the device is done, one call at a time."""
    import cupy

    samples = []
    for k in range(rounds):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        run(k)
        cupy.cuda.Device().synchronize()
        samples.append(time.perf_counter() - start)
    return samples


def host(run: Callable[[int], Any], rounds: int) -> list[float]:
    """Seconds that the call itself takes, drawing the plans included; the device is idle before each."""
    import cupy

    samples = []
    for k in range(rounds):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        run(k)
        samples.append(time.perf_counter() - start)
    return samples


def stages(slab: volumes.Volume, n: int, rounds: int) -> dict[str, Any]:
    """Time each kernel by events, one after another."""
    import cupy

    from lesionsynth.cuda.backend import CudaBackend
    from lesionsynth.cuda.cupy_device import CupyDevice
    from lesionsynth.cuda.render import Renderer

    class Clocked(CupyDevice):
        """Puts events around every launch; nothing runs beside anything."""

        def __init__(self) -> None:
            super().__init__(0, graphs=False)
            self.marks: list[tuple[str, Any, Any]] = []

        @contextmanager
        def beside(self) -> Iterator[None]:
            yield

        def join(self) -> None:
            pass

        def launch(self, program: str, image: str, kernel: str, grid: int, *arguments: Any) -> None:
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            super().launch(program, image, kernel, grid, *arguments)
            stop.record()
            self.marks.append((kernel, start, stop))

    device, cuda, synth = Clocked(), CudaBackend(graphs=False), synthesizer()
    cuda.renderers[0] = Renderer(device)
    synth._backends.of = lambda image: cuda
    image, mask = batch_of(slab, n)
    out = cupy.empty_like(image), cupy.empty_like(mask)
    for k in range(rounds + 3):
        if k == 3:
            cupy.cuda.Device().synchronize()
            device.marks.clear()
        synth(image, mask, index=list(range(n * k, n * k + n)), out=out)
    cupy.cuda.Device().synchronize()
    samples: dict[str, list[float]] = {}
    for kernel, start, stop in device.marks:
        samples.setdefault(kernel, []).append(cupy.cuda.get_elapsed_time(start, stop) / 1e3)
    return {kernel: statistics(values) for kernel, values in samples.items()}


def others(slab: volumes.Volume, rounds: int) -> dict[str, Any]:
    """Time one pair by other means: CuPy's filters, the CPU twin, SciPy, MONAI on the device."""
    import cupy
    from cupyx.scipy import ndimage

    from benchmarks import pipeline, scipy_pipeline
    from benchmarks.cupyx_pipeline import Pipeline

    synth, image, mask = synthesizer(), cupy.asarray(slab.image), cupy.asarray(slab.mask)
    plans = [synth.sample(index=k, shape=slab.image.shape) for k in range(rounds)]
    plain = pipeline.Stages(scipy_pipeline.PlainSciPy(), pipeline.Generator())

    def finished(result: Any) -> Any:
        cupy.cuda.Device().synchronize()
        return result

    contestants: dict[str, Callable[[int], Any]] = {
        "lesionsynth, GPU": lambda k: finished(synth.render(plans[k], image, mask)),
        "cupyx.scipy.ndimage": lambda k: finished(Pipeline(cupy, ndimage).render(plans[k], image, mask)),
        "lesionsynth, CPU": lambda k: synth.render(plans[k], slab.image, slab.mask),
        "SciPy, plainly": lambda k: pipeline.render(plain, plans[k], slab.image, slab.mask),
    }
    contestants |= _monai(slab)
    return timed(contestants, rounds)


def _monai(slab: volumes.Volume) -> dict[str, Callable[[int], Any]]:
    """MONAI's warp and filter on the device, on boxes of a pair's size; TorchIO has no GPU."""
    try:
        import torch
        from monai.transforms import GaussianSmooth, Rand3DElastic
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    box = torch.rand(1, 32, 96, 96, device="cuda")
    warp = Rand3DElastic(
        (8.0, 8.0), (100.0, 100.0), prob=1.0, spatial_size=(32, 96, 96), device=torch.device("cuda")
    )

    def run(k: int) -> Any:
        for _ in range(12):  # a pair has about twelve lesions
            warp(box)
            GaussianSmooth([11.0] * 3, approx="sampled")(box)
            GaussianSmooth([2.0] * 3, approx="sampled")(box)
        torch.cuda.synchronize()

    return {"MONAI's warp and filters of twelve boxes, GPU": run}


def first_pair(shape: tuple[int, int, int]) -> dict[str, float]:
    """Seconds from the start of a process to its first pair, with kernels compiled before."""
    code = (
        "import time; start = time.perf_counter()\n"
        "import cupy, lesionsynth as ls\n"
        f"image = cupy.zeros({shape}, cupy.float32)\n"
        "pair = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)(image, image == 0, index=0)\n"
        "pair.plan; print(time.perf_counter() - start)\n"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    return {"median_s": float(np.median(seconds)), "samples_s": seconds}


# --- results ---


def show(results: dict[str, Any]) -> None:
    """Print what a reader wants first."""
    rate = results["bandwidth_bytes_s"]["median"]
    print(f"\n{results['gpu']}: copy {rate / 1e12:.2f} TB/s; correct: {results['correctness']['passed']}")
    for n, found in results["batches"].items():
        for name, entry in found.items():
            device, call = entry["device"], entry["host"]
            spread = f"{device['q25_s'] * 1e3:.3f} to {device['q75_s'] * 1e3:.3f}"
            print(
                f"batch {n:>2}, {name:18} device {device['median_s'] * 1e3:7.3f} ms ({spread}), "
                f"call {call['median_s'] * 1e3:.3f} ms, {entry['pairs_per_second']:,.0f} pairs/s"
            )
    print(f"\n{'kernel, batch of 8':20}{'us':>9}{'counted MB':>12}{'GB/s':>8}{'floor us':>10}{'times':>7}")
    needs, floor = results["counted"]["kernels"], results["counted"]["floors_s"]
    for kernel, entry in results["stages"].items():
        seconds, megabytes = entry["median_s"], needs.get(kernel, {}).get("bytes", 0) / 1e6
        least = floor.get(kernel, 0.0)
        ratio = f"{seconds / least:7.1f}" if least else ""
        print(
            f"{kernel:20}{seconds * 1e6:9.1f}{megabytes:12.1f}{megabytes / seconds / 1e3:8.0f}"
            f"{least * 1e6:10.1f}{ratio}"
        )
    ours = results["others"]["lesionsynth, GPU"]["median_s"]
    print()
    for name, entry in results["others"].items():
        print(f"{name:48}{entry['median_s'] * 1e3:10.3f} ms{entry['median_s'] / ours:9.1f} x ours")


def write(results: dict[str, Any], folder: Path, name: str) -> Path:
    """Write JSON under a file name made of `name`."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("--", "\0")).strip("-").replace("\0", "--")
    path = folder / f"{slug.replace('gpu-nvidia', 'gpu--nvidia')}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def draw(results: dict[str, Any], path: Path) -> Path:
    """Draw kernels against their floors, and all contestants."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    kernels = list(results["stages"])[::-1]
    floor = results["counted"]["floors_s"]
    left.barh(
        kernels, [results["stages"][k]["median_s"] * 1e6 for k in kernels], color="#1b6ca8", label="measured"
    )
    left.barh(kernels, [floor.get(k, 0) * 1e6 for k in kernels], color="#e0a030", height=0.3, label="floor")
    left.set(xlabel="us", title="Kernels of a batch of 8")
    left.legend()
    names = list(results["others"])[::-1]
    right.barh(names, [results["others"][k]["median_s"] * 1e3 for k in names], color="#b0b0b0")
    right.set(xscale="log", xlabel="ms", title="One pair")
    figure.suptitle(results["gpu"])
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return picture


if __name__ == "__main__":
    sys.exit(main())
