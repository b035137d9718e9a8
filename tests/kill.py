"""Kill a command at random points, again and again: nothing is corrupt, and all of it resumes.

``python -m tests.kill train|prepare|predict|... [--times 20] [--seed 0]``. A job is begun, killed (SIGKILL)
after a random time, checked, and begun again as a user would; when it comes to its end its result must be
that of a job that nobody disturbed, bit for bit, and the next one starts from nothing.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

import lesionsynth as ls
from normnet import predict, train
from normnet.config import ModelConfig, TrainConfig, to_json
from normnet.model import Model, build_unet, read_tensors
from normnet.prepare import __main__ as prepare
from normnet.prepare.store import Store
from tests import classical

NETWORK = ModelConfig(channels=(4, 8), strides=(2,), residual_units=1)


class Job(ABC):
    """A command that works in a folder, and what it leaves there.

    Parameters
    ----------
    inputs : Path
        Folder for what it reads.
    """

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs

    @abstractmethod
    def run(self, folder: Path) -> int:
        """Begin or go on, as a user would."""

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Raise where a file that has its final name is not whole."""

    @abstractmethod
    def result(self, folder: Path) -> Any:
        """What a finished job leaves, to compare."""


class Train(Job):
    """Training that saves its state every other step."""

    def __init__(self, inputs: Path) -> None:
        super().__init__(inputs)
        config = TrainConfig(
            model=NETWORK,
            iterations=24,
            batch_size=2,
            slab=8,
            crop=32,
            average=0.9,
            precision="fp32",
            device="cpu",
            threads=1,
            validate_every=5,
            validation_pairs=1,
            checkpoint_every=2,
            phantoms=1,
            phantom_shape=(16, 64, 80),
            phantom_spacing=(4.0, 5.0, 5.0),
            thick_slices=0.5,
        )
        self.settings = inputs / "settings.json"
        self.settings.write_text(to_json(config))

    def run(self, folder: Path) -> int:
        begun = ["--resume"] if (folder / "config.json").exists() else []
        return train.main(["--config", str(self.settings), "--output", str(folder), *begun])

    def check(self, folder: Path) -> None:
        for file in folder.glob("[!.]*.safetensors"):
            read_tensors(file)
        if (folder / "config.json").exists():
            json.loads((folder / "config.json").read_text())

    def result(self, folder: Path) -> Any:
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        # how long it took is not the same twice
        return (folder / "model.safetensors").read_bytes(), [
            [row[name] for name in ("iteration", "loss", "val_loss", "calibrated")] for row in rows
        ]


class Prepare(Job):
    """Two scans into a store."""

    def __init__(self, inputs: Path) -> None:
        super().__init__(inputs)
        self.files = [draw(inputs / f"scan{seed}.nii.gz", seed) for seed in (1, 2)]

    def run(self, folder: Path) -> int:
        size = ["--size", "128", "--spacing", "2", "3", "3"]
        return prepare.main([*map(str, self.files), "--output", str(folder), *size, *classical.FLAGS])

    def check(self, folder: Path) -> None:
        if (folder / "store.json").exists():
            store = Store.open(folder)
            for name in store.case_ids:
                store[name].slab(0, store[name].shape[0])

    def result(self, folder: Path) -> Any:
        store = Store.open(folder)
        whole = {name: store[name].slab(0, store[name].shape[0]) for name in store.case_ids}
        return [(name, *(a.tobytes() for a in whole[name]), store[name].meta) for name in sorted(whole)]


class Predict(Job):
    """Two scans segmented by two small networks."""

    def __init__(self, inputs: Path) -> None:
        super().__init__(inputs)
        import torch

        self.files = [draw(inputs / f"scan{seed}.nii.gz", seed) for seed in (3, 4)]
        for seed in (0, 1):
            torch.manual_seed(seed)
            Model(build_unet(NETWORK), NETWORK).save(inputs / f"m{seed}" / "model.safetensors")

    def run(self, folder: Path) -> int:
        models = [str(self.inputs / f"m{seed}") for seed in (0, 1)]
        flags = ["--models", *models, "--save-probability", "--device", "cpu", "--threads", "1"]
        return predict.main([*map(str, self.files), "--output", str(folder), *flags, *classical.FLAGS])

    def check(self, folder: Path) -> None:
        for file in folder.glob("[!.]*.json"):
            json.loads(file.read_text())
        for file in folder.glob("[!.]*.nii.gz"):
            volume(file)

    def result(self, folder: Path) -> Any:
        maps = {file.name: volume(file).tobytes() for file in sorted(folder.glob("[!.]*.nii.gz"))}
        return maps, (folder / "volumes.csv").read_text()


