"""The demo end to end on small phantoms with a tiny network; whether it learns is for `make demo` to show."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("monai")

from normnet.config import ModelConfig, lungs, phantom
from normnet.data import PHANTOM_SEED
from normnet.demo import PATIENT_SEED, DemoConfig, main, patients, run_demo


@pytest.fixture
def tiny(tmp_path):
    train = replace(
        phantom(),
        model=ModelConfig(channels=(4, 8), strides=(2,)),
        iterations=3,
        batch_size=1,
        slab=16,
        crop=48,
        phantoms=1,
        phantom_shape=(16, 64, 80),
        validation_pairs=1,
        validate_every=2,
        threads=1,
    )
    return DemoConfig(output=tmp_path / "demo", minutes=1.0, patients=1, shape=(16, 64, 80), train=train)


def test_demo_trains_predicts_and_reports(tiny):
    said = []
    evaluation = run_demo(tiny, say=said.append)
    assert [line[:3] for line in said if line[0] != " "] == ["1/3", "2/3", "3/3"]
    assert list(evaluation.scores) == ["phantom 1", "healthy phantom"]
    assert not evaluation.scores["phantom 1"]["control"]
    assert evaluation.scores["healthy phantom"]["control"]
    assert evaluation.summary["bright_auc"]["n"] == 1
    assert 0 <= evaluation.summary["bright_auc"]["mean"] <= 1
    page = (tiny.output / "report.html").read_text()
    assert page.count("data:image/png") >= 3  # training pair, overlay, curve
    results = json.loads((tiny.output / "results.json").read_text())
    assert results["cases"]["phantom 1"]["bright_auc"] == evaluation.scores["phantom 1"]["bright_auc"]
    # a second demo in the same place replaces the first, and gives the same
    again = run_demo(tiny)
    assert again.scores["phantom 1"]["bright_auc"] == evaluation.scores["phantom 1"]["bright_auc"]


def test_patients_are_never_training_phantoms(tiny):
    cases = list(patients(replace(tiny, patients=2)))
    assert [name for name, _, _ in cases] == ["phantom 1", "phantom 2", "healthy phantom"]
    assert [bool(lesions.any()) for _, _, lesions in cases] == [True, True, False]
    assert PATIENT_SEED + 2 < PHANTOM_SEED
    with pytest.raises(ValueError, match="patients must be in"):
        replace(tiny, patients=PHANTOM_SEED)


def test_the_demo_is_of_lesions(tiny):
    with pytest.raises(ValueError, match=r"train\.task must be lesions, got lungs"):
        replace(tiny, train=lungs())


@pytest.mark.parametrize(("option", "value"), [("--minutes", "0"), ("--patients", "0")])
def test_bad_settings_end_with_a_reason(option, value, capsys):
    with pytest.raises(SystemExit) as end:
        main([option, value])
    assert end.value.code == 2
    assert f"{option[2:]} must be" in capsys.readouterr().err
