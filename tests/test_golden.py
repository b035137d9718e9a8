"""The golden pairs, on the CPU twin and by the kernels on the host; test_gpu.py replays them on a GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

import lesionsynth as ls
from lesionsynth.cuda.render import Renderer
from tests import golden
from tests.cuda_host.device import HostDevice
from tests.cuda_host.pairs import render
from tests.cuda_host.shim import compiler
from tests.plans import renderer

PAIRS = golden.load()


def recorded(name: str):
    record = PAIRS[name]
    plan = ls.LesionPlan.from_json(json.dumps(record["plan"]))
    return plan, golden.inputs(plan.shape, record["kind"], plan.seed), record


def same(record, image, target, labels) -> None:
    found = golden.hashes(image, target, labels)
    assert {key: record[key] for key in found} == found


@pytest.mark.parametrize("name", PAIRS)
def test_cpu_twin(name) -> None:
    plan, (image, mask), record = recorded(name)
    pair = renderer().render(plan, image, mask)
    assert len(pair.plan.components) == record["lesions"] > 0
    same(record, pair.image, pair.target, pair.labels)


@pytest.mark.skipif(compiler() is None, reason="the shim needs g++, which is not installed")
@pytest.mark.parametrize("name", PAIRS)
def test_kernels_on_the_host(name) -> None:
    plan, (image, mask), record = recorded(name)
    pair = render(Renderer(HostDevice()), [plan], image[None], mask[None])
    assert len(pair.components[0]) == record["lesions"]
    same(record, pair.image[0], pair.target[0], pair.labels[0])


def test_plans_are_drawn_as_recorded() -> None:
    """A change of the laws or of the order of draws shows here, on this machine's mathematical library.

    Those of the paper's mode are of version 1, so this is also how those are read.
    """
    for name, (plan, kind) in golden.cases().items():
        record = PAIRS[name]
        assert (kind, 1 if plan.mode == "max" else 2) == (record["kind"], record["plan"]["version"])
        fresh, stored = plan, ls.LesionPlan.from_json(json.dumps(record["plan"]))
        assert replace(fresh, blobs=()) == replace(stored, blobs=())
        for blob, other in zip(fresh.blobs, stored.blobs, strict=True):
            one, two = asdict(blob), asdict(other)
            for key in ("center", "placement"):
                assert one.pop(key) == two.pop(key)
            for key in one:
                assert np.allclose(one[key], two[key], rtol=1e-14, atol=1e-16), (name, key)
