"""Command line of `normnet.report`: ``python -m normnet.report MAPS``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from lesionsynth.commands import plainly, printable, run
from lesionsynth.strict import name_of
from normnet.report.maps import ReportConfig, report_maps


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all went well, 1 when a case could not be shown, 2 for a wrong call."""

    def body() -> int:
        config = tyro.cli(ReportConfig, args=argv, prog="python -m normnet.report")
        with plainly():
            result = report_maps(config, progress_bar=True)
        for case, reason in result.failures.items():
            print(f"normnet.report: {printable(f'{case}: {reason}')}", file=sys.stderr)
        print(f"{len(result.cases)} cases, in {name_of(result.path)}")
        return 1 if result.failures else 0

    return run("normnet.report", body)


if __name__ == "__main__":
    sys.exit(main())
