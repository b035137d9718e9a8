"""The figures of PAPER.md IV-B and its Tables II and III, for one volume and over volumes.

Table III compares the final segmentation with the truth over the whole volume; lesions are the positive
class. Table II asks how well the network alone tells healthy from diseased among the bright voxels of the
lung. There the *healthy* voxels are the positive class: "the high specificity ensures that most of the
lesions are treated as anomaly", so a true negative is a lesion voxel that is not called healthy. The area
under the ROC curve is the same whichever class is called positive.

The *oracle* is the threshold that would have been best on the very set it is scored on, as the paper searches
for its baselines (PAPER.md IV-C): an upper bound, never a result.
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
SCORES = {"dsc": "DSC (%)", "psc": "PSC (%)", "sen": "SEN (%)"}
BRIGHT = {
    "bright_precision": "Precision", "bright_sensitivity": "Sensitivity",
    "bright_specificity": "Specificity", "bright_auc": "AUC",
}  # fmt: skip
"""Of Tables III and II: scores, and what the paper calls them."""


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
    """Area under the ROC curve of two classes' scores: NaN where one is empty, ValueError for NaN in one."""
    for name, scores in (("positive", positive), ("negative", negative)):
        if np.isnan(scores).any():
            raise ValueError(f"{name} scores must be numbers, got NaN")
    if not positive.size or not negative.size:
        return float("nan")
    from sklearn.metrics import roc_auc_score

    scores = np.concatenate([positive, negative], axis=None)
    return float(roc_auc_score(np.arange(scores.size) < positive.size, scores))


def bright_voxels(hu: Array, lung_mask: Array, threshold_hu: float | None = PAPER_THRESHOLD_HU) -> Array:
    """Lung voxels at or above T, the ones that a network judges (PAPER.md III-B).

    Of `hu`, (Z, Y, X) in HU, and a bool `lung_mask` of its shape. T lies in [-800, 100] HU (else ValueError);
    None stands for all lung voxels, which the methods that NormNet is compared with judge.
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
    """Compare two lesion maps, (Z, Y, X) bool, over the whole volume (Table III).

    Else TypeError; ValueError where shapes differ, or `spacing`, (z, y, x) in mm, is not three lengths > 0.
    """
    _check({"prediction": prediction, "lesion_truth": lesion_truth})
    if len(spacing) != 3 or not min(spacing) > 0:
        raise ValueError(f"spacing must be three lengths > 0 in mm (z, y, x), got {tuple(spacing)}")
    tp = _count(prediction & lesion_truth)
    fp, fn = _count(prediction) - tp, _count(lesion_truth) - tp
    return _overlap(tp, fp, fn, float(np.prod(spacing)) / 1000)


def _count(voxels: Array) -> int:
    return int(np.count_nonzero(voxels))


def _overlap(tp: int, fp: int, fn: int, ml: float) -> OverlapScores:
    """Score counted voxels of `ml` each."""
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
    """Compare a prediction with the truth; warn of a truth that looks like lungs, or another scan's.

    Parameters
    ----------
    prediction, lesion_truth, lung_mask : (Z, Y, X) bool arrays
        Lesions, which count in Table III outside the lungs, too; lungs including lesions.
    hu : (Z, Y, X) array
        Bright are voxels of `lung_mask` from -500 HU on (tau = 1/3), whatever T the network was trained for:
        methods compare on the same voxels.
    healthy_probability : (Z, Y, X) float array, optional
        Of the network; 0 where it says nothing. Without it the AUC is NaN.
    healthy : (Z, Y, X) bool array, optional
        What the vote called healthy; where omitted, ``healthy_probability > healthy_threshold``, in [0, 1].
    spacing : (3,) floats
        (z, y, x) in mm.
    control_voxels : int
        A truth with fewer lesion voxels is a control, which `summarise` keeps out of its means.

    Raises
    ------
    TypeError, ValueError
        A mask is not bool; shapes differ, the lung mask is empty, a probability is NaN or outside [0, 1], or
        a setting is out of range.
    """
    masks = {"prediction": prediction, "lesion_truth": lesion_truth, "lung_mask": lung_mask}
    _check({**masks, "healthy": healthy}, {"hu": hu, "healthy_probability": healthy_probability})
    if not lung_mask.any():
        raise ValueError("lung_mask must have at least one voxel, got an empty mask")
    if healthy_probability is not None:
        low, high = healthy_probability.min(), healthy_probability.max()  # NaN wins both
        if not (low >= 0 and high <= 1):
            raise ValueError(f"healthy_probability must lie in [0, 1], got {low:g} to {high:g}")
    if not 0 <= healthy_threshold <= 1:
        raise ValueError(f"healthy_threshold must lie in [0, 1], got {healthy_threshold}")
    overlap = overlap_scores(prediction, lesion_truth, spacing)
    control = overlap["tp"] + overlap["fn"] < control_voxels
    if not control and (doubt := _doubt(lesion_truth, lung_mask)):
        warnings.warn(doubt, stacklevel=2)
    bright = bright_voxels(hu, lung_mask)
    well, lesion = bright & ~lesion_truth, bright & lesion_truth
    n_well, n_lesion = _count(well), _count(lesion)
    called = healthy
    if called is None and healthy_probability is not None:
        called = healthy_probability > healthy_threshold
    # of the bright voxels called healthy those that are, and those that are lesion
    tp, fp = (0, 0) if called is None else (_count(called & well), _count(called & lesion))
    nan, probability = float("nan"), healthy_probability
    notes = {
        "no lesion in the truth: SEN undefined": not overlap["tp"] + overlap["fn"],
        "nothing predicted: PSC undefined": not overlap["tp"] + overlap["fp"],
        "no bright lesion voxel: specificity and AUC undefined": not n_lesion,
        "no bright healthy voxel: sensitivity and AUC undefined": not n_well,
        "no healthy probability: Table II not computed": called is None,
        "no bright voxel called healthy: bright precision undefined": called is not None and not tp + fp,
    }
    return {
        **overlap,
        "control": control,
        "bright_healthy_voxels": n_well,
        "bright_lesion_voxels": n_lesion,
        "bright_precision": _ratio(tp, tp + fp),
        "bright_sensitivity": nan if called is None else _ratio(tp, n_well),
        "bright_specificity": nan if called is None else _ratio(n_lesion - fp, n_lesion),
        "bright_auc": nan if probability is None else roc_auc(probability[well], probability[lesion]),
        "notes": [note for note, holds in notes.items() if holds],
    }


def _doubt(truth: Array, lung_mask: Array) -> str:
    """Say what a truth looks like that is none of these lungs' lesions."""
    inside, lesion, lung = _count(truth & lung_mask), _count(truth), _count(lung_mask)
    if inside > ALL_LUNGS * lung:
        return f"the truth covers {100 * inside / lung:.0f} % of the lungs: a lung mask?"
    if lesion > lung:
        return f"the truth has {100 * lesion / lung:.0f} % of the lungs' volume: a mask of something else?"
    if inside < FEW_INSIDE * lesion:
        share = f"{100 * inside / lesion:.0f} %"
        return f"only {share} of the truth lies in the lungs: another scan's, or lungs without lesions?"
    return ""


