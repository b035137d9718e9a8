"""The files of a case: written as a whole or not at all whenever a call ends, and not twice."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lesionsynth.files import temporary
from normnet import output
from normnet.output import (
    FILES,
    VOLUMES,
    check_output,
    check_written,
    read_record,
    read_records,
    stamp,
    to_write,
    volumes_of,
    write_case,
    write_table,
)

FOREIGN = {"notes.txt": b"mine", "p2_lesions.nii.gz": b"mine", "p1.x.json": b"{}", ".p1": b"mine"}


def request(call: str) -> dict[str, Any]:
    """What makes results those of a call."""
    return {"ct": "/scans/p1.nii.gz", "label": None, "settings": {"of": call}, "models": []}


def record_of(call: str, case: str = "p1") -> dict[str, Any]:
    more = {"series": None, "lungs_from": "network", "volumes": {"lung_ml": 10.0, "lesion_ml": 1.0}}
    return {"case": case, **request(call), **more}


def writer(content: str, step: Callable[[], None] = lambda: None) -> Callable[[Path], None]:
    """Write a small gzip file; a kill may come when half of it is there."""

    def write(path: Path) -> None:
        whole = gzip.compress(bytes(352) + content.encode())
        path.write_bytes(whole[:20])
        step()
        path.write_bytes(whole)

    return write


def write(folder: Path, call: str, kinds: Any, step: Callable[[], None] = lambda: None, **flags: Any) -> None:
    write_case(
        folder, "p1", {kind: writer(f"{call} {kind}", step) for kind in kinds}, record_of(call), **flags
    )


def run(folder: Path, call: str, kinds: Any, step: Callable[[], None] = lambda: None, **flags: Any) -> None:
    """Do what the command does for a case."""
    if wanted := to_write(folder, "p1", request(call), kinds, **flags):
        write(folder, call, wanted, step, **flags)


def content_of(file: Path) -> str:
    return gzip.decompress(file.read_bytes())[352:].decode()


def finished(folder: Path, case: str = "p1") -> str | None:
    """Tell whose result is there, None where none counts as finished; fail where one is not whole."""
    file = folder / f"{case}.json"
    if not file.exists():
        return None
    record = read_record(file)
    call: str = record["settings"]["of"]
    for kind, name in record["files"].items():
        if name is not None:
            assert content_of(folder / name) == f"{call} {kind}"
    return call


class Killed(BaseException):
    """The end of a process: nothing that it would still do is done."""


class Fault:
    """Fails at one call of the file system, or dies at one, or first the one and later the other.

    Parameters
    ----------
    fail, kill : int
        Which call, from 0 on; none where negative. From `kill` on nothing works.
    """

    NAMES = ("replace", "rename", "unlink", "mkdir", "rmdir")

    def __init__(self, fail: int = -1, kill: int = -1) -> None:
        self.fail, self.kill, self.calls = fail, kill, 0
        self._real = {name: getattr(os, name) for name in self.NAMES}

    def step(self) -> None:
        number = self.calls
        self.calls += 1
        if 0 <= self.kill <= number:
            raise Killed
        if number == self.fail:
            raise OSError(5, "Input/output error")

    def __enter__(self) -> Fault:
        def patched(name: str) -> Callable[..., Any]:
            def call(*args: Any, **flags: Any) -> Any:
                self.step()
                return self._real[name](*args, **flags)

            return call

        for name in self.NAMES:
            setattr(os, name, patched(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def bury(folder: Path, pid: int) -> None:
    """Make what this process was writing that of another, which has ended."""
    ours = f"-{os.getpid()}."
    for path in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):
        if ours in path.name:
            path.rename(path.with_name(path.name.replace(ours, f"-{pid}.")))


# what is there: the kinds of an old result, its settings; the kinds of the new one, and whether to overwrite
SCENES: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], bool]] = {
    "nothing": ((), "", ("lesions", "lung", "healthy"), False),
    "fewer files": (("lesions", "lung"), "new", ("lesions", "lung", "core", "probability"), False),
    "a file that is gone": (("lesions", "lung", "core"), "new", ("lesions", "lung"), False),
    "other settings": (("lesions", "lung", "classical", "core"), "old", ("lesions", "lung", "healthy"), True),
    "files of the user": ((), "", ("lesions", "lung"), True),
}


def stage_scene(folder: Path, scene: str) -> tuple[tuple[str, ...], bool, str | None]:
    """Make what is there; returns the kinds to write, whether to overwrite, and whose result there is."""
    before, settings_, kinds, overwrite = SCENES[scene]
    folder.mkdir()
    for name, content in FOREIGN.items():
        (folder / name).write_bytes(content)
    if before:
        write(folder, settings_, before)
    if scene == "a file that is gone":
        (folder / "p1_core.nii.gz").unlink()
        return ("lesions", "lung", "core"), overwrite, None
    if scene == "files of the user":
        (folder / "p1_lesions.nii.gz").write_bytes(b"mine")
    return kinds, overwrite, settings_ or None


def attempt(folder: Path, kinds: Any, overwrite: bool, fail: int = -1, kill: int = -1) -> int:
    """Run with faults; returns how many calls there were."""
    with Fault(fail, kill) as fault, suppress(OSError, Killed):
        run(folder, "new", kinds, fault.step, overwrite=overwrite)
    return fault.calls


def check_after(folder: Path, kinds: Any, overwrite: bool, before: str | None, pid: int, scene: str) -> None:
    """Whatever happened: a whole result or none, and a rerun that ends with the new one."""
    for name, content in FOREIGN.items():
        assert (folder / name).read_bytes() == content
    if scene != "a file that is gone":  # whose record is not true from the beginning
        assert finished(folder) in {before, "new", None}
    bury(folder, pid)
    to_write(folder, "p1", request("new"), kinds, overwrite=True)
    if scene != "a file that is gone":
        assert finished(folder) in {before, "new", None}
    run(folder, "new", kinds, overwrite=overwrite)
    assert finished(folder) == "new"
    wanted = {f"p1{FILES[kind]}" for kind in kinds} | {"p1.json"}
    assert {path.name for path in folder.iterdir()} == wanted | FOREIGN.keys()
    for name, content in FOREIGN.items():
        assert (folder / name).read_bytes() == content


@pytest.mark.parametrize("how", ["killed", "failed", "failed, and killed while it cleared away"])
@pytest.mark.parametrize("scene", SCENES)
def test_a_call_that_ends_anywhere_leaves_a_whole_result_or_none(
    tmp_path: Path, dead: int, scene: str, how: str
) -> None:
    """At every single call of the file system."""
    number, at, later = 0, 0, 1
    while at < 100:
        folder = tmp_path / str(number)
        kinds, overwrite, before = stage_scene(folder, scene)
        fail = -1 if how == "killed" else at
        kill = -1 if how == "failed" else at if how == "killed" else at + later
        calls = attempt(folder, kinds, overwrite, fail, kill)
        check_after(folder, kinds, overwrite, before, dead, scene)
        if calls <= at:
            break
        number, later = number + 1, later + 1
        if how in ("killed", "failed") or calls <= kill:
            at, later = at + 1, 1
    assert 8 < at < 99


@settings(max_examples=200, deadline=None)
@given(
    scene=st.sampled_from(sorted(SCENES)),
    faults=st.lists(st.tuples(st.integers(-1, 30), st.integers(-1, 30)), min_size=2, max_size=4),
)
def test_calls_that_end_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, dead: int, scene: str, faults: list[tuple[int, int]]
) -> None:
    """What takes up the work of one that was killed may be killed, too."""
    folder = tmp_path_factory.mktemp("case") / "out"
    kinds, overwrite, before = stage_scene(folder, scene)
    for fail, kill in faults:
        attempt(folder, kinds, overwrite, fail, kill)
        bury(folder, dead)
    check_after(folder, kinds, overwrite, before, dead, scene)


def test_what_was_whole_is_finished_by_the_next_call(tmp_path: Path, dead: int) -> None:
    """Without another computation; a file that came to its place meanwhile is not replaced."""
    kinds = ("lesions", "lung")
    calls = attempt(tmp_path / "all", kinds, False)
    # the last of them: two files, the record, the hidden folder
    for back, whole in ((2, True), (4, True), (5, False)):
        folder = tmp_path / f"{back}"
        attempt(folder, kinds, False, kill=calls - back)
        assert finished(folder) is None
        bury(folder, dead)
        assert to_write(folder, "p1", request("new"), kinds) == (() if whole else kinds)
        assert finished(folder) == ("new" if whole else None)
    for back, late in ((4, "p1_lesions.nii.gz"), (4, "p1_lung.nii.gz"), (3, "p1_lung.nii.gz")):
        folder = tmp_path / f"late {back} {late}"
        attempt(folder, kinds, False, kill=calls - back)
        bury(folder, dead)
        (folder / late).write_bytes(b"mine")
        with pytest.raises(ValueError, match=f"output holds {late}, which is of no finished call"):
            to_write(folder, "p1", request("new"), kinds)
        assert [path.name for path in folder.iterdir()] == [late]
        assert (folder / late).read_bytes() == b"mine"


@pytest.mark.parametrize("last", ["p1_lesions.nii.gz", "p1_lung.nii.gz", "p1.json"])
def test_a_file_that_cannot_be_moved_leaves_the_old_result_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    write(tmp_path, "old", ("lesions", "lung", "core"))
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / last:
            raise OSError("no room")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no room"):
        run(tmp_path, "new", ("lesions", "lung"), overwrite=True)
    left = {path.name for path in tmp_path.iterdir()}
    if last == "p1_lesions.nii.gz":  # the first to be moved
        assert finished(tmp_path) == "old"
        assert left == {"p1.json", *(f"p1_{kind}.nii.gz" for kind in ("lesions", "lung", "core"))}
    else:
        assert left == set()


def test_other_hidden_folders_stay(tmp_path: Path, dead: int) -> None:
    """Of a case whose name begins alike, of a live call, and with what no call writes."""
    host = temporary(tmp_path / "x").name.partition(".of-")[2].rpartition("-")[0]
    digits = "0123456789abcdef"
    stays = [f".p1.x.of-{host}-{dead}.{digits}", f".p1.of-{host}-{os.getpid()}.{digits}"]
    stays += [f".p1.of-{host}-{dead}.{digits[::-1]}", f".p1.{'0a' * 16}", ".p1.of-mine"]
    goes = f".p1.of-{host}-{dead}.{digits}"
    for name in (*stays, goes):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p1_lesions.nii.gz").write_bytes(b"part")
    (tmp_path / stays[2] / "thesis.txt").write_text("mine")
    (tmp_path / f".p1.of-{host}-{dead}.{'0' * 16}").symlink_to(tmp_path / stays[3])
    run(tmp_path, "new", ("lesions", "lung"))
    assert finished(tmp_path) == "new"
    assert all((tmp_path / name / "p1_lesions.nii.gz").exists() for name in stays)
    assert (tmp_path / stays[2] / "thesis.txt").exists()
    assert not (tmp_path / goes).exists()


@pytest.mark.parametrize("case", ["[p]*?", "é" * 100, "p.nii.gz", "a\nb", "x" * 200])
def test_cases_of_any_name(tmp_path: Path, dead: int, case: str) -> None:
    def of(call: str) -> None:
        record = {**record_of(call), "case": case}
        write_case(tmp_path, case, {kind: writer(f"{call} {kind}") for kind in ("lesions", "lung")}, record)

    of("old")
    with Fault(kill=5), pytest.raises(Killed):
        of("new")
    bury(tmp_path, dead)
    of("new")
    assert finished(tmp_path, case) == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{case}{ending}" for ending in (".json", "_lesions.nii.gz", "_lung.nii.gz")
    )


def test_cases_whose_hidden_folders_are_named_alike(tmp_path: Path, dead: int) -> None:
    """Names of folders are cut where they are too long."""
    first, second = ("x" * 220 + letter for letter in "ab")

    def of(case: str, call: str) -> None:
        record = {**record_of(call), "case": case}
        write_case(tmp_path, case, {kind: writer(f"{call} {kind}") for kind in ("lesions", "lung")}, record)

    of(first, "old")
    with Fault(kill=4), pytest.raises(Killed):
        of(first, "new")
    assert finished(tmp_path, first) is None
    bury(tmp_path, dead)
    of(second, "new")
    assert finished(tmp_path, second) == "new"
    assert to_write(tmp_path, first, request("new"), ("lesions", "lung")) == ()
    assert finished(tmp_path, first) == "new"


def test_a_finished_case_is_skipped(tmp_path: Path) -> None:
    kinds = ("lesions", "lung")
    assert to_write(tmp_path, "p1", request("a"), kinds) == kinds
    write(tmp_path, "a", kinds)
    assert to_write(tmp_path, "p1", request("a"), kinds) == ()
    assert to_write(tmp_path, "p1", request("a"), ("lesions",)) == ()
    assert to_write(tmp_path, "p1", request("a"), ("lung", "core")) == ("lesions", "lung", "core")
    assert to_write(tmp_path, "p1", request("a"), kinds, overwrite=True) == kinds
    # an entry that an earlier version did not write
    assert to_write(tmp_path, "p1", request("a") | {"ct_stamp": {"bytes": 3}}, kinds) == ()
    (tmp_path / "p1_lung.nii.gz").unlink()
    assert to_write(tmp_path, "p1", request("a"), ("lesions",)) == ()
    assert to_write(tmp_path, "p1", request("a"), kinds) == kinds


def test_a_case_of_another_call_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", ("lesions", "lung"))
    told = re.escape(
        'settings must be that of this call, or overwrite passed: there {"of": "a"}, now {"of": "b"}'
    )
    with pytest.raises(ValueError, match=rf"p1\.json: {told}"):
        to_write(tmp_path, "p1", request("b"), ("lesions", "lung"))
    record = record_of("a") | {"lungs_stamp": {"bytes": 3}}
    write_case(tmp_path, "p1", {kind: writer(kind) for kind in ("lesions", "lung")}, record)
    with pytest.raises(ValueError, match="the lung mask must be as it was when it was read, or overwrite"):
        to_write(tmp_path, "p1", request("a") | {"lungs_stamp": {"bytes": 4}}, ("lesions", "lung"))


@pytest.mark.parametrize("name", [*(f"p1{ending}" for ending in FILES.values()), "p1.json"])
def test_files_of_others_are_replaced_where_that_is_asked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"[1]")
    with pytest.raises(ValueError, match="take another folder or pass overwrite"):
        to_write(tmp_path, "p1", request("a"), ("lesions", "lung"))
    if name not in ("p1.json", "p1_core.nii.gz"):
        with pytest.raises(ValueError, match=f"output holds {name}, which is of no finished call"):
            write(tmp_path, "a", FILES)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"[1]")]
    kinds = to_write(tmp_path, "p1", request("a"), ("lesions", "lung"), overwrite=True)
    write(tmp_path, "a", kinds, overwrite=True)
    assert finished(tmp_path) == "a"
    written = name in ("p1.json", "p1_lesions.nii.gz", "p1_lung.nii.gz")
    assert ((tmp_path / name).read_bytes() == b"[1]") == (not written)  # what is not written is not touched


@pytest.mark.parametrize("name", ["p1_lung.nii.gz", "p1.json"])
@pytest.mark.parametrize("what", ["folder", "link", "link to a folder"])
def test_what_is_no_file_is_never_followed(tmp_path: Path, name: str, what: str) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.mkdir()
    (other / "precious").write_bytes(b"mine")
    if what == "folder":
        (out / name).mkdir()
        with pytest.raises(OSError, match=f"{name} must be a file, got a folder"):
            run(out, "a", ("lesions", "lung"), overwrite=True)
        assert [path.name for path in out.iterdir()] == [name]
        return
    (out / name).symlink_to(other / "precious" if what == "link" else other)
    run(out, "a", ("lesions", "lung"), overwrite=True)
    assert finished(out) == "a"
    assert [path.read_bytes() for path in other.iterdir()] == [b"mine"]


def test_a_record_removes_no_file_of_others(tmp_path: Path) -> None:
    """A record may name any file: that of another case is not this one's."""
    write(tmp_path, "a", ("lesions", "lung"))
    record = json.loads((tmp_path / "p1.json").read_text())
    record["files"] |= {"classical": "p2_lesions.nii.gz", "core": "notes.txt", "probability": "p1.json"}
    (tmp_path / "p1.json").write_text(json.dumps(record))
    for name in ("p2_lesions.nii.gz", "notes.txt"):
        (tmp_path / name).write_bytes(b"mine")
    run(tmp_path, "b", ("lesions", "lung"), overwrite=True)
    assert finished(tmp_path) == "b"
    assert {(tmp_path / name).read_bytes() for name in ("p2_lesions.nii.gz", "notes.txt")} == {b"mine"}


