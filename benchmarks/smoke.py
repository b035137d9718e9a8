"""``python -m benchmarks.smoke``: first contact with a GPU, step by step.

Every step is announced, here and in the JSON, before it is tried: a crash names itself.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import lesionsynth as ls
from benchmarks import volumes
from benchmarks.common import write_json
from benchmarks.gpu_inputs import indices, synthesizer

ROUNDS = 6
"""Batches as graphs: the third of each of two tables is the first that is replayed."""
MODES = (("plain", True, False, 1), ("launches", False, False, 2), ("graphs", False, True, ROUNDS))
"""Name, plain kernels, graphs, batches."""
KINDS = ("float32", "bfloat16")


class Steps:
    """Runs steps and remembers how they ended.

    Parameters
    ----------
    path : Path, optional
        Where the JSON goes, before and after every step.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []

    def __call__(self, name: str, run: Callable[[], Any]) -> None:
        """Announce a step and try it; what it returns says how it went."""
        print(f"TRY  {name}", flush=True)
        record: dict[str, Any] = {"name": name, "state": "TRY", "seconds": None, "said": ""}
        self.records.append(record)
        self._write()
        start = time.perf_counter()
        try:
            record["said"] = str(run() or "")
            record["state"] = "OK"
        except Exception as error:  # whatever it is: the next step may still say something
            record["said"] = f"{type(error).__name__}: {str(error)[:400]}"
            record["state"] = "FAIL"
            traceback.print_exc(limit=-4, file=sys.stdout)
        record["seconds"] = time.perf_counter() - start
        print(f"{record['state']:4} {name}, {record['seconds']:.2f} s  {record['said']}", flush=True)
        self._write()

    @property
    def failed(self) -> list[str]:
        """Names of the steps that did not end well."""
        return [record["name"] for record in self.records if record["state"] != "OK"]

    def _write(self) -> None:
        if self.path:
            write_json({"steps": self.records, "failed": self.failed}, self.path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try everything once; 1 where a step failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__)
    parser.add_argument("--found", type=Path, help="where the JSON goes")
    options = parser.parse_args(arguments)
    steps = Steps(options.found)
    try:
        from lesionsynth.cuda.backend import check_cupy

        check_cupy("benchmarks.smoke tries a CUDA device")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    steps("device", device)
    for program, kind in (*(("generator", kind) for kind in KINDS), ("ops", "float32")):
        steps(f"compile {program}, {kind}", lambda p=program, k=kind: f"{len(compiled(p, k))} bytes")
        steps(f"load {program}, {kind}", lambda p=program, k=kind: loaded(p, k))
    for mode, plain, graphs, rounds in MODES:
        batch = Batch(plain=plain, graphs=graphs)
        for number in range(rounds):
            steps(f"batch {number} of eight, {mode}", lambda n=number, b=batch: b.compare(n))
    for kind in KINDS:
        steps(f"torch in and out, {kind}", lambda k=kind: through_torch(k))
    for name, run in OPERATIONS.items():
        steps(name, lambda r=run: same(r))
    steps("philox_uniform", philox)
    steps("training on the device", lambda: trained("cuda"))
    print(f"{len(steps.records) - len(steps.failed)} of {len(steps.records)} steps are OK")
    return 1 if steps.failed else 0


def device() -> str:
    """Name the device and what drives it."""
    from benchmarks import versions

    return f"{versions.device()} {versions.cuda()}"


def compiled(program: str, kind: str) -> bytes:
    """Compile a program for the device, or find it in the cache."""
    import cupy

    from lesionsynth.cuda import compiling

    return compiling.compiled(program, kind, int(cupy.cuda.Device().compute_capability))


def loaded(program: str, kind: str) -> str:
    """Load a program, by now from the cache, and find all its kernels in it."""
    import cupy

    from lesionsynth.cuda.programs import kernels_of, source

    module = cupy.cuda.Module()
    module.load(compiled(program, kind))
    names = kernels_of(source(program, kind))
    for name in names:
        module.get_function(name)
    return f"{len(names)} kernels"


@cache
def slab() -> volumes.Volume:
    """Return a small slab."""
    return volumes.phantom(volumes.QUICK_SHAPE)


@cache
def expected() -> tuple[Any, Any, ls.LesionPair]:
    """Return a batch of eight on the host, and the CPU twin's pairs."""
    images, masks = (np.stack([array] * 8) for array in (slab().image, slab().mask))
    pair = synthesizer()(images, masks, index=indices(8, 0), lung_fraction=1.0)
    _ = pair.plan, pair.labels
    return images, masks, pair


