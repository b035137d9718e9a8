"""Which files form a case: folders of masks by name, tables, and where the CT of finished cases are now."""

from __future__ import annotations

import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesionsynth.commands import plainly
from lesionsynth.io import Passed
from normnet.cases import Case, find_cases, hear, locate, match, read_table, reason, tell
from tests.test_io import volume, write_series

NAMES = st.lists(
    st.sampled_from(["p1", "p10", "b", "lung", "P1", "a.b", "[p]", "_", "é"]), min_size=1, max_size=4
)
CASES = NAMES.map("_".join)
ENDS = st.sampled_from([".nii.gz", ".nii", ".nrrd", ".seg.nrrd", ".MHA", ".txt", ".dcm", ".json"])


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def by_hand(files: list[str], cases: list[str]) -> dict[str, str]:
    """Look for the mask of each case, name by name."""
    found = {}
    for case in cases:
        exact, others = [], []
        for file in files:
            end = next(
                (e for e in (".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".mha") if file.lower().endswith(e)), ""
            )
            name = file[: len(file) - len(end)]
            if not end or not name or file.startswith("."):
                continue
            if name == case:
                exact.append(file)
            elif name.startswith(case + "_"):
                longer = False
                for other in cases:
                    if len(other) > len(case) and (name == other or name.startswith(other + "_")):
                        longer = True
                if not longer:
                    others.append(file)
        if len(exact or others) == 1:
            found[case] = (exact or others)[0]
    return found


@given(
    cases=st.lists(CASES, min_size=1, max_size=5, unique=True),
    files=st.lists(st.tuples(CASES, ENDS).map("".join), max_size=8, unique=True),
)
def test_masks_are_found_by_name_as_by_hand(
    tmp_path_factory: pytest.TempPathFactory, cases: list[str], files: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("masks")
    for file in files:
        (folder / file).touch()
    wanted = [Case(case=case, ct=Path("/scans", case)) for case in cases]
    expected = by_hand(files, cases)
    if not expected:
        with pytest.raises(ValueError, match=r"masks must hold .* or one file of "):
            match(folder, wanted, "masks")
        return
    found, problems = match(folder, wanted, "masks")
    assert {case: path.name for case, path in found.items()} == expected
    assert problems.keys() == set(cases) - expected.keys()
    assert all("\n" not in problem for problem in problems.values())


def test_names_that_begin_alike(tmp_path: Path) -> None:
    for name in ("p1_lung.nii", "p1_b_lung.nii", "p10.nii", "notes.txt", "sub/p2.nii", ".p2.nii"):
        touched(tmp_path / name)
    wanted = [Case(case=case, ct=Path("/scans", case)) for case in ("p1", "p1_b", "p10", "p2")]
    found, problems = match(tmp_path, wanted, "truth")
    assert {case: path.name for case, path in found.items()} == {
        "p1": "p1_lung.nii", "p1_b": "p1_b_lung.nii", "p10": "p10.nii",
    }  # fmt: skip
    rule = "truth must hold p2.nii.gz, or one file of p2_*.nii.gz"
    assert problems == {"p2": f"{rule}, got p10.nii, p1_b_lung.nii, p1_lung.nii in {tmp_path}"}
    touched(tmp_path / "p1_lesion.nii")
    found, problems = match(tmp_path, wanted, "masks")
    assert "p1" not in found
    assert problems["p1"].endswith(f"one file of p1_*.nii.gz, got p1_lesion.nii, p1_lung.nii in {tmp_path}")
    touched(tmp_path / "p1.nrrd")
    assert match(tmp_path, wanted, "masks")[0]["p1"].name == "p1.nrrd"
    touched(tmp_path / "p1.nii")
    assert match(tmp_path, wanted, "masks")[1]["p1"].endswith(f"got p1.nii, p1.nrrd in {tmp_path}")


def test_a_ct_in_the_folder_of_masks_is_none(tmp_path: Path) -> None:
    for name in ("p1.nii.gz", "p1_lung.nii.gz", "p2.nii.gz"):
        touched(tmp_path / name)
    cases = find_cases([tmp_path], masks=tmp_path)
    assert [(case.case, case.lungs and case.lungs.name) for case in cases] == [
        ("p1", "p1_lung.nii.gz"),
        ("p2", None),
    ]
    assert cases[1].problem.startswith("masks must hold p2.nii.gz, or one file of p2_*.nii.gz, got ")
    assert [one.path.name for one in cases.passed] == ["p1_lung.nii.gz"]
    assert cases[0].inputs == [tmp_path / "p1.nii.gz", tmp_path / "p1_lung.nii.gz"]


def test_masks_and_truth_in_folders_of_their_own(tmp_path: Path) -> None:
    for name in (
        "ct/p1_hu.nii.gz",
        "ct/b/p2.nrrd",
        "lungs/p1_hu.nii",
        "lungs/p2.nii",
        "truth/p2_infection.nii",
    ):
        touched(tmp_path / name)
    folders: dict[str, Any] = {"masks": tmp_path / "lungs", "truth": tmp_path / "truth"}
    one, two = find_cases([tmp_path / "ct"], **folders)
    assert (one.case, one.lungs, one.lesions) == ("p1_hu", tmp_path / "lungs/p1_hu.nii", None)
    assert "truth must hold p1_hu.nii.gz, or one file of p1_hu_*.nii.gz" in one.problem
    assert (two.case, two.lesions, two.problem) == ("p2", tmp_path / "truth/p2_infection.nii", "")
    named = find_cases([tmp_path / "ct/p1_hu.nii.gz"], names=["p2"], **folders)
    assert (named[0].case, named[0].lungs, named[0].problem) == ("p2", tmp_path / "lungs/p2.nii", "")
    single = find_cases([tmp_path / "ct/p1_hu.nii.gz"], masks=tmp_path / "lungs/p2.nii")
    assert single[0].lungs == tmp_path / "lungs/p2.nii"
    with pytest.raises(
        ValueError, match=r"masks must be a folder where there are several CT, got the file .*p2"
    ):
        find_cases([tmp_path / "ct"], masks=tmp_path / "lungs/p2.nii")
    with pytest.raises(FileNotFoundError, match=r"truth must exist, got .*gone"):
        find_cases([tmp_path / "ct"], truth=tmp_path / "gone")
    with pytest.raises(
        ValueError, match=r"masks must hold p1_hu\.nii\.gz, or .*, got no file of a format that is read"
    ):
        find_cases([tmp_path / "ct"], masks=tmp_path)


def table(folder: Path, text: str) -> Path:
    path = folder / "cases.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def test_a_table_names_everything(tmp_path: Path) -> None:
    for name in ("p1.nii.gz", "masks/p1.nii", "truth/p1.nii", "extra.nii"):
        touched(tmp_path / name)
    uid = write_series(tmp_path / "study/deep", volume(shape=(3, 4, 5)))
    rows = "\ufeffcase,ct,lungs,lesions\n\n'=a,p1.nii.gz,masks/p1.nii,truth/p1.nii\nb,study,,\nc,gone.nii\n"
    rows += f"d,{tmp_path}/p1.nii.gz,,gone.nii,,\ne,.,,\n"
    first, second, *rest = find_cases([table(tmp_path, rows)])
    assert (first.case, first.ct, first.series) == ("=a", tmp_path / "p1.nii.gz", None)
    assert first.inputs == [tmp_path / name for name in ("p1.nii.gz", "masks/p1.nii", "truth/p1.nii")]
    assert (second.case, second.ct, second.series) == ("b", tmp_path / "study/deep", uid)
    assert (len(second.files), second.lungs, second.lesions, second.problem) == (3, None, None, "")
    assert [case.case for case in rest] == ["c", "d", "e"]
    told = ("gone.nii: no such file or folder", "gone.nii: no such file or folder", "ct must be one CT, got ")
    assert all(said in case.problem for case, said in zip(rest, told, strict=True))
    more = "case,ct,core\na,p1.nii.gz,extra.nii\n"
    (one,) = read_table(table(tmp_path, more), columns=["core"])
    assert one.more == {"core": tmp_path / "extra.nii"}
    assert one.inputs == [tmp_path / "p1.nii.gz", tmp_path / "extra.nii"]
    assert hash(one) == hash(read_table(tmp_path / "cases.csv", columns=["core"])[0])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must have at least one row below its header"),
        ("case,ct\n,\n\n", "must have at least one row below its header"),
        ("case,ct,lung\na,b,c\n", "columns must be among case, ct, lungs, lesions, got 'lung'"),
        ("case,ct,ct\na,b,c\n", "columns must be among case, ct, lungs, lesions, got 'ct'"),
        ("case,ct,\na,b,c\n", "columns must be among case, ct, lungs, lesions, got ''"),
        ("case;ct\na;b\n", "columns must be among case, ct, lungs, lesions, got 'case;ct'"),
        ("ct\nb\n", "line 2: case must be filled, got none"),
        ("case,ct\na,b\n\nc,\n", "line 4: ct must be filled, got none"),
        ("case,ct,lesions\na,b,c\nd,e,\n", "line 3: lesions must be filled, got none"),
        ("case,ct\na,b,c\n", "line 2: must have 2 cells, got 3"),
        ("case,ct\na,b\na,c\n", "line 3: cases must differ, got 'a' twice"),
        ('case,ct\n"a,b\n', "line 2: ct must be filled, got none"),
        (f"case,ct\na,{'b' * 200_000}\n", "must be a CSV"),
        ("case,ct\n\udcff,b\n", "must be UTF-8"),
    ],
)
def test_what_is_no_table(tmp_path: Path, text: str, told: str) -> None:
    needed = ["lesions"] if "lesions" in text else []
    with pytest.raises(ValueError, match=r"cases\.csv") as caught:
        read_table(table(tmp_path, text), needed=needed)
    assert told in str(caught.value)


def test_a_table_stands_alone(tmp_path: Path) -> None:
    path = table(tmp_path, f"case,ct\na,{touched(tmp_path / 'a.nii')}\n")
    for more, name in (
        ({"masks": tmp_path}, "masks"), ({"truth": tmp_path}, "truth"), ({"names": ["b"]}, "names"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be omitted beside a table of cases, {path}"):
            find_cases([path], **more)
    with pytest.raises(ValueError, match="inputs must be omitted beside a table of cases"):
        find_cases([path, tmp_path / "a.nii"])


# Where the CT of finished cases are now.


def records(*rows: tuple[str, str, str | None]) -> list[dict[str, Any]]:
    return [dict(zip(("case", "ct", "series"), row, strict=True)) for row in rows]


def test_a_ct_that_moved_is_found_by_its_names(tmp_path: Path) -> None:
    for name in ("p1/ct.nii", "p2/ct.nii", "other.nii", "p4.nii"):
        touched(tmp_path / name)
    made = records(
        ("a", "/old/p1/ct.nii", None), ("b", "D:\\old\\p2\\ct.nii", None), ("c", "/old/gone.nii", None),
        ("p4", "/old/image.nii", None),
    )  # fmt: skip
    places = locate(made, [tmp_path])
    assert [place.path for place in places[:2]] == [tmp_path / "p1/ct.nii", tmp_path / "p2/ct.nii"]
    assert (places[2].path, places[2].hint) == (Path("/old/gone.nii"), "nothing in ct fits either")
    assert places[3].path == tmp_path / "p4.nii"  # by the name of the case
    assert [(p.path, p.hint) for p in locate(made[:1], [])] == [
        (Path("/old/p1/ct.nii"), "ct must name its new place")
    ]
    # two that fit one record, and one that fits two
    hint = locate(records(("a", "/x/ct.nii", None)), [tmp_path])[0].hint
    assert hint == f"{tmp_path}/p1/ct.nii and {tmp_path}/p2/ct.nii fit equally well"
    both = locate(records(("a", "/x/ct.nii", None), ("b", "/y/ct.nii", None)), [tmp_path / "p1"])
    assert {place.hint for place in both} == {f"{tmp_path}/p1/ct.nii fits a and b equally well"}
    with pytest.raises(FileNotFoundError, match=r"ct must exist, got .*gone"):
        locate(made, [tmp_path / "gone"])


def test_a_series_that_moved_is_known_by_its_uid(tmp_path: Path) -> None:
    uid = write_series(tmp_path / "in/a", volume(shape=(6, 6, 7)))
    for folder in ("b", "masks"):
        (tmp_path / "in" / folder).mkdir()
    shutil.move(tmp_path / "in/a/003.dcm", tmp_path / "in/b")
    touched(tmp_path / "in/masks/p.nii")
    places = locate(records(("p", "/gone/p.nii", None), ("q", "/gone/q", uid)), [tmp_path / "in"])
    assert f"passed over: {tmp_path}/in/masks/p.nii: in masks" in places[0].hint
    assert (places[1].path, places[1].series) == (tmp_path / "in", uid)
    named = locate([], [tmp_path / "in", touched(tmp_path / "p.hdr")])
    assert [str(one) for one in named.passed if one.named] == [
        f"{tmp_path}/p.hdr: of no format that is read; convert it to NIfTI (.nii.gz)"
    ]


# What is said about a case.


def test_what_is_told_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    passed = [Passed(Path(f"f{n}.nii"), "why") for n in range(30)]
    assert not tell({"p": ["one\n\x1b", "two"]}, passed)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["warning: p: one\\n\\x1b", "warning: p: two", "passed over: f0.nii: why"]
    assert (len(lines), lines[-1]) == (13, "and 20 more")
    assert tell({}, [*passed, Passed(Path("g.nii"), "why", named=True)])
    assert capsys.readouterr().err.startswith("passed over: g.nii: why\n")
    assert not tell({})
    with plainly():
        warnings.warn("text", stacklevel=1)
    assert capsys.readouterr().err == "warning: text\n"


def test_why_a_case_failed_is_one_line_that_names_its_file() -> None:
    path = Path("/scans/p\n1.nii")
    assert reason(path, ValueError("must be a CT")) == "/scans/p\\n1.nii: must be a CT"
    assert reason(path, ValueError(f"{path}: must be a CT")) == "/scans/p\\n1.nii: must be a CT"
    assert reason(path, KeyError("volume")) == "/scans/p\\n1.nii: KeyError: 'volume'"
    assert reason(None, OSError("a\nb")) == "a\\nb"
    assert reason(None, ValueError("")) == "ValueError: "


def test_warnings_are_heard_once() -> None:
    def warn(*texts: str) -> list[str]:
        with hear() as said:
            for text in texts:
                warnings.warn(text, stacklevel=1)
            warnings.warn("old", DeprecationWarning, stacklevel=1)
        return said

    with pytest.warns(DeprecationWarning, match="old"):
        assert warn("a", "b", "a") == ["a", "b"]
    with suppress(ZeroDivisionError), hear() as said:  # where it fails, too
        warnings.warn("a", stacklevel=1)
        _ = 1 / 0
    assert said == ["a"]
