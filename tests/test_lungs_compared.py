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
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("matplotlib")
pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")

import lesionsynth as ls  # noqa: E402
from normnet import predict  # noqa: E402
from normnet.cases import hear  # noqa: E402
from normnet.config import ModelConfig  # noqa: E402
from normnet.evaluate import EvaluateConfig, evaluate, load_case  # noqa: E402
from normnet.evaluate import main as evaluate_main  # noqa: E402
from normnet.model import Model, build_unet  # noqa: E402
from normnet.pairing import CaseFiles  # noqa: E402
from normnet.prepare import load_case as load_ct  # noqa: E402
from normnet.prepare import prepare, segment_lungs  # noqa: E402
from normnet.prepare.lungs import Lungs, check_agreement, split_mask  # noqa: E402
from normnet.prepare.qc import write_picture  # noqa: E402
from normnet.report import ReportConfig, grey, report_maps  # noqa: E402
from normnet.report.__main__ import main as report_main  # noqa: E402
from normnet.report.checks import DIFFER, doubt_lungs, told  # noqa: E402
from normnet.report.slices import (  # noqa: E402
    DASH,
    DASHES,
    LESION,
    OUTLINE,
    finding_pictures,
    mark,
    shown_slices,
)
from tests.test_report import decoded  # noqa: E402
from tests.test_report_maps import edit, pictures, sections, tables, voxels, warnings_in  # noqa: E402

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


def is_dashed(picture):
    return np.logical_or.reduce([(picture == colour).all(axis=-1) for colour in DASHES])


def around(mask):
    """By a loop: voxels beside a mask and not in it."""
    found = np.zeros_like(mask)
    for y, x in np.ndindex(mask.shape):
        near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        found[y, x] = not mask[y, x] and any(
            mask[a, b] for a, b in near if 0 <= a < mask.shape[0] and 0 <= b < mask.shape[1]
        )
    return found


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


def test_pages_say_how_to_read_dashes_where_there_are_some(maps):
    sentence = "a dashed line in yellow and black"
    page = report_maps(ReportConfig(maps=maps)).path.read_text()
    assert page.count(sentence) == 1
    well = sections(page)[WELL]
    assert DIFFER not in well
    assert json.loads((maps / f"{WELL}.json").read_text())["files"]["classical"] is None
    (maps / f"{ILL}.json").unlink()
    page = report_maps(ReportConfig(maps=maps)).path.read_text()
    assert sentence not in page
    assert sections(page)[WELL] == well
    record = json.loads((maps / f"{WELL}.json").read_text())
    del record["files"]["classical"]  # as earlier versions wrote it
    (maps / f"{WELL}.json").write_text(json.dumps(record))
    assert sections(report_maps(ReportConfig(maps=maps)).path.read_text())[WELL] == well


def test_without_pictures_the_record_tells(maps):
    assert report_main([str(maps), "--pictures", "0"]) == 0
    page = (maps / "report.html").read_text()
    assert warnings_in(sections(page)[ILL]).count(recorded(maps)) == 1
    (row,) = (row for row in tables(page)[0] if row[0] == ILL)
    assert DIFFER in row[6].split(", ")
    assert "dashed" not in page