class Call(Job):
    """A command of `tests.hostile.commands`, and the files that are the same each time it ends."""

    name = ""
    same: tuple[str, ...] = ()

    def __init__(self, inputs: Path) -> None:
        super().__init__(inputs)
        from tests.hostile.commands import Study

        importlib.import_module("matplotlib.backends.backend_agg")  # here, not in every child
        made = os.fork()  # in a child: what is killed later must not inherit threads
        if not made:
            os._exit(Study(inputs / "study") is None)
        assert os.waitstatus_to_exitcode(os.waitpid(made, 0)[1]) == 0
        self.call = Study(inputs / "study").calls()[self.name]

    def run(self, folder: Path) -> int:
        return self.call(folder)

    def check(self, folder: Path) -> None:
        for file in folder.rglob("[!.]*"):
            if any(part[0] == "." for part in file.relative_to(folder).parts) or not file.is_file():
                continue
            if file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".safetensors":
                read_tensors(file)
            elif file.suffix == ".html":
                assert file.read_text().endswith("</html>")
            elif file.suffix == ".npz":
                assert np.load(file)["labels"].size
            elif file.suffix == ".gz":
                volume(file)
            elif file.suffix == ".png":
                assert file.read_bytes().endswith(b"IEND\xaeB`\x82")

    def result(self, folder: Path) -> Any:
        return [(name, (folder / name).read_bytes()) for name in self.same]


def call_of(name: str, *same: str) -> type[Job]:
    """Make the job of a command."""
    return type("Call", (Call,), {"name": name, "same": same})


SAMPLE = ("plan.json", "record.json")
JOBS: dict[str, type[Job]] = {
    "train": Train,
    "prepare": Prepare,
    "predict": Predict,
    "synth": call_of("synth --overwrite", *(f"p1_000000/{name}" for name in (*SAMPLE, "image.nii.gz"))),
    "replay": call_of("replay --overwrite", *SAMPLE, "pair.npz"),
    "preview": call_of("preview"),
    "evaluate": call_of("evaluate", "cases.csv", "tables.md", "results.json", "report.html"),
    "report": call_of("report", "report.html"),
    "export": call_of("export", "model-0.safetensors", "model-1.safetensors", "export.json"),
    "demo": call_of("demo", "run/model.safetensors", "cases.csv"),
    "ablate": call_of("ablate", "table.csv"),
    "baselines": call_of("baselines --overwrite", "baseline.safetensors", "config.json"),
    "baselines predict": call_of("baselines predict", "p1_lesions.nii.gz", "volumes.csv"),
}


def storm(job: Job, work: Path, times: int, seed: int) -> tuple[int, int]:
    """Kill a job `times` times.

    Returns
    -------
    kills, ends : int
        How often it was killed, and how often it then came to its end.

    Raises
    ------
    AssertionError
        An end differs from that of an undisturbed job, or a job fails.
    """
    folder = work / "job"  # always this one: some results tell where they were written
    begin = time.perf_counter()
    assert finish(start(job, folder), 300.0) == 0, "the undisturbed job failed"
    duration = time.perf_counter() - begin
    expected = job.result(folder)
    shutil.rmtree(folder)
    dice = random.Random(seed)
    kills = ends = 0
    while kills < times or not ends:
        process = start(job, folder)
        # towards the end nobody kills: one job at least must reach it
        status = finish(process, dice.uniform(0.0, 1.4 * duration) if kills < times else 300.0)
        if status is None:
            kills += 1
            job.check(folder)
            continue
        assert status == 0, f"after {kills} kills the job failed with status {status}"
        assert job.result(folder) == expected, f"after {kills} kills the result differs"
        assert not [p for p in folder.rglob(".*")], "temporary files stay behind"
        shutil.rmtree(folder)
        ends += 1
    return kills, ends


def start(job: Job, folder: Path) -> int:
    """Run the job in a child that has everything imported; return its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        code = job.run(folder)
    finally:
        os._exit(code)


def finish(pid: int, seconds: float) -> int | None:
    """Wait for a child and return its exit status; kill it after so many seconds and return None."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def draw(path: Path, seed: int) -> Path:
    """Write a phantom with pneumonia as NIfTI."""
    import SimpleITK

    chest = ls.phantom.chest_ct(shape=(24, 96, 120), spacing=(5.0, 3.0, 3.0), seed=seed)
    ill = ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed=seed)
    image = SimpleITK.GetImageFromArray(ill.hu)
    image.SetSpacing(chest.spacing[::-1])
    SimpleITK.WriteImage(image, str(path))
    return path


def volume(file: Path) -> Any:
    """Voxels of a NIfTI file."""
    import SimpleITK

    return np.ascontiguousarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file))))


def main() -> int:
    """Run the storm; 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=list(JOBS))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "inputs").mkdir()
        kills, ends = storm(JOBS[args.job](work / "inputs"), work, args.times, args.seed)
    print(f"{args.job}: killed {kills} times, came to its end {ends} times, each as if undisturbed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
