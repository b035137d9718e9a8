"""Prepare CT into a store: read, find the lungs, leave slices out, resample, draw (PAPER.md IV-A, IV-B).

A broken case is reported and the others go on.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from scipy import ndimage

import lesionsynth as ls
from lesionsynth.files import claimed, is_picture, refuse_foreign, replacing, write_atomically
from lesionsynth.io import Found, Passed
from lesionsynth.strict import name_of
from normnet.cases import FORESEEN, Case, find_cases, hear, reason
from normnet.config import OUTPUTS, PAPER_THRESHOLD_HU, Task
from normnet.draw import prepared_picture
from normnet.inflation import healthy_density
from normnet.prepare.case import (
    ISO_SPACING,
    Edges,
    LoadedCase,
    LungMethod,
    Side,
    check_grid,
    check_lungs,
    load_case,
    method_record,
)
from normnet.prepare.exclude import (
    Nodule,
    Range,
    find_annotations,
    kept_slices,
    match_annotations,
    nodule_slices,
    read_exclusions,
    runs,
)
from normnet.prepare.grid import IsoGrid, Mask, Spacing
from normnet.prepare.lungs import plane_eroded
from normnet.prepare.store import Store, case_name_for_store
from normnet.sheets import has_columns, sheet
from normnet.workers import Died, run_parallel

EDGE_MM = 3.2
"""Depth in which erroneous edges may lie: twice the shell of two voxels that tells them."""
MARGIN_SLICES = 4
"""Slices kept above and below the lungs."""
COLUMNS = (
    "case", "status", "message", "lung_ml", "bright_fraction", "edge_voxels", "slices", "spacing_z",
    "spacing_y", "spacing_x", "source", "series", "lungs_from", "seconds",
)  # fmt: skip
"""Of ``summary.csv``; spacings in mm."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseSummary:
    """What became of one input."""

    case_id: str
    status: str
    """prepared, failed, or there: finished by an earlier run."""
    remarks: tuple[str, ...] = ()
    """Why it failed, or what was warned of."""
    slices: int = 0
    """In use on the working grid."""
    source_spacing: Spacing = (0.0, 0.0, 0.0)
    """mm (z, y, x) of the file."""
    lung_ml: float = 0.0
    """Volume of the stored mask."""
    bright_fraction: float = 0.0
    """Share of it at or above -500 HU."""
    edge_voxels: int = 0
    """Voxels of erroneous edges taken out of it."""
    seconds: float = 0.0
    source: str = ""
    """Name of the file or folder."""
    series: str = ""
    """SeriesInstanceUID; empty for volume files."""
    lungs_from: str = ""
    """network, classical, lungmask, the name of a network's run, or that of the mask's file."""

    @property
    def message(self) -> str:
        """The remarks on one line."""
        return "; ".join(self.remarks)

    @classmethod
    def of(
        cls, case_id: str, meta: Mapping[str, Any], status: str, seconds: float = 0.0, remark: str = ""
    ) -> CaseSummary:
        """Sum a stored case up from its meta data."""
        remarks = [remark] if remark else []
        if cropped := float(meta.get("cropped_fraction", 0)):
            remarks.append(f"{cropped:.1%} of the lungs lie outside the {meta['shape'][1]} voxels in plane")
        z, y, x = map(float, meta.get("source_spacing", (0.0, 0.0, 0.0)))
        return cls(
            case_id,
            status,
            (*remarks, *map(str, meta.get("warnings", ()))),
            sum(b - a for a, b in meta["segments"]),
            (z, y, x),
            float(meta.get("lung_ml", 0)),
            float(meta.get("bright_fraction", 0)),
            int(meta.get("edge_voxels", 0)),
            seconds,
            *(str(meta.get(name) or "") for name in ("source", "series", "lungs_from")),
        )

    def row(self) -> tuple[Any, ...]:
        """Give the values of `COLUMNS`; those that a failed case lacks are empty."""
        numbers: list[Any] = [""] * 7
        if self.status != "failed":
            numbers = [f"{self.lung_ml:.1f}", f"{self.bright_fraction:.5f}", self.edge_voxels, self.slices]
            numbers += (f"{s:.5g}" for s in self.source_spacing)
        origin = (self.source, self.series, self.lungs_from, f"{self.seconds:.1f}")
        return (self.case_id, self.status, self.message, *numbers, *origin)


