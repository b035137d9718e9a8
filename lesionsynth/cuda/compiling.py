"""From source to machine code: NVRTC with our options, once for each type and architecture, kept on disk.

CuPy's own compilation appends ``-ftz=true``, which flushes float32 denormals to zero and would let a GPU's
bits differ from the CPU's. So the code is compiled here and CuPy loads it from a file. That needs no GPU.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from lesionsynth.cuda._source import OPTIONS, source


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
        Beyond `lesionsynth.cuda._source.OPTIONS`.

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
        code = nvrtc.getCUBIN(program) if architecture.startswith("sm_") else nvrtc.getPTX(program)
        raw = code if isinstance(code, bytes) else code.encode()
        return raw, nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def cache_folder() -> Path:
    """Folder of compiled programs: ``LESIONSYNTH_CACHE_DIR``, or ``lesionsynth`` in the user's cache."""
    named = os.environ.get("LESIONSYNTH_CACHE_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "lesionsynth"


def compiled(program: str, image: str, capability: int) -> Path:
    """Return the file of a compiled program, compiling it where no earlier process has.

    Parameters
    ----------
    program, image : str
        See `lesionsynth.cuda._source.source`.
    capability : int
        Of the device, as in 90.

    Notes
    -----
    A file's name is the hash of all that it depends on. It is written beside its place and moved there, so
    several processes may do this at once. Where the folder cannot be written, a temporary one serves.
    """
    architecture = supported(capability)
    text = source(program, image)
    key = "\0".join([text, architecture, nvrtc_version(), *OPTIONS])
    suffix = "cubin" if architecture.startswith("sm_") else "ptx"
    name = f"{program}-{image}-{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.{suffix}"
    folder = cache_folder()
    if (folder / name).exists():
        return folder / name
    code, _ = compile_program(text, architecture)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write(folder / name, code)
    except OSError:
        return _write(Path(tempfile.mkdtemp(prefix="lesionsynth-")) / name, code)


def _write(path: Path, code: bytes) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    with os.fdopen(handle, "wb") as file:
        file.write(code)
    os.replace(name, path)
    return path
