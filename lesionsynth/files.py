"""Files that appear as a whole or not at all, and folders of which nothing is removed but what is ours.

Everything that this project writes goes through `replacing` or `write_atomically`: beside its place under a
hidden name, ``.<name>.of-<host>-<process>.<digits>``, and then renamed. What a killed process leaves is known
by that name and taken away by the next one that writes there; what a live one is writing stays.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ABANDONED = 86400.0
"""Seconds after which anything half-written counts as left over: of other machines, process numbers say
nothing, and in a container they recur."""
SOFTWARE = "lesionsynth"
"""Said in every picture that is drawn, to tell it from those of others."""
_STARTED = time.time()
_LEFT_OVER = re.compile(r"\..+\.of-(?P<host>[\w.-]+)-(?P<pid>\d+)\.[0-9a-f]{16}(\..+)?", re.DOTALL | re.ASCII)
_LONGEST = 255
"""Bytes of a name, on every common file system."""
_held: set[tuple[int, Path]] = set()
"""Folders that this process has claimed, with its number: a forked child holds none."""


def temporary(path: Path) -> Path:
    """Return a hidden name beside `path` that tells the process, with the suffix that `path` has."""
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    end = f"{_host()}-{os.getpid()}.{uuid.uuid4().hex[:16]}{suffix}"
    return path.with_name(_begin(path.name) + end)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write under; the file takes `path`'s place when the block ends, and goes if it fails.

    Parameters
    ----------
    path : Path
        File to make or to replace; its folder is there.

    Yields
    ------
    Path
        Beside `path`, with its suffix. Nothing is there yet.

    Raises
    ------
    OSError
        No room, no right to write, or a folder is in the way; names `path`.
    """
    sweep(path.parent, path.name)
    beside = temporary(path)
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        # where the disk is full the operating system names no file
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(beside)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def replacing_folder(path: Path, names: Collection[str], check: Callable[[], object]) -> Iterator[Path]:
    """Give a folder to fill; it takes `path`'s place when the block ends, and goes if it fails.

    Parameters
    ----------
    path : Path
        Folder to make or to replace; that which it lies in is there.
    names : collection of str
        What both may hold, see `remove_folder`.
    check : callable
        Raises unless what lies at `path` at the end may be replaced.

    Yields
    ------
    Path
        Beside `path`, empty.

    Raises
    ------
    OSError
        No room, or no right to write; names `path`, or the file that was to lie in it.
    """
    sweep(path.parent, path.name, names)
    work, old = temporary(path), temporary(path)
    try:
        work.mkdir()
        yield work
        if os.path.lexists(path):
            check()
            os.replace(path, old)
        os.rename(work, path)
        if old.exists():
            remove_folder(old, names)
    except BaseException as error:
        if old.exists() and not os.path.lexists(path):
            os.rename(old, path)
        if work.exists():
            remove_folder(work, names)
        # where the disk is full the operating system names no file, or one that is gone
        if isinstance(error, OSError) and error.errno and str(work) in (where := str(error.filename or work)):
            raise OSError(error.errno, error.strerror, where.replace(str(work), str(path))) from error
        raise


@contextmanager
def named_when_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its name when the block ends: of a process that is killed before, none stays.

    Parameters
    ----------
    path : Path
        Nothing is there yet. Where the system has no files without a name, it has it from the beginning.

    Yields
    ------
    binary stream
        To write to.
    """
    try:
        handle = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
    except (AttributeError, OSError):  # another system, or a file system that cannot
        with path.open("xb") as stream:
            yield stream
        return
    with os.fdopen(handle, "w+b") as stream:
        yield stream
        stream.flush()
        os.fsync(handle)  # now: whoever renames it would have to wait under a name that is not its last
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # with a folder named, the link in /proc is followed
            os.link(f"/proc/self/fd/{handle}", path, src_dir_fd=folder, follow_symlinks=True)
        except OSError:  # no /proc
            stream.seek(0)
            with path.open("xb") as named:
                shutil.copyfileobj(stream, named)
        finally:
            os.close(folder)


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write a file so that a reader sees the old or the new one, never a part; text in UTF-8.

    Returns
    -------
    Path
        `path`.
    """
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sweep(folder: Path, name: str | None = None, inside: Collection[str] = ()) -> None:
    """Take away what killed processes left half-written; what a live one is writing stays.

    Parameters
    ----------
    folder : Path
        Where to look, not deeper.
    name : str, optional
        Only what was to become the file of this name.
    inside : collection of str
        What a half-written folder may hold; one with other files stays.
    """
    for path in left_over(folder, name):
        try:
            if path.is_dir() and not path.is_symlink():
                if not others(path, inside):
                    remove_folder(path, inside)
            else:
                path.unlink()
        except OSError:  # another process has just taken it away, or it is not ours to remove
            continue


def left_over(folder: Path, name: str | None = None) -> list[Path]:
    """Return what processes that have ended were writing in a folder, to become the file `name` or any."""
    begin = "." if name is None else _begin(name)
    try:
        found = [Path(entry.path) for entry in os.scandir(folder) if entry.name.startswith(begin)]
    except OSError:  # nothing there
        return []
    return [path for path in found if is_left_over(path)]


