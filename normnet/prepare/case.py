"""One CT in memory on the working grid, with its lung mask and the way back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lesionsynth.files import sha256
from lesionsynth.io import Scan, read_ct, read_mask
from normnet.cases import Case
from normnet.config import BUNDLED_LUNGS, WEIGHTS, model_name
from normnet.prepare.grid import IsoGrid, Mask, Spacing, check_spacing
from normnet.prepare.lungs import (
    Lungs,
    check_agreement,
    check_installed,
    check_plausible,
    split_by_lungmask,
    split_lungs,
    split_mask,
)

ISO_SPACING: Spacing = (1.0, 0.8, 0.8)
"""Working voxel in mm, axis order z, y, x (PAPER.md IV-B)."""
Side = Literal["both", "right", "left"]
Edges = Literal["remove", "keep"]
LungMethod = str
"""How lungs are segmented: "network", "classical", "lungmask", or weights of `normnet.train --task lungs`."""
METHODS = ("network", "classical", "lungmask")


@dataclass(frozen=True, eq=False)
class LoadedCase:
    """A CT around its lungs on the working grid."""

    hu: npt.NDArray[np.int16]
    """(Z, Y, X), resampled linearly; -1024 outside the file."""
    mask: Mask
    """Lungs, by the nearest voxel."""
    volume: Scan
    """The CT as read; ``volume.write_like`` writes a result."""
    native_mask: Mask
    """The lungs on the CT's own grid."""
    grid: IsoGrid
    """How the two grids lie."""
    native_left: Mask | None = None
    """The left lung of `native_mask`, where it was told apart on reading; see `native_sides`."""
    native_classical: Mask | None = None
    """The lungs by thresholds, where a network segmented them: empty where thresholds find none."""
    apart: bool = False
    """Whether the two disagree more than `normnet.prepare.lungs.check_agreement` lets pass."""

    @property
    def spacing(self) -> Spacing:
        """Voxel size of `hu` and `mask` in mm, axis order z, y, x."""
        return self.grid.spacing

    @property
    def native_sides(self) -> tuple[Mask, Mask] | None:
        """The right and the left lung on the CT's own grid; None where they cannot be told apart.

        They are disjoint and add up to `native_mask`; one may be empty. Of a mask from a file they are worked
        out at each use.
        """
        if self.native_left is not None:
            return self.native_mask & ~self.native_left, self.native_left
        try:
            lungs = split_mask(self.native_mask, self.volume.spacing)
        except ValueError:
            return None
        return lungs.right, lungs.left

    def to_native(self, array: npt.NDArray[Any], fill: float = 0) -> npt.NDArray[Any]:
        """Bring a mask (nearest voxel) or floats (linear) from the working grid to the CT's own."""
        return self.grid.to_native(array, fill)


