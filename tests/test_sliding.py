"""Sliding windows against the plain definition: whole maps of every window, then their weighted mean."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("monai")

from normnet.config import ModelConfig, PredictConfig  # noqa: E402
from normnet.model import Model, build_unet  # noqa: E402
from normnet.sliding import probabilities, slab_windows, slide, tile_windows  # noqa: E402
from tests.conftest import draw_lungs, played  # noqa: E402

EXACT = PredictConfig(precision="fp32", slab=8, tile=32)
CPU = torch.device("cpu")


class Windowed(torch.nn.Module):
    """A network whose answer depends on where a window ends and on all that is in it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv3d(1, 1, 5, padding=2)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape[2:]))
        return 4.0 * self.conv(x) + 10.0 * x.mean()


def windowed(seed: int = 0, multiple: int = 1) -> Model:
    return played(Windowed(seed), multiple)


def reader(image):
    return lambda first, last: image[first:last]


def run(image, mask, models, config, device=CPU):
    """All blocks of `slide` as one array (models, z, y, x), and where they start."""
    firsts, blocks = [], []
    for first, block in slide(reader(image), mask, models, config, device):
        firsts.append(first)
        blocks.append(block.cpu().numpy())
    return np.concatenate(blocks, axis=1), firsts


def distance_to_ends(n: int) -> np.ndarray:
    return np.array([min(i + 1, n - i) for i in range(n)], float)


def oracle(image, model, z_starts, slab, rows, columns):
    """Full maps of every window, one at a time in float64, then the weighted mean over them."""
    shape = (max(z_starts) + slab, max(rows[0]) + rows[1], max(columns[0]) + columns[1])
    padded = np.zeros(tuple(max(a, b) for a, b in zip(shape, image.shape, strict=True)), np.float32)
    padded[tuple(slice(0, n) for n in image.shape)] = image
    total, weight = np.zeros(padded.shape), np.zeros(padded.shape)
    for z in z_starts:
        for y in rows[0]:
            for x in columns[0]:
                at = (slice(z, z + slab), slice(y, y + rows[1]), slice(x, x + columns[1]))
                with torch.no_grad():
                    logit = (
                        model.network(torch.from_numpy(padded[at].copy())[None, None])[0, 0].double().numpy()
                    )
                ramp = distance_to_ends(slab)[:, None, None]
                ramp = ramp * distance_to_ends(rows[1])[:, None] * distance_to_ends(columns[1])
                total[at] += ramp / (1 + np.exp(-logit))
                weight[at] += ramp
    return (total / weight)[tuple(slice(0, n) for n in image.shape)]


@pytest.mark.parametrize("depth", [5, 8, 21])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_tiles_and_slabs_are_the_mean_of_whole_maps(depth, overlap):
    image, mask = draw_lungs((depth, 45, 70), seed=depth)
    models = [windowed(seed, multiple=m) for seed, m in ((0, 2), (1, 4), (2, 1))]
    found, _ = run(image, mask, models, replace(EXACT, overlap=overlap))
    step = round(8 * (1 - overlap))
    last = max(depth - 8, 0)
    z_starts = sorted({*range(0, last, step), last})
    # 45 rows: two tiles of 32, 16 shared at least; 70 columns: four tiles of 32, of which the last ends
    rows, columns = ([0, 13], 32), ([0, 13, 25, 38], 32)
    assert tile_windows(45, 32, 4) == rows
    assert tile_windows(70, 32, 4) == columns
    assert found.shape == (3, depth, 45, 70)
    for model, one in zip(models, found, strict=True):
        expected = oracle(image, model, z_starts, 8, rows, columns)
        # float32 logits up to 30 through a slope of 1/4, and weighted means of at most eight of them
        np.testing.assert_allclose(one[mask], expected[mask], atol=5e-6)


def test_slices_come_out_once_and_in_order():
    image, mask = draw_lungs((23, 20, 24))
    blocks = [
        (first, block.shape[1]) for first, block in slide(reader(image), mask, [windowed()], EXACT, CPU)
    ]
    ends = [first + count for first, count in blocks]
    assert [first for first, _ in blocks] == [0, *ends[:-1]]
    assert ends[-1] == 23
    assert max(count for _, count in blocks) <= EXACT.slab


def test_a_plane_that_fits_is_one_window():
    image, mask = draw_lungs((8, 30, 34))
    model = windowed(multiple=8)
    found, _ = run(image, mask, [model], replace(EXACT, tile=40))
    assert model.network.shapes == [(8, 32, 40)]
    whole, _ = run(image, mask, [model], replace(EXACT, tile=None))
    np.testing.assert_array_equal(found, whole)


