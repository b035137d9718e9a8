"""Training for lungs from chests to weights: files, resumption, settings, scores, and stores of chests."""

from __future__ import annotations

import csv
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("torch")
pytest.importorskip("monai")

import torch

from normnet import chests, train
from normnet.chests import ChestStream, lung_streams, phantom_chests, store_chests
from normnet.config import PRESETS, WEIGHTS, AugmentConfig, ChestConfig, ModelConfig, TrainConfig, to_json
from normnet.data import Batch, store_volumes
from normnet.model import Model, build_unet
from normnet.painting import LEFT, RIGHT
from normnet.prepare import Store, prepare
from normnet.prepare.__main__ import main as prepare_main
from normnet.prepare.network import chest_grid, shrink
from normnet.train import validate_lungs

SPACING = (10.0, 7.5, 6.0)
TINY = TrainConfig(
    task="lungs",
    model=ModelConfig(channels=(4, 8), strides=(2,), residual_units=1, outputs=2),
    iterations=4,
    batch_size=2,
    slab=16,
    crop=32,
    mirror=True,
    average=0.9,
    augment=AugmentConfig(rotate=10, zoom=0.1, noise=20),
    thick_slices=0.3,
    precision="fp32",
    device="cpu",
    threads=1,
    held_out=1,
    validate_every=2,
    validation_pairs=2,
    checkpoint_every=2,
    phantoms=1,
    phantom_shape=(32, 48, 64),
    phantom_spacing=SPACING,
)


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    """Phantoms take longer to draw than a network of this size to train."""
    monkeypatch.setattr(chests, "phantom_chests", _drawn)


_drawn = functools.cache(phantom_chests)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lungs"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chests, "phantom_chests", _drawn)
        train.train(replace(TINY, output=folder))
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def losses(folder: Path) -> list[tuple[str, str]]:
    return [(row["iteration"], row["loss"]) for row in rows(folder) if row["loss"]]


# ---- runs


def test_a_run_writes_what_a_run_of_lesions_does(run):
    names = {f.name for f in run.iterdir() if not f.name.startswith("events")}
    assert names >= {"config.json", "model.safetensors", "best.safetensors", "state.safetensors"}
    assert train.read_config(TrainConfig, run / "config.json") == replace(TINY, output=run)
    scores = [row for row in rows(run) if row["val_loss"]]
    assert [row["iteration"] for row in scores] == ["2", "4"]
    for row in scores:
        assert 0 <= float(row["val_dice"]) <= 1
        assert not row["val_auc"]
        assert not row["calibrated"]
    assert len(losses(run)) == 4


def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path):
    parts = tmp_path / "parts"
    train.train(replace(TINY, output=parts, iterations=2))
    assert (parts / WEIGHTS).read_bytes() != (run / WEIGHTS).read_bytes()
    train.train(replace(TINY, output=parts, resume=True))
    for name in (WEIGHTS, "best.safetensors"):
        assert (parts / name).read_bytes() == (run / name).read_bytes()
    assert losses(parts) == losses(run)
    with pytest.raises(ValueError, match="the settings differ"):
        train.train(replace(TINY, output=parts, resume=True, chest=ChestConfig(arms=0.9)))


def test_training_lowers_the_loss(tmp_path):
    config = replace(TINY, iterations=25, learning_rate=2e-2, validate_every=0, output=tmp_path / "run")
    result = train.train(config)
    values = [float(loss) for _, loss in losses(tmp_path / "run")]
    assert np.mean(values[-5:]) < np.mean(values[:5]) - 0.1
    assert {"val_loss", "val_dice", "val_recall"} == result.validation.keys()


def test_weights_say_what_they_are_for(run, tmp_path):
    for file in (run, run / "best.safetensors"):
        model = Model.load(file, "lungs")
        assert model.config == TINY.model
        assert model.healthy_probability(torch.zeros(1, 1, 16, 32, 32)).shape == (1, 2, 16, 32, 32)
    with pytest.raises(ValueError, match=r"model\.safetensors: the model's task must be lesions, got lungs"):
        Model.load(run)
    config = ModelConfig(channels=(4, 8), strides=(2,))
    Model(build_unet(config), config).save(tmp_path / "lesions.safetensors")
    with pytest.raises(
        ValueError, match=r"lesions\.safetensors: the model's task must be lungs, got lesions"
    ):
        Model.load(tmp_path / "lesions.safetensors", "lungs")
    with pytest.raises(ValueError, match=r"model\.outputs must fit the task lungs, got 1"):
        Model(build_unet(config), config, "lungs")


# ---- settings


