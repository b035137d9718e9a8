"""The comparison methods of PAPER.md IV-C, against loops, integrals and finite differences."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

import lesionsynth as ls
from lesionsynth.files import sha256
from normnet import evaluate, predict
from normnet.baselines import (
    METHODS,
    PRESETS,
    BaselineConfig,
    find_lesions,
    load_baseline,
    score_volume,
    train_baseline,
)
from normnet.baselines.__main__ import main, parse
from normnet.baselines.methods import (
    Baseline,
    BayesianVAE,
    FAnoGAN,
    KLGradient,
    VAERestoration,
    build_baseline,
    cut_square,
    decoder,
    encoder,
    gaussian,
    gradient_penalty,
    mixture_terms,
    standard_kl,
    total_variation,
)
from normnet.baselines.train import (
    HEADER,
    Frame,
    batches,
    raw_anomaly,
    squash,
    training_slices,
    usable_slices,
)
from normnet.config import ModelConfig, to_json
from normnet.data import phantom_volumes, split, store_volumes
from normnet.metrics import roc_auc
from normnet.model import Model, build_unet, write_tensors
from normnet.output import read_record
from normnet.prepare.store import Store
from normnet.report import main as report

SHAPE, SPACING = (12, 88, 110), (12.0, 3.4, 3.4)


def tiny(method, output=Path("unused"), **changes):
    settings = {
        "output": output,
        "size": 32,
        "channels": (8, 16),
        "latent": 16,
        "spatial_channels": 4,
        "context_crop": 8,
        "restoration_steps": 8,
        "dropout_samples": 4,
        "iterations": 40,
        "minutes": None,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "phantoms": 3,
        "phantom_shape": SHAPE,
        "phantom_spacing": SPACING,
        "device": "cpu",
        "threads": 1,
    }
    return replace(PRESETS["small"](method), **(settings | changes))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A store of four phantoms."""
    folder = tmp_path_factory.mktemp("baselines") / "store"
    store = Store.create(folder, {"spacing": SPACING, "size": None})
    for volume in phantom_volumes(4, 0, SHAPE, SPACING):
        store.add(volume.name, *volume.read(0, SHAPE[0]))
    return folder


@pytest.fixture(scope="module")
def images(healthy):
    """Healthy slices (n, 1, 32, 32)."""
    return training_slices(store_volumes(healthy)[:1], tiny("ae")).float()


@pytest.fixture(scope="module")
def patient():
    """A phantom that was not trained on, with a bright ball in one lung."""
    chest = ls.phantom.chest_ct(shape=SHAPE, spacing=SPACING, seed=5)
    inside = np.argwhere(chest.lung_mask)
    z, y, x = inside[np.abs(inside - inside.mean(axis=0)).sum(axis=1).argmin()]
    lung_y, lung_x = np.nonzero(chest.lung_mask[z])
    left = lung_x < x
    y, x = int(lung_y[left].mean()), int(lung_x[left].mean())
    grid = np.ogrid[: SHAPE[1], : SHAPE[2]]
    ball = np.zeros(SHAPE, bool)
    ball[z - 1 : z + 2] = (grid[0] - y) ** 2 + (grid[1] - x) ** 2 <= 36
    ball &= chest.lung_mask
    assert ball.sum() > 150
    hu = chest.hu.copy()
    hu[ball] = 50
    return hu, chest.lung_mask, ball


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_saves_and_scores(method, tmp_path, patient, healthy):
    state = torch.random.get_rng_state()
    result = train_baseline(tiny(method, tmp_path, data=healthy))
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's noise is the caller's
    phase = "encoder" if method == "f_anogan" else "train"
    losses = result.losses[phase]
    assert len(losses) == 40
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["phase"] == phase]
    np.testing.assert_allclose([float(row["loss"]) for row in rows], losses, rtol=1e-4)

    hu, mask, _ = patient
    anomaly = score_volume(result.baseline, hu, mask, spacing=SPACING)
    assert anomaly.dtype == np.float32
    assert anomaly.shape == hu.shape
    assert anomaly.min() >= 0
    assert 0 < anomaly.max() <= 1
    assert not anomaly[~mask].any()
    loaded = load_baseline(tmp_path, device="cpu")
    assert loaded.calibration == result.baseline.calibration
    np.testing.assert_array_equal(score_volume(loaded, hu, mask, spacing=SPACING), anomaly)