@dataclass(frozen=True)
class Summary:
    """Outcome of `prepare`."""

    cases: tuple[CaseSummary, ...]
    """In the order of the inputs."""
    store: Store
    passed: tuple[Passed, ...] = ()
    """What lay in the inputs and was not taken for a CT."""

    @property
    def failed(self) -> tuple[CaseSummary, ...]:
        """Cases that could not be prepared."""
        return tuple(case for case in self.cases if case.status == "failed")

    def table(self) -> str:
        """Lay the cases out as text, one line each."""
        head = f"{'case':<28} {'status':<9} {'slices':>6} {'spacing z/y/x (mm)':>19} {'lung ml':>8}"
        lines = [f"{head} {'bright':>7} {'edges':>8} {'s':>6}"]
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
    label: Sequence[int] = (),
    exclude: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    keep_lung: Mapping[str, Side] | None = None,
    names: Sequence[str] | None = None,
    series: str = "largest",
    lungs: LungMethod | None = None,
    task: Task = "lesions",
    edges: Edges = "remove",
    spacing: Spacing = ISO_SPACING,
    size: int = 512,
    overwrite: bool = False,
    workers: int = 1,
    report: Callable[[CaseSummary], None] | None = None,
) -> Summary:
    """Read, segment, resample and store CT volumes for training.

    Parameters
    ----------
    inputs : sequence of paths
        Volume files, DICOM folders, and folders of these to any depth, LUNA16's among them; or one CSV. See
        `normnet.cases.find_cases`. A case is named after its file or folder.
    output : path
        Store to make or to go on with; finished cases are kept, what a killed run left is taken away.
    masks, label, exclude, annotations, series, lungs, task, edges, spacing, size, overwrite
        As the options of the command, `normnet.prepare.__main__.PrepareArgs`, which says more.
    keep_lung : mapping, optional
        Case name to "right" or "left": only that lung is kept.
    names : sequence of str, optional
        Case names, one per CT found.
    workers : int
        Processes that prepare a case each; the store is the same for any number. A script that asks for more
        than one must guard its main part by ``if __name__ == "__main__"``.
    report : callable, optional
        Called with each case's summary as it is done.

    Returns
    -------
    Summary
        Also in the store as ``summary.csv``, with the other cases there.

    Raises
    ------
    FileNotFoundError
        An input or `masks` does not exist.
    ValueError
        The call as a whole makes no sense: no inputs, a folder without CT, repeated or impossible case names,
        `masks` without a file for any case, names in `exclude` or `keep_lung` that are no case, annotations
        none of which belongs to an input, unreadable CSV, a store with other settings. What is wrong with one
        input is in the summary.
    ImportError
        `lungs` is "lungmask", which is not installed.
    """
    check_grid(spacing, size)  # before there is a store that is stuck with it
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if task not in OUTPUTS:
        raise ValueError(f"task must be one of {', '.join(OUTPUTS)}, got {task!r}")
    if edges not in get_args(Edges):
        raise ValueError(f"edges must be one of {', '.join(get_args(Edges))}, got {edges!r}")
    for_lungs = task == "lungs"
    if for_lungs and (keep_lung or annotations is not None):
        given = "keep_lung" if keep_lung else "annotations"
        raise ValueError(f"{given} must be omitted for the task lungs: both are shown, with their nodules")
    if lungs is None:
        lungs = "classical" if for_lungs else "network"
    folder = None if masks is None else Path(masks)
    found = find_cases(list(map(Path, inputs)), masks=folder, series=series, names=names, output=Path(output))
    cases = _by_name(found, names)
    sides = dict(keep_lung or {})
    left_out = {} if exclude is None else read_exclusions(Path(exclude))
    for argument, used in (("exclude", left_out), ("keep_lung", sides)):
        if unknown := sorted(used.keys() - cases.keys()):
            raise ValueError(f"{argument} names {', '.join(unknown)}: no such case among {', '.join(cases)}")
    check_lungs(found, lungs, label)
    files = find_annotations(inputs) if annotations is None else [Path(annotations)]
    nodules = {} if for_lungs else match_annotations(files, found)
    kept = {"task": task} if for_lungs else {"spacing": [float(s) for s in spacing], "size": int(size)}
    store = Store.create(output, kept)
    table = store.path / "summary.csv"
    refuse_foreign(store.path, [table.name], ours=has_columns(table, COLUMNS), maker="a store")
    (store.path / "qc").mkdir(exist_ok=True)
    works = [
        Work(
            case=case,
            case_id=case_id,
            store=store.path,
            spacing=spacing,
            size=size,
            label=tuple(label),
            left_out=tuple(left_out.get(case_id, ())),
            nodules=tuple(nodules.get(case, ())),
            side=sides.get(case_id, "both"),
            lungs=lungs,
            task=task,
            edges=edges,
        )
        for case_id, case in cases.items()
    ]
    with claimed(store.path):
        store.clean()
        try:
            return Summary(_run(works, store, workers, overwrite, report), store, found.passed)
        finally:
            store.clean()  # what a worker left that was killed


