"""Prepare one case: read, find the lungs, leave slices out, resample, draw, store (PAPER.md IV-A, IV-B)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import lesionsynth as ls
from lesionsynth.files import is_picture, write_atomically
from lesionsynth.strict import name_of
from normnet.cases import FORESEEN, Case, hear, reason
from normnet.config import Task
from normnet.draw import prepared_picture
from normnet.prepare.case import LoadedCase, LungMethod, Side, load_case, method_record
from normnet.prepare.exclude import Nodule, Range, kept_slices, nodule_slices, runs
from normnet.prepare.grid import IsoGrid, Mask, Spacing, bounding_box
from normnet.prepare.lungs import plane_eroded
from normnet.prepare.store import Store
from normnet.prepare.summary import CaseSummary

_LOG = logging.getLogger(__name__)
EDGE_MM = 3.2
"""Depth in which erroneous edges may lie: twice the shell of two voxels that tells them."""
MARGIN_SLICES = 4
"""Slices kept above and below the lungs."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked for one case; can be sent to another process."""

    case: Case
    case_id: str
    """Name in the store."""
    store: Path
    spacing: Spacing
    size: int
    label: tuple[int, ...]
    left_out: tuple[Range, ...]
    nodules: tuple[Nodule, ...]
    side: Side
    lungs: LungMethod
    task: Task

    def request(self) -> dict[str, Any]:
        """Give what of it changes the case, as kept in its meta data."""
        lungs: dict[str, str | None] = method_record(self.lungs)
        if self.case.lungs is not None:
            lungs = {"lungs_from": name_of(self.case.lungs.name), "lungs_sha256": None}
        return {
            "series": self.case.series,
            "excluded": [list(r) for r in self.left_out],
            "nodules": [list(n) for n in self.nodules],
            **lungs,
            "label": list(self.label),
            "kept_lung": self.side,
        }


def attempt(work: Work) -> CaseSummary:
    """Prepare a case; whatever goes wrong is in the summary, and nothing of the case in the store."""
    start = time.perf_counter()
    try:
        meta = prepare_one(work)
    except Exception as error:  # one bad file must not cost the others, whatever a library makes of it
        if not isinstance(error, FORESEEN):
            _LOG.warning("%s failed: %s", work.case_id, error, exc_info=True)
        return failed(work, reason(work.case.ct, error), time.perf_counter() - start)
    return CaseSummary.of(work.case_id, meta, "prepared", time.perf_counter() - start)


def failed(work: Work, message: str, seconds: float = 0.0) -> CaseSummary:
    """Sum up a case of which nothing is in the store."""
    return CaseSummary(
        work.case_id,
        "failed",
        (message,),
        seconds=seconds,
        source=name_of(work.case.ct.name),
        series=work.case.series or "",
    )


def prepare_one(work: Work) -> dict[str, Any]:
    """Prepare a case and store it; returns its meta data. Errors as in `load_case` and `Store.add`."""
    store, asked = Store.open(work.store), work.case
    if asked.problem:
        raise ValueError(asked.problem)
    with hear() as said:
        case = load_case(
            asked.ct,
            asked.lungs,
            spacing=work.spacing,
            size=work.size,
            margin=MARGIN_SLICES,
            keep_lung=work.side,
            series=asked.series,
            lungs=work.lungs,
            label=work.label,
        )
    hu, grid, sides = case.hu, case.grid, None
    if work.task == "lungs":
        hu, grid, sides = _chest(case)
    keep = kept_slices(grid, [*work.left_out, *nodule_slices(case.volume, work.nodules)])
    if sides is None:
        mask, removed = _without_edges(case)
    else:
        mask, removed = sides > 0, np.zeros(sides.shape, bool)
        sides[~keep] = 0
    mask[~keep] = False
    classical = _classical(case, grid, work.task)
    if classical is not None:
        classical[~keep] = False
    if not mask.any():
        raise ValueError(f"{asked.ct}: no lung is left after the slices to leave out")
    meta: dict[str, Any] = {
        "source": name_of(asked.ct.name),
        "source_shape": list(case.volume.hu.shape),
        "source_spacing": list(case.volume.spacing),
        "spacing": list(grid.spacing),
        "start": list(grid.start),
        "segments": [list(run) for run in runs(keep)],
        **work.request(),
        "lung_ml": float(mask.sum()) * float(np.prod(grid.spacing)) / 1000,
        "bright_fraction": float((hu[mask] >= -500).mean()),
        "edge_voxels": int(removed.sum()),
        "cropped_fraction": _cropped(case, grid),
        "warnings": said,
    }
    title = (
        f"{work.case_id}: source {'/'.join(f'{s:.2f}' for s in case.volume.spacing)} mm, lungs "
        f"{meta['lung_ml']:.0f} ml, bright {meta['bright_fraction']:.3f}, edges {meta['edge_voxels']} voxels"
    )

    def draw(path: Path) -> None:
        picture = prepared_picture(
            hu,
            mask,
            removed,
            spacing=grid.spacing,
            segments=runs(keep),
            title=title,
            classical=classical,
        )
        write_atomically(path, picture)

    return _stored(store, work.case_id, hu, mask if sides is None else sides, meta, draw)


