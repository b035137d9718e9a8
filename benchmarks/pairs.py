"""Whole training pairs: every contestant checked, then all of them timed in turns; and stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import lesionsynth as ls
from benchmarks import pipeline, scipy_pipeline
from benchmarks.common import Checks, StageClock, installed, interleaved, statistics
from benchmarks.libraries import TORCH_THREADS, Libraries
from benchmarks.volumes import Volume

UNTIED = 1e-4
"""Greatest difference of an image voxel in a lesion without ties."""
TIED = 1e-3
"""Greatest mean difference over a lesion with ties: a voxel of salt noise may flip and move all around it."""
SHAPE_FLIPS = 1e-4
"""Share of lesion voxels whose label may differ where shapes are evaluated in float32."""
SIZES = (0.5, 2.0)
"""Bounds of all blobs' voxels by another library's warp, relative to SciPy's: other laws, equal strength."""


def synthesizer(threads: int | None) -> ls.LesionSynthesizer:
    """Return the generator that is measured."""
    return ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0, threads=threads)


# --- correctness ---


def check(volume: Volume, libraries: Libraries, threads: Sequence[int], plans: int, checks: Checks) -> None:
    """Compare lesionsynth with SciPy voxel by voxel, and hold every library to what it claims."""
    for index in range(plans):
        check_pair(volume, index, threads, f"{volume.name}, pair {index}", checks)
    plan = synthesizer(1).sample(index=0, shape=volume.image.shape)
    for name, library in libraries.present.items():
        if not name.startswith("SciPy"):
            check_library(volume, plan, name, library, checks)


def check_pair(volume: Volume, index: int, threads: Sequence[int], name: str, checks: Checks) -> None:
    """Compare one pair with the SciPy pipeline that has the same noise."""
    image, mask = volume.image, volume.mask
    ours = [synthesizer(t)(image, mask, index=index, lung_fraction=1.0) for t in threads]
    first = ours[0]
    differ = sum(
        (a.image != first.image).sum() + (a.target != first.target).sum() + (a.labels != first.labels).sum()
        for a in ours
    )
    checks.add(f"{name}: threads", "the number of threads changes no voxel", differ)
    plan = synthesizer(1).sample(index=index, shape=image.shape)
    want = pipeline.render(scipy_pipeline.checked_stages(), plan, image, mask)
    checks.add(f"{name}: labels", "equal", (first.labels != want.labels).sum())
    checks.add(f"{name}: target", "equal", (first.target != want.target).sum())
    plainly = pipeline.Stages(scipy_pipeline.PlainSciPy(), pipeline.Philox())
    plain = pipeline.render(plainly, plan, image, mask)
    differ = (plain.labels != want.labels).sum() + (plain.target != want.target).sum()
    checks.add(f"{name}: plain SciPy", "labels and target equal", differ)
    outside = want.labels == 0
    checks.add(f"{name}: outside", "image equals its input", (first.image[outside] != image[outside]).sum())
    untied, tied, ties = _differences(first.image, want)
    checks.add(f"{name}: untied lesions", f"image within {UNTIED:g}", untied, UNTIED)
    rule = f"image within {TIED:g} on average ({ties} voxels that rounding may decide)"
    checks.add(f"{name}: tied lesions", rule, tied, TIED)
    fast = pipeline.Stages(scipy_pipeline.SciPy(), pipeline.Philox())
    flips = (pipeline.render(fast, plan, image, mask).labels > 0) != (want.labels > 0)
    rule = f"the timed SciPy pipeline's lesions, in float32, but for {SHAPE_FLIPS:g} of their voxels"
    checks.add(f"{name}: float32 shapes", rule, flips.sum() / max((~outside).sum(), 1), SHAPE_FLIPS)


def check_library(volume: Volume, plan: ls.LesionPlan, name: str, library: Any, checks: Checks) -> None:
    """Compare a library's filter and warp with SciPy's, and its pair with what any pair must be."""
    field = np.random.default_rng(0).random((9, 30, 41), dtype=np.float32)
    for sigma in (0.8, 3.3, 15.0):
        error = np.abs(library.smooth(field, (sigma,) * 3) - library.smoothing_reference(field, (sigma,) * 3))
        label = f"{volume.name}, {name}: Gaussian {sigma}"
        checks.add(label, library.smoothing_rule, error.max(), library.smoothing_limit)
    theirs = pipeline.Stages(library, pipeline.Generator())
    scipy = pipeline.Stages(scipy_pipeline.SciPy(), pipeline.Generator())
    centers = scipy.place(plan, volume.mask)
    still = dataclasses.replace(
        plan, blobs=tuple(dataclasses.replace(b, warp_amplitude=0.0) for b in plan.blobs)
    )
    sets = [_painted(stages.draw(still, centers, volume.mask), volume) for stages in (theirs, scipy)]
    checks.add(f"{volume.name}, {name}: still blobs", "equal SciPy's", (sets[0] != sets[1]).sum())
    sizes = [
        sum(p.voxels.sum() for p in stages.draw(plan, centers, volume.mask)) for stages in (theirs, scipy)
    ]
    ratio = sizes[0] / sizes[1]
    rule = f"voxels of SciPy's blobs times {SIZES[0]} to {SIZES[1]}: it is {ratio:.2f}"
    checks.add(f"{volume.name}, {name}: warped blobs", rule, abs(np.log2(ratio)), max(np.abs(np.log2(SIZES))))
    pair = pipeline.render(theirs, plan, volume.image, volume.mask)
    lesion = pair.labels > 0
    wrong = (pair.image[~lesion] != volume.image[~lesion]).sum()
    wrong += (pair.image[lesion] < volume.image[lesion]).sum() + (lesion & ~volume.mask).sum()
    wrong += (pair.target != ((volume.image >= np.float32(plan.tau)) & ~lesion)).sum()
    checks.add(f"{volume.name}, {name}: pair", "lesions in the mask, A >= H, A = H outside, GT exact", wrong)