def _by_name(found: Found[Case], names: Sequence[str] | None) -> dict[str, Case]:
    """CT by their names in the store."""
    for name in names or ():
        if name != case_name_for_store(name):
            raise ValueError(
                f"names must be of letters, digits and _.@+- and not start with a dot, got {name!r}"
            )
    cases = [case_name_for_store(case.case) for case in found]
    if twice := sorted(name for name, count in Counter(cases).items() if count > 1):
        raise ValueError(f"case names must differ, got {', '.join(twice)} more than once; give names")
    return dict(zip(cases, found, strict=True))


def _run(
    works: Sequence[Work],
    store: Store,
    workers: int,
    overwrite: bool,
    report: Callable[[CaseSummary], None] | None,
) -> tuple[CaseSummary, ...]:
    """Prepare what is not there yet, and keep ``summary.csv`` up to date."""
    tell = report or (lambda case: None)
    done = {} if overwrite else {work.case_id: case for work in works if (case := _there(work, store))}
    asked = {work.case_id for work in works}
    others = [CaseSummary.of(name, store[name].meta, "there") for name in store.case_ids if name not in asked]
    for case in done.values():
        tell(case)
    for case in _prepared([work for work in works if work.case_id not in done], workers):
        done[case.case_id] = case
        tell(case)
        _write_table(store, [done[work.case_id] for work in works if work.case_id in done] + others)
    cases = [done[work.case_id] for work in works]
    _write_table(store, cases + others)
    return tuple(cases)


def _write_table(store: Store, cases: Sequence[CaseSummary]) -> None:
    try:
        write_atomically(store.path / "summary.csv", sheet([COLUMNS, *(case.row() for case in cases)]))
    except OSError as error:  # a full disk: the cases are in the store or reported all the same
        warnings.warn(f"summary.csv could not be written: {error}", stacklevel=4)


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
    edges: Edges

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
            "edges": self.edges,
        }


def _there(work: Work, store: Store) -> CaseSummary | None:
    """Sum up a case that is finished; None where it is to be prepared."""
    if work.case_id not in store or not (case := store[work.case_id]).is_whole():
        return None
    asked = {} if work.case.problem else work.request()  # of what cannot be read, what there is is kept
    other = [name for name, value in asked.items() if name in case.meta and case.meta[name] != value]
    remark = f"prepared with another {', '.join(other)}; overwrite prepares it again" if other else ""
    return CaseSummary.of(work.case_id, case.meta, "there", remark=remark)


def _prepared(works: Sequence[Work], workers: int) -> Iterator[CaseSummary]:
    """Summaries in the order in which the cases end."""
    if workers == 1 or len(works) < 2:
        yield from map(_attempt, works)
        return
    for index, result in run_parallel(_attempt, works, workers):
        if isinstance(result, Died):
            result = _failed(works[index], f"{name_of(works[index].case.ct)}: {result}")
        yield result


def _attempt(work: Work) -> CaseSummary:
    """Prepare a case; whatever goes wrong is in the summary, and nothing of the case in the store."""
    start = time.perf_counter()
    try:
        meta = _prepare(work)
    except Exception as error:  # one bad file must not cost the others, whatever a library makes of it
        if not isinstance(error, FORESEEN):
            _LOG.warning("%s failed: %s", work.case_id, error, exc_info=True)
        return _failed(work, reason(work.case.ct, error), time.perf_counter() - start)
    return CaseSummary.of(work.case_id, meta, "prepared", time.perf_counter() - start)


def _failed(work: Work, message: str, seconds: float = 0.0) -> CaseSummary:
    source, series = name_of(work.case.ct.name), work.case.series or ""
    return CaseSummary(work.case_id, "failed", (message,), seconds=seconds, source=source, series=series)


