"""Training on a CUDA device: pairs made there are the CPU's, wherever their volumes are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("cupy")

import torch

import lesionsynth as ls
from normnet import data, train, volumes
from tests.normnet.test_train import TINY, Segments

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SETTINGS = {"batch_size": 4, "slab": 8, "crop": 24, "multiple": 8, "mirror": True}


def batch(place: str, device: torch.device, share: float = 0.0) -> data.Batch:
    kept = volumes.keep([Segments()], place, device)
    synthesizer = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0, threads=1)
    thick = data.ThickSlices(share)
    stream = data.PairStream(kept, synthesizer, thick=thick, device=device, **SETTINGS)
    assert stream.resident == (place == "device" or device.type == "cpu")
    return stream.batch(2)


@pytest.mark.parametrize("place", ["device", "memory"])
def test_pairs_of_the_device_are_those_of_the_cpu(place):
    ours, theirs = batch(place, CUDA), batch("memory", torch.device("cpu"))
    assert ours.image.is_cuda
    # the twins' own tolerance: tests/tolerances.py
    assert torch.allclose(ours.image.cpu(), theirs.image, atol=1e-4)
    assert float((ours.target.cpu() != theirs.target).float().mean()) < 1e-4
    assert float((ours.lesions.cpu() != theirs.lesions).float().mean()) < 1e-4
    assert ours.seconds > 0


def test_thick_slices_on_the_device():
    ours, theirs = batch("device", CUDA, 1.0), batch("memory", torch.device("cpu"), 1.0)
    assert torch.allclose(ours.image.cpu(), theirs.image, atol=1e-4)
    assert float((ours.target.cpu() != theirs.target).float().mean()) < 1e-3


@pytest.mark.parametrize("cache", ["device", "memory"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_the_device(tmp_path, cache, precision):
    config = replace(TINY, output=tmp_path / "run", device="cuda", cache=cache, precision=precision)
    result = train.train(config)
    assert result.iterations == config.iterations
    assert result.synthesis_share > 0
    resumed = train.train(replace(config, resume=True, iterations=8))
    assert resumed.iterations == 8
