"""`docs/lesions_check.py`: what it paints, what it counts, and that a network is asked about its own fold."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import ndimage

pytest.importorskip("torch")
pytest.importorskip("monai")

import torch

import lesionsynth as ls
from normnet.config import ModelConfig, TrainConfig, to_json
from normnet.data import Volume
from normnet.model import Model, build_unet
from normnet.prepare.store import Store
from tests.conftest import docs_script

SPACING = (2.0, 2.0, 2.0)
CONFIG = ModelConfig(channels=(2, 3), strides=(2,), head=2)


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return docs_script("lesions_check")


def chest() -> ls.phantom.ChestCT:
    return ls.phantom.chest_ct(shape=(60, 128, 160), spacing=SPACING, seed=2)


@pytest.fixture(scope="module")
def scan(check):
    """A phantom whose slices 20 to 25 are left out."""
    hu, mask, spacing = chest()
    volume = Volume.of("a", hu, mask, spacing, [(0, 20), (26, 60)])
    found = check.read(volume, -870.0)
    boxes = ndimage.find_objects(mask.astype(np.uint8))[0]
    assert found.lungs.sum() == mask.sum()
    offset = max(boxes[0].start - 8, 0)
    assert_array_equal(found.usable, [not 20 <= z + offset < 26 for z in range(len(found.hu))])
    return found


def test_painted_lesions_are_what_their_kind_says(check, scan):
    volumes = {}
    for number, (name, kind) in enumerate(check.KINDS.items()):
        sick, truth = check.painted(scan, kind, number)
        well, _ = check.painted(scan, replace_shapes(kind), number)
        assert truth.any(), name
        assert not (truth & ~sick.lungs).any()
        far = ~ndimage.binary_dilation(truth, iterations=4)  # its edge is soft, and rims get dense
        np.testing.assert_allclose(sick.hu[far], well.hu[far], atol=1e-3)  # a tail of the soft edge
        core = ndimage.binary_erosion(truth, iterations=2)
        if core.sum() > 50 and not kind.density.bronchi:
            # it makes tissue denser and never lighter, so vessels stay
            assert sick.hu[core].mean() > kind.density.hu - 3 * kind.density.spread
            assert np.median(sick.hu[core]) == pytest.approx(kind.density.hu, abs=kind.density.spread + 30), (
                name
            )
        labels = ndimage.label(truth, np.ones((3, 3, 3)))[0]
        volumes[name] = np.bincount(labels.ravel())[1:] * np.prod(SPACING) / 1000
    assert volumes["solid_1ml"].min() >= 1
    assert volumes["nodules"].min() >= 0.1
    assert volumes["lobar"].max() > volumes["nodules"].max()


def replace_shapes(kind):
    """The same kind without a lesion."""
    nothing = replace(kind.shapes, medium=replace(kind.shapes.medium, count=(0.0, 0.0)))
    return kind._replace(shapes=nothing)


def test_dice(check):
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 1], bool)
    assert check.dice(a, b) == pytest.approx(100 * 2 / 5)
    assert check.dice(a, a) == 100
    assert np.isnan(check.dice(a & False, a & False))


def test_the_vote_is_counted_at_each_threshold(check, scan, monkeypatch):
    """Against the definition: a model that is sure of the front half, and says 0.5 of the back."""
    half = scan.hu.shape[1] // 2
    chance = np.full(scan.hu.shape, 0.5, np.float32)
    chance[:, :half] = 0.9
    monkeypatch.setattr(check, "slide", lambda *_: [(0, torch.from_numpy(chance)[None])])
    model = Model(build_unet(CONFIG), CONFIG, threshold_hu=-700.0)
    all_, back, nothing = check.lesions_of(scan, [model], [0.95, 0.6, 0.4])
    assert not nothing.any()
    assert all_[:, :half].any()
    assert back[:, half + 12 :].any()
    assert not back[:, : half - 12].any()  # filters and growth reach no further
    assert all_.sum() > back.sum()


@pytest.fixture
def runs(tmp_path) -> Path:
    """A store of two phantoms, and two networks that each held out one."""
    store = Store.create(tmp_path / "store", {"spacing": list(SPACING), "size": 160})
    hu, mask, _ = chest()
    for name in ("a", "b"):
        store.add(name, hu, mask, {"segments": [[0, 60]]})
    (tmp_path / "folds.csv").write_text("case,fold\na,0\nb,1\n")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Model(build_unet(CONFIG), CONFIG, threshold_hu=-700.0, inflation_hu=-870.0, probability=0.5)
        run = tmp_path / f"runs/seed{seed}"
        model.save(run / "model.safetensors")
        config = TrainConfig(
            data=tmp_path / "store", folds=tmp_path / "folds.csv", seed=seed, model=CONFIG, output=run
        )
        (run / "config.json").write_text(to_json(config))
    return tmp_path


def test_each_network_is_asked_about_its_fold(check, runs, monkeypatch, capsys):
    arguments = [str(runs / "store"), str(runs / "runs"), "--probability", "0.2", "0.6"]
    monkeypatch.setattr(sys, "argv", ["lesions_check", *arguments, "--kinds", "solid_1ml", "glass_650"])
    check.main()
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["run"], r["fold"], r["case"], r["probability"]) for r in rows] == [
        ("seed0", "0", "a", "0.2"),
        ("seed0", "0", "a", "0.6"),
        ("seed1", "1", "b", "0.2"),
        ("seed1", "1", "b", "0.6"),
    ]
    _, mask, spacing = chest()
    for row in rows:
        assert 0 <= float(row["false_ml"]) <= mask.sum() * np.prod(spacing) / 1000
        assert 0 <= float(row["solid_1ml"]) <= 100
        assert float(row["dense_ml"]) > 0
    assert float(rows[0]["false_ml"]) <= float(rows[1]["false_ml"])
    config = (runs / "runs/seed0/config.json").read_text()
    (runs / "runs/seed0/config.json").write_text(config.replace(f'"{runs}/folds.csv"', "null"))
    with pytest.raises(SystemExit, match="seed0: trained without folds, so nothing was held out"):
        check.main()


def test_a_mass_is_estimated_in_its_box(check, runs, monkeypatch, capsys):
    """A ball of 1.5 cm in a lung; whatever a network of random weights says of it."""
    nib = pytest.importorskip("nibabel")
    hu, mask, spacing = chest()
    z, y, x = np.ogrid[: hu.shape[0], : hu.shape[1], : hu.shape[2]]
    depth = ndimage.distance_transform_edt(mask, sampling=spacing)
    centre = np.unravel_index(depth.argmax(), depth.shape)
    ball = sum(((g - c) * s) ** 2 for g, c, s in zip((z, y, x), centre, spacing, strict=True)) < 7.5**2
    ill = np.where(ball, 20, np.where(mask, -860, hu)).astype(np.int16)
    file = runs / "a.nii.gz"
    nib.save(nib.Nifti1Image(ill.T, np.diag([-2.0, -2.0, 2.0, 1.0])), file)  # LPS, as arrays here are
    monkeypatch.setattr(check, "load_case", lambda path: load_with_mask(path, mask))
    box = [v for c, size in zip(centre, hu.shape, strict=True) for v in (max(c - 5, 0), min(c + 5, size - 1))]
    (runs / "masses.csv").write_text(
        "case,first_slice,last_slice,y0,y1,x0,x1,ml\n# by eye\na,"
        + ",".join(map(str, box))
        + ",1.8\nb,0,5,0,5,0,5,\n"
    )
    arguments = [str(runs / "store"), str(runs / "runs"), "--masses", str(runs / "masses.csv")]
    monkeypatch.setattr(sys, "argv", ["lesions_check", *arguments, "--scans", str(file)])
    check.main()
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["run"], row["case"], row["outlined_ml"]) == ("seed0", "a", "1.8")
    assert float(row["estimate_ml"]) == pytest.approx(ball.sum() * 0.008, abs=0.25)  # resampled to 1 x 0.8 mm
    assert 0 <= float(row["found_ml"]) <= 11**3 * 0.008 * 1.1


def load_with_mask(path: Path, mask: np.ndarray):
    """The scan with the phantom's own lungs: the lung network has nothing to do here."""
    from normnet.prepare.case import load_case

    nib = pytest.importorskip("nibabel")
    lung = path.parent / "lung.nii.gz"
    nib.save(nib.Nifti1Image(mask.astype(np.uint8).T, np.diag([-2.0, -2.0, 2.0, 1.0])), lung)
    return load_case(path, lung)
