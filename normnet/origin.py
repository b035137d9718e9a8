"""How a lesion map was made, read from what the prediction wrote beside it.

Scores at a threshold that was fixed beforehand, at one calibrated without annotated data and at one searched
on the test set are three different things; tables name which. A method is searched and drawn on the voxels
that it judges, which the record tells too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lesionsynth as ls
from lesionsynth.io import case_name
from lesionsynth.strict import check_number, read_json
from lesionsynth.window import HU_RANGE
from normnet.config import PAPER_THRESHOLD_HU

UNKNOWN = "not recorded"
"""Label of maps without a record."""
_LESIONS = "_lesions"


@dataclass(frozen=True)
class Origin:
    """How a lesion map was made.

    Attributes
    ----------
    label : str
        ``fixed at 0.95``, ``calibrated on synthetic pairs: 0.62; T -700 HU``, or `UNKNOWN`.
    threshold_hu : float or None
        T on the CT's own scale: the method judges lung voxels at or above it, as NormNet does. None for the
        whole lung.
    inflation : float
        What HU in the lungs were multiplied with before they were judged; see `normnet.inflation`.
    """

    label: str = UNKNOWN
    threshold_hu: float | None = PAPER_THRESHOLD_HU
    inflation: float = 1.0

    @property
    def tissue(self) -> str:
        """What a label says about T: nothing where it is the paper's, or where there is none."""
        return _tissue([] if self.threshold_hu is None else [round(self.threshold_hu * self.inflation, 3)])

    @property
    def judged(self) -> str:
        """The voxels that the method judges, in words."""
        if self.threshold_hu is None:
            return "lung"
        scaled = "" if self.inflation == 1 else ", at one inflation"
        return f"lung from {round(self.threshold_hu * self.inflation)} HU{scaled}"


def read_origin(prediction: Path) -> Origin:
    """Read ``<case>.json`` beside ``<case>_lesions.nii.gz``.

    Parameters
    ----------
    prediction : Path
        A lesion map of `normnet.predict` or `normnet.baselines`, or any other.

    Returns
    -------
    Origin
        Unknown where there is no record, or one of another file: a label must not be guessed.
    """
    record = _record(prediction)
    try:
        return _baseline(record["baseline"]) if "baseline" in record else _normnet(record)
    except (ValueError, TypeError, LookupError, AttributeError):
        return Origin()


def read_series(prediction: Path) -> str | None:
    """Read the SeriesInstanceUID of the CT that a lesion map was predicted from.

    Parameters
    ----------
    prediction : Path
        As in `read_origin`.

    Returns
    -------
    str or None
        None where no record tells one: the CT was a file, or another program made the map.
    """
    series = _record(prediction).get("series")
    return series if isinstance(series, str) else None


def _record(prediction: Path) -> dict[str, Any]:
    """Read what was written beside a lesion map; nothing where no record is, or one of another file."""
    name = case_name(prediction)
    if not name.endswith(_LESIONS):
        return {}
    try:
        record: dict[str, Any] = read_json(prediction.with_name(f"{name[: -len(_LESIONS)]}.json"))
        return record if record["files"]["lesions"] == prediction.name else {}
    except (OSError, ValueError, TypeError, LookupError):
        return {}


def _normnet(record: dict[str, Any]) -> Origin:
    settings, models = record["settings"], record["models"]
    # records of earlier versions have T among the settings alone
    usual = settings.get("postprocess", {}).get("threshold_hu")
    usual = PAPER_THRESHOLD_HU if usual is None else usual
    judged = [float(model.get("threshold_hu", usual)) for model in models]
    for level in judged:
        ls.threshold(level)  # no T lies beyond the networks' window
    calibrated = [model.get("calibrated", settings["probability"] == "calibrated") for model in models]
    levels = [f"{float(model['probability']):g}" for model in models]
    if all(calibrated):
        label = f"calibrated on synthetic pairs: {', '.join(levels)}"
    elif not any(calibrated):
        label = f"fixed at {', '.join(dict.fromkeys(levels))}"
    else:
        marked = (f"{p} calibrated" if c else f"{p} fixed" for p, c in zip(levels, calibrated, strict=True))
        label = f"thresholds {', '.join(marked)}"
    # what any of the models judges may become a lesion; T is of lungs brought to their inflation
    factor = float(check_number("inflation", record.get("inflation", 1.0), 0.1, 10.0))
    return Origin(f"{label}{_tissue(judged)}", max(min(judged) / factor, HU_RANGE[0]), factor)


def _baseline(entry: Any) -> Origin:
    level = f"anomaly {float(entry['threshold']):.4g}"
    label = f"calibrated on healthy volumes: {level}" if entry["calibrated"] else f"fixed at {level}"
    return Origin(label, threshold_hu=None)


def _tissue(levels: Iterable[float]) -> str:
    # models that judge fainter or denser tissue than the paper's are another method
    return "".join(f"; T {level:g} HU" for level in sorted({*levels} - {PAPER_THRESHOLD_HU}))
