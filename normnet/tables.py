"""Tables II and III of PAPER.md, laid out from scores, the paper's own numbers apart; Markdown and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lesionsynth.commands import printable
from normnet.metrics import BRIGHT, SCORES, percent
from normnet.scoring import MethodScores

PAPER = (
    "Yao, Xiao, Liu and Zhou, Label-Free Segmentation of COVID-19 Lesions in Lung CT, IEEE Transactions on "
    "Medical Imaging, 2021"
)
DATA_SETS = ("Coronacases", "Radiopedia")
"""The paper's test sets, in its spelling."""
PAPER_BRIGHT: Mapping[str, tuple[str, ...]] = {
    "Coronacases": ("90.6", "78.8", "80.2", "87.8"),
    "Radiopedia": ("93.5", "70.7", "87.9", "89.5"),
}
"""The paper's Table II: precision, sensitivity, specificity, AUC in percent."""
PAPER_SCORES: Mapping[str, tuple[str, ...]] = {
    "nnU-Net": ("80.1±6.73", "80.2±12.4", "82.3±9.30", "76.7±5.81", "77.1±14.0", "80.5±13.11"),
    "nnU-Net-Unseen": ("77.1±10.2", "81.1±11.0", "75.9±15.9", "73.9±9.45", "66.9±13.4", "85.3±9.85"),
    "AE": ("28.3±15.5", "21.5±15.3", "52.1±11.3", "30.3±17.7", "24.4±19.0", "58.9±6.2"),
    "VAE": ("26.4±14.5", "19.8±14.0", "50.1±9.8", "28.1±17.5", "21.6±17.6", "62.3±5.7"),
    "VAE Spatial": ("27.4±16.5", "21.0±16.4", "49.9±11.9", "30.7±19.8", "24.8±20.7", "59.2±8.0"),
    "VAE Original": ("10.9±8.0", "6.9±6.1", "41.3±8.2", "12.3±10.5", "8.5±8.9", "44.9±4.9"),
    "Context VAE": ("29.7±16.0", "21.8±15.6", "61.0±9.8", "32.3±21.3", "24.3±20.6", "72.2±6.0"),
    "Constrained VAE": ("27.9±14.8", "21.0±14.7", "53.2±10.5", "29.2±17.7", "22.9±18.3", "61.3±5.6"),
    "GMVAE": ("25.7±16.4", "20.2±14.4", "51.0±12.6", "28.6±17.7", "22.3±19.5", "63.3±7.2"),
    "Bayesian VAE": ("27.5±15.0", "20.8±14.7", "50.9±11.4", "29.6±16.8", "23.5±17.6", "58.2±6.8"),
    "KL Grad": ("9.5±8.2", "5.5±5.2", "65.5±19.7", "10.2±14.2", "6.7±10.3", "39.1±20.3"),
    "VAE Restoration": ("12.8±4.5", "16.3±10.1", "12.1±2.5", "9.1±3.7", "16.5±16.0", "8.8±1.6"),
    "f-AnoGAN": ("15.4±12.6", "10.8±10.8", "38.3±13.2", "19.7±17.3", "14.2±14.9", "55.2±8.9"),
    "Proposed w/o growing": ("65.5±17.9", "88.1±5.23", "56.2±21.7", "54.2±17.5", "60.8±21.2", "51.3±16.9"),
    "Proposed": ("68.7±15.8", "85.1±6.97", "62.1±22.8", "59.4±17.4", "60.4±19.7", "61.8±18.4"),
}
"""The paper's Table III: DSC, PSC and SEN in percent on Coronacases, then on Radiopedia."""
SCORE_NAMES = ("DSC (%)", "PSC (%)", "SEN (%)")
BRIGHT_NAMES = ("Precision", "Sensitivity", "Specificity", "AUC")


class Grid(NamedTuple):
    """A table as text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """What its reader must know."""


def with_ungrown(methods: Sequence[MethodScores]) -> list[MethodScores]:
    """All methods, the first one's maps before growing in front of it, as the paper orders its rows."""
    before = methods[0].without_growing()
    return [*([] if before is None else [before]), *methods]


def scores_grid(methods: Sequence[MethodScores]) -> Grid:
    """Lay out Table III: a row per method, mean±SD over patients."""
    rows = [
        [m.name, *_mean_texts(m.summary, SCORES), str(m.patients), m.threshold] for m in with_ungrown(methods)
    ]
    return Grid(
        "Table III: lesions against the truth, mean±SD over patients (%)",
        ["Methods", *SCORE_NAMES, "patients", "threshold"],
        rows,
        "SD of the sample (n - 1). Controls, which have next to no lesion, take no part. Thresholds as "
        "the predictions recorded them: fixed, or calibrated without annotated data.",
    )


