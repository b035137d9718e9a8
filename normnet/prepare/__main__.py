"""Command line of `normnet.prepare`: ``python -m normnet.prepare IN... --output STORE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from normnet.prepare.case import Side
from normnet.prepare.run import CaseSummary, prepare


@dataclass(frozen=True)
class PrepareArgs:
    """Prepare CT volumes for training: read, segment the lungs, resample, store.

    Exit status: 0 when every case is in the store, 1 when some failed (the others are in), 2 for a wrong
    call.
    """

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """NIfTI, NRRD or MetaImage files, DICOM folders."""
    output: Path
    """Store to make or to go on with; finished cases are kept."""
    masks: Path | None = None
    """Lung mask, or folder with a <case>_lung.nii.gz per case; segmented where omitted."""
    exclude: Path | None = None
    """CSV of case,first_slice,last_slice to leave out; slices of the file, from 0 at the feet."""
    annotations: Path | None = None
    """LUNA16-style CSV seriesuid,coordX,coordY,coordZ,diameter_mm; slices with nodules are left out."""
    lung: tuple[str, ...] = ()
    """CASE=right or CASE=left: keep that lung only."""
    name: tuple[str, ...] = ()
    """Case names, one per input; file names where omitted."""
    spacing: tuple[float, float, float] = (1.0, 0.8, 0.8)
    """Voxel size of the store in mm: z, y, x."""
    size: int = 512
    """In-plane size in voxels; the lungs are centred, padded or cropped."""
    overwrite: bool = False
    """Prepare finished cases again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = tyro.cli(PrepareArgs, args=argv, prog="python -m normnet.prepare")
    try:
        summary = prepare(
            args.inputs,
            args.output,
            masks=args.masks,
            exclude=args.exclude,
            annotations=args.annotations,
            keep_lung=_sides(args.lung),
            names=args.name or None,
            spacing=args.spacing,
            size=args.size,
            overwrite=args.overwrite,
            report=_progress,
        )
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"\n{summary.table()}\n")
    sys.stdout.write(f"\nlook at the pictures in {summary.store.path / 'qc'}\n")
    return 1 if summary.failed else 0


def _sides(entries: Sequence[str]) -> dict[str, Side]:
    sides: dict[str, Side] = {}
    for entry in entries:
        case, _, side = entry.rpartition("=")
        if not case or (side != "right" and side != "left"):
            raise ValueError(f"--lung must be CASE=right or CASE=left, got {entry}")
        sides[case] = "right" if side == "right" else "left"
    return sides


def _progress(case: CaseSummary) -> None:
    sys.stderr.write(
        f"{case.case_id}: {case.status} ({case.seconds:.1f} s){' ' + case.message if case.message else ''}\n"
    )
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
