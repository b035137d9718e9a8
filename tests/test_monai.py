"""The MONAI transform: the generator's own pair, seeded by MONAI, and not frozen by MONAI's caches."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
monai = pytest.importorskip("monai")

import monai.data  # noqa: E402, F811
import monai.transforms  # noqa: E402

import lesionsynth as ls  # noqa: E402

BALLS = ls.BlobClass(count=(5.0, 10.0), radius=(3.0, 6.0), scale_by_lung=False)
CONFIG = ls.LesionConfig(small=BALLS, medium=None, large=None)


@pytest.fixture(scope="module")
def item() -> dict[str, object]:
    rng = np.random.default_rng(0)
    mask = np.zeros((1, 10, 40, 44), dtype=bool)
    mask[:, 1:9, 4:36, 4:40] = True
    image = rng.random(mask.shape, dtype=np.float32) * mask
    affine = torch.diag(torch.tensor([1.0, 0.8, 0.8, 1.0], dtype=torch.float64))
    return {
        "image": monai.data.MetaTensor(torch.from_numpy(image), affine=affine),
        "lung_mask": torch.from_numpy(mask),
    }


def test_gives_the_pair_of_the_synthesizer(item):
    transform = ls.monai.RandLesiond(config=CONFIG, seed=3)
    transform.set_random_state(seed=1)
    before = item["image"].clone()
    out = transform(item)
    pair = ls.LesionSynthesizer(CONFIG, seed=3)(
        item["image"][0].numpy(), item["lung_mask"][0].numpy(), index=out["lesion_index"]
    )
    assert pair.labels.any()
    np.testing.assert_array_equal(out["image"][0].numpy(), pair.image)
    np.testing.assert_array_equal(out["target"][0].numpy(), pair.target)
    np.testing.assert_array_equal(out["labels"][0].numpy(), pair.labels)
    assert torch.equal(item["image"], before)
    assert "target" not in item


def test_keeps_the_meta_tensor_and_its_affine(item):
    out = ls.monai.RandLesiond(config=CONFIG)(item)
    assert isinstance(out["image"], monai.data.MetaTensor)
    assert torch.equal(out["image"].affine, item["image"].affine)
    assert out["target"].dtype == torch.bool


def test_monai_seeds_it(item):
    def indices(seed: int) -> list[int]:
        compose = monai.transforms.Compose([ls.monai.RandLesiond(config=CONFIG)])
        compose.set_random_state(seed=seed)
        return [compose(item)["lesion_index"] for _ in range(3)]

    assert indices(5) == indices(5)
    assert indices(5) != indices(6)
    assert len(set(indices(5))) == 3


def test_a_cache_does_not_freeze_the_lesions(item):
    data = monai.data.CacheDataset([item], [ls.monai.RandLesiond(config=CONFIG)], progress=False)
    assert data[0]["lesion_index"] != data[0]["lesion_index"]


def test_index_and_lung_fraction_from_the_item(item):
    transform = ls.monai.RandLesiond(
        config=CONFIG, seed=3, index_key="name", lung_fraction_key="share", target_key="healthy"
    )
    out = transform({**item, "name": 11, "share": 0.5})
    pair = ls.LesionSynthesizer(CONFIG, seed=3)(
        item["image"][0].numpy(), item["lung_mask"][0].numpy(), index=11, lung_fraction=0.5
    )
    np.testing.assert_array_equal(out["image"][0].numpy(), pair.image)
    np.testing.assert_array_equal(out["healthy"][0].numpy(), pair.target)


def test_refuses_more_than_one_channel(item):
    two = {"image": torch.zeros(2, 8, 8, 8), "lung_mask": torch.ones(2, 8, 8, 8, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"image must be \(1, z, y, x\), got shape \(2, 8, 8, 8\)"):
        ls.monai.RandLesiond()(two)


def test_survives_pickling(item):
    transform = pickle.loads(pickle.dumps(ls.monai.RandLesiond(config=CONFIG, seed=3, index_key="name")))
    again = ls.monai.RandLesiond(config=CONFIG, seed=3, index_key="name")
    numbered = {**item, "name": 2}
    assert torch.equal(transform(numbered)["image"], again(numbered)["image"])


def test_does_not_import_monai_itself():
    code = (
        "import sys, lesionsynth as ls, lesionsynth.monai\n"
        "try:\n    ls.monai.RandLesiond\n"
        "except ImportError as error:\n    print(error)\n"
        "print('monai' in sys.modules, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "import monai.transforms" in out
    assert out.strip().endswith("False False")
