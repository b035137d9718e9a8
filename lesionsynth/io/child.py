"""Let native code read image files in a process of its own, which a damaged file may take down.

One such process serves a command: it starts with the first read, takes one after another, is started anew
after a crash, and ends when the other end of its socket is closed, however that process ended. It runs this
very file as a script, so that neither the caller's main module nor the rest of the package is imported.
Voxels come back in memory that both processes share.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IN_PROCESS = "LESIONSYNTH_READ_IN_PROCESS"
"""Environment variable: 1 reads in the caller's process."""
_SECONDS, _BYTES_A_SECOND = 60, 1_000_000
"""A read may take so long, and a second more for each so many bytes."""
_ROOM = 2 << 30
"""Bytes that the process may take beside three copies of the voxels, for libraries and decoders."""
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Image:
    """What a native reader made of files.

    Attributes
    ----------
    size, spacing, origin, direction : tuples
        As ITK has them: x first, direction row-major.
    components : int
        Values per voxel.
    dtype : str
        As NumPy spells it: "int16".
    voxels : buffer
        In file order, x fastest.
    owner : object
        What keeps the buffer alive.
    series : str or None
        SeriesInstanceUID, of DICOM.
    files : tuple of Path
        Slices in the order of the voxels; empty for one file.
    warnings : tuple of str
        What was decided and the user should know.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    components: int
    dtype: str
    voxels: Any
    owner: Any = None
    series: str | None = None
    files: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()


def read(
    kind: str, files: Sequence[str], expected: int, beside: Sequence[str] = (), real: bool = False
) -> Image:
    """Read an image from one file, or from the slices of a DICOM series.

    Parameters
    ----------
    kind : str
        ITK's image IO: "NrrdImageIO", "GDCMImageIO", ...
    files : sequence of str
        Several are slices, stacked in this order. They must have been checked, see `lesionsynth.io.checks`.
    expected : int
        Bytes of the voxels.
    beside : sequence of str
        Files of the same folder that a header names.
    real : bool
        Give numbers of double precision, whatever the first slice has.

    Raises
    ------
    RuntimeError
        The reader refuses the files, crashes on them, or takes too long.
    ImportError
        SimpleITK is not installed.
    """
    with _plain_names(files, beside) as names:
        request = {"kind": kind, "files": names, "expected": expected, "real": real}
        if os.environ.get(IN_PROCESS, "0") not in ("", "0") or not hasattr(socket, "send_fds"):
            return _image(*_read(request))
        with _state.lock:
            process = _state.process = _state.process or _Process()
            try:
                return process.read(request)
            except BaseException as error:
                # unless it said so itself, an answer may still come that nobody waits for: after Ctrl-C, too
                if not isinstance(error, Refused):
                    _state.end()
                raise


class Refused(RuntimeError):
    """The reader says no; its process is well.

    Attributes
    ----------
    at : int or None
        Which of several files it does not read.
    """

    def __init__(self, rule: str, at: int | None = None) -> None:
        super().__init__(rule)
        self.at = at


class _Process:
    """The process that reads, seen from the one that asks."""

    def __init__(self) -> None:
        self._socket, there = socket.socketpair()
        try:
            with there:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", __file__],
                    stdin=there.fileno(),
                    stdout=subprocess.DEVNULL,  # native code talks there
                    stderr=subprocess.DEVNULL,
                    cwd=os.sep,
                )
        except BaseException:
            self._socket.close()
            raise

    def read(self, request: dict[str, Any]) -> Image:
        seconds = _SECONDS + int(request["expected"]) // _BYTES_A_SECOND
        self._socket.settimeout(seconds + 30)  # the process keeps time itself, unless it was stopped
        try:
            self._socket.sendall(
                json.dumps({**request, "seconds": seconds, "path": sys.path}).encode() + b"\n"
            )
            answer, handles = self._receive()
        except TimeoutError:
            raise RuntimeError(f"the reader takes longer than {seconds} seconds") from None
        except (BrokenPipeError, ConnectionResetError, EOFError):
            raise RuntimeError(self._ended(seconds)) from None
        try:
            if "missing" in answer:
                raise ImportError(answer["missing"])
            if "refused" in answer:
                raise Refused(answer["refused"], answer["at"])
            return _image(answer, mmap.mmap(handles[0], 0))
        finally:
            for handle in handles:
                os.close(handle)

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        text, handles = b"", []
        while not text.endswith(b"\n"):
            part, more, _, _ = socket.recv_fds(self._socket, 1 << 16, 1)
            handles += more
            if not part:
                raise EOFError
            text += part
        return json.loads(text), handles

    def _ended(self, seconds: int) -> str:
        try:
            code = self._child.wait(10)
        except subprocess.TimeoutExpired:
            return "the reader closed its end"
        if code == -signal.SIGALRM:
            return f"the reader takes longer than {seconds} seconds"
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"the reader crashed on it ({signal.Signals(-code).name}){hint}"
        return f"the reader ended with status {code}"

    def end(self) -> None:
        self._socket.close()
        self._child.kill()
        self._child.wait()

    def forget(self) -> None:
        """Let go of a process that belongs to the one that this one was forked from."""
        self._socket.close()  # else it would not see the end of its own parent
        self._child.returncode = 0  # else its destructor would complain


class _State:
    """The process of this process, if any."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: _Process | None = None

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.end()

    def forget(self) -> None:
        process, self.process, self.lock = self.process, None, threading.Lock()
        if process is not None:
            process.forget()


