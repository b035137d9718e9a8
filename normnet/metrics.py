"""The figures of PAPER.md IV-B and its Tables II and III, for one volume and over volumes.

Table III compares the final segmentation with the truth over the whole volume; lesions are the positive
class. Table II asks how well the network alone tells healthy from diseased among the bright voxels of the
lung. There the *healthy* voxels are the positive class: the paper says that at a threshold of 0.95 "the high
specificity ensures that most of the lesions are treated as anomaly", so a true negative is a lesion voxel
that is not called healthy. Precision is then the share of truly healthy voxels among those called healthy;
sensitivity the share of healthy voxels that were called so. The area under the ROC curve is the same
whichever class is called positive.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

import lesionsynth as ls
from normnet.config import PAPER_THRESHOLD_HU

Array = npt.NDArray[Any]

HEALTHY_THRESHOLD = 0.95
"""A voxel is called healthy where its probability exceeds this (PAPER.md IV-B)."""
CONTROL_VOXELS = 100
"""Fewer lesion voxels make a lesion-free control: the paper leaves Radiopaedia 6 ("about 70") out."""
ALL_LUNGS, FEW_INSIDE = 0.9, 0.5
"""A truth that covers more of the lungs than the one, or lies in them with less than the other, is doubted:
lungs that are lesions all through are rare, and lesions lie in lungs."""

SCORES = ("dsc", "psc", "sen")
"""Table III."""
BRIGHT = ("bright_precision", "bright_sensitivity", "bright_specificity", "bright_auc")
"""Table II."""


class OverlapScores(TypedDict):
    """What `overlap_scores` returns; fractions are NaN where undefined."""

    tp: int
    fp: int
    fn: int
    dsc: float
    psc: float
    sen: float
    lesion_ml: float
    predicted_ml: float
    false_positive_ml: float


class CaseScores(OverlapScores):
    """What `evaluate_case` returns; scores are fractions, NaN where undefined (`notes` say why)."""

    control: bool
    bright_healthy_voxels: int
    bright_lesion_voxels: int
    bright_precision: float
    bright_sensitivity: float
    bright_specificity: float
    bright_auc: float
    notes: list[str]


def roc_auc(positive: Array, negative: Array) -> float:
    r"""Area under the ROC curve, exactly.

    Parameters
    ----------
    positive, negative : 1-D arrays
        Scores of the two classes; higher means more like the positive class.

    Returns
    -------
    float
        :math:`P(p > n) + P(p = n) / 2` over all pairs (Mann-Whitney); NaN where a class is empty.

    Raises
    ------
    ValueError
        A score is NaN.

    Notes
    -----
    Counts are integers, so the result does not depend on the order of the voxels; O(n log n).
    """
    positive, negative = np.ravel(positive), np.ravel(negative)
    for name, scores in (("positive", positive), ("negative", negative)):
        if scores.dtype.kind == "f" and np.isnan(scores).any():
            raise ValueError(f"{name} scores must be numbers, got NaN")
    if not positive.size or not negative.size:
        return float("nan")
    ordered = np.sort(negative)
    # sorted queries walk through memory in order
    queries = np.sort(positive)
    below = int(np.searchsorted(ordered, queries, "left").sum(dtype=np.int64))
    upto = int(np.searchsorted(ordered, queries, "right").sum(dtype=np.int64))
    return (below + upto) / (2 * positive.size * negative.size)


def bright_voxels(hu: Array, lung_mask: Array, threshold_hu: float | None = PAPER_THRESHOLD_HU) -> Array:
    """Lung voxels at or above T, the ones that a network judges (PAPER.md III-B).

    Parameters
    ----------
    hu : (Z, Y, X) array
        Hounsfield units.
    lung_mask : (Z, Y, X) bool array
    threshold_hu : float or None
        T in HU, in [-800, 100]; the paper's -500 HU (tau = 1/3) where omitted. None for all lung voxels,
        which the methods that NormNet is compared with judge.

    Returns
    -------
    (Z, Y, X) bool array

    Raises
    ------
    ValueError
        T is out of range.
    """
    if threshold_hu is None:
        return lung_mask
    bright = np.zeros(lung_mask.shape, np.bool_)
    # the window makes floats: of the lungs alone they are a fifth of the volume's
    bright[lung_mask] = ls.window_hu(hu[lung_mask]) >= np.float32(ls.threshold(threshold_hu))
    return bright


def overlap_scores(
    prediction: Array, lesion_truth: Array, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> OverlapScores:
    """Compare two lesion maps (Table III), over the whole volume.

    Parameters
    ----------
    prediction, lesion_truth : (Z, Y, X) bool arrays
    spacing : (3,) floats
        Voxel size (z, y, x) in mm.

    Returns
    -------
    OverlapScores

    Raises
    ------
    TypeError
        A map is not bool.
    ValueError
        Shapes differ, or `spacing` is not three lengths > 0.
    """
    _check_inputs({"prediction": prediction, "lesion_truth": lesion_truth})
    _check_masks({"prediction": prediction, "lesion_truth": lesion_truth})
    if len(spacing) != 3 or not min(spacing) > 0:
        raise ValueError(f"spacing must be three lengths > 0 in mm (z, y, x), got {tuple(spacing)}")
    tp = int(np.count_nonzero(prediction & lesion_truth))
    fp = int(np.count_nonzero(prediction)) - tp
    fn = int(np.count_nonzero(lesion_truth)) - tp
    ml = float(np.prod(spacing)) / 1000
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "dsc": _ratio(2 * tp, 2 * tp + fp + fn),
        "psc": _ratio(tp, tp + fp),
        "sen": _ratio(tp, tp + fn),
        "lesion_ml": (tp + fn) * ml,
        "predicted_ml": (tp + fp) * ml,
        "false_positive_ml": fp * ml,
    }


def evaluate_case(
    prediction: Array,
    lesion_truth: Array,
    lung_mask: Array,
    hu: Array,
    healthy_probability: Array | None = None,
    *,
    healthy: Array | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    healthy_threshold: float = HEALTHY_THRESHOLD,
    control_voxels: int = CONTROL_VOXELS,
) -> CaseScores:
    """Compare a prediction with the truth.

    Parameters
    ----------
    prediction : (Z, Y, X) bool array
        Final lesion map.
    lesion_truth, lung_mask : (Z, Y, X) bool arrays
        Annotated lesions; lungs including lesions. Lesions outside `lung_mask` count in Table III.
    hu : (Z, Y, X) array
        Hounsfield units; bright voxels are those of `lung_mask` at or above -500 HU (tau = 1/3), whatever T
        the network was trained for: methods compare on the same voxels.
    healthy_probability : (Z, Y, X) float array, optional
        The network's healthy probability; 0 where it says nothing. Without it Table II is NaN.
    healthy : (Z, Y, X) bool array, optional
        Voxels that the vote called healthy; where omitted, ``healthy_probability > healthy_threshold``.
    spacing : (3,) floats
        Voxel size (z, y, x) in mm.
    healthy_threshold : float
        In [0, 1].
    control_voxels : int
        A truth with fewer lesion voxels is a control, which `summarise` keeps out of its means.

    Returns
    -------
    CaseScores

    Raises
    ------
    TypeError
        A mask is not bool.
    ValueError
        Shapes differ, the lung mask is empty, a probability is NaN or outside [0, 1], or a setting is out of
        range.

    Warns
    -----
    UserWarning
        The truth of a case that is no control looks like a mask of the lungs, or of another scan.
    """
    volumes = {
        "prediction": prediction,
        "lesion_truth": lesion_truth,
        "lung_mask": lung_mask,
        "healthy": healthy,
    }
    _check_inputs({**volumes, "hu": hu, "healthy_probability": healthy_probability})
    _check_masks(volumes)
    if not lung_mask.any():
        raise ValueError("lung_mask must have at least one voxel, got an empty mask")
    if not 0 <= healthy_threshold <= 1:
        raise ValueError(f"healthy_threshold must lie in [0, 1], got {healthy_threshold}")
    overlap = overlap_scores(prediction, lesion_truth, spacing)
    tp, fp, fn = overlap["tp"], overlap["fp"], overlap["fn"]
    if tp + fn >= control_voxels and (doubt := _doubt(lesion_truth, lung_mask)):
        warnings.warn(doubt, stacklevel=2)
    notes: list[str] = []
    if tp + fn == 0:
        notes.append("no lesion in the truth: SEN undefined")
    if tp + fp == 0:
        notes.append("nothing predicted: PSC undefined")
    bright = bright_voxels(hu, lung_mask)
    lesion, well = bright & lesion_truth, bright & ~lesion_truth
    scores = _bright_scores(lesion, well, healthy_probability, healthy, healthy_threshold, notes)
    return {
        **overlap,
        "control": tp + fn < control_voxels,
        "bright_healthy_voxels": int(np.count_nonzero(well)),
        "bright_lesion_voxels": int(np.count_nonzero(lesion)),
        "bright_precision": scores[0],
        "bright_sensitivity": scores[1],
        "bright_specificity": scores[2],
        "bright_auc": scores[3],
        "notes": notes,
    }


def summarise(cases: Sequence[CaseScores]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over volumes, as in Tables II and III.

    Parameters
    ----------
    cases : sequence of CaseScores
        Controls do not count; a score that is NaN in one volume leaves that volume out of this score.

    Returns
    -------
    dict
        For each score ``mean``, ``sd`` (of the sample, n - 1; NaN for fewer than two volumes) and ``n``.
    """
    patients: list[Mapping[str, Any]] = [case for case in cases if not case["control"]]
    summary: dict[str, dict[str, float]] = {}
    for name in (*SCORES, *BRIGHT):
        summary[name] = mean_and_sd(np.array([case[name] for case in patients], np.float64))
    return summary


