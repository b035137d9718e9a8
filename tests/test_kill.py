"""Kill -9 at random points of prepare, train and predict: nothing corrupt, everything resumes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("SimpleITK")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the storm forks, which this system cannot"),
]


@pytest.mark.parametrize("job", ["train", "prepare", "predict"])
def test_twenty_kills(job):
    """In a process of its own: a child must not inherit the threads of other tests."""
    script = Path(__file__).with_name("kill.py")
    done = subprocess.run(
        [sys.executable, str(script), job, "--times", "20"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.search(r"killed (\d+) times", done.stdout)[1]) == 20
