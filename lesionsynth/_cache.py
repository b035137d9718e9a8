"""Compiled code on disk: one folder and one rule for Numba's kernels and for NVRTC's.

A file's name is the hash of all that its code depends on, so what does not fit is never found, and two
versions, checkouts or processors share a folder. It is written beside its place and moved there, so several
processes may do this at once, and none sees a part. Code runs as the user, so it is loaded only from a file
and a folder that belong to the user and that nobody else may write. Where there is no such folder, and where
one is full, damaged or gone, code is compiled in every process, which is said once.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import pkgutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any, cast

import llvmlite
import numba
import numpy as np
import numpy.ma  # see `_apart`
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from lesionsynth.strict import regular_file

DIGEST = 32
"""Bytes of SHA-256 behind a kernel in its file."""
LONGEST = 2**26
"""Bytes of a file that is read; the longest kernel has less than 2**20."""
SWITCHES = (
    "OPT", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "USING_SVML", "LOOP_VECTORIZE", "SLP_VECTORIZE",
)  # fmt: skip
"""Settings of Numba, by environment variables, that change the code it makes."""


def cache_folder() -> Path:
    """Folder of compiled code: ``LESIONSYNTH_CACHE_DIR``, or ``lesionsynth`` in the user's cache.

    Raises
    ------
    OSError
        There is neither, nor a home folder.
    """
    named = os.environ.get("LESIONSYNTH_CACHE_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # such a path is to be ignored, says its specification
        base = os.environ.get("LOCALAPPDATA", "")
    if base:
        return Path(base) / "lesionsynth"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError("the user has no home folder") from error
    if not home.is_dir():  # nor is one made, as root could
        raise OSError(f"the home folder {home} does not exist")
    return home / ".cache" / "lesionsynth"


def kernel_folder() -> Path:
    """Folder of Numba's kernels: ``lesionsynth`` in ``NUMBA_CACHE_DIR`` where that is set, or `cache_folder`.

    Raises
    ------
    OSError
        See `cache_folder`.
    """
    named = numba.config.CACHE_DIR
    return Path(named) / "lesionsynth" if named else cache_folder()


def find(folder: Callable[[], Path], name: str, what: str) -> bytes | None:
    """Read a file that the user alone can have written; None where there is none, or none to be trusted.

    Parameters
    ----------
    folder : callable
        `cache_folder` or `kernel_folder`.
    name : str
        Of the file.
    what : str
        What is compiled in every process instead, for the warning.

    Warns
    -----
    RuntimeWarning
        Once a process: why the folder is not used.
    """
    try:
        path = _prepared(folder()) / name
        with regular_file(path, LONGEST) as (stream, _):
            return None if distrust(os.fstat(stream.fileno())) else stream.read()
    except (FileNotFoundError, ValueError):  # none, or a pipe, a folder, too long a file
        return None
    except OSError as error:
        _tell_of(folder, what, error)
    return None


def keep(folder: Callable[[], Path], name: str, data: bytes, what: str) -> None:
    """Put a file into its place; see `find`."""
    try:
        path = _prepared(folder()) / name
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        _tell_of(folder, what, error)


def distrust(status: os.stat_result) -> str | None:
    """Say why somebody else could have written a file or folder; None where nobody could.

    Owners are not told apart on Windows, where a user's folders are the user's.
    """
    if not hasattr(os, "getuid"):
        return None
    if status.st_uid != os.getuid():
        return f"it belongs to user {status.st_uid}, not to {os.getuid()}"
    if status.st_mode & 0o022:
        return "others may write to it; chmod go-w"
    return None


def _prepared(folder: Path) -> Path:
    """Return a folder that exists and that the user alone can write, or raise `OSError`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    refused = distrust(folder.stat())
    if refused:
        raise OSError(refused)
    return folder


def _tell_of(folder: Callable[[], Path], what: str, error: OSError) -> None:
    try:
        tell(f"the {what} kernels", f"{folder()} is not used to keep them", str(error))
    except OSError:
        tell(f"the {what} kernels", "no folder is used to keep them", str(error))


@cache
def _told(what: str) -> list[str]:
    """Where a process remembers that it has told."""
    return []


def tell(what: str, how: str, why: str) -> None:
    """Warn once a process, for each of the two compilers."""
    if _told(what):
        return
    _told(what).append(why)
    warnings.warn(
        f"{what} are compiled in every process: {how}, since {why}. "
        "LESIONSYNTH_CACHE_DIR names another folder",
        RuntimeWarning,
        stacklevel=2,
    )


