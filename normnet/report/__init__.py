"""Reports: one HTML page with pictures inside, that opens offline."""

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
    "case_pictures",
    "curve",
    "grey",
    "histogram",
    "lung_box",
    "overlay",
    "percent",
    "png",
    "side_by_side",
    "worst_slices",
]