def test_thresholds_that_find_no_lung(maps):
    write_image(np.zeros(SHAPE, np.uint8), maps / f"{ILL}_classical.nii.gz")
    body = sections(report_maps(ReportConfig(maps=maps, pictures=1)).path.read_text())[ILL]
    lung = voxels(maps, ILL, "lung")[0]
    ml = lung.sum() * np.prod(SPACING) / 1000
    assert any(f"find no lung where the lung network has {ml:,.0f} ml" in text for text in warnings_in(body))
    caption = pictures(body)[0][0]
    areas = lung.sum(axis=(1, 2))
    assert int(caption.split()[1]) == areas.argmax()
    assert caption.endswith("0.0 cm² within the dashed one alone")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "no such file or folder"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "damaged or truncated gzip file"),
        (lambda path: write_image(np.ones((4, 5, 6), np.uint8), path), "the mask's shape must be that of"),
        (
            lambda path: write_image(np.ones(SHAPE, np.uint8), path, (4.0, 3.0, 3.2)),
            "must lie on the grid of",
        ),
    ],
)
def test_without_the_second_outline_a_case_is_shown(maps, damage, reason):
    """It is there to compare; what was found does not depend on it."""
    damage(maps / f"{ILL}_classical.nii.gz")
    assert report_main([str(maps), "--pictures", "1"]) == 0
    page = (maps / "report.html").read_text()
    body = sections(page)[ILL]
    assert len(pictures(body)) == 3
    assert "dashed" not in page
    assert not any(is_dashed(p[:, p.shape[1] // 2 + 3 :]).any() for _, p in pictures(body)[:1])
    said = warnings_in(body)
    (why,) = (text for text in said if text.startswith("The lungs by thresholds are not drawn: "))
    assert reason in why
    assert f"{ILL}_classical.nii.gz" in why
    assert said.count(recorded(maps)) == 1
    (row,) = (row for row in tables(page)[0] if row[0] == ILL)
    assert {DIFFER, "no second outline"} <= set(row[6].split(", "))


def test_maps_that_are_needed_fail_all_the_same(maps):
    (maps / f"{ILL}_lung.nii.gz").unlink()
    edit(maps, WELL, warnings=["something else"])
    result = report_maps(ReportConfig(maps=maps))
    assert list(result.failures) == [ILL]
    bodies = sections(result.path.read_text())
    assert recorded(maps) in warnings_in(bodies[ILL])
    assert "something else" in warnings_in(bodies[WELL])


@pytest.mark.parametrize("found", [np.zeros(SHAPE, bool), LUNGS.right])
def test_the_warning_of_the_check_is_known_by_its_words(found):
    with hear() as said:
        assert not check_agreement(CHEST.lung_mask, found, SPACING)
    assert [concern.tag for concern in told([*said, "the lungs have 11000 ml"])] == [DIFFER, "warned of"]


@given(seed=st.integers(0, 500), share=st.floats(0, 1))
def test_volumes_that_one_has_alone(seed, share):
    rng = np.random.default_rng(seed)
    lung, classical = rng.random((2, 3, 5, 7)) < [[[[0.6]]], [[[share]]]]
    more = less = 0
    for a, b in zip(lung.ravel(), classical.ravel(), strict=True):
        more, less = more + (a and not b), less + (b and not a)
    text = doubt_lungs(lung, classical, 100.0).text
    if classical.any():
        assert f"by {(more + less) * 100:,.0f} ml: {more * 100:,.0f} ml" in text
        assert f" alone, {less * 100:,.0f} ml to those" in text
    else:
        assert f"network has {more * 100:,.0f} ml." in text


@given(seed=st.integers(0, 500), count=st.integers(0, 4), ill=st.booleans())
def test_the_slice_that_differs_most_is_among_those_shown(seed, count, ill):
    rng = np.random.default_rng(seed)
    lung = rng.random((14, 4, 5)) < 0.6
    classical = lung & (rng.random(lung.shape) < rng.random((14, 1, 1)))
    lesions = lung & (rng.random(lung.shape) < 0.3 * ill * rng.random((14, 1, 1)))
    without, shown = shown_slices(lesions, lung, count), shown_slices(lesions, lung, count, classical)
    assert len(shown) == len(set(shown)) <= count
    apart = np.count_nonzero(lung ^ classical, axis=(1, 2))
    if not count:
        assert shown == []
        return
    assert apart[shown].max() == apart.max()
    # it takes the place of the one with least lesion, and of none where there is room
    added = [z for z in shown if z not in without]
    assert len(added) <= 1
    assert shown == without or shown == [*without[: count - 1], *added]


@given(seed=st.integers(0, 500))
def test_two_outlines_voxel_by_voxel(seed):
    rng = np.random.default_rng(seed)
    lung, classical, lesions = np.zeros((3, 12, 13), bool)
    y, x = rng.integers(0, 8, 2)
    lung[y : y + 5, x : x + 6] = True
    classical[y : y + rng.integers(1, 6), x : x + rng.integers(1, 8)] = True
    lesions[lung] = rng.random(lung.sum()) < 0.3
    background = grey(rng.integers(-1000, 100, lung.shape), (-1100, 200))
    before = background.copy()
    picture = mark(background, lesions, lung, classical)
    np.testing.assert_array_equal(background, before)
    first, second = around(lung), around(classical)
    for y, x in np.ndindex(lung.shape):
        if first[y, x]:
            expected = OUTLINE  # where both are one, too
        elif second[y, x]:
            expected = DASHES[(y // DASH + x // DASH) % 2]
        elif lesions[y, x]:
            expected = 0.55 * background[y, x] + 0.45 * np.array(LESION)
        else:
            expected = background[y, x]
        assert np.abs(picture[y, x] - np.asarray(expected, float)).max() <= 0.5 + 1e-9  # whole greys
    np.testing.assert_array_equal(mark(background, lesions, lung), mark(background, lesions, lung, lung))


def test_what_lies_beyond_the_lungs_that_were_searched_is_shown():
    lung, classical = np.zeros((2, 3, 40, 60), bool)
    lung[:, 15:25, 10:20] = classical[:, 15:25, 10:50] = True
    ((z, data),) = finding_pictures(
        np.where(lung, -850, 40), np.zeros_like(lung), lung, (5.0, 1.0, 1.0), count=1, classical=classical
    )
    assert z == 0
    picture = decoded(data)
    scale = picture.shape[0] // 22  # 10 and a margin of 6 on each side
    assert picture.shape[1] == scale * (2 * 52 + 3)
    dashes = is_dashed(picture[:, (52 + 3) * scale :])
    assert dashes[::scale, ::scale].sum() == 2 * 30 + 10  # its upper and lower side, and its end


def drawn(path, **more):
    hu, mask = consolidated(), CHEST.lung_mask
    write_picture(path, hu, mask, np.zeros_like(mask), spacing=SPACING, segments=[(0, 20)], title="t", **more)
    return decoded(path.read_bytes())


def test_qc_pictures_have_a_second_outline_and_a_legend(tmp_path):
    def yellow(picture):
        return (picture[..., :2].min(axis=-1) > 180) & (picture[..., 2] < 60)

    plain = drawn(tmp_path / "a.png")
    both = drawn(tmp_path / "b.png", classical=segment_lungs(consolidated(), SPACING))
    top, right = plain.shape[0] // 12, plain.shape[1] * 9 // 10
    assert not yellow(plain).any()
    assert yellow(both)[top:].any()
    # a cyan line covers the dashes where both are one
    same = drawn(tmp_path / "c.png", classical=CHEST.lung_mask)
    for picture in (both, same):
        assert yellow(picture)[:top, right:].any()
    leak = same[top:, :, 1].astype(int) - same[top:, :, 2]
    assert leak.max() < 60  # cyan and grey have as much green as blue; antialiased rims a little more


@pytest.mark.parametrize("task", ["lesions", "lungs"])
def test_prepare_draws_both_and_tells(study, tmp_path, monkeypatch, task):
    seen = {}

    def picture(path, hu, mask, removed, **more):
        seen.update(more, mask=mask)
        write_picture(path, hu, mask, removed, **more)

    monkeypatch.setattr("normnet.prepare.work.write_picture", picture)
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
    """CT, truth and prediction of both cases, without lungs."""
    for case in (ILL, WELL):
        truth = (LUNGS.left & (consolidated() > -100)).astype(np.uint8)
        write_image(truth, root / f"truth/{case}.nii.gz")
        (root / "pred").mkdir(exist_ok=True)
        shutil.copy(study / f"maps/{case}_lesions.nii.gz", root / "pred")
    return {"predictions": (root / "pred",), "truth": (root / "truth",), "ct": (study / "scans",)}


def test_lungs_to_score_in_are_the_networks(study, tmp_path):
    paths = places(study, tmp_path)
    weights = str(study / "mine")
    with stubbed():
        evaluation = evaluate(EvaluateConfig(output=tmp_path / "out", **paths, segment=weights, pictures=0))
    document = json.loads((tmp_path / "out/results.json").read_text())
    for case in (ILL, WELL):
        notes = evaluation.scores[case]["notes"]
        assert "lungs segmented by the lung network mine: none were given" in notes
        assert document["cases"][case]["notes"] == notes
    asked = document["settings"]["segment"]
    assert asked["lungs_from"] == "mine"
    assert len(asked["lungs_sha256"]) == 64
    files = CaseFiles(
        case=ILL,
        ct=study / f"scans/{ILL}.nii.gz",
        lesion=tmp_path / f"truth/{ILL}.nii.gz",
        prediction=tmp_path / f"pred/{ILL}_lesions.nii.gz",
    )
    with stubbed():
        np.testing.assert_array_equal(load_case(files, segment=weights).lung_mask, CHEST.lung_mask)
    by_thresholds = load_case(files, segment="classical")
    np.testing.assert_array_equal(by_thresholds.lung_mask, segment_lungs(consolidated(), SPACING))
    assert by_thresholds.notes == ("lungs segmented by thresholds: none were given",)


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
        output=tmp_path / "out", **places(study, tmp_path), segment=str(study / "mine"), pictures=0
    )
    with stubbed(whole):
        evaluation = evaluate(config)
    assert not evaluation.scores
    assert all("lungs must have more than 0 and at most" in str(one) for one in evaluation.failures)
    with stubbed(Lungs(CHEST.lung_mask, np.zeros(SHAPE, bool))):
        evaluation = evaluate(config)
    assert any("is one collapsed" in note for note in evaluation.scores[WELL]["notes"])


def test_no_method_is_told_before_any_case_and_only_where_one_is_needed(study, tmp_path, capsys):
    paths = places(study, tmp_path)
    call = [text for name, (path,) in paths.items() for text in (f"--{name}", str(path))]
    call += ["--output", str(tmp_path / "out"), "--segment", "by hand", "--pictures", "0"]
    assert evaluate_main(call) == 2
    assert "segment: lungs must be network, classical, lungmask" in capsys.readouterr().err
    assert not (tmp_path / "out/results.json").exists()
    # the prediction's own lungs
    for case in (ILL, WELL):
        shutil.copy(study / f"maps/{case}_lung.nii.gz", tmp_path / "pred")
    assert evaluate_main(call) == 0
    document = json.loads((tmp_path / "out/results.json").read_text())
    assert document["settings"]["segment"] is None
    assert not any("segmented" in note for note in document["cases"][ILL]["notes"])