def mean_and_sd(values: Array) -> dict[str, float]:
    """Return ``mean``, ``sd`` (n - 1) and ``n`` of a score over the volumes where it is not NaN."""
    values = values[~np.isnan(values)]
    return {
        "mean": float(values.mean()) if values.size else float("nan"),
        "sd": float(values.std(ddof=1)) if values.size > 1 else float("nan"),
        "n": int(values.size),
    }


def percent(mean: float, sd: float | None = None) -> str:
    """Write a fraction as the paper's tables do: ``68.7``, ``68.7±15.8`` with a deviation, ``–`` for NaN."""
    if np.isnan(mean):
        return "–"
    return f"{100 * mean:.1f}" + ("" if sd is None or np.isnan(sd) else f"±{100 * sd:.1f}")


def _doubt(truth: Array, lung_mask: Array) -> str:
    """Say what a truth looks like that is none of these lungs' lesions."""
    inside, lesion, lung = map(np.count_nonzero, (truth & lung_mask, truth, lung_mask))
    if inside > ALL_LUNGS * lung:
        return f"the truth covers {100 * inside / lung:.0f} % of the lungs: a lung mask?"
    if lesion > lung:
        return f"the truth has {100 * lesion / lung:.0f} % of the lungs' volume: a mask of something else?"
    if inside < FEW_INSIDE * lesion:
        share = f"{100 * inside / lesion:.0f} %"
        return f"only {share} of the truth lies in the lungs: another scan's, or lungs without lesions?"
    return ""