def test_inputs_and_tables_of_others_are_refused_beforehand(tmp_path: Path) -> None:
    ct = tmp_path / "q_lung.nii.gz"
    ct.touch()
    check_output(tmp_path, {"p": [ct]})
    with pytest.raises(ValueError, match=r"output must not replace an input, got .* for .*q_lung\.nii\.gz"):
        check_output(tmp_path, {"p": [ct], "q": []}, overwrite=True)
    (tmp_path / "p_core.nii.gz").symlink_to(ct)  # the same file by another name
    with pytest.raises(ValueError, match=r"output must not replace an input, got .* for .*p_core\.nii\.gz"):
        check_output(tmp_path, {"p": [ct]})
    for name in ("", ".p", "a/b", "..", "a\0"):
        with pytest.raises(ValueError, match="case must be a file's name, not hidden"):
            check_output(tmp_path, {name: []})
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        check_output(ct, {})
    table = tmp_path / "volumes.csv"
    table.write_text("case,volume\np1,3\n")
    with pytest.raises(ValueError, match=r"output holds volumes\.csv, which no call wrote"):
        check_output(tmp_path, {})
    check_output(tmp_path, {}, overwrite=True)
    write_table(tmp_path)  # nothing is finished, so that there is nothing to replace it
    assert table.read_text() == "case,volume\np1,3\n"
    table.write_text(f"case,{','.join(VOLUMES[:3])}\n")  # of an earlier version
    check_output(tmp_path, {})
    write_table(tmp_path)
    assert not table.exists()


