"""Prepared cases on disk, so that a 32-slice slab is read without the rest of its volume.

A store is a folder::

    store.json             spacing, in-plane size, version
    cases/<case>/hu.b2nd   (Z, Y, X) int16, raw HU on the working grid, blosc2 in chunks of a few slices
    cases/<case>/mask.b2nd (Z, Y, X) uint8, lung mask without erroneous edges
    cases/<case>/meta.json segments, mask voxels per slice, what was done to the case
    qc/<case>.png          picture to look at

    summary.csv            what became of the cases

A case appears as a whole or not at all: it is written beside the others under a temporary name and then
renamed; see `lesionsynth.files`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth import files
from lesionsynth.commands import one_line
from lesionsynth.config import check_spacing
from lesionsynth.files import write_atomically
from lesionsynth.strict import build, hints_of, name_of, read_json, shown
from normnet.config import OUTPUTS, Task

FORMAT = 1
CHUNK_SLICES = 4
"""Slices per chunk: a slab of 32 reads at most 9 chunks; at 512 x 512 a chunk is 2 MB."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
CASE_FILES = ("hu.b2nd", "mask.b2nd", "meta.json")
"""What a case consists of; its meta data prove that it is one."""

DTYPES = {"hu": np.dtype(np.int16), "mask": np.dtype(np.uint8)}
"""Arrays of a case, and their types."""

Segment = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class _StoreMeta:
    """What a ``store.json`` must say; it may say more."""

    format: Any = None
    spacing: tuple[float, float, float] | None = None
    size: int | None = None
    task: Task = "lesions"

    def __post_init__(self) -> None:
        if self.spacing is not None:
            check_spacing(self.spacing)
        if self.size is not None and not 1 <= self.size <= 65_536:
            raise ValueError(f"size must be in [1, 65536], got {self.size}")
        if self.task not in OUTPUTS:
            raise ValueError(f"task must be one of {', '.join(OUTPUTS)}, got {shown(self.task)}")


@dataclass(frozen=True, kw_only=True)
class _CaseMeta:
    """What a ``meta.json`` must say; it may say more."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    segments: list[tuple[int, int]]
    mask_counts: list[int]

    def __post_init__(self) -> None:
        depth, height, width = self.shape
        if min(self.shape) < 1 or math.prod(self.shape) >= 2**31:
            raise ValueError(f"shape must be three sizes >= 1 of fewer than 2**31 voxels, got {self.shape}")
        check_spacing(self.spacing)
        end = 0
        for place, (first, last) in enumerate(self.segments):
            if not end <= first < last <= depth:
                raise ValueError(
                    f"segments[{place}] must be an ascending run of slices in 0..{depth}, got {first}, {last}"
                )
            end = last
        if len(self.mask_counts) != depth:
            raise ValueError(f"mask_counts must have {depth} values, got {len(self.mask_counts)}")
        for z, count in enumerate(self.mask_counts):
            if not 0 <= count <= height * width:
                raise ValueError(f"mask_counts[{z}] must be in [0, {height * width}], got {count}")


def _read(path: Path, cls: type[Any]) -> dict[str, Any]:
    """Read meta data; an error names the file and the field."""
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{name_of(path)}: must be a JSON object, got {type(record).__name__}")
    try:
        build(cls, {name: record[name] for name in hints_of(cls) if name in record})
    except ValueError as error:
        raise ValueError(f"{name_of(path)}: {error}") from error
    return record


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
        self.meta: dict[str, Any] = _read(folder / "meta.json", _CaseMeta)

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
            Not ``0 <= z0 < z1 <= Z``, or an array is damaged or another one; the message names its file.
        """
        if not 0 <= z0 < z1 <= self.shape[0]:
            raise ValueError(f"slab must satisfy 0 <= z0 < z1 <= {self.shape[0]}, got {z0}, {z1}")
        return self._read("hu", z0, z1), self._read("mask", z0, z1) > 0

    def lungs(self) -> npt.NDArray[np.uint8]:
        """Read the whole mask as it was stored: 1 right and 2 left, in a store of chests."""
        return self._read("mask", 0, self.shape[0])

    def is_whole(self) -> bool:
        """Tell whether both arrays can be opened and have the right shape; a copy cut short has not."""
        try:
            return all(self._array(name) is not None for name in DTYPES)
        except ValueError:
            return False

    def _read(self, name: str, z0: int, z1: int) -> npt.NDArray[Any]:
        array = self._array(name)
        try:
            return np.asarray(array[z0:z1])
        except RuntimeError as error:
            raise ValueError(f"{name_of(self._file(name))}: must be whole, got {one_line(error)}") from error

    def _array(self, name: str) -> Any:
        """Open an array, checked against the meta data: what is another one would be read as it comes."""
        import blosc2

        path, rule = self._file(name), f"must be an array of {DTYPES[name]} of the shape {self.shape}"
        if not path.is_file():  # a pipe would keep its reader waiting
            raise ValueError(f"{name_of(path)}: {rule}, got no regular file")
        try:
            # one thread: blosc2's pool does not survive the fork of a DataLoader worker
            array = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
        except MemoryError:
            raise
        except Exception as error:  # of any kind: its parsers trust what they read
            raise ValueError(f"{name_of(path)}: {rule}, got {one_line(error)}") from error
        shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
        if not isinstance(array, blosc2.NDArray) or (shape, dtype) != (self.shape, DTYPES[name]):
            raise ValueError(f"{name_of(path)}: {rule}, got {shown(dtype)} and {shown(shape)}")
        return array

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.b2nd"


