"""`docs/lungs_check.py`: how it changes a healthy scan, what it measures; and the weights of the package."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

pytest.importorskip("torch")
pytest.importorskip("monai")

from lesionsynth.io import read_ct
from normnet.config import BUNDLED_LUNGS
from normnet.prepare.case import method_of
from normnet.prepare.lungs import Lungs
from tests.conftest import docs_script
from tests.normnet.test_network import SPACING, Drawn, drawn, write


@pytest.fixture(scope="module")
def lungs_check() -> ModuleType:
    return docs_script("lungs_check")


FIELD = 205
"""Pixels of 820 mm: 4 mm."""


@pytest.fixture(scope="module")
def tried(lungs_check: ModuleType) -> tuple[Drawn, dict[str, Any]]:
    scan = drawn()
    lungs = Lungs(scan.right, scan.left)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lungs_check, "FIELD_VOXELS", FIELD)
        return scan, {trial.name: trial for trial in lungs_check.trials(scan.hu, lungs, SPACING)}


def test_trials_fit_together(tried: tuple[Drawn, dict[str, Any]]) -> None:
    """The drawn arrays are read-only: a trial that wrote to its scan would fail."""
    scan, found = tried
    assert len(found) == 15
    for name, trial in found.items():
        assert trial.hu.dtype == np.int16
        assert trial.hu.shape == trial.lungs.right.shape == trial.lungs.left.shape
        assert not (trial.lungs.right & trial.lungs.left).any()
        ml = np.prod(trial.spacing) / (0.027 if "0.3" in name else 1) / 1000
        # of two slices of 4 mm that make one of 8 mm, one may be lung: it counts
        bound = 0.04 if name == "8 mm slices" else 0.01
        assert trial.lungs.right.sum() * ml == pytest.approx(scan.right.sum() * 0.025, rel=bound)
        aerated = trial.hu[trial.lungs.left] < -320
        assert aerated.mean() > 0.98 or trial.part is not None
    assert_array_equal(found["healthy"].hu, scan.hu)


def test_painted_parts(lungs_check: ModuleType, tried: tuple[Drawn, dict[str, Any]]) -> None:
    scan, found = tried
    z, y, _ = np.indices(scan.hu.shape)
    for name, (where, share, density) in lungs_check.PAINTED.items():
        trial = found[name]
        if where == "left":
            assert_array_equal(trial.part, scan.left)
        for lung in (scan.right, scan.left) if where != "left" else ():
            part, rest = trial.part & lung, lung & ~trial.part
            ahead = -z if where == "lower" else y
            assert ahead[part].min() > ahead[rest].max()
            last = part & (ahead == ahead[part].min())  # with one plane less it would be too small
            assert part.sum() - last.sum() < share * lung.sum() <= part.sum()
        assert not (trial.part & ~(scan.right | scan.left)).any()
        inside = trial.hu[trial.part]
        # its soft edge is part air; bronchi are -850
        level = (1 - density.bronchi) * density.hu - 850 * density.bronchi
        assert inside.mean() == pytest.approx(level, abs=25)
        assert np.mean(inside < -320) == pytest.approx(density.bronchi, abs=0.01)
        changed = trial.hu != scan.hu
        assert not (changed & ~ndimage.binary_dilation(trial.part, iterations=3)).any()


def test_other_voxels(lungs_check: ModuleType, tried: tuple[Drawn, dict[str, Any]]) -> None:
    """Averages keep what is averaged: HU over air, times volume."""
    scan, found = tried
    thick, wide = found["8 mm slices"], found["820 mm field"]
    assert thick.spacing == (8.0, *SPACING[1:])
    assert len(thick.hu) == 30  # 240 mm
    assert_allclose(thick.hu, (scan.hu[::2].astype(float) + scan.hu[1::2]) / 2, atol=0.51)  # of 4 mm
    assert wide.hu.shape == (len(scan.hu), FIELD, FIELD)
    assert wide.spacing == (SPACING[0], 4.0, 4.0)
    mass = (wide.hu + 1024.0).sum() * 4.0**2
    assert mass == pytest.approx((scan.hu + 1024.0).sum() * 2.5**2, rel=1e-3)  # rounded to HU
    assert (wide.hu[:, :60] == -1024).all()
    # by the definition, where slices of 4 mm make some of 5: the third is 10 to 15 mm
    uneven = lungs_check.averaged(
        "uneven", scan.hu, Lungs(scan.right, scan.left), SPACING, (48, 84, 120), (5.0, *SPACING[1:])
    )
    expected = (2 * scan.hu[2].astype(float) + 3 * scan.hu[3]) / 5
    assert_allclose(uneven.hu[2], expected, atol=0.51)
    covered = (2 * scan.left[2].astype(int) + 3 * scan.left[3]) / 5
    assert_array_equal(uneven.lungs.left[2], covered > 0.5)  # no fifths are a half
    named = Lungs(scan.right, scan.left)
    same = lungs_check.averaged("same", scan.hu, named, SPACING, scan.hu.shape, SPACING)
    assert_array_equal(same.hu, scan.hu)
    assert_array_equal(same.lungs.left, scan.left)


def test_other_fields(tried: tuple[Drawn, dict[str, Any]]) -> None:
    scan, found = tried
    both = scan.right | scan.left
    contrast = found["contrast"].hu.astype(int) - scan.hu
    assert set(np.unique(contrast)) == {0, 150}
    assert contrast[30, 42, 60] == 150  # the heart's place
    assert contrast[30, 42, 8] == 0  # the chest wall
    assert not (contrast[both] != 0).any()
    small = found["cropped to the lungs"]
    assert small.lungs.left.sum() == scan.left.sum()
    inside = small.lungs.right | small.lungs.left
    for others in ((1, 2), (0, 2), (0, 1)):
        planes = np.flatnonzero(inside.any(axis=others))
        assert (planes[0], len(inside.any(axis=others)) - 1 - planes[-1]) == (2, 2)
    for fill in (0, -1024, -2048):
        framed = found[f"frame of {fill} HU"].hu
        assert_array_equal(framed[:, 24:-24, 24:-24], scan.hu)
        assert (framed[:, :24] == fill).all()
        assert (framed[:, :, -24:] == fill).all()


def test_measures(lungs_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of methods that know all, nothing, or the wrong side, and of one that refuses."""
    scan = drawn()
    truth = Lungs(scan.right, scan.left)
    part = scan.left & (np.arange(scan.hu.shape[1])[:, None] > 42)
    trials = [
        lungs_check.Trial("healthy", scan.hu, SPACING, truth, sides=True),
        lungs_check.Trial("part", scan.hu, SPACING, truth, part, True),
    ]
    monkeypatch.setattr(lungs_check, "trials", lambda *_: iter(trials))
    monkeypatch.setattr(lungs_check, "split_lungs", lambda *_: truth)

    def refuse(*_: Any) -> Lungs:
        raise ValueError("no lung found: for a reason")

    none = scan.left & ~scan.left
    methods = {
        "all": lambda *_: truth,
        "swapped": lambda *_: Lungs(scan.left, scan.right),
        "rest": lambda *_: Lungs(scan.right, scan.left & ~part),
        "right": lambda *_: Lungs(scan.right, none),
        "refuses": refuse,
    }
    found = lungs_check.measure(scan.hu, SPACING, methods)
    rows = {name: report.rows for name, report in found.items()}
    one = (1.0, pytest.approx(float("nan"), nan_ok=True))
    assert all(rows["all"][name] == one for name in ("healthy", "healthy, right", "healthy, left"))
    assert rows["all"]["part"] == rows["all"]["part, left"] == (1.0, 1.0)
    assert rows["swapped"]["part"] == (1.0, 1.0)
    assert rows["swapped"]["part, left"] == (0.0, 0.0)
    assert rows["rest"]["part"].held == rows["rest"]["part, left"].held == 0.0
    share = part.sum() / scan.left.sum()
    assert rows["rest"]["part, left"].dice == pytest.approx(2 * (1 - share) / (2 - share))
    assert rows["right"]["healthy"].dice == pytest.approx(2 / 3)
    assert rows["refuses"]["part"] == (0.0, 0.0)
    assert found["refuses"].refused == [f"{n}: no lung found: for a reason" for n in ("healthy", "part")]
    assert not found["all"].refused
    assert [len(report.seconds) for report in found.values()] == [2] * 5
    least = lungs_check.lowest([{"m": found["all"]}, {"m": found["rest"]}, {"m": found["all"]}])["m"]
    assert least.keys() == rows["rest"].keys()
    for name, row in least.items():
        assert row == pytest.approx(rows["rest"][name], nan_ok=True)
    text = lungs_check.table({name: rows[name] for name in ("all", "rest")}).splitlines()
    assert text[0] == "| | Dice: all | Dice: rest | held: all | held: rest |"
    assert text[5].startswith("| part | 1.000 | 0.")
    assert text[5].endswith(" | 1.000 | 0.000 |")
    assert text[2].endswith(" |  |  |")


