"""Run a command with a limit: in a process group of its own, which is ended as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LAST_WORDS_S = 5.0
"""Between SIGABRT, at which Python's faulthandler says where every thread is, and SIGKILL."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    """As `subprocess` has it: minus the signal that ended it."""
    seconds: float
    timed_out: bool


def limited(
    command: Sequence[str], limit_s: float, log: IO[Any], *, folder: Path, environment: Mapping[str, str]
) -> Ended:
    """Run a command, its output going to `log` while it runs; at the limit it ends with all its children.

    Children that outlive the command end with it, too.
    """
    start = time.perf_counter()
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=folder,
            env=dict(environment), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        log.write(f"{error}\n".encode())
        log.flush()
        return Ended(127, time.perf_counter() - start, timed_out=False)
    timed_out = False
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        timed_out = True
        _signal(process, signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS_S)
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
    return Ended(process.returncode, time.perf_counter() - start, timed_out)


def _signal(process: subprocess.Popen[Any], number: int) -> None:
    """Signal the group that the process leads; whoever is left in it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
