"""`lesionsynth.ops` and the removal of erroneous edges beside SciPy, NumPy and cc3d: error, then time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

import lesionsynth as ls
from benchmarks.common import Checks, installed, timed
from benchmarks.volumes import Volume

SIGMAS = (0.8, 2.0, 5.0, 11.0, 20.0)
BOXES = ((1, 1, 1), (1, 64, 64), (8, 24, 24), (32, 48, 48), (32, 200, 200))
UNIFORM = {"full": (100, 512, 512), "quick": (16, 96, 96)}
UNIFORM_SIZES = (9, 7)
GROWTH = 8
GAUSSIAN_ERROR = 1e-6
"""As `lesionsynth.ops.gaussian_filter` documents for values in [0, 1]."""
UNIFORM_ERROR = 1e-6


def measure(
    volumes: Sequence[Volume], threads: Sequence[int], rounds: int, checks: Checks, *, quick: bool
) -> dict[str, Any]:
    """Check and time every operation.

    Returns
    -------
    dict
        Operation -> case -> contestant -> `benchmarks.common.statistics`, and the errors found.
    """
    results: dict[str, Any] = {
        "gaussian_filter": _gaussian(threads, rounds, checks),
        "uniform_filter": _uniform(threads, rounds, checks, UNIFORM["quick" if quick else "full"]),
        "philox_uniform": _philox(threads, rounds, checks, UNIFORM["quick" if quick else "full"]),
    }
    few = max(1, min(rounds, 5))
    results["label"], results["grow"], results["remove_erroneous_edges"] = {}, {}, {}
    for volume in volumes:
        for connectivity in (6, 26):
            case = f"{volume.name}, {connectivity} neighbours"
            results["label"][case] = _label(volume, connectivity, threads, few, checks)
        results["grow"][volume.name] = _grow(volume, threads, few, checks)
        results["remove_erroneous_edges"][volume.name] = _edges(volume, threads, few, checks)
    return results


def _ours(
    name: str, threads: Sequence[int], run: Callable[..., Any], function: Callable[..., Any]
) -> dict[str, Callable[[int], Any]]:
    """Contestants of lesionsynth: one per thread count where the function takes one."""
    if "threads" in inspect.signature(function).parameters:
        return {f"{name}, {t} threads": lambda _, t=t: run(threads=t) for t in threads}
    return {name: lambda _: run()}


def _gaussian(threads: Sequence[int], rounds: int, checks: Checks) -> dict[str, Any]:
    cases = {}
    for box in BOXES:
        field = np.random.default_rng(0).random(box, dtype=np.float32)
        for sigma in SIGMAS:
            case = f"{'x'.join(map(str, box))}, sigma {sigma:g}"
            exact = ndimage.gaussian_filter(field.astype(np.float64), sigma)
            errors = {
                "lesionsynth": float(np.abs(ls.ops.gaussian_filter(field, sigma) - exact).max()),
                "SciPy": float(np.abs(ndimage.gaussian_filter(field, sigma) - exact).max()),
            }
            rule = f"within {GAUSSIAN_ERROR:g} of SciPy in float64"
            checks.add(f"gaussian_filter {case}", rule, errors["lesionsynth"], GAUSSIAN_ERROR)

            def run(field: Any = field, sigma: float = sigma, **options: Any) -> Any:
                return ls.ops.gaussian_filter(field, sigma, **options)

            def scipy(_: int, field: Any = field, sigma: float = sigma) -> Any:
                return ndimage.gaussian_filter(field, sigma)

            ours = _ours("lesionsynth", threads, run, ls.ops.gaussian_filter)
            cases[case] = {"times": timed(ours | {"SciPy": scipy}, min(rounds, 10)), "error": errors}
    return cases


def _uniform(
    threads: Sequence[int], rounds: int, checks: Checks, shape: tuple[int, int, int]
) -> dict[str, Any]:
    field = np.random.default_rng(0).random(shape, dtype=np.float32)
    cases = {}
    for size in UNIFORM_SIZES:
        exact = ndimage.uniform_filter(field.astype(np.float64), size)
        error = float(np.abs(ls.ops.uniform_filter(field, size) - exact).max())
        checks.add(f"uniform_filter {size}", "within 1e-6 of SciPy in float64", error, UNIFORM_ERROR)

        def run(size: int = size, **options: Any) -> Any:
            return ls.ops.uniform_filter(field, size, **options)

        ours = _ours("lesionsynth", threads, run, ls.ops.uniform_filter)
        theirs = {"SciPy": lambda _, size=size: ndimage.uniform_filter(field, size)}
        case = f"{'x'.join(map(str, shape))}, size {size}"
        cases[case] = {"times": timed(ours | theirs, min(rounds, 5)), "error": {"lesionsynth": error}}
    return cases


def _philox(
    threads: Sequence[int], rounds: int, checks: Checks, shape: tuple[int, int, int]
) -> dict[str, Any]:
    field = ls.ops.philox_uniform(shape, 1)
    counts = np.bincount((field.ravel() * 64).astype(np.int64), minlength=64)
    # Chi-squared of 63 degrees of freedom exceeds 120 once in 2e-5; the field is fixed.
    chi2 = float(((counts - field.size / 64) ** 2).sum() / (field.size / 64))
    checks.add("philox_uniform", "chi-squared of 64 bins, 63 degrees of freedom", chi2, 120.0)
    rng = np.random.default_rng(0)

    def run(**options: Any) -> Any:
        return ls.ops.philox_uniform(shape, 1, **options)

    ours = _ours("lesionsynth", threads, run, ls.ops.philox_uniform)
    theirs = {"NumPy (PCG64)": lambda _: rng.random(shape, dtype=np.float32)}
    return {"x".join(map(str, shape)): {"times": timed(ours | theirs, min(rounds, 5))}}


def _label(
    volume: Volume, connectivity: int, threads: Sequence[int], rounds: int, checks: Checks
) -> dict[str, Any]:
    structure = ndimage.generate_binary_structure(3, {6: 1, 26: 3}[connectivity])
    labels, count = ls.ops.label(volume.vessels, connectivity=connectivity)
    want, wanted = ndimage.label(volume.vessels, structure)
    differ = int((labels != want).sum()) + abs(count - wanted)
    checks.add(f"label {volume.name}, {connectivity}", "equals SciPy's", differ)

    def run(**options: Any) -> Any:
        return ls.ops.label(volume.vessels, connectivity=connectivity, **options)

    contestants = _ours("lesionsynth", threads, run, ls.ops.label)
    contestants["SciPy"] = lambda _: ndimage.label(volume.vessels, structure)
    if cc3d := installed("cc3d"):
        contestants["cc3d"] = lambda _: cc3d.connected_components(volume.vessels, connectivity=connectivity)
        _, found = cc3d.connected_components(volume.vessels, connectivity=connectivity, return_N=True)
        checks.add(f"label {volume.name}, {connectivity}: cc3d", "as many as SciPy", abs(found - wanted))
    return {"times": timed(contestants, rounds), "components": wanted}


def _grow(volume: Volume, threads: Sequence[int], rounds: int, checks: Checks) -> dict[str, Any]:
    """Grow a thousandth of the vessels' voxels inside all of them."""
    seeds = np.zeros_like(volume.vessels)
    seeds.ravel()[np.flatnonzero(volume.vessels)[::1000]] = True
    want = ndimage.binary_dilation(seeds, mask=volume.vessels, iterations=GROWTH)
    got = ls.ops.grow(seeds, volume.vessels, iterations=GROWTH)
    checks.add(f"grow {volume.name}", "equals scipy.ndimage.binary_dilation", (got != want).sum())

    def run(**options: Any) -> Any:
        return ls.ops.grow(seeds, volume.vessels, iterations=GROWTH, **options)

    def scipy(_: int) -> Any:
        return ndimage.binary_dilation(seeds, mask=volume.vessels, iterations=GROWTH)

    return {"times": timed(_ours("lesionsynth", threads, run, ls.ops.grow) | {"SciPy": scipy}, rounds)}


