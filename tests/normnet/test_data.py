"""Volumes and pairs: a batch depends on its step alone, and is what the synthesizer makes of a slab."""

from __future__ import annotations

import contextlib
import functools
import itertools
import queue
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("monai")

import torch

import lesionsynth as ls
from normnet import data
from normnet.config import ModelConfig, TrainConfig
from normnet.data import (
    Batches,
    PairStream,
    Volume,
    choose_place,
    pair_streams,
    read_folds,
    split,
    split_by_fold,
    store_volumes,
)
from normnet.inflation import healthy_density, inflate
from normnet.prepare.store import Store

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    model=ModelConfig(channels=(1, 1), strides=(8,)), batch_size=2, slab=8, crop=24, thick_mm=(4.0, 6.0)
)
RUN = replace(
    CONFIG, data=None, phantoms=2, phantom_shape=(16, 64, 80), phantom_spacing=(4.0, 5.0, 5.0),
    validation_pairs=3, mirror=True, accumulate=2,
)  # fmt: skip


def segments(name: str = "segments", runs=((0, 10), (14, 24))) -> Volume:
    """A volume of random tissue whose slices 10-13 are left out."""
    rng = np.random.default_rng(0)
    mask = np.zeros((24, 40, 48), bool)
    mask[:, 8:30, 10:40] = True
    mask[10:14] = False
    hu = np.where(mask, rng.integers(-900, 0, mask.shape), -1000).astype(np.int16)
    return Volume.of(name, hu, mask, (1.0, 0.8, 0.8), list(runs))


def stream(*volumes: Volume, seed: int = 0, hu: float = -500.0, **settings) -> PairStream:
    """Pairs of `segments`; of settings, those of a stream are taken out of the configuration's."""
    how = {k: settings.pop(k) for k in ("rank", "processes", "device", "first_index") if k in settings}
    lesions = replace(ls.presets.covid_lung(), hu_threshold=hu)
    synthesizer = ls.LesionSynthesizer(lesions, seed=seed, threads=1)
    return PairStream(volumes or [segments()], synthesizer, replace(CONFIG, **settings), **how)


def equal(one: data.Batch, other: data.Batch) -> bool:
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("image", "target", "lesions"))


# ---- volumes


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 32), st.data())
def test_slabs_lie_within_segments_and_show_lung(counts, depth, draw):
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(counts)), min_size=2)))
    runs = list(zip(cuts[::2], cuts[1::2], strict=False))
    volume = replace(segments(), segments=runs, mask_counts=np.array(counts))
    expected = [
        (z, sum(counts[z : z + depth]))
        for z in range(len(counts))
        if any(a <= z and z + depth <= b for a, b in runs) and any(counts[z : z + depth])
    ]
    assert volume.slabs(depth) == expected


def test_where_volumes_are_kept(monkeypatch):
    volume, cuda = segments(), torch.device("cuda")
    size = data.VOXEL_BYTES * 24 * 40 * 48
    free = {"cuda": 3 * size, "cpu": 3 * size}
    monkeypatch.setattr(data, "free_memory", lambda device: free[device.type])
    assert choose_place([volume], "auto", cuda) == "device"
    assert choose_place([volume] * 2, "auto", cuda) == "disk"
    assert choose_place([volume] * 2, "device", cuda) == "device"
    free["cpu"] = 9 * size
    assert choose_place([volume] * 2, "auto", cuda) == "memory"
    assert choose_place([volume] * 2, "auto", CPU, processes=4) == "disk"
    assert choose_place([volume], "memory", cuda) == "memory"
    assert choose_place([volume], "disk", CPU) == "disk"
    assert choose_place([volume] * 9, "device", CPU) == "memory"


