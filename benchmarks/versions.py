"""``python -m benchmarks.versions``: the GPU, its driver, and the libraries that tests and benchmarks use."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write_json

STATE = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,utilization.gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write; 1 where CuPy sees no device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=__doc__)
    parser.add_argument("--found", type=Path, help="where the JSON goes")
    options = parser.parse_args(arguments)
    here = machine()
    found: dict[str, Any] = {name: attempted(run) for name, run in PARTS.items()}
    found |= {"libraries": here.pop("versions"), "machine": here}
    for name, value in found.items():
        print(f"{name:12} {value}")
    if options.found:
        write_json(found, options.found)
    return 0 if isinstance(found["device"], dict) else 1


def attempted(run: Callable[[], Any]) -> Any:
    """Return a value, or what kept it from us."""
    try:
        return run()
    except Exception as error:  # a library may be missing or broken in any way
        return f"{type(error).__name__}: {error}"


def nvidia_smi() -> str:
    """Return the state of every card, with its clocks."""
    command = ["nvidia-smi", f"--query-gpu={STATE}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=8, check=True).stdout.strip()


def cuda() -> dict[str, Any]:
    """Return the versions of CuPy and of CUDA's parts."""
    import cupy

    from lesionsynth.cuda.compiling import nvrtc_version

    runtime = cupy.cuda.runtime
    return {
        "cupy": cupy.__version__,
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        "nvrtc": nvrtc_version(),
    }


def device() -> dict[str, Any]:
    """Describe the first device."""
    import cupy

    found = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "name": found["name"].decode(),
        "capability": f"{found['major']}.{found['minor']}",
        "multiprocessors": found["multiProcessorCount"],
        "memory_bytes": found["totalGlobalMem"],
        "l2_bytes": found["l2CacheSize"],
    }


PARTS: dict[str, Callable[[], Any]] = {"nvidia-smi": nvidia_smi, "cuda": cuda, "device": device}


if __name__ == "__main__":
    sys.exit(main())
