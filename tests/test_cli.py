"""The commands: what they write, what they refuse, and that a replay is the same pair."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import lesionsynth as ls
from lesionsynth import _cases, preview
from lesionsynth.cli import build_parser, main

sitk = pytest.importorskip("SimpleITK", reason="reading CT needs the io extra")
pytest.importorskip("matplotlib", reason="pictures need the io extra")

SPACING = (4.0, 5.0, 5.0)
DEPTH = 6


class Files(NamedTuple):
    chest: ls.phantom.ChestCT
    ct: Path
    mask: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A chest and its mask as NIfTI, stored from head to feet and left to right, away from the origin."""
    folder = tmp_path_factory.mktemp("ct")
    chest = ls.phantom.chest_ct((20, 60, 76), SPACING, seed=4, level=0.5)
    for name, array in (("case.nii.gz", chest.hu), ("case_lung.nii.gz", chest.lung_mask.astype(np.uint8))):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array[::-1, :, ::-1]))
        image.SetSpacing(SPACING[::-1])
        # the file's first voxel is the last in z and x of LPS order
        image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, -1))
        image.SetOrigin((10 + 75 * 5.0, -20.0, 30 + 19 * 4.0))
        sitk.WriteImage(image, str(folder / name))
    return Files(chest, folder / "case.nii.gz", folder / "case_lung.nii.gz")


