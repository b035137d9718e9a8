"""No command removes or replaces what it did not write, whatever lies in the folder it is given."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("SimpleITK")


from lesionsynth import cli, files
from normnet import demo, evaluate, model
from normnet.ablate import Cell
from normnet.output import FILES
from normnet.prepare.store import Store
from tests.hostile.commands import Study, hidden, snapshot
from tests.hostile.tally import trial

RUN = ("config.json", "model.safetensors", "best.safetensors", "state.safetensors", "metrics.csv")
NAMES = (
    *(f"run/{name}" for name in (*RUN, "notes.txt")),
    *RUN,
    "baseline.safetensors",
    *(f"model-{n}.safetensors" for n in (0, 1, 7)),
    "export.json",
    *("report.html", "results.json", "cases.csv", "tables.md", "table.csv", "table.md", "preview.png"),
    *("settings.json", "volumes.csv", "summary.csv", "p1.json", "p1_lesions.nii.gz", "p1_lung.nii.gz"),
    *("p1_core.nii.gz", "p1_probability.nii.gz", "p1_healthy.nii.gz"),
    *("store.json", "cases/p1/meta.json", "cases/p1/notes.txt", "cases/p1/hu.b2nd", "qc/p1.png"),
    *("p1_000000/plan.json", "p1_000000/record.json", "p1_000000/notes.txt", "p1_000000"),
    *("plan.json", "record.json", "pair.npz", "image.nii.gz"),
    *("run", "runs/covid_lung/seed0/config.json", "runs/covid_lung/seed0/2.safetensors"),
    *("scores/covid_lung/2/phantom 1.json", "cases", "qc", "runs", "scores"),
    *(".git/HEAD", ".bashrc", f".p1.{'0a' * 16}/p1_lesions.nii.gz", f".p1.{'0b' * 16}"),
    *(".p1.of-elsewhere-7.xyz", ".report.html.of-here-x.1", "thesis.txt", "photo.JPG"),
    *(
        ".minutes.of-meeting-2024.txt",
        "cases/.minutes.of-meeting-2024.txt",
        ".p1_000000.of-mine-1.0123456789",
    ),
)
CONTENTS = (
    b"",
    b"mine",
    b"{}",
    b'{"format": 1}',
    b"case,mine\np1,3\n",
    b"<!doctype html><html>",
    b"\x89PNG\r\n",
)
QUICK = (
    "synth",
    "synth --overwrite",
    "replay",
    "replay --overwrite",
    "preview",
    "prepare",
    "report",
    "export",
)
QUICK += ("train --resume", "predict", "predict --overwrite", "evaluate", "baselines predict")
LONG = ("train", "demo", "ablate", "baselines", "baselines --overwrite", "prepare --overwrite")
LONG += ("baselines predict --overwrite",)
CALLS = (*QUICK, *(pytest.param(call, marks=pytest.mark.slow) for call in LONG))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("study"))


def fill(folder: Path, outside: Path, dice: random.Random, names: tuple[str, ...] = NAMES) -> None:
    """Put foreign files, folders and links of likely names into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    outside.mkdir(parents=True, exist_ok=True)
    (outside / "precious").write_bytes(b"outside")
    for name in dice.sample(names, dice.randint(1, min(6, len(names)))):
        path = folder / name
        if any(p.is_file() or p.is_symlink() for p in path.parents if p != folder) or os.path.lexists(path):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = dice.choice(("file", "file", "file", "folder", "link", "link to folder", "broken link"))
        if kind == "file":
            path.write_bytes(dice.choice(CONTENTS))
            os.utime(path, (1e9, 1e9))  # no age makes it ours
        elif kind == "folder":
            path.mkdir()
            (path / "notes.txt").write_bytes(b"mine")
        elif kind == "broken link":
            path.symlink_to(outside / "nothing")
        else:
            path.symlink_to(outside if kind == "link to folder" else outside / "precious")


REPLACED = ("p1.json", *(f"p1{ending}" for ending in FILES.values()), "volumes.csv")
"""What ``predict --overwrite`` is asked to replace, whoever wrote it: files and links, no folders."""


def unharmed(before: dict[str, object], folder: Path, call: str = "") -> None:
    after = snapshot(folder)
    asked = REPLACED if call.endswith("predict --overwrite") else ()
    before = {name: what for name, what in before.items() if what == "folder" or name not in asked}
    lost = {name: after.get(name, "gone") for name, what in before.items() if after.get(name, "gone") != what}
    assert not lost


