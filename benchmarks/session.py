"""``python -m benchmarks.session``: everything there is to see on a GPU, part by part, with a limit for each.

Parts run in this order: versions, smoke, tests, sanitizers, benchmarks, training, profile. A crash or a hang
ends its part alone. Each leaves <part>.log and <part>.json; summary.json and a table at the end say what
passed, what failed, and how fast it was. Exit status 0: every part passed; 1: one failed, or needs a program
that is not installed; 2: there is no GPU.

Each half fits six minutes, on a machine that has compiled nothing yet:
  --part versions --part smoke --part tests --part sanitizers
  --part versions --part benchmarks --part training --part profile
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import goal_line, write_json
from benchmarks.processes import limited
from benchmarks.session_findings import ROOT, Place, failures
from benchmarks.session_parts import Command, Part, parts

OUTPUT = ROOT / "runs" / "gpu"
"""Which git ignores."""
NEED = "benchmarks.session needs a CUDA device"
PROBE = f"from lesionsynth.cuda.backend import check_cupy; check_cupy({NEED!r})"
PROBE_S, WHEELS_S = 60.0, 120.0
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, and sum up."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="lesionsynth-wheels-") as site:
        environment = environment_of(Path(site) if options.wheels else None)
        if options.wheels:
            refused = install(options.wheels, Path(site), environment)
            if refused:
                print(f"benchmarks.session: {refused}", file=sys.stderr)
                return 2
        missing = no_gpu(environment)
        if missing:
            print(missing, file=sys.stderr)
            return 2
        place = Place(options.output or OUTPUT, options.output)
        chosen = [part for part in parts(place, options.scale) if part.name in options.part]
        return run(chosen, place, environment, options.archive)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    names = [part.name for part in parts(Place(OUTPUT, None))]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--part", action="append", choices=names, metavar="NAME",
        help=f"run this part alone; may be repeated: {', '.join(names)}",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path,
        help="where everything goes; else logs and records to runs/gpu, results to benchmarks/results",
    )  # fmt: skip
    parser.add_argument(
        "--archive", type=Path, metavar="FILE",
        help="a .tar.gz of the output folder, renewed after every part: one file to bring home",
    )  # fmt: skip
    parser.add_argument("--scale", type=float, default=1.0, help="times every limit (1)")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR",
        help="install the wheels in this folder first, for this session alone (make gpu-wheels)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not options.scale > 0:
        parser.error(f"--scale must be > 0, got {options.scale:g}")
    if options.wheels and not list(options.wheels.glob("*.whl")):
        parser.error(f"--wheels must hold wheels (*.whl), got {options.wheels}")
    options.part = options.part or names
    if options.output:
        options.output = options.output.resolve()
    return options


def environment_of(site: Path | None) -> dict[str, str]:
    """Return the environment of the parts: this checkout is imported from, and tests must not skip."""
    paths = [str(site)] if site else []
    paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "REQUIRE_GPU": "1"}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(paths)}


def install(wheels: Path, site: Path, environment: dict[str, str]) -> str:
    """Unpack wheels into a folder, without the network; returns what went wrong."""
    files = sorted(str(path.resolve()) for path in wheels.glob("*.whl"))
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"),
        *("--no-cache-dir", "--disable-pip-version-check", "--target", str(site), *files),
    ]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WHEELS_S)
    except subprocess.TimeoutExpired:
        return f"the wheels of {wheels} were not installed within {WHEELS_S:g} s"
    return f"the wheels of {wheels} cannot be installed: {done.stderr.strip()}" if done.returncode else ""


def no_gpu(environment: dict[str, str]) -> str:
    """Say in a sentence what is missing for a GPU; nothing where there is one.

    Asked in a process of its own, so that this one never touches CUDA.
    """
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PROBE_S
        )
    except subprocess.TimeoutExpired:
        return f"{NEED}, and none answered within {PROBE_S:g} s"
    if done.returncode == 0:
        return ""
    last = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(" ")][-1:]
    return "".join(last).removeprefix("RuntimeError: ") or f"{NEED}: the search ended with {done.returncode}"


def run(
    chosen: Sequence[Part], place: Place, environment: dict[str, str], archive: Path | None = None
) -> int:
    """Run parts one after another; records, summary and archive are written after each."""
    place.folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for part in chosen:
        print(f"{datetime.datetime.now():%H:%M:%S} {part.name}, at most {part.limit_s:.0f} s", flush=True)
        records.append(run_part(part, place, environment))
        write_json(records[-1], place.folder / f"{part.name}.json")
        write_json(summed(records, [part.name for part in chosen]), place.folder / "summary.json")
        if archive:
            pack(place.folder, archive)
    print(table(records))
    print(f"Wrote {place.folder / 'summary.json'}")
    return 0 if all(record["status"] == PASSED for record in records) else 1


def pack(folder: Path, archive: Path) -> None:
    """Put a folder into a .tar.gz, which is replaced as a whole."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    beside = archive.with_name(f".{archive.name}")
    with tarfile.open(beside, "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            if path.resolve() not in (beside.resolve(), archive.resolve()):
                tar.add(path, arcname=f"{folder.name}/{path.name}")
    os.replace(beside, archive)


def run_part(part: Part, place: Place, environment: dict[str, str]) -> dict[str, Any]:
    """Run the commands of a part, and read what they left."""
    record: dict[str, Any] = {"name": part.name, "status": NOT_RUN, "limit_s": part.limit_s, "seconds": 0.0}
    path = place.folder / f"{part.name}.log"
    if part.needs and shutil.which(part.needs, path=environment.get("PATH")) is None:
        reason = f"{part.needs} is not installed"
        path.write_text(reason + "\n", encoding="utf-8")
        return record | {"commands": [], "findings": {"lines": [reason]}, "failures": []}
    place.forget(part.name)
    begun, start = time.time(), time.perf_counter()
    with path.open("wb") as log:
        record["commands"] = [run_command(command, log, environment) for command in part.commands]
    record["seconds"] = time.perf_counter() - start
    text = path.read_text(encoding="utf-8", errors="replace")
    record["findings"] = findings(part, place, text, begun)
    place.forget(part.name)
    ended_well = all(entry["returncode"] == 0 and not entry["timed_out"] for entry in record["commands"])
    record["status"] = PASSED if ended_well and record["findings"].get("passed", True) else FAILED
    record["failures"] = [] if record["status"] == PASSED else reasons(record["commands"], text)
    return record


def run_command(command: Command, log: Any, environment: dict[str, str]) -> dict[str, Any]:
    """Run a command, its output going to the log behind a line with its name."""
    log.write(f"### {command.name}: {' '.join(command.argv)}\n".encode())
    log.flush()
    ended = limited(command.argv, command.limit_s, log, folder=ROOT, environment=environment)
    return {
        "name": command.name,
        "command": list(command.argv),
        "returncode": ended.returncode,
        "seconds": ended.seconds,
        "limit_s": command.limit_s,
        "timed_out": ended.timed_out,
    }


def findings(part: Part, place: Place, log: str, begun: float) -> dict[str, Any]:
    """Return what a part says it found; a part whose files cannot be read has failed."""
    try:
        return part.read(place, log, begun)
    except Exception as error:  # half-written or unexpected: the other parts go on
        return {"passed": False, "lines": [f"unreadable: {type(error).__name__}: {error}"]}


def reasons(commands: Sequence[dict[str, Any]], log: str) -> list[str]:
    """Say how a part failed: commands that ended badly, and the first lines of its log that tell."""
    said = []
    for entry in commands:
        if entry["timed_out"]:
            said.append(f"{entry['name']} was ended at its limit of {entry['limit_s']:g} s")
        elif entry["returncode"]:
            said.append(f"{entry['name']} ended with {entry['returncode']}")
    return said + failures(log)


def summed(records: Sequence[dict[str, Any]], chosen: Sequence[str]) -> dict[str, Any]:
    """Return the summary: counts, parts, goals."""
    counts = dict.fromkeys((PASSED, FAILED, NOT_RUN), 0)
    for record in records:
        counts[record["status"]] += 1
    short = ("name", "status", "seconds", "limit_s", "failures")
    return {
        "format": "lesionsynth.gpu-session",
        "version": 1,
        "chosen": list(chosen),
        "complete": len(records) == len(chosen),
        "counts": counts,
        "parts": [
            {name: record[name] for name in short} | {"lines": record["findings"].get("lines", [])}
            for record in records
        ],
        "goals": [goal for record in records for goal in record["findings"].get("goals", [])],
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Format the summary for a reader."""
    rows = [f"\n{'part':12}{'status':10}{'seconds':>8}{'limit':>7}"]
    for record in records:
        status = record["status"] if record["status"] == PASSED else record["status"].upper()
        rows.append(f"{record['name']:12}{status:10}{record['seconds']:8.1f}{record['limit_s']:7.0f}")
        rows += [f"    {line}" for line in [*record["findings"].get("lines", []), *record["failures"]]]
    summary = summed(records, [])
    rows += [goal_line(entry) for entry in summary["goals"]]
    rows.append(", ".join(f"{n} {status}" for status, n in summary["counts"].items() if n))
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
