"""Compile the CUDA programs without a GPU, and read what each kernel takes of a multiprocessor."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from lesionsynth.cuda.compiling import compile_program
from lesionsynth.cuda.programs import THREADS

ARCHITECTURES = (75, 80, 90, 100)
"""Turing, Ampere, Hopper, Blackwell; CUDA 13 has dropped those before."""

REGISTERS = 65536
"""Of a multiprocessor, on all of these."""
SHARED = {75: 64, 80: 164, 90: 228, 100: 228}
"""KiB of a multiprocessor; a block takes one more than it asks for from sm_80 on."""
THREADS_RESIDENT = {75: 1024, 80: 2048, 90: 2048, 100: 2048}

_ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'\n(.*?)(?=ptxas info\s+: Compiling|\Z)", re.S
)


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of a kernel."""

    kernel: str
    registers: int
    stack: int
    """Bytes of a thread in local memory, with the functions it calls."""
    spills: int
    """Bytes stored and loaded for want of registers, in the functions it calls too."""
    shared: int
    """Bytes of a block."""

    def resident(self, architecture: int) -> int:
        """Blocks on a multiprocessor at once."""
        warps = THREADS // 32
        by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256 * warps)
        taken = self.shared + (1024 if architecture >= 80 else 0)
        by_shared = SHARED[architecture] * 1024 // taken if taken else by_registers
        return min(by_registers, by_shared, THREADS_RESIDENT[architecture] // THREADS)

    def record(self, architecture: int) -> dict[str, int | str]:
        """For JSON."""
        return asdict(self) | {"resident_blocks": self.resident(architecture)}


def resources(text: str, architecture: int) -> tuple[list[Usage], str]:
    """Compile a text, and read what its kernels take; returns that and the log."""
    _, log = compile_program(text, f"sm_{architecture}", "--ptxas-options=-v")
    return usage_of(log), log


def usage_of(log: str) -> list[Usage]:
    """Read the resources of every kernel from a log."""
    return [_usage(name, body) for name, _, body in _ENTRY.findall(log)]


def _usage(kernel: str, body: str) -> Usage:
    """Read one kernel's part of a log; the functions that were not inlined come with it."""

    def numbers(pattern: str) -> list[int]:
        return [int(n) for n in re.findall(pattern, body)]

    return Usage(
        kernel,
        registers=max(numbers(r"Used (\d+) registers")),
        # The cumulative size is that of the deepest call, and is left out where it is nought.
        stack=max(numbers(r"(\d+) bytes (?:stack frame|cumulative stack size)")),
        spills=sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
        shared=max(numbers(r"(\d+) bytes smem"), default=0),
    )