def test_the_table_is_of_all_finished_cases(tmp_path: Path) -> None:
    kinds = ("lesions", "lung")
    volumes = {"lung_ml": 1234.56, "lesion_ml": 1.236, "percent": None, "left_lesion_ml": 0.0}
    for case in ("b", "a"):
        record = record_of("x", case) | {"volumes": volumes}
        write_case(tmp_path, case, {kind: writer(kind) for kind in kinds}, record)
    # JSON of others does no harm, and a damaged record with a map is told
    for name, text in (("notes", '{"by": "me"}'), ("cut", "{"), ("list", "[1]"), ("bad", "{}")):
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "bad_lesions.nii.gz").touch()
    write_table(tmp_path)
    rows = list(csv.DictReader((tmp_path / "volumes.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == ["a", "b"]
    assert (rows[0]["lung_ml"], rows[0]["lesion_ml"], rows[0]["percent"]) == ("1234.6", "1.24", "")
    assert (rows[0]["left_lesion_ml"], rows[0]["right_lung_ml"]) == ("0.00", "")
    records, failures = read_records(tmp_path)
    assert [record["case"] for record in records] == ["a", "b"]
    assert failures.keys() == {"bad"}
    assert "bad.json: not the record of a prediction: case: Field required" in failures["bad"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"case": "p2"}, "must name its own case, and its lesions and lung"),
        ({"files": {"lesions": "p1_lesions.nii.gz"}}, "must name its own case, and its lesions and lung"),
        ({"volumes": {"lung_ml": 1.0}}, "volumes must have lung_ml and lesion_ml"),
        ({"volumes": {"lung_ml": 1.0, "lesion_ml": -1.0}}, "volumes.lesion_ml: "),
        ({"models": [{"probability": "0.5"}]}, "models.0.probability: "),
        ({"inflation": 0.0}, "inflation: "),
        ({"ct": ""}, "ct: "),
        ({"ct": "a\0b"}, "ct: "),
    ],
)
def test_what_is_no_record(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    write(tmp_path, "a", ("lesions", "lung"))
    file = tmp_path / "p1.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match="not the record of a prediction: ") as caught:
        read_record(file)
    assert told in str(caught.value)


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    record = record_of("a") | {"seconds": float("nan"), "grid": {"spacing": [1.0, float("inf")]}}
    write_case(tmp_path, "p1", {kind: writer(kind) for kind in ("lesions", "lung")}, record)
    found = read_record(tmp_path / "p1.json")
    assert (found["seconds"], found["grid"]) == (None, {"spacing": [1.0, None]})


def test_sides_are_measured_apart() -> None:
    lung = np.zeros((2, 4, 6), bool)
    right, left = lung.copy(), lung.copy()
    right[:, :, :3], left[:, :, 3:5] = True, True
    lesions = lung.copy()
    lesions[0, 0, 1:4] = True
    found = volumes_of(lesions, right | left, (10.0, 10.0, 10.0), (right, left))
    assert found == {
        "lung_ml": 40.0, "lesion_ml": 3.0, "percent": 7.5,
        "right_lung_ml": 24.0, "right_lesion_ml": 2.0, "right_percent": pytest.approx(200 / 24),
        "left_lung_ml": 16.0, "left_lesion_ml": 1.0, "left_percent": 6.25,
    }  # fmt: skip
    none = volumes_of(lesions, right, (10.0, 10.0, 10.0), (right, lung))
    assert none["left_lung_ml"] == 0.0
    assert none["left_percent"] is None
    assert volumes_of(lesions, right, (1.0, 1.0, 1.0))["right_lung_ml"] is None


def test_a_short_file_is_seen(tmp_path: Path) -> None:
    """A gzip file may end well and still lack voxels."""
    sitk = pytest.importorskip("SimpleITK")
    path = tmp_path / "p1.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5)), str(path))
    check_written(path)
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(OSError, match=f"{len(content) - 1} of {len(content)} bytes were written"):
        check_written(path)
    path.write_bytes(b"")
    with pytest.raises(OSError, match="could not be written completely"):
        check_written(path)


def test_voxels_beside_a_header_count(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(np.zeros((3, 4, 5), np.int16))
    for ending, data in ((".mhd", ".raw"), (".nhdr", ".raw")):
        header = tmp_path / f"{ending[1:]}{ending}"
        sitk.WriteImage(image, str(header))
        (voxels,) = tmp_path.glob(f"{ending[1:]}{data}*")
        first = stamp([header])
        assert first == stamp([header])
        assert first["files"] == 2
        assert first["bytes"] == header.stat().st_size + voxels.stat().st_size
        os.utime(voxels, ns=(0, 5))
        assert stamp([header]) != first


def test_every_kind_of_file_has_a_name_of_its_own() -> None:
    assert len(set(FILES.values())) == len(FILES)
    assert all(ending.startswith("_") for ending in output.FILES.values())
