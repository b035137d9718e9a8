"""Run the kernels with races watched for: ``python -m tests.cuda_host.racing pairs --rounds 3``.

Races are reported on the error output, as ThreadSanitizer does, and make the exit status 66.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.cuda_host.racing.environment import UNSHUFFLED, is_watched, obstacle, racing_environment


def main() -> None:
    if not is_watched():
        start_again()
    # They must not come before ThreadSanitizer.
    from tests.cuda_host.racing.cases import CASES
    from tests.cuda_host.racing.device import PLANTS

    parser = argparse.ArgumentParser(prog="python -m tests.cuda_host.racing", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--plant", choices=PLANTS, help="a race that must be seen")
    arguments = parser.parse_args()
    for round_ in range(arguments.rounds):
        start = time.monotonic()
        CASES[arguments.case](round_, arguments.plant)
        print(f"{arguments.case}, round {round_}: as expected, {time.monotonic() - start:.0f} s", flush=True)


def start_again() -> None:
    """Put a process that ThreadSanitizer watches in the place of this one."""
    environment = racing_environment()
    if environment is None:
        sys.exit(f"cannot look for races: {obstacle()}")
    command = [*UNSHUFFLED, sys.executable, "-m", "tests.cuda_host.racing", *sys.argv[1:]]
    os.execvpe(command[0], command, environment)


main()
