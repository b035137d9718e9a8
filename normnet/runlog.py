"""The metrics of a run: ``metrics.csv`` and TensorBoard events."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lesionsynth.files import write_atomically
from lesionsynth.strict import name_of, shown
from normnet.sheets import Sheet, read_rows, sheet
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
        "val_recall",
        "calibrated",
    )

    def __init__(self, output: Path, progress: Progress) -> None:
        self._file = output / METRICS
        kept = []
        if progress.iteration and self._file.exists():
            (_, head), *rows = read_rows(self._file) or [(0, [])]
            if set(head) - set(self.FIELDS):
                raise ValueError(f"{name_of(self._file)}: must be the table of a run, got {shown(head)}")
            for number, cells in rows:
                row = dict(zip(head, cells, strict=False))
                last = progress.iteration if row.get("loss") else progress.validated
                if not re.fullmatch("[0-9]{1,10}", row.get("iteration", "")):
                    raise ValueError(
                        f"{name_of(self._file)}, line {number}: iteration must be a number, got "
                        f"{shown(row.get('iteration'))}: move the table away to resume without it"
                    )
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