def test_the_command_takes_the_preset_lungs(run, tmp_path, capsys):
    preset = PRESETS["lungs"]()
    assert train.parse(["--task", "lungs"]).config == preset
    assert train.parse(["--task=lungs", "--data", "x"]).config == replace(preset, data=Path("x"))
    assert train.parse(["--preset", "lungs"]).config == preset
    changed = train.parse(["--task", "lungs", "--chest.arms", "0.5", "--seed", "3"]).config
    assert changed == replace(preset, seed=3, chest=ChestConfig(arms=0.5))
    again = train.parse(["--config", str(run / "config.json"), "--output", str(tmp_path / "next")]).config
    assert again == replace(TINY, output=tmp_path / "next")
    for wrong, shown in (
        (["--task", "lungs", "--preset", "few"], "model.outputs"),
        (["--task", "livers"], "lungs"),
    ):
        with pytest.raises(SystemExit) as ended:
            train.main(wrong)
        assert ended.value.code == 2
        assert shown in capsys.readouterr().err
    file = tmp_path / "config.json"
    file.write_text(to_json(replace(TINY, iterations=1, validate_every=0, output=tmp_path / "run")))
    assert train.main(["--config", str(file)]) == 0
    assert "val_recall" in capsys.readouterr().out
    Model.load(tmp_path / "run", "lungs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig()}, "model.outputs must be 2 for the task lungs, got 1"),
        ({"task": "lesions"}, "model.outputs must be 1 for the task lesions, got 2"),
        ({"crop": None}, "crop must be given for the task lungs, got None"),
        ({"task": "livers"}, r"task must be .*lesions.*lungs.*, got '?livers"),
    ],
)
def test_settings_that_do_not_fit_the_task(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diseased": 1.1}, r"diseased must be <= 1, got 1.1"),
        ({"contrast": -0.1}, r"contrast must be >= 0, got -0.1"),
        ({"arms": 2.0}, r"arms must be <= 1, got 2.0"),
        ({"cropped": float("nan")}, r"cropped must be finite, got nan"),
        ({"tilt": 91.0}, r"tilt must be <= 90, got 91.0"),
        ({"stretch": -1.0}, r"stretch must be >= 0, got -1.0"),
        ({"bend": 8.5}, r"bend must be <= 8, got 8.5"),
    ],
)
def test_chests_cannot_vary_so(changes, message):
    with pytest.raises(ValueError, match=message):
        ChestConfig(**changes)
    with pytest.raises(ValueError, match=r"outputs must be <= 2, got 3"):
        ModelConfig(outputs=3)


# ---- validation


class Answers:
    """Stands for a trainer whose network gives known probabilities."""

    def __init__(self, probabilities: list[np.ndarray], losses: list[float]) -> None:
        self._given = list(zip(probabilities, losses, strict=True))

    def probability(self, batch: Batch) -> tuple[torch.Tensor, float]:
        probability, loss = self._given.pop(0)
        return torch.from_numpy(probability), loss


def checks(lungs: np.ndarray, disease: np.ndarray) -> Batch:
    target = torch.from_numpy(np.stack([lungs == RIGHT, lungs == LEFT], axis=1))
    ill = torch.from_numpy(disease)[:, None]
    return Batch(torch.zeros(ill.shape), target, lambda: ill, lambda: 0.0)


def test_validation_scores_by_hand():
    rng = np.random.default_rng(0)
    lungs = [rng.integers(0, 3, (2, 3, 4, 5)).astype(np.uint8) for _ in range(3)]
    disease = [(rng.random(a.shape) < 0.4) & (a > 0) for a in lungs]
    chances = [rng.random((2, 2, 3, 4, 5)).astype(np.float32) for _ in lungs]
    sides: dict[int, list[int]] = {RIGHT: [0, 0], LEFT: [0, 0]}
    found, ill = 0, 0
    for a, d, p in zip(lungs, disease, chances, strict=True):
        for b, z, y, x in np.ndindex(a.shape):
            for side, sums in sides.items():
                said, there = p[b, side - 1, z, y, x] > 0.5, a[b, z, y, x] == side
                sums[0] += 2 * int(said and there)
                sums[1] += int(said) + int(there)
                found += int(d[b, z, y, x] and there and said)
            ill += int(d[b, z, y, x])
    scores = validate_lungs(Answers(chances, [1.0, 2.0, 6.0]), list(map(checks, lungs, disease)))
    assert scores == {
        "val_loss": 3.0,
        "val_dice": pytest.approx(np.mean([hit / both for hit, both in sides.values()])),
        "val_recall": pytest.approx(found / ill),
    }
    perfect = [np.stack([a == RIGHT, a == LEFT], axis=1).astype(np.float32) for a in lungs]
    best = validate_lungs(Answers(perfect, [0.0] * 3), list(map(checks, lungs, disease)))
    assert best == {"val_loss": 0.0, "val_dice": 1.0, "val_recall": 1.0}
    swapped = [p[:, ::-1].copy() for p in perfect]
    worst = validate_lungs(Answers(swapped, [0.0] * 3), list(map(checks, lungs, disease)))
    assert (worst["val_dice"], worst["val_recall"]) == (0, 0)


