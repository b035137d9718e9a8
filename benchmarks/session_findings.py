"""What the parts of a session leave, read for its records and its summary."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
METRICS = (
    "Duration",
    "DRAM Throughput",
    "Memory Throughput",
    "Compute (SM) Throughput",
    "Achieved Occupancy",
    "Theoretical Occupancy",
    "Warp Cycles Per Issued Instruction",
)
FAILURES = re.compile(r"\bFAIL|\bERROR\b|Error\b|FAILED|Traceback|Fatal|differ|refused|CHECK SUMMARY")
"""What lines of a log that tell what went wrong have in them."""
HARMLESS = re.compile(r"^### |SUMMARY: 0 ")
"""What others have: the commands of a part, and sanitizers that found nothing."""


@dataclass(frozen=True)
class Place:
    """Where a part's files are."""

    folder: Path
    """Logs and records of the session."""
    results: Path | None
    """Where benchmarks write; None is their own folder."""

    def found(self, part: str, kind: str = "json") -> Path:
        """Return the file in which a part leaves what it found, for the session to read and remove."""
        return self.folder / f"{part}.found.{kind}"

    def forget(self, part: str) -> None:
        """Remove what a part left."""
        for path in self.folder.glob(f"{part}.found.*"):
            path.unlink()

    def result(self, prefix: str, since: float) -> dict[str, Any]:
        """Read the newest result file of a benchmark, if it is not older than `since`."""
        folder = self.results or ROOT / "benchmarks" / "results"
        files = sorted(folder.glob(f"{prefix}--*.json"), key=lambda path: path.stat().st_mtime)
        # file systems' clocks may be behind by some milliseconds
        if not files or files[-1].stat().st_mtime < since - 1:
            return {}
        record: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
        return record | {"file": str(files[-1])}


def failures(log: str, most: int = 5) -> list[str]:
    """Return the first lines that say what went wrong."""
    telling = (line for line in log.splitlines() if FAILURES.search(line) and not HARMLESS.search(line))
    return [line.strip()[:200] for line in telling][:most]


def read_versions(place: Place, log: str, since: float) -> dict[str, Any]:
    """Read versions, and the state of the card."""
    found = _json(place.found("versions"))
    return found | {"lines": [str(found[name]) for name in ("device", "cuda", "nvidia-smi") if name in found]}


def read_smoke(place: Place, log: str, since: float) -> dict[str, Any]:
    """Read the steps, and those that failed; one that was tried and never ended is among them."""
    found = _json(place.found("smoke"))
    steps, failed = found.get("steps", []), found.get("failed", ["it did not begin"])
    line = f"{len(steps) - len(failed)} of {len(steps)} steps" if steps else "no step"
    return found | {"passed": bool(steps) and not failed, "lines": [f"{line} passed", *failed[:3]]}


def read_tests(place: Place, log: str, since: float) -> dict[str, Any]:
    """Count tests; one that was skipped did not pass, and none that passed is a failure."""
    file = place.found("tests", "xml")
    if not file.exists():
        return {"passed": False, "lines": ["pytest left no result"]}
    found = junit(file.read_text(encoding="utf-8"))
    line = f"{found['counts']['passed']} passed, " + ", ".join(
        f"{n} {what}" for what, n in found["counts"].items() if what != "passed" and n
    )
    passed = found["counts"]["passed"] > 0 and not found["failed"]
    return found | {"passed": passed, "lines": [line.removesuffix(", "), *found["failed"][:3]]}


def junit(text: str) -> dict[str, Any]:
    """Read a result file of pytest.

    Returns
    -------
    dict
        ``counts`` by outcome; ``failed`` and ``skipped``, each a line of name and reason.
    """
    counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    lines: dict[str, list[str]] = {"failed": [], "skipped": []}
    for case in ElementTree.fromstring(text).iter("testcase"):
        outcome, reason = "passed", ""
        for tag, name in (("skipped", "skipped"), ("failure", "failed"), ("error", "error")):
            element = case.find(tag)
            if element is not None:
                outcome, reason = name, (element.get("message") or "").strip().partition("\n")[0]
        counts[outcome] += 1
        if outcome != "passed":
            name = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("::")
            lines["skipped" if outcome == "skipped" else "failed"].append(f"{name}: {reason[:160]}")
    return {"counts": counts, **lines}


