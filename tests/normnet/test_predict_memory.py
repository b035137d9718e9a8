"""Peak memory of the whole command on a long, thin-sliced CT: reading, lungs, networks, writing."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("resource")

import lesionsynth as ls  # noqa: E402
from normnet.config import laptop  # noqa: E402
from normnet.model import Model, build_unet  # noqa: E402

SLICES, SPACING = 600, (0.7, 0.8, 0.8)
GIB = 2**30
MEASURED = """
import resource, sys
from normnet.predict import main
status = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("peak", peak * (1 if sys.platform == "darwin" else 1024))
sys.exit(status)
"""


@pytest.fixture(scope="module")
def long_case(tmp_path_factory):
    """A phantom with pneumonia, repeated up and down to 600 slices of 512 x 512, and an untrained network."""
    folder = tmp_path_factory.mktemp("long")
    chest = ls.phantom.chest_ct(shape=(40, 512, 512), seed=3)
    ill = ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed=3)
    for array, name in ((ill.hu, "p"), (chest.lung_mask.astype(np.uint8), "p_lung")):
        up_and_down = np.concatenate([array, array[::-1]])
        image = sitk.GetImageFromArray(np.resize(up_and_down, (SLICES, *array.shape[1:])))
        image.SetSpacing(SPACING[::-1])
        sitk.WriteImage(image, str(folder / f"{name}.nii.gz"))
    model = laptop().model
    torch.manual_seed(0)
    Model(build_unet(model), model).save(folder / "run/model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--masks", "."], [], ["--masks", ".", "--save-probability", "--save-core"]],
    ids=["lungs given", "lungs by the network and by thresholds", "every map"],
)
def test_a_long_ct_stays_below_3_gib(long_case, tmp_path, flags):
    command = [sys.executable, "-c", MEASURED, "p.nii.gz", "--models", "run", "--output", str(tmp_path)]
    done = subprocess.run([*command, *flags], cwd=long_case, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("peak ")[1])
    assert json.loads((tmp_path / "p.json").read_text())["grid"]["shape"] == [SLICES, 512, 512]
    # torch alone takes 0.4 GiB, the CT as read and as ITK holds it 0.6
    assert 0.8 * GIB < peak < 3 * GIB
    print(f"{peak / GIB:.2f} GiB")