@pytest.mark.parametrize("method", ["bayesian_vae", "f_anogan"])
def test_the_seed_decides(method, tmp_path, healthy):
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = tiny(method, Path("unused"), iterations=4, seed=seed, data=healthy)
        folder = tmp_path / name
        result = train_baseline(replace(config, output=folder))
        files.append(torch.cat([v.double().flatten() for v in result.baseline.state_dict().values()]))
    assert torch.equal(files[0], files[1])
    assert not torch.equal(files[0], files[2])


@pytest.mark.parametrize("method", ["ae", "vae"])
def test_a_blob_is_more_anomalous_than_the_lung_around_it(method, tmp_path, patient, healthy):
    result = train_baseline(tiny(method, tmp_path, iterations=150, data=healthy))
    hu, mask, ball = patient
    anomaly = score_volume(result.baseline, hu, mask, spacing=SPACING)
    assert anomaly[ball].mean() > 1.5 * anomaly[mask & ~ball].mean()
    assert roc_auc(anomaly[ball], anomaly[mask & ~ball]) > 0.75
    lesions = find_lesions(result.baseline, anomaly)
    assert lesions[ball].mean() > 5 * lesions[mask & ~ball].mean()


def test_calibration_gives_the_asked_share_of_false_positives(tmp_path, healthy):
    settings = {"iterations": 5, "false_positives": 0.03, "min_lung_cm2": 0, "data": healthy}
    baseline = train_baseline(tiny("kl_gradient", tmp_path, **settings)).baseline
    _, (held_out,) = split(store_volumes(healthy), 1, slab=1)
    hu, mask = held_out.read(0, SHAPE[0])
    anomaly = score_volume(baseline, hu, mask, spacing=SPACING)
    assert find_lesions(baseline, anomaly)[mask].mean() == pytest.approx(0.03, abs=1e-3)
    # a / (a + scale) is 1/2 where a is the scale: 95 % lie below
    assert np.mean(anomaly[mask] < 0.5) == pytest.approx(0.95, abs=1e-3)


def test_variances_stay_numbers():
    q = gaussian(torch.zeros(1, 3), torch.tensor([[-1e9, 0.5, 1e9]]))
    np.testing.assert_allclose(q.variance.log().numpy(), [[-10, 0.5, 10]], rtol=1e-5)


def law(mean, log_variance):
    return stats.norm(mean, np.exp(log_variance / 2))


def divergence(q, p):
    """KL(q || p) of laws of one number."""
    ends = q.ppf(1e-13), q.isf(1e-13)
    return integrate.quad(lambda t: q.pdf(t) * (q.logpdf(t) - p.logpdf(t)), *ends)[0]


def test_the_kl_equals_the_integral():
    means, log_variances = [0.7, -1.2, 0.0], [0.4, -1.5, 0.0]
    expected = sum(divergence(law(*one), stats.norm()) for one in zip(means, log_variances, strict=True))
    q = gaussian(*(torch.tensor([values] * 2).double() for values in (means, log_variances)))
    np.testing.assert_allclose(standard_kl(q).numpy(), [expected] * 2, rtol=1e-7)