def is_left_over(path: Path) -> bool:
    """Tell whether a process that has ended was writing this."""
    match = _LEFT_OVER.fullmatch(path.name)
    if match is None:
        return False
    pid = int(match["pid"])
    try:
        written = path.lstat().st_mtime
    except OSError:  # its owner has just finished it
        return False
    # a container numbers its processes alike each time it starts
    ended = not _is_alive(pid) or (pid == os.getpid() and written < _STARTED - 1)
    known = match["host"] == _host() and os.name == "posix"
    return (known and ended) or time.time() - written > ABANDONED


def others(folder: Path, names: Collection[str]) -> list[str]:
    """Return what lies in a folder beside regular files of these names; sorted.

    Parameters
    ----------
    folder : Path
        A folder.
    names : collection of str
        May have wildcards.

    Returns
    -------
    list of str
        Links and folders among them, whatever they are called; not what killed processes left.
    """
    found = []
    for path in folder.iterdir():
        known = any(fnmatch.fnmatchcase(path.name, name) for name in names) or is_left_over(path)
        if not known or path.is_symlink() or not path.is_file():
            found.append(path.name)
    return sorted(found)


def remove_folder(folder: Path, names: Collection[str]) -> None:
    """Remove a folder that holds nothing but regular files of these names.

    Parameters
    ----------
    folder : Path
        A folder, no link to one.
    names : collection of str
        May have wildcards. What proves that the folder is ours comes last, and goes last.

    Raises
    ------
    ValueError
        Something else is in it, or it is a link; nothing is removed.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder} must be a folder, not a link to one: it is kept")
    if found := others(folder, names):
        raise ValueError(f"{folder} must hold nothing but {', '.join(names)}, got {found[0]}: it is kept")
    order = list(names)
    rank = {path: _rank(path.name, order) for path in folder.iterdir()}
    for path in sorted(rank, key=lambda p: rank[p]):
        path.unlink()
    folder.rmdir()


def refuse_foreign(
    folder: Path, names: Collection[str], *, ours: bool, maker: str, argument: str = "output"
) -> None:
    """Refuse to write where something stands that we did not write.

    Parameters
    ----------
    folder : Path
        Where it shall go.
    names : collection of str
        Files that will be written.
    ours : bool
        A record in the folder tells that files of these names are.
    maker : str
        Who would have written them, for the message.
    argument : str
        What named the folder.

    Raises
    ------
    ValueError
        A file of such a name is there without a record of ours, or a link or folder is in its place.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{argument} must be a folder, got the file {folder}")
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        if not ours or path.is_symlink() or not path.is_file():
            raise ValueError(
                f"{argument} holds {name}, which {maker} did not write: name another folder, or move it "
                f"away, got {folder}"
            )


def is_picture(path: Path) -> bool:
    """Tell whether this is a regular file with a PNG that says `SOFTWARE`, as ours do."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as stream:
        return f"Software\0{SOFTWARE}".encode() in stream.read(4096)


def same_file(a: Path, b: Path) -> bool:
    """Tell whether both are names of one file or folder that is there."""
    try:
        return os.path.samestat(a.stat(), b.stat())
    except OSError:
        return False


@contextmanager
def claimed(folder: Path, argument: str = "output") -> Iterator[None]:
    """Hold a folder for this process until the block ends; it may be held again within.

    The kernel lets go of it when the process ends, however that ends: no stale claim is ever left. Where a
    file system knows no locks nothing is held.

    Parameters
    ----------
    folder : Path
        Is there.
    argument : str
        What named it, for the message.

    Raises
    ------
    ValueError
        Another process holds it.
    """
    key = (os.getpid(), folder.resolve())
    handle = None if key in _held else hold(folder)
    if handle is None and key not in _held:
        raise ValueError(f"{argument}: {folder} is being written by another process; name another folder")
    if handle is None:
        yield
        return
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        os.close(handle)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hold(folder: Path) -> int | None:
    """Lock a folder; returns a file descriptor to close, or None where another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return os.open(os.devnull, os.O_RDONLY)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # NFS without locks, for one
        pass
    return handle


def _rank(name: str, order: list[str]) -> int:
    """Place in the order of removal; half-written files first."""
    return next((n for n, known in enumerate(order) if fnmatch.fnmatchcase(name, known)), -1)


def _begin(name: str) -> str:
    """Begin the hidden name, cut so that all of it fits a file system."""
    encoded = os.fsencode(name)[: _LONGEST - len(f"..of-{_host()}-{2**22}.{'0' * 16}.nii.gz")]
    return f".{os.fsdecode(encoded)}.of-"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", socket.gethostname())[:64]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    """Have the file on the disk before its name: a machine that stops must not leave an empty one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (22, 95):  # EINVAL, EOPNOTSUPP: a file system that cannot
            raise
    finally:
        os.close(handle)
