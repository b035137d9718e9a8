"""No cell of a CSV is a formula, every text comes back, numbers stay numbers."""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.hostile.tally import trial

pytest.importorskip("torch")
pytest.importorskip("monai")

from normnet.cases import read_table
from normnet.prepare.exclude import read_annotations, read_exclusions
from normnet.sheets import has_columns, heading, plain, safe, sheet
from normnet.train import Progress, RunLog

DANGEROUS = "=+-@\t\r\n＝＋－＠"
BEFORE = "' \"`\u00a0\u3000\ufeff\u200b\x0b"  # what a spreadsheet may pass over
text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
names = st.one_of(
    text,
    st.builds(str.__add__, st.sampled_from([*DANGEROUS, "'", "''=", "'-"]), text),
    st.builds("{}{}{}".format, st.text(BEFORE, max_size=3), st.sampled_from(DANGEROUS), text),
    st.sampled_from(
        ["=cmd|' /C calc'!A0", "@SUM(1+9)*cmd", "+1-800-call", "-2+3+cmd|x", "-", "--", "-1_000"]
    ),
)


@given(names)
def test_any_text_comes_back_and_is_no_formula(name: str) -> None:
    with trial("csv"):
        cell = safe(name)
        assert plain(cell) == name
        with contextlib.suppress(ValueError):
            if "_" not in cell and cell.isascii():
                float(cell)
                return  # a number stays one
        assert not cell.strip(BEFORE[1:]) or cell.lstrip(BEFORE[1:])[0] not in DANGEROUS
        assert safe(cell) != cell or cell == name  # one that is dangerous behind its apostrophe gets another


@given(st.floats(), st.integers())
def test_numbers_stay_numbers(x: float, n: int) -> None:
    for shown in (f"{x:.5g}", f"{x:.2f}", str(n), repr(x)):
        with trial("csv"):
            assert safe(shown) == shown
            assert float(shown) == pytest.approx(float(shown), nan_ok=True)


@example("=\udc80")
@given(st.text(st.characters(exclude_characters="\0"), max_size=20))
def test_every_name_can_be_written(name: str) -> None:
    """A path as it is, and one that is no UTF-8, escaped."""
    for cell in (name, Path(name)):
        with trial("csv"):
            (found,) = csv.reader(io.StringIO(sheet([[cell, -1]]).encode().decode(), newline=""))
            assert found[0] == safe(str(cell)).encode("utf-8", "backslashreplace").decode()
            assert found[1] == "-1"


@given(st.lists(st.lists(names, min_size=2, max_size=4), min_size=1, max_size=5))
def test_a_sheet_is_read_back(rows: list[list[str]]) -> None:
    with trial("csv"):
        found = list(csv.reader(io.StringIO(sheet(rows), newline="")))
        assert [[plain(cell) for cell in row] for row in found] == rows


@given(names.filter(bool))
def test_every_table_neutralises_names(name: str) -> None:
    """Of predictions, evaluations, ablations and stores: the case is a file's name, the method a flag's."""
    from normnet.ablate import AblationTable
    from normnet.prepare.run import COLUMNS, CaseSummary

    summary = CaseSummary("p1", "failed", (name,), source=name, series=name)
    table = AblationTable("modules", "title", ["row", name], [[name, "-3.5"]])
    for made in (sheet([COLUMNS, summary.row()]), table.csv()):
        with trial("csv"):
            cells = [cell for row in csv.reader(io.StringIO(made, newline="")) for cell in row]
            assert safe(name) in cells
            assert name in map(plain, cells)
            assert all(safe(cell) == cell or cell.startswith("'") for cell in cells)