class Batch:
    """A batch of eight on a backend of its own."""

    def __init__(self, *, plain: bool, graphs: bool) -> None:
        from lesionsynth.cuda.backend import CudaBackend

        self.synth = synthesizer(CudaBackend(plain=plain, graphs=graphs))

    def compare(self, number: int) -> str:
        """Render it, and hold it to the CPU twin."""
        import cupy

        images, masks, want = expected()
        pair = self.synth(cupy.asarray(images), cupy.asarray(masks), index=indices(8, 0), lung_fraction=1.0)
        differ = {
            part: int((cupy.asnumpy(getattr(pair, part)) != getattr(want, part)).sum())
            for part in ("target", "image", "labels")
        }
        differ["plans"] = int(pair.plan != want.plan)
        if any(differ.values()):
            raise AssertionError(f"batch {number} differs from the CPU twin's, voxels and plans: {differ}")
        return "equal to the CPU twin"


def through_torch(kind: str) -> str:
    """Render a torch tensor; the pair is torch's, and the CPU twin's, rounded to its type."""
    import torch

    image = torch.from_numpy(slab().image).to("cuda", getattr(torch, kind))
    mask = torch.from_numpy(slab().mask).cuda()
    pair = synthesizer()(image, mask, index=1, lung_fraction=1.0)
    want = synthesizer()(image.float().cpu().numpy(), slab().mask, index=1, lung_fraction=1.0)
    rounded = torch.from_numpy(want.image).to(image.dtype)
    if pair.image.dtype != image.dtype or not pair.image.is_cuda:
        raise AssertionError(f"the image came back as {pair.image.dtype} on {pair.image.device}")
    differ = int((pair.image.cpu() != rounded).sum())
    if differ or not torch.equal(pair.target.cpu(), torch.from_numpy(want.target)):
        raise AssertionError(f"the pair is not the CPU twin's: {differ} voxels of the image differ")
    return "equal to the CPU twin"


OPERATIONS: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "window_hu": lambda on: ls.window_hu(on((slab().image * 900 - 800).astype(np.int16))),
    "gaussian_filter": lambda on: ls.ops.gaussian_filter(on(slab().image), 3.0),
    "uniform_filter": lambda on: ls.ops.uniform_filter(on(slab().mask), 9),
    "label": lambda on: ls.ops.label(on(slab().vessels), connectivity=26),
    "grow": lambda on: ls.ops.grow(on(slab().vessels), on(slab().mask), iterations=5),
    "remove_erroneous_edges": lambda on: ls.remove_erroneous_edges(*map(on, slab().rimmed)),
}
"""Called with a function that moves an array to where the work is to be done."""


def same(run: Callable[[Callable[[Any], Any]], Any]) -> str:
    """Do an operation on the device and on the CPU, and compare all that it returns."""
    import cupy

    there, here = run(cupy.asarray), run(np.ascontiguousarray)
    pairs = zip(there, here, strict=True) if isinstance(here, tuple) else [(there, here)]
    differ = sum(int((cupy.asnumpy(a) != b).sum()) for a, b in pairs)
    if differ:
        raise AssertionError(f"{differ} voxels differ from the CPU's")
    return "equal to the CPU twin"


def philox() -> str:
    """Draw random numbers on the device, and compare."""
    import cupy

    there, here = (ls.ops.philox_uniform((5, 31, 65), 7, device=where) for where in ("cuda", "cpu"))
    if not np.array_equal(cupy.asnumpy(there), here):
        raise AssertionError("they are not the CPU's")
    return "equal to the CPU twin"


def trained(where: str) -> str:
    """Train a tiny network on the phantom for a few steps."""
    from normnet.config import ModelConfig, TrainConfig
    from normnet.train import train

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=ModelConfig(channels=(4, 8), strides=(2,), residual_units=1),
            output=Path(folder) / "run",
            iterations=4,
            batch_size=2,
            slab=8,
            crop=32,
            device=where,
            held_out=1,
            validate_every=2,
            validation_pairs=2,
            phantoms=1,
            phantom_shape=(16, 64, 80),
            phantom_spacing=(4.0, 5.0, 5.0),
        )
        result = train(config)
    if result.iterations != config.iterations:
        raise AssertionError(f"{result.iterations} of {config.iterations} steps were taken")
    return f"{result.iterations} steps in {result.seconds:.2f} s"


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
