"""Compiled kernels: kept on disk, not compiled again for new parameters, compiled again for new code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lesionsynth as ls
from tests.conftest import REPOSITORY

COUNT = """
import json, sys
import numpy as np
from lesionsynth import ops
from lesionsynth.cpu import filters
from lesionsynth.cpu.engine import lines
ops.gaussian_filter(np.ones((2, 3, 4), np.float32), 2.0)
stats = [kernel.stats for kernel in (filters._smooth_planes, lines._fill_kernels)]
counts = [[sum(c.values()) for c in (s.cache_hits, s.cache_misses)] for s in stats]
print(json.dumps([sum(c) for c in zip(*counts)]))
"""


def hits_and_misses(package: Path, cache: Path) -> list[int]:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(package)}
    run = subprocess.run(
        [sys.executable, "-c", COUNT],
        env=environment,
        cwd=package,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
def test_a_change_of_what_a_kernel_calls_compiles_it_anew(tmp_path):
    """Numba alone would load the old one: the kernel's own file is as it was."""
    package, cache = tmp_path / "package", tmp_path / "cache"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "lesionsynth", package / "lesionsynth", ignore=ignored)
    assert hits_and_misses(package, cache) == [0, 2]
    assert hits_and_misses(package, cache) == [2, 0]
    called = package / "lesionsynth" / "cpu" / "engine" / "simd.py"
    called.write_text(called.read_text() + "\n# changed\n")
    assert hits_and_misses(package, cache) == [0, 2]


def test_new_parameters_compile_nothing(lungs):
    """Seeds, indices, sigmas, counts, shapes, strides and read-only arrays are not types."""
    from lesionsynth.cpu import inject, merge, shapes, texture

    kernels = [shapes._draw, shapes._measure, merge._collect_and_join, merge._finish, texture._synthesize]
    kernels += [inject._copy_vectors, inject._inject]
    image, mask = lungs
    ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)(image, mask, index=0, lung_fraction=1.0)
    before = [len(kernel.signatures) for kernel in kernels]
    for k, preset in enumerate((ls.presets.no_shapes(), ls.presets.no_salt_noise(), ls.presets.covid_lung())):
        shape = (3 + k, 30 + k, 20 + 5 * k)
        bright, lung = np.full(shape, 0.5, np.float32), np.ones(shape, bool)
        for a, b in (
            (bright, lung),
            (np.asfortranarray(bright), np.asfortranarray(lung)),
            (bright[::-1], lung),
        ):
            ls.LesionSynthesizer(preset, seed=2**32 - 1 - k, threads=1 + k)(
                a, b, index=7 * k, lung_fraction=1.0, spacing=(2.0, 1.0, 0.7)
            )
    assert [len(kernel.signatures) for kernel in kernels] == before
    assert min(before) >= 1
