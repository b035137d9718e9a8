"""Pages: text stays text, nothing is fetched; of folders of maps, with the numbers of the written files.

Oracles read the page with html.parser, the maps with nibabel and the CT with SimpleITK.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("matplotlib")
nibabel = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")


import lesionsynth as ls  # noqa: E402
from lesionsynth.io import read_ct  # noqa: E402
from normnet import predict  # noqa: E402
from normnet import report as report_module  # noqa: E402
from normnet.cases import hear  # noqa: E402
from normnet.config import ModelConfig  # noqa: E402
from normnet.draw import LESION, LUNG_WINDOW, OUTLINE, curve, png  # noqa: E402
from normnet.model import Model, build_unet  # noqa: E402
from normnet.output import write_case  # noqa: E402
from normnet.prepare.lungs import check_agreement  # noqa: E402
from normnet.report import (  # noqa: E402
    DIFFER,
    Page,
    ReportConfig,
    check_page,
    doubt_lungs,
    doubt_maps,
    doubt_numbers,
    lungs_told,
    main,
    report_maps,
    told,
)
from tests.normnet.test_draw import decoded, is_dashed  # noqa: E402

BLACK = png(np.zeros((2, 2, 3), np.uint8))


def test_a_page_is_one_file_that_fetches_nothing(tmp_path):
    page = Page("A <b> & title")
    page.heading("Numbers")
    page.table(pd.DataFrame([["x & y", 1.5]], columns=["case", "DSC"]))
    page.legend()
    page.picture(BLACK, 'caption "quoted" <i>')
    page.picture(curve({"a": (np.arange(3), np.arange(3.0))}, xlabel="x", ylabel="y"), "curve", width=70)
    written = page.write(tmp_path / "deep" / "report.html").read_text()
    assert written.startswith("<!doctype html>")
    assert written.endswith("</html>")
    assert "A &lt;b&gt; &amp; title" in written
    assert "<td>x &amp; y</td><td>1.5</td>" in written
    assert "<i>" not in written
    assert written.count('width="70"') == 1
    sources = re.findall(r'src="([^"]*)"', written)
    assert len(sources) == 2
    for source in sources:
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?://|<script|<link|@import|url\(", written)
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "report.html"]


class Parsed(HTMLParser):
    """What a browser would see: every tag with its attributes, and the text in it; style aside."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[list[str]] = [[]]
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), []))
        if tag not in ("meta", "img"):
            self.open.append(self.tags[-1][2])

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].append(data)

    def texts(self, *tags):
        return ["".join(text) for tag, _, text in self.tags if tag in tags]


HOSTILE = (
    "<script>alert(1)</script>", "</title></style></td></section>", '" onerror="x', "' id='x", "&amp;",
    "&#60;", "{{ 1 }}", "{% raw %}", "<!--", "]]>", "a\nb\r\nc", "\udcff\ud800", "\0", "\u202e",
)  # fmt: skip
TEXTS = st.lists(
    st.text(st.characters(codec=None), max_size=9) | st.sampled_from(HOSTILE), min_size=13, max_size=13
)


@given(texts=TEXTS | st.sampled_from(HOSTILE).map(lambda text: [text] * 13))
def test_whatever_a_text_says_it_stays_text(tmp_path_factory, texts):
    """Names of cases, files and methods are what somebody else wrote."""
    title, heading, section, text, note, warning, caption, anchor, *cells = texts
    page = Page(title)
    page.heading(heading)
    page.paragraph(text)
    page.paragraph(note, note=True)
    page.warning(warning)
    header = pd.Index([cells[0], cells[0]], dtype=object)  # a name may come twice
    page.table(pd.DataFrame([cells[1:3], cells[3:5]], columns=header, dtype=object), anchors=[anchor, None])
    page.heading(section, anchor=anchor)
    page.picture(BLACK, caption)
    path = page.write(tmp_path_factory.mktemp("page") / "page.html")
    parsed = Parsed(path.read_bytes().decode())

    def shown(*texts):
        return [text.encode("utf-8", "backslashreplace").decode() for text in texts]

    assert parsed.texts("title", "h1") == shown(title, title)
    assert parsed.texts("h2") == shown(heading, section)
    assert parsed.texts("p") == shown(text, note, warning)
    assert parsed.texts("th") == shown(cells[0], cells[0])
    assert parsed.texts("td", "a") == ["", *shown(*cells[1:5])]  # the first cell holds a link alone
    assert parsed.texts("figcaption") == shown(caption)
    attributes = [attributes for _, attributes, _ in parsed.tags]
    (picture,) = (a for tag, a, _ in parsed.tags if tag == "img")
    data = f"data:image/png;base64,{base64.b64encode(BLACK).decode()}"
    assert picture == {"alt": shown(caption)[0], "src": data}
    assert [a for a in attributes if "id" in a] == [{"id": shown(anchor)[0]}]
    assert [a for a in attributes if "href" in a] == [{"href": shown(f"#{anchor}")[0]}]
    assert {tag for tag, *_ in parsed.tags} == {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "tr", "th", "td",
        "a", "section", "figure", "img", "figcaption",
    }  # fmt: skip
    assert {name for a in attributes for name in a} == {
        "lang", "charset", "name", "content", "class", "id", "href", "alt", "src",
    }  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_a_page_is_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    written = Page("t").write(tmp_path / "report.html")
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode


FOREIGN = {
    "empty": lambda path: path.touch(),
    "another page": lambda path: path.write_text("<!doctype html><html><head><title>mine</title>"),
    "a text about ours": lambda path: path.write_text(f"{'x' * 200}{report_module.MARK.decode()}"),
    "a folder": lambda path: path.mkdir(),
    "a link to ours": lambda path: path.symlink_to(Page("t").write(path.with_name("ours.html"))),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_nothing_but_a_page_of_ours_is_written_over(tmp_path, what):
    path = tmp_path / "report.html"
    FOREIGN[what](path)
    before = {p.name: (p.lstat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"output must be a new file or an earlier page, got .*report\.html"):
        Page("new").write(path)
    assert before == {
        p.name: (p.lstat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in tmp_path.iterdir()
    }


def test_an_earlier_page_is_replaced(tmp_path):
    check_page(tmp_path / "report.html")
    Page("first").write(tmp_path / "report.html")
    assert "<h1>second</h1>" in Page("second").write(tmp_path / "report.html").read_text()
    # as the first version wrote it
    old = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="generator" content="normnet">'
    )
    (tmp_path / "report.html").write_text(f"{old}<title>t</title>")
    check_page(tmp_path / "report.html")


SHAPE, SPACING, ORIGIN = (20, 56, 72), (2.0, 1.6, 1.6), (-30.0, 12.0, -77.0)
HARD, MILD, WELL = 'b <i>hard & "odd"', "a_mild", "c_well"  # the order of names is another


def write_image(array, path, spacing=SPACING):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(ORIGIN)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """Two ill phantoms and one whose lungs hold nothing bright, predicted by a network without knowledge."""
    root = tmp_path_factory.mktemp("predicted")
    for seed, (case, severity) in enumerate([(HARD, 0.5), (MILD, 0.1), (WELL, 0.0)]):
        chest = ls.phantom.chest_ct(shape=SHAPE, spacing=SPACING, seed=seed)
        lung, hu = chest.lung_mask, chest.hu
        if severity:
            hu = ls.phantom.add_pneumonia(hu, lung, SPACING, seed=seed, severity=severity).hu
        else:
            hu = np.where(lung, -850, hu).astype(np.int16)
        write_image(hu, root / "scans" / f"{case}.nii.gz")
        write_image(lung.astype(np.uint8), root / "masks" / f"{case}_lung.nii.gz")
    config = ModelConfig(channels=(4, 8), strides=(2,))
    model = build_unet(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every probability is 0.5: nothing is healthy
    Model(model, config).save(root / "models/run7/model.safetensors")
    call = [str(root / "scans"), "--models", str(root / "models"), "--masks", str(root / "masks")]
    call += ["--output", str(root / "maps"), "--threads", "1", "--settings.slab", "16"]
    call += ["--settings.postprocess.growth-iterations", "3"]
    assert predict.main(call) == 0
    return root


@pytest.fixture
def maps(predicted, tmp_path):
    """A copy of the maps that a test may damage; the CT stay where they are."""
    shutil.copytree(predicted / "maps", tmp_path / "maps")
    return tmp_path / "maps"


def edit(maps, case, **entries):
    path = maps / f"{case}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def voxels(maps, case, kind):
    """A map in (z, y, x) order as another reader reads it; and the volume of a voxel in ml."""
    image = nibabel.load(maps / f"{case}_{kind}.nii.gz")
    return np.asarray(image.dataobj).T > 0, abs(np.linalg.det(image.affine[:3, :3])) / 1000


def tables(page):
    """Text of the cells of every table."""
    found = []
    for table in re.findall(r"<table>(.*?)</table>", page):
        rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
        found.append([[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in rows])
    return found


def sections(page):
    """HTML of every case's section, by its name."""
    found = re.findall(r'<section id="case-\d+"><h2>(.*?)</h2>(.*?)</section>', page)
    return {html.unescape(name): body for name, body in found}


def pictures(body):
    """Captions and pixels of the pictures in a section."""
    found = re.findall(r'<img[^>]*src="data:image/png;base64,([^"]*)"><figcaption>(.*?)</figcaption>', body)
    return [(html.unescape(caption), decoded(base64.b64decode(data))) for data, caption in found]


def warnings_in(body):
    return [html.unescape(text) for text in re.findall(r"<p class=warning>(.*?)</p>", body)]


def test_numbers_are_those_of_the_written_files(maps):
    result = report_maps(ReportConfig(maps=maps))
    assert result.path == maps / "report.html"
    assert result.failures == {}
    assert result.cases == [HARD, MILD, WELL]
    page = result.path.read_text()
    summary, made, *of_cases = tables(page)
    assert [row[0] for row in summary[1:]] == [HARD, MILD, WELL]
    for row, own in zip(summary[1:], of_cases, strict=True):
        (lesions, ml), (lung, _) = (voxels(maps, row[0], kind) for kind in ("lesions", "lung"))
        middle = np.flatnonzero(~lung.any(axis=(0, 1))[20:52]).mean() + 20  # the gap between the lungs
        right = lung & (np.arange(SHAPE[2]) < middle)
        parts = [lung, right, lung & ~right]
        share = [f"{100 * (lesions & part).sum() / part.sum():.2f}" for part in parts]
        assert row[1:6] == [f"{lung.sum() * ml:.1f}", f"{lesions.sum() * ml:.2f}", *share]
        assert [line[0] for line in own[1:]] == ["both", "right", "left"]
        for line, part, percent in zip(own[1:], parts, share, strict=True):
            assert line[1:] == [f"{part.sum() * ml:.1f}", f"{(lesions & part).sum() * ml:.2f}", percent]
        assert "lung volume" in row[6]  # a chest of a few centimetres
    assert made[1:] == [["run7 (0.95 from -500 HU)", "3 steps", "mask files", ls.__version__, "3"]]
    assert "3 cases in" in page
    assert "2 with lesions" in page
    assert not voxels(maps, WELL, "lesions")[0].any()
    assert f"Lungs: mask file {json.loads((maps / f'{WELL}.json').read_text())['lungs_from']}." in page


def test_pictures_show_the_voxels_of_the_worst_slice(predicted, maps):
    result = report_maps(ReportConfig(maps=maps, pictures=2))
    shown = pictures(sections(result.path.read_text())[HARD])
    assert len(shown) == 4  # two slices, histogram, curve
    (lesions, _), (lung, _) = (voxels(maps, HARD, kind) for kind in ("lesions", "lung"))
    hu = sitk.GetArrayFromImage(sitk.ReadImage(str(predicted / "scans" / f"{HARD}.nii.gz")))
    areas = lesions.sum(axis=(1, 2))
    caption, picture = shown[0]
    worst = int(caption.split()[1])
    assert areas[worst] == areas.max()
    cm2, z_mm = areas[worst] * SPACING[1] * SPACING[2] / 100, ORIGIN[2] + worst * SPACING[0]
    share = 100 * areas[worst] / lung[worst].sum()
    assert caption == (
        f"slice {worst} of 0–19 from the feet, z = {z_mm:.1f} mm: lesions {cm2:.1f} cm², "
        f"{share:.1f} % of the lungs in it"
    )
    inside = np.argwhere(lung)
    (top, left), (bottom, right) = (
        np.maximum(inside.min(axis=0)[1:] - 6, 0),
        np.minimum(inside.max(axis=0)[1:] + 7, SHAPE[1:]),
    )
    width, height = right - left, bottom - top
    scale = picture.shape[0] // height
    assert picture.shape == (height * scale, (2 * width + 3) * scale, 3)
    low, high = LUNG_WINDOW
    seen = set()
    for y in range(top, bottom):
        for x in range(left, right):
            grey = int(255 * np.clip((hu[worst, y, x] - low) / (high - low), 0, 1) + 0.5)
            here = ((y - top) * scale + scale // 2, (x - left) * scale + scale // 2)
            there = (here[0], here[1] + (width + 3) * scale)
            # float32 against float64 may round a half to the other side
            assert np.abs(picture[here].astype(int) - grey).max() <= 1
            near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            beside = any(lung[worst, a, b] for a, b in near if 0 <= a < SHAPE[1] and 0 <= b < SHAPE[2])
            if lesions[worst, y, x]:
                kind, expected = "lesion", 0.55 * grey + 0.45 * np.array(LESION)
            elif beside and not lung[worst, y, x]:
                kind, expected = "outline", np.array(OUTLINE)
            else:
                kind, expected = "neither", np.full(3, grey)
            seen.add(kind)
            assert np.abs(picture[there] - expected).max() <= 1.5, (kind, y, x)
    assert seen == {"lesion", "outline", "neither"}
    second = int(shown[1][0].split()[1])
    assert areas[second] <= areas[worst]
    assert abs(second - worst) >= SHAPE[0] // 6


def test_without_lesions_the_middle_of_the_lungs_is_shown(maps):
    body = sections(report_maps(ReportConfig(maps=maps)).path.read_text())[WELL]
    (caption, picture), (chart, _) = pictures(body)
    lung, _ = voxels(maps, WELL, "lung")
    inside = np.flatnonzero(lung.any(axis=(1, 2)))
    z = inside[len(inside) // 2]
    assert caption.startswith(f"slice {z} of 0–19")
    assert caption.endswith("no lesions in this case")
    assert (picture == OUTLINE).all(axis=-1).any()
    assert "CT numbers" in chart


def test_the_page_fetches_nothing_and_names_are_text(maps):
    result = report_maps(ReportConfig(maps=maps, title="<script>alert(1)</script>", pictures=1))
    page = result.path.read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert "<i>hard" not in page
    assert html.unescape(page).count(HARD) >= 2
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 3 + 3 + 2  # slices, histograms, and curves of two
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    targets, anchors = re.findall(r'href="#([^"]*)"', page), re.findall(r'<section id="([^"]*)"', page)
    assert targets == anchors == ["case-1", "case-2", "case-3"]
    assert page.count("<section") == page.count("</section>") == 3
    assert re.findall(r'href="(?!#)', page) == []


def test_a_case_without_its_ct_keeps_its_numbers(maps, tmp_path, capsys):
    before = tables(report_maps(ReportConfig(maps=maps)).path.read_text())
    edit(maps, HARD, ct=str(tmp_path / "elsewhere/x.nii.gz"))
    assert main([str(maps), "--output", str(tmp_path / "deep/page.html")]) == 1
    said = capsys.readouterr()
    reason = f"{tmp_path}/elsewhere/x.nii.gz: no such file or folder; ct must name its new place"
    assert f"normnet.report: {HARD}: {reason}" in said.err
    assert f"3 cases, in {tmp_path}/deep/page.html" in said.out
    page = (tmp_path / "deep/page.html").read_text()
    found = tables(page)
    # that the lungs are cut off is seen in the maps
    assert found[0][1][6] == "no pictures, " + before[0][1][6].removesuffix(", cut off")
    assert [row[:6] for row in found[0]] == [row[:6] for row in before[0]]
    assert found[1:] == before[1:]
    bodies = sections(page)
    assert pictures(bodies[HARD]) == []
    assert f"No pictures: {reason}" in warnings_in(bodies[HARD])
    assert len(pictures(bodies[MILD])) >= 3
    assert "1 of 3 cases could not be shown" in page


def test_ct_that_moved_are_found_again(predicted, maps, tmp_path, capsys):
    """By name among others; where two have it by their folders; or by the name of the case."""
    here = sections(report_maps(ReportConfig(maps=maps)).path.read_text())
    edit(maps, HARD, ct="/gone/p1/ct.nii.gz")
    edit(maps, MILD, ct="D:\\gone\\p2\\ct.nii.gz")
    edit(maps, WELL, ct="/gone/well.nrrd")
    new = tmp_path / "archive"
    for case, name in ((HARD, "p1/ct"), (MILD, "p2/ct"), (WELL, f"p3/{WELL}")):
        (new / name).parent.mkdir(parents=True)
        shutil.copy(predicted / "scans" / f"{case}.nii.gz", new / f"{name}.nii.gz")
    result = report_maps(ReportConfig(maps=maps, ct=(new,)))
    assert result.failures == {}
    bodies = sections(result.path.read_text())
    for case in (HARD, MILD, WELL):
        for (_, a), (_, b) in zip(pictures(bodies[case]), pictures(here[case]), strict=True):
            np.testing.assert_array_equal(a, b)
    # an only file of this name is not shown for a patient whose folder it does not lie in
    shutil.rmtree(new / "p1")
    result = report_maps(ReportConfig(maps=maps, ct=(new,)))
    assert result.failures == {HARD: "/gone/p1/ct.nii.gz: no such file or folder; nothing in ct fits either"}
    # neither of two that fit equally well is taken
    for folder in ("q1", "q2"):
        shutil.copytree(new / "p2", new / folder)
    shutil.rmtree(new / "p2")
    assert main([str(maps), "--ct", str(new / "q1"), str(new / "q2"), str(new / "p3")]) == 1
    assert f"{new}/q1/ct.nii.gz and {new}/q2/ct.nii.gz fit equally well" in capsys.readouterr().err
    # nor one that fits two cases equally well
    assert main([str(maps), "--ct", str(new / "q1"), str(new / "p3")]) == 1
    said = capsys.readouterr().err
    for ct in ("/gone/p1/ct.nii.gz", "D:\\gone\\p2\\ct.nii.gz"):
        assert f"{ct}: no such file or folder; {new}/q1/ct.nii.gz fits {HARD} and {MILD} equally well" in said


def test_a_series_that_moved_is_known_by_its_uid(tmp_path):
    from tests.normnet.test_dicom_seg import write_series

    lung = np.zeros((6, 20, 24), bool)
    lung[1:5, 4:16, 3:9] = lung[1:5, 4:16, 14:20] = True
    hu = np.where(lung, -850, 40).astype(np.int16)
    hu[3, 6:9, 4:7] = -100
    uid = write_series(tmp_path / "new/place", hu)
    write_series(tmp_path / "new/other", hu - 30)
    ct = read_ct(tmp_path / "new/place")
    write_maps(tmp_path / "maps", ct, hu == -100, lung, ct="/gone/series", series=uid)
    result = report_maps(ReportConfig(maps=tmp_path / "maps", ct=(tmp_path / "new",)))
    assert result.failures == {}
    page = result.path.read_text()
    assert f"CT: /gone/series, series {uid}." in page
    (caption, picture), *_ = pictures(sections(page)["p"])
    assert caption.startswith("slice 3 of 0–5 from the feet, z = 47.5 mm")  # 40 mm and 3 x 2.5 mm
    grey = round(255 * (40 + 1100) / 1300)
    assert abs(int(picture[2, 2, 0]) - grey) <= 1  # 10 would be 6 greys darker


def write_maps(folder, volume, lesions, lung, *, volumes=None, classical=None, **entries):
    """Write a finished case, ``p`` where no other is named, as a prediction does."""
    ml = float(np.prod(volume.spacing)) / 1000
    measured = {"lung_ml": lung.sum() * ml, "lesion_ml": lesions.sum() * ml, "percent": 1.0}
    record = {
        "case": "p", "ct": str(volume.path), "series": None, "lungs_from": "classical", "settings": {},
        "models": [], "volumes": volumes or measured, **entries,
    }  # fmt: skip
    masks = {"lesions": lesions, "lung": lung}
    masks |= {} if classical is None else {"classical": classical}
    writers = {kind: lambda path, a=array: volume.write_like(a, path) for kind, array in masks.items()}
    write_case(folder, record["case"], writers, record)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "damaged or truncated gzip file"),
        (
            lambda path: write_image(np.ones(SHAPE, np.uint8), path, (2.0, 1.6, 1.7)),
            "must lie on the grid of",
        ),
        (lambda path: write_image(np.ones((4, 5, 6), np.uint8), path), "the mask's shape must be that of"),
        (lambda path: path.unlink(), "no such file or folder"),
        (lambda path: write_image(np.zeros(SHAPE, np.uint8), path), "the lung map must not be empty"),
    ],
)
def test_a_map_that_does_not_fit(maps, damage, reason, capsys):
    damage(maps / f"{MILD}_lung.nii.gz")
    assert main([str(maps), "--pictures", "1"]) == 1
    said = capsys.readouterr().err
    assert f"normnet.report: {MILD}: {maps / MILD}_lung.nii.gz: " in said
    assert reason in said
    bodies = sections((maps / "report.html").read_text())
    assert any(reason in text for text in warnings_in(bodies[MILD]))
    assert [len(pictures(body)) for body in bodies.values()] == [3, 0, 2]


def test_any_error_stays_with_its_case(maps, monkeypatch):
    def odd(path, series=None):
        if MILD in str(path):
            raise RuntimeError("nobody thought of this")
        return read_ct(path, series)

    monkeypatch.setattr(report_module, "read_ct", odd)
    result = report_maps(ReportConfig(maps=maps))
    assert list(result.failures) == [MILD]
    assert result.failures[MILD].endswith(f"{MILD}.nii.gz: RuntimeError: nobody thought of this")


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"\xff", b'{"case": "a_mild"}', None],
)
def test_damaged_records_and_unfinished_cases_are_named(maps, content):
    if content is None:
        edit(maps, MILD, volumes={"lung_ml": "much", "lesion_ml": 1.0})
    else:
        (maps / f"{MILD}.json").write_bytes(content)
    (maps / "results.json").write_text("{}")  # of another command: no map has its name
    (maps / f"{WELL}.json").unlink()
    result = report_maps(ReportConfig(maps=maps, pictures=0))
    assert result.cases == [HARD]
    assert list(result.failures) == [MILD]
    assert "not the record of a prediction" in result.failures[MILD]
    page = result.path.read_text()
    assert f"Left out, as their prediction was not finished: {WELL}." in page
    assert f"{MILD} is left out: {maps}/{MILD}.json: not the record" in page


def test_volumes_alone_need_no_ct(maps):
    for case in (HARD, MILD, WELL):
        edit(maps, case, ct="/gone/x.nii.gz")
    assert main([str(maps), "--pictures", "0"]) == 0
    page = (maps / "report.html").read_text()
    assert "<img" not in page
    assert len(tables(page)) == 5


def test_wrong_calls(maps, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "settings.json").write_text("{}")
    (empty / "results.json").write_text("{}")
    for call, message in (
        ([tmp_path / "none"], f"maps must be a folder that normnet.predict wrote, got {tmp_path}/none"),
        ([maps / "volumes.csv"], "maps must be a folder that normnet.predict wrote, got"),
        ([empty], "maps must hold at least one finished case of normnet.predict (<case>.json)"),
        ([empty], f"found none in {empty}"),
        ([maps, "--ct", tmp_path / "none"], f"ct must exist, got {tmp_path}/none"),
        ([maps, "--ct", empty], f"ct must name CT volumes or DICOM series, got {empty}: a folder"),
    ):  # fmt: skip
        assert main([str(word) for word in call]) == 2
        assert message in capsys.readouterr().err
    for call, message in (
        ([], "MAPS"),
        ([maps, "--picture", "3"], "--picture"),
        ([maps, "--pictures", "some"], "some"),
        ([maps, "--pictures", "-1"], "pictures must be >= 0, got -1"),
        ([maps, "--output", "a.txt"], "output must be a file that ends in .html, got a.txt"),
    ):
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in call])
        assert left.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match=r"output must be a file that ends in .html, got .*empty\.html"):
        ReportConfig(maps=maps, output=empty.rename(tmp_path / "empty.html"))
    assert not (maps / "report.html").exists()
    assert not (tmp_path / "empty.html/report.html").exists()