def _edges(volume: Volume, threads: Sequence[int], rounds: int, checks: Checks) -> dict[str, Any]:
    image, mask = volume.rimmed
    got, want = ls.remove_erroneous_edges(image, mask), remove_edges_scipy(image, mask)
    differ = int((got[0] != want[0]).sum() + (got[1] != want[1]).sum())
    checks.add(f"remove_erroneous_edges {volume.name}", "equals SciPy's", differ)

    def run(**options: Any) -> Any:
        return ls.remove_erroneous_edges(image, mask, **options)

    contestants = _ours("lesionsynth", threads, run, ls.remove_erroneous_edges)
    contestants["SciPy"] = lambda _: remove_edges_scipy(image, mask)
    removed = int(mask.sum()) - int(want[1].sum())
    return {"times": timed(contestants, rounds), "removed_voxels": removed}


def remove_edges_scipy(
    image: np.ndarray, mask: np.ndarray, threshold: float = 1 / 3, contact: float = 0.5, width: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """`lesionsynth.remove_erroneous_edges` with SciPy, in the box of the mask."""
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    inside = mask[box]
    bright = inside & (image[box] >= np.float32(threshold))
    labels, count = ndimage.label(bright, np.ones((3, 3, 3)))
    side = 2 * width + 1
    core = ndimage.minimum_filter(inside.view(np.uint8), (1, side, side), mode="constant", cval=0)
    near = bright & (core == 0)
    size = np.bincount(labels[bright], minlength=count + 1)
    touching = np.bincount(labels[near], minlength=count + 1)
    kept = mask.copy()
    kept[box] = inside & ~(touching > contact * size)[labels]
    return np.where(kept, image, np.float32(0)), kept
