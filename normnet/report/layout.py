"""The page about a folder of maps: a table of all cases, how they were made, and a section for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normnet.output import Record
from normnet.report.cases import Finished
from normnet.report.checks import DIFFER
from normnet.report.page import Report
from normnet.report.pictures import LUNG_WINDOW
from normnet.report.section import Section

SIDES = (("both", ""), ("right", "right_"), ("left", "left_"))


def lay_out(title: str, folder: Path, finished: Finished, sections: Sequence[Section]) -> Report:
    """Compose the page.

    Parameters
    ----------
    title : str
        Its heading.
    folder : Path
        Where the maps are.
    finished : Finished
        Its cases.
    sections : sequence of Section
        One for each of ``finished.records``.

    Returns
    -------
    Report
    """
    report = Report(title)
    records = finished.records
    ill = sum(record["volumes"]["lesion_ml"] > 0 for record in records)
    report.paragraph(
        f"{len(records)} {'case' if len(records) == 1 else 'cases'} in {folder.resolve()}, {ill} with "
        "lesions; the largest share of lesion comes first."
    )
    report.paragraph(
        "The maps were made by networks that never saw an annotated lesion. They are for research and no "
        "diagnosis: look at the pictures of a case before you use its numbers.",
        note=True,
    )
    _add_problems(report, finished, sections)
    if records:
        _add_table(report, records, sections)
        report.heading("How the maps were made")
        report.table(*_settings(records))
    if any(section.pictures for section in sections):
        report.heading("How to read the pictures")
        report.paragraph(
            f"On the left the CT, {LUNG_WINDOW[0]:.0f} HU black and {LUNG_WINDOW[1]:.0f} HU white; on "
            "the right the same with lesions in orange and a blue line around the lungs that were searched: "
            "nothing is found outside it. The patient's right is on the left of the picture. Slices are "
            "numbered from 0 at the feet; z is the position that DICOM viewers show as slice location."
        )
    if any(section.compared for section in sections):
        report.paragraph(
            f"Where thresholds find other lungs than the lung network ({DIFFER}), theirs have a dashed line "
            "in yellow and black, to compare: what was searched lies within the blue one. Where both lines "
            "are one, it is blue."
        )
    for number, (record, section) in enumerate(zip(records, sections, strict=True), start=1):
        _add_case(report, f"case-{number}", record, section)
    return report


def _add_problems(report: Report, finished: Finished, sections: Sequence[Section]) -> None:
    if without := sum(section.failure is not None for section in sections):
        report.warning(f"{without} of {len(sections)} cases could not be shown; their sections say why.")
    for case, reason in finished.failures.items():
        report.warning(f"{case} is left out: {reason}")
    if finished.unfinished:
        names = ", ".join(finished.unfinished)
        report.warning(f"Left out, as their prediction was not finished: {names}. Give that command again.")


def _add_table(report: Report, records: Sequence[Record], sections: Sequence[Section]) -> None:
    header = ["case", "lungs ml", "lesions ml", "% of both lungs", "% of right", "% of left", "look at"]
    rows = []
    for record, section in zip(records, sections, strict=True):
        volumes = record["volumes"]
        tags = ["no pictures"] if section.failure else []
        tags.extend(dict.fromkeys(concern.tag for concern in section.concerns))
        shares = [_number(volumes.get(f"{side}percent"), 2) for _, side in SIDES]
        sizes = [_number(volumes["lung_ml"], 1), _number(volumes["lesion_ml"], 2)]
        rows.append([record["case"], *sizes, *shares, ", ".join(tags) or "–"])
    report.table(header, rows, anchors=[f"case-{number}" for number in range(1, len(rows) + 1)])


def _add_case(report: Report, anchor: str, record: Record, section: Section) -> None:
    report.heading(record["case"], anchor=anchor)
    for concern in section.concerns:
        report.warning(concern.text)
    if section.failure is not None:
        report.warning(f"No pictures: {section.failure}")
    kinds = (("lung_ml", 1), ("lesion_ml", 2), ("percent", 2))
    rows = [
        [name, *(_number(record["volumes"].get(f"{side}{kind}"), digits) for kind, digits in kinds)]
        for name, side in SIDES
    ]
    report.table(["lungs", "ml", "lesions ml", "lesions %"], rows)
    series = f", series {record['series']}" if record["series"] else ""
    facts = f" {section.facts}." if section.facts else ""
    report.paragraph(f"CT: {record['ct']}{series}.{facts} Lungs: {lungs_told(record)}.", note=True)
    for caption, picture in section.pictures:
        report.picture(picture, caption, width=1000)
    for caption, chart in section.charts:
        report.picture(chart, caption, width=520)


def _settings(records: Sequence[Record]) -> tuple[list[str], list[list[object]]]:
    """Header and rows: a row for the cases that were made in the same way."""
    kinds = Counter(
        (_models(record), _growth(record), lungs_told(record, path=False), str(record.get("version", "–")))
        for record in records
    )
    header = ["models, each with the probability above which a voxel is healthy, from which HU on"]
    header += ["region growing", "lungs", "version", "cases"]
    return header, [[*kind, count] for kind, count in kinds.most_common()]


def _models(record: Record) -> str:
    models = record["models"]
    known: list[Mapping[str, Any]] = [m for m in models if isinstance(m, dict)] if models else []
    return ", ".join(f"{m.get('name', '?')} ({_level(m)})" for m in known) or "–"


def _level(model: Mapping[str, Any]) -> str:
    """Tell what a model is asked about and when it calls that healthy."""
    tissue = model.get("threshold_hu")
    return f"{model.get('probability', '?')}{'' if tissue is None else f' from {tissue:g} HU'}"


def _growth(record: Record) -> str:
    try:
        steps = record["settings"]["postprocess"]["growth_iterations"]
        return {0: "none"}.get(steps, f"{steps} steps" if steps > 0 else "until nothing changes")
    except (TypeError, LookupError):  # another version's
        return "–"


def lungs_told(record: Mapping[str, Any], *, path: bool = True) -> str:
    """Tell where lungs are from.

    Parameters
    ----------
    record : mapping
        With ``lungs_from`` and ``lungs_sha256``; see `normnet.prepare.case.method_record`.
    path : bool
        Name the file of a mask.

    Returns
    -------
    str
        "segmented by ..." or "mask file ...".
    """
    source = str(record["lungs_from"])
    methods = {
        "network": "segmented by the lung network",
        "classical": "segmented by thresholds",
        "lungmask": "segmented by lungmask",
    }
    if source not in methods and record.get("lungs_sha256"):
        return f"segmented by the lung network {source}"
    return methods.get(source) or (f"mask file {source}" if path else "mask files")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