def test_mixture_terms_equal_loops_over_densities():
    rng = np.random.default_rng(3)
    z, *q_z = rng.normal(size=(3, 2, 2))
    q_w, prior = rng.normal(size=(2, 2, 1)), rng.normal(size=(2, 2, 3, 2))
    laws = [gaussian(*map(torch.from_numpy, one)) for one in (q_z, q_w, prior)]
    of_z, of_w, of_c = (term.numpy() for term in mixture_terms(torch.from_numpy(z), *laws))
    for b in range(2):
        own = [law(q_z[0][b, i], q_z[1][b, i]) for i in range(2)]
        parts = [[law(prior[0, b, c, i], prior[1, b, c, i]) for i in range(2)] for c in range(3)]
        density = np.array([np.prod([p.pdf(z[b, i]) for i, p in enumerate(part)]) for part in parts])
        weights = density / density.sum()
        assert of_z[b] == pytest.approx(weights @ [sum(map(divergence, own, part)) for part in parts])
        assert of_w[b] == pytest.approx(divergence(law(q_w[0, b, 0], q_w[1, b, 0]), stats.norm()))
        assert of_c[b] == pytest.approx((weights * np.log(weights * 3)).sum())


def test_the_mixture_of_one_standard_gaussian_is_the_vae_s_prior():
    rng = torch.Generator().manual_seed(0)
    mean, spread, z = torch.randn(3, 4, 5, generator=rng)
    q = gaussian(mean, spread)
    prior = gaussian(torch.zeros(4, 1, 5), torch.zeros(4, 1, 5))
    of_z, of_w, of_c = mixture_terms(z, q, q, prior)
    torch.testing.assert_close(of_z, standard_kl(q))
    torch.testing.assert_close(of_w, of_z)
    assert of_c.abs().max() < 1e-6


def test_gradient_penalty_of_critics_with_known_slopes():
    rng = torch.Generator().manual_seed(1)
    real, fake = torch.rand(2, 3, 1, 4, 4, generator=rng, dtype=torch.float64)
    mix = torch.rand(3, 1, 1, 1, generator=rng, dtype=torch.float64)
    slope = torch.rand(16, 1, generator=rng, dtype=torch.float64, requires_grad=True)
    linear = gradient_penalty(lambda x: x.flatten(1) @ slope, real, fake, mix)
    expected = (slope.norm() - 1) ** 2
    assert linear.item() == pytest.approx(expected.item())
    (found,) = torch.autograd.grad(linear, slope)  # the critic learns from it
    (wanted,) = torch.autograd.grad(expected, slope)
    assert torch.allclose(found, wanted)
    quadratic = gradient_penalty(lambda x: 0.5 * x.square().flatten(1).sum(1, True), real, fake, mix)
    places = [m * r + (1 - m) * f for m, r, f in zip(mix.ravel(), real, fake, strict=True)]
    assert quadratic.item() == pytest.approx(np.mean([(float(p.norm()) - 1) ** 2 for p in places]))


def test_the_encoder_phase_leaves_generator_and_critic_alone(images):
    torch.manual_seed(0)
    model = build_baseline(tiny("f_anogan"))
    assert isinstance(model, FAnoGAN)
    gan, encoder = model.phases().values()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        encoder(images[:4])
    changed = {n.split(".")[0] for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"encoder"}
    for _ in range(model.config.critic_steps - 1):
        gan(images[:4])
    generator = [n for n, _ in model.named_parameters() if n.startswith("generator")]
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in generator)
    gan(images[:4])
    assert any(not torch.equal(model.state_dict()[n], before[n]) for n in generator)


def test_restoration_descends_its_objective_slice_by_slice(images):
    torch.manual_seed(0)
    model = VAERestoration(tiny("vae_restoration", restoration_steps=1)).eval()
    given = images[:3].clone()
    given[:, :, 10:20, 10:20] = 0.9
    values = [model.objective(given, given)]
    for steps in range(1, 9):
        model.config = replace(model.config, restoration_steps=steps)
        restored = model.normal(given)
        values.append(model.objective(restored, given))
        assert not restored.requires_grad
    path = torch.stack(values).detach()
    assert (path.diff(dim=0) <= 0).all()
    assert (path[-1] < path[0]).all()
    assert 0 <= float(restored.min()) <= float(restored.max()) <= 1
    alone = model.normal(given[1:2])
    torch.testing.assert_close(alone, restored[1:2], rtol=0, atol=1e-4)
    assert torch.equal(model.anomaly(given), (given - restored).abs())


