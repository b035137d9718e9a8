"""What `benchmarks.gpu` found, against floors and goals: lines for a reader, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import volumes
from benchmarks.common import goal, goal_line, median_s
from benchmarks.gpu_batches import BATCH
from benchmarks.rivals import OURS

GOAL_MS, AIM_MS = 0.35, 0.28
"""A batch of eight full slabs with the paper's settings by graph replay, on an H100."""
GOAL_PLANS = 200
BYTES = 4 + 1 + 4 + 1
"""Of a voxel: image and mask read once, image and target written once."""


def floor(results: dict[str, Any]) -> dict[str, Any]:
    """Return the least time of a batch of eight: its bytes at the bandwidth measured in the same run."""
    moved = BYTES * BATCH * voxels_of(results)
    rate = results["bandwidth_bytes_s"]["median"]
    return {"batch": BATCH, "bytes": moved, "seconds": None if rate is None else moved / rate}


def voxels_of(results: dict[str, Any]) -> int:
    """Voxels of an item."""
    z, y, x = results["settings"]["shape"]
    return int(z * y * x)


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the generator has to show: bits, and the time of a batch; full slabs only."""
    plans = results["settings"]["plans"]
    differ = {check["name"]: check["value"] for check in results["correctness"]["checks"]}
    worst = sum(differ[name] for name in ("labels", "targets", "images, bit for bit"))
    found = [goal(f"voxels that differ from the CPU's, {plans} plans", worst, 0)]
    if plans < GOAL_PLANS:
        found[0]["met"] = None  # too few to say
    if tuple(results["settings"]["shape"]) != volumes.SHAPE:
        return found
    seconds = replay_s(results)
    name = f"batch of {BATCH} by graph replay"
    return [*found, goal(name, None if seconds is None else 1e3 * seconds, GOAL_MS, "ms", aim=AIM_MS)]


def replay_s(results: dict[str, Any]) -> float | None:
    """Return the median of a replay of the batch that the goals speak of."""
    batch = results.get("batches", {}).get(str(BATCH), {})
    return median_s(batch["replay"]["device"]) if batch else None


def show(results: dict[str, Any]) -> None:
    """Print what a reader wants first."""
    rate = results["bandwidth_bytes_s"]["median"]
    said = "not measured" if rate is None else f"{rate / 1e12:.2f} TB/s"
    print(f"\n{results['gpu']}: copy {said}; correct: {results['correctness']['passed']}")
    columns = f"{'device ms':>10}{'quartiles':>18}{'host ms':>9}{'wall ms':>9}{'pairs/s':>9}"
    print(f"\n{'batch':>5} {'':18}{columns}")
    for n, found in results["batches"].items():
        for name, entry in found.items():
            print(f"{n:>5} {name:18}{_batch_line(entry)}")
    _show_kernels(results)
    if "tuning" in results:
        print(f"\nreplay of {BATCH}, digest of its pairs; as it is: {results['tuning']['constants']}")
        for name, entry in results["tuning"]["variants"].items():
            print(f"{name:24}{_milliseconds(entry)} ms  {entry.get('digest', '')}  {entry.get('error', '')}")
    if "others" in results:
        _show_others(results["others"])
    print()
    for entry in results["goals"]:
        print(goal_line(entry))
    least, seconds = results["floor"]["seconds"], replay_s(results)
    if least and seconds:
        print(f"replay over its floor of {least * 1e3:.3f} ms: {seconds / least:.2f}")


def _batch_line(entry: dict[str, Any]) -> str:
    device, call = entry["device"], entry["host"]
    if "error" in device:
        return f"  {device['error']}"
    spread = f"{device['q25_s'] * 1e3:.3f} to {device['q75_s'] * 1e3:.3f}"
    wall = _milliseconds(entry["wall"], 9) if "wall" in entry else f"{'':9}"
    return (
        f"{_milliseconds(device, 10)}{spread:>18}{_milliseconds(call, 9)}{wall}"
        f"{entry['pairs_per_second']:9,.0f}"
    )


def _milliseconds(entry: dict[str, Any], width: int = 8) -> str:
    seconds = median_s(entry)
    return f"{'-':>{width}}" if seconds is None else f"{seconds * 1e3:{width}.3f}"


def _show_kernels(results: dict[str, Any]) -> None:
    stages = results["stages"]
    if "error" in stages:
        print(f"\nkernels: {stages['error']}")
        return
    columns = f"{'us':>9}{'counted MB':>12}{'GB/s':>8}{'floor us':>10}{'times':>7}"
    print(f"\n{f'kernel, batch of {BATCH}':20}{columns}")
    needs, least = results["counted"]["kernels"], results["counted"]["floors_s"]
    for kernel, entry in stages.items():
        seconds, megabytes = entry["median_s"], needs.get(kernel, {}).get("bytes", 0) / 1e6
        floor_s = least.get(kernel, 0.0)
        ratio = f"{seconds / floor_s:7.1f}" if floor_s else ""
        print(
            f"{kernel:20}{seconds * 1e6:9.1f}{megabytes:12.1f}{megabytes / seconds / 1e3:8.0f}"
            f"{floor_s * 1e6:10.1f}{ratio}"
        )
    print(f"{'one after another':20}{sum(e['median_s'] for e in stages.values()) * 1e6:9.1f}")


def _show_others(found: dict[str, Any]) -> None:
    ours = found["times"][OURS]["median_s"]
    print(f"\none pair, wall time, {found['plans']} plans in turn")
    for name, entry in found["times"].items():
        print(f"{name:48}{entry['median_s'] * 1e3:10.3f} ms{entry['median_s'] / ours:9.1f} x ours")
    for name, reason in found["left_out"].items():
        print(f"{name:48}left out: {reason[:120]}")


def draw(results: dict[str, Any], path: Path) -> Path:
    """Draw kernels against their floors, and all contestants where they were timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    times = results.get("others", {"times": {}})["times"]
    figure, axes = plt.subplots(1, 2 if times else 1, figsize=(13, 5), layout="constrained", squeeze=False)
    left = axes[0, 0]
    stages = {} if "error" in results["stages"] else results["stages"]
    kernels = list(stages)[::-1]
    least = results["counted"]["floors_s"]
    left.barh(kernels, [stages[k]["median_s"] * 1e6 for k in kernels], color="#1b6ca8", label="measured")
    left.barh(kernels, [least.get(k, 0) * 1e6 for k in kernels], color="#e0a030", height=0.3, label="floor")
    left.set(xlabel="us", title=f"Kernels of a batch of {BATCH}")
    left.legend()
    if times:
        names = list(times)[::-1]
        axes[0, 1].barh(names, [times[k]["median_s"] * 1e3 for k in names], color="#b0b0b0")
        axes[0, 1].set(xscale="log", xlabel="ms", title="One pair")
    figure.suptitle(results["gpu"])
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return picture
