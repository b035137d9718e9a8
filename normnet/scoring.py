"""Scores of one method, gathered case after case: what the tables and the report are made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from normnet.draw import VoxelCounts, case_pictures
from normnet.metrics import (
    CONTROL_VOXELS,
    HEALTHY_THRESHOLD,
    CaseScores,
    evaluate_case,
    overlap_scores,
    summarise,
)
from normnet.oracle import oracle_threshold, summary_at, threshold_counts
from normnet.origin import Origin

Array = npt.NDArray[Any]

WITHOUT_GROWING = "w/o growing"
"""What the paper's Table III calls a map before region growing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseVolumes:
    """One case in memory, all (Z, Y, X) on one grid.

    Attributes
    ----------
    case : str
    hu : int16 array
    prediction, truth, lung_mask : bool arrays
    probability : float32 array or None
        Healthy probability.
    spacing : (3,) floats
        mm, (z, y, x).
    healthy : bool array or None
        Voxels that the models' vote calls healthy; where None, what exceeds the threshold.
    core : bool array or None
        Predicted lesions before region growing.
    origin : Origin
        How `prediction` was made.
    notes : tuple of str
        What the reader of the results should know.
    """

    case: str
    hu: Array
    prediction: Array
    truth: Array
    lung_mask: Array
    probability: Array | None
    spacing: tuple[float, float, float]
    healthy: Array | None = None
    core: Array | None = None
    origin: Origin = field(default_factory=Origin)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How cases are scored; see `normnet.evaluate.EvaluateConfig`."""

    healthy_threshold: float = HEALTHY_THRESHOLD
    control_voxels: int = CONTROL_VOXELS
    oracle: bool = False
    pictures: int = 3


@dataclass(kw_only=True, eq=False)
class MethodScores:
    """Scores of one method.

    Attributes
    ----------
    name : str
        As the tables show it.
    rules : Rules
    scores : dict of str to CaseScores
        By case.
    grown_from : dict of str to CaseScores
        The same before region growing, of the cases where that is known.
    thresholds, bright_thresholds : dict of str to str
        By case: where the threshold behind Table III, and that behind Table II, comes from.
    judged : dict of str to str
        By case: the voxels that the method judges, among which the oracle searches.
    pictures : dict of str to list of (slice, PNG)
        By case, worst slices first.
    voxels : VoxelCounts
        Of the patients; controls have no part in it.
    """

    name: str
    rules: Rules = field(default_factory=Rules)
    scores: dict[str, CaseScores] = field(default_factory=dict)
    grown_from: dict[str, CaseScores] = field(default_factory=dict)
    thresholds: dict[str, str] = field(default_factory=dict)
    bright_thresholds: dict[str, str] = field(default_factory=dict)
    judged: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    voxels: VoxelCounts = field(default_factory=VoxelCounts)
    _counts: list[Array] = field(default_factory=list)

    def add(self, v: CaseVolumes) -> None:
        """Score a case; where it fails nothing of it is kept.

        Raises
        ------
        TypeError, ValueError
            As `normnet.metrics.evaluate_case`.
        """
        rules = self.rules
        result = evaluate_case(
            v.prediction,
            v.truth,
            v.lung_mask,
            v.hu,
            v.probability,
            healthy=v.healthy,
            spacing=v.spacing,
            healthy_threshold=rules.healthy_threshold,
            control_voxels=rules.control_voxels,
        )
        result["notes"].extend(v.notes)
        before = None if v.core is None else overlap_scores(v.core, v.truth, v.spacing)
        pictures = (
            case_pictures(v.hu, v.prediction, v.truth, v.lung_mask, count=rules.pictures)
            if rules.pictures
            else []
        )
        self.scores[v.case], self.pictures[v.case] = result, pictures
        self.thresholds[v.case] = v.origin.label
        self.bright_thresholds[v.case] = _bright_threshold(v, rules.healthy_threshold)
        self.judged[v.case] = v.origin.judged
        if before is not None:
            self.grown_from[v.case] = {**result, **before}
        if result["control"]:
            return
        level = v.origin.threshold_hu
        self.voxels.add(v.hu, v.prediction, v.truth, v.lung_mask, v.probability, threshold_hu=level)
        if rules.oracle and v.probability is not None:
            self._counts.append(
                threshold_counts(v.truth, v.lung_mask, v.hu, v.probability, threshold_hu=level)
            )

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Mean, SD and number over patients; see `normnet.metrics.summarise`."""
        return summarise(list(self.scores.values()))

    @property
    def patients(self) -> int:
        """Cases that are no controls."""
        return sum(not s["control"] for s in self.scores.values())

    @property
    def oracle(self) -> dict[str, Any] | None:
        """The best threshold on this test set with its scores, where it was asked for.

        ``threshold`` and ``mean_dsc`` of `normnet.oracle.oracle_threshold`, and ``dsc``, ``psc`` and ``sen``
        as in `summary`.
        """
        if not self.rules.oracle:
            return None
        best = oracle_threshold(self._counts)
        return {**best, **summary_at(self._counts, best["threshold"])} if self._counts else {**best}

    @property
    def threshold(self) -> str:
        """Where the threshold of the lesion maps comes from."""
        return _one_label(self.thresholds)

    @property
    def bright_threshold(self) -> str:
        """Where the threshold behind Table II comes from."""
        return _one_label(self.bright_thresholds)

    @property
    def judges(self) -> str:
        """The voxels that the method judges."""
        return _one_label(self.judged)

    def without_growing(self) -> MethodScores | None:
        """Scores before region growing, where they are there for every case."""
        if not self.scores or self.grown_from.keys() != self.scores.keys():
            return None
        return MethodScores(
            name=f"{self.name} {WITHOUT_GROWING}",
            scores=self.grown_from,
            thresholds=self.thresholds,
            bright_thresholds=self.bright_thresholds,
            judged=self.judged,
        )


def _bright_threshold(v: CaseVolumes, healthy_threshold: float) -> str:
    if v.healthy is not None:
        return f"vote, {v.origin.label}"
    if v.probability is None:
        return "–"
    return f"mean probability, fixed at {healthy_threshold:g}{v.origin.tissue}"


def _one_label(labels: Mapping[str, str]) -> str:
    """One label for all cases; where they differ, each with the number of its cases."""
    count = Counter(labels.values())
    if len(count) < 2:
        return next(iter(count), "–")
    return "DIFFERENT: " + "; ".join(f"{label} (n = {n})" for label, n in count.items())