def test_total_variation_equals_a_loop():
    image = np.random.default_rng(0).random((2, 1, 4, 5))
    expected = [
        sum(abs(i[y, x] - i[y - 1, x]) for y in range(1, 4) for x in range(5))
        + sum(abs(i[y, x] - i[y, x - 1]) for y in range(4) for x in range(1, 5))
        for i in image[:, 0]
    ]
    np.testing.assert_allclose(total_variation(torch.from_numpy(image)).numpy(), expected)


def test_the_kl_gradient_equals_finite_differences(images):
    torch.manual_seed(0)
    model = KLGradient(tiny("kl_gradient")).double().eval()
    batch, step = images[:2].double(), 1e-5
    found = model.anomaly(batch)
    for item, y, x in ((0, 12, 9), (1, 20, 22)):
        sides = []
        for sign in (1, -1):
            moved = batch.clone()
            moved[item, 0, y, x] += sign * step
            sides.append(float(standard_kl(model.encode(moved))[item].detach()))
        slope = abs(sides[0] - sides[1]) / (2 * step)
        assert slope > 0
        assert float(found[item, 0, y, x]) == pytest.approx(slope, rel=1e-4)


def test_the_consensus_is_the_mean_of_dropout_draws(images):
    torch.manual_seed(0)
    model = BayesianVAE(tiny("bayesian_vae", dropout_samples=3)).eval()
    torch.manual_seed(5)
    consensus = model.normal(images[:2])
    on = {type(module) for module in model.modules() if module.training}
    assert on == {torch.nn.Dropout2d}  # normalisation stays as it is
    model.config = replace(model.config, dropout_samples=1)
    torch.manual_seed(5)
    draws = [model.normal(images[:2]) for _ in range(3)]
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(consensus, sum(draws) / 3)


def test_a_square_is_cut_out_of_each_image():
    torch.manual_seed(0)
    images = torch.ones(20, 1, 16, 16)
    cut = cut_square(images, 5)
    assert images.all()
    assert (cut == 0).sum(dim=(1, 2, 3)).tolist() == [25] * 20
    corners = {tuple(np.argwhere(c[0].numpy() == 0)[[0, -1]].ravel()) for c in cut}
    assert all(y1 - y0 == 4 and x1 - x0 == 4 for y0, x0, y1, x1 in corners)
    assert len(corners) > 10


@pytest.mark.parametrize("residual", ["absolute", "positive"])
def test_only_brighter_than_normal_where_asked(images, residual):
    class Flipped(Baseline):
        """A method of one's own."""

        def normal(self, images):
            return images.flip(0)

    difference = images.numpy() - images.numpy()[::-1]
    wanted = np.abs(difference) if residual == "absolute" else np.maximum(difference, 0)
    found = Flipped(tiny("ae", residual=residual)).anomaly(images)
    np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize(("dropout", "norm"), [(0.0, "batch"), (0.5, "batch"), (0.0, None)])