@pytest.mark.parametrize("place", ["device", "memory", "disk"])
def test_kept_volumes_give_the_same_batches(place):
    read = []
    volume = segments()
    watched = replace(volume, read=lambda a, b: (read.append((a, b)), volume.read(a, b))[1]).inflated(-700.0)
    read.clear()
    kept = watched.kept(place, CPU)
    settings = {"batch_size": 4, "mirror": True, "thick_slices": 0.5}
    assert equal(stream(kept, **settings).batch(2), stream(watched, **settings).batch(2))
    shared = kept.slab(2, 5)[0].data_ptr() == kept.slab(2, 9)[0].data_ptr()
    assert shared == (place != "disk")
    assert (read[0] == (0, 24)) == (place != "disk")  # as a whole


def test_held_out_volumes_are_the_smallest():
    training, validation = split([segments("small", [(0, 9)]), segments()], 1, 8)
    assert [v.name for v in training] == ["segments"]
    assert [v.name for v in validation] == ["small"]
    with pytest.raises(
        ValueError, match=r"more than held_out=2 volumes with 8 usable slices in a row, got 2 of 2"
    ):
        split([segments("small", [(0, 9)]), segments()], 2, 8)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=12), st.integers(0, 40))
def test_a_fold_is_held_out_whole(numbers, seed):
    numbers = [0, 1, *numbers]
    number = max(numbers) + 1
    volumes = [segments(f"case{k}") for k in range(len(numbers))]
    folds = {volume.name: fold for volume, fold in zip(volumes, numbers, strict=True)} | {"elsewhere": 0}
    wanted = {name for name, fold in folds.items() if fold == seed % number} - {"elsewhere"}
    if not wanted:
        with pytest.raises(ValueError, match=f"got 0 in fold {seed % number}"):
            split_by_fold(volumes, folds, seed, 8)
        return
    training, held = split_by_fold(volumes, folds, seed, 8)
    assert {v.name for v in held} == wanted
    assert {v.name for v in training} | wanted == {v.name for v in volumes}
    assert not {v.name for v in training} & wanted


def test_volumes_too_short_for_a_slab_are_on_neither_side():
    volumes = [segments("a"), segments("b"), segments("short", [(0, 7)]), segments("c")]
    folds = {"a": 0, "b": 1, "short": 1, "c": 2}
    training, held = split_by_fold(volumes, folds, 1, 8)
    assert ([v.name for v in training], [v.name for v in held]) == (["a", "c"], ["b"])
    with pytest.raises(ValueError, match="both sides, got 0 in fold 0 and 3 in the others"):
        split_by_fold(volumes, folds | {"a": 1, "short": 0}, 0, 8)
    with pytest.raises(ValueError, match=r"name every case of the store, got none for \['c'\]"):
        split_by_fold(volumes, {"a": 0, "b": 1, "short": 1}, 0, 8)


def test_folds_are_read(tmp_path):
    file = tmp_path / "folds.csv"
    file.write_text("case,fold\n# a patient in two scans\na,0\n b , 1 \n\nc,0\n")
    assert read_folds(file) == {"a": 0, "b": 1, "c": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,0\na,1\n", "folds.csv, line 2: must be case,fold, each case once .*, got 'a,1'"),
        ("a,0\nb,-1\n", "folds.csv, line 2: .* got 'b,-1'"),
        ("a,0\nb\n", "folds.csv, line 2: .* got 'b'"),
        ("a,0\nb,1,2\n", "folds.csv, line 2: "),
        ("a,0\n,1\n", "folds.csv, line 2: "),
        ("a,0\nb,one\n", "folds.csv, line 2: "),
        ("a,0\nb,0\n", r"folds must be 0, 1 and so on, two at least, got \[0\]"),
        ("a,0\nb,2\n", r"folds must be 0, 1 and so on, two at least, got \[0, 2\]"),
        ("", r"folds must be 0, 1 and so on, two at least, got \[\]"),
    ],
)
def test_what_are_no_folds(tmp_path, text, message):
    file = tmp_path / "folds.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_folds(file)


