"""Nothing grows: 3,000 pairs and 200 predictions in one process each, memory, files and threads watched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.tally import trial

if not Path("/proc/self/statm").exists():
    pytest.skip("counts memory, files and threads by /proc", allow_module_level=True)

MIB = 2**20
WATCHED = """
import gc, os, sys, tempfile, threading
from pathlib import Path

def state():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    left = len(os.listdir(tempfile.gettempdir())) + len(os.listdir("/dev/shm"))
    print("state", pages * os.sysconf("SC_PAGE_SIZE"), files, threading.active_count(), left, flush=True)
"""
PAIRS = """
import numpy as np, lesionsynth as ls
chest = ls.phantom.chest_ct(shape=(32, 256, 256), seed=1)
image, mask = ls.window_hu(chest.hu) * chest.lung_mask, chest.lung_mask
synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0, threads=2)
out = np.empty_like(image), np.empty_like(mask)
for index in range(3000):
    if index % 500 == 0:
        state()
    kind = index % 4
    pair = synth(image, mask, index=index, lung_fraction=1.0, out=out if kind == 1 else None)
    if kind == 2:
        pair.labels
    if kind == 3:
        synth.render(ls.LesionPlan.from_json(pair.plan.to_json()), image, mask)
state()
"""
PREDICTIONS = """
import contextlib, io, shutil
from normnet import predict
from normnet.model import Model, build_unet
from tests import classical
from tests.kill import NETWORK, draw
work = Path(sys.argv[1])
scan = draw(work / "scan.nii.gz", 3)
Model(build_unet(NETWORK), NETWORK).save(work / "model.safetensors")
for number in range(200):
    if number % 40 == 0:
        state()
    with contextlib.redirect_stdout(io.StringIO()):
        status = predict.main([str(scan), "--models", str(work), "--output", str(work / "maps"),
                               "--device", "cpu", "--threads", "1", *classical.FLAGS])
    assert status == 0, status
    shutil.rmtree(work / "maps")
state()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "room"),
    # heap that the allocator keeps moves by some MiB; the image of a pair is 8 MiB, a scan 1 MiB
    [(PAIRS, 16 * MIB), (PREDICTIONS, 24 * MIB)],
    ids=["3,000 pairs", "200 predictions"],
)
def test_nothing_grows(code, room, tmp_path) -> None:
    with trial("soak"):
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", WATCHED + code, str(tmp_path)],
            capture_output=True, text=True, timeout=550, check=False,
            env={**os.environ, "TMPDIR": str(temporary)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        states = [tuple(map(int, line.split()[1:])) for line in re.findall(r"^state.*", done.stdout, re.M)]
        # the first is taken before anything has been made, the second after everything has been once
        (memory, *kept), (end, *left) = states[1], states[-1]
        assert end - memory <= room, [s[0] / MIB for s in states]
        assert left == kept, states