def test_monai_s_networks_equal_torch_s_layers(images, dropout, norm):
    """The networks that Table III's numbers in this repository were made with, layer by layer."""
    config = tiny("ae")
    torch.manual_seed(0)
    down, up = encoder(config, 16, dropout=dropout, norm=norm), decoder(config, 16, dropout=dropout)
    torch.manual_seed(0)
    layers = []
    for transposed, widths in ((False, (1, 8, 16)), (True, (16, 8, 8))):
        kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
        if transposed:
            layers += [torch.nn.Flatten(), torch.nn.Linear(16 * 8 * 8, 16)]
            layers += [torch.nn.Linear(16, 16 * 8 * 8), torch.nn.Unflatten(1, (16, 8, 8))]
        for a, b in pairwise(widths):
            layers.append(kind(a, b, 4, stride=2, padding=1))
            layers += [torch.nn.BatchNorm2d(b)] if norm or transposed else []
            layers += [torch.nn.LeakyReLU(0.2), torch.nn.Dropout2d(dropout)]
    wanted = torch.nn.Sequential(*layers, torch.nn.Conv2d(8, 1, 3, padding=1), torch.nn.Sigmoid())
    pairs = []
    for network in (torch.nn.Sequential(down, up), wanted):
        torch.manual_seed(1)
        pairs.append((network(images[:4]), network.eval()(images[:4])))
    for ours, theirs in zip(*pairs, strict=True):
        assert torch.equal(ours, theirs)


def test_batches_go_through_all_slices_in_ever_new_orders():
    slices = torch.arange(5.0).view(5, 1, 1, 1)
    config = tiny("ae", batch_size=8, iterations=4, seed=3)
    drawn = torch.cat(list(batches(slices, config, torch.device("cpu")))).flatten()
    rng = torch.Generator().manual_seed(3)
    expected = torch.cat([torch.randperm(5, generator=rng) for _ in range(7)])[: 4 * 8]
    assert drawn.tolist() == expected.tolist()


def test_a_frame_puts_maps_back_where_slices_came_from():
    mask = np.zeros((2, 60, 80), bool)
    mask[:, 2:30, 40:78] = True  # the square around it reaches beyond the slice
    frame = Frame.around(mask, (1, 2, 1), 64)
    assert (frame.rows, frame.columns) == ((0, 32), (27, 91))
    slices = np.zeros((2, 60, 80), np.float32)
    slices[0, 8:12, 50:58] = 1
    slices[1] = 0.25
    reduced = frame.reduce(slices, 32)
    assert reduced.shape == (2, 1, 32, 32)
    back = frame.enlarge(reduced)
    assert back.shape == slices.shape
    assert ndcentre(back[0]) == pytest.approx((9.5, 53.5), abs=0.1)
    np.testing.assert_allclose(back[1, 1:31, 30:75], 0.25, atol=1e-6)
    assert not back[:, 32:].any()
    assert not back[:, :, :27].any()


def ndcentre(image):
    y, x = np.indices(image.shape)
    return (y * image).sum() / image.sum(), (x * image).sum() / image.sum()


@given(data=st.data())
def test_a_square_of_the_box_s_size_cuts_and_puts_back_the_same_pixels(data):
    height, width = (data.draw(st.integers(4, 20)) for _ in range(2))
    y0, x0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    y1, x1 = data.draw(st.integers(y0 + 1, height)), data.draw(st.integers(x0 + 1, width))
    mask = np.zeros((1, height, width), bool)
    mask[0, [y0, y1 - 1], [x0, x1 - 1]] = True
    side = data.draw(st.integers(1, 30))
    frame = Frame.around(mask, (1, 1, 1), side)
    side = max(side, y1 - y0, x1 - x0)
    top, left = (y0 + y1 - side) // 2, (x0 + x1 - side) // 2
    assert (frame.rows, frame.columns) == ((top, top + side), (left, left + side))
    pixels = np.arange(1, 1 + height * width, dtype=np.float32).reshape(1, height, width)
    square, back = np.zeros((side, side)), np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            if 0 <= y - top < side and 0 <= x - left < side:
                square[y - top, x - left] = back[y, x] = pixels[0, y, x]
    reduced = frame.reduce(pixels, side)
    np.testing.assert_array_equal(reduced[0, 0].numpy(), square)
    np.testing.assert_array_equal(frame.enlarge(reduced)[0], back)