def _bright_scores(
    lesion: Array,
    well: Array,
    probability: Array | None,
    healthy: Array | None,
    threshold: float,
    notes: list[str],
) -> tuple[float, float, float, float]:
    """Table II: precision, sensitivity, specificity (healthy is positive) and AUC."""
    if not lesion.any():
        notes.append("no bright lesion voxel: specificity and AUC undefined")
    if not well.any():
        notes.append("no bright healthy voxel: sensitivity and AUC undefined")
    called = healthy
    if called is None:
        if probability is None:
            notes.append("no healthy probability: Table II not computed")
            nan = float("nan")
            return nan, nan, nan, nan
        called = probability > threshold
    tp, fp = int(np.count_nonzero(called & well)), int(np.count_nonzero(called & lesion))
    if tp + fp == 0:
        notes.append("no bright voxel called healthy: bright precision undefined")
    n_well, n_lesion = int(np.count_nonzero(well)), int(np.count_nonzero(lesion))
    auc = float("nan") if probability is None else roc_auc(probability[well], probability[lesion])
    return _ratio(tp, tp + fp), _ratio(tp, n_well), _ratio(n_lesion - fp, n_lesion), auc


def _check_inputs(volumes: Mapping[str, Array | None]) -> None:
    shape = None
    for name, volume in volumes.items():
        if volume is None:
            continue
        if not isinstance(volume, np.ndarray):
            raise TypeError(f"{name} must be a NumPy array, got {type(volume).__name__}")
        if volume.ndim != 3:
            raise ValueError(f"{name} must be (z, y, x), got shape {volume.shape}")
        shape = volume.shape if shape is None else shape
        if volume.shape != shape:
            raise ValueError(f"{name} must have the shape of prediction, {shape}, got {volume.shape}")
    probability = volumes.get("healthy_probability")
    if probability is not None:
        low, high = float(probability.min()), float(probability.max())  # NaN wins both
        if not (low >= 0 and high <= 1):
            raise ValueError(f"healthy_probability must lie in [0, 1], got {low:g} to {high:g}")


def _check_masks(masks: Mapping[str, Array | None]) -> None:
    for name, mask in masks.items():
        if mask is not None and mask.dtype != np.bool_:
            raise TypeError(f"{name} must be a bool array, got {mask.dtype}")


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
