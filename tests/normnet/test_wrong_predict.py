"""What is wrong for prepare is wrong for predict, with the same words, and harms no other patient."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("SimpleITK")

import torch

from lesionsynth.io import read_ct, read_mask
from normnet.config import ModelConfig
from normnet.model import Model, build_unet
from normnet.predict import main
from tests import classical
from tests.normnet.test_wrong_input import MESSAGES, bad, good  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def outcome(bad: Path, good: Path, tmp_path_factory: pytest.TempPathFactory):  # noqa: F811
    """Everything in one call of the command, the good one in the middle."""
    base = tmp_path_factory.mktemp("wrong")
    config = ModelConfig(channels=(4, 8), strides=(2,), residual_units=0)
    torch.manual_seed(0)
    Model(build_unet(config), config).save(base / "run/model.safetensors")
    inputs = sorted(bad.iterdir())
    inputs.insert(len(inputs) // 2, good)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, **_: said.append(" ".join(map(str, text))))
        flags = ["--models", str(base / "run"), "--output", str(base / "maps"), "--threads", "1"]
        code = main([*map(str, inputs), *flags, "--device", "cpu", *classical.FLAGS])
    return {"code": code, "maps": base / "maps", "said": said}


@pytest.mark.parametrize("case", MESSAGES)
def test_the_message_names_file_and_rule(outcome, case):
    assert any(all(part in line for part in MESSAGES[case]) for line in outcome["said"]), outcome["said"]


def test_the_good_patient_is_segmented(outcome, good):  # noqa: F811
    assert outcome["code"] == 1
    done = f"1 of {len(MESSAGES) + 1} volumes segmented"
    assert sum(done in line for line in outcome["said"]) == 1
    names = {p.name for p in outcome["maps"].iterdir()}
    assert names == {"good.json", "good_lesions.nii.gz", "good_lung.nii.gz", "volumes.csv"}
    assert read_mask(outcome["maps"] / "good_lung.nii.gz", read_ct(good)).any()