def _check(masks: Mapping[str, Array | None], others: Mapping[str, Array | None] | None = None) -> None:
    """Refuse what is no array of the first one's shape, and masks that are not bool."""
    shape: tuple[int, ...] = ()
    for name, volume in {**masks, **(others or {})}.items():
        if volume is None:
            continue
        if not isinstance(volume, np.ndarray):
            raise TypeError(f"{name} must be a NumPy array, got {type(volume).__name__}")
        if volume.ndim != 3:
            raise ValueError(f"{name} must be (z, y, x), got shape {volume.shape}")
        shape = shape or volume.shape
        if volume.shape != shape:
            raise ValueError(f"{name} must have the shape of prediction, {shape}, got {volume.shape}")
        if name in masks and volume.dtype != np.bool_:
            raise TypeError(f"{name} must be a bool array, got {volume.dtype}")


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def summarise(cases: Sequence[CaseScores]) -> dict[str, dict[str, float]]:
    """`mean_and_sd` of each score over volumes, as in Tables II and III; controls do not count."""
    patients: list[Mapping[str, Any]] = [case for case in cases if not case["control"]]
    return {name: mean_and_sd([case[name] for case in patients]) for name in (*SCORES, *BRIGHT)}


def mean_and_sd(values: Sequence[float] | Array) -> dict[str, float]:
    """``mean``, ``sd`` (of the sample, n - 1; NaN for fewer than two) and ``n`` of what is not NaN."""
    import pandas as pd  # here: a page without scores is written without it

    known = pd.Series(values, dtype=np.float64)
    return {"mean": float(known.mean()), "sd": float(known.std()), "n": int(known.count())}


def percent(mean: float, sd: float | None = None) -> str:
    """Write a fraction as the paper's tables do: ``68.7``, ``68.7±15.8`` with a deviation, ``–`` for NaN."""
    if np.isnan(mean):
        return "–"
    return f"{100 * mean:.1f}" + ("" if sd is None or np.isnan(sd) else f"±{100 * sd:.1f}")


def threshold_counts(
    lesion_truth: Array,
    lung_mask: Array,
    hu: Array,
    healthy_probability: Array,
    *,
    threshold_hu: float | None = PAPER_THRESHOLD_HU,
) -> Array:
    """Tell what each threshold of the healthy probability would give, without post-processing.

    Volumes as in `evaluate_case`. Lesions are found in `bright_voxels` of `threshold_hu` alone: what a
    NormNet of that T judges, or the whole lung. Returns a (101, 3) int64 array: tp, fp and fn of "lesion
    where the probability is at most t", for t = 0, 0.01, ... 1.
    """
    judged = bright_voxels(hu, lung_mask, threshold_hu)
    thresholds = (np.arange(101) / 100).astype(healthy_probability.dtype)
    # a voxel is a lesion from the first t that reaches its probability
    first = np.searchsorted(thresholds, healthy_probability[judged], "left")
    truth = lesion_truth[judged]
    tp = np.cumsum(np.bincount(first[truth], minlength=101))
    fp = np.cumsum(np.bincount(first[~truth], minlength=101))
    return np.stack([tp, fp, np.count_nonzero(lesion_truth) - tp], axis=1)


def oracle_threshold(counts: Sequence[Array]) -> dict[str, Any]:
    """Find the best ``threshold``, its ``mean_dsc`` and `summary_at` it.

    Of `threshold_counts` of all but the controls; NaN, and no summary, where there are none.
    """
    if not counts:
        return {"threshold": float("nan"), "mean_dsc": float("nan")}
    dsc = np.mean([2 * c[:, 0] / np.maximum(2 * c[:, 0] + c[:, 1] + c[:, 2], 1) for c in counts], axis=0)
    best = int(dsc.argmax())
    return {"threshold": best / 100, "mean_dsc": float(dsc[best]), **summary_at(counts, best / 100)}


def summary_at(counts: Sequence[Array], threshold: float) -> dict[str, dict[str, float]]:
    """Table III's `SCORES` at one of the thresholds of `threshold_counts`, each as in `summarise`."""
    counted = [c[round(100 * threshold)].tolist() for c in counts]
    cases: Any = [_overlap(tp, fp, fn, 1.0) for tp, fp, fn in counted]
    return {name: mean_and_sd([case[name] for case in cases]) for name in SCORES}
