"""``python -m benchmarks.kernels``: what every kernel takes of a multiprocessor; needs no GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import nvrtc
from benchmarks.common import machine
from lesionsynth.cuda._source import IMAGES, OPTIONS, PROGRAMS, THREADS, source
from lesionsynth.cuda.compiling import nvrtc_version

RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> None:
    """Compile, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", default="float32", choices=IMAGES, help="type of the image")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    options = parser.parse_args(argv)
    output = options.output or RESULTS / f"kernels--nvrtc-{nvrtc_version()}.json"
    programs: dict[str, dict[str, list[dict[str, int | str]]]] = {}
    record = {
        "format": "lesionsynth.kernels",
        "version": 1,
        "nvrtc": nvrtc_version(),
        "options": OPTIONS,
        "threads": THREADS,
        "image": options.image,
        "machine": machine(),
        "programs": programs,
    }
    print(f"{'kernel':18}" + "".join(f"{f'sm_{a}':>26}" for a in nvrtc.ARCHITECTURES))
    print(f"{'':18}" + f"{'regs spill shared blocks':>26}" * len(nvrtc.ARCHITECTURES))
    for program in PROGRAMS:
        text = source(program, options.image)
        logs = {a: nvrtc.resources(text, a)[0] for a in nvrtc.ARCHITECTURES}
        programs[program] = {f"sm_{a}": [usage.record(a) for usage in found] for a, found in logs.items()}
        for row in zip(*logs.values(), strict=True):
            cells = (
                f"{u.registers:7}{u.spills:6}{u.shared:7}{u.resident(a):6}"
                for a, u in zip(nvrtc.ARCHITECTURES, row, strict=True)
            )
            print(f"{row[0].kernel:18}" + "".join(cells))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