def test_lungs_check_command(
    lungs_check: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ct = write(tmp_path / "drawn.nii.gz", drawn().hu)
    every = lungs_check.trials
    monkeypatch.setattr(lungs_check, "PAINTED", {"whole left lung": lungs_check.PAINTED["whole left lung"]})
    monkeypatch.setattr(lungs_check, "trials", lambda *args: islice(every(*args), 2))
    monkeypatch.setattr(sys, "argv", ["lungs_check.py", str(ct), str(ct), "--lungs", "classical"])
    lungs_check.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "drawn.nii.gz: 60 x 84 x 120 voxels of 4.00 x 2.50 x 2.50 mm"
    assert lines[2] == "| | Dice: classical | held: classical |"
    assert "| healthy, left | 1.000 |  |" in lines
    assert "| whole left lung, left | 0.000 | 0.000 |" in lines
    assert sum(line.startswith("seconds of a segmentation: classical ") for line in lines) == 2
    assert "lowest of 2 scans" in lines


# ---- the weights of the package, on scans that training did not see

HELD, HEALTHY = 0.9, 0.985
"""Least share held of painted disease, and Dice of the healthy scan."""
HELD_OUT = ("healthy_qin_lsc_0014", "healthy2/qin_lsc_0088", "healthy2/lungx_ct004")


@pytest.mark.slow
@pytest.mark.skipif(not BUNDLED_LUNGS.is_file(), reason="this build of normnet ships no lung network")
@pytest.mark.parametrize("scan", HELD_OUT)
def test_lungs_hold_their_disease(lungs_check: ModuleType, shared_data: Path, scan: str) -> None:
    """Without a label, as the reference is the mask by thresholds of the healthy scan."""
    path = shared_data / f"{scan}.nii.gz"
    if not path.is_file():
        pytest.skip(f"the scan is not installed: {path} does not exist")
    ct = read_ct(path)
    report = lungs_check.measure(ct.hu, ct.spacing, {"network": method_of("network")})["network"]
    assert not report.refused
    painted = (*lungs_check.PAINTED, "whole left lung, left")
    failed = [
        f"{name}: {row}"
        for name, row in report.rows.items()
        if (name in painted and row.held < HELD)
        or (name == "healthy" and row.dice < HEALTHY)
        or (not name.startswith(painted) and row.dice < 0.95)
    ]
    assert not failed, "\n".join(failed)