@pytest.fixture(autouse=True)
def small_phantom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cases, "PHANTOM_SHAPE", (16, 60, 76))
    monkeypatch.setattr(_cases, "PHANTOM_SPACING", SPACING)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Run a command that must fail, and return its one line."""
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.err.startswith(f"lesionsynth {argv[0]}: error: ")
    return captured.err


def run(*argv: str | Path) -> int:
    return main([str(a) for a in argv])


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# -------------------------------------------------------------------------------------------- preview


def test_preview_of_the_phantom(tmp_path: Path) -> None:
    from matplotlib.image import imread

    picture = tmp_path / "new" / "preview.png"
    assert run("preview", "--output", picture, "--depth", DEPTH, "--rows", 2) == 0
    assert is_png(picture)
    pixels = imread(picture)[..., :3]
    assert pixels.std() > 0.1
    # only the last column, the labels, is coloured
    colour = np.ptp(pixels, axis=2).max(0) > 0.1
    assert colour[colour.size * 3 // 4 :].any()
    assert not colour[: colour.size * 3 // 4 - 5].any()
    assert [p.name for p in picture.parent.iterdir()] == ["preview.png"], "no temporary file stays"


def test_preview_of_a_file(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "p.png"
    assert run("preview", files.ct, "--mask", files.mask, "--output", picture, "--depth", DEPTH) == 0
    assert is_png(picture)
    assert re.search(r"p\.png: \d+ lesions in slices \d+ to \d+", capsys.readouterr().out)


def test_previews_depend_on_the_seed(tmp_path: Path) -> None:
    pictures = []
    for seed in ("1", "1", "2"):
        run("preview", "--output", tmp_path / "p.png", "--depth", DEPTH, "--seed", seed, "--rows", "1")
        pictures.append((tmp_path / "p.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


def test_slices_are_spread_over_the_lesions() -> None:
    labels = np.zeros((10, 4, 4), np.int32)
    labels[3:9] = 1
    assert preview.choose_slices(labels, labels > 0, 3) == [3, 5, 7]
    assert preview.choose_slices(np.zeros_like(labels), labels > 0, 1) == [5]


# ---------------------------------------------------------------------------------------------- synth


def test_synth_writes_the_pair_the_library_makes(files: Files, tmp_path: Path) -> None:
    argv = ["synth", files.ct, "--mask", files.mask, "--output", tmp_path, "--depth", DEPTH, "--slice", 10]
    assert run(*argv, "--index", 7, "--count", 2, "--seed", 3, "--lung-fraction", 0.6) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["case_000007", "case_000008"]
    hu, mask = files.chest.hu[7:13], files.chest.lung_mask[7:13]
    healthy = ls.window_hu(hu) * mask
    config = ls.LesionConfig(lengths="mm")
    expected = ls.LesionSynthesizer(config, seed=3)(
        healthy, mask, index=8, lung_fraction=0.6, spacing=SPACING
    )
    with np.load(tmp_path / "case_000008" / "pair.npz") as stored:
        np.testing.assert_array_equal(stored["image"], expected.image)
        np.testing.assert_array_equal(stored["target"], expected.target)
        np.testing.assert_array_equal(stored["labels"], expected.labels)
    plan = ls.LesionPlan.from_json((tmp_path / "case_000008" / "plan.json").read_text())
    assert plan == expected.plan
    record = json.loads((tmp_path / "case_000008" / "record.json").read_text())
    assert record["slab"] == [7, 13]
    assert record["source"] == {"input": "case.nii.gz", "mask": "case_lung.nii.gz"}
    assert str(tmp_path) not in json.dumps(record), "names, not folders of this machine"


def test_nifti_lies_where_the_file_lies(files: Files, tmp_path: Path) -> None:
    argv = ["--mask", files.mask, "--depth", DEPTH, "--slice", 10]
    assert run("synth", files.ct, *argv, "--output", tmp_path, "--format", "nifti") == 0
    assert run("synth", files.ct, *argv, "--output", tmp_path / "npz") == 0
    folder = tmp_path / "case_000000"
    names = {"image.nii.gz", "target.nii.gz", "labels.nii.gz", "plan.json", "record.json"}
    assert {p.name for p in folder.iterdir()} == names
    labels = sitk.ReadImage(str(folder / "labels.nii.gz"))
    ct = sitk.ReadImage(str(files.ct))
    # ITK itself moves the labels to the CT's grid; then the CT's array order undone is LPS order
    moved = sitk.GetArrayFromImage(sitk.Resample(labels, ct, sitk.Transform(), sitk.sitkNearestNeighbor))
    expected = np.zeros(files.chest.hu.shape, int)
    with np.load(tmp_path / "npz" / "case_000000" / "pair.npz") as stored:
        expected[7:13] = stored["labels"]
    assert expected.any()
    np.testing.assert_array_equal(moved[::-1, :, ::-1], expected)


def test_phantom_as_nifti(tmp_path: Path) -> None:
    assert run("synth", "--output", tmp_path, "--format", "nifti", "--depth", DEPTH) == 0
    image = sitk.ReadImage(str(tmp_path / "phantom_000000" / "image.nii.gz"))
    assert image.GetSize() == (76, 60, DEPTH)
    np.testing.assert_allclose(image.GetSpacing(), SPACING[::-1], rtol=1e-6)  # NIfTI stores float32


def test_existing_samples_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["synth", "--output", tmp_path, "--depth", DEPTH]
    assert run(*argv) == 0
    before = (tmp_path / "phantom_000000" / "pair.npz").read_bytes()
    assert "phantom_000000 exists; use --overwrite" in error_of(capsys, *argv, "--seed", "5")
    assert (tmp_path / "phantom_000000" / "pair.npz").read_bytes() == before
    assert run(*argv, "--seed", "5", "--overwrite") == 0
    assert (tmp_path / "phantom_000000" / "pair.npz").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["phantom_000000"]


def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert run("synth", "--output", tmp_path / "out", "--depth", DEPTH) == 2
    assert list((tmp_path / "out").iterdir()) == []


# --------------------------------------------------------------------------------------------- replay


def test_replay_gives_the_same_pair(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [files.ct, "--mask", files.mask]
    run("synth", *common, "--output", tmp_path, "--depth", DEPTH, "--index", 3, "--preset", "no_shapes")
    folder = tmp_path / "case_000003"
    capsys.readouterr()
    # the slab comes from the record: --depth is not repeated
    assert run("replay", folder / "plan.json", *common, "--output", tmp_path / "again") == 0
    assert "agrees with the record: hu, lung_mask, image, target, labels" in capsys.readouterr().out
    with np.load(folder / "pair.npz") as first, np.load(tmp_path / "again" / "pair.npz") as again:
        for name in ("image", "target", "labels"):
            np.testing.assert_array_equal(first[name], again[name])
    assert (folder / "plan.json").read_text() == (tmp_path / "again" / "plan.json").read_text()
    assert run("replay", tmp_path / "again" / "plan.json", *common) == 0, "a replay can be replayed"


def test_replay_of_the_phantom_needs_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("synth", "--output", tmp_path, "--depth", DEPTH, "--phantom-seed", 2)
    assert run("replay", tmp_path / "phantom_000000" / "plan.json") == 0
    assert "agrees with the record" in capsys.readouterr().out


def test_replay_notices_an_edited_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("synth", "--output", tmp_path, "--depth", DEPTH)
    path = tmp_path / "phantom_000000" / "plan.json"
    plan = json.loads(path.read_text())
    plan["blobs"][0]["mu0"] = 0.123
    path.write_text(json.dumps(plan))
    capsys.readouterr()
    assert run("replay", path) == 1
    assert "differs from the record: image" in capsys.readouterr().out


def test_replay_without_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("synth", "--output", tmp_path, "--depth", DEPTH)
    plan = tmp_path / "plan.json"
    plan.write_bytes((tmp_path / "phantom_000000" / "plan.json").read_bytes())
    assert run("replay", plan, "--depth", DEPTH) == 0
    assert "nothing to compare with" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- bad input


def test_a_file_needs_a_mask(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "preview", files.ct)
    assert "needs a lung mask: give --mask FILE" in message
    assert "normnet.prepare" in message


def test_bad_input_is_one_line(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [files.ct, "--mask", files.mask]
    out = ["--output", tmp_path / "out"]
    cases: list[tuple[list[str | Path], str]] = [
        (["preview", tmp_path / "none.nii", "--mask", files.mask], "no such file"),
        (["preview", files.ct, "--mask", tmp_path / "none.nii"], "no such file"),
        (["preview", "--mask", files.mask], "--mask needs an INPUT"),
        (["preview", *both, "--slice", "20"], r"--slice must be in [0, 20)"),
        (["preview", *both, "--depth", "-1"], "--depth must be >= 0, got -1"),
        (["preview", "--rows", "0"], "--rows must be >= 1, got 0"),
        (["preview", "--output", tmp_path / "a.jpg"], "--output must end in .png"),
        (["preview", "--seed", "-1"], "seed must be in [0, 2**32), got -1"),
        (["preview", "--index", "-1"], "index must be in [0, 2**32), got -1"),
        (["preview", "--lung-fraction", "0"], "lung_fraction must be in (0, 1], got 0"),
        (["preview", "--threads", "0"], "threads must be an integer >= 1, got 0"),
        (["preview", "--phantom-seed", "-4"], "seed must be >= 0, got -4"),
        (["synth", *out, "--count", "0"], "--count must be >= 1, got 0"),
        (["replay", tmp_path / "none.json"], "No such file"),
    ]
    for argv, message in cases:
        assert message in error_of(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_bad_plans_and_records(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("not json")
    assert "plan.json: a plan must be JSON" in error_of(capsys, "replay", plan)
    run("synth", files.ct, "--mask", files.mask, "--output", tmp_path, "--depth", DEPTH)
    folder = tmp_path / "case_000000"
    assert "was drawn on case.nii.gz: give it as INPUT" in error_of(capsys, "replay", folder / "plan.json")
    text = (folder / "plan.json").read_text()
    record = json.loads(text)
    record["seed"] = "three"
    plan.write_text(json.dumps(record))
    assert "seed must be an integer" in error_of(capsys, "replay", plan)
    plan.write_text(text)
    assert "plan was drawn for a volume of shape" in error_of(capsys, "replay", plan, "--depth", DEPTH - 1)
    (folder / "record.json").write_text("{}")
    assert "must be a record of format" in error_of(capsys, "replay", folder / "plan.json")


def test_missing_extras_are_named(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install = "pip install 'lesionsynth[io]'"
    for module in ("SimpleITK", "nibabel", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert install in error_of(capsys, "preview", "--output", tmp_path / "p.png", "--depth", DEPTH)
    assert install in error_of(capsys, "preview", files.ct, "--mask", files.mask)
    nifti = ["synth", "--output", tmp_path / "out", "--depth", DEPTH, "--format", "nifti"]
    assert install in error_of(capsys, *nifti)
    assert run("synth", "--output", tmp_path / "out", "--depth", DEPTH) == 0, "npz needs no extra"


def test_slab_without_lung(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(files.mask)))
    mask[:10] = 0  # the file runs from head to feet: the upper half
    image = sitk.GetImageFromArray(mask)
    image.CopyInformation(sitk.ReadImage(str(files.mask)))
    half = tmp_path / "half.nii.gz"
    sitk.WriteImage(image, str(half))
    argv = [files.ct, "--mask", half, "--depth", "4", "--output", tmp_path / "p.png"]
    assert "hold no lung: choose another --slice" in error_of(capsys, "preview", *argv, "--slice", "17")
    assert run("preview", *argv) == 0, "the slab with most lung is found"


@pytest.mark.parametrize(
    ("counts", "middle", "depth", "expected"),
    [
        ([0, 3, 9, 9, 1], None, 2, (2, 4)),
        ([9, 9, 0, 0], None, 3, (0, 3)),
        ([1, 1, 1, 1, 1], 4, 3, (2, 5)),
        ([1, 1, 1, 1, 1], 0, 3, (0, 3)),
        ([1, 1, 1, 1, 1], 2, 3, (1, 4)),
        ([1, 2, 3], None, 0, (0, 3)),
        ([1, 2, 3], 1, 32, (0, 3)),
    ],
)
def test_choice_of_the_slab(
    counts: list[int], middle: int | None, depth: int, expected: tuple[int, int]
) -> None:
    assert _cases.choose_slab(counts, middle, depth) == expected


# ----------------------------------------------------------------------------------------- the rest


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lesionsynth", "info"], capture_output=True, text=True, check=True, timeout=120
    )
    for word in ("lesionsynth", ls.__version__, "numpy", "numba", "threads", "cuda", "covid_lung"):
        assert word in done.stdout
    assert done.stderr == ""


def test_usage_errors_exit_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["nothing"], ["preview", "--preset", "none"], ["synth"], ["preview", "--seed", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["preview", "synth", "replay"])
def test_every_option_has_help_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    commands = next(a for a in build_parser()._actions if a.dest == "command")
    for action in commands.choices[command]._actions:  # type: ignore[index, call-overload]
        assert action.help, f"{action.dest} has no help"
        if action.default not in (None, False, "==SUPPRESS=="):
            assert f"(default: {action.default})" in re.sub(r"\s+", " ", text), action.dest


def test_checksum_sees_values_shape_and_type() -> None:
    a = np.arange(6, dtype=np.int16)
    sums = [_cases.checksum(v) for v in (a, a + 1, a.reshape(2, 3), a.astype(np.int32))]
    assert len(set(sums)) == 4
    assert _cases.checksum(a.copy()) == sums[0]
    assert _cases.checksum(np.stack([a, a], 1)[:, 0]) == sums[0], "layout does not matter"