def _differences(image: np.ndarray, want: pipeline.Pair) -> tuple[float, float, int]:
    """Greatest difference in lesions without ties, greatest mean difference in those with, and the ties."""
    untied = tied = 0.0
    for lesion, texture in zip(want.lesions, want.textures, strict=True):
        difference = np.abs(image[lesion.box] - want.image[lesion.box])[lesion.voxels]
        if texture.ties:
            tied = max(tied, float(difference.mean()))
        else:
            untied = max(untied, float(difference.max()))
    return untied, tied, int(sum(t.ties for t in want.textures))


def _painted(pieces: list[pipeline.Piece], volume: Volume) -> np.ndarray:
    union = np.zeros(volume.image.shape, np.bool_)
    for piece in pieces:
        union[piece.box] |= piece.voxels
    return union


# --- time ---


def time_pairs(volume: Volume, libraries: Libraries, threads: Sequence[int], plans: int) -> dict[str, Any]:
    """Time whole pairs, a new one each round, the same for every contestant."""
    contestants: dict[str, Callable[[int], Any]] = {}
    for t in threads:
        contestants[f"lesionsynth, {_threads(t)}"] = _ours(volume, t, labels=True)
        contestants[f"lesionsynth without labels, {_threads(t)}"] = _ours(volume, t, labels=False)
    for name, library in libraries.present.items():
        for t in threads if name in TORCH_THREADS else (None,):
            contestants[f"{name}, {_threads(t)}" if t else name] = _theirs(volume, library, t)
    samples = interleaved(contestants, plans)
    ours = samples[f"lesionsynth, {_threads(threads[0])}"]
    return {
        name: statistics(values.values())
        | {"rounds": list(values), "times_ours": float(np.median([s / ours[i] for i, s in values.items()]))}
        for name, values in samples.items()
    }


def time_stages(volume: Volume, threads: Sequence[int], plans: int) -> dict[str, Any]:
    """Time each of lesionsynth's stages, and of the SciPy pipeline, in the same pairs."""
    synths = {f"lesionsynth, {_threads(t)}": synthesizer(t) for t in threads}
    backends = {name: synth._backends._cpu for name, synth in synths.items()}
    clocks = {name: StageClock(backend.stages) for name, backend in backends.items()}
    for name, backend in backends.items():
        backend.stages = clocks[name]
    clocks["SciPy"] = StageClock(scipy_pipeline.timed_stages())
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in clocks}
    for index in range(-1, plans):
        plan = synthesizer(1).sample(index=max(index, 0), shape=volume.image.shape)
        for name, clock in clocks.items():
            if name in synths:
                _ = synths[name].render(plan, volume.image, volume.mask).labels
            else:
                pipeline.render(clock, plan, volume.image, volume.mask)
            for stage, seconds in clock.take().items():
                if index >= 0:  # the first round warms up
                    samples[name].setdefault(stage, []).append(seconds)
    return {
        name: {stage: statistics(values) for stage, values in stages.items()}
        for name, stages in samples.items()
    }


def _ours(volume: Volume, threads: int, *, labels: bool) -> Callable[[int], Any]:
    synth = synthesizer(threads)

    def run(index: int) -> Any:
        pair = synth(volume.image, volume.mask, index=index, lung_fraction=1.0)
        return (pair.image, pair.target, pair.labels) if labels else (pair.image, pair.target)

    return run


def _theirs(volume: Volume, library: Any, threads: int | None) -> Callable[[int], Any]:
    stages = pipeline.Stages(library, pipeline.Generator())
    synth, torch = synthesizer(1), installed("torch") if threads else None

    def run(index: int) -> Any:
        if torch is not None:
            torch.set_num_threads(threads)
        plan = synth.sample(index=index, shape=volume.image.shape)
        return pipeline.render(stages, plan, volume.image, volume.mask)

    return run


def _threads(count: int | None) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
