"""Timing loop, checks, machine description and result file: what every benchmark shares."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
import random
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lesionsynth.files import write_atomically

LIBRARIES = (
    "lesionsynth",
    "numpy",
    "scipy",
    "numba",
    "torch",
    "monai",
    "torchio",
    "batchgeneratorsv2",
    "connected-components-3d",
    "matplotlib",
)
NOT_INSTALLED = "not installed"
SLOW_S, SLOW_STRIDE = 0.3, 5
"""Contestants slower than this run in every fifth round, or the slowest would take nearly all of the time."""


@dataclass(frozen=True)
class Check:
    """One comparison made before anything was timed."""

    name: str
    rule: str
    """What must hold, in words."""
    value: float
    limit: float
    """Greatest `value` that passes."""

    @property
    def passed(self) -> bool:
        """Whether the rule holds; NaN does not."""
        return bool(self.value <= self.limit)


@dataclass
class Checks:
    """All comparisons of a run."""

    checks: list[Check] = field(default_factory=list)

    def add(self, name: str, rule: str, value: float, limit: float = 0.0) -> None:
        """Record a comparison that passes where ``value <= limit``."""
        check = Check(name, rule, float(value), float(limit))
        self.checks.append(check)
        if not check.passed:
            print(f"FAILED  {name}: {value:g} > {limit:g}  ({rule})")

    def summary(self) -> dict[str, Any]:
        """Return the section for the result file."""
        items = [{**asdict(c), "passed": c.passed} for c in self.checks]
        return {"passed": bool(items) and all(c.passed for c in self.checks), "checks": items}


def interleaved(
    contestants: Mapping[str, Callable[[int], Any]], rounds: int, *, warmup: int = 2
) -> dict[str, dict[int, float]]:
    """Time contestants in turns, so that a slow moment of the machine hits all of them.

    Each round has an order of its own, drawn with a fixed seed: who runs after the one that leaves the caches
    and the heap in the worst state would otherwise always be the same.

    Those whose last warm-up call took more than `SLOW_S` take part in every `SLOW_STRIDE`-th round only.

    Parameters
    ----------
    contestants : mapping of name to callable
        Called with the number of the round; what it returns is kept alive until the clock has stopped.
    rounds : int
        Timed calls of each.
    warmup : int
        Untimed calls of each beforehand, at least one: the first may load kernels.

    Returns
    -------
    dict of name to dict of round to float
        Seconds.
    """
    stride = {}
    for name, run in contestants.items():
        for number in range(warmup):
            start = time.perf_counter()
            run(number)
            stride[name] = SLOW_STRIDE if time.perf_counter() - start > SLOW_S else 1
    samples: dict[str, dict[int, float]] = {name: {} for name in contestants}
    for number in range(rounds):
        names = [name for name in contestants if number % stride[name] == 0]
        random.Random(number).shuffle(names)
        for name in names:
            start = time.perf_counter()
            result = contestants[name](number)
            samples[name][number] = time.perf_counter() - start
            del result
    return samples


def statistics(samples: Iterable[float]) -> dict[str, Any]:
    """Median and quartiles of seconds, with the samples themselves."""
    values = [float(s) for s in samples]
    q25, median, q75 = np.percentile(values, (25, 50, 75)).tolist()
    return {
        "median_s": median,
        "q25_s": q25,
        "q75_s": q75,
        "iqr_s": q75 - q25,
        "count": len(values),
        "samples_s": values,
    }


def timed(
    contestants: Mapping[str, Callable[[int], Any]], rounds: int, *, warmup: int = 2
) -> dict[str, dict[str, Any]]:
    """`interleaved`, summarised by `statistics`."""
    samples = interleaved(contestants, rounds, warmup=warmup)
    return {name: statistics(values.values()) for name, values in samples.items()}


WAITING = ", waiting for it"
"""What a stage is called in the time that its caller waits for work it has started."""


class StageClock:
    """Stand in for an object and add up the time spent in each of its public methods, by name.

    Only calls from outside are seen: methods that the object calls on itself are part of their caller. A
    method that answers with a function has work left, perhaps under way on another thread; the time in that
    function is added up under the method's name and `WAITING`.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.seconds: dict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return value if name.startswith("_") or not callable(value) else self._clocked(name, value)

    def _clocked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                result = function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
            return self._clocked(name + WAITING, result) if callable(result) else result

        return run

    def take(self) -> dict[str, float]:
        """Return the seconds by method since the last call, and start anew."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def installed(module: str) -> Any:
    """Import an optional library; None where it, or something it needs, is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def machine() -> dict[str, Any]:
    """Describe where and with what a run was made."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "revision": _revision(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Name of the processor, with family and model where the name alone says little."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" family {fields['cpu family']} model {fields.get('model', '?')}"
    return name


def write(results: dict[str, Any], folder: Path) -> Path:
    """Write ``cpu--<cpu>.json`` and return its path."""
    return write_json(results, folder / f"cpu--{slug(results['machine']['cpu'])}.json")


def write_json(record: Any, path: Path) -> Path:
    """Write a file as a whole, so that a killed run leaves the last one; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def slug(text: str) -> str:
    """Return a name for a file: small letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def goal(
    name: str, value: float | None, limit: float, unit: str = "", *, aim: float | None = None
) -> dict[str, Any]:
    """Return the entry of something to reach: at most `limit`, and `aim` beyond it; None was not measured."""
    met = None if value is None else bool(value <= limit)
    return {"name": name, "value": value, "limit": limit, "unit": unit, "aim": aim, "met": met}


def goal_line(entry: Mapping[str, Any]) -> str:
    """Say in a line whether a goal was met."""
    if entry["value"] is None:
        return f"{entry['name']}: not measured (goal {entry['limit']:g} {entry['unit']}".rstrip() + ")"
    aim = "" if entry["aim"] is None else f", aim {entry['aim']:g}"
    said = "met" if entry["met"] else "MISSED"
    return f"{entry['name']}: {entry['value']:.4g} {entry['unit']}".rstrip() + (
        f" (goal {entry['limit']:g}{aim}: {said})"
    )


def median_s(entry: Mapping[str, Any]) -> float | None:
    """Return the median of `statistics`; None where the entry says why there is none."""
    value: float | None = entry.get("median_s")
    return value


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _revision() -> str | None:
    """Git revision of the code, with a plus sign where files differ from it."""
    folder = Path(__file__).parent
    try:
        run = [
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[0].strip() + ("+" if run[1].strip() else "")
