"""A result file as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def show(results: dict[str, Any]) -> None:
    """Print every section."""
    checks = results["correctness"]
    failed = [c["name"] for c in checks["checks"] if not c["passed"]]
    print(f"\n{results['machine']['cpu']}, {results['machine']['usable_cores']} cores")
    print(f"Correctness: {len(checks['checks'])} checks, {len(failed)} failed {failed or ''}")
    for name, entry in results["libraries"].items():
        if not entry["installed"]:
            print(f"{name}: {entry['reason']}")
    for volume, timings in results["pairs"].items():
        rows = [(name, *_times(e), f"{e['times_ours']:.2f}") for name, e in timings.items()]
        table(f"One pair, {volume}", ("contestant", "median ms", "IQR ms", "x ours"), rows)
    for volume, contestants in results["stages"].items():
        rows = [(n, stage, *_times(e)) for n, stages in contestants.items() for stage, e in stages.items()]
        table(f"Stages, {volume}", ("contestant", "stage", "median ms", "IQR ms"), rows)
    for volume, entry in results["floors"]["volumes"].items():
        rows = [
            (
                threads,
                stage,
                f"{e['floor_ms']:.3f}",
                "" if e["measured_ms"] is None else f"{e['measured_ms']:.3f}",
            )
            for threads, stages in entry["stages"].items()
            for stage, e in stages.items()
        ]
        table(f"Floors, {volume}", ("threads", "stage", "floor ms", "measured ms"), rows)
    for op, cases in results["ops"].items():
        rows = [(case, n, *_times(e)) for case, c in cases.items() for n, e in c["times"].items()]
        table(op, ("case", "contestant", "median ms", "IQR ms"), rows)
    rows = [
        (count, name, *_times(e), f"{e['ns_per_lesion_voxel']:.1f}")
        for count, contestants in results["many_blobs"].items()
        for name, e in contestants.items()
    ]
    table("Many blobs", ("blobs", "contestant", "median ms", "IQR ms", "ns per lesion voxel"), rows)
    processes = results["processes"]
    for section in ("loader", "start", "memory"):
        if section in processes and "skipped" not in processes[section]:
            rows = [(name, _facts(entry)) for name, entry in processes[section].items()]
            table(section.capitalize(), ("case", "result"), rows)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns."""
    lines = [tuple(head), *(tuple(str(v) for v in row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    print(f"\n{title}")
    for line in lines:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _times(entry: dict[str, Any]) -> tuple[str, str]:
    return f"{1e3 * entry['median_s']:.3f}", f"{1e3 * entry['iqr_s']:.3f}"


def _facts(entry: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items())