def _chest(case: LoadedCase) -> tuple[npt.NDArray[np.int16], IsoGrid, npt.NDArray[np.uint8]]:
    """Bring the whole scan to the coarse grid: HU, grid, and 1 where the right lung is, 2 where the left."""
    from normnet.prepare.network import chest_grid, shrink, without_hilum  # torch is long to load

    sides = case.native_sides
    if sides is None or not all(lung.any() for lung in sides):
        raise ValueError(f"{case.volume.path}: the scan must show both lungs, and they must be told apart")
    grid = chest_grid(case.volume.hu, case.volume.spacing)
    hu = np.rint(shrink(case.volume.hu, grid)).astype(np.int16)
    first, second = (shrink(lung, grid) for lung in sides)
    lungs = first + second > 0.5
    right, left = without_hilum(hu, lungs & (first >= second), lungs & (first < second))
    return hu, grid, right + np.uint8(2) * left


def _classical(case: LoadedCase, grid: IsoGrid, task: Task) -> Mask | None:
    """Bring the lungs by thresholds to the grid of the store, where a network's are kept."""
    mask = case.native_classical
    if mask is None:
        return None
    if task == "lesions":
        return np.asarray(grid.to_iso(mask))
    from normnet.prepare.network import shrink

    return np.asarray(shrink(mask, grid) > 0.5)


def _stored(
    store: Store,
    case_id: str,
    hu: npt.NDArray[np.int16],
    mask: npt.NDArray[Any],
    meta: dict[str, Any],
    draw: Callable[[Path], None],
) -> dict[str, Any]:
    """Add a case and its picture; where one cannot be written, neither is there."""
    picture = store.path / "qc" / f"{case_id}.png"
    if os.path.lexists(picture) and case_id not in store and not is_picture(picture):
        raise ValueError(f"{picture} must be a picture that this store drew, or nothing: move it away")
    scratch = store.scratch(picture)
    try:
        draw(scratch)
        added = store.add(case_id, hu, mask, meta, overwrite=True)
        scratch.replace(picture)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    return added.meta


def _without_edges(case: LoadedCase) -> tuple[Mask, Mask]:
    """Take the erroneous edges (III-B) out of the lung mask; (mask, removed).

    Where a vessel tree hangs on the rim, the whole component counts as an edge; its deep part stays.
    """
    box = bounding_box(case.mask)
    if box is None:
        raise ValueError(f"{case.volume.path}: the lung mask has no voxel on the working grid")
    inner = np.ascontiguousarray(case.mask[box])
    image = ls.window_hu(np.ascontiguousarray(case.hu[box])) * inner
    _, cleaned = ls.remove_erroneous_edges(image, inner)
    mask = np.zeros(case.mask.shape, bool)
    mask[box] = cleaned | plane_eroded(inner, EDGE_MM, case.spacing)
    return mask, case.mask & ~mask


def _cropped(case: LoadedCase, grid: IsoGrid) -> float:
    """Share of the lungs that the in-plane window cuts off."""
    sides = []
    for axis in (1, 2):
        at = grid.window_positions(axis)
        sides.append((at >= -0.5) & (at < grid.shape[axis] - 0.5))
    shown = int((case.native_mask & sides[0][:, None] & sides[1]).sum())
    return 1.0 - shown / int(case.native_mask.sum())
