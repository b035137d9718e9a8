"""The GPU benchmarks as far as they go without one: counting, the rival's mathematics, training on a CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import ndimage

import lesionsynth as ls
from benchmarks import counted, gpu, volumes
from benchmarks.cupyx_pipeline import Pipeline
from tests.test_gpu import devices


@pytest.mark.skipif(devices() > 0, reason="there is a GPU")
def test_without_a_gpu(capsys) -> None:
    assert gpu.main([]) == 2
    message = capsys.readouterr().err
    assert "benchmarks.gpu measures a CUDA device" in message
    assert "--count" in message


def test_counts(tmp_path, capsys) -> None:
    assert gpu.main(["--count", "--quick", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gpu-counted.json").read_text())
    voxels = 8 * np.prod(volumes.QUICK_SHAPE)
    assert record["kernels"]["copy_pair"]["bytes"] == 9 * voxels
    assert record["kernels"]["read_mask"]["bytes"] == 9 / 8 * voxels
    assert 0 < record["lesions_share"] < 8
    assert all(seconds > 0 for seconds in record["floors_s"].values())
    assert "batch of 8: copy" in capsys.readouterr().out


def test_counted_filters() -> None:
    """One ellipsoid, by hand: taps where the line is longer than the kernel, else half the line."""
    from tests.plans import blob, plan, renderer

    image, mask = np.zeros((12, 40, 44), np.float32), np.ones((12, 40, 44), bool)
    one = renderer().render(plan(blob(sigma_a=20.0, sigma_b=0.8)), image, mask).plan
    (lesion,) = one.components
    size = [stop - start for start, stop in lesion.box]
    assert size == [7, 7, 7]
    kernels = {}
    for name in ("noise", "salt"):
        kernels |= {f"{name}_along_{axis}": {"bytes": 0.0, "float32": 0.0, "integer": 0.0} for axis in "xyz"}
    kernels |= {
        "draw_blobs": {"float64": 0.0, "bytes": 0.0},
        "join_blobs": {"bytes": 0.0},
        "inject": {"bytes": 0.0},
    }
    counted._count_plan(one, image.shape, kernels)
    assert kernels["noise_along_y"] == {"bytes": 8.0 * 343, "float32": 4.0 * 343, "integer": 0.0}  # half of 7
    assert (
        kernels["salt_along_y"]["float32"] == 2 * 3 * 343
    )  # radius 3, an addition and a multiply-add a step
    assert kernels["inject"]["bytes"] == 13 * lesion.voxels


def test_the_rival_draws_the_same_blobs() -> None:
    """With NumPy and SciPy in the place of CuPy: the same lines, lesionsynth's shapes and target."""
    slab = volumes.phantom(volumes.QUICK_SHAPE)
    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)
    for index in range(2):
        plan = synth.sample(index=index, shape=slab.image.shape, lung_fraction=0.4)
        pair = synth.render(plan, slab.image, slab.mask)
        image, target, labels = Pipeline(np, ndimage).render(plan, slab.image, slab.mask)
        assert_array_equal(target, pair.target)
        assert_array_equal(labels > 0, pair.labels > 0)
        assert_array_equal(image[labels == 0], slab.image[labels == 0])
        assert (image >= slab.image).all()
        # other noise, and the parameters of another blob of the plan: a lesion's mean is below its mu0, at
        # most 0.8, and 60 renderings lay between 0.25 and 0.53
        assert slab.image[labels > 0].mean() + 0.1 < image[labels > 0].mean() < 0.8


@pytest.mark.slow
def test_training_on_a_cpu(tmp_path, capsys) -> None:
    training = pytest.importorskip("benchmarks.training")
    assert training.main(["--device", "cpu", "--small", "--steps", "2", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "training--cpu.json").read_text())
    for precision in ("bf16", "fp32"):
        found = record["precisions"][precision]
        assert found["on the fly"]["count"] == found["ready-made"]["count"] == 2
        assert found["on the fly over ready-made"]["median"] > 0
    assert "on the fly over ready-made" in capsys.readouterr().out