def test_help_shows_defaults_without_loading_what_it_does_not_need():
    code = (
        "import sys; from normnet.report import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'matplotlib', 'pandas', 'jinja2'} & sys.modules.keys()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", ran.stdout).split())
    assert "(default: 3)" in text
    assert "(default: 'NormNet: lesions in lung CT')" in text
    assert "MAPS/report.html where omitted" in text


NORMAL = {
    "lung_ml": 4000.0,
    "lesion_ml": 40.0,
    "percent": 1.0,
    "right_lung_ml": 2200.0,
    "left_lung_ml": 1800.0,
}


@pytest.mark.parametrize(
    ("change", "slice_mm", "tags"),
    [
        ({}, 1.0, []),
        ({}, 5.0, []),
        ({}, None, []),
        ({}, 5.5, ["thick slices"]),
        ({"lung_ml": 1400.0}, 1.0, ["lung volume"]),
        ({"lung_ml": 11000.0}, 1.0, ["lung volume"]),
        ({"percent": 50.0}, 1.0, []),
        ({"percent": 51.0}, 1.0, ["large share"]),
        ({"percent": None}, 1.0, []),
        ({"left_lung_ml": 0.0}, 1.0, ["no left lung"]),
        ({"right_lung_ml": 0.0}, 1.0, ["no right lung"]),
        ({"left_lung_ml": None}, 1.0, ["sides unknown"]),
        ({"left_lung_ml": 1101.0}, 1.0, []),  # just above half of the right one
        ({"left_lung_ml": 1099.0}, 1.0, ["unequal lungs"]),
    ],
)
def test_numbers_to_look_at(change, slice_mm, tags):
    assert [concern.tag for concern in doubt_numbers({**NORMAL, **change}, slice_mm)] == tags


