"""The text a newcomer reads runs: Python blocks and commands are executed, options and linked files exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "getting-started.md"]
DOCS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page not in PAGES]


def blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(page):
    lines = [
        line[2:]
        for block in blocks(page, "console")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]
    return [shlex.split(line, comments=True) for line in lines]


def test_readme_python_runs(capsys):
    (first,) = blocks(PAGES[0], "python")
    assert len(first.splitlines()) <= 8
    exec(compile(first, "README.md", "exec"), {})
    assert re.match(r"\d+ lesions \(32, 256, 320\) 0\.\d+", capsys.readouterr().out)


def test_getting_started_python_runs(tmp_path, monkeypatch):
    pytest.importorskip("SimpleITK")
    import SimpleITK as sitk

    import lesionsynth as ls

    chest = ls.phantom.chest_ct(shape=(8, 64, 80), seed=1)
    mask = chest.lung_mask.astype("uint8")
    abdomen = mask * np.int16(1110) - np.int16(1000)
    for name, array in (("chest", chest.hu), ("lung", mask), ("abdomen", abdomen), ("liver", mask)):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / f"{name}.nii.gz"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(PAGES[1], "python"):
        exec(compile(block, "getting-started.md", "exec"), names)
    assert names["config"].spacing == names["volume"].spacing
    assert (names["pair"].image < names["image"]).any()


def test_generator_commands_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from lesionsynth.cli import main

    own = [
        c for c in commands(PAGES[0]) if c[:3] == ["python", "-m", "lesionsynth"] and "chest.nii.gz" not in c
    ]
    assert [c[3] for c in own] == ["preview", "synth", "replay", "info"]
    monkeypatch.chdir(tmp_path)
    for command in own:
        assert main(command[3:]) == 0, shlex.join(command)
    assert (tmp_path / "preview.png").stat().st_size > 10_000


@pytest.mark.parametrize("page", [*PAGES, *DOCS], ids=lambda page: page.stem)
def test_options_of_normnet_commands_exist(page, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal would wrap option names
    for command in commands(page):
        if command[:2] != ["python", "-m"] or not command[2].startswith("normnet"):
            continue
        package = importlib.util.find_spec(command[2]).submodule_search_locations
        module = importlib.import_module(f"{command[2]}.__main__" if package else command[2])
        chosen = [word for word in command[3:4] if word == "predict"]  # of normnet.baselines
        with pytest.raises(SystemExit) as end:
            module.main([*chosen, "--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        for option in (word for word in command if word.startswith("--")):
            assert re.search(rf"{option}\b", text), f"{command[2]} has no option {option}"


def test_readme_shows_every_command():
    shown = {c[2] for c in commands(PAGES[0]) if c[:2] == ["python", "-m"] and c[2].startswith("normnet")}
    parts = ("prepare", "train", "predict", "report", "evaluate", "ablate", "baselines")
    assert shown == {f"normnet.{part}" for part in parts}


@pytest.mark.parametrize("page", [*PAGES, *DOCS], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in (c for page in PAGES for c in commands(page) if c[0] == "make"):
        assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE), command
