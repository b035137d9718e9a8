"""Several processes train as the parts of one would; the loss is the paper's; ensembles are their members."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("monai")

import torch
import torch.nn.functional as F

from normnet import train
from normnet.config import to_json
from normnet.model import read_tensors
from normnet.train import dice_ce, train_ensemble
from tests.normnet.test_train import TINY, losses, weights

FOUR = replace(TINY, batch_size=4, iterations=5, learning_rate=3e-3, validate_every=0, checkpoint_every=5)


def launch(config, folder, *extra: str) -> subprocess.CompletedProcess[str]:
    """Train in two processes that find each other as under any launcher of PyTorch."""
    file = folder / "settings.json"
    file.write_text(to_json(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "normnet.train", "--config", str(file), *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_two_parts(tmp_path, accumulate):
    train.train(replace(FOUR, accumulate=2 * accumulate, output=tmp_path / "one"))
    done = launch(replace(FOUR, accumulate=accumulate, output=tmp_path / "two"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weights:") == 1  # one of them talks
    one, two = (np.array([float(v) for _, v in losses(tmp_path / n)]) for n in ("one", "two"))
    assert len(one) == FOUR.iterations
    assert one[0] - one[-1] > 0.01  # it learns at all
    # the sums run in another order, and metrics.csv keeps five digits
    assert np.allclose(one, two, rtol=1e-4)
    one, two = (read_tensors(tmp_path / n / "model.safetensors")[0] for n in ("one", "two"))
    # a bias before batch normalisation has no gradient but rounding, which Adam makes a step of; running
    # statistics are those of the first process's part
    compared = [
        name for name in one if not name.endswith(("conv.bias", "running_mean", "running_var", "tracked"))
    ]
    assert len(compared) > 10
    for name in compared:
        # Adam divides by the root of tiny squares: a rounded gradient moves a weight by less than a step
        assert torch.allclose(one[name].float(), two[name].float(), atol=0.3 * FOUR.learning_rate), name


def test_processes_refuse_together(tmp_path):
    done = launch(replace(FOUR, batch_size=3, output=tmp_path / "run"), tmp_path)
    assert done.returncode != 0
    assert "batch_size must be a multiple of processes x accumulate, 2 x 1, got 3" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_one_dice_and_a_mean_entropy(channels, empty, weighted):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, channels, 4, 6, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.rand(3, channels, 4, 6, 6, generator=generator) > (1.0 if empty else 0.8)
    weight = torch.rand(3, 1, 4, 6, 6, generator=generator) if weighted else None
    own = dice_ce(logits, target, weight)
    chance, wanted = torch.sigmoid(logits), target.double()
    entropy = F.binary_cross_entropy(chance, wanted, reduction="none") * (1.0 if weight is None else weight)
    dice = (2 * (chance * wanted).sum() + 1e-5) / (chance.sum() + wanted.sum() + 1e-5)
    plain = 1 - dice + entropy.mean()
    assert own.item() == pytest.approx(plain.item(), rel=1e-6)  # own is float32
    ours, theirs = (torch.autograd.grad(v, logits)[0] for v in (own, plain))
    assert torch.allclose(ours, theirs, atol=1e-8, rtol=1e-4)


def test_an_ensemble_is_its_members(tmp_path):
    short = replace(TINY, iterations=2, validate_every=0)
    train.train(replace(short, seed=1, output=tmp_path / "alone"))
    results = train_ensemble(replace(short, output=tmp_path / "row"), 2)
    assert [r.output.name for r in results] == ["seed0", "seed1"]
    assert weights(tmp_path / "row/seed1") == weights(tmp_path / "alone")
    assert weights(tmp_path / "row/seed0") != weights(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"seed0 already holds a run"):
        train_ensemble(replace(short, output=tmp_path / "row"), 3)
    more = train_ensemble(replace(short, output=tmp_path / "row", resume=True), 3)
    assert [r.iterations for r in more] == [2, 2, 2]
    assert weights(tmp_path / "row/seed1") == weights(tmp_path / "alone")


@pytest.mark.slow
def test_an_ensemble_is_spread_over_devices(tmp_path):
    short = replace(TINY, iterations=2, validate_every=0)
    train_ensemble(replace(short, output=tmp_path / "row"), 2)
    train_ensemble(replace(short, output=tmp_path / "spread"), 2, ["cpu", "cpu"])
    for seed in ("seed0", "seed1"):
        assert weights(tmp_path / "row" / seed) == weights(tmp_path / "spread" / seed)


def test_ensembles_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="members must be >= 1, got 0"):
        train_ensemble(replace(TINY, output=tmp_path / "run"), 0)
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'gpu9'"):
        train_ensemble(replace(TINY, output=tmp_path / "run"), 2, ["gpu9"])
    assert not (tmp_path / "run").exists()


def test_the_command_trains_an_ensemble(tmp_path, capsys):
    file = tmp_path / "settings.json"
    file.write_text(to_json(replace(TINY, iterations=1)))
    command = ["--config", str(file), "--output", str(tmp_path / "e"), "--ensemble", "2", "--seed", "4"]
    assert train.main(command) == 0
    assert capsys.readouterr().out.count("weights:") == 2
    rows = list(csv.DictReader((tmp_path / "e/seed5/metrics.csv").read_text().splitlines()))
    assert rows[-1]["calibrated"]