def test_maps_to_look_at():
    lung = np.array([0.0, 50.0, 300.0, 250.0, 0.0])
    lesion = np.array([0.0, 0.0, 10.0, 0.0, 0.0])
    volumes = {"lung_ml": 600.0, "lesion_ml": 10.0}  # 10 mm slices: cm² are ml
    air = np.full(9, -850)

    def tags(volumes=volumes, lung=lung, lesion=lesion, hu=air):
        return [concern.tag for concern in doubt_maps(volumes, lung, lesion, 10.0, hu)]

    assert tags() == []
    assert tags(volumes={"lung_ml": 600.1, "lesion_ml": 10.0}) == []
    assert tags(volumes={"lung_ml": 600.0, "lesion_ml": 11.0}) == ["maps changed"]
    assert tags(hu=np.full(9, -499)) == ["dense lungs"]
    assert tags(hu=np.zeros(0)) == []
    assert tags(lung=lung[1:], lesion=lesion[1:]) == [
        "cut off"
    ]  # the first slice holds a sixth of the largest
    taper = np.array([29.0, 21.0, 300.0, 250.0, 0.0])
    assert tags(lung=taper) == []
    (both,) = doubt_maps({}, np.array([300.0, 300.0]), np.zeros(2), 10.0, air)
    assert "the lower and the upper end" in both.text


