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
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from lesionsynth import files
from lesionsynth.commands import one_line
from lesionsynth.config import LEAST_SPACING, MOST_SPACING
from lesionsynth.files import write_atomically
from lesionsynth.strict import hints_of, name_of, read_json, shown
from normnet.config import HealthyHU, Task
from normnet.settings import from_record, naming, settings

FORMAT = 1
CHUNK_SLICES = 4
"""Slices per chunk: a slab of 32 reads at most 9 chunks; at 512 x 512 a chunk is 2 MB."""
CASE_FILES = ("hu.b2nd", "mask.b2nd", "meta.json")
"""What a case consists of; its meta data prove that it is one."""
DTYPES = {"hu": np.dtype(np.int16), "mask": np.dtype(np.uint8)}
"""Arrays of a case, and their types."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
Model = TypeVar("Model")
Mm = Annotated[float, Field(ge=LEAST_SPACING, le=MOST_SPACING)]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]


@settings
class StoreMeta:
    """What a ``store.json`` must say; it may say more."""

    format: Any = None
    spacing: tuple[Mm, Mm, Mm] | None = None
    size: Annotated[int, Field(ge=1, le=65_536)] | None = None
    task: Task = "lesions"


@settings
class CaseMeta:
    """What a ``meta.json`` must say; it may say more."""

    shape: tuple[Size, Size, Size]
    spacing: tuple[Mm, Mm, Mm]
    segments: Annotated[tuple[tuple[int, int], ...], Field(fail_fast=True)]
    """Runs of usable slices ``(z0, z1)``, ``z1`` excluded."""
    mask_counts: Annotated[tuple[Count, ...], Field(fail_fast=True)]
    """Mask voxels of every slice."""
    density_hu: HealthyHU | None = None
    """Density of healthy lung, `normnet.inflation.healthy_density`; none where there is none to tell."""

    def __post_init__(self) -> None:
        """Check what holds between the fields."""
        depth, height, width = self.shape
        if math.prod(self.shape) >= 2**31:
            raise ValueError(f"shape must be of fewer than 2**31 voxels, got {self.shape}")
        end = 0
        for place, (first, last) in enumerate(self.segments):
            if not end <= first < last <= depth:
                raise ValueError(
                    f"segments[{place}] must be an ascending run of slices in 0..{depth}, got {first}, {last}"
                )
            end = last
        if len(self.mask_counts) != depth or max(self.mask_counts) > height * width:
            raise ValueError(
                f"mask_counts must be {depth} values in [0, {height * width}], got "
                f"{len(self.mask_counts)} up to {max(self.mask_counts, default=0)}"
            )


def _meta_of(path: Path, cls: type[Model]) -> tuple[dict[str, Any], Model]:
    """Read meta data, as they are and as they must be; an error names the file and the field."""
    record = read_json(path)
    with naming(path):
        return record, _checked(cls, record)


def _checked(cls: type[Model], record: Any) -> Model:
    if isinstance(record, dict):
        record = {name: value for name, value in record.items() if name in hints_of(cls)}
    return from_record(cls, record)


class Case:
    """One prepared volume; opened lazily, read slab by slab."""

    def __init__(self, folder: Path) -> None:
        self.case_id = folder.name
        self._folder = folder
        self.meta, said = _meta_of(folder / "meta.json", CaseMeta)
        """As given to `Store.add`, with what `CaseMeta` says."""
        self.shape = said.shape
        """(Z, Y, X)."""
        self.spacing = said.spacing
        """Voxel size in mm, axis order z, y, x."""
        self.segments = list(said.segments)
        """A slab must lie within one of them; slices left out (nodules) are stored with an empty mask."""
        self.mask_counts = np.asarray(said.mask_counts, np.int64)

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
            meta, _ = _meta_of(folder / "store.json", StoreMeta)
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
        record = {"spacing": self.meta.get("spacing"), "segments": [(0, hu.shape[0])], **(meta or {})}
        if record["spacing"] is None:
            raise ValueError("meta must give spacing, as the store does not")
        record |= {
            "shape": list(hu.shape),
            "spacing": [float(s) for s in record["spacing"]],
            "segments": [[int(a), int(b)] for a, b in record["segments"]],
            "mask_counts": np.count_nonzero(mask, axis=(1, 2)).tolist(),
        }
        _checked(CaseMeta, record)
        target = self.path / "cases" / case_id
        if target.exists() and not overwrite:
            raise ValueError(f"{self.path}: case {case_id!r} exists; pass overwrite=True to replace it")
        if os.path.lexists(target):
            self._check_ours(target)
        with files.replacing_folder(target, CASE_FILES, lambda: self._check_ours(target)) as work:
            _write_array(work / "hu.b2nd", hu)
            _write_array(work / "mask.b2nd", mask.view(np.uint8))
            write_atomically(work / "meta.json", json.dumps(record, indent=1))
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

    def clean(self) -> None:
        """Take away what killed runs left half-written; what a live process is writing stays."""
        for folder in (self.path, self.path / "cases", self.path / "qc"):
            files.sweep(folder, inside=CASE_FILES)


def case_name_for_store(name: str) -> str:
    """Turn any name into one that `Store.add` takes: other characters become ``_``."""
    plain = re.sub(r"[^A-Za-z0-9_.@+-]+", "_", name)
    return plain if _NAME.match(plain) else f"_{plain}"


def _foreign(path: Path) -> bool:
    """Tell what no killed `Store.create` left."""
    return not (path.name[0] == "." or (path.name in ("cases", "qc") and not any(path.glob("[!.]*"))))


def _write_array(path: Path, array: npt.NDArray[Any]) -> None:
    import blosc2

    chunks = (min(CHUNK_SLICES, array.shape[0]), *array.shape[1:])
    cparams = blosc2.CParams(
        codec=blosc2.Codec.ZSTD, clevel=3, filters=[blosc2.Filter.BITSHUFFLE], nthreads=1
    )
    # compressed in memory first: blosc2 does not say when the disk is full
    packed = blosc2.asarray(np.ascontiguousarray(array), chunks=chunks, cparams=cparams)
    write_atomically(path, packed.to_cframe())
