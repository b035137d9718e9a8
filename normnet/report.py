"""What a folder of maps holds, in one HTML page that opens offline: ``python -m normnet.report MAPS``.

`report_maps` is the same in Python; `Page` writes every page of the package.
"""

from __future__ import annotations

import os
import sys
import warnings
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tyro

from lesionsynth.commands import plainly, printable, run
from lesionsynth.files import write_atomically
from lesionsynth.io import read_ct, read_mask
from lesionsynth.strict import name_of
from normnet.cases import FORESEEN, Place, hear, locate, reason
from normnet.draw import LESION, LUNG_WINDOW, curve, finding_pictures, histogram, most_apart
from normnet.output import Record, read_records, unfinished

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Volumes = Mapping[str, float | None]

MARK = b'<meta name="generator" content="normnet">'
"""Tells a page of ours from others."""
LUNG_ML = (1500.0, 10_500.0)
"""Both lungs of an adult (Hall et al., Eur Respir J 2021;57:2000289): what 95 % of women of 1.5 m keep after
breathing out at rest, and the total capacity that 95 % of men of 2.0 m stay below."""
SMALLER_SIDE = 1 / 3
"""Share of the smaller lung, 45 % as a rule: below, one is collapsed or cut off, or its mask has a hole."""
THICK_MM = 5.0
"""Slice distance. The network was trained on 1 mm: thicker slices are interpolated (docs/limits.md)."""
LARGE_PERCENT = 50.0
"""Lesions in both lungs; 47 of 1,110 suspected of COVID-19 have more (MosMedData, arXiv:2005.06465)."""
CUT_SHARE = 0.1
"""Lung in the first or last slice, as a share of the slice with most. Whole lungs taper to nothing."""
DENSE_HU = -500.0
"""Median of the lung outside the lesions; from this value on the paper calls a voxel bright (III-D)."""
CHANGED = 1e-3
"""Relative difference of volumes in a record and its maps: float32 spacings in files differ by 1e-7."""
DIFFER = "lungs differ"
"""Tag of the concern that two outlines of the lungs do."""
HU_EDGES = np.array([-np.inf, *np.linspace(-1024, 296, 61), np.inf])
"""Of the histogram: from air to muscle, 22 HU a bin. Bins of whole HU hold equally many values each."""


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
    lungs than the network, one is where these differ most. 0 for the volumes alone: no CT or map is read."""
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


class ReportResult(NamedTuple):
    """The page; its cases, the largest share of lesion first; and of which it shows no pictures, and why."""

    path: Path
    cases: list[str]
    failures: dict[str, str]


class Page:
    """A self-contained HTML page, built from top to bottom: pictures inside, nothing fetched, no script."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._sections: list[tuple[str | None, list[tuple[str, dict[str, Any]]]]] = [(None, [])]

    def _add(self, kind: str, **block: Any) -> None:
        """Add what the template knows as this kind of block."""
        self._sections[-1][1].append((kind, block))

    def heading(self, text: str, *, anchor: str | None = None) -> None:
        """Start a part; with an `anchor` that a table's rows can lead to, a section with a line above."""
        if anchor is not None:
            self._sections.append((anchor, []))
        self._add("heading", text=text)

    def paragraph(self, text: str, *, note: bool = False) -> None:
        """Add text; a note is set smaller."""
        self._add("note" if note else "paragraph", text=text)

    def warning(self, text: str) -> None:
        """Add a sentence that must not be overlooked."""
        self._add("warning", text=text)

    def legend(self) -> None:
        """Explain the colours of the overlays."""
        self._add("legend")

    def table(self, frame: pd.DataFrame, *, anchors: Sequence[str | None] | None = None) -> None:
        """Add a table without its index; its first column leads to the section of its row's anchor."""
        rows = list(frame.itertuples(index=False, name=None))
        targets = [None] * len(rows) if anchors is None else anchors
        self._add("table", header=list(frame), rows=list(zip(rows, targets, strict=True)))

    def picture(self, png: bytes, caption: str, *, width: int | None = None) -> None:
        """Add a PNG picture with a caption; `width` in CSS pixels, its own size where omitted."""
        self._add("picture", data=b64encode(png).decode(), caption=caption, width=width)

    def write(self, path: Path) -> Path:
        """Write the page atomically; folders are created. ValueError as `check_page`."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        check_page(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        jinja = Environment(autoescape=True, undefined=StrictUndefined, loader=PackageLoader("normnet", ""))
        page = jinja.get_template("report.html.j2").render(title=self._title, sections=self._sections)
        # a name that the file system has in no known encoding is shown by its bytes
        return write_atomically(path, page.encode("utf-8", "backslashreplace"))


def check_page(path: Path) -> None:
    """Refuse to write over a file that is no page of ours: ValueError where something else is at `path`."""
    if not os.path.lexists(path):
        return
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as stream:
            if MARK in stream.read(200):
                return
    raise ValueError(f"output must be a new file or an earlier page, got {path}: name another, or move it")


def report_maps(config: ReportConfig, *, progress_bar: bool = False) -> ReportResult:
    """Write a page about every finished case in a folder of maps; one case is in memory at a time.

    Cases whose CT or maps cannot be read do not stop the others.

    Raises
    ------
    ValueError
        ``maps`` is no folder or holds no finished prediction; ``ct`` holds no CT; ``output`` is a file that
        no report wrote.
    FileNotFoundError
        A path in ``ct`` does not exist.
    """
    from tqdm import tqdm

    maps, path = config.maps, config.maps / "report.html" if config.output is None else config.output
    check_page(path)
    if not maps.is_dir():
        raise ValueError(f"maps must be a folder that normnet.predict wrote, got {maps}, which is none")
    records, failures = read_records(maps)
    if not records and not failures:
        rule = "maps must hold at least one finished case of normnet.predict (<case>.json), found none in"
        raise ValueError(f"{rule} {maps}")
    records.sort(key=lambda record: (-(record["volumes"].get("percent") or 0.0), record["case"]))
    places = locate(records, config.ct)
    for one in places.passed:
        if one.named:
            warnings.warn(f"passed over: {one}", stacklevel=2)
    with tqdm(records, disable=not progress_bar, unit="case", desc="report") as bar:
        cases = [
            look(maps, record, place, config.pictures) for record, place in zip(bar, places, strict=True)
        ]
    page = Page(config.title)
    _add_overview(page, maps, cases, failures)
    for number, case in enumerate(cases, start=1):
        _add_case(page, case, f"case-{number}")
    failures |= {case.record["case"]: case.failure for case in cases if case.failure is not None}
    return ReportResult(page.write(path), [record["case"] for record in records], failures)


class Concern(NamedTuple):
    """Something that must be looked at: a few words for the table, and a sentence for the case."""

    tag: str
    text: str


def told(warnings: Iterable[str]) -> list[Concern]:
    """Make concerns of what was warned of when a case was made or read."""
    return [Concern(DIFFER if w.startswith("the lung network has ") else "warned of", w) for w in warnings]


def doubt_numbers(volumes: Volumes, slice_mm: float | None) -> Iterator[Concern]:
    """Check what a record says: its volumes in ml and percent, and the distance of the slices in mm."""
    both, percent = volumes.get("lung_ml"), volumes.get("percent")
    right, left = volumes.get("right_lung_ml"), volumes.get("left_lung_ml")
    low, high = LUNG_ML
    if both is not None and not low <= both <= high:
        text = f"The lungs measure {both:,.0f} ml; an adult's hold {low:,.0f} to {high:,.0f} ml. "
        text += "Is the whole chest in the scan, and does the outline follow the lungs?"
        yield Concern("lung volume", text)
    if right is None or left is None:
        yield Concern("sides unknown", "The right and the left lung could not be told apart.")
    elif not right or not left:
        missing = "left" if right else "right"
        text = f"No {missing} lung was found; if there is one, nothing was searched in it."
        yield Concern(f"no {missing} lung", text)
    elif min(right, left) < SMALLER_SIDE * (right + left):
        text = f"The right lung measures {right:,.0f} ml, the left {left:,.0f} ml: one has less than half of "
        text += "the other. Is part of it missing from the outline?"
        yield Concern("unequal lungs", text)
    if percent is not None and percent > LARGE_PERCENT:
        text = f"{percent:.0f} % of the lungs are marked, more than {LARGE_PERCENT:.0f} %. Shallow breath, "
        text += "motion or an unusual reconstruction may look like haze to the models."
        yield Concern("large share", text)
    if slice_mm is not None and slice_mm > THICK_MM:
        text = f"The slices lie {slice_mm:.1f} mm apart, more than {THICK_MM:.0f} mm: small lesions blur "
        text += "away, and vessels and the diaphragm may look like haze."
        yield Concern("thick slices", text)


def doubt_maps(
    volumes: Volumes, lung_cm2: Array, lesion_cm2: Array, slice_mm: float, outside_hu: Array
) -> Iterator[Concern]:
    """Check what maps and CT show: areas of slices from the feet, HU of the lungs outside the lesions."""
    ends = {"lower": lung_cm2[0], "upper": lung_cm2[-1]}
    if wide := " and the ".join(end for end, area in ends.items() if area > CUT_SHARE * lung_cm2.max()):
        text = f"The lungs reach the {wide} end of the scan: it does not cover them, and what lies beyond is "
        text += "not counted."
        yield Concern("cut off", text)
    if outside_hu.size and (median := float(np.median(outside_hu))) > DENSE_HU:
        text = f"Half of the lung outside the lesions is above {median:.0f} HU; inflated lung lies near "
        text += "-850 HU. Does the outline follow the lungs?"
        yield Concern("dense lungs", text)
    for name, areas in (("lung", lung_cm2), ("lesion", lesion_cm2)):
        recorded, now = volumes.get(f"{name}_ml"), float(areas.sum()) * slice_mm / 10.0
        if recorded is not None and abs(now - recorded) > CHANGED * max(now, recorded):
            text = f"The {name} map holds {now:.2f} ml, but {recorded:.2f} ml were measured when it was "
            text += "written: it was changed since, and the numbers here were not."
            yield Concern("maps changed", text)


def doubt_lungs(lung: Mask, classical: Mask, voxel_ml: float) -> Concern:
    """Tell how (Z, Y, X) lungs of the network, which were searched, differ from those by thresholds."""
    more, less = (np.count_nonzero(m) * voxel_ml for m in (lung & ~classical, classical & ~lung))
    text = f"The lung network and thresholds differ by {more + less:,.0f} ml: {more:,.0f} ml belong to the "
    text += f"network's lungs alone, {less:,.0f} ml to those by thresholds"
    if not classical.any():
        text = f"Thresholds find no lung where the lung network has {more:,.0f} ml"
    advice = "Thresholds lose dense disease at the pleura, a network may be wrong: the pictures show both"
    return Concern(DIFFER, f"{text}. {advice} outlines.")


@dataclass
class Case:
    """What the page says of a case: its record; what to look at; the size of its CT; pictures or why none."""

    record: Record
    concerns: list[Concern]
    facts: str = ""
    pictures: list[tuple[bytes, str, int]] = field(default_factory=list)
    """PNG, caption and width: slices, most lesion first, then histogram and curve."""
    compared: bool = False
    """The slices show the lungs by thresholds, too."""
    failure: str | None = None


def look(folder: Path, record: Record, place: Place, count: int) -> Case:
    """Look at a case, at `count` slices, with 0 at its record alone; what goes wrong is its `failure`."""
    slice_mm = None
    with suppress(TypeError, ValueError, LookupError):  # no part of every record
        slice_mm = float(record["grid"]["spacing"][0])
    case = Case(record, [*doubt_numbers(record["volumes"], slice_mm), *told(record["warnings"])])
    if count:
        try:
            _draw(case, folder, place, count)
        except Exception as error:
            case.failure = _reason(place.path, error)
    return case


def _reason(path: Path, error: Exception) -> str:
    """Say what went wrong; errors that were foreseen name a file themselves."""
    return reason(None if isinstance(error, FORESEEN) else path, error)


def _draw(case: Case, folder: Path, place: Place, count: int) -> None:
    """Read CT and maps of a case, check and draw them."""
    maps = {kind: folder / name for kind, name in case.record["files"].items() if name is not None}
    classical, unread = None, []
    if not place.path.exists():
        raise FileNotFoundError(f"{place.path}: no such file or folder; {place.hint}")
    with hear() as said:
        ct = read_ct(place.path, place.series)
        lung, lesions = read_mask(maps["lung"], ct), read_mask(maps["lesions"], ct)
        try:
            classical = read_mask(maps["classical"], ct) if "classical" in maps else None
        except Exception as error:  # it is there to compare: the rest can be shown without it
            why = _reason(maps["classical"], error)
            unread = [Concern("no second outline", f"The lungs by thresholds are not drawn: {why}")]
    case.concerns += [*told(text for text in said if text not in case.record["warnings"]), *unread]
    if not lung.any():
        raise ValueError(f"{maps['lung']}: the lung map must not be empty")

    z_mm, y_mm, x_mm = ct.spacing
    slices, rows, columns = ct.hu.shape
    pixel_cm2 = y_mm * x_mm / 100
    lung_cm2, lesion_cm2 = (np.count_nonzero(m, axis=(1, 2)) * pixel_cm2 for m in (lung, lesions))
    ill, outside = lesion_cm2.any(), ct.hu[lung & ~lesions]
    corners = ct.grid.corners()[:, 2]  # the lowest slice's four, then the highest's
    positions = np.linspace(corners[:4].mean(), corners[4:].mean(), slices)
    pictures = []
    for z, png in finding_pictures(ct.hu, lesions, lung, ct.spacing, count=count, classical=classical):
        share = f"{100 * lesion_cm2[z] / lung_cm2[z]:.1f} %" if lung_cm2[z] else "–"
        found = f"lesions {lesion_cm2[z]:.1f} cm², {share} of the lungs in it"
        caption = f"slice {z} of 0–{slices - 1} from the feet, z = {positions[z]:.1f} mm: "
        caption += found if ill else "no lesions in this case"
        if classical is not None and z == most_apart(lung, classical):
            alone = (lung[z] & ~classical[z], classical[z] & ~lung[z])
            blue, dashed = (np.count_nonzero(m) * pixel_cm2 for m in alone)
            caption += f"; here the outlines differ most: {blue:.1f} cm² lie within the blue one alone, "
            caption += f"{dashed:.1f} cm² within the dashed one alone"
        pictures.append((png, caption, 1000))
    values = {"lungs outside lesions": outside, "lesions": ct.hu[lesions]}
    counts = {name: np.histogram(hu, HU_EDGES)[0] for name, hu in values.items()}
    png = histogram(counts, HU_EDGES, xlabel="HU", ylabel="share of voxels")
    each = "lungs and lesions, as shares of the voxels of each" if ill else "lungs"
    pictures.append((png, f"CT numbers of {each}", 520))
    if ill:
        inside = np.flatnonzero(lung_cm2 + lesion_cm2)
        used = slice(inside[0], inside[-1] + 1)
        labels = {"xlabel": "z of the slice (mm), feet to head", "ylabel": "lesion area (cm²)"}
        png = curve({"lesions": (positions[used], lesion_cm2[used])}, **labels, colours=[LESION])
        pictures.append((png, "Area of the lesions in every slice of the lungs", 520))

    case.concerns += doubt_maps(case.record["volumes"], lung_cm2, lesion_cm2, z_mm, outside)
    if classical is not None:  # in place of what the record tells of the same
        case.concerns = [concern for concern in case.concerns if concern.tag != DIFFER]
        case.concerns.append(doubt_lungs(lung, classical, z_mm * y_mm * x_mm / 1000))
    size = f"{rows} × {columns} pixels of {y_mm:.2f} × {x_mm:.2f} mm"
    case.facts = f" {slices} slices, {z_mm:.2f} mm apart, {size}."
    case.pictures, case.compared = pictures, classical is not None


def _frame(header: list[str], rows: list[Any]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=header, dtype=object)


def _add_overview(page: Page, maps: Path, cases: Sequence[Case], failures: Mapping[str, str]) -> None:
    """Add what is there and what is not, a table of all cases, how they were made, how to read pictures."""
    ill = sum(case.record["volumes"]["lesion_ml"] > 0 for case in cases)
    page.paragraph(
        f"{len(cases)} {'case' if len(cases) == 1 else 'cases'} in {maps.resolve()}, {ill} with lesions; the "
        "largest share of lesion comes first."
    )
    page._add("research")
    if without := sum(case.failure is not None for case in cases):
        page.warning(f"{without} of {len(cases)} cases could not be shown; their sections say why.")
    for name, why in failures.items():
        page.warning(f"{name} is left out: {why}")
    if names := ", ".join(unfinished(maps, {*failures, *(case.record["case"] for case in cases)})):
        page.warning(f"Left out, as their prediction was not finished: {names}. Give that command again.")
    if cases:
        header = ["case", "lungs ml", "lesions ml", "% of both lungs", "% of right", "% of left", "look at"]
        kinds = ("lung_ml", "lesion_ml", "percent", "right_percent", "left_percent")
        rows = []
        for case in cases:
            tags = ["no pictures"] * (case.failure is not None) + [concern.tag for concern in case.concerns]
            look_at = ", ".join(dict.fromkeys(tags)) or "–"
            rows.append([case.record["case"], *(_number(case, kind) for kind in kinds), look_at])
        page.table(_frame(header, rows), anchors=[f"case-{number}" for number in range(1, len(rows) + 1)])
        page.heading("How the maps were made")
        made = "models, each with the probability above which a voxel is healthy, from which HU on"
        header = [made, "region growing", "lungs", "version", "cases"]
        ways = Counter(_made(case.record) for case in cases)
        page.table(_frame(header, [[*how, count] for how, count in ways.most_common()]))
    if any(case.pictures for case in cases):
        page.heading("How to read the pictures")
        page._add("reading", black=LUNG_WINDOW[0], white=LUNG_WINDOW[1])
    if any(case.compared for case in cases):
        page._add("dashes", tag=DIFFER)


def _add_case(page: Page, case: Case, anchor: str) -> None:
    record = case.record
    page.heading(record["case"], anchor=anchor)
    for concern in case.concerns:
        page.warning(concern.text)
    if case.failure is not None:
        page.warning(f"No pictures: {case.failure}")
    rows = []
    for name, side in (("both", ""), ("right", "right_"), ("left", "left_")):
        rows.append([name, *(_number(case, side + kind) for kind in ("lung_ml", "lesion_ml", "percent"))])
    page.table(_frame(["lungs", "ml", "lesions ml", "lesions %"], rows))
    series = f", series {record['series']}" if record["series"] else ""
    page.paragraph(f"CT: {record['ct']}{series}.{case.facts} Lungs: {lungs_told(record)}.", note=True)
    for picture, caption, width in case.pictures:
        page.picture(picture, caption, width=width)


def _number(case: Case, kind: str) -> str:
    value = case.record["volumes"].get(kind)
    return "–" if value is None else f"{value:.{1 if kind.endswith('lung_ml') else 2}f}"


def _made(record: Record) -> tuple[str, str, str, str]:
    """Tell how maps were made: models, region growing, lungs, version."""
    models = []
    for model in record["models"]:
        tissue = "" if model.get("threshold_hu") is None else f" from {model['threshold_hu']:g} HU"
        models.append(f"{model.get('name', '?')} ({model.get('probability', '?')}{tissue})")
    growth = "–"
    with suppress(TypeError, LookupError):  # another version's
        steps = record["settings"]["postprocess"]["growth_iterations"]
        growth = "none" if steps == 0 else f"{steps} steps" if steps > 0 else "until nothing changes"
    lungs = lungs_told(record, path=False)
    return ", ".join(models) or "–", growth, lungs, str(record.get("version", "–"))


def lungs_told(record: Mapping[str, Any], *, path: bool = True) -> str:
    """Tell where lungs are from, by ``lungs_from`` and ``lungs_sha256``; `path` names the file of a mask."""
    source = str(record["lungs_from"])
    methods = {"network": "the lung network", "classical": "thresholds", "lungmask": "lungmask"}
    if source in methods or record.get("lungs_sha256"):
        return f"segmented by {methods.get(source, f'the lung network {source}')}"
    return f"mask file {source}" if path else "mask files"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all went well, 1 when a case could not be shown, 2 for a wrong call."""

    def body() -> int:
        config = tyro.cli(ReportConfig, args=argv, prog="python -m normnet.report")
        with plainly():
            result = report_maps(config, progress_bar=True)
        for case, why in result.failures.items():
            print(f"normnet.report: {printable(f'{case}: {why}')}", file=sys.stderr)
        print(f"{len(result.cases)} cases, in {name_of(result.path)}")
        return 1 if result.failures else 0

    return run("normnet.report", body)


if __name__ == "__main__":
    sys.exit(main())