def test_slices_left_out_are_not_trained_on():
    counts = np.array([0, 200, 170, 300, 400, 9, 9, 500, 90])
    volume = SimpleNamespace(spacing=SPACING, segments=[(0, 4), (7, 9)], mask_counts=counts)
    areas = volume.mask_counts * 3.4 * 3.4 / 100
    wanted = [z for z in (0, 1, 2, 3, 7, 8) if areas[z] >= 20]
    assert usable_slices(volume, 20) == wanted
    assert wanted


def test_unbounded_maps_keep_their_order():
    model = build_baseline(tiny("kl_gradient"))
    raw = np.array([0, 1e-6, 0.5, 2, 1e9], np.float32)
    np.testing.assert_allclose(squash(model, raw, 2.0), raw / (raw + 2.0), rtol=1e-6)


def test_whole_slices_give_other_scores(images, patient):
    hu, mask, _ = patient
    torch.manual_seed(0)
    model = build_baseline(tiny("ae"))
    frame = Frame.around(mask, SPACING, 320)
    lungs = raw_anomaly(model, hu, mask, frame)
    model.config = replace(model.config, lungs_only=False)
    assert not np.allclose(raw_anomaly(model, hu, mask, frame), lungs)


def test_the_command_trains_predicts_and_evaluate_reads_it(tmp_path, patient, capsys, monkeypatch):
    hu, mask, ball = patient
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    files = {"hu": hu, "lung": mask.astype(np.uint8), "lesion": ball.astype(np.uint8)}
    for role, array in files.items():
        image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine)
        (tmp_path / role).mkdir()
        nibabel.save(image, tmp_path / role / f"p1{'' if role == 'hu' else '_' + role}.nii.gz")
    run, maps = tmp_path / "run", tmp_path / "maps"
    shape = [str(n) for n in SHAPE]
    spacing = [str(s) for s in SPACING]
    flags = ["--size", "32", "--channels", "8", "16", "--latent", "16", "--iterations", "60"]
    flags += ["--phantoms", "2", "--phantom-shape", *shape, "--phantom-spacing", *spacing]
    flags += ["--threads", "1", "--device", "cpu"]
    assert main(["ae", "--output", str(run), *flags]) == 0
    assert "weights:" in capsys.readouterr().out
    assert main(["ae", "--output", str(run), *flags]) == 2  # not written over
    assert "overwrite" in capsys.readouterr().err
    call = ["predict", str(run), str(tmp_path / "hu"), "--masks", str(tmp_path / "lung"), "--threads", "1"]
    assert main([*call, "--output", str(maps)]) == 0
    names = {f"p1_{k}.nii.gz" for k in ("lesions", "probability", "lung")}
    assert {p.name for p in maps.iterdir()} == {*names, "p1.json", "volumes.csv"}
    record = read_record(maps / "p1.json")
    assert record["ct"] == str(tmp_path / "hu/p1.nii.gz")
    assert record["lungs_from"] == str(tmp_path / "lung/p1_lung.nii.gz")
    assert record["models"] == [{"name": "run", "sha256": sha256(run / "baseline.safetensors")}]
    assert (record["settings"], record["inflation"], record["warnings"]) == ({}, 1.0, [])
    threshold = load_baseline(run).calibration["threshold"]
    assert record["baseline"] == {"method": "ae", "threshold": threshold, "calibrated": True}
    stamps = {path.name: path.stat().st_mtime_ns for path in maps.glob("p1*")}
    capsys.readouterr()
    assert main([*call, "--output", str(maps)]) == 0
    assert "1 of 1 volumes segmented (1 by an earlier call)" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in maps.glob("p1*")} == stamps
    assert main([*call, "--output", str(maps), "--threshold", "0.5"]) == 2
    assert "baseline must be that of this call, or overwrite passed" in capsys.readouterr().err
    assert report([str(maps)]) == 0
    lesions = nibabel.load(maps / "p1_lesions.nii.gz")
    probability = nibabel.load(maps / "p1_probability.nii.gz").get_fdata().transpose(2, 1, 0)
    np.testing.assert_allclose(lesions.affine, affine)
    assert not probability[~mask].any()
    found = lesions.get_fdata().transpose(2, 1, 0) > 0
    clear = np.abs(1 - probability - threshold) > 1e-5
    np.testing.assert_array_equal(found[clear], ((1 - probability > threshold) & mask)[clear])
    folders = {"output": tmp_path / "results", "predictions": maps, "truth": tmp_path / "lesion"}
    config = evaluate.EvaluateConfig(**folders, ct=(tmp_path / "hu",), oracle=True, pictures=0)
    scores = evaluate.evaluate(config)
    assert scores.scores["p1"]["tp"] == np.count_nonzero(found & ball)
    assert scores.scores["p1"]["bright_auc"] > 0
    method = scores.methods["Proposed"]
    assert method.oracle_searched_on_this_test_set is not None
    assert method.threshold == f"calibrated on healthy volumes: anomaly {threshold:.4g}"
    (tmp_path / "hu" / "broken.nii.gz").write_bytes(b"no image")
    assert main([*call, "--output", str(maps)]) == 1
    assert "broken" in capsys.readouterr().err
    assert main([*call, "--masks", str(tmp_path / "lung/p1_lung.nii.gz"), "--output", str(maps)]) == 2
    assert "masks must be a folder where there are several CT" in capsys.readouterr().err
    (tmp_path / "hu" / "broken.nii.gz").unlink()
    (maps / "report.html").unlink()
    before = {path.name: path.read_bytes() for path in maps.iterdir()}
    # maps of another method, or of the other command, are not replaced unasked
    network = ModelConfig(channels=(4, 8), strides=(2,))
    Model(build_unet(network), network).save(tmp_path / "net/model.safetensors")
    normnet = [*call[2:], "--output", str(maps), "--models", str(tmp_path / "net"), "--settings.slab", "8"]
    assert predict.main(normnet) == 2
    said = capsys.readouterr().err
    assert "p1.json: settings must be that of this call, or overwrite passed: there {}, now " in said
    assert {path.name: path.read_bytes() for path in maps.iterdir()} == before
    assert predict.main([*normnet, "--overwrite"]) == 0
    assert main([*call, "--output", str(maps)]) == 2
    assert "p1.json: settings must be that of this call, or overwrite passed" in capsys.readouterr().err
    assert main([*call, "--output", str(maps), "--overwrite"]) == 0
    assert "baseline" in json.loads((maps / "p1.json").read_text())
    record = json.loads((maps / "p1.json").read_text())
    record["baseline"]["method"] = "vae"
    (maps / "p1.json").write_text(json.dumps(record))
    assert main([*call, "--output", str(maps)]) == 2
    assert "p1.json: baseline must be that of this call" in capsys.readouterr().err
    (maps / "p1.json").unlink()
    assert main([*call, "--output", str(maps)]) == 2
    assert "output holds p1_lesions.nii.gz, which is of no finished call" in capsys.readouterr().err
    assert main([*call, "--output", str(tmp_path / "none"), "--masks", str(tmp_path / "gone")]) == 2
    assert "masks must exist" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lungmask", None)
    segmented = ["predict", str(run), str(tmp_path / "hu"), "--lungs", "lungmask"]
    assert main([*segmented, "--output", str(tmp_path / "none")]) == 2
    assert "pip install lungmask" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "pca"}, "method must be 'ae', 'vae', "),
        ({"size": 30}, "size must be a multiple of 4"),
        ({"latent": 0}, "latent must be >= 1, got 0"),
        ({"kl_weight": -1.0}, "kl_weight must be >= 0, got -1.0"),
        ({"dropout": 1.0}, r"dropout must be < 1, got 1.0"),
        ({"false_positives": 0.0}, "false_positives must be > 0, got 0.0"),
        ({"minutes": 0.0}, "minutes must be > 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
        ({"phantoms": 1}, "phantoms must be > held_out=1, got 1"),
        ({"residual": "square"}, "residual must be 'absolute' or 'positive'"),
        ({"method": "context_vae", "context_crop": 32}, "context_crop must be < size=32"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny("ae"), **changes)


def test_wrong_volumes_and_files_are_refused(tmp_path, patient, healthy):
    hu, mask, _ = patient
    model = build_baseline(tiny("ae"))
    with pytest.raises(ValueError, match="baseline must be trained"):
        score_volume(model, hu, mask)
    model.calibration = {"threshold": 0.5, "scale": 1.0}
    with pytest.raises(ValueError, match="alike"):
        score_volume(model, hu, mask[1:])
    with pytest.raises(ValueError, match="empty mask"):
        score_volume(model, hu, np.zeros_like(mask))
    with pytest.raises(ValueError, match="spacing must be"):
        score_volume(model, hu, mask, spacing=(1, 0, 1))
    with pytest.raises(ValueError, match="threshold must be in"):
        find_lesions(model, np.zeros((1, 1, 1), np.float32), 1.5)
    with pytest.raises(ValueError, match="run must be a folder"):
        load_baseline(tmp_path)
    write_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="another kind of file: its header lacks the key 'normnet_baseline'"):
        load_baseline(tmp_path / "other.safetensors")
    old = {"config": json.loads(to_json(tiny("vae"))), "calibration": {}}
    write_tensors(tmp_path / "old.safetensors", {}, {HEADER: json.dumps(old)})
    message = "format must be 2, got 1, .* train it anew, `python -m normnet.baselines vae --output RUN --ov"
    with pytest.raises(ValueError, match=message):
        load_baseline(tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match="not a store"):
        train_baseline(tiny("ae", tmp_path / "run", data=tmp_path))
    with pytest.raises(ValueError, match="min_lung_cm2=100000"):
        train_baseline(tiny("ae", tmp_path / "run", min_lung_cm2=1e5, data=healthy))
    assert not (tmp_path / "run").exists()