def test_a_run_holds_out_its_fold(tmp_path, monkeypatch):
    volumes = [segments(name) for name in ("a", "b", "c")]
    monkeypatch.setattr(data, "store_volumes", lambda path: volumes)
    (tmp_path / "folds.csv").write_text("a,0\nb,1\nc,2\n")
    seen = []
    monkeypatch.setattr(
        data, "PairStream", lambda v, *a, **k: seen.append([x.name for x in v]) or PairStream(v, *a, **k)
    )
    run = replace(CONFIG, data=tmp_path, folds=tmp_path / "folds.csv", seed=4, validation_pairs=1, crop=8)
    _, checks = pair_streams(run, CPU)
    assert seen == [["a", "c"], ["b"]]
    assert len(checks) == 1
    with pytest.raises(
        ValueError, match=r"folds must be None without data, which they name, got .*folds\.csv"
    ):
        pair_streams(replace(run, data=None), CPU)


@pytest.mark.parametrize("density", [-770, -905])
def test_a_volume_is_brought_to_the_density(density):
    hu, mask = lung_of(density)
    volume = Volume.of("p", hu, mask, (1.0, 0.8, 0.8))
    scaled = volume.inflated(-870.0)
    values, lung = (tensor.numpy() for tensor in scaled.slab(2, 9))
    assert healthy_density(*map(np.asarray, scaled.slab(0, 12))) == pytest.approx(-870, abs=3)  # whole HU
    np.testing.assert_array_equal(lung, mask[2:9])
    np.testing.assert_array_equal(values[~lung], hu[2:9][~lung])
    assert (scaled.name, scaled.shape, scaled.segments) == ("p", hu.shape, [(0, 12)])
    np.testing.assert_array_equal(scaled.mask_counts, mask.sum((1, 2)))
    np.testing.assert_array_equal(scaled.kept("memory", CPU).slab(2, 9)[0], values)
    np.testing.assert_array_equal(volume.slab(0, 12)[0], hu)


def lung_of(density: float) -> tuple[np.ndarray, np.ndarray]:
    """Noisy lung in a body."""
    mask = np.zeros((12, 48, 60), bool)
    mask[:, 6:-6, 6:-6] = True
    noisy = np.random.default_rng(0).normal(density, 45, mask.shape)
    return np.where(mask, noisy, 30).round().astype(np.int16), mask


def test_the_density_is_the_store_s_or_found(tmp_path):
    """Stores of before do not tell it; None tells that there is none."""
    store = Store.create(tmp_path / "store", {"spacing": [1.0, 0.8, 0.8], "size": 60})
    hu, mask = lung_of(-800)
    found = healthy_density(hu, mask)
    told = {"a": {}, "b": {"density_hu": found}, "c": {"density_hu": -900.0}, "d": {"density_hu": None}}
    for name, meta in told.items():
        store.add(name, hu, mask, meta)
    volumes = store_volumes(store.path)
    assert [v.name for v in volumes] == list("abcd")
    assert [v.inflated(-850.0).factor for v in volumes] == [-850 / found, -850 / found, 850 / 900, 1.0]
    scaled = volumes[2].inflated(-850.0)
    np.testing.assert_array_equal(scaled.slab(3, 7)[0], inflate(hu, mask, 850 / 900)[3:7])
    np.testing.assert_array_equal(volumes[3].inflated(-850.0).slab(3, 7)[0], hu[3:7])
    assert volumes[0].spacing == (1.0, 0.8, 0.8)
    assert volumes[0].segments == [(0, 12)]


# ---- pairs


def test_a_batch_depends_on_its_step_alone():
    one, other = stream(), stream()
    other.batch(0)
    assert equal(one.batch(3), other.batch(3))
    assert not torch.equal(one.batch(3).image, one.batch(4).image)
    assert not torch.equal(one.batch(3).image, stream(seed=1).batch(3).image)
    assert equal(stream(first_index=6).batch(0), one.batch(3))


def test_processes_share_a_batch():
    whole = stream(batch_size=4).batch(3)
    halves = [stream(batch_size=4, rank=r, processes=2).batch(3) for r in (0, 1)]
    for name in ("image", "target", "lesions"):
        assert torch.equal(torch.cat([getattr(h, name) for h in halves]), getattr(whole, name))


