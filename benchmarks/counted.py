"""What a batch costs at least, counted from plans: bytes, multiply-adds, Philox calls, float64 operations.

Boxes and lesions come from the CPU twin, which makes the same; rates are given, not measured here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import lesionsynth as ls

FLOAT64_PER_VOXEL = 40
"""Operations of a voxel's displacement (24) and of the ellipsoid's equation (16)."""
INTEGER_PER_CALL = 70
"""Instructions of a Philox call: ten rounds of two wide products, two high words and two exclusive ors."""


@dataclass(frozen=True)
class Rates:
    """A device's speed."""

    name: str
    bytes_s: float
    """Device memory, reading and writing."""
    float32_s: float
    """Additions or multiply-adds, one for each lane and clock."""
    float64_s: float
    integer_s: float


H100 = Rates("H100 SXM, 132 multiprocessors at 1.7 GHz, 3.0 TB/s", 3.0e12, 28.7e12, 14.4e12, 14.4e12)
"""128 float32 lanes, 64 float64 and 64 integer lanes a multiprocessor, by its data sheet."""


def count(synth: ls.LesionSynthesizer, image: Any, mask: Any, indices: Sequence[int]) -> dict[str, Any]:
    """Count a batch, one entry for each kernel, and all of it."""
    voxels, n = image.size, len(indices)
    kernels: dict[str, dict[str, float]] = {
        "copy_pair": {"bytes": 9.0 * voxels * n},
        "read_mask": {"bytes": (1 + 1 / 8) * voxels * n},
        "draw_blobs": {"float64": 0.0, "bytes": 0.0},
        "join_blobs": {"bytes": 0.0},
    }
    for name in ("noise", "salt"):
        for axis in "xyz":
            kernels[f"{name}_along_{axis}"] = {"bytes": 0.0, "float32": 0.0, "integer": 0.0}
    kernels["inject"] = {"bytes": 0.0}
    for index in indices:
        plan = synth(image, mask, index=index, lung_fraction=1.0).plan
        assert isinstance(plan, ls.LesionPlan)
        _count_plan(plan, image.shape, kernels)
    return {"batch": n, "kernels": kernels, "lesions_share": _share(kernels, voxels * n)}


def floors(counted: dict[str, Any], rates: Rates) -> dict[str, float]:
    """Return the least time of each kernel in seconds: the longest of its bytes and its operations."""
    by = {
        "bytes": rates.bytes_s,
        "float32": rates.float32_s,
        "float64": rates.float64_s,
        "integer": rates.integer_s,
    }
    return {
        name: max(amount / by[what] for what, amount in needs.items())
        for name, needs in counted["kernels"].items()
    }


def _share(kernels: dict[str, dict[str, float]], voxels: int) -> float:
    """Part of the volumes that the lesions' boxes fill."""
    return kernels["noise_along_y"]["bytes"] / 8 / voxels


def _count_plan(plan: ls.LesionPlan, shape: tuple[int, ...], kernels: dict[str, dict[str, float]]) -> None:
    for blob in plan.blobs:
        # The blob's own voxels, which no culling leaves out, once; its box's bits twice.
        voxels = 4 / 3 * math.pi * math.prod(blob.semi_axes) / math.prod(plan.scale)
        kernels["draw_blobs"]["float64"] += FLOAT64_PER_VOXEL * voxels
        kernels["draw_blobs"]["bytes"] += 2 * voxels / 8
        kernels["join_blobs"]["bytes"] += 2 * voxels / 8
    assert plan.components is not None
    for lesion in plan.components:
        size = [stop - start for start, stop in lesion.box]
        box = math.prod(size)
        blob = plan.blobs[lesion.blobs[0]]
        for name, sigma in (("noise", blob.sigma_a), ("salt", blob.sigma_b)):
            for axis, letter in enumerate("zyx"):
                radius = int(4 * sigma / plan.scale[axis] + 0.5)
                steps = radius if 2 * radius + 1 <= size[axis] else (size[axis] + 1) // 2
                taps = 2 if 2 * radius + 1 <= size[axis] else 1  # an addition and a multiply-add, or one
                kernel = kernels[f"{name}_along_{letter}"]
                kernel["float32"] += taps * steps * box
                # Read and written through the second-level cache; along x nothing, or a2, is read.
                kernel["bytes"] += (8 if letter != "x" else 4 if name == "noise" else 8) * box
                if letter == "x":
                    kernel["integer"] += INTEGER_PER_CALL * box / 4
        kernels["inject"]["bytes"] += 13 * lesion.voxels


def table(counted: dict[str, Any], rates: Rates) -> str:
    """Format the counts and floors of a batch."""
    rows = [f"{'kernel':16}{'MB':>9}{'Mop f32':>10}{'Mop f64':>10}{'Mop int':>10}{'floor us':>10}"]
    least = floors(counted, rates)
    for name, needs in counted["kernels"].items():
        cells = "".join(f"{needs.get(what, 0) / 1e6:10.1f}" for what in ("float32", "float64", "integer"))
        rows.append(f"{name:16}{needs['bytes'] / 1e6:9.1f}{cells}{least[name] * 1e6:10.1f}")
    everything = sum(least.values())
    beside = everything - least["copy_pair"]
    rows.append(
        f"batch of {counted['batch']}: copy {least['copy_pair'] * 1e6:.0f} us beside {beside * 1e6:.0f} us; "
        f"lesions' boxes fill {counted['lesions_share']:.1%}; rates: {rates.name}"
    )
    return "\n".join(rows)


def as_record(counted: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """Return counts and floors for JSON."""
    return {
        **counted,
        "rates": rates.__dict__,
        "floors_s": floors(counted, rates),
        "sum_of_floors_s": float(np.sum(list(floors(counted, rates).values()))),
    }
