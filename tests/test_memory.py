"""Memory: what a rendering needs, what is kept for the next one, and that nobody's arrays are reused.

On one thread where it matters when memory comes free: a helper that wakes late holds its arguments
a little longer.
"""

from __future__ import annotations

import gc
import pickle
import tracemalloc

import numpy as np
import pytest

import lesionsynth as ls
from lesionsynth.cpu.engine import memory as _memory
from tests.plans import blob, plan, renderer

SHAPE = (16, 256, 256)
"""One volume is 4 MiB of float32: large enough for results to come from blocks."""


@pytest.fixture
def healthy():
    gc.collect()  # what other tests left in cycles would come back as blocks at any moment
    ls.release_memory()
    image = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
    yield image, np.ones(SHAPE, bool)
    ls.release_memory()


def large(amplitude=0.3):
    """A lesion whose box is the volume, the most that texture can need, and ten small ones."""
    axes = {"semi_axes": (150.0, 150.0, 150.0), "center": (8, 128, 128), "warp_amplitude": amplitude}
    small = (blob(k, center=(3 + k, 20 * k, 9)) for k in range(1, 11))
    return plan(blob(**axes, sigma_a=20.0), *small, shape=None)


def peak_volumes(call):
    """Most memory in use during a call, in volumes of float32, and what it left."""
    gc.collect()
    tracemalloc.start()
    try:
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak / (4 * np.prod(SHAPE)), result


def test_a_pair_needs_one_volume_beyond_its_outputs(healthy):
    """Texture is filtered in place, in one float32 field as large as the lesion's box.

    Image and target are 1.25 volumes. The issue allows 1.5 beyond; the field is one, kept with a quarter to
    spare, and the rest is runs, bits and tables.
    """
    renderer().render(large(), *healthy)  # compiles
    ls.release_memory()
    peak, pair = peak_volumes(lambda: renderer().render(large(), *healthy))
    assert (pair.labels > 0).mean() > 0.9
    assert peak < 1.25 + 1.5


def test_an_ordinary_pair_needs_little(healthy):
    synth = ls.LesionSynthesizer(ls.presets.no_shapes(), seed=0, threads=1)
    synth(*healthy, index=0)
    ls.release_memory()
    peak, pair = peak_volumes(lambda: synth(*healthy, index=0))
    boxes = sum(np.prod([b - a for a, b in c.box]) for c in pair.plan.components) / np.prod(SHAPE)
    assert boxes < 0.1
    assert peak < 1.25 + 2 * boxes + 0.3


def test_a_volume_in_pieces_is_the_volume_whole(healthy, monkeypatch):
    """Textures that do not fit into one volume of scratch are made in groups."""
    from lesionsynth.cpu import texture

    blobs = [blob(k, center=(8, 12 + 21 * k, 30 + 17 * k), semi_axes=(4.0, 9.0, 7.0)) for k in range(11)]
    drawn = plan(*blobs, shape=None)
    whole = renderer().render(drawn, *healthy)
    groups = texture._groups
    monkeypatch.setattr(texture, "_groups", lambda fields, most: groups(fields, 3000))
    pieces = renderer().render(drawn, *healthy)
    assert len(whole.plan.components) > 3
    assert pieces.plan == whole.plan
    np.testing.assert_array_equal(pieces.image, whole.image)


def is_free(address):
    """Whether the next result may lie there."""
    return any(0 <= address - b.block.ctypes.data < b.block.size for b in _memory._blocks)


def test_freed_results_are_used_again_and_held_ones_are_not(healthy):
    synth = ls.LesionSynthesizer(ls.presets.no_shapes(), seed=0, threads=1)
    first = synth(*healthy, index=0)
    kept, place = first.image[3:5, ::2], first.target.ctypes.data
    before = kept.copy()
    assert not is_free(place)
    del first
    assert is_free(place)
    assert not is_free(kept.ctypes.data)
    second, third = synth(*healthy, index=1), synth(*healthy, index=2)
    assert not is_free(place)
    assert not np.shares_memory(kept, second.image)
    assert not np.shares_memory(kept, third.image)
    np.testing.assert_array_equal(kept, before)


def test_tensors_hold_their_memory(healthy):
    torch = pytest.importorskip("torch")
    synth = ls.LesionSynthesizer(ls.presets.no_shapes(), seed=0, threads=1)
    image, mask = (torch.from_numpy(a) for a in healthy)
    view = synth(image, mask, index=0).image[1]
    before = view.clone()
    for index in range(1, 5):
        synth(image, mask, index=index)
    assert torch.equal(view, before)


def test_no_more_is_kept_than_stated(healthy):
    synth = ls.LesionSynthesizer(ls.presets.no_shapes(), seed=0, threads=1)
    pairs = [synth(*healthy, index=k) for k in range(4)]
    painted = [pair.labels for pair in pairs]
    assert len(painted) == 4
    del pairs, painted
    gc.collect()
    assert 0 < len(_memory._blocks) <= _memory.MOST_BLOCKS
    ls.release_memory()
    assert not _memory._blocks


def test_results_can_be_written(healthy):
    pair = ls.LesionSynthesizer(ls.presets.no_shapes(), seed=0, threads=1)(*healthy, index=0)
    for array in (pair.image, pair.target, pair.labels):
        assert array.flags.writeable
        assert array.flags.c_contiguous
        array[0] = 0


def test_a_pair_survives_pickling_with_labels_unpainted(healthy):
    """As a DataLoader worker that returns pairs sends them."""
    pair = ls.LesionSynthesizer(ls.presets.no_shapes(), seed=0, threads=1)(*healthy, index=0)
    text = pickle.dumps(pair)
    assert len(text) < healthy[0].nbytes * 1.3  # labels travel as runs
    again = pickle.loads(text)
    np.testing.assert_array_equal(again.labels, pair.labels)
    np.testing.assert_array_equal(again.image, pair.image)


def test_labels_are_painted_once(healthy):
    pair = ls.LesionSynthesizer(ls.presets.no_shapes(), seed=0, threads=1)(*healthy, index=0)
    assert pair.labels is pair.labels
