"""Training on a CUDA device: pairs made there are the CPU's, wherever their volumes are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("cupy")

import torch

from normnet import data, train
from tests.normnet.test_data import CPU, assert_no_copy, segments, stream
from tests.normnet.test_train import TINY

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def made(place: str, device: torch.device, **settings) -> data.PairStream:
    kept = segments().kept(place, device)
    return stream(kept, batch_size=4, mirror=True, device=device, **settings)


@pytest.mark.parametrize("place", ["device", "memory"])
def test_pairs_of_the_device_are_those_of_the_cpu(place):
    pairs = made(place, CUDA)
    assert pairs.resident == (place == "device")
    ours, theirs = pairs.batch(2), made("memory", CPU).batch(2)
    # the twins' own tolerance: tests/tolerances.py
    assert torch.allclose(ours.image.cpu(), theirs.image, atol=1e-4)
    assert float((ours.target.cpu() != theirs.target).float().mean()) < 1e-4
    assert float((ours.lesions.cpu() != theirs.lesions).float().mean()) < 1e-4
    assert ours.seconds > 0


@pytest.mark.parametrize("place", ["device", "memory"])
def test_pairs_stay_on_the_device_without_a_copy(place):
    """DLPack hands memory over: what the kernels wrote is what the network reads."""
    volume = segments().kept(place, CUDA)
    hu, mask = volume.slab(0, 24)
    later = [array.data_ptr() for array in volume.slab(2, 10)]
    assert later == [hu[2:].data_ptr(), mask[2:].data_ptr()]
    assert hu.is_cuda == (place == "device")
    pairs = stream(volume, device=CUDA)
    assert pairs.slabs(0).hu.is_cuda == (place == "device")
    assert_no_copy(pairs, CUDA)


def test_thick_slices_on_the_device():
    ours, theirs = (
        made("device", device, thick_slices=1.0, thick_mm=(3.0, 8.0)).batch(2) for device in (CUDA, CPU)
    )
    assert ours.image.is_cuda
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