def test_a_pair_is_that_of_the_synthesizer():
    volume = segments()
    batch = stream(volume, batch_size=1, crop=None).batch(5)
    assert [z for z, _ in volume.slabs(8)] == [0, 1, 2, 14, 15, 16]
    largest = max(voxels for _, voxels in volume.slabs(8))
    candidates = []
    for z, voxels in volume.slabs(8):
        hu, mask = (array.numpy() for array in volume.slab(z, z + 8))
        synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)
        pair = synth(ls.window_hu(hu) * mask, mask, index=5, lung_fraction=voxels / largest)
        candidates.append((pair.image, pair.target, pair.labels > 0))
    made = [t[0, 0].numpy() for t in (batch.image, batch.target, batch.lesions)]
    assert any(all(map(np.array_equal, made, candidate)) for candidate in candidates)


def test_pairs_are_the_synthesizer_s_without_a_copy():
    assert_no_copy(stream(batch_size=2), CPU)


def assert_no_copy(made: PairStream, device: torch.device) -> None:
    """Slabs go in, and pairs come out, as the memory they are in, on the device."""
    seen, real, slabs = [], made._synthesizer, made.slabs(0)

    def spied(image, mask, **how):
        seen.append((image, mask, real(image, mask, **how)))
        return seen[-1][-1]

    spied.config = real.config
    made._synthesizer = spied
    batch = made.pairs(slabs)
    ((image, mask, pair),) = seen
    for tensor in (image, mask, pair.image, pair.target, batch.image, batch.target, batch.lesions):
        assert isinstance(tensor, torch.Tensor)
        assert tensor.device.type == device.type
    assert batch.image.data_ptr() == pair.image.data_ptr()
    assert batch.target.data_ptr() == pair.target.data_ptr()
    if slabs.mask.device.type == device.type:
        assert mask.data_ptr() == slabs.mask.data_ptr()


def test_the_threshold_in_hu_moves_target_and_generator():
    low, high = (stream(batch_size=16, hu=hu).batch(0) for hu in (-600.0, -400.0))
    assert (low.target | ~high.target).all()
    assert low.target.sum() > high.target.sum()


def test_thick_slices_come_in_the_share_asked_for():
    none, half = (stream(batch_size=24, thick_slices=share).batch(0) for share in (0.0, 0.5))
    changed = [not torch.equal(a, b) for a, b in zip(none.image, half.image, strict=True)]
    assert 6 <= sum(changed) <= 18  # binomial of 24 at 0.5, all but 0.7 %
    for k, thick in enumerate(changed):
        if not thick:
            assert torch.equal(none.target[k], half.target[k])
            assert torch.equal(none.lesions[k], half.lesions[k])
        else:  # neighbouring slices of a thick one differ less
            steps = [b.image[k, 0].diff(dim=0).abs().sum() for b in (none, half)]
            assert steps[1] < steps[0]
    assert not (half.target & half.lesions).any()


def test_crops_hold_lung_and_mirroring_flips_half():
    a, b = (stream(batch_size=16, mirror=mirror).batch(0) for mirror in (False, True))
    assert a.image.shape == (16, 1, 8, 24, 24)
    assert a.target.dtype == torch.bool
    assert (a.image.amax(dim=(1, 2, 3, 4)) > 0).all()
    same = [torch.equal(x, y) for x, y in zip(a.image, b.image, strict=True)]
    assert 2 <= sum(not s for s in same) <= 14
    for k in np.flatnonzero(~np.array(same)):  # the slab alone: lesions are drawn for what is flipped
        outside = [~batch.lesions[k] for batch in (a, b)]
        kept = outside[1] & outside[0].flip(-1)
        assert torch.equal(b.image[k][kept], a.image[k].flip(-1)[kept])


# ---- the streams of a run


_drawn = functools.cache(data.phantom_volumes)