@pytest.mark.parametrize("case", ["=1+1", "@a", "+b", "-c", "\td", "-7"])
def test_the_tables_of_maps_and_evaluations(tmp_path: Path, case: str) -> None:
    import json

    import numpy as np

    from normnet.evaluate import CaseVolumes, evaluate_volumes
    from normnet.output import TABLE, check_output, write_table

    record = {
        "case": case, "ct": "/x", "series": None, "lungs_from": "", "settings": {}, "models": [],
        "volumes": {"lung_ml": 1.0, "lesion_ml": 0.5},
        "files": {"lesions": f"{case}_lesions.nii.gz", "lung": f"{case}_lung.nii.gz"},
    }  # fmt: skip
    (tmp_path / f"{case}.json").write_text(json.dumps(record))
    with trial("csv"):
        write_table(tmp_path)
        check_output(tmp_path, {})  # it is taken for ours
        rows = list(csv.DictReader(io.StringIO((tmp_path / TABLE).read_bytes().decode(), newline="")))
        assert [row["case"] for row in rows] == [safe(case)]
        assert rows[0]["lesion_ml"] == "0.50"
    lung = np.ones((2, 4, 4), bool)
    volumes = CaseVolumes(
        case=case, hu=np.full(lung.shape, -400, np.int16), prediction=lung, truth=lung, lung_mask=lung,
        probability=None, spacing=(1.0, 1.0, 1.0),
    )  # fmt: skip
    with trial("csv"):
        evaluate_volumes([volumes], name=case, pictures=0).write(tmp_path / "scores")
        written = (tmp_path / "scores/cases.csv").read_bytes().decode()
        rows = list(csv.DictReader(io.StringIO(written, newline="")))
        assert (rows[0]["case"], rows[0]["method"]) == (safe(case), safe(case))
        assert plain(rows[0]["case"]) == case


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_tables_that_are_none(tmp_path: Path) -> None:
    """Lists of slices and annotations: one line with file and line, at once."""
    texts = {
        "pipe": None, "binary": bytes(range(128, 256)), "wide": b"x" * 200_000, "open": b'"a,1',
        "many digits": b"a,0,1" + b"0" * 400, "more digits": b"a,0," + b"1" * 5000, "negative": b"a,-1,2",
        "swapped": b"a,2,1", "real": b"a,0.0,1", "short": b"a,1", "long": b"a,1,2,3", "NaN": b"a,NaN,0,0,5",
        "far": b"a,1e308,0,0,5", "huge": b"a,0,0,0,1e300", "nothing": b"a,0,0,0,0", "words": b"a,b,c,d,e",
    }  # fmt: skip
    for kind, content in texts.items():
        path = tmp_path / f"{kind}.csv"
        if content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content)
        for read in (read_exclusions, read_annotations, read_table):
            with trial("csv"), pytest.raises(ValueError, match=rf"{kind}\.csv") as caught:
                read(path)
            assert len(str(caught.value)) < 700
            assert str(caught.value).isprintable()
        with trial("csv"):
            assert not has_columns(path, ["case"])
    path = tmp_path / "good.csv"
    path.write_text('\ufeffcase,first_slice,last_slice\n\'=a,1,2\n# no\n"b\nc",0,0\n', encoding="utf-8")
    assert read_exclusions(path) == {"=a": [(1, 2)], "b\nc": [(0, 0)]}  # as our own tables write names


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("iteration,loss\n1,0.5\nx,0.5\n", "line 3: iteration must be a number, got 'x'"),
        ("iteration,loss\n1,0.5\n\n", "line 3: iteration must be a number"),
        ("iteration,loss\n-1,0.5\n", "line 2: iteration must be a number, got '-1'"),
        (f"iteration,loss\n{'9' * 5000},1\n", "line 2: iteration must be a number"),
        ("name,phone\nme,1\n", "must be the table of a run"),
        ("iteration,loss\n1," + "0" * 200_000, "must be a CSV"),
        ("\udcff\n", "must be UTF-8"),
    ],
)
def test_the_table_of_a_run_to_resume(tmp_path: Path, table: str, told: str) -> None:
    """What is no table of ours is refused and stays."""
    content = table.encode("utf-8", "surrogateescape")
    (tmp_path / "metrics.csv").write_bytes(content)
    with trial("csv"):
        with pytest.raises(ValueError, match=f"metrics.csv.*{told}") as caught:
            RunLog(tmp_path, Progress(iteration=5))
        assert len(str(caught.value)) < 400
        assert str(caught.value).isprintable()
        assert (tmp_path / "metrics.csv").read_bytes() == content
        assert len(list(tmp_path.iterdir())) == 1


@given(st.binary(max_size=60))
def test_a_damaged_table_has_no_heading(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(content)
    with trial("csv"):
        assert isinstance(heading(path), list)
        assert not has_columns(path, ["case", "lung_ml"]) or content.startswith((b"case", b'"case'))


def test_csv_is_written_in_one_place() -> None:
    root = Path(__file__).resolve().parents[2]
    found = []
    for folder in ("lesionsynth", "normnet"):
        for file in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in ("writer", "DictWriter"):
                    found.append(str(file.relative_to(root)))
    with trial("csv"):
        assert set(found) == {"normnet/sheets.py"}
