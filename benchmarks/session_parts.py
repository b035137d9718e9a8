"""The parts of a session on a GPU: their commands, their limits, and what is read from what they leave."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import session_findings as findings
from benchmarks.session_findings import ROOT, Place

TESTS = "tests/test_gpu.py"
PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "-o", "filterwarnings=default"),
    *("--timeout=120", "--continue-on-collection-errors"),
)
SANITIZED = (
    ("memcheck", "golden_pairs and float32"),
    ("racecheck", "crowded"),
    ("synccheck", "golden_pairs and drawn-float32"),
    ("initcheck", "golden_pairs and drawn-float32"),
)
"""Tools, and the tests that each looks at: they slow a program down by a factor of ten or more."""
COMPUTE_SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
NCU = (
    *("ncu", "--csv", "--clock-control", "none", "--target-processes", "all", "--profile-from-start", "off"),
    *("--section", "SpeedOfLight", "--section", "Occupancy", "--section", "WarpStateStats"),
)
"""Clocks are left as they are: they may be another's, too."""


@dataclass(frozen=True)
class Command:
    """A process of a part."""

    name: str
    argv: tuple[str, ...]
    limit_s: float

    def scaled(self, factor: float) -> Command:
        """Return the same with another limit."""
        return replace(self, limit_s=self.limit_s * factor)


Reader = Callable[[Place, str, float], dict[str, Any]]
"""Called with the place, the log, and when the part began; see `Part.read`."""


@dataclass(frozen=True)
class Part:
    """A part of a session."""

    name: str
    commands: tuple[Command, ...]
    read: Reader
    """Returns what the part found: ``passed`` false where its commands' return codes do not say so, ``goals``
    and ``lines`` for the summary, and whatever else its record should hold."""
    needs: str = ""
    """Program without which it is not run."""

    @property
    def limit_s(self) -> float:
        """Limit of all its commands."""
        return sum(command.limit_s for command in self.commands)


def parts(place: Place, scale: float = 1.0) -> list[Part]:
    """Return the parts in their order, all limits times `scale`."""
    results = ("--output", str(place.results)) if place.results else ()
    junit = f"--junitxml={place.found('tests', 'xml')}"
    sanitizers = tuple(
        Command(tool, (*COMPUTE_SANITIZER, tool, *PYTEST, "-m", "gpu", "--maxfail=2", "-k", which, TESTS), 24)
        for tool, which in SANITIZED
    )
    found = [
        Part("versions", (module("versions", 10, *leaves(place, "versions")),), findings.read_versions),
        Part("smoke", (module("smoke", 110, *leaves(place, "smoke")),), findings.read_smoke),
        Part(
            "tests",
            (Command("pytest", (*PYTEST, "-m", "gpu and not slow", junit, *gpu_tests()), 130),),
            findings.read_tests,
        ),
        Part("sanitizers", sanitizers, findings.read_sanitizers, needs="compute-sanitizer"),
        Part("benchmarks", (module("gpu", 220, *results),), findings.read_benchmarks),
        Part("training", (module("training", 70, *results),), findings.read_training),
        Part(
            "profile",
            (Command("ncu", (*NCU, sys.executable, "-m", "benchmarks.profiled"), 55),),
            findings.read_profile,
            needs="ncu",
        ),
    ]
    return [replace(part, commands=tuple(c.scaled(scale) for c in part.commands)) for part in found]


def module(name: str, limit_s: float, *arguments: str) -> Command:
    """Return the command that runs a module of the benchmarks."""
    return Command(name, (sys.executable, "-m", f"benchmarks.{name}", *arguments), limit_s)


def leaves(place: Place, part: str) -> tuple[str, str]:
    """Return the arguments that tell a part where to leave what it found."""
    return "--found", str(place.found(part))


def gpu_tests() -> list[str]:
    """Files with tests that need a GPU, by their marker."""
    marker = re.compile(r"\bmark\.gpu\b")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [path for path in files if marker.search(path.read_text(encoding="utf-8"))]
    return [str(path.relative_to(ROOT)) for path in marked]
