"""``python -m benchmarks.kernels``: what every kernel takes of a multiprocessor; needs no GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import nvrtc
from benchmarks.common import machine, write_json
from lesionsynth.cuda.compiling import nvrtc_version
from lesionsynth.cuda.programs import IMAGES, OPTIONS, PROGRAMS, THREADS, source

RESULTS = Path(__file__).parent / "results"
COMPARED = {
    "registers": "registers",
    "spills": "bytes spilled",
    "shared": "bytes shared",
    "resident_blocks": "blocks a multiprocessor",
}
"""What is compared with an earlier run, and its name."""
Programs = dict[str, dict[str, list[dict[str, Any]]]]
"""Program to architecture to kernels, as in the JSON."""


def main(argv: list[str] | None = None) -> None:
    """Compile, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--image", default="float32", choices=IMAGES, help="type of the image")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--against", type=Path, help="JSON of an earlier run to compare with")
    parser.add_argument("--markdown", action="store_true", help="print a table for the documentation")
    options = parser.parse_args(argv)
    output = options.output or RESULTS / f"kernels--nvrtc-{nvrtc_version()}.json"
    before = earlier(parser, options) if options.against else {}
    programs = {program: compiled(source(program, options.image)) for program in PROGRAMS}
    record: dict[str, Any] = {
        "format": "lesionsynth.kernels",
        "version": 1,
        "nvrtc": nvrtc_version(),
        "options": OPTIONS,
        "threads": THREADS,
        "image": options.image,
        "machine": machine(),
        "programs": programs,
    }
    print(markdown(programs) if options.markdown else table(programs))
    if before:
        changes = compared(before["programs"], programs)
        record["against"] = {"file": str(options.against), "nvrtc": before["nvrtc"], "changes": changes}
        print(f"\nagainst {options.against}, NVRTC {before['nvrtc']}:")
        print("\n".join(changes) or "no change")
    print(f"written: {write_json(record, output)}")


def earlier(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """Read the earlier run, before it is written over; refuse one of another type."""
    before: dict[str, Any] = json.loads(options.against.read_text(encoding="utf-8"))
    if before.get("image") != options.image:
        parser.error(f"--against must be of {options.image} images, got {before.get('image')}")
    return before


def compiled(text: str) -> dict[str, list[dict[str, Any]]]:
    """Compile a program for every architecture."""
    return {
        f"sm_{a}": [usage.record(a) for usage in nvrtc.resources(text, a)[0]] for a in nvrtc.ARCHITECTURES
    }


def by_kernel(program: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Turn architectures of kernels into kernels of architectures."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for architecture, rows in program.items():
        for row in rows:
            found.setdefault(row["kernel"], {})[architecture] = row
    return found


def table(programs: Programs) -> str:
    """Format what every kernel takes."""
    names = [f"sm_{a}" for a in nvrtc.ARCHITECTURES]
    rows = [f"{'kernel':18}" + "".join(f"{name:>26}" for name in names)]
    rows.append(f"{'':18}" + f"{'regs spill shared blocks':>26}" * len(names))
    for program in programs.values():
        for kernel, found in by_kernel(program).items():
            cells = (
                f"{r['registers']:7}{r['spills']:6}{r['shared']:7}{r['resident_blocks']:6}"
                for r in (found[name] for name in names)
            )
            rows.append(f"{kernel:18}" + "".join(cells))
    return "\n".join(rows)


def markdown(programs: Programs) -> str:
    """Format registers and resident blocks of every kernel, for the documentation."""
    names = [f"sm_{a}" for a in nvrtc.ARCHITECTURES]
    rows = ["| kernel | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for program in programs.values():
        for kernel, found in by_kernel(program).items():
            cells = (f"{found[name]['registers']}, {found[name]['resident_blocks']}" for name in names)
            rows.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def compared(before: Programs, after: Programs) -> list[str]:
    """Name, in a line each, the kernels that are new or gone, and what changed of the others."""
    lines = []
    for program in dict.fromkeys([*before, *after]):
        old, new = by_kernel(before.get(program, {})), by_kernel(after.get(program, {}))
        for kernel in dict.fromkeys([*old, *new]):
            if kernel not in new:
                lines.append(f"{program} {kernel}: gone")
                continue
            if kernel not in old:
                lines.append(f"{program} {kernel}: new")
            for architecture, row in new[kernel].items():
                was = old.get(kernel, {}).get(architecture)
                said = changed(was, row)
                if said:
                    lines.append(f"{program} {kernel}, {architecture}: {said}")
    return lines


def changed(was: dict[str, Any] | None, row: dict[str, Any]) -> str:
    """Say what of a kernel differs, before -> after; all of it where there was none."""
    if was is None:
        return ", ".join(f"{what} {row[name]}" for name, what in COMPARED.items())
    differ = [name for name in COMPARED if was[name] != row[name]]
    return ", ".join(f"{COMPARED[name]} {was[name]} -> {row[name]}" for name in differ)


if __name__ == "__main__":
    main()
