"""Where a network runs and in which arithmetic; for training and prediction alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" takes CUDA where there is some.

    A CUDA device comes with its number, which ``torch.cuda.set_device`` wants: torch's current one where
    `name` has none.

    Raises
    ------
    ValueError
        `name` is no device, or CUDA is asked for where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be available, got {name!r}, and torch sees no CUDA; use --device cpu")
    if device.type != "cuda":
        return device
    number = torch.cuda.current_device() if device.index is None else device.index
    count = torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"device must be available, got {name!r}, and torch sees {count} of CUDA")
    return torch.device("cuda", number)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: as told, or where the hardware multiplies it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    native: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return native is not None and native()


def available_cores() -> int:
    """Threads for torch: the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def cpu_settings(threads: int | None, processes: int = 1) -> Iterator[None]:
    """Give torch its threads; the caller's settings come back after.

    Where `threads` is None, the cores are shared out among the `processes` of this machine.

    Denormals are flushed to zero meanwhile: those of a converged network slow a CPU several times.

    Raises
    ------
    ValueError
        `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or max(1, available_cores() // processes))
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def free_memory(device: torch.device) -> int:
    """Bytes that `device` has free; of main memory, what Linux calls available, or half of all elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
