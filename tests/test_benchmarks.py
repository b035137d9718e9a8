"""The benchmarks run, and what they compare agrees. No test here depends on a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

import lesionsynth as ls
from benchmarks import common, ops, pairs, pipeline, scipy_pipeline
from benchmarks.geometry import Site, blob_box, ellipsoid
from tests.conftest import REPOSITORY
from tests.plans import blob, plan, small_config


def numbers(value: object) -> list[float]:
    """Every number under a key that ends in a unit of time."""
    if isinstance(value, dict):
        own = [v for k, v in value.items() if k.endswith(("median_s", "floor_ms", "measured_ms", "_per_s"))]
        return [v for v in own if isinstance(v, float)] + [n for v in value.values() for n in numbers(v)]
    return [n for v in value for n in numbers(v)] if isinstance(value, list) else []


@pytest.mark.slow
def test_a_quick_run_writes_every_section_and_passes_its_own_checks(tmp_path: Path) -> None:
    """As a user runs it, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.cpu",
        "--quick",
        "--threads",
        "1,2",
        "--output",
        str(tmp_path),
    ]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    (path,) = tmp_path.glob("cpu--*.json")
    results = json.loads(path.read_text())
    assert results.keys() == {
        *("format", "version", "machine", "settings", "libraries", "volumes", "correctness", "pairs"),
        *("stages", "scaling", "floors", "ops", "many_blobs", "processes"),
    }
    assert results["correctness"]["passed"]
    assert len(results["correctness"]["checks"]) > 40
    assert {"SciPy", "lesionsynth, 1 thread", "lesionsynth, 2 threads"} <= results["pairs"]["phantom"].keys()
    assert {"SciPy", "lesionsynth, 1 thread"} <= results["stages"]["phantom"].keys()
    assert results["ops"].keys() == {
        *("gaussian_filter", "uniform_filter", "philox_uniform", "label", "grow", "remove_erroneous_edges")
    }
    assert results["processes"].keys() == {"loader", "start", "memory"}
    assert not [entry for entry in results["processes"]["memory"].values() if "failed" in entry]
    found = numbers(results)
    assert len(found) > 100
    assert min(found) > 0
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_scipy_pipeline_renders_what_lesionsynth_renders(lungs) -> None:
    """Labels and target equal; the image as near as ties allow."""
    image, mask = lungs
    synth = ls.LesionSynthesizer(small_config(), seed=3)
    for index in range(6):
        drawn = synth.sample(index=index, shape=image.shape)
        pair = synth.render(drawn, image, mask)
        want = pipeline.render(scipy_pipeline.checked_stages(), drawn, image, mask)
        np.testing.assert_array_equal(pair.labels, want.labels)
        np.testing.assert_array_equal(pair.target, want.target)
        untied, tied, _ = pairs._differences(pair.image, want)
        assert untied <= pairs.UNTIED
        assert tied <= pairs.TIED


def test_a_wrong_image_is_told_from_a_right_one(lungs) -> None:
    """The comparison before timing can fail."""
    image, mask = lungs
    synth = ls.LesionSynthesizer(small_config(), seed=3)
    drawn = synth.sample(index=0, shape=image.shape)
    want = pipeline.render(scipy_pipeline.checked_stages(), drawn, image, mask)
    untied, tied, _ = pairs._differences(want.image + np.float32(0.01), want)
    assert max(untied / pairs.UNTIED, tied / pairs.TIED) > 1


def test_an_ellipsoid_for_image_libraries_is_the_unwarped_blob(lungs) -> None:
    """In the middle of the volume nothing is cut."""
    image, _ = lungs
    half = np.sqrt(0.5)
    drawn = plan(blob(semi_axes=(2.2, 5.3, 3.1), rotation=(half, 0.0, half, 0.0)))
    center = tuple(n // 2 for n in image.shape)
    box = blob_box(drawn, drawn.blobs[0], center, image.shape)
    site = Site(drawn, drawn.blobs[0], center, box, image.shape)
    np.testing.assert_array_equal(
        ellipsoid(site), scipy_pipeline.SciPy().voxels(site, pipeline.Generator()), strict=True
    )


def test_touching_follows_the_connectivity() -> None:
    """Two voxels that share a corner touch among 26 neighbours, not among 6 or 18."""
    one, other = (
        pipeline.Piece(tuple(slice(k, k + 1) for _ in range(3)), np.ones((1, 1, 1), bool), (k,))
        for k in (4, 5)
    )
    touches = [pipeline.touch(one, other, ndimage.generate_binary_structure(3, rank)) for rank in (1, 2, 3)]
    assert touches == [False, False, True]


def test_edges_are_removed_as_lesionsynth_removes_them(lungs) -> None:
    """The SciPy way that is timed, on masks with and without rims."""
    image, mask = lungs
    wide = ndimage.binary_dilation(mask, iterations=2)
    rimmed = np.where(wide & ~mask, np.float32(0.9), image)
    for volume, lung in ((image, mask), (rimmed, wide)):
        for got, want in zip(
            ops.remove_edges_scipy(volume, lung), ls.remove_erroneous_edges(volume, lung), strict=True
        ):
            np.testing.assert_array_equal(got, want)


def test_contestants_take_turns_after_warming_up() -> None:
    """Every round has them all once, and not always in the same order."""
    calls: list[tuple[str, int]] = []
    contestants = {name: lambda i, name=name: calls.append((name, i)) for name in "AB"}
    samples = common.interleaved(contestants, 20, warmup=1)
    assert calls[:2] == [("A", 0), ("B", 0)]
    rounds = [calls[k : k + 2] for k in range(2, 42, 2)]
    assert [sorted(turn) for turn in rounds] == [[("A", i), ("B", i)] for i in range(20)]
    assert {turn[0][0] for turn in rounds} == {"A", "B"}
    assert {name: list(times) for name, times in samples.items()} == {"A": [*range(20)], "B": [*range(20)]}


def test_a_slow_contestant_sits_out_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower than `SLOW_S` means one round of `SLOW_STRIDE`."""
    monkeypatch.setattr(common, "SLOW_S", 0.0)
    samples = common.interleaved({"A": lambda i: i}, 11, warmup=1)
    assert list(samples["A"]) == [0, 5, 10]


def test_a_stage_clock_sees_public_methods_by_name() -> None:
    """And only those; results and other attributes pass through."""

    class Two:
        size = 3

        def double(self, n: int) -> int:
            return 2 * n

        def later(self) -> Callable[[], int]:
            return lambda: 7

    clock = common.StageClock(Two())
    assert clock.double(clock.size) == 6
    assert clock.take().keys() == {"double"}
    assert not clock.take()
    assert clock.later()() == 7
    assert clock.take().keys() == {"later", "later" + common.WAITING}


def test_a_check_fails_on_nan_and_an_empty_list_passes_nothing(capsys) -> None:
    """A comparison that was not made is not a success."""
    checks = common.Checks()
    assert not checks.summary()["passed"]
    checks.add("fine", "at most one", 1.0, 1.0)
    assert checks.summary()["passed"]
    checks.add("broken", "at most one", float("nan"), 1.0)
    assert not checks.summary()["passed"]
    assert "FAILED  broken" in capsys.readouterr().out
