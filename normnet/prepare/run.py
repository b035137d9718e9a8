"""Prepare many cases into a store; a broken one is reported and the others go on (PAPER.md IV-A, IV-B)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lesionsynth as ls
from lesionsynth.io import case_name
from normnet.prepare.case import ISO_SPACING, LoadedCase, Side, load_case
from normnet.prepare.exclude import (
    Nodule,
    Range,
    kept_slices,
    nodule_slices,
    read_annotations,
    read_exclusions,
    runs,
)
from normnet.prepare.morphology import Mask, Spacing, bounding_box, plane_eroded
from normnet.prepare.qc import write_picture
from normnet.prepare.store import Store

_LOG = logging.getLogger(__name__)
EDGE_MM = 3.2
"""Depth in which erroneous edges may lie: twice the shell of two voxels that tells them."""
MARGIN_SLICES = 4
"""Slices kept above and below the lungs."""
_MASK_ENDINGS = ("", "_lung", "_lungs", "_mask", "_lung_mask", "-lung", "_lobes")
_CT_ENDINGS = ("", "_hu", "_ct", "_0000")
_FORMATS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")


@dataclass(frozen=True)
class CaseSummary:
    """What became of one input.

    Attributes
    ----------
    case_id : str
    status : {"prepared", "there", "failed"}
        "there": finished by an earlier run.
    message : str
        Why it failed, or a remark.
    slices : int
        Slices in use on the working grid.
    source_spacing : 3-tuple
        mm (z, y, x) of the file.
    lung_ml, bright_fraction : float
        Volume of the stored mask; share of it at or above the HU threshold (-500).
    edge_voxels : int
        Voxels of erroneous edges taken out of the mask.
    seconds : float
    """

    case_id: str
    status: str
    message: str = ""
    slices: int = 0
    source_spacing: Spacing = (0.0, 0.0, 0.0)
    lung_ml: float = 0.0
    bright_fraction: float = 0.0
    edge_voxels: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Summary:
    """Outcome of `prepare`.

    Attributes
    ----------
    cases : tuple of CaseSummary
        In the order of the inputs.
    store : Store
    """

    cases: tuple[CaseSummary, ...]
    store: Store

    @property
    def failed(self) -> tuple[CaseSummary, ...]:
        """Cases that could not be prepared."""
        return tuple(case for case in self.cases if case.status == "failed")

    def table(self) -> str:
        """Lay the cases out as text, one line each."""
        head = (
            f"{'case':<28} {'status':<9} {'slices':>6} {'spacing z/y/x (mm)':>19} {'lung ml':>8} "
            f"{'bright':>7} {'edges':>8} {'s':>6}"
        )
        lines = [head]
        for c in self.cases:
            spacing = "/".join(f"{s:.2f}" for s in c.source_spacing)
            lines.append(
                f"{c.case_id:<28} {c.status:<9} {c.slices:>6} {spacing:>19} {c.lung_ml:>8.0f} "
                f"{c.bright_fraction:>7.3f} {c.edge_voxels:>8} {c.seconds:>6.1f}"
            )
            if c.message:
                lines.append(f"    {c.message}")
        return "\n".join(lines)


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    masks: str | os.PathLike[str] | None = None,
    exclude: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    keep_lung: Mapping[str, Side] | None = None,
    names: Sequence[str] | None = None,
    spacing: Spacing = ISO_SPACING,
    size: int = 512,
    overwrite: bool = False,
    report: Callable[[CaseSummary], None] | None = None,
) -> Summary:
    """Read, segment, resample and store CT volumes for training.

    Parameters
    ----------
    inputs : sequence of paths
        What `lesionsynth.io.read_ct` takes. A case is named after its file or folder.
    output : path
        Store to make or to go on with; finished cases are kept.
    masks : path, optional
        Lung mask for a single input, or a folder where each case has one: ``<case>.nii.gz``,
        ``<case>_lung.nii.gz`` (or nrrd, mha, mhd; ``_hu`` and ``_ct`` at the end of the case's name may be
        missing). Omitted: the lungs are segmented.
    exclude : path, optional
        CSV ``case,first_slice,last_slice``: slices of the file, from 0 at the feet, ends included, left out.
    annotations : path, optional
        LUNA16-style CSV ``seriesuid,coordX,coordY,coordZ,diameter_mm``: slices with nodules are left out.
    keep_lung : mapping, optional
        Case name to "right" or "left": only that lung is kept.
    names : sequence of str, optional
        Case names, one per input.
    spacing : (3,) floats
        Working voxel size in mm, axis order z, y, x.
    size : int
        In-plane size in voxels; the lungs are centred, padded or cropped.
    overwrite : bool
        Prepare finished cases again.
    report : callable, optional
        Called with each case's summary as it is done.

    Returns
    -------
    Summary

    Raises
    ------
    ValueError
        The call as a whole makes no sense: no inputs, repeated case names, names in `exclude` or `keep_lung`
        that are no case, unreadable CSV, a store with other settings. What is wrong with one input is in the
        summary.
    """
    ids = _case_ids(inputs, names)
    sides = dict(keep_lung or {})
    left_out = read_exclusions(Path(exclude)) if exclude is not None else {}
    nodules = read_annotations(Path(annotations)) if annotations is not None else {}
    for argument, used in (("exclude", left_out), ("keep_lung", sides)):
        unknown = sorted(set(used) - set(ids))
        if unknown:
            raise ValueError(f"{argument} names {', '.join(unknown)}: no such case among {', '.join(ids)}")
    if masks is not None and not Path(masks).is_dir() and len(ids) > 1:
        raise ValueError(f"masks must be a folder where there are several inputs, got the file {masks}")
    store = Store.create(output, {"spacing": [float(s) for s in spacing], "size": int(size)})
    (store.path / "qc").mkdir(exist_ok=True)
    done = []
    for path, case_id in zip(inputs, ids, strict=True):
        if case_id in store and not overwrite:
            summary = _from_meta(case_id, store[case_id].meta)
        else:
            work = _Work(
                Path(path),
                case_id,
                masks,
                left_out.get(case_id, []),
                nodules.get(case_id, []),
                sides.get(case_id, "both"),
            )
            summary = _attempt(work, store, spacing, size)
        done.append(summary)
        if report is not None:
            report(summary)
    return Summary(tuple(done), store)


@dataclass(frozen=True)
class _Work:
    path: Path
    case_id: str
    masks: str | os.PathLike[str] | None
    left_out: list[Range]
    nodules: list[Nodule]
    side: Side


def _attempt(work: _Work, store: Store, spacing: Spacing, size: int) -> CaseSummary:
    start = time.perf_counter()
    try:
        meta = _prepare_one(work, store, spacing, size)
    except (ValueError, OSError, MemoryError) as error:
        _LOG.warning("%s failed: %s", work.case_id, error)
        return CaseSummary(work.case_id, "failed", f"{error}", seconds=time.perf_counter() - start)
    summary = _from_meta(work.case_id, meta)
    return CaseSummary(**{**vars(summary), "status": "prepared", "seconds": time.perf_counter() - start})


def _prepare_one(work: _Work, store: Store, spacing: Spacing, size: int) -> dict[str, Any]:
    mask_path = None if work.masks is None else find_mask(Path(work.masks), work.case_id)
    case = load_case(
        work.path, mask_path, spacing=spacing, size=size, margin=MARGIN_SLICES, keep_lung=work.side
    )
    keep = kept_slices(case.grid, [*work.left_out, *nodule_slices(case.volume, work.nodules)])
    mask, removed = _without_edges(case)
    mask[~keep] = False
    if not mask.any():
        raise ValueError(f"{work.path}: no lung is left after the slices to leave out")
    ml = float(np.prod(spacing)) / 1000
    meta: dict[str, Any] = {
        "source": work.path.name,
        "source_shape": list(case.volume.hu.shape),
        "source_spacing": list(case.volume.spacing),
        "spacing": list(spacing),
        "start": list(case.grid.start),
        "segments": [list(run) for run in runs(keep)],
        "excluded": [list(r) for r in work.left_out],
        "lungs_from": "segmentation" if mask_path is None else mask_path.name,
        "kept_lung": work.side,
        "lung_ml": float(mask.sum()) * ml,
        "bright_fraction": float((case.hu[mask] >= -500).mean()),
        "edge_voxels": int(removed.sum()),
        "cropped_fraction": _cropped(case),
    }
    title = (
        f"{work.case_id}: source {'/'.join(f'{s:.2f}' for s in case.volume.spacing)} mm, lungs "
        f"{meta['lung_ml']:.0f} ml, bright {meta['bright_fraction']:.3f}, edges {meta['edge_voxels']} voxels"
    )
    write_picture(
        store.path / "qc" / f"{work.case_id}.png",
        case.hu,
        mask,
        removed,
        spacing=spacing,
        segments=runs(keep),
        title=title,
    )
    return store.add(work.case_id, case.hu, mask, meta, overwrite=True).meta


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


def _cropped(case: LoadedCase) -> float:
    """Share of the lungs that the in-plane window cuts off."""
    sides = []
    for axis in (1, 2):
        at = case.grid.window_positions(axis)
        sides.append((at >= -0.5) & (at < case.grid.shape[axis] - 0.5))
    shown = int((case.native_mask & sides[0][:, None] & sides[1]).sum())
    return 1.0 - shown / int(case.native_mask.sum())


def _from_meta(case_id: str, meta: Mapping[str, Any]) -> CaseSummary:
    cropped = float(meta["cropped_fraction"])
    message = (
        f"{cropped:.1%} of the lungs lie outside the {meta['shape'][1]} voxels in plane" if cropped else ""
    )
    z, y, x = meta["source_spacing"]
    return CaseSummary(
        case_id,
        "there",
        message,
        sum(b - a for a, b in meta["segments"]),
        (z, y, x),
        meta["lung_ml"],
        meta["bright_fraction"],
        meta["edge_voxels"],
    )


def find_mask(masks: Path, case_id: str) -> Path:
    """Find a case's lung mask; rules as in `prepare`.

    Raises
    ------
    ValueError
        None, or several.
    """
    if not masks.is_dir():
        return masks
    stems = {case_id.removesuffix(ending) for ending in _CT_ENDINGS}
    # the CT itself may lie in the same folder: its own name only counts where nothing longer does
    for endings in (_MASK_ENDINGS[1:], _MASK_ENDINGS[:1]):
        found = [
            p
            for stem in sorted(stems)
            for ending in endings
            for suffix in _FORMATS
            if (p := masks / f"{stem}{ending}{suffix}").is_file()
        ]
        if len(found) > 1:
            raise ValueError(f"{masks}: several masks for case {case_id}: {', '.join(p.name for p in found)}")
        if found:
            return found[0]
    raise ValueError(f"{masks}: no lung mask for case {case_id}; expected a file like {case_id}_lung.nii.gz")


def _case_ids(inputs: Sequence[str | os.PathLike[str]], names: Sequence[str] | None) -> list[str]:
    if not inputs:
        raise ValueError("inputs must name at least one CT")
    if names is not None and len(names) != len(inputs):
        raise ValueError(f"names must be one per input, got {len(names)} names for {len(inputs)} inputs")
    ids = list(names) if names is not None else [case_name(Path(path)) for path in inputs]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ValueError(f"case names must differ, got {', '.join(twice)} more than once; give names")
    return ids