def test_validation_without_disease():
    lungs = np.full((1, 2, 3, 4), RIGHT, np.uint8)
    chance = np.ones((1, 2, 2, 3, 4), np.float32)
    scores = validate_lungs(Answers([chance], [1.0]), [checks(lungs, np.zeros(lungs.shape, bool))])
    assert np.isnan(scores["val_recall"])
    assert scores["val_dice"] == 0.5  # the left lung is nowhere, and found everywhere


# ---- stores


def small_chest(shape: tuple[int, int, int] = (40, 70, 100)) -> tuple[np.ndarray, np.ndarray]:
    """HU and sides of voxels of 6 x 4 x 3.4 mm: a body with a larger right and a smaller left lung."""
    z, y, x = np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[(y / 30) ** 2 + (x / 46) ** 2 <= 1] = 40
    sides = np.zeros(shape, np.uint8)
    sides[(z / 17) ** 2 + (y / 21) ** 2 + ((x + 21) / 14) ** 2 <= 1] = RIGHT
    sides[(z / 14) ** 2 + (y / 19) ** 2 + ((x - 21) / 12) ** 2 <= 1] = LEFT
    hu[sides > 0] = -850
    hu += np.random.default_rng(0).normal(0, 15, shape)
    return np.rint(hu).clip(-1024).astype(np.int16), sides


VOXEL = (6.0, 4.0, 3.4)


