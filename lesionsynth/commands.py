"""What every command shares: exit codes, one line for what went wrong, closed streams, interrupts.

Exit codes: 0 done; 1 something failed on the way; 2 a wrong call or input; 130 interrupted, 143 terminated,
129 where the terminal was closed.

Importing this module, the first that a command loads, also sees to an interrupt or a lack of memory while
the others are being loaded.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import io
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any

FAILED = 1
WRONG = 2
_WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):
    _WORDS[signal.SIGHUP] = "its terminal was closed"
_CLEARING = 0.5
"""Seconds after an interrupt in which another one is the same."""
_NO_MEMORY = (
    "allocate memory",
    "out of memory",
    "failed to map segment",
    "bad_alloc",
    "can't start new thread",
    "unable to allocate",
)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, or the like: what is half-done is cleared away as after an interrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(
    program: str,
    body: Callable[[], int],
    *,
    wrong: tuple[type[Exception], ...] = (ValueError, OSError, ImportError),
    failed: tuple[type[Exception], ...] = (),
) -> int:
    """Run a command's body and turn what may happen to it into an exit code and one line on stderr.

    Parameters
    ----------
    program : str
        Begins the line.
    body : callable
        The command; returns its exit code.
    wrong : tuple of exception types
        Tell of a wrong call or input: `WRONG`.
    failed : tuple of exception types
        Tell of a failure on the way, before `wrong` is asked: `FAILED`. A lack of memory always does.

    Returns
    -------
    int
        Exit code.

    Notes
    -----
    A closed stdout or stderr ends nothing: the work goes on unheard. One that is full is told at the end.
    """
    sys.excepthook = _hooks.get("excepthook", sys.excepthook)
    with _streams() as out:
        try:
            with _signals():
                code = body()
        except SystemExit as end:  # of the parsers: help, or a wrong option
            _hooks["code"] = end.code if isinstance(end.code, int) else int(end.code is not None)
            raise
        except (Exception, KeyboardInterrupt) as error:
            code = _told(program, error, wrong, failed)
        else:
            if (full := out()) is not None:
                _say(f"{program}: standard output cannot be written: {os.strerror(full)}")
                code = code or FAILED
    _hooks["code"] = code
    return code


def _told(
    program: str,
    error: BaseException,
    wrong: tuple[type[Exception], ...],
    failed: tuple[type[Exception], ...],
) -> int:
    """Tell what ended a command and return its exit code; an error that nobody expects is raised again."""
    if (stop := _stop(error)) is not None:
        number = stop.number if isinstance(stop, _Terminated) else signal.SIGINT
        _hooks["telling"] = True  # another Ctrl-C has no line of its own
        _say(f"{program}: {_WORDS[number]}")
        _hooks.update(code=128 + number, telling=False)
        return 128 + number
    if lacks_memory(error):
        _say(f"{program}: not enough memory: {one_line(error)}")
        return FAILED
    if not isinstance(error, (*failed, *wrong)):
        raise error
    _say(f"{program}: {one_line(error)}")
    return FAILED if isinstance(error, failed) else WRONG


def _stop(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the interrupt that an error is, or that it came of: a zip file cannot be closed halfway."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def lacks_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or one that led to it, comes from a lack of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        text = str(error).lower()
        if isinstance(error, ImportError | OSError | RuntimeError) and any(w in text for w in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def optional(name: str, advice: str) -> ModuleType:
    """Import a package that may be missing.

    Parameters
    ----------
    name : str
        Of the module.
    advice : str
        What needs it, and how to install it.

    Raises
    ------
    ImportError
        It is not installed, with `advice`; or it is, and cannot be loaded.
    MemoryError
        There is not enough memory to load it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == name.partition(".")[0]:
            raise ImportError(advice) from error
        raise ImportError(f"{name} is installed but cannot be loaded: {error}") from error
    except (ImportError, OSError, MemoryError, RuntimeError) as error:
        if lacks_memory(error):
            raise MemoryError(f"{name} cannot be loaded: {error}") from error
        raise ImportError(f"{name} is installed but cannot be loaded: {error}") from error


