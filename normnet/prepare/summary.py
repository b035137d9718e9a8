"""What became of each case: in memory, as a table, and as ``summary.csv`` in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesionsynth.files import write_atomically
from lesionsynth.io import Passed
from normnet.prepare.grid import Spacing
from normnet.prepare.store import Store
from normnet.sheets import has_columns, sheet

COLUMNS = (
    "case",
    "status",
    "message",
    "lung_ml",
    "bright_fraction",
    "edge_voxels",
    "slices",
    "spacing_z",
    "spacing_y",
    "spacing_x",
    "source",
    "series",
    "lungs_from",
    "seconds",
)
"""Of ``summary.csv``; spacings in mm."""


@dataclass(frozen=True)
class CaseSummary:
    """What became of one input.

    Attributes
    ----------
    case_id : str
    status : {"prepared", "there", "failed"}
        "there": finished by an earlier run.
    remarks : tuple of str
        Why it failed, or what was warned of.
    slices : int
        Slices in use on the working grid.
    source_spacing : 3-tuple
        mm (z, y, x) of the file.
    lung_ml, bright_fraction : float
        Volume of the stored mask; share of it at or above the HU threshold (-500).
    edge_voxels : int
        Voxels of erroneous edges taken out of the mask.
    seconds : float
    source : str
        Name of the file or folder.
    series : str
        SeriesInstanceUID; empty for volume files.
    lungs_from : str
        "network", "classical", "lungmask", the name of a network's run, or that of the mask's file.
    """

    case_id: str
    status: str
    remarks: tuple[str, ...] = ()
    slices: int = 0
    source_spacing: Spacing = (0.0, 0.0, 0.0)
    lung_ml: float = 0.0
    bright_fraction: float = 0.0
    edge_voxels: int = 0
    seconds: float = 0.0
    source: str = ""
    series: str = ""
    lungs_from: str = ""

    @property
    def message(self) -> str:
        """The remarks on one line."""
        return "; ".join(self.remarks)

    @classmethod
    def of(
        cls, case_id: str, meta: Mapping[str, Any], status: str, seconds: float = 0.0, remark: str = ""
    ) -> CaseSummary:
        """Sum a stored case up from its meta data."""
        cropped = float(meta.get("cropped_fraction", 0))
        told = f"{cropped:.1%} of the lungs lie outside the {meta['shape'][1]} voxels in plane"
        remarks = [
            text for text in (remark, told * bool(cropped), *map(str, meta.get("warnings", ()))) if text
        ]
        z, y, x = meta.get("source_spacing", (0.0, 0.0, 0.0))
        return cls(
            case_id,
            status,
            tuple(remarks),
            sum(b - a for a, b in meta["segments"]),
            (float(z), float(y), float(x)),
            float(meta.get("lung_ml", 0)),
            float(meta.get("bright_fraction", 0)),
            int(meta.get("edge_voxels", 0)),
            seconds,
            str(meta.get("source", "")),
            str(meta.get("series") or ""),
            str(meta.get("lungs_from", "")),
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
    """Outcome of `prepare`.

    Attributes
    ----------
    cases : tuple of CaseSummary
        In the order of the inputs.
    store : Store
    passed : tuple of Passed
        What lay in the inputs and was not taken for a CT.
    """

    cases: tuple[CaseSummary, ...]
    store: Store
    passed: tuple[Passed, ...] = ()

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


def write_csv(path: Path, cases: Sequence[CaseSummary]) -> None:
    """Write ``summary.csv``, one line per case; a reader sees the old or the new one, never a part."""
    write_atomically(path, sheet([COLUMNS, *(case.row() for case in cases)]))


def is_summary(path: Path) -> bool:
    """Tell whether a file is a ``summary.csv``."""
    return has_columns(path, COLUMNS)