def bright_grid(methods: Sequence[MethodScores]) -> Grid:
    """Lay out Table II: a row per method, mean±SD over patients."""
    rows = [[m.name, *_mean_texts(m.summary, BRIGHT), str(m.patients), m.bright_threshold] for m in methods]
    return Grid(
        "Table II: bright voxels, healthy against lesion, mean±SD over patients (%)",
        ["Methods", *BRIGHT_NAMES, "patients", "threshold"],
        rows,
        "Lung voxels of at least -500 HU, the paper's T, for every method whatever its own T: methods "
        "compare on the same voxels, and what a method does not judge it does not call healthy. Before "
        "post-processing; healthy is the positive class, so specificity is the share of bright lesion voxels "
        "not called healthy. The AUC, of the mean healthy probability, needs no threshold.",
    )


def oracle_grid(methods: Sequence[MethodScores]) -> Grid | None:
    """Lay out what the best threshold on this very test set would give; None where it was not searched."""
    rows = []
    for m in methods:
        found = m.oracle
        if found is not None and "dsc" in found:
            level = f"{found['threshold']:.2f}"
            rows.append([m.name, *_mean_texts(found, SCORES), str(m.patients), level, m.judges])
    if not rows:
        return None
    return Grid(
        "Oracle, NOT a result: thresholds searched on this very test set (%)",
        ["Methods", *SCORE_NAMES, "patients", "healthy probability", "searched in"],
        rows,
        "One threshold per method, the best mean DSC of 0, 0.01, ... 1, on its mean probability without "
        "post-processing: the search that the paper grants its baselines (IV-C). The most that the bare map "
        "could reach on the voxels that the method judges: from its own T on, or the whole lung. Not to be "
        "set beside Table III.",
    )


def paper_grids() -> list[Grid]:
    """Lay out the paper's own Tables III and II."""
    source = f"As printed in {PAPER}. Other patients, models and training data: no comparison with the above."
    scores = [f"{data} {name}" for data in DATA_SETS for name in SCORE_NAMES]
    return [
        Grid(
            "The paper's Table III, on its data sets",
            ["Methods (paper)", *scores],
            [[name, *values] for name, values in PAPER_SCORES.items()],
            source,
        ),
        Grid(
            "The paper's Table II, on its data sets (%)",
            ["Dataset (paper)", *BRIGHT_NAMES],
            [[name, *values] for name, values in PAPER_BRIGHT.items()],
            source,
        ),
    ]


def volumes_grid(method: MethodScores) -> Grid:
    """Lay out a method's scores: a row per volume, then mean±SD without controls, in percent."""
    names = ("DSC", "PSC", "SEN", "bright PSC", "bright SEN", "bright SPC", "AUC", "lesion ml", "FP ml")
    rows = []
    for case, s in method.scores.items():
        values: Mapping[str, Any] = s
        shown = [percent(values[name]) for name in (*SCORES, *BRIGHT)]
        if s["control"]:
            shown = ["–"] * len(shown)
        name = f"{case} (control)" if s["control"] else case
        rows.append([name, *shown, f"{s['lesion_ml']:.1f}", f"{s['false_positive_ml']:.1f}"])
    rows.append(["mean±SD", *_mean_texts(method.summary, (*SCORES, *BRIGHT)), "", ""])
    return Grid(f"Per volume: {method.name} (%)", ["case", *names], rows)


def lay_out(methods: Sequence[MethodScores], *, paper: bool = True) -> list[Grid]:
    """Lay out every table, in the order in which they are read.

    Parameters
    ----------
    methods : sequence of MethodScores
        The method that is evaluated, then those it is compared with.
    paper : bool
        Also the paper's own numbers.

    Returns
    -------
    list of Grid
        Table III, Table II, the paper's, the oracle's where there is one, and one per volume and method.
    """
    oracle = oracle_grid(methods)
    return [
        scores_grid(methods),
        bright_grid(methods),
        *(paper_grids() if paper else []),
        *([] if oracle is None else [oracle]),
        *(volumes_grid(m) for m in with_ungrown(methods)),
    ]


def markdown(grid: Grid) -> str:
    """Write a table in Markdown, its title above and its note below."""
    lines = [grid.header, ["---"] * len(grid.header), *grid.rows]
    text = "\n".join(
        "| " + " | ".join(printable(str(c)).replace("|", "\\|") for c in line) + " |" for line in lines
    )
    note = f"\n{grid.note}\n" if grid.note else ""
    return f"**{grid.title}**\n\n{text}\n{note}"


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Set a table in columns for a terminal; what it should not see in a name is escaped."""
    lines = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def _mean_texts(summary: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> list[str]:
    return [percent(summary[name]["mean"], summary[name]["sd"]) for name in names]
