"""Kill -9 at random points of every command that writes: nothing corrupt, everything goes on."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.tally import trial

pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("SimpleITK")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the storm forks, which this system cannot"),
]


JOBS = ("train", "prepare", "predict", "synth", "replay", "preview", "evaluate", "report", "export", "demo")
JOBS += ("ablate", "baselines", "baselines predict")


@pytest.mark.parametrize("job", JOBS)
def test_twenty_kills(job):
    """In a process of its own: a child must not inherit the threads of other tests."""
    call = [sys.executable, "-m", "tests.kill", job, "--times", "20"]
    root = Path(__file__).parent.parent
    done = subprocess.run(call, capture_output=True, text=True, timeout=500, cwd=root)
    with contextlib.ExitStack() as trials:
        for _ in range(20):
            trials.enter_context(trial("kills"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert int(re.search(r"killed (\d+) times", done.stdout)[1]) == 20


def test_every_job_is_stormed():
    kill = pytest.importorskip("tests.kill")
    assert set(kill.JOBS) == set(JOBS)