@pytest.fixture
def drawn_once(monkeypatch):
    """Phantoms take longer to draw than pairs of them."""
    monkeypatch.setattr(data, "phantom_volumes", _drawn)


def test_streams_of_a_run(drawn_once):
    made, checks = pair_streams(RUN, CPU)
    assert [batch.image.shape for batch in checks] == [(1, 1, 8, 24, 24)] * 3
    one = replace(RUN, batch_size=1, accumulate=1, mirror=False)
    volumes = data.phantom_volumes(3, 0, RUN.phantom_shape, RUN.phantom_spacing)
    training, held = split(volumes, 1, 8)
    assert {v.name for v in (*training, *held)} == {"phantom1000", "phantom1001", "phantom1002"}
    synthesizer = made._synthesizer
    again = PairStream(held, synthesizer, one, largest=made.largest, first_index=data.VALIDATION_INDEX)
    assert all(equal(again.batch(k), batch) for k, batch in enumerate(checks))
    assert equal(PairStream(training, synthesizer, RUN).batch(4), made.batch(4))
    part, none = pair_streams(RUN, CPU, rank=1, processes=2, local=2)
    assert none == []
    assert torch.equal(part.batch(4).image, made.batch(4).image[1:])
    assert pair_streams(replace(RUN, held_out=0), CPU)[1] == []


def test_pairs_for_cuda_without_its_kernels_are_made_on_the_cpu(monkeypatch, drawn_once):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pairs are synthesised on the CPU: CuPy is not installed"):
        made, _ = pair_streams(RUN, torch.device("cuda", 0))
    assert made.device.type == "cpu"
    assert data.pair_device(CPU) == CPU


# ---- batches, ahead of the network


def test_batches_come_in_order_and_ahead(monkeypatch):
    asked: queue.Queue[int] = queue.Queue()

    def make(step: int) -> int:
        asked.put(step)
        return step

    ticks = itertools.count()
    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    batches = Batches(SimpleNamespace(device=CPU, batch=make), range(3, 12))
    found, made = [], []
    with contextlib.closing(batches):
        for step in batches:
            found.append(step)
            while len(made) < min(step + data.AHEAD, 11) - 2:  # the thread goes on meanwhile
                made.append(asked.get(timeout=60))
            with pytest.raises(queue.Empty):  # but not far
                asked.get(timeout=0.05)
    assert found == made == list(range(3, 12))
    assert batches.waited == len(found)  # a tick each


def test_closed_batches_stop_their_thread():
    before = threading.active_count()
    asked: list[int] = []
    with contextlib.closing(Batches(SimpleNamespace(device=CPU, batch=asked.append), range(1000))) as batches:
        next(iter(batches))
    assert threading.active_count() == before
    assert len(asked) <= data.AHEAD + 1
    batches.close()


def test_an_error_of_the_background_thread_is_raised():
    def broken(step: int) -> None:
        if step == 1:
            raise IndexError(step)

    with contextlib.closing(Batches(SimpleNamespace(device=CPU, batch=broken), range(9))) as batches:
        made = iter(batches)
        next(made)
        with pytest.raises(IndexError):
            next(made)


def test_slabs_are_pinned_for_the_device_that_trains(monkeypatch):
    """A background thread begins on device 0, and pinning sets the current device up."""
    current, pinned_on = [0], []

    class Current:
        def __init__(self, chosen) -> None:
            self.chosen = chosen

        def __enter__(self) -> None:
            current.append(self.chosen.index)

        def __exit__(self, *_) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned_on.append(current[-1]), tensor)[1])
    made = stream(device=torch.device("cuda", 3))
    assert not made.resident
    monkeypatch.setattr(PairStream, "pairs", lambda self, slabs: slabs)
    with contextlib.closing(Batches(made, range(2))) as batches:
        assert [slabs.indices for slabs in batches] == [[0, 1], [2, 3]]
    assert pinned_on == [3] * 4
    assert current == [0]
