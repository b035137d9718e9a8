"""Compile the CUDA programs without a GPU, and read what each kernel takes of a multiprocessor."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from lesionsynth.cuda._source import OPTIONS, THREADS

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


def version() -> str:
    """NVRTC's version."""
    from cupy_backends.cuda.libs import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def compile_program(text: str, architecture: int) -> tuple[bytes, str]:
    """Compile a text to machine code; returns that and the log, with warnings and resources.

    Raises
    ------
    RuntimeError
        It does not compile; the message is the log.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(text, "program.cu", [], [])
    try:
        try:
            options = (*OPTIONS, f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v")
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(nvrtc.getProgramLog(program)) from error
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


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
