"""Prepared cases on disk, so that a 32-slice slab is read without the rest of its volume.

A store is a folder::

    store.json             spacing, in-plane size, version
    cases/<case>/hu.b2nd   (Z, Y, X) int16, raw HU on the working grid, blosc2 in chunks of a few slices
    cases/<case>/mask.b2nd (Z, Y, X) uint8, lung mask without erroneous edges
    cases/<case>/meta.json segments, mask voxels per slice, what was done to the case
    qc/<case>.png          picture to look at

    summary.csv            what became of the cases

A case appears as a whole or not at all: it is written beside the others under a temporary name and then
renamed. Temporary names begin with a dot and tell the process, so that what a killed run leaves can be told
from what another one is writing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1
CHUNK_SLICES = 4
"""Slices per chunk: a slab of 32 reads at most 9 chunks; at 512 x 512 a chunk is 2 MB."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
_LEFTOVER = re.compile(r"\..+\.of-(?P<host>.+)-(?P<pid>\d+)\..+")
_ABANDONED = 86400.0
"""Seconds after which anything half-written counts as left over: of other machines, process numbers say
nothing, and in a container they recur."""

Segment = tuple[int, int]


class Case:
    """One prepared volume; opened lazily, read slab by slab.

    Attributes
    ----------
    case_id : str
    meta : dict
        As given to `Store.add`, with ``shape``, ``mask_counts`` and ``segments``.
    """

    def __init__(self, folder: Path) -> None:
        self.case_id = folder.name
        self._folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        z, y, x = self.meta["shape"]
        return int(z), int(y), int(x)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm, axis order z, y, x."""
        z, y, x = self.meta["spacing"]
        return float(z), float(y), float(x)

    @property
    def mask_counts(self) -> npt.NDArray[np.int64]:
        """Mask voxels of every slice."""
        return np.asarray(self.meta["mask_counts"], np.int64)

    @property
    def segments(self) -> list[Segment]:
        """Runs of usable slices ``(z0, z1)``, ``z1`` excluded; a slab must lie within one of them.

        Slices left out (nodules) are still stored, with an empty mask.
        """
        return [(int(a), int(b)) for a, b in self.meta["segments"]]

    def slab(self, z0: int, z1: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.bool_]]:
        """Read slices ``z0 <= z < z1``.

        Returns
        -------
        hu, mask : (z1 - z0, Y, X) int16 and bool arrays

        Raises
        ------
        ValueError
            Not ``0 <= z0 < z1 <= Z``.
        """
        if not 0 <= z0 < z1 <= self.shape[0]:
            raise ValueError(f"slab must satisfy 0 <= z0 < z1 <= {self.shape[0]}, got {z0}, {z1}")
        hu = self._array("hu")[z0:z1]
        mask = self._array("mask")[z0:z1]
        return np.asarray(hu, np.int16), np.asarray(mask) > 0

    def is_whole(self) -> bool:
        """Tell whether both arrays can be opened and have the right shape; a copy cut short has not."""
        try:
            return all(tuple(self._array(name).shape) == self.shape for name in ("hu", "mask"))
        except (OSError, RuntimeError, ValueError):
            return False

    def _array(self, name: str) -> Any:
        import blosc2

        # one thread: blosc2's pool does not survive the fork of a DataLoader worker
        return blosc2.open(str(self._folder / f"{name}.b2nd"), mode="r", dparams=blosc2.DParams(nthreads=1))


class Store:
    """A folder of prepared cases; use `create` or `open`.

    Attributes
    ----------
    path : Path
    meta : dict
        Of the whole store: ``spacing``, ``size``.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta

    @classmethod
    def create(cls, path: str | os.PathLike[str], meta: Mapping[str, Any]) -> Store:
        """Make an empty store, or open the one that is there if it was made with the same `meta`.

        Raises
        ------
        ValueError
            `path` holds a store made otherwise, or is a folder with something else in it.
        """
        folder = Path(path)
        if (folder / "store.json").exists():
            store = cls.open(folder)
            wanted = json.loads(json.dumps(dict(meta)))
            if store.meta != wanted:
                raise ValueError(
                    f"{folder}: a store with other settings is there: {store.meta}, asked for {wanted}"
                )
            return store
        if folder.exists() and (not folder.is_dir() or any(map(_foreign, folder.iterdir()))):
            raise ValueError(f"{folder}: output must be a new or empty folder or a store, got something else")
        (folder / "cases").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "store.json", json.dumps({"format": FORMAT, **meta}, indent=1))
        return cls.open(folder)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open a store for reading and adding.

        Raises
        ------
        ValueError
            No store at `path`, or one of another format version.
        """
        folder = Path(path)
        try:
            meta = json.loads((folder / "store.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: not a store (no readable store.json: {error})") from error
        if meta.pop("format", None) != FORMAT:
            raise ValueError(f"{folder}: store format must be {FORMAT}; prepare the data again")
        return cls(folder, meta)

    @property
    def case_ids(self) -> list[str]:
        """Names of the finished cases, sorted."""
        return sorted(
            p.parent.name for p in (self.path / "cases").glob("*/meta.json") if p.parent.name[0] != "."
        )

    def __len__(self) -> int:
        """Count the finished cases."""
        return len(self.case_ids)

    def __contains__(self, case_id: object) -> bool:
        """Tell whether a finished case has this name."""
        return isinstance(case_id, str) and case_id in self.case_ids

    def __getitem__(self, case_id: str) -> Case:
        """Open a case by name; KeyError names those that exist."""
        if case_id not in self:
            raise KeyError(
                f"{self.path}: no case {case_id!r}; there are {', '.join(self.case_ids) or 'none'}"
            )
        return Case(self.path / "cases" / case_id)

    def add(
        self,
        case_id: str,
        hu: npt.NDArray[np.int16],
        mask: npt.NDArray[np.bool_],
        meta: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> Case:
        """Write a case; it appears when it is complete.

        Parameters
        ----------
        case_id : str
            Letters, digits and ``_.@+-``; names the folder.
        hu : (Z, Y, X) int16 array
        mask : (Z, Y, X) bool array
        meta : mapping, optional
            JSON-able. ``spacing`` defaults to the store's, ``segments`` to all slices.
        overwrite : bool
            Replace a case of this name.

        Raises
        ------
        ValueError
            Bad name, shapes, dtypes or segments; the case exists.
        """
        whole = _checked(case_id, hu, mask, meta or {}, self.meta)
        target = self.path / "cases" / case_id
        if target.exists() and not overwrite:
            raise ValueError(f"{self.path}: case {case_id!r} exists; pass overwrite=True to replace it")
        temporary = Path(tempfile.mkdtemp(prefix=_temporary(case_id), dir=self.path / "cases"))
        try:
            _write_array(temporary / "hu.b2nd", hu)
            _write_array(temporary / "mask.b2nd", mask.view(np.uint8))
            write_bytes(temporary / "meta.json", json.dumps(whole, indent=1).encode())
            temporary.chmod(0o755)  # mkdtemp made it private
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=_temporary(case_id), dir=self.path / "cases"))
                os.replace(target, old)
                os.replace(temporary, target)
                shutil.rmtree(old)
            else:
                os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return Case(target)

    def scratch(self, path: Path) -> Path:
        """Name, beside a file of the store, under which it can be written before it takes its own."""
        return path.with_name(f"{_temporary(path.stem)}{uuid.uuid4().hex}{path.suffix}")

    def clean(self) -> None:
        """Take away what killed runs left half-written; what a live process is writing stays."""
        for folder in (self.path, self.path / "cases", self.path / "qc"):
            for path in folder.glob(".*") if folder.is_dir() else ():
                if _is_left_over(path):
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)

    def max_slab_count(self, depth: int) -> int:
        """Largest number of mask voxels in any slab of `depth` slices: the denominator of lambda (III-C).

        A segment shorter than `depth` counts as a whole.
        """
        if depth < 1:
            raise ValueError(f"depth must be >= 1, got {depth}")
        best = 0
        for case_id in self.case_ids:
            case = self[case_id]
            counts = case.mask_counts
            for z0, z1 in case.segments:
                total = np.concatenate([[0], np.cumsum(counts[z0:z1])])
                step = min(depth, z1 - z0)
                best = max(best, int((total[step:] - total[:-step]).max()))
        return best


def case_name_for_store(name: str) -> str:
    """Turn any name into one that `Store.add` takes: other characters become ``_``."""
    plain = re.sub(r"[^A-Za-z0-9_.@+-]+", "_", name)
    return plain if _NAME.match(plain) else f"_{plain}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never a part; text in UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    # mkstemp would keep it private
    temporary = path.with_name(f"{_temporary(path.name)}{uuid.uuid4().hex}")
    try:
        write_bytes(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file; an error names it, which the operating system does not where the disk is full."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _temporary(name: str) -> str:
    """Begin the name of what this process is writing."""
    return f".{name}.of-{socket.gethostname()}-{os.getpid()}."


def _is_left_over(path: Path) -> bool:
    match = _LEFTOVER.fullmatch(path.name)
    if match is None:
        return False
    if match["host"] == socket.gethostname() and os.name == "posix" and not _is_alive(int(match["pid"])):
        return True
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED
    except OSError:  # its owner has just finished it
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _foreign(path: Path) -> bool:
    """Tell what no killed `Store.create` left."""
    return not (path.name[0] == "." or (path.name in ("cases", "qc") and not any(path.glob("[!.]*"))))


def _checked(
    case_id: str,
    hu: npt.NDArray[Any],
    mask: npt.NDArray[Any],
    meta: Mapping[str, Any],
    store: Mapping[str, Any],
) -> dict[str, Any]:
    if not _NAME.fullmatch(case_id):
        raise ValueError(
            f"case_id must be letters, digits and _.@+- and not start with a dot, got {case_id!r}"
        )
    if hu.ndim != 3 or hu.shape != mask.shape:
        raise ValueError(f"hu and mask must be 3-D of one shape, got {hu.shape} and {mask.shape}")
    if hu.dtype != np.int16 or mask.dtype != np.bool_:
        raise ValueError(f"hu must be int16 and mask bool, got {hu.dtype} and {mask.dtype}")
    spacing = meta.get("spacing", store.get("spacing"))
    if spacing is None:
        raise ValueError("meta must give spacing, as the store does not")
    segments = meta.get("segments", [(0, hu.shape[0])])
    end = 0
    for z0, z1 in segments:
        if not end <= z0 < z1 <= hu.shape[0]:
            raise ValueError(f"segments must be ascending runs of slices in 0..{hu.shape[0]}, got {segments}")
        end = z1
    counts = [int(n) for n in mask.sum(axis=(1, 2))]
    return {
        **meta,
        "shape": list(hu.shape),
        "spacing": [float(s) for s in spacing],
        "segments": [[int(a), int(b)] for a, b in segments],
        "mask_counts": counts,
    }


def _write_array(path: Path, array: npt.NDArray[Any]) -> None:
    import blosc2

    chunks = (min(CHUNK_SLICES, array.shape[0]), *array.shape[1:])
    cparams = blosc2.CParams(
        codec=blosc2.Codec.ZSTD, clevel=3, filters=[blosc2.Filter.BITSHUFFLE], nthreads=1
    )
    # compressed in memory first: blosc2 does not say when the disk is full
    packed = blosc2.asarray(np.ascontiguousarray(array), chunks=chunks, cparams=cparams)
    write_bytes(path, packed.to_cframe())
