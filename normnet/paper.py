"""Tables II and III as the paper lays them out, and the numbers it prints: Tables II to VI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from lesionsynth.commands import printable
from normnet.metrics import BRIGHT, SCORES, CaseScores, percent

SOURCE = (
    "Yao, Xiao, Liu and Zhou, Label-Free Segmentation of COVID-19 Lesions in Lung CT, IEEE Transactions on "
    "Medical Imaging, 2021"
)
DATA_SETS = ("Coronacases", "Radiopedia")
"""The paper's test sets, in its spelling."""
TABLE_II: Mapping[str, tuple[str, ...]] = {
    "Coronacases": ("90.6", "78.8", "80.2", "87.8"),
    "Radiopedia": ("93.5", "70.7", "87.9", "89.5"),
}
"""Table II, by data set: precision, sensitivity, specificity, AUC in percent."""
TABLE_III: Mapping[str, tuple[str, ...]] = {
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
"""Table III, by method: DSC, PSC and SEN in percent on Coronacases, then on Radiopedia."""
ITERATIONS = (2000, 2500, 3000, 3500, 4000, 4500)
"""Columns of Table IV; the ensemble of every other table has trained for `NOMINAL`."""
NOMINAL = 3500
TABLE_IV: Mapping[str, tuple[float, ...]] = {
    "voting": (67.6, 70.2, 66.9, 68.7, 70.4, 67.4),
    "model_1": (62.1, 68.8, 67.4, 69.6, 68.8, 59.2),
    "model_2": (65.1, 64.5, 66.0, 68.0, 53.5, 66.7),
    "model_3": (66.3, 69.5, 69.1, 70.6, 68.8, 58.4),
    "model_4": (71.1, 69.9, 50.7, 64.6, 66.6, 70.4),
    "model_5": (64.2, 64.0, 66.1, 45.8, 69.8, 70.7),
}
"""Table IV, Dice in percent."""
TABLE_V: Mapping[str, tuple[str, str, str, float]] = {
    "covid_lung": ("✓", "✓", "✓", 68.7),
    "no_shapes": ("×", "✓", "✓", 51.5),
    "no_probability_map": ("✓", "×", "✓", 62.0),
    "no_salt_noise": ("✓", "✓", "×", 25.5),
}
"""Table V by preset of `lesionsynth.presets`: shapes, probability maps, salt noises, Dice in percent."""
TABLE_VI: Mapping[str, float] = {"-700": 55.1, "-600": 67.0, "-500": 68.7, "-400": 64.3, "-300": 61.1}
"""Table VI: T in HU, Dice in percent."""


class Table(NamedTuple):
    """A table of strings, and what its reader must know."""

    title: str
    frame: pd.DataFrame
    note: str = ""

    @classmethod
    def of(cls, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> Table:
        """Make it of rows; names of files that are no text are left as they are."""
        return cls(title, pd.DataFrame(rows, columns=list(header), dtype=object), note)

    def markdown(self) -> str:
        """Write it in Markdown, its title above and its note below."""
        note = f"\n{self.note}\n" if self.note else ""
        return f"**{printable(self.title)}**\n\n{as_text(self.frame, 'pipe')}\n{note}"


def as_text(frame: pd.DataFrame, layout: str = "plain") -> str:
    """Set a table of strings in columns for a terminal, or in Markdown ("pipe"); controls are escaped."""
    bar, lines = "\\|" if layout == "pipe" else "|", [list(frame), *frame.to_numpy().tolist()]
    header, *rows = ([printable(cell).replace("|", bar) for cell in line] for line in lines)
    align = ("left", *["right"] * (len(header) - 1))
    shown = pd.DataFrame(rows, columns=header)
    return str(shown.to_markdown(index=False, tablefmt=layout, disable_numparse=True, colalign=align))


def printed() -> list[Table]:
    """Lay out the paper's own Tables III and II."""
    note = f"As printed in {SOURCE}. Other patients, models and training data: no comparison with the above."
    scores = ("Methods (paper)", *(f"{data} {name}" for data in DATA_SETS for name in SCORES.values()))
    bright = ("Dataset (paper)", *BRIGHT.values())
    return [
        Table.of(title, header, [(name, *row) for name, row in rows.items()], note)
        for title, header, rows in (
            ("The paper's Table III, on its data sets", scores, TABLE_III),
            ("The paper's Table II, on its data sets (%)", bright, TABLE_II),
        )
    ]


class Method(NamedTuple):
    """What is known of a method: labels of all its cases, their scores, and mean and SD of these."""

    threshold: str
    bright_threshold: str
    """Where the thresholds behind Tables III and II come from."""
    judges: str
    """The voxels that it judges."""
    summary: dict[str, dict[str, float]]
    cases: dict[str, CaseScores]
    oracle_searched_on_this_test_set: dict[str, Any] | None
    """The best threshold, and Table III's scores at it: an upper bound, no result."""

    @property
    def patients(self) -> int:
        """Cases that are no controls."""
        return sum(not scores["control"] for scores in self.cases.values())


def table_three(methods: Mapping[str, Method]) -> Table:
    """Lay out Table III: lesions."""
    rows = [[name, *_means(m.summary, SCORES), str(m.patients), m.threshold] for name, m in methods.items()]
    return Table.of(
        "Table III: lesions against the truth, mean±SD over patients (%)",
        ("Methods", *SCORES.values(), "patients", "threshold"),
        rows,
        "SD of the sample (n - 1). Controls, which have next to no lesion, take no part. Thresholds as the "
        "predictions recorded them: fixed, or calibrated without annotated data.",
    )


def table_two(methods: Mapping[str, Method]) -> Table:
    """Lay out Table II: bright voxels."""
    rows = [
        [name, *_means(m.summary, BRIGHT), str(m.patients), m.bright_threshold] for name, m in methods.items()
    ]
    return Table.of(
        "Table II: bright voxels, healthy against lesion, mean±SD over patients (%)",
        ("Methods", *BRIGHT.values(), "patients", "threshold"),
        rows,
        "Lung voxels of at least -500 HU, the paper's T, for every method whatever its own T: methods "
        "compare on the same voxels, and what a method does not judge it does not call healthy. Before "
        "post-processing; healthy is the positive class, so specificity is the share of bright lesion voxels "
        "not called healthy. The AUC, of the mean healthy probability, needs no threshold.",
    )


def oracle_table(methods: Mapping[str, Method]) -> Table:
    """Lay out what no method may be judged by; without a row where nothing was searched."""
    rows = []
    for name, m in methods.items():
        best = m.oracle_searched_on_this_test_set or {}
        if "dsc" in best:
            level = f"{best['threshold']:.2f}"
            rows.append([name, *_means(best, SCORES), str(m.patients), level, m.judges])
    return Table.of(
        "Oracle, NOT a result: thresholds searched on this very test set (%)",
        ("Methods", *SCORES.values(), "patients", "healthy probability", "searched in"),
        rows,
        "One threshold per method, the best mean DSC of 0, 0.01, ... 1, on its mean probability without "
        "post-processing: the search that the paper grants its baselines (IV-C). The most that the bare map "
        "could reach on the voxels that the method judges: from its own T on, or the whole lung. Not to be "
        "set beside Table III.",
    )


def volume_table(method: Method) -> pd.DataFrame:
    """Lay out the scores of a method: a row per case, then mean±SD."""
    names = ("DSC", "PSC", "SEN", "bright PSC", "bright SEN", "bright SPC", "AUC", "lesion ml", "FP ml")
    rows, cases = [], dict[str, Any](method.cases)
    for case, s in cases.items():
        cells = ["–" if s["control"] else percent(s[name]) for name in (*SCORES, *BRIGHT)]
        cells += [f"{s[name]:.1f}" for name in ("lesion_ml", "false_positive_ml")]
        rows.append([f"{case} (control)" if s["control"] else case, *cells])
    rows.append(["mean±SD", *_means(method.summary, (*SCORES, *BRIGHT)), "", ""])
    return pd.DataFrame(rows, columns=["case", *names], dtype=object)


def _means(summary: Mapping[str, Mapping[str, float]], names: Iterable[str]) -> list[str]:
    return [percent(summary[name]["mean"], summary[name]["sd"]) for name in names]
