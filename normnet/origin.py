"""Where a lesion map's threshold comes from, read from what the prediction wrote beside it.

Scores at a threshold that was fixed beforehand, at one calibrated without annotated data and at one searched
on the test set are three different things; tables name which.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesionsynth.io import case_name

UNKNOWN = "not recorded"
"""Label of maps without a record."""
BRIGHT_HU = -500.0
"""The paper's T; records of models with another say so."""
_LESIONS = "_lesions"


@dataclass(frozen=True)
class Origin:
    """How a lesion map was made.

    Attributes
    ----------
    label : str
        ``fixed at 0.95``, ``calibrated on synthetic pairs: 0.62``, or `UNKNOWN`.
    bright_only : bool
        The method judges bright voxels alone, as NormNet does, not the whole lung.
    """

    label: str = UNKNOWN
    bright_only: bool = True


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
    name = case_name(prediction)
    if not name.endswith(_LESIONS):
        return Origin()
    try:
        record = json.loads(prediction.with_name(f"{name[: -len(_LESIONS)]}.json").read_text("utf-8"))
        if record["files"]["lesions"] != prediction.name:
            return Origin()
        return _baseline(record["baseline"]) if "baseline" in record else _normnet(record)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Origin()


def _normnet(record: Any) -> Origin:
    settings, models = record["settings"], record["models"]
    # models that judge fainter or denser tissue than the paper's are another method
    tissue = {float(model.get("threshold_hu", BRIGHT_HU)) for model in models} - {BRIGHT_HU}
    said = "".join(f"; T {level:g} HU" for level in sorted(tissue))
    if settings["probability"] != "calibrated":
        return Origin(f"fixed at {float(settings['probability']):g}{said}")
    levels = ", ".join(f"{float(model['probability']):g}" for model in models)
    return Origin(f"calibrated on synthetic pairs: {levels}{said}")


def _baseline(entry: Any) -> Origin:
    level = f"anomaly {float(entry['threshold']):.4g}"
    label = f"calibrated on healthy volumes: {level}" if entry["calibrated"] else f"fixed at {level}"
    return Origin(label, bright_only=False)
