"""Lungs by the network beside those by thresholds: on pages, in QC pictures, and where lungs are scored.

A stub stands for the network: it knows the phantom's lungs, whatever fills them. The thresholds are real.
"""

from __future__ import annotations

import csv
import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("matplotlib")
pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")

import lesionsynth as ls  # noqa: E402
from normnet import predict  # noqa: E402
from normnet.cases import hear  # noqa: E402
from normnet.config import ModelConfig  # noqa: E402
from normnet.draw import OUTLINE, prepared_picture  # noqa: E402
from normnet.evaluate import EvaluateConfig, evaluate  # noqa: E402
from normnet.evaluate import main as evaluate_main  # noqa: E402
from normnet.model import Model, build_unet  # noqa: E402
from normnet.prepare import load_case as load_ct  # noqa: E402
from normnet.prepare import prepare, segment_lungs  # noqa: E402
from normnet.prepare.lungs import Lungs, split_mask  # noqa: E402
from normnet.report import DIFFER, ReportConfig, report_maps  # noqa: E402
from tests.normnet.test_draw import is_dashed  # noqa: E402
from tests.normnet.test_report import pictures, sections, tables, voxels, warnings_in  # noqa: E402

SHAPE, SPACING = (20, 48, 64), (4.0, 3.0, 3.0)
ILL, WELL = "ill", "well"
CHEST = ls.phantom.chest_ct(shape=SHAPE, spacing=SPACING, seed=1)
LUNGS = split_mask(CHEST.lung_mask, SPACING)