def test_the_loss_must_stay_a_number(tmp_path, healthy):
    with pytest.raises(FloatingPointError, match="loss must be finite"):
        train_baseline(tiny("constrained_vae", tmp_path, constraint_weight=1e39, iterations=3, data=healthy))
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_paper_s_settings():
    config = PRESETS["paper"]("spatial_vae")
    assert config == BaselineConfig(method="spatial_vae")
    assert (config.latent, config.learning_rate, config.batch_size) == (128, 3e-4, 16)
    assert config.iterations == 6000
    assert (config.bottom, config.spatial_channels, config.kl_weight) == (8, 128, 1e-6)
    assert (config.context_crop, config.dropout) == (32, 0.2)
    assert PRESETS["paper"]("f_anogan").size == 64
    with torch.random.fork_rng():
        model = build_baseline(config).eval()
        q = model.encode(torch.zeros(1, 1, 128, 128))
    assert q.mean.shape == (1, 128, 8, 8)


def test_flags_change_the_preset():
    assert parse(["f_anogan", "--preset", "paper", "--seed", "3"]) == replace(
        PRESETS["paper"]("f_anogan"), seed=3
    )
    assert parse(["vae"]) == PRESETS["small"]("vae")
    with pytest.raises(ValueError, match="NAME must come first"):
        parse(["--seed", "3", "vae"])


def test_a_wrong_call_says_why(tmp_path, capsys):
    assert main(["pca"]) == 2
    assert "NAME must come first and be predict or one of ae" in capsys.readouterr().err
    assert main(["predict", str(tmp_path), str(tmp_path), "--output", str(tmp_path / "o")]) == 2
    assert "run must be a folder" in capsys.readouterr().err