def read_sanitizers(place: Place, log: str, since: float) -> dict[str, Any]:
    """Read the errors that each tool reported; one that gave no summary has not passed."""
    found = sanitized(log)
    lines = [f"{tool}: {'no summary' if n is None else f'{n} errors'}" for tool, n in found.items()]
    passed = bool(found) and all(n == 0 for n in found.values())
    return {"errors": found, "passed": passed, "lines": lines}


def sanitized(log: str) -> dict[str, int | None]:
    """Read the summaries from a log in which the output of every tool follows a line ``### <tool>: ...``.

    Returns
    -------
    dict
        Errors by tool, of all its processes; None where it gave no summary.
    """
    found: dict[str, int | None] = {}
    tool = ""
    for line in log.splitlines():
        begun = re.match(r"### (\w+):", line)
        if begun:
            tool = begun.group(1)
            found[tool] = None
        summary = re.search(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)", line)
        if summary:
            found[tool] = (found.get(tool) or 0) + int(summary.group(1))
    return found


def read_benchmarks(place: Place, log: str, since: float) -> dict[str, Any]:
    """Read the figures against the floor and the goals."""
    results = place.result("gpu", since)
    if not results:
        return {"passed": False, "goals": [], "lines": ["no result was written"]}
    found = {name: results.get(name) for name in ("file", "gpu", "complete", "correctness", "floor", "goals")}
    replayed = results["batches"].get("8", {}).get("replay", {}).get("device", {})
    seconds, least = replayed.get("median_s"), (results.get("floor") or {}).get("seconds")
    lines = [results["file"]]
    if seconds and least:
        lines.append(
            f"batch of 8 by replay {seconds * 1e3:.3f} ms, {seconds / least:.2f} times its floor of "
            f"{least * 1e3:.3f} ms ({results['bandwidth_bytes_s']['median'] / 1e12:.2f} TB/s)"
        )
    elif "error" in replayed:
        lines.append(replayed["error"])
    return found | {"goals": found["goals"] or [], "passed": results["complete"], "lines": lines}


def read_training(place: Place, log: str, since: float) -> dict[str, Any]:
    """Read the ratios of steps on the fly to ready-made ones."""
    results = place.result("training", since)
    if not results:
        return {"passed": False, "goals": [], "lines": ["no result was written"]}
    lines = [results["file"]]
    for precision, modes in results["precisions"].items():
        for name, entry in modes["in a row"].items():
            if "quartiles" in entry:
                low, high = entry["quartiles"]
                lines.append(f"{precision}, {name}: {entry['median']:.4f} ({low:.4f} to {high:.4f})")
    return {"file": results["file"], "goals": results["goals"], "lines": lines}


def read_profile(place: Place, log: str, since: float) -> dict[str, Any]:
    """Read some metrics of every kernel."""
    found = profiled(log)
    lines = [
        f"{kernel}: " + ", ".join(f"{name} {value}" for name, value in metrics.items() if name in METRICS[:5])
        for kernel, metrics in found.items()
    ]
    return {"kernels": found, "passed": bool(found), "lines": lines}


def profiled(log: str) -> dict[str, dict[str, str]]:
    """Read the table that ``ncu --csv`` prints among other output: kernel to metric to value and unit."""
    lines = log.splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    table = "\n".join(line for line in lines[start:] if line.startswith('"'))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        if row.get("Metric Name") in METRICS:
            value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
            found.setdefault(row["Kernel Name"], {})[row["Metric Name"]] = value
    return found


def _json(path: Path) -> dict[str, Any]:
    """Read what a part left, if anything."""
    if not path.exists():
        return {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
