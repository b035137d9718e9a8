"""Fixtures that every test module may use.

The small lungs here are drawn with plain NumPy, not with ``lesionsynth.phantom``, so that a fault in the
phantom cannot hide a fault in the generator and the other way round.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tests import gpu
from tests.hostile import tally

settings.register_profile(
    "default", derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_runtest_setup(item: pytest.Item) -> None:
    gpu.skip_unless_there(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    gpu.fail_if_skipped(report, gpu.wanted(item))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """A whole module that is skipped: those for a GPU are named after it."""
    report = yield
    gpu.fail_if_skipped(report, int(collector.name.endswith("_gpu.py")))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["hostile"] = tally.counts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    tally.add(getattr(node, "workeroutput", {}).get("hostile", {"tried": {}, "lost": {}}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if tally.tried:
        terminalreporter.section("hostile inputs and injected faults")
        for line in tally.table():
            terminalreporter.write_line(line)


REPOSITORY = Path(__file__).resolve().parent.parent


def docs_script(name: str) -> ModuleType:
    """Import a script of the documentation."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real CT volumes, in ``LESIONSYNTH_SHARED`` or ``shared`` beside the repository; skips without."""
    folder = Path(os.environ.get("LESIONSYNTH_SHARED", REPOSITORY.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"real CT volumes are not installed: {folder} does not exist")
    return folder


def played(network: Any, multiple: int = 1, **settings: Any) -> Any:
    """A `normnet.model.Model` of any network, whose inputs have axes that are multiples of `multiple`."""
    from normnet.config import OUTPUTS, ModelConfig
    from normnet.model import Model

    strides = (8, multiple // 8) if multiple > 8 else (multiple,)
    outputs = OUTPUTS[settings.get("task", "lesions")]
    config = ModelConfig(channels=(1,) * (len(strides) + 1), strides=strides, outputs=outputs)
    return Model(network, config, **settings)


def draw_lungs(
    shape: tuple[int, int, int] = (12, 40, 44), seed: int = 0, vessels: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Two ellipsoidal lungs with bright random tubes in noisy dark tissue.

    Returns
    -------
    image : (Z, Y, X) float32 array
        Values in [0, 1]; exactly 0 outside the mask, as H = H' * M is.
    mask : (Z, Y, X) bool array
    """
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    mask = np.zeros(shape, bool)
    for centre_x in (0.27, 0.73):
        mask |= (
            ((z - 0.5 * (shape[0] - 1)) / (0.62 * shape[0])) ** 2
            + ((y - 0.5 * (shape[1] - 1)) / (0.44 * shape[1])) ** 2
            + ((x - centre_x * (shape[2] - 1)) / (0.2 * shape[2])) ** 2
        ) <= 1
    image = 0.08 + 0.03 * rng.standard_normal(shape)
    points = np.stack([z, y, x], -1).astype(float)
    for _ in range(vessels):
        start = rng.random(3) * shape
        way = rng.standard_normal(3)
        way /= np.linalg.norm(way)
        offset = points - start
        along = offset @ way
        distance = np.sqrt(np.maximum((offset**2).sum(-1) - along**2, 0))
        image = np.where(distance < rng.uniform(0.6, 1.6), rng.uniform(0.4, 0.95), image)
    return (np.clip(image, 0, 1) * mask).astype(np.float32), mask


@pytest.fixture(scope="session")
def lungs() -> tuple[np.ndarray, np.ndarray]:
    """Read-only (image float32, mask bool) of 12 x 40 x 44 voxels."""
    image, mask = draw_lungs()
    image.setflags(write=False)
    mask.setflags(write=False)
    return image, mask


@pytest.fixture(scope="session")
def lung_batch() -> tuple[np.ndarray, np.ndarray]:
    """Three pairs of lungs that differ in image and in mask, (3, 12, 40, 44), read-only."""
    pairs = [draw_lungs(seed=seed) for seed in (1, 2, 3)]
    images, masks = np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])
    for item in range(3):
        masks[item, :item] = False  # else the masks are equal, and mixing them up would go unnoticed
        masks[item, :, :, 22 + 4 * item : 30] = False
    images = images * masks
    images.setflags(write=False)
    masks.setflags(write=False)
    return images, masks
