"""Small inputs, and every command that writes as a call with a folder: what tests here share."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[Path], int]
SHAPE, SPACING = (16, 64, 80), (4.0, 5.0, 5.0)


class Study:
    """Inputs of every command below one folder, made once.

    Parameters
    ----------
    root : Path
        Empty folder, or that of an earlier one.
    """

    def __init__(self, root: Path) -> None:
        from normnet.config import ModelConfig, TrainConfig

        self.root, self.settings, self.maps = root, root / "settings.json", root / "maps"
        self.train_config = TrainConfig(
            model=ModelConfig(channels=(4, 8), strides=(2,), residual_units=1),
            iterations=2,
            batch_size=1,
            slab=8,
            crop=32,
            precision="fp32",
            device="cpu",
            threads=1,
            validate_every=1,
            validation_pairs=1,
            checkpoint_every=1,
            phantoms=1,
            phantom_shape=SHAPE,
            phantom_spacing=SPACING,
        )
        if not self.maps.exists():
            self._make()

    def _make(self) -> None:
        import SimpleITK
        import torch

        import lesionsynth as ls
        from normnet import predict
        from normnet.config import to_json
        from normnet.model import Model, build_unet

        root, config = self.root, self.train_config
        network = config.model
        for name in ("ct", "lung", "lesion"):
            (root / name).mkdir(parents=True)
        chest = ls.phantom.chest_ct(shape=SHAPE, spacing=SPACING, seed=3)
        ill = ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed=3)
        arrays = {"ct": ill.hu, "lung": chest.lung_mask, "lesion": ill.lesion_mask}
        for name, array in arrays.items():
            image = SimpleITK.GetImageFromArray(array if name == "ct" else array.astype(np.uint8))
            image.SetSpacing(SPACING[::-1])
            ending = "" if name == "ct" else f"_{name}"
            SimpleITK.WriteImage(image, str(root / name / f"p1{ending}.nii.gz"))
        for seed in (0, 1):
            torch.manual_seed(seed)
            Model(build_unet(network), network).save(root / "runs" / f"seed{seed}" / "model.safetensors")
        self.settings.write_text(to_json(config))
        changes = json.loads(to_json(config))
        for name in ("output", "resume", "seed", "lesions", "threshold_hu", "schedule"):
            changes.pop(name, None)
        (root / "ablate.json").write_text(json.dumps(changes))
        assert predict.main([*self._predict, "--output", str(self.maps)]) == 0

    @property
    def _predict(self) -> list[str]:
        inputs = [str(self.root / "ct/p1.nii.gz"), "--masks", str(self.root / "lung/p1_lung.nii.gz")]
        flags = ["--device", "cpu", "--threads", "1", "--settings.slab", "16", "--save-probability"]
        return [*inputs, "--models", str(self.root / "runs"), *flags]

    def calls(self) -> dict[str, Call]:
        """By name: each is given the folder to write into and returns the exit code."""
        from lesionsynth import cli
        from normnet import ablate, demo, evaluate, model, predict, report, train
        from normnet.baselines import __main__ as baselines
        from normnet.prepare import __main__ as prepare

        root = self.root
        ct, lung = str(root / "ct/p1.nii.gz"), str(root / "lung/p1_lung.nii.gz")
        scan = [ct, "--mask", lung, "--depth", "8", "--threads", "1"]
        small = [
            "--size",
            "32",
            "--channels",
            "4",
            "8",
            "--latent",
            "4",
            "--iterations",
            "2",
            "--threads",
            "1",
        ]
        small += ["--phantoms", "2", "--phantom-shape", *map(str, SHAPE), "--phantom-spacing"]
        small += [*map(str, SPACING), "--device", "cpu"]

        def synth(*more: str) -> Call:
            return lambda out: cli.main(["synth", *scan, "--output", str(out), *more])

        def replay(*more: str) -> Call:
            def call(out: Path) -> int:
                plan = root / "sample/p1_000000/plan.json"
                if not plan.exists():
                    assert cli.main(["synth", *scan, "--output", str(root / "sample")]) == 0
                return cli.main(["replay", str(plan), *scan, "--output", str(out), *more])

            return call

        def evaluated(out: Path) -> int:
            given = {
                "predictions": self.maps,
                "truth": root / "lesion",
                "ct": root / "ct",
                "masks": root / "lung",
            }
            flags = [word for name, path in given.items() for word in (f"--{name}", str(path))]
            return evaluate.main([*flags, "--output", str(out), "--pictures", "1"])

        def demonstrated(out: Path) -> int:
            config = demo.DemoConfig(
                output=out, minutes=1.0, patients=1, shape=SHAPE, train=replace(self.train_config, crop=32)
            )
            try:
                demo.run_demo(config)
            except ValueError:
                return 2
            return 0

        def ablated(out: Path) -> int:
            flags = ["--config", str(root / "ablate.json"), "--seeds", "1", "--rows", "covid_lung"]
            sizes = ["--phantom-patients", "1", "--phantom-shape", *map(str, SHAPE)]
            return ablate.main(["modules", "--output", str(out), *flags, *sizes])

        def reported(out: Path) -> int:
            try:
                return report.main([str(self.maps), "--output", str(out / "report.html"), "--pictures", "1"])
            except SystemExit as end:  # a folder in its place is a wrong flag
                return int(end.code or 0)

        def mapped(*more: str) -> Call:
            def call(out: Path) -> int:
                run = root / "baseline"
                if not run.exists():
                    assert baselines.main(["ae", "--output", str(run), *small]) == 0
                given = ["--masks", lung, "--threads", "1", "--device", "cpu"]
                return baselines.main(["predict", str(run), ct, *given, "--output", str(out), *more])

            return call

        def prepared(*more: str) -> Call:
            flags = ["--masks", lung, "--size", "96", "--spacing", "4", "5", "5"]
            return lambda out: prepare.main([ct, *flags, "--output", str(out), *more])

        return {
            "synth": synth(),
            "synth --overwrite": synth("--overwrite", "--format", "nifti"),
            "replay": replay(),
            "replay --overwrite": replay("--overwrite"),
            "preview": lambda out: cli.main(["preview", *scan, "--output", str(out / "preview.png")]),
            "prepare": prepared(),
            "prepare --overwrite": prepared("--overwrite"),
            "train": lambda out: train.main(["--config", str(self.settings), "--output", str(out)]),
            "train --resume": lambda out: train.main(
                ["--config", str(self.settings), "--output", str(out), "--resume"]
            ),
            "predict": lambda out: predict.main([*self._predict, "--output", str(out)]),
            "predict --overwrite": lambda out: predict.main(
                [*self._predict, "--output", str(out), "--overwrite", "--save-core"]
            ),
            "evaluate": evaluated,
            "report": reported,
            "export": lambda out: model.main([str(root / "runs"), "--output", str(out)]),
            "demo": demonstrated,
            "ablate": ablated,
            "baselines": lambda out: baselines.main(["ae", "--output", str(out), *small]),
            "baselines --overwrite": lambda out: baselines.main(
                ["ae", "--output", str(out), *small, "--overwrite"]
            ),
            "baselines predict": mapped(),
            "baselines predict --overwrite": mapped("--overwrite"),
        }


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything below a folder: bytes of files, targets of links, and which entries are folders."""
    found: dict[str, Any] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            key = str(path.relative_to(folder))
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[key] = ("link", os.readlink(path))
            elif stat.S_ISDIR(mode):
                found[key] = "folder"
            else:
                found[key] = path.read_bytes() if stat.S_ISREG(mode) else "special"
    return found


def hidden(folder: Path) -> list[str]:
    """Names of half-written files and folders below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*"))
