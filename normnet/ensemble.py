"""Several networks that differ by their seed and vote (PAPER.md III-A, IV-B.3)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from normnet.config import TrainConfig
from normnet.device import available_cores, choose_device
from normnet.train import CONFIG, TrainResult, train
from normnet.workers import SLOT, Died, run_parallel


def train_ensemble(
    config: TrainConfig, members: int = 5, devices: Sequence[str] = (), *, progress_bar: bool = False
) -> list[TrainResult]:
    """Train several seeds.

    Parameters
    ----------
    config : TrainConfig
        Settings of the first member; member k has seed ``config.seed + k`` and the folder
        ``config.output / "seed<seed>"``. With `resume` finished members are kept, begun ones continued and
        missing ones begun.
    members : int
        How many; the paper votes with 5.
    devices : sequence of str, optional
        Spread over these, a process each; one may occur twice. One after another, in this process and on
        ``config.device``, where omitted.
    progress_bar : bool
        Show one on standard error, for members that train one after another.

    Returns
    -------
    list of TrainResult
        By seed; ``normnet.predict --models <output>`` lets them vote.

    Raises
    ------
    ValueError
        `members` is below 1, a device is not there, or a member is refused as by `normnet.train.train`.
    FloatingPointError
        A member's loss became NaN or infinite; the others are kept.
    OSError
        A member's process was killed; the others are kept.
    """
    if members < 1:
        raise ValueError(f"members must be >= 1, got {members}")
    if "WORLD_SIZE" in os.environ and devices:
        raise ValueError("devices: a launcher has shared the devices out already; leave it out")
    for device in devices:
        choose_device(device)
    configs = [_member(config, config.seed + k) for k in range(members)]
    for member in configs:  # before the first one trains for hours
        if not member.resume and (member.output / CONFIG).exists():
            raise ValueError(
                f"output: {member.output} already holds a run; resume it, or name another folder"
            )
    if not devices:
        return [train(member, progress_bar=progress_bar) for member in configs]
    cpus = sum(device.startswith("cpu") for device in devices)
    if config.threads is None and cpus:
        share = max(1, available_cores() // cpus)
        configs = [replace(member, threads=share) for member in configs]
    results: dict[int, TrainResult | Exception] = {}
    # fresh processes: CUDA does not survive a fork
    for index, found in run_parallel(partial(_train, tuple(devices)), configs, min(len(devices), members)):
        died = ChildProcessError(f"{configs[index].output}: {found}")
        results[index] = died if isinstance(found, Died) else found
    trained = [results[index] for index in range(members)]
    for result in trained:  # the others have come to their ends
        if isinstance(result, Exception):
            raise result
    return [result for result in trained if not isinstance(result, Exception)]


def _member(config: TrainConfig, seed: int) -> TrainConfig:
    output = config.output / f"seed{seed}"
    begun = (output / CONFIG).exists()
    return replace(config, seed=seed, output=output, resume=config.resume and begun)


def _train(devices: Sequence[str], config: TrainConfig) -> TrainResult | Exception:
    """Train in a worker, on its device."""
    try:
        return train(replace(config, device=devices[int(os.environ[SLOT])]))
    except Exception as error:  # the other members go on
        return error