def consolidated():
    """The lower half of the left lung as dense as tissue: thresholds find nothing of it."""
    inside = np.flatnonzero(LUNGS.left.any(axis=(1, 2)))
    dense = LUNGS.left.copy()
    dense[inside[len(inside) // 2] :] = False
    noise = np.random.default_rng(0).normal(0, 20, SHAPE)
    return np.where(dense, 30 + noise, CHEST.hu).astype(np.int16)


@contextmanager
def stubbed(found=LUNGS):
    """A network that finds these lungs in every scan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normnet.prepare.network.lung_network", lambda path: None)
        patch.setattr("normnet.prepare.network.split_by_network", lambda hu, spacing, network: found)
        yield


def write_image(array, path, spacing=SPACING):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two scans, maps of them, and a file in place of weights for the stub."""
    root = tmp_path_factory.mktemp("study")
    write_image(consolidated(), root / f"scans/{ILL}.nii.gz")
    write_image(CHEST.hu, root / f"scans/{WELL}.nii.gz")
    (root / "mine").mkdir()
    (root / "mine/model.safetensors").write_bytes(b"stub")
    config = ModelConfig(channels=(4, 8), strides=(2,))
    model = build_unet(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every probability is 0.5: nothing is healthy
    Model(model, config).save(root / "models/run/model.safetensors")
    call = [str(root / "scans"), "--models", str(root / "models"), "--lungs", str(root / "mine")]
    call += ["--output", str(root / "maps"), "--threads", "1", "--settings.slab", "16"]
    with stubbed():
        assert predict.main(call) == 0
    return root


@pytest.fixture
def maps(study, tmp_path):
    """A copy of the maps that a test may damage."""
    shutil.copytree(study / "maps", tmp_path / "maps")
    return tmp_path / "maps"


def recorded(maps):
    (text,) = (w for w in json.loads((maps / f"{ILL}.json").read_text())["warnings"] if "thresholds" in w)
    return text


def of_both(maps):
    return voxels(maps, ILL, "lung")[0], voxels(maps, ILL, "classical")[0]


def test_the_page_tells_in_ml_and_shows_where(maps):
    page = report_maps(ReportConfig(maps=maps)).path.read_text()
    lung, classical = of_both(maps)
    ml = np.prod(SPACING) / 1000
    more, less = (lung & ~classical).sum() * ml, (classical & ~lung).sum() * ml
    assert more > 150  # what was painted
    body = sections(page)[ILL]
    (said,) = (text for text in warnings_in(body) if "thresholds" in text.lower())
    assert f"differ by {more + less:,.0f} ml: {more:,.0f} ml belong to the network's lungs alone" in said
    assert f"{less:,.0f} ml to those by thresholds" in said
    assert recorded(maps) not in page
    (row,) = (row for row in tables(page)[0] if row[0] == ILL)
    assert row[6].split(", ").count(DIFFER) == 1
    assert "warned of" not in row[6]

    slices = [(int(text.split()[1]), text, p) for text, p in pictures(body) if text.startswith("slice ")]
    assert len(slices) == 3
    apart = np.count_nonzero(lung ^ classical, axis=(1, 2))
    ((z, caption, picture),) = (one for one in slices if "outlines differ most" in one[1])
    assert apart[z] == apart.max()
    cm2 = SPACING[1] * SPACING[2] / 100
    one, other = (m[z].sum() * cm2 for m in (lung & ~classical, classical & ~lung))
    assert caption.endswith(
        f"differ most: {one:.1f} cm² lie within the blue one alone, {other:.1f} cm² within the dashed one "
        "alone"
    )
    right = picture[:, picture.shape[1] // 2 + 3 :]
    assert is_dashed(right).any()
    assert (right == OUTLINE).all(axis=-1).any()


@pytest.mark.parametrize("task", ["lesions", "lungs"])
def test_prepare_draws_both_and_tells(study, tmp_path, monkeypatch, task):
    seen = {}

    def picture(hu, mask, removed, **more):
        seen.update(more, mask=mask)
        return prepared_picture(hu, mask, removed, **more)

    monkeypatch.setattr("normnet.prepare.run.prepared_picture", picture)
    (tmp_path / "exclude.csv").write_text(f"case,first_slice,last_slice\n{ILL},0,5\n")
    with stubbed():
        summary = prepare(
            [study / f"scans/{ILL}.nii.gz"],
            tmp_path / "store",
            lungs=str(study / "mine"),
            task=task,
            spacing=(4.0, 3.0, 3.0),
            size=80,
            exclude=tmp_path / "exclude.csv",
        )
    with stubbed(), hear():
        loaded = load_ct(
            study / f"scans/{ILL}.nii.gz", lungs=str(study / "mine"), spacing=(4.0, 3.0, 3.0), size=80
        )
    (case,) = summary.cases
    assert case.status == "prepared", case.message
    assert (tmp_path / f"store/qc/{ILL}.png").read_bytes()[:4] == b"\x89PNG"
    classical = seen["classical"]
    assert classical.shape == seen["mask"].shape
    assert classical.dtype == bool
    meta = json.loads((tmp_path / f"store/cases/{ILL}/meta.json").read_text())
    used = np.zeros(len(classical), bool)
    for first, last in meta["segments"]:
        used[first:last] = True
    assert not used.all()
    assert not classical[~used].any()
    if task == "lesions":
        np.testing.assert_array_equal(classical[used], loaded.grid.to_iso(loaded.native_classical)[used])
    else:
        # coarse voxels of about the scan's own size: as many ml, to a rim of a voxel
        ml = classical.sum() * np.prod(meta["spacing"])
        depth = np.flatnonzero(used)[0] * meta["spacing"][0]
        kept = loaded.native_classical[int(np.ceil(depth / SPACING[0])) :]
        assert ml == pytest.approx(kept.sum() * np.prod(SPACING), rel=0.1)
    assert "ml that thresholds have not" in case.message
    assert case.message in summary.table()
    with (tmp_path / "store/summary.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert "ml that thresholds have not" in row["message"]
    assert row["lungs_from"] == "mine"

    prepare([study / f"scans/{ILL}.nii.gz"], tmp_path / "other", lungs="classical", size=80, spacing=SPACING)
    assert seen["classical"] is None


def places(study, root):
    """CT, truth and prediction of both cases, without lungs and records."""
    for case in (ILL, WELL):
        truth = (LUNGS.left & (consolidated() > -100)).astype(np.uint8)
        write_image(truth, root / f"truth/{case}.nii.gz")
        (root / "pred").mkdir(exist_ok=True)
        shutil.copy(study / f"maps/{case}_lesions.nii.gz", root / "pred")
    return {"predictions": root / "pred", "truth": root / "truth", "ct": (study / "scans",)}


def bright(scores):
    return scores["bright_healthy_voxels"] + scores["bright_lesion_voxels"]


def test_lungs_to_score_in_are_the_networks(study, tmp_path):
    paths = places(study, tmp_path)
    weights = str(study / "mine")
    with stubbed():
        evaluation = evaluate(EvaluateConfig(output=tmp_path / "out", **paths, lungs=weights, pictures=0))
    document = json.loads((tmp_path / "out/results.json").read_text())
    for case in (ILL, WELL):
        notes = evaluation.scores[case]["notes"]
        assert "lungs segmented by the lung network mine: none were given" in notes
        assert document["cases"][case]["notes"] == notes
    asked = document["settings"]["lungs"]
    assert asked["lungs_from"] == "mine"
    assert len(asked["lungs_sha256"]) == 64
    hu = consolidated()
    assert bright(evaluation.scores[ILL]) == (CHEST.lung_mask & (hu >= -500)).sum()
    classical = evaluate(EvaluateConfig(output=tmp_path / "out", **paths, lungs="classical", pictures=0))
    lungs = segment_lungs(hu, SPACING)
    assert bright(classical.scores[ILL]) == (lungs & (hu >= -500)).sum() != bright(evaluation.scores[ILL])
    assert "lungs segmented by thresholds: none were given" in classical.scores[ILL]["notes"]


def test_network_is_what_segments_where_nothing_is_said(study, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("normnet.evaluate.method_record", lambda lungs: {"lungs_from": lungs})
    monkeypatch.setattr("normnet.evaluate.method_of", lambda lungs: asked.append(lungs) or (lambda *_: LUNGS))
    evaluation = evaluate(EvaluateConfig(output=tmp_path / "out", **places(study, tmp_path), pictures=0))
    assert set(asked) == {"network"}
    assert "lungs segmented by the lung network: none were given" in evaluation.scores[ILL]["notes"]


def test_lungs_that_nobody_has_are_no_lungs_to_score_in(study, tmp_path):
    whole = Lungs(np.ones(SHAPE, bool), np.zeros(SHAPE, bool))
    config = EvaluateConfig(
        output=tmp_path / "out", **places(study, tmp_path), lungs=str(study / "mine"), pictures=0
    )
    with stubbed(whole):
        evaluation = evaluate(config)
    assert not evaluation.scores
    assert all("lungs must have more than 0 and at most" in one.reason for one in evaluation.failures)
    assert len(evaluation.failures) == 2
    with stubbed(Lungs(CHEST.lung_mask, np.zeros(SHAPE, bool))):
        evaluation = evaluate(config)
    assert any("is one collapsed" in note for note in evaluation.scores[WELL]["notes"])


def test_no_method_is_told_before_any_case(study, tmp_path, capsys):
    paths = places(study, tmp_path)
    call = ["--predictions", str(paths["predictions"]), "--truth", str(paths["truth"])]
    call += ["--ct", str(study / "scans"), "--output", str(tmp_path / "out")]
    call += ["--lungs", "by hand", "--pictures", "0"]
    assert evaluate_main(call) == 2
    assert "lungs must be network, classical, lungmask" in capsys.readouterr().err
    assert not (tmp_path / "out/results.json").exists()
    # the prediction's own lungs
    for case in (ILL, WELL):
        for name in (f"{case}_lung.nii.gz", f"{case}.json"):
            shutil.copy(study / "maps" / name, tmp_path / "pred")
    assert evaluate_main(call) == 2  # who means masks must not be scored by other lungs unawares
    assert "lungs must be network, classical, lungmask" in capsys.readouterr().err
    call[call.index("by hand")] = "classical"
    assert evaluate_main(call) == 0
    document = json.loads((tmp_path / "out/results.json").read_text())
    assert document["settings"]["lungs"] is None
    assert not any("segmented" in note for note in document["cases"][ILL]["notes"])