@pytest.mark.parametrize(
    ("source", "weights", "told", "short"),
    [
        ("network", "5a", "segmented by the lung network", "segmented by the lung network"),
        ("mine", "5a", "segmented by the lung network mine", "segmented by the lung network mine"),
        ("classical", None, "segmented by thresholds", "segmented by thresholds"),
        # in records of earlier versions
        ("lungmask", None, "segmented by lungmask", "segmented by lungmask"),
        ("/d/a_lung.nii.gz", None, "mask file /d/a_lung.nii.gz", "mask files"),
    ],
)
def test_where_lungs_are_from(source, weights, told, short):
    record = {"lungs_from": source, "lungs_sha256": weights}
    assert (lungs_told(record), lungs_told(record, path=False)) == (told, short)


ILL, CHEST_MM = "ill", (4.0, 3.0, 3.0)
CHEST = ls.phantom.chest_ct(shape=(20, 48, 64), spacing=CHEST_MM, seed=1)


@pytest.fixture
def compared(tmp_path):
    """Maps of two cases by the lung network; thresholds lose the lower half of a lung of one of them."""
    lung, classical = CHEST.lung_mask, CHEST.lung_mask.copy()
    classical[:10, :, 32:] = False
    classical[:, 1:] |= classical[:, :-1]  # and lie a voxel too far back in the other
    lesions = lung & (CHEST.hu > -500)
    with hear() as warned:
        assert not check_agreement(lung, classical, CHEST_MM)
    made = {"lungs_from": "network", "lungs_sha256": "5a"}
    for case, more in ((ILL, {"classical": classical, "warnings": warned}), (WELL, {})):
        write_image(CHEST.hu, tmp_path / f"scans/{case}.nii.gz", CHEST_MM)
        ct = read_ct(tmp_path / f"scans/{case}.nii.gz")
        write_maps(tmp_path / "maps", ct, lesions, lung, case=case, **made, **more)
    return tmp_path / "maps"