class NotCompiled(RuntimeError, ImportError):
    """``NUMBA_DISABLE_JIT`` keeps Numba from compiling; an ImportError, which commands tell in one line."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function with Numba at its first call, and keep it; it runs without the GIL.

    With ``NUMBA_DISABLE_JIT`` its call raises `NotCompiled`: most kernels have instructions of the processor,
    which Python cannot run, and it would take hours for the others.
    """
    if numba.config.DISABLE_JIT:

        @wraps(function)
        def refuse(*_: Any, **__: Any) -> Any:
            raise NotCompiled(
                "lesionsynth's CPU kernels must be compiled by Numba and cannot run as Python: unset "
                f"NUMBA_DISABLE_JIT, which is {numba.config.DISABLE_JIT}, before lesionsynth is imported"
            )

        return refuse
    made = numba.njit(nogil=True)(function)
    made._cache = KernelCache(function)  # a name of Numba's own; a test watches it
    made._compile_for_args = _apart(made._compile_for_args)  # another
    return made


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function beside the main thread, where Python runs the handlers of signals.

    One that raises, on Ctrl-C say, while Numba compiles would leave it with locks taken and tables half read,
    and nothing could be compiled any more. So would one in the middle of an import, whose lock no other
    thread would get: all that Numba imports before it compiles, which is `numpy.ma`, comes with this module.
    """

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return function(*arguments, **named)
        process, over = os.getpid(), threading.Lock()
        answer: list[tuple[Any, BaseException | None]] = []
        over.acquire()

        def work() -> None:
            try:
                answer.append((function(*arguments, **named), None))
            except BaseException as error:
                answer.append((None, error))
            finally:
                over.release()

        try:
            threading.Thread(target=work, name="lesionsynth-compile").start()
        except RuntimeError as error:
            if torn := torn_off(error):
                raise torn from None
            work()  # the system refuses a thread, or Python ends
        while not over.acquire(timeout=0.1):
            if os.getpid() != process:  # a handler has forked, and the other thread is not here
                return function(*arguments, **named)
        result, failure = answer[0]
        if failure is not None:
            raise failure
        return result

    return run


def torn_off(error: RuntimeError) -> BaseException | None:
    """Return what a signal's handler raised while a thread was being started; its lock complains instead."""
    return error.__context__ if error.args == ("release unlocked lock",) else None


class KernelCache:
    """What Numba asks where it compiles a function: the place of `numba.core.caching.Cache`.

    Numba's own looks at the time and size of a function's file, not into what it calls: after a ``git pull``
    that changes another file it would run old code. Its index may tell of a file that another process is
    about to replace, and it fails where a folder is full or a file is damaged.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        # At import: a ``git pull`` beside a running process must not name its code after the new files.
        self._sources = sources_of(function.__module__)

    @property
    def cache_path(self) -> str | None:
        """Folder, for Numba's statistics."""
        try:
            return str(kernel_folder())
        except OSError:
            return None

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Return what was compiled for a signature, or None."""
        target.refresh()
        name = self._name(signature, target.codegen())
        data = find(kernel_folder, name, "CPU") if name else None
        if not name or data is None or _digest(name, data[:-DIGEST]) != data[-DIGEST:]:
            return None  # there is none; or it is damaged, and will be replaced
        return CompileResult._rebuild(target, *pickle.loads(data))

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what was compiled for a signature."""
        name = self._name(signature, result.codegen)
        if name and not result.library.has_dynamic_globals:  # addresses of this process
            data = dumps(result._reduce())
            keep(kernel_folder, name, data + _digest(name, data), "CPU")

    def _name(self, signature: Any, codegen: Any) -> str | None:
        """Name of the file; None where nobody knows what the code is made of."""
        if self._sources is None:
            tell("the CPU kernels", "they cannot be kept", "the package's own files cannot be read")
            return None
        versions = sys.version, numba.__version__, llvmlite.__version__, np.__version__
        switches = [getattr(numba.config, name, None) for name in SWITCHES]
        made_of = versions, switches, codegen.magic_tuple(), signature, self._function.__module__
        digest = hashlib.sha256(self._sources + repr(made_of).encode()).hexdigest()[:24]
        return f"{self._function.__name__}-{self._function.__code__.co_firstlineno}-{digest}.nbc"


def _digest(name: str, data: bytes) -> bytes:
    """Hash what a file holds, and for whom."""
    return hashlib.sha256(name.encode() + b"\0" + data).digest()


@cache
def sources_of(module: str) -> bytes | None:
    """Hash every file that a kernel of a module may be made of: its own, and those of `lesionsynth.cpu`.

    None where they cannot be read, as in some frozen applications.
    """
    spec = sys.modules[module].__spec__
    try:
        return hashlib.sha256(_kernels() + _text_of(spec)).digest()
    except (AttributeError, OSError):
        return None


def _text_of(spec: Any) -> bytes:
    """Read a module where it lies: on disk, or in an archive."""
    return bytes(spec.loader.get_data(spec.origin))


@cache
def _kernels() -> bytes:
    """Hash the files of `lesionsynth.cpu`."""
    texts = []
    for folder in (Path(__file__).parent / "cpu", Path(__file__).parent / "cpu" / "engine"):
        found = [file.read_bytes() for file in sorted(folder.glob("*.py"))]
        if not found:  # in an archive, or without sources
            modules = sorted(pkgutil.iter_modules([str(folder)]), key=lambda module: module.name)
            found = [_text_of(cast(Any, m.module_finder).find_spec(m.name, None)) for m in modules]
        if not found:
            raise OSError(f"{folder} holds no modules")
        texts += found
    return hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in texts)).digest()