@pytest.mark.parametrize("call", CALLS)
def test_foreign_content_stays(study: Study, tmp_path: Path, call: str) -> None:
    dice = random.Random(call)
    own = tuple(name for name in NAMES if any(part in name for part in LIKELY.get(call.split()[0], ())))
    for number in range(6):
        folder, outside = tmp_path / f"{number}" / "X", tmp_path / f"{number}" / "outside"
        fill(folder, outside, dice, NAMES if number % 3 == 0 or not own else own)
        before, beyond = snapshot(folder), snapshot(outside)
        with trial("removals"):
            assert study.calls()[call](folder) in (0, 1, 2)
            unharmed(before, folder, call)
            assert snapshot(outside) == beyond


LIKELY = {
    "synth": ("p1_000000",),
    "replay": ("record.json", "plan.json", "pair", "image"),
    "preview": ("preview",),
    "prepare": ("cases/", "qc", "store", "summary", ".p1"),
    "train": RUN,
    "predict": ("p1", "settings", "volumes"),
    "evaluate": ("report", "results", "cases.csv", "tables"),
    "report": ("report",),
    "export": ("model-", "export"),
    "demo": ("run/", "report", "results", "cases.csv", "tables"),
    "ablate": ("table.", "report", "results", "runs", "scores"),
    "baselines": ("baseline", "config", "metrics", "p1"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "call", [call for call in QUICK + LONG if call not in ("replay", "train", "baselines")]
)
def test_what_comes_to_a_finished_result_stays(study: Study, tmp_path: Path, call: str) -> None:
    """The folder is ours by its records; what others put there since is not."""
    dice = random.Random(call)
    first = {"train --resume": "train"}.get(call, call)
    assert study.calls()[first](tmp_path / "made") == 0
    inside = [p.relative_to(tmp_path / "made") for p in (tmp_path / "made").rglob("*") if p.is_dir()]
    inside = [Path(), *(p for p in inside if "events" not in p.name)]
    for number in range(3 if call in LONG else 6):
        folder, outside = tmp_path / f"{number}" / "X", tmp_path / f"{number}" / "outside"
        shutil.copytree(tmp_path / "made", folder, symlinks=True)
        ours, backup = snapshot(folder), tmp_path / f"{number}" / "backup"
        shutil.copytree(folder, backup, symlinks=True, copy_function=os.link)  # as cp -al makes them
        place = folder / dice.choice(inside)
        fill(
            place,
            outside,
            dice,
            ("notes.txt", "model-7.safetensors", "extra/deep.txt", ".hidden", "plan2.json"),
        )
        foreign = {name: what for name, what in snapshot(folder).items() if name not in ours}
        with trial("removals"):
            assert study.calls()[call](folder) in (0, 1, 2)
            unharmed(foreign, folder)
            assert snapshot(outside) == {"precious": b"outside"}
            assert snapshot(backup) == ours


def test_demo_keeps_a_run_of_the_user(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = study.calls()
    with trial("removals"):
        assert call["train"](tmp_path / "run") == 0
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert demo.main(["--output", str(tmp_path), "--minutes", "0.1"]) == 2
        said = capsys.readouterr().err
        assert "output holds run, which no demo wrote" in said
        assert said.count("\n") == 1
        assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_a_second_demo_replaces_the_first_alone(study: Study, tmp_path: Path) -> None:
    call = study.calls()["demo"]
    with trial("removals"):
        assert call(tmp_path) == 0
        first = (tmp_path / "run/model.safetensors").read_bytes()
        assert call(tmp_path) == 0
        assert (tmp_path / "run/model.safetensors").read_bytes() == first
        assert not hidden(tmp_path)
    with trial("removals"):
        (tmp_path / "run/notes.txt").write_text("mine")
        before = snapshot(tmp_path)
        assert call(tmp_path) == 2
        assert snapshot(tmp_path) == before


def test_export_keeps_its_inputs_and_weights_of_others(study: Study, tmp_path: Path) -> None:
    runs = study.root / "runs"
    assert model.main([str(runs), "--output", str(tmp_path)]) == 0
    before = snapshot(tmp_path)
    for inputs in ([tmp_path], [tmp_path / "model-1.safetensors"], [runs, tmp_path / "model-0.safetensors"]):
        with trial("removals"):
            assert model.main([*map(str, inputs), "--output", str(tmp_path)]) == 2
            assert snapshot(tmp_path) == before
    with trial("removals"):  # a smaller ensemble replaces a larger one that an export wrote
        assert model.main([str(runs / "seed1"), "--output", str(tmp_path)]) == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == ["export.json", "model-0.safetensors"]
    for name in ("model-7.safetensors", "model-0.safetensors", "model-mine.safetensors"):
        with trial("removals"):
            shutil.copy(runs / "seed0/model.safetensors", tmp_path / name)
            before = snapshot(tmp_path)
            assert model.main([str(runs), "--output", str(tmp_path)]) == 2
            assert snapshot(tmp_path) == before


def test_samples_are_replaced_where_they_are_samples(
    study: Study, tmp_path: Path, monkeypatch, capsys
) -> None:
    call = study.calls()["synth --overwrite"]
    assert call(tmp_path) == 0
    sample = tmp_path / "p1_000000"
    with trial("removals"):
        assert call(tmp_path) == 0
        assert not hidden(tmp_path)
    plan = ["replay", str(sample / "plan.json"), str(study.root / "ct/p1.nii.gz")]
    plan += ["--mask", str(study.root / "lung/p1_lung.nii.gz"), "--overwrite", "--output"]
    before = snapshot(tmp_path)
    monkeypatch.chdir(sample)
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter").write_text("mine")
    (tmp_path / "link").symlink_to(sample)
    before = snapshot(tmp_path)
    for output in (".", "..", "/", str(sample), str(home), str(tmp_path / "link"), str(sample / "plan.json")):
        with trial("removals"):
            capsys.readouterr()
            assert cli.main([*plan, output]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1, said
            assert snapshot(tmp_path) == before


@pytest.mark.parametrize("call", CALLS)
def test_a_file_where_a_folder_should_be(study: Study, tmp_path: Path, call: str, capsys) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    with trial("removals"):
        study.calls()[
            call.replace("replay", "replay --overwrite").replace("--overwrite --overwrite", "--overwrite")
        ](file)
        assert snapshot(tmp_path) == {"file": b"mine"}
        assert "Traceback" not in capsys.readouterr().err


def test_an_evaluation_keeps_the_list_it_reads(study: Study, tmp_path: Path, capsys) -> None:
    row = f"p1,{study.root}/ct/p1.nii.gz,{study.root}/lesion/p1_lesion.nii.gz,{study.maps}/p1_lesions.nii.gz"
    table = f"case,ct,lesions,prediction\n{row}\n"
    assert study.calls()["evaluate"](tmp_path) == 0
    for _ in range(2):
        with trial("removals"):
            (tmp_path / "cases.csv").write_text(table)
            assert evaluate.main(["--cases", str(tmp_path / "cases.csv"), "--output", str(tmp_path)]) == 2
            assert (tmp_path / "cases.csv").read_text() == table
            (tmp_path / "results.json").unlink(missing_ok=True)
    assert "cases.csv" in capsys.readouterr().err


def test_a_prediction_keeps_an_annotation(study: Study, tmp_path: Path, capsys) -> None:
    """Unless it is asked to overwrite what it writes; what it does not write stays."""
    for name in ("p1_lesions.nii.gz", "p1_core.nii.gz", "p1_lesions.dcm"):
        with trial("removals"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / name).write_bytes(b"my own")
            before = snapshot(folder)
            assert study.calls()["predict"](folder) == 2
            assert f"output holds {name}, which is of no finished call" in capsys.readouterr().err
            assert snapshot(folder) == before
            assert study.calls()["predict --overwrite"](folder) == 0
            assert ((folder / name).read_bytes() == b"my own") == (name == "p1_lesions.dcm")


def test_a_case_with_more_than_its_files_stays(tmp_path: Path) -> None:
    import numpy as np

    store = Store.create(tmp_path / "s", {"spacing": [1.0, 0.8, 0.8]})
    hu, mask = np.zeros((3, 4, 5), np.int16), np.ones((3, 4, 5), bool)
    store.add("a", hu, mask)
    for name, kind in (
        ("notes.txt", "file"),
        ("sub", "folder"),
        ("hu.b2nd", "link"),
        ("meta.json", "missing"),
    ):
        with trial("removals"):
            case = tmp_path / "s/cases/a"
            kept = snapshot(case)
            path = case / name
            if kind == "file":
                path.write_text("mine")
            elif kind == "folder":
                path.mkdir()
            else:
                path.unlink()
            if kind == "link":
                path.symlink_to(tmp_path / "elsewhere")
            before = snapshot(tmp_path)
            with pytest.raises(ValueError, match="must be a case that this store wrote"):
                store.add("a", hu, mask, overwrite=True)
            assert snapshot(tmp_path) == before
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
            for file, content in kept.items():
                (case / file).write_bytes(content)
    store.add("a", hu + 1, mask, overwrite=True)
    assert not hidden(tmp_path)


def test_half_written_files_are_told_from_others(tmp_path: Path) -> None:
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    host = files.temporary(tmp_path / "x").name.partition(".of-")[2].rpartition("-")[0]
    digits = "0123456789abcdef"
    gone = [f".a.of-{host}-{dead}.{digits}", f".long{'x' * 150}.of-{host}-{dead}.{digits}.nii.gz"]
    gone += [f".a.csv.of-elsewhere-7.{digits}.csv"]
    stays = [
        f".a.csv.of-{host}-{os.getpid()}.{digits}.csv",
        f".a.csv.of-elsewhere-{dead}.{digits}.csv",
        f"a.csv.of-{host}-{dead}.{digits}.csv",
        f".a.csv.of-{host}-{dead}.{digits}0",
        f".a.csv.of-{host}-{dead}.{digits[1:]}.csv",
        f".a.csv.of-{host}-{dead}",
        f".a.of-my host-{dead}.{digits}",
        ".minutes.of-meeting-2024.txt",
        ".a.csv",
        ".a.csv.0123456789abcdef0123456789abcdef",
    ]
    for name in (*gone, *stays):
        (tmp_path / name).write_text("x")
        if "elsewhere-7." in name or "meeting" in name or "my host" in name:
            os.utime(tmp_path / name, (1e9, 1e9))
    full, link = f".full.of-{host}-{dead}.{digits}", f".link.of-{host}-{dead}.{digits}"
    (tmp_path / full).mkdir()
    (tmp_path / full / "thesis.txt").write_text("mine")
    (tmp_path / link).symlink_to(tmp_path / "a.csv.target")
    with trial("removals"):
        files.sweep(tmp_path, inside=("hu.b2nd",))
        left = {p.name for p in tmp_path.iterdir()}
        assert left == {*stays, full}


@pytest.mark.parametrize("length", [1, 100, 255])
def test_names_of_any_length_can_be_written(tmp_path: Path, length: int) -> None:
    for letter in ("a", "é", "\udcff"):
        with trial("removals"):
            size = len(os.fsencode(letter))
            path = tmp_path / (letter * (length // size or 1))
            files.write_atomically(path, "one")
            files.write_atomically(path, "two")
            assert path.read_text() == "two"
    assert not hidden(tmp_path)


def test_records_name_what_may_go(study: Study, tmp_path: Path) -> None:
    with trial("removals"):
        assert study.calls()["export"](tmp_path) == 0
        record = json.loads((tmp_path / "export.json").read_text())
        assert sorted(record["files"]) == ["model-0.safetensors", "model-1.safetensors"]
    # a record that names what it should not: nothing but weights is ever removed
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path.parent / "model-9.safetensors").write_text("mine")
    record["files"] |= {"thesis.txt": None, "../model-9.safetensors": None, "model-0.safetensors": None}
    (tmp_path / "export.json").write_text(json.dumps(record))
    with trial("removals"):
        assert study.calls()["export"](tmp_path) == 0
        assert (tmp_path / "thesis.txt").read_text() == "mine"
        assert (tmp_path.parent / "model-9.safetensors").read_text() == "mine"


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("name", ["results.json", "table.csv"])
def test_an_ablation_keeps_what_only_looks_like_its_own(
    study: Study, tmp_path: Path, monkeypatch, when: str, name: str
) -> None:
    """A record with a field of that name claims nothing, nor does a file that comes during the training."""
    foreign = {"results.json": '{"table": "modules"}', name: '{"table": "modules", "rows": []}'}

    def put(*_: object) -> Cell:
        for file, text in foreign.items() if when == "before" else [(name, foreign[name])]:
            (tmp_path / file).write_text(text)
        return Cell()

    monkeypatch.setattr("normnet.ablate._compute", put)
    if when == "before":
        put()
    before = snapshot(tmp_path)
    with trial("removals"):
        assert study.calls()["ablate"](tmp_path) == 2
        unharmed(before or {name: foreign[name].encode()}, tmp_path)