def recorded(maps):
    (text,) = (w for w in json.loads((maps / f"{ILL}.json").read_text())["warnings"] if "thresholds" in w)
    return text


def tags(page, case):
    (row,) = (row for row in tables(page)[0] if row[0] == case)
    return row[6].split(", ")


def test_two_lungs_are_told_in_ml_and_shown_where_they_differ(compared):
    page = report_maps(ReportConfig(maps=compared)).path.read_text()
    lung, classical = (voxels(compared, ILL, kind)[0] for kind in ("lung", "classical"))
    ml = np.prod(CHEST_MM) / 1000
    more, less = (lung & ~classical).sum() * ml, (classical & ~lung).sum() * ml
    assert more > 150
    assert less > 20
    body = sections(page)[ILL]
    (said,) = (text for text in warnings_in(body) if "thresholds" in text.lower())
    assert f"differ by {more + less:,.0f} ml: {more:,.0f} ml belong to the network's lungs alone" in said
    assert f"{less:,.0f} ml to those by thresholds" in said
    assert recorded(compared) not in html.unescape(page)
    assert tags(page, ILL).count(DIFFER) == 1
    assert "warned of" not in tags(page, ILL)

    slices = [(int(text.split()[1]), text, p) for text, p in pictures(body) if text.startswith("slice ")]
    assert len(slices) == 3
    apart = np.count_nonzero(lung ^ classical, axis=(1, 2))
    ((z, caption, picture),) = (one for one in slices if "outlines differ most" in one[1])
    assert apart[z] == apart.max()
    cm2 = CHEST_MM[1] * CHEST_MM[2] / 100
    one, other = (m[z].sum() * cm2 for m in (lung & ~classical, classical & ~lung))
    assert caption.endswith(
        f"differ most: {one:.1f} cm² lie within the blue one alone, {other:.1f} cm² within the dashed one "
        "alone"
    )
    right = picture[:, picture.shape[1] // 2 + 3 :]
    assert is_dashed(right).any()
    assert (right == OUTLINE).all(axis=-1).any()


def test_pages_say_how_to_read_dashes_where_there_are_some(compared):
    sentence = "a dashed line in yellow and black"
    page = report_maps(ReportConfig(maps=compared)).path.read_text()
    assert page.count(sentence) == 1
    well = sections(page)[WELL]
    assert DIFFER not in well
    (compared / f"{ILL}.json").unlink()
    page = report_maps(ReportConfig(maps=compared)).path.read_text()
    assert sentence not in page
    assert sections(page)[WELL] == well
    for files in (None, "absent"):  # as earlier versions wrote it, too
        record = json.loads((compared / f"{WELL}.json").read_text())
        record["files"] = {k: v for k, v in record["files"].items() if k != "classical"}
        edit(compared, WELL, files=record["files"] | ({} if files else {"classical": None}))
        assert sections(report_maps(ReportConfig(maps=compared)).path.read_text())[WELL] == well


def test_without_pictures_the_record_tells(compared):
    assert main([str(compared), "--pictures", "0"]) == 0
    page = (compared / "report.html").read_text()
    assert warnings_in(sections(page)[ILL]).count(recorded(compared)) == 1
    assert DIFFER in tags(page, ILL)
    assert "dashed" not in page


def test_thresholds_that_find_no_lung(compared):
    write_image(np.zeros(CHEST.hu.shape, np.uint8), compared / f"{ILL}_classical.nii.gz", CHEST_MM)
    body = sections(report_maps(ReportConfig(maps=compared, pictures=1)).path.read_text())[ILL]
    lung = voxels(compared, ILL, "lung")[0]
    ml = lung.sum() * np.prod(CHEST_MM) / 1000
    assert any(f"find no lung where the lung network has {ml:,.0f} ml" in text for text in warnings_in(body))
    caption = pictures(body)[0][0]
    assert int(caption.split()[1]) == lung.sum(axis=(1, 2)).argmax()
    assert caption.endswith("0.0 cm² within the dashed one alone")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "no such file or folder"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "damaged or truncated gzip file"),
        (lambda path: write_image(np.ones((4, 5, 6), np.uint8), path), "the mask's shape must be that of"),
        (
            lambda path: write_image(np.ones(CHEST.hu.shape, np.uint8), path, (4.0, 3.0, 3.2)),
            "must lie on the grid of",
        ),
    ],
)
def test_without_the_second_outline_a_case_is_shown(compared, damage, reason):
    """It is there to compare; what was found does not depend on it."""
    damage(compared / f"{ILL}_classical.nii.gz")
    assert main([str(compared), "--pictures", "1"]) == 0
    page = (compared / "report.html").read_text()
    body = sections(page)[ILL]
    assert len(pictures(body)) == 3
    assert "dashed" not in page
    assert not any(is_dashed(p[:, p.shape[1] // 2 + 3 :]).any() for _, p in pictures(body)[:1])
    said = warnings_in(body)
    (why,) = (text for text in said if text.startswith("The lungs by thresholds are not drawn: "))
    assert reason in why
    assert f"{ILL}_classical.nii.gz" in why
    assert said.count(recorded(compared)) == 1
    assert {DIFFER, "no second outline"} <= set(tags(page, ILL))


def test_maps_that_are_needed_fail_all_the_same(compared):
    (compared / f"{ILL}_lung.nii.gz").unlink()
    edit(compared, WELL, warnings=["something else"])
    result = report_maps(ReportConfig(maps=compared))
    assert list(result.failures) == [ILL]
    page = result.path.read_text()
    assert recorded(compared) in warnings_in(sections(page)[ILL])
    assert "something else" in warnings_in(sections(page)[WELL])
    assert "warned of" in tags(page, WELL)


@pytest.mark.parametrize("found", [np.zeros_like(CHEST.lung_mask), np.roll(CHEST.lung_mask, 20, axis=2)])
def test_the_warning_of_the_check_is_known_by_its_words(found):
    with hear() as said:
        assert not check_agreement(CHEST.lung_mask, found, CHEST_MM)
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