class _Stream(io.FileIO):
    """A standard stream whose reader may go away."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle, "w", closefd=False)
        self.problem: int | None = None
        """Why it could not be written, if not for want of a reader."""

    def write(self, data: Any) -> int:
        if self.problem is None:
            try:
                return super().write(data) or 0
            except BrokenPipeError:
                self.problem = errno.EPIPE
            except OSError as error:
                self.problem = error.errno or errno.EIO
        return memoryview(data).nbytes


@contextmanager
def _streams() -> Iterator[Callable[[], int | None]]:
    """Put streams that never raise in the place of the process's own; gives the problem of stdout."""
    for handle in (0, 1, 2):
        try:
            os.fstat(handle)
        except OSError:  # closed before the start: the next file opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    before, raw = (sys.stdout, sys.stderr), {}
    for name, handle in (("stdout", 1), ("stderr", 2)):
        stream: Any = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue  # somebody's own, as in a test
        if stream is not None:
            with suppress(OSError):
                stream.flush()
        raw[name] = _Stream(handle)
        text = io.TextIOWrapper(
            io.BufferedWriter(raw[name]),
            encoding=getattr(stream, "encoding", None) or "utf-8",
            errors="backslashreplace",  # a file's name may hold what no encoding has
            line_buffering=name == "stderr" or raw[name].isatty(),
        )
        setattr(sys, name, text)

    def problem() -> int | None:
        if "stdout" not in raw:
            return None
        sys.stdout.flush()
        found = raw["stdout"].problem
        return None if found == errno.EPIPE else found

    try:
        yield problem
    finally:
        for name in raw:
            getattr(sys, name).flush()
        sys.stdout, sys.stderr = before


@contextmanager
def _signals() -> Iterator[None]:
    """Have SIGINT, SIGTERM and SIGHUP raise, where a program has not decided otherwise."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _WORDS:
            if signal.getsignal(number) is (_leave if number == signal.SIGINT else signal.SIG_DFL):
                before[number] = signal.signal(number, _stop_here)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_here(number: int, frame: FrameType | None) -> None:
    """Raise; but not again while what is half-done is being cleared away."""
    now = time.monotonic()
    if now < _hooks.get("stopped", -math.inf) + _CLEARING:
        return
    _hooks["stopped"] = now
    raise KeyboardInterrupt if number == signal.SIGINT else _Terminated(number)


@contextmanager
def plainly() -> Iterator[None]:
    """Print what is warned of as one line on standard error: a user is not to read places in the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _say(printable(f"warning: {message}"))
        yield


def _say(line: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """Return what an error says on one line, without what would move a terminal's cursor."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def printable(text: str) -> str:
    """Return a text with everything that no terminal should see escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


# ---- before a command's own code runs, and behind it

_hooks: dict[str, Any] = {}
_LEAST = {"lesionsynth": 512 << 20, "normnet": 1280 << 20}
"""Address space to load the modules, in bytes: native libraries abort with less, or never return."""


def _program() -> str | None:
    """Name the command that this process is being started as; None where it is another program."""
    first = sys.argv[0] if getattr(sys, "argv", None) else ""
    if first == "-m":  # for as long as packages are loaded; then it is the module's file
        given = sys.orig_argv
        module = given[given.index("-m") + 1] if "-m" in given[:-1] else ""
        return module if module.partition(".")[0] in ("lesionsynth", "normnet") else None
    return "lesionsynth" if Path(first).name in ("lesionsynth", "lesionsynth.exe") else None


def _address_space() -> int | None:
    """Bytes that this process may map."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: nothing has been begun, or all is done and told."""
    if _hooks.get("telling"):
        return
    if "code" not in _hooks:
        with suppress(OSError):
            os.write(2, f"{_hooks['program']}: interrupted\n".encode())
    os._exit(_hooks.get("code", 128 + number))


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one line why a command's modules could not be loaded."""
    if lacks_memory(error):
        said, code = f"not enough memory: {_last(error)}", FAILED
    elif isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(
        ("lesionsynth", "normnet")
    ):
        said, code = f"{error.name} is not installed: pip install 'lesionsynth[train]'", WRONG
    else:
        _hooks["excepthook"](kind, error, trace)
        return
    _say(f"{_hooks['program']}: {said}")
    os._exit(code)


def _last(error: BaseException) -> str:
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return one_line(error)


def _guard() -> None:
    program = _program()
    if program is None or threading.current_thread() is not threading.main_thread():
        return
    _hooks.update(program=program, excepthook=sys.excepthook)
    sys.excepthook = _tell
    least, limit = _LEAST[program.partition(".")[0]], _address_space()
    if limit is not None and limit < least:
        mib = f"{least >> 20} MiB, got {limit >> 20}"
        raise MemoryError(f"the address space (ulimit -v) must be at least {mib}")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
        # the last of all that is done at the end, when Python gives signals back to the system
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


_guard()