def _prepare(work: Work) -> dict[str, Any]:
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
    lungs: npt.NDArray[Any]
    if work.task == "lungs":
        hu, grid, lungs, classical = _chest(case)
        removed = np.zeros(hu.shape, bool)
    else:
        hu, grid, classical = case.hu, case.grid, case.native_classical
        lungs, removed = _without_edges(case) if work.edges == "remove" else _with_edges(case)
        classical = None if classical is None else grid.to_iso(classical)
    keep = kept_slices(grid, [*work.left_out, *nodule_slices(case.volume, work.nodules)])
    for outline in (lungs, classical):
        if outline is not None:
            outline[~keep] = 0
    mask = lungs > 0
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
        "bright_fraction": float((hu[mask] >= PAPER_THRESHOLD_HU).mean()),
        "edge_voxels": int(removed.sum()),
        "cropped_fraction": _cropped(case, grid),
        "warnings": said,
    }
    if work.task == "lesions":
        meta["density_hu"] = healthy_density(hu, mask)
    picture = prepared_picture(
        hu,
        mask,
        removed,
        spacing=grid.spacing,
        segments=runs(keep),
        title=f"{work.case_id}: source {'/'.join(f'{s:.2f}' for s in case.volume.spacing)} mm, lungs "
        f"{meta['lung_ml']:.0f} ml, bright {meta['bright_fraction']:.3f}, edges {meta['edge_voxels']} voxels",
        classical=classical,
    )
    path = store.path / "qc" / f"{work.case_id}.png"
    if os.path.lexists(path) and work.case_id not in store and not is_picture(path):
        raise ValueError(f"{path} must be a picture that this store drew, or nothing: move it away")
    with replacing(path) as beside:  # where one of the two cannot be written, neither is there
        beside.write_bytes(picture)
        return store.add(work.case_id, hu, lungs, meta, overwrite=True).meta


def _chest(case: LoadedCase) -> tuple[npt.NDArray[np.int16], IsoGrid, npt.NDArray[np.uint8], Mask | None]:
    """Bring the whole scan to the coarse grid of the lung network.

    Returns HU, the grid, 1 where the right lung is and 2 where the left, and the lungs by thresholds, where a
    network's are kept.
    """
    from normnet.prepare.network import chest_grid, shrink, without_hilum  # torch is long to load

    sides = case.native_sides
    if sides is None or not all(lung.any() for lung in sides):
        raise ValueError(f"{case.volume.path}: the scan must show both lungs, and they must be told apart")
    grid = chest_grid(case.volume.hu, case.volume.spacing)
    hu = np.rint(shrink(case.volume.hu, grid)).astype(np.int16)
    first, second = (shrink(lung, grid) for lung in sides)
    lungs = first + second > 0.5
    right, left = without_hilum(hu, lungs & (first >= second), lungs & (first < second))
    classical = None if case.native_classical is None else shrink(case.native_classical, grid) > 0.5
    return hu, grid, right + np.uint8(2) * left, classical


def _without_edges(case: LoadedCase) -> tuple[Mask, Mask]:
    """Take the erroneous edges (III-B) out of the lung mask; (mask, removed).

    Where a vessel tree hangs on the rim, the whole component counts as an edge; its deep part stays.
    """
    boxes = ndimage.find_objects(case.mask.view(np.uint8))
    if not boxes:
        raise ValueError(f"{case.volume.path}: the lung mask has no voxel on the working grid")
    inner = np.ascontiguousarray(case.mask[boxes[0]])
    image = ls.window_hu(np.ascontiguousarray(case.hu[boxes[0]])) * inner
    _, cleaned = ls.remove_erroneous_edges(image, inner)
    edges = inner & ~cleaned
    mask = np.zeros(case.mask.shape, bool)
    mask[boxes[0]] = np.where(edges, plane_eroded(inner, EDGE_MM, case.spacing), inner)
    return mask, case.mask & ~mask


def _with_edges(case: LoadedCase) -> tuple[Mask, Mask]:
    """Leave the lung mask as it is."""
    return case.mask.copy(), np.zeros(case.mask.shape, bool)


def _cropped(case: LoadedCase, grid: IsoGrid) -> float:
    """Share of the lungs that the in-plane window cuts off."""
    y, x = (
        (at >= -0.5) & (at < n - 0.5)
        for at, n in ((grid.window_positions(axis), grid.shape[axis]) for axis in (1, 2))
    )
    return 1.0 - int((case.native_mask & y[:, None] & x).sum()) / int(case.native_mask.sum())