def load_case(
    path: str | os.PathLike[str],
    mask_path: str | os.PathLike[str] | None = None,
    *,
    spacing: Spacing = ISO_SPACING,
    size: int | None = None,
    margin: int = 4,
    keep_lung: Side = "both",
    series: str | None = None,
    lungs: LungMethod = "network",
    label: Sequence[int] = (),
) -> LoadedCase:
    """Read a CT, find its lungs and resample both.

    Parameters
    ----------
    path : path
        What `lesionsynth.io.read_ct` takes.
    mask_path : path, optional
        Lung mask on the CT's grid; the lungs are segmented where it is omitted.
    spacing : (3,) floats
        Working voxel size in mm, axis order z, y, x.
    size : int, optional
        In-plane size in voxels: the lungs are centred, padded or cropped. The lungs' box where omitted.
    margin : int
        Voxels of the working grid around the lungs' box (in z only, where `size` is given).
    keep_lung : {"both", "right", "left"}
        Keep one lung only.
    series : str, optional
        SeriesInstanceUID, for a DICOM folder with several.
    lungs : str
        How lungs are segmented: "network", that of the package (`normnet.prepare.network`); "classical",
        `segment_lungs`; "lungmask", the network of that package, which must be installed; or a run folder or
        weights file of ``normnet.train --task lungs``. Without effect where `mask_path` is given.
    label : sequence of int
        Labels of the mask that are lung; see `read_mask`.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_ct`, `read_mask`, `segment_lungs` and `check_plausible`; an empty lung mask; a bad `spacing`,
        `size`, `keep_lung` or `lungs`.
    ImportError
        `lungs` is "lungmask", which is not installed.
    """
    check_grid(spacing, size)
    if keep_lung not in ("both", "right", "left"):
        raise ValueError(f"keep_lung must be both, right or left, got {keep_lung!r}")
    segment = method_of(lungs) if mask_path is None else None
    volume = read_ct(path, series)
    left, classical, apart = None, None, False
    try:
        if segment is not None:
            mask, left = _kept(segment(volume.hu, volume.spacing), keep_lung)
        elif mask_path is not None:
            mask = read_mask(mask_path, volume, label)
            if not mask.any():
                raise ValueError(f"the lung mask {os.fspath(mask_path)} must not be empty")
            if keep_lung != "both":
                mask, left = _kept(split_mask(mask, volume.spacing), keep_lung)
        check_plausible(volume.hu, mask, volume.spacing, left if keep_lung == "both" else None)
    except ValueError as error:
        name = str(volume.path)
        raise error if name in str(error) else ValueError(f"{name}: {error}") from error
    if segment is not None and weights_of(lungs) is not None:
        try:  # to compare: nobody else looks at the outline before its numbers are used
            classical, _ = _kept(split_lungs(volume.hu, volume.spacing), keep_lung)
        except ValueError:
            classical = np.zeros_like(mask)
        apart = not check_agreement(mask, classical, volume.spacing)
    grid = IsoGrid.around(mask, volume.spacing, spacing, margin=margin, size=size)
    return LoadedCase(grid.to_iso(volume.hu), grid.to_iso(mask), volume, mask, grid, left, classical, apart)


def check_grid(spacing: Spacing, size: int | None) -> None:
    """Refuse a working grid that cannot be, by a ValueError."""
    check_spacing(spacing)
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 voxel, got {size}")


def _kept(lungs: Lungs, side: Side) -> tuple[Mask, Mask]:
    """Leave a lung out, if one is not wanted; returns what is kept, and the left part of it."""
    none = np.zeros(lungs.left.shape, bool)
    right, left = (none if side == "left" else lungs.right), (none if side == "right" else lungs.left)
    mask = right | left
    if not mask.any():
        raise ValueError(f"no {side} lung found")
    return mask, left


def method_of(lungs: LungMethod) -> Callable[[npt.NDArray[np.int16], Spacing], Lungs]:
    """Return the function that segments lungs as asked; networks are loaded once.

    Raises
    ------
    ValueError
        There is no such method, and no such weights file or run folder.
    ImportError
        "lungmask" is not installed.
    """
    weights = weights_of(lungs)
    if lungs == "lungmask":
        check_installed()
        return split_by_lungmask
    if weights is None:
        return split_lungs
    from normnet.prepare.network import lung_network, split_by_network  # torch is long to load

    return partial(split_by_network, network=lung_network(weights))


def weights_of(lungs: LungMethod) -> Path | None:
    """Return the weights file that a method stands for; None where it has none. Errors as in `method_of`."""
    if lungs in ("classical", "lungmask"):
        return None
    if lungs == "network":
        return BUNDLED_LUNGS
    path = Path(lungs)
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"lungs must be {', '.join(METHODS)}, or a run folder or weights of --task lungs, got {lungs!r}"
        )
    return file


def check_lungs(cases: Sequence[Case], lungs: LungMethod, label: Sequence[int] = ()) -> None:
    """Check, before the first of several cases, that the lungs of all can be had, as `load_case` takes them.

    Those with a mask need no method; those with a problem nothing.

    Raises
    ------
    ValueError
        `label` without any mask; or lungs are to be segmented, and there is no such method.
    ImportError
        They are, by lungmask, which is not installed.
    """
    if label and not any(case.lungs for case in cases):
        raise ValueError(f"label must be left out where no masks are given, got {list(label)}")
    if not all(case.lungs or case.problem for case in cases):
        method_of(lungs)


def method_record(lungs: LungMethod) -> dict[str, str | None]:
    """Tell a method, for records: its name, or that of its weights, and the SHA-256 of these."""
    weights = weights_of(lungs)
    name = lungs if lungs in METHODS or weights is None else model_name(weights)
    return {"lungs_from": name, "lungs_sha256": None if weights is None else sha256(weights)}