def write(path: Path, array: np.ndarray) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(VOXEL[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Store:
    """Two chests, of the first the file's slices 18-20 left out."""
    base = tmp_path_factory.mktemp("chests")
    hu, _ = small_chest()
    write(base / "anna.nii.gz", hu)
    write(base / "bert.nii.gz", hu[4:-4])
    (base / "leave.csv").write_text("anna,18,20\n")
    arguments = [base / "anna.nii.gz", base / "bert.nii.gz", "--output", base / "store", "--task", "lungs"]
    assert prepare_main([*map(str, arguments), "--exclude", str(base / "leave.csv")]) == 0
    return Store.open(base / "store")


def test_a_store_of_chests_keeps_both_lungs_on_the_coarse_grid(stored):
    hu, sides = small_chest()
    assert stored.meta == {"task": "lungs"}
    assert stored.case_ids == ["anna", "bert"]
    bert = stored["bert"]
    grid = chest_grid(hu[4:-4], VOXEL)
    assert bert.shape == grid.shape
    assert bert.spacing == pytest.approx(grid.spacing)
    assert bert.segments == [(0, grid.shape[0])]
    # the file holds spacings in float32: what lies half-way is rounded to either side
    expected = np.rint(shrink(hu[4:-4], grid))
    assert_allclose(bert.slab(0, grid.shape[0])[0], expected, atol=1)
    lungs = bert.lungs()
    assert set(np.unique(lungs)) == {0, RIGHT, LEFT}
    for side in (RIGHT, LEFT):
        wanted = shrink(sides[4:-4] == side, grid) > 0.5
        dice = 2 * (wanted & (lungs == side)).sum() / (wanted.sum() + (lungs == side).sum())
        assert dice > 0.95, side
    assert bert.meta["lungs_from"] == "classical"
    assert (stored.path / "qc/bert.png").is_file()


def test_slices_left_out_of_chests(stored):
    hu, _ = small_chest()
    anna = stored["anna"]
    grid = chest_grid(hu, VOXEL)
    depth = grid.shape[0]
    (first, low), (high, last) = anna.segments
    assert (first, last) == (0, depth)
    at = grid.source_positions(0)
    # no slice of the grid between these and the file's 18 ... 20
    assert at[low - 1] < 18 <= 20 < at[high]
    assert at[low] > 16.5
    assert at[high - 1] < 21.5
    lungs = anna.lungs()
    assert not lungs[low:high].any()
    assert lungs[low - 1].any()
    assert lungs[high].any()
    read = store_chests(stored.path)
    assert [chest.name for chest in read] == ["anna", "bert"]
    assert_array_equal(read[0].lungs, lungs)
    assert_array_equal(read[0].hu, anna.slab(0, depth)[0])
    assert read[0].segments == [(0, low), (high, depth)]


def test_training_on_a_store(stored, tmp_path, monkeypatch):
    config = replace(TINY, data=stored.path, output=tmp_path / "run", iterations=1, validate_every=0)
    used: list[list[Any]] = []
    real = ChestStream.__init__

    def spied(self, given, *rest, **settings):
        used.append([chest.name for chest in given])
        real(self, given, *rest, **settings)

    monkeypatch.setattr(ChestStream, "__init__", spied)
    stream, batches = lung_streams(config, torch.device("cpu"))
    assert used == [["anna", "phantom1000"], ["bert"]]  # the one with fewer slices is held out
    assert stream.device.type == "cpu"
    assert len(batches) == 2
    assert all(batch.image.shape == (1, 1, 16, 32, 32) for batch in batches)
    assert not torch.equal(batches[0].image, batches[1].image)
    _, none = lung_streams(replace(config, held_out=0), torch.device("cpu"))
    assert none == []
    follower, none = lung_streams(config, torch.device("cpu"), rank=1, processes=2, local=2)
    assert none == []
    assert torch.equal(follower.batch(0).image, stream.batch(0).image[1:])
    with pytest.raises(ValueError, match="data must hold more than held_out=2 chests, got 2"):
        lung_streams(replace(config, held_out=2), torch.device("cpu"))
    assert train.train(config).iterations == 1


def test_phantoms_are_held_out_where_there_is_no_data(monkeypatch):
    asked = []

    def drawn(count, seed, shape, spacing):
        asked.append((count, seed, shape, spacing))
        return [*_drawn(1, 0, shape, spacing)] * count

    monkeypatch.setattr(chests, "phantom_chests", drawn)
    lung_streams(replace(TINY, held_out=2, phantoms=3, seed=5), torch.device("cpu"))
    assert asked == [(5, 5, (32, 48, 64), SPACING)]


def test_stores_of_one_task_are_not_taken_for_another(stored, tmp_path):
    lesions = Store.create(tmp_path / "store", {"spacing": [1.0, 0.8, 0.8], "size": 48})
    hu, sides = small_chest((8, 20, 24))
    lesions.add("a", hu, sides > 0)
    with pytest.raises(
        ValueError, match=r"data must be a store prepared with --task lungs, got .* for lesions"
    ):
        store_chests(lesions.path)
    with pytest.raises(
        ValueError, match=r"data must be a store prepared for lesions, got .* for --task lungs"
    ):
        store_volumes(stored.path)
    for task, data in (("lungs", lesions.path), ("lesions", stored.path)):
        model = replace(TINY.model, outputs=2 if task == "lungs" else 1)
        with pytest.raises(ValueError, match="data must be a store prepared"):
            train.train(replace(TINY, task=task, model=model, data=data, output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="not a store"):
        store_chests(tmp_path)
    with pytest.raises(ValueError, match="a store with other settings is there"):
        prepare([stored.path.parent / "anna.nii.gz"], stored.path, lungs="classical")


def test_what_chests_are_not_prepared_with(stored, tmp_path):
    file = stored.path.parent / "anna.nii.gz"
    (tmp_path / "nodules.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\nanna,0,0,0,5\n")
    for arguments, name in (
        ({"keep_lung": {"anna": "left"}}, "keep_lung"),
        ({"annotations": tmp_path / "nodules.csv"}, "annotations"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be omitted for the task lungs"):
            prepare([file], tmp_path / "store", task="lungs", **arguments)
    with pytest.raises(ValueError, match="task must be one of lesions, lungs, got 'livers'"):
        prepare([file], tmp_path / "store", task="livers")  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


def test_a_scan_must_show_both_lungs(tmp_path):
    hu, sides = small_chest()
    hu[sides == LEFT] = 40
    summary = prepare([write(tmp_path / "one.nii.gz", hu)], tmp_path / "store", task="lungs")
    (case,) = summary.failed
    assert "one.nii.gz" in case.message
    assert "the scan must show both lungs" in case.message
    assert not summary.store.case_ids


def test_nodules_of_luna16_stay(tmp_path):
    """Nodules belong to the lung: the annotations beside the subsets are not applied."""
    hu, sides = small_chest()
    folder = tmp_path / "luna"
    write(folder / "subset0/1.2.3.mhd", hu)
    z = VOXEL[0] * 20
    (folder / "annotations.csv").write_text(
        f"seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.3,{VOXEL[2] * 29:.1f},{VOXEL[1] * 35:.1f},{z},20\n"
    )
    mask = write(tmp_path / "lungs.nii.gz", (sides > 0).astype(np.uint8))
    kept = prepare([folder], tmp_path / "chests", masks=mask, task="lungs").store["1.2.3"]
    assert kept.segments == [(0, kept.shape[0])]
    assert kept.meta["nodules"] == []
    cut = prepare([folder], tmp_path / "lesions", masks=mask, spacing=(6.0, 4.0, 4.0), size=96).store["1.2.3"]
    assert len(cut.segments) == 2  # which they are for lesions
