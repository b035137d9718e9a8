"""What a process needs for ThreadSanitizer; without NumPy, which is to come after it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import cache

from tests.cuda_host.shim import compiler, library_path

UNSHUFFLED = ("setarch", "-R")
"""Starts a process without randomised addresses, which lie where ThreadSanitizer keeps its own."""
OPTIONS = {
    "history_size": 0,  # each of thousands of fibres has one
    "suppress_equal_addresses": 0,  # two kernels may have a race in one place
    "report_thread_leaks": 0,
    "detect_deadlocks": 0,
}


@cache
def obstacle() -> str | None:
    """Return what is missing here, None where nothing is."""
    if compiler() is None or platform.machine() != "x86_64":
        return "races are looked for with g++ on Linux on x86-64"
    if not all(os.path.isabs(name) for name in _libraries()):
        return "ThreadSanitizer's library is not installed"
    if shutil.which(UNSHUFFLED[0]) is None:
        return "setarch is not installed"
    if subprocess.run([*UNSHUFFLED, "true"], capture_output=True, check=False).returncode:
        return "setarch -R is not permitted"
    return None


def racing_environment() -> dict[str, str] | None:
    """Environment of a process that may use `RacingProgram`, under `UNSHUFFLED`; None where `obstacle` is."""
    if obstacle() is not None:
        return None
    threads = {f"{library}_NUM_THREADS": "1" for library in ("NUMBA", "OMP", "OPENBLAS")}
    options = {
        "LD_PRELOAD": " ".join(_libraries()),
        "TSAN_OPTIONS": " ".join(f"{name}={value}" for name, value in OPTIONS.items()),
    }
    return {**os.environ, **threads, **options}


def is_watched() -> bool:
    """Whether ThreadSanitizer watches this process."""
    return "libtsan" in os.environ.get("LD_PRELOAD", "")


def _libraries() -> list[str]:
    # The second because the first replaces functions of it.
    return [library_path(name) for name in ("libtsan.so", "libstdc++.so")]