_state = _State()


@contextmanager
def _plain_names(files: Sequence[str], beside: Sequence[str]) -> Iterator[list[str]]:
    """Absolute paths that native code takes: text in UTF-8 (SimpleITK aborts on others) without formats.

    Where one is odd, links stand in for all.
    """
    paths = [os.path.abspath(file) for file in files]
    # bytes that are no UTF-8 arrive as lone surrogates, which are not printable
    if all(path.isprintable() and "%" not in path for path in paths):
        yield paths
        return
    with tempfile.TemporaryDirectory(prefix="lesionsynth-") as folder:
        for other in beside:
            os.symlink(os.path.abspath(other), os.path.join(folder, os.path.basename(other)))
        names = []
        for number, path in enumerate(paths):
            names.append(os.path.join(folder, f"{number:05d}{os.path.splitext(path)[1].lower()}"))
            os.symlink(path, names[-1])
        yield names


def _image(answer: dict[str, Any], voxels: Any, owner: Any = None) -> Image:
    size, spacing, origin, direction = (tuple(answer[n]) for n in ("size", "spacing", "origin", "direction"))
    return Image(size, spacing, origin, direction, answer["components"], answer["dtype"], voxels, owner)


def _read(request: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Read here; (answer, voxels, image), of which the last owns the voxels."""
    import SimpleITK as sitk

    files = request["files"]

    def execute(files: Sequence[str]) -> Any:
        reader: Any = sitk.ImageFileReader() if len(files) == 1 else sitk.ImageSeriesReader()
        reader.SetImageIO(request["kind"])  # never the one that the content suggests
        if len(files) == 1:
            reader.SetFileName(files[0])
        else:
            reader.SetFileNames(files)
        if request["real"]:
            reader.SetOutputPixelType(sitk.sitkFloat64)
        return reader.Execute()

    try:
        image = execute(files)
    except RuntimeError as error:
        raise Refused(_rule(error), _culprit(execute, files)) from error
    view = sitk.GetArrayViewFromImage(image)
    answer = {
        "size": image.GetSize(),
        "spacing": image.GetSpacing(),
        "origin": image.GetOrigin(),
        "direction": image.GetDirection(),
        "components": image.GetNumberOfComponentsPerPixel(),
        "dtype": view.dtype.name,
    }
    return answer, view, image


def _culprit(execute: Callable[[Sequence[str]], Any], files: Sequence[str]) -> int | None:
    """Find the first of several files that cannot be read by itself."""
    for at, file in enumerate(files):
        try:
            execute([file])
        except RuntimeError:
            return at if len(files) > 1 else None
    return None


def _rule(error: BaseException) -> str:
    """Return the last line of what a reader says, without where in memory it stood."""
    lines = [part.strip() for part in str(error).splitlines() if part.strip(" \r") != "Reason: Success"]
    lines = [part for part in lines if part]
    last = lines[-1] if lines else type(error).__name__
    return re.sub(r"^ITK ERROR: |\w+\(0x[0-9a-f]+\): ", "", last)


def _serve() -> None:
    """Read for the process at the other end of standard input, until it closes it."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other gets it as well, and ends this one
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold patients' data
    there = socket.socket(fileno=os.dup(0))
    for line in there.makefile("rb"):
        request = json.loads(line)
        # ends this process in the middle of native code, and where nobody is left to do it
        signal.alarm(request["seconds"])
        handle = -1
        try:
            answer, handle = _attempt(request)
        except ImportError as error:
            answer = {"missing": str(error)}
        except (RuntimeError, MemoryError, ValueError, OSError) as error:
            answer = {"refused": _rule(error), "at": getattr(error, "at", None)}
        signal.alarm(0)
        text = json.dumps(answer).encode() + b"\n"
        if handle < 0:
            there.sendall(text)
        else:
            sent = socket.send_fds(there, [text], [handle])
            there.sendall(text[sent:])
            os.close(handle)


def _attempt(request: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Read; (answer, file with the voxels)."""
    import resource

    sys.path[:] = [folder for folder in request["path"] if folder]  # the empty one is where the caller is
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # each would have its own stack and heap
    with suppress(ValueError, OSError):  # where the system has a lower limit, or does not know it
        with open("/proc/self/statm", encoding="ascii") as stream:
            own = int(stream.read().split()[0]) * mmap.PAGESIZE
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (own + _ROOM + 3 * int(request["expected"]), hard))
    answer, voxels, image = _read(request)
    if voxels.nbytes == 0:
        raise ValueError("the image has no voxels")
    handle = _memory()
    data = memoryview(voxels).cast("B")
    try:
        for at in range(0, len(data), _BLOCK):
            part = data[at : at + _BLOCK]
            while part:
                part = part[os.write(handle, part) :]
    except BaseException:
        os.close(handle)
        raise
    del data, voxels, image
    return answer, handle


def _memory() -> int:
    """Open an empty file without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("voxels", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


if __name__ == "__main__":
    _serve()
else:
    atexit.register(_state.end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_state.forget)
