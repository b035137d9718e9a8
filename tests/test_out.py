"""``out=``: buffers of the caller become the pair, and are refused where they cannot."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import lesionsynth as ls
from tests.conftest import draw_lungs
from tests.plans import small_config

IMAGE, MASK = draw_lungs()
SYNTH = ls.LesionSynthesizer(small_config(), seed=3)


def buffers(image=IMAGE, dtype=None):
    return np.full(image.shape, 9, dtype=dtype or image.dtype), np.ones(image.shape, dtype=bool)


@pytest.mark.parametrize("kind", ["float32", "float16", "float64", "int16"])
def test_buffers_become_the_pair(kind) -> None:
    image = ((IMAGE * 900 - 800).round() if kind == "int16" else IMAGE).astype(kind)
    expected = SYNTH(image, MASK, index=1)
    out = buffers(image, expected.image.dtype)
    pair = SYNTH(image, MASK, index=1, out=out)
    assert pair.image is out[0]
    assert pair.target is out[1]
    assert_array_equal(pair.image, expected.image)
    assert_array_equal(pair.target, expected.target)
    assert_array_equal(pair.labels, expected.labels)
    assert pair.plan == expected.plan


def test_the_last_pair_is_used_again() -> None:
    """Its arrays hold the new pair; its plan and labels stay its own."""
    images, masks = np.stack([IMAGE] * 2), np.stack([MASK] * 2)
    first = SYNTH(images, masks, index=[0, 1])
    labels, plan = SYNTH(images, masks, index=[0, 1]).labels, first.plan
    second = SYNTH(images, masks, index=[2, 3], out=first)
    assert second.image is first.image
    assert_array_equal(second.image, SYNTH(images, masks, index=[2, 3]).image)
    assert_array_equal(first.labels, labels)
    assert first.plan is plan
    again = SYNTH.render(plan, images, masks, out=second)
    assert_array_equal(again.labels, labels)


def test_torch_buffers() -> None:
    torch = pytest.importorskip("torch")
    image, mask = torch.from_numpy(IMAGE.copy()), torch.from_numpy(MASK.copy())
    out = torch.empty_like(image), torch.empty_like(mask)
    pair = SYNTH(image, mask, index=1, out=out)
    assert pair.image.data_ptr() == out[0].data_ptr()
    assert pair.target.data_ptr() == out[1].data_ptr()
    assert_array_equal(out[0].numpy(), SYNTH(IMAGE, MASK, index=1).image)


def read_only():
    image, target = buffers()
    image.flags.writeable = False
    return image, target


BAD = {
    "no pair": (lambda: 3, TypeError, r"out must be a LesionPair or \(image, target\), got int"),
    "three": (lambda: (*buffers(), 1), TypeError, "out must be a LesionPair"),
    "no array": (lambda: ("a", buffers()[1]), TypeError, "out image must be"),
    "shape": (lambda: (buffers()[0][1:], buffers()[1]), ValueError, "out image must have the shape of image"),
    "dtype": (
        lambda: (buffers(dtype=np.float64)[0], buffers()[1]),
        TypeError,
        "out image must be float32, got float64",
    ),
    "target": (lambda: (buffers()[0], buffers()[0]), TypeError, "out target must be bool, got float32"),
    "strides": (
        lambda: (np.asfortranarray(buffers()[0]), buffers()[1]),
        ValueError,
        "out image must be C-contiguous",
    ),
    "read-only": (read_only, ValueError, "out image must be writeable"),
    "image itself": (lambda: (IMAGE, buffers()[1]), ValueError, "out image must not share memory"),
    "mask itself": (lambda: (buffers()[0], MASK), ValueError, "out target must not share memory"),
}


@pytest.mark.parametrize(("make", "error", "text"), BAD.values(), ids=BAD)
def test_refused(make, error, text) -> None:
    """Before anything is written."""
    out, image = make(), IMAGE.copy()
    before = [np.array(a) for a in out] if isinstance(out, tuple) else []
    with pytest.raises(error, match=text):
        SYNTH(IMAGE, MASK, index=0, out=out)
    assert_array_equal(IMAGE, image)
    for a, b in zip(before, out if isinstance(out, tuple) else (), strict=True):
        assert_array_equal(a, b)
