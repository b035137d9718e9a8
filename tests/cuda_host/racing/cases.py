"""What is run for races. Results are held to the CPU twin or SciPy, bit for bit, as without them."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
from numpy.testing import assert_array_equal
from scipy import ndimage

from lesionsynth import ops as cpu
from lesionsynth import remove_erroneous_edges
from lesionsynth.config import MODES, PLACEMENTS, SOFT_MODES
from lesionsynth.cuda import labels, render
from lesionsynth.cuda.records import BATCH
from tests.conftest import draw_lungs
from tests.cuda_host.device import HostDevice
from tests.cuda_host.pairs import render as render_pair
from tests.cuda_host.racing.device import RacingDevice
from tests.plans import plan, sheets
from tests.test_cuda_render import agree, drawn

CONNECTIVITIES = {6: 1, 18: 2, 26: 3}
"""And SciPy's names for them."""
SHAPES = ((9, 17, 200), (5, 60, 66), (12, 31, 130))
"""Several blocks a launch, also where a thread takes a word."""


def pairs(round_: int, plant: str | None) -> None:
    """Render a batch of three drawn plans."""
    image, mask = draw_lungs()
    device = RacingDevice(
        processors=(1, 1, 2)[round_ % 3],
        workers=2 + round_ % 2,
        yield_percent=(5, 0, 25)[round_ % 3],
        seed=1000 * round_ + 1,
        plant=plant,
    )
    plans = drawn(3, image.shape, seed=100 + round_)
    agree(render.Renderer(device), plans, np.stack([image] * 3), np.stack([mask] * 3))


def modes(round_: int, plant: str | None) -> None:
    """Render plans of every mode, with soft edges and all placements; then soft sheets without room.

    Held to the same kernels without races: tests/test_cuda_modes.py holds those to what is expected.
    """
    image, mask = draw_lungs()
    device = RacingDevice(
        workers=2 + round_ % 2, yield_percent=(5, 0, 25)[round_ % 3], seed=1000 * round_ + 7, plant=plant
    )
    plans = [
        replace(
            one,
            mode=mode,
            edge=1.5 + round_ % 3 if mode in SOFT_MODES else 0.0,
            blobs=tuple(replace(b, placement=PLACEMENTS[k % 3]) for k, b in enumerate(one.blobs)),
        )
        for one, mode in zip(drawn(len(MODES), image.shape, seed=200 + round_), MODES, strict=True)
    ]
    agree_without_races(device, plans, np.stack([image] * len(plans)), np.stack([mask] * len(plans)))
    if round_ == 0:
        with patch.object(render, "LEAST_FIELD", 0):
            one = plan(*sheets(), mode="blend", edge=2.0)
            agree_without_races(device, [one], image[None], np.ones_like(mask)[None])


def agree_without_races(device: RacingDevice, plans, images: np.ndarray, masks: np.ndarray) -> None:
    found, expected = (
        render_pair(render.Renderer(each), plans, images, masks) for each in (device, HostDevice())
    )
    assert_array_equal(found.image, expected.image)
    assert_array_equal(found.target, expected.target)
    assert_array_equal(found.labels, expected.labels)
    assert found.components == expected.components


def crowded(round_: int, plant: str | None) -> None:
    """Render three sheets with room for the field of one."""
    image, mask = draw_lungs()
    renderer = render.Renderer(RacingDevice(yield_percent=5, seed=round_ + 1, plant=plant))
    with patch.object(render, "LEAST_FIELD", 0):
        agree(renderer, [plan(*sheets())], image[None], np.ones_like(mask)[None])
    table = renderer.workspace.buffers["table"].array[: BATCH.itemsize].view(BATCH)
    assert table["crowded"] == [2]


def volumes(round_: int, plant: str | None) -> None:
    """Label by every neighbourhood, then grow and remove edges by one of them."""
    rng = np.random.default_rng(round_)
    shape = SHAPES[round_ % 3]
    connectivity = tuple(CONNECTIVITIES)[round_ % 3]
    device = RacingDevice(
        workers=2 + round_ % 2, yield_percent=(0, 10, 40)[round_ % 3], seed=1000 * round_ + 1, plant=plant
    )
    mask = (rng.random(shape) < rng.uniform(0.2, 0.6)).view(np.uint8)
    for each in CONNECTIVITIES:
        assert_labels(device, mask, each)
    seed = mask & (rng.random(shape) < 0.1)
    for iterations in (3, 0):
        assert_growth(device, seed, mask, iterations, connectivity)
    assert_edges(device, rng.random(shape, dtype=np.float32), mask, connectivity)


def assert_labels(device: RacingDevice, mask: np.ndarray, connectivity: int) -> None:
    numbers = np.full(mask.shape, -9, dtype=np.int32)
    count = labels.label(device, mask.ctypes.data, mask.shape, connectivity, numbers.ctypes.data)
    structure = ndimage.generate_binary_structure(3, CONNECTIVITIES[connectivity])
    expected, expected_count = ndimage.label(mask, structure)
    assert count == expected_count
    assert_array_equal(numbers, expected)


def assert_growth(
    device: RacingDevice, seed: np.ndarray, mask: np.ndarray, iterations: int, connectivity: int
) -> None:
    grown = np.full(mask.shape, 9, dtype=np.uint8)
    addresses = seed.ctypes.data, mask.ctypes.data
    labels.grow(device, *addresses, mask.shape, iterations, connectivity, grown.ctypes.data)
    expected = cpu.grow(seed != 0, mask != 0, iterations=iterations, connectivity=connectivity)
    assert_array_equal(grown, expected)


def assert_edges(device: RacingDevice, image: np.ndarray, mask: np.ndarray, connectivity: int) -> None:
    out, out_mask = np.full_like(image, 9), np.full(mask.shape, 9, dtype=np.uint8)
    labels.remove_edges(
        *(device, image.ctypes.data, "float32", mask.ctypes.data, mask.shape),
        *(0.5, 0.5, 2, connectivity, out.ctypes.data, out_mask.ctypes.data),
    )
    expected, expected_mask = remove_erroneous_edges(
        image, mask != 0, threshold=0.5, contact_fraction=0.5, shell_width=2, connectivity=connectivity
    )
    assert_array_equal(out, expected)
    assert_array_equal(out_mask, expected_mask)


CASES = {case.__name__: case for case in (pairs, modes, crowded, volumes)}
