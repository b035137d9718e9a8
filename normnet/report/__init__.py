"""Reports: one HTML page with pictures inside, that opens offline.

``python -m normnet.report MAPS`` shows what `normnet.predict` wrote; `report_maps` is the same in Python.
"""

from normnet.report.maps import ReportConfig, ReportResult, report_maps
from normnet.report.page import Report, percent
from normnet.report.pictures import (
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    LUNG_WINDOW,
    TRUE_POSITIVE,
    case_pictures,
    curve,
    grey,
    histogram,
    lung_box,
    overlay,
    png,
    side_by_side,
    worst_slices,
)

__all__ = [
    "FALSE_NEGATIVE",
    "FALSE_POSITIVE",
    "LUNG_WINDOW",
    "TRUE_POSITIVE",
    "Report",
    "ReportConfig",
    "ReportResult",
    "case_pictures",
    "curve",
    "grey",
    "histogram",
    "lung_box",
    "overlay",
    "percent",
    "png",
    "report_maps",
    "side_by_side",
    "worst_slices",
]
