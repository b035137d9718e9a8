"""The metrics of a run: ``metrics.csv`` and TensorBoard events."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lesionsynth.files import write_atomically
from normnet.sheets import Sheet, sheet
from normnet.trainer import Progress

METRICS = "metrics.csv"
"""Name of the table in a run folder."""


class RunLog:
    """metrics.csv and TensorBoard; a resumed run drops the rows after its last state and writes them anew."""

    FIELDS = (
        "iteration",
        "seconds",
        "loss",
        "waiting",
        "synthesis",
        "val_loss",
        "val_dice",
        "val_auc",
        "calibrated",
    )

    def __init__(self, output: Path, progress: Progress) -> None:
        self._file = output / METRICS
        kept = []
        if progress.iteration and self._file.exists():
            with self._file.open(newline="") as old:
                for row in csv.DictReader(old):
                    last = progress.iteration if row["loss"] else progress.validated
                    if int(row["iteration"]) <= last:
                        kept.append(row)
        write_atomically(
            self._file, sheet([self.FIELDS, *([row.get(name) for name in self.FIELDS] for row in kept)])
        )
        self._stream = self._file.open("a", newline="")
        self._rows = Sheet(self._stream)
        self._board = SummaryWriter(str(output), purge_step=progress.iteration + 1)

    def step(self, progress: Progress, loss: float) -> None:
        """One line a training step."""
        waiting, synthesis = (t / progress.seconds for t in (progress.waited, progress.synthesised))
        self._row(progress, {"loss": loss, "waiting": waiting, "synthesis": synthesis})

    def scores(self, progress: Progress, scores: Mapping[str, float]) -> None:
        """One line a validation."""
        self._row(progress, scores)

    def flush(self) -> None:
        """Write what is held back: before the state is saved that a killed run resumes from."""
        self._stream.flush()
        self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        self._stream.close()
        self._board.close()

    def _row(self, progress: Progress, values: Mapping[str, float]) -> None:
        shown = {name: f"{value:.5g}" for name, value in values.items()}
        row = {"iteration": progress.iteration, "seconds": f"{progress.seconds:.2f}", **shown}
        self._rows.row(row.get(name) for name in self.FIELDS)
        for name, value in values.items():
            self._board.add_scalar(name, value, progress.iteration)