def test_windows_without_lung_are_skipped_and_change_nothing():
    image, mask = draw_lungs((40, 64, 64), seed=4)
    lower = mask.copy()
    lower[:24] = lower[:, :, :34] = False
    seen = image * lower
    every, skipping = windowed(), windowed()
    whole, _ = run(seen, np.ones_like(mask), [every], EXACT)
    part, _ = run(seen, lower, [skipping], EXACT)
    # 64 voxels: three tiles of 32 along either axis; a slab every four slices
    windows = [(z, y, x) for z in range(0, 33, 4) for y in (0, 16, 32) for x in (0, 16, 32)]
    assert len(every.network.shapes) == len(windows)
    full = sum(bool(lower[z : z + 8, y : y + 32, x : x + 32].any()) for z, y, x in windows)
    assert 0 < full < sum(bool(lower[z : z + 8].any()) for z, _, _ in windows)
    assert len(skipping.network.shapes) == full
    np.testing.assert_array_equal(part[0][lower], whole[0][lower])


def test_only_one_slab_is_read_at_a_time():
    image, mask = draw_lungs((40, 20, 24))
    asked = []

    def read(first, last):
        asked.append((first, last))
        return image[first:last]

    list(slide(read, mask, [windowed()], EXACT, CPU))
    assert max(last - first for first, last in asked) == EXACT.slab
    assert asked == sorted(asked)


def test_probabilities_of_a_real_network_in_tiles_stay_close_to_those_of_whole_planes():
    """Tiles hide what lies beyond them; with a ramp that costs little."""
    config = ModelConfig(channels=(4, 8, 8), strides=(2, 2))
    torch.manual_seed(0)
    model = Model(build_unet(config), config)
    image, mask = draw_lungs((8, 64, 96), seed=2)
    tiled = probabilities(image, model, replace(EXACT, tile=64), CPU)
    whole = probabilities(image, model, replace(EXACT, tile=None), CPU)
    assert tiled.shape == whole.shape == image.shape
    assert np.ptp(whole[mask]) > 0.01
    # typical voxels differ by less than a tenth of how much the answers vary
    assert np.abs(tiled - whole)[mask].mean() < 0.1 * whole[mask].std()


@given(length=st.integers(1, 700), tile=st.integers(32, 400), multiple=st.sampled_from([1, 4, 8, 16, 32]))
def test_tiles_cover_a_row_evenly(length, tile, multiple):
    starts, size = tile_windows(length, tile, multiple)
    padded = -(-length // multiple) * multiple
    assert size % multiple == 0
    assert starts[0] == 0
    assert starts[-1] + size >= length
    if len(starts) == 1:
        assert size == padded
        return
    assert size <= tile < padded
    assert starts[-1] + size == length
    shared = [a + size - b for a, b in pairwise(starts)]
    assert min(shared) >= min(64, tile // multiple * multiple // 2) - 1  # starts are rounded
    # one tile less, of the largest size, would not reach
    largest = tile // multiple * multiple
    assert (len(starts) - 1) * largest - (len(starts) - 2) * min(64, largest // 2) < length


@given(depth=st.integers(1, 200), slab=st.integers(1, 40), overlap=st.floats(0, 0.95))
def test_slabs_cover_a_volume(depth, slab, overlap):
    starts, size = slab_windows(depth, slab, overlap)
    assert size == slab
    assert starts[0] == 0
    assert starts[-1] == max(depth - slab, 0)
    assert all(0 < b - a <= slab for a, b in pairwise(starts))


def test_slab_and_tile_must_fit_the_network():
    image, mask = draw_lungs((12, 40, 44))
    with pytest.raises(ValueError, match=r"slab must be a multiple of 12 \(product of .*\), got 8"):
        run(image, mask, [windowed(multiple=4), windowed(multiple=6)], EXACT)
    with pytest.raises(ValueError, match=r"tile must be at least 64 .*, got 40"):
        run(image, np.ones_like(mask), [windowed(multiple=64)], replace(EXACT, slab=64, tile=40))


@pytest.mark.gpu
def test_a_gpu_gives_the_cpu_s_probabilities():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    image, mask = draw_lungs((21, 45, 70))
    models = [windowed(seed) for seed in (0, 1)]
    here, _ = run(image, mask, models, EXACT)
    there, _ = run(image, mask, models, EXACT, torch.device("cuda"))
    # convolutions may use TF32, 10 bits: logits of a few units are right to 1e-2
    np.testing.assert_allclose(here[:, mask], there[:, mask], atol=1e-2)
