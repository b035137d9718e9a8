"""From source to machine code: NVRTC with our options, once for each type and architecture, kept on disk.

CuPy's own compilation appends ``-ftz=true``, which flushes float32 denormals to zero and would let a GPU's
bits differ from the CPU's. So the code is compiled here, and CuPy loads it. Compiling needs no GPU.
"""

from __future__ import annotations

import hashlib
import struct

from lesionsynth._cache import cache_folder, find, keep
from lesionsynth.cuda.programs import OPTIONS, source

FORMAT = "2"
"""Of cached files, a part of their names. Those of the first lack their last byte."""


def nvrtc_version() -> str:
    """Return NVRTC's version."""
    from cupy_backends.cuda.libs import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def supported(capability: int) -> str:
    """Return what to compile for a device: its machine code, or the newest PTX that NVRTC knows.

    Parameters
    ----------
    capability : int
        Compute capability, as in 90.

    Raises
    ------
    RuntimeError
        The device is older than all that NVRTC knows.
    """
    from cupy_backends.cuda.libs import nvrtc

    known = sorted(int(arch) for arch in nvrtc.getSupportedArchs())
    if capability in known:
        return f"sm_{capability}"
    older = [arch for arch in known if arch < capability]
    if not older:
        raise RuntimeError(
            f"the GPU has compute capability {capability / 10}, and NVRTC {nvrtc_version()} begins with "
            f"{known[0] / 10}; an older CUDA may know it: pip install 'lesionsynth[cuda12]'"
        )
    return f"compute_{older[-1]}"


def compile_program(text: str, architecture: str, *options: str) -> tuple[bytes, str]:
    """Compile a text; returns the code and the log.

    Parameters
    ----------
    text : str
        CUDA C++.
    architecture : str
        ``sm_90`` for machine code, ``compute_90`` for PTX.
    options : str
        Beyond `lesionsynth.cuda.programs.OPTIONS`.

    Raises
    ------
    RuntimeError
        It does not compile; the message is the log.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(text, "program.cu", [], [])
    try:
        try:
            nvrtc.compileProgram(program, (*OPTIONS, f"--gpu-architecture={architecture}", *options))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(nvrtc.getProgramLog(program)) from error
        log = nvrtc.getProgramLog(program)
        if architecture.startswith("sm_"):
            return whole(nvrtc.getCUBIN(program)), log
        code = nvrtc.getPTX(program)
        return code if isinstance(code, bytes) else code.encode(), log
    finally:
        nvrtc.destroyProgram(program)


def whole(code: bytes) -> bytes:
    """Put back the last byte of machine code, which CuPy's ``getCUBIN`` takes off as if it ended a string.

    An ELF file ends with a table of headers, and an entry of a table with a small number of eight bytes, the
    highest last: the byte is 0.

    Raises
    ------
    RuntimeError
        More is missing.
    """
    end = elf_end(code)
    if len(code) == end - 1:
        code += b"\0"
    if len(code) < end:
        raise RuntimeError(f"NVRTC gave machine code of {len(code)} bytes where its headers tell of {end}")
    return code


def elf_end(code: bytes) -> int:
    """Return where the tables of headers of a 64-bit ELF file end: the later of its two."""
    if code[:5] != b"\x7fELF\x02" or len(code) < 64:
        raise RuntimeError(f"NVRTC gave no machine code but {code[:16]!r}")
    segments, sections = struct.unpack_from("<QQ", code, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", code, 54)
    return int(max(segments + segment_size * segment_count, sections + section_size * section_count))


def compiled(program: str, image: str, capability: int) -> bytes:
    """Return the code of a program, compiling it where no earlier process has.

    Parameters
    ----------
    program, image : str
        See `lesionsynth.cuda.programs.source`.
    capability : int
        Of the device, as in 90.

    Notes
    -----
    It is kept by the rules of `lesionsynth._cache`.
    """
    architecture = supported(capability)
    text = source(program, image)
    key = "\0".join([FORMAT, text, architecture, nvrtc_version(), *OPTIONS])
    suffix = "cubin" if architecture.startswith("sm_") else "ptx"
    name = f"{program}-{image}-{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.{suffix}"
    code = _sound(find(cache_folder, name, "CUDA"), suffix)
    if code is None:
        code, _ = compile_program(text, architecture)
        keep(cache_folder, name, code, "CUDA")
    return code


def _sound(code: bytes | None, suffix: str) -> bytes | None:
    """Return a file's code; None where it is damaged."""
    if code and suffix == "cubin":
        try:
            return whole(code)
        except RuntimeError:
            return None
    return code if code and code.rstrip(b"\0\n ").endswith(b"}") else None  # PTX ends with a function
