"""Command line of `normnet.prepare`: ``python -m normnet.prepare IN... --output STORE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lesionsynth.commands import plainly, run
from lesionsynth.io import SeriesInfo, dicom_folders, largest_series
from normnet.cases import tell
from normnet.config import Task
from normnet.prepare.case import Edges, LungMethod, Side
from normnet.prepare.run import CaseSummary, prepare


@dataclass(frozen=True)
class PrepareArgs:
    """Prepare CT volumes for training: read, segment the lungs, resample, store.

    Exit status: 0 when every case is in the store, 1 when some failed or a file that was named was passed
    over (the others are in), 2 for a wrong call. A call that was interrupted goes on where it stopped when
    it is given again.
    """

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """NIfTI, NRRD or MetaImage files, DICOM folders, and folders of these, LUNA16's among them; or one CSV
    with the columns case, ct and, for lung masks, lungs."""
    output: Path | None = None
    """Store to make or to go on with; finished cases are kept. Needed, unless series are listed."""
    series: str = "largest"
    """Of a DICOM folder with several series: largest, all, or a SeriesInstanceUID."""
    list_series: bool = False
    """Print the DICOM series in the inputs, and do nothing else."""
    masks: Path | None = None
    """Folder with lung masks, <case>.nii.gz (or nrrd, mha, mhd, .seg.nrrd), else the only <case>_*; or the
    mask of a single CT. The lungs are segmented where omitted."""
    label: tuple[int, ...] = ()
    """Labels of the masks that are lung; all above zero where omitted."""
    lungs: LungMethod | None = None
    """How lungs are segmented: network, that of this package; classical, thresholds and morphology; lungmask,
    the network of that package, if installed; or weights of your own. network where omitted, classical with
    --task lungs."""
    task: Task = "lesions"
    """What shall be trained: lesions; or lungs, which keeps whole chests on a coarse grid that follows the
    patient's size, right and left told apart (spacing and size do not count then, and nodules stay)."""
    exclude: Path | None = None
    """CSV of case,first_slice,last_slice to leave out: slices of the file, from 0 at the feet, ends
    included."""
    edges: Edges = "remove"
    """Bright rims of the lung masks, III-B's erroneous edges: remove them, as the paper does; or keep them as
    healthy tissue, as prediction does, so that a network learns to know them. --task lungs keeps them."""
    annotations: Path | None = None
    """LUNA16-style CSV seriesuid,coordX,coordY,coordZ,diameter_mm; slices with nodules are left out.
    seriesuid is a SeriesInstanceUID or the name of a file. Of LUNA16 folders the annotations.csv is found by
    itself."""
    lung: tuple[str, ...] = ()
    """CASE=right or CASE=left: keep that lung only."""
    name: tuple[str, ...] = ()
    """Case names, one per CT; file names where omitted."""
    spacing: tuple[float, float, float] = (1.0, 0.8, 0.8)
    """Voxel size of the store in mm: z, y, x."""
    size: int = 512
    """In-plane size in voxels; the lungs are centred, padded or cropped."""
    overwrite: bool = False
    """Prepare finished cases again."""
    workers: int = 1
    """Processes; each prepares one case at a time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def body() -> int:
        args = tyro.cli(PrepareArgs, args=argv, prog="python -m normnet.prepare")
        with plainly():
            return _list(args.inputs) if args.list_series else _prepare(args)

    return run("error", body)


def _list(inputs: Sequence[Path]) -> int:
    found = dicom_folders(inputs)
    print(series_table(found), end="", flush=True)
    return int(tell({}, found.passed))


def _prepare(args: PrepareArgs) -> int:
    if args.output is None:
        raise ValueError("output must be given: --output STORE")
    summary = prepare(
        args.inputs,
        args.output,
        masks=args.masks,
        label=args.label,
        exclude=args.exclude,
        annotations=args.annotations,
        keep_lung=_sides(args.lung),
        names=args.name or None,
        series=args.series,
        lungs=args.lungs,
        task=args.task,
        edges=args.edges,
        spacing=args.spacing,
        size=args.size,
        overwrite=args.overwrite,
        workers=args.workers,
        report=_progress,
    )
    store = summary.store.path
    print(f"\n{summary.table()}\n\nlook at the pictures in {store / 'qc'}; ", end="")
    print(f"the table is {store / 'summary.csv'}", flush=True)
    named = tell({}, summary.passed)
    return 1 if summary.failed or named else 0


def series_table(folders: Sequence[tuple[Path, Sequence[SeriesInfo]]]) -> str:
    """Lay out the DICOM series of folders; a star marks those that "largest" takes."""
    lines = []
    for folder, infos in folders:
        lines.append(f"{folder}")
        taken = largest_series(infos)
        for info in infos:
            lines.append(
                f"  {'*' if info is taken and info.usable else ' '} {info.uid:<64} {info.modality or '?':<4} "
                f"{info.slices:>5}  {info.description}{'  -- ' + info.problem if info.problem else ''}"
            )
    if not lines:
        return "no DICOM series found\n"
    head = f"    {'SeriesInstanceUID':<64} {'kind':<4} {'files':>5}  description  -- why it is no CT volume"
    return "\n".join([head, *lines, "* is read by --series largest"]) + "\n"


def _sides(entries: Sequence[str]) -> dict[str, Side]:
    sides: dict[str, Side] = {}
    for entry in entries:
        case, _, side = entry.rpartition("=")
        if not case or (side != "right" and side != "left"):
            raise ValueError(f"--lung must be CASE=right or CASE=left, got {entry}")
        sides[case] = "right" if side == "right" else "left"
    return sides


def _progress(case: CaseSummary) -> None:
    failed = f" {case.message}" if case.status == "failed" else ""
    print(f"{case.case_id}: {case.status} ({case.seconds:.1f} s){failed}", file=sys.stderr, flush=True)
    if not failed:
        tell({case.case_id: case.remarks})


if __name__ == "__main__":
    sys.exit(main())
