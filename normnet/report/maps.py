"""A page about a folder of maps: what `normnet.predict` found, and whether to believe it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from normnet.report.cases import finished_cases, locate
from normnet.report.layout import lay_out
from normnet.report.page import check_page
from normnet.report.section import look

PAGE = "report.html"
"""Name of the page in the folder of maps."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Show what normnet.predict found in one HTML page that opens offline.

    Exit status: 0 when every case is shown, 1 when the CT or a map of some could not be read (the others are
    shown, and of these the volumes), 2 for a wrong call.
    """

    maps: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MAPS")]
    """Folder that normnet.predict wrote."""
    output: Path | None = None
    """The page, a file that ends in .html; MAPS/report.html where omitted. An earlier one is replaced."""
    pictures: int = 3
    """Slices shown per case, those with most lesion first, about 300 KB each; where thresholds find other
    lungs than the network, one of them is where these differ most. 0 for the volumes alone: then neither CT
    nor maps are read."""
    ct: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER_OR_FILES")] = ()
    """CT files, DICOM folders, or folders of these, where CT are no longer where the prediction read them."""
    title: str = "NormNet: lesions in lung CT"
    """Heading of the page."""

    def __post_init__(self) -> None:
        """Check what can be checked beforehand."""
        if self.pictures < 0:
            raise ValueError(f"pictures must be >= 0, got {self.pictures}")
        page = self.output
        if page is not None and (page.suffix.lower() not in (".html", ".htm") or page.is_dir()):
            raise ValueError(f"output must be a file that ends in .html, got {page}")


@dataclass(frozen=True)
class ReportResult:
    """What became of a report."""

    path: Path
    """The page."""
    cases: list[str]
    """Cases in its table, the largest share of lesion first."""
    failures: dict[str, str]
    """Cases of which it shows the volumes alone, or nothing, and why."""


def report_maps(config: ReportConfig, *, progress_bar: bool = False) -> ReportResult:
    """Write a page about every finished case in a folder of maps.

    Parameters
    ----------
    config : ReportConfig
        The folder, and what to show.
    progress_bar : bool
        Show one on standard error.

    Returns
    -------
    ReportResult
        Cases whose CT or maps cannot be read do not stop the others.

    Raises
    ------
    ValueError
        ``maps`` is no folder or holds no finished prediction; ``ct`` holds no CT; ``output`` is a file that
        no report wrote.
    FileNotFoundError
        A path in ``ct`` does not exist.

    Notes
    -----
    One case is in memory at a time, its CT and two masks or three, beside the page so far.
    """
    from tqdm import tqdm

    path = config.maps / PAGE if config.output is None else config.output
    check_page(path)
    finished = finished_cases(config.maps)
    places = locate(finished.records, config.ct)
    cases = [record["case"] for record in finished.records]
    # closed before an error is told
    with tqdm(finished.records, disable=not progress_bar, unit="case", desc="report") as bar:
        sections = [look(config.maps, r, places[r["case"]], config.pictures) for r in bar]
    lay_out(config.title, config.maps, finished, sections).write(path)
    failures = {case: s.failure for case, s in zip(cases, sections, strict=True) if s.failure is not None}
    return ReportResult(path, cases, {**finished.failures, **failures})
