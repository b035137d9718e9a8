"""Command line of `normnet.ablate`: ``python -m normnet.ablate voting|modules|threshold --output FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from lesionsynth.commands import plainly, printable, run
from lesionsynth.strict import name_of
from normnet.ablate import AblateConfig, ablate
from normnet.paper import as_text

HELP = """Reproduce Table IV (voting), V (modules) or VI (threshold) of the paper, its numbers beside ours.

--scale small took 7 minutes of one CPU core for modules; threshold takes about 9, voting less than either. It
shows that everything works, not who is right. --scale paper has 22,500 to 87,500 steps of the paper's size:
a GPU's work.

Killed and started again with the same settings, it goes on where it was. Exit status: 0 when every row is
there, 1 when one failed (the others are written), 2 for a wrong call."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def body() -> int:
        config = tyro.cli(AblateConfig, args=arguments, prog="python -m normnet.ablate", description=HELP)
        with plainly():
            table = ablate(config, say=lambda line: print(printable(line), flush=True))
        print(table.title)
        print(as_text(table.frame))
        for line in table.failures:
            print(f"failed: {printable(line)}", file=sys.stderr)
        print(f"report: {name_of(config.output / 'report.html')}")
        return 1 if table.failures else 0

    return run("error", body)


if __name__ == "__main__":
    sys.exit(main())