class Store:
    """A folder of prepared cases; use `create` or `open`.

    Attributes
    ----------
    path : Path
    meta : dict
        Of the whole store: ``spacing``, ``size``; or ``task``, for chests.
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
            meta = _read(folder / "store.json", _StoreMeta)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name_of(folder)}: not a store (no readable store.json: {error})") from error
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
        mask: npt.NDArray[np.bool_] | npt.NDArray[np.uint8],
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
        mask : (Z, Y, X) bool array, or uint8 with 1 for the right and 2 for the left lung
        meta : mapping, optional
            JSON-able. ``spacing`` defaults to the store's, ``segments`` to all slices.
        overwrite : bool
            Replace a case of this name.

        Raises
        ------
        ValueError
            Bad name, shapes, dtypes or segments; the case exists, or what has its name is no case of a store.
        """
        whole = _checked(case_id, hu, mask, meta or {}, self.meta)
        target = self.path / "cases" / case_id
        if target.exists() and not overwrite:
            raise ValueError(f"{self.path}: case {case_id!r} exists; pass overwrite=True to replace it")
        if os.path.lexists(target):
            self._check_ours(target)
        with files.replacing_folder(target, CASE_FILES, lambda: self._check_ours(target)) as work:
            _write_array(work / "hu.b2nd", hu)
            _write_array(work / "mask.b2nd", mask.view(np.uint8))
            write_bytes(work / "meta.json", json.dumps(whole, indent=1).encode())
        return Case(target)

    def _check_ours(self, target: Path) -> None:
        """Refuse to replace a folder that no `add` made, or that holds something else by now."""
        rule = f"{target} must be a case that this store wrote, or nothing"
        if target.is_symlink() or not target.is_dir() or not (target / "meta.json").is_file():
            raise ValueError(f"{rule}: move it away")
        if other := files.others(target, CASE_FILES):
            raise ValueError(f"{rule}, got one with {other[0]}: move that away")
        if target.name not in os.listdir(target.parent):  # a file system that does not tell a from A
            raise ValueError(f"{rule}: another case has this name in other letters; give a name")

    def scratch(self, path: Path) -> Path:
        """Name, beside a file of the store, under which it can be written before it takes its own."""
        return files.temporary(path)

    def clean(self) -> None:
        """Take away what killed runs left half-written; what a live process is writing stays."""
        for folder in (self.path, self.path / "cases", self.path / "qc"):
            files.sweep(folder, inside=CASE_FILES)

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


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file; an error names it, which the operating system does not where the disk is full."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


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
    if hu.dtype != np.int16 or mask.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"hu must be int16 and mask bool or uint8, got {hu.dtype} and {mask.dtype}")
    if mask.dtype == np.uint8 and mask.size and mask.max() > 2:
        raise ValueError(f"mask must have 0, 1 for right and 2 for left, got {mask.max()}")
    spacing = meta.get("spacing", store.get("spacing"))
    if spacing is None:
        raise ValueError("meta must give spacing, as the store does not")
    segments = meta.get("segments", [(0, hu.shape[0])])
    end = 0
    for z0, z1 in segments:
        if not end <= z0 < z1 <= hu.shape[0]:
            raise ValueError(f"segments must be ascending runs of slices in 0..{hu.shape[0]}, got {segments}")
        end = z1
    counts = [int(n) for n in np.count_nonzero(mask, axis=(1, 2))]
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
