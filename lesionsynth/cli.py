"""Command line: ``python -m lesionsynth preview | synth | replay | info``.

Exit codes: 0 done; 1 a replay that differs from its record, or a lack of memory; 2 bad input; 130
interrupted. What is not 0 comes with one line on stderr.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

import lesionsynth
from lesionsynth import presets
from lesionsynth._cache import kernel_folder
from lesionsynth._cases import Case, load_case
from lesionsynth._samples import check_output, checksums, read_plan, read_record, write_sample
from lesionsynth.commands import plainly, printable, run
from lesionsynth.config import LesionConfig
from lesionsynth.cpu.engine.threads import check_threads, default_threads
from lesionsynth.plan import check_lung_fraction, check_word
from lesionsynth.preview import check_output as check_picture
from lesionsynth.preview import save_preview
from lesionsynth.sampling import WORD
from lesionsynth.strict import check_integer, name_of, shown
from lesionsynth.synthesizer import LesionPair, LesionSynthesizer
from lesionsynth.window import window_hu

DIFFERS = 1
COMMANDS = ("preview", "synth", "replay", "info")
MOST_SAMPLES = 10**6
"""Folders that one call writes."""
MOST_SAID = 400
"""Characters of what a wrong option is told with."""
MOST_ROWS = 100
"""Of a picture, whose sides have fewer than 2**16 pixels."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process where omitted.

    Returns
    -------
    int
        Exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    command = next((f" {word}" for word in given if word in COMMANDS), "")

    def body() -> int:
        arguments = build_parser().parse_args(given)
        with plainly():
            code: int = arguments.run(arguments)
        return code

    return run(f"lesionsynth{command}: error", body)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="lesionsynth", description="Synthetic lesions for label-free lesion segmentation in lung CT."
    )
    parser.add_argument("--version", action="version", version=f"lesionsynth {lesionsynth.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_preview(commands)
    _add_synth(commands)
    _add_replay(commands)
    info = commands.add_parser("info", help="versions, backends, threads and caches")
    info.set_defaults(run=_info)
    return parser


def _add_preview(commands: Any) -> None:
    parser = commands.add_parser(
        "preview",
        help="picture of a training pair",
        description="PNG with a row per slice: input, with lesions, target, labels.",
        formatter_class=_Formatter,
    )
    _add_input(parser)
    _add_generator(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("preview.png"), metavar="PNG", help="picture to write"
    )
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="slices shown")
    parser.set_defaults(run=_preview)


def _add_synth(commands: Any) -> None:
    parser = commands.add_parser(
        "synth",
        help="write training pairs",
        description="Write a folder per sample with image, target and labels, plan.json and record.json.",
        formatter_class=_Formatter,
    )
    _add_input(parser)
    _add_generator(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the samples")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="samples, from --index on")
    _add_format(parser)
    parser.set_defaults(run=_synth)


def _add_replay(commands: Any) -> None:
    parser = commands.add_parser(
        "replay",
        help="render a saved plan again",
        description=(
            "Render plan.json again and compare with the checksums of the record.json beside it. The slab is "
            "that of the record, where there is one. Exit code 1 where a checksum differs."
        ),
        formatter_class=_Formatter,
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.json", help="plan written by synth, or edited")
    _add_input(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the pair; not written if omitted"
    )
    _add_format(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; all cores if omitted")
    parser.set_defaults(run=_replay)


class _Parser(argparse.ArgumentParser):
    """Shows the ends of a value that is long."""

    def error(self, message: str) -> NoReturn:
        said = printable(message)
        half = MOST_SAID // 2
        super().error(said if len(said) <= MOST_SAID else f"{said[:half]}...{said[-half:]}")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends "(default: ...)" only where a default says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        nargs="?",
        metavar="INPUT",
        help="NIfTI, NRRD, MetaImage or DICOM folder; the phantom if omitted",
    )
    parser.add_argument("--mask", metavar="FILE", help="lung mask on the grid of INPUT; needed with INPUT")
    parser.add_argument(
        "--slice", type=int, metavar="Z", help="middle slice, 0 at the feet; most lung if omitted"
    )
    parser.add_argument("--depth", type=int, default=32, metavar="N", help="slices of the slab; 0 for all")
    parser.add_argument("--phantom-seed", type=int, default=0, metavar="N", help="phantom used without INPUT")


def _add_generator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--index", type=int, default=0, metavar="N", help="sample; seed and index name the lesions"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the generator")
    parser.add_argument("--preset", choices=_presets_of_ct(), default="covid_lung", help="kind of lesions")
    parser.add_argument(
        "--lengths", choices=("mm", "voxel"), default="mm", help="unit of the preset's radii (paper: voxel)"
    )
    parser.add_argument(
        "--lung-fraction",
        type=float,
        metavar="F",
        help="this lung over the data set's largest; default: over the paper's",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; all cores if omitted")


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("npz", "nifti"), default="npz", help="pair.npz, or three .nii.gz"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace folders that exist")


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of their domains before anything is read or made."""
    if arguments.phantom_seed >= WORD:
        raise ValueError(f"--phantom-seed must be below 2**32, got {shown(arguments.phantom_seed)}")
    if arguments.depth < 0:
        raise ValueError(f"--depth must be >= 0, got {shown(arguments.depth)}")
    check_threads(arguments.threads)


def _check_sample(arguments: argparse.Namespace, count: int = 1) -> None:
    """Refuse what no sample is drawn with."""
    _check(arguments)
    check_word("seed", arguments.seed)
    check_word("index", arguments.index)
    _check_count("--count", count, MOST_SAMPLES)
    check_word("index of the last sample", arguments.index + count - 1)
    if arguments.lung_fraction is not None:
        check_lung_fraction(arguments.lung_fraction)


def _check_count(name: str, count: int, most: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be >= 1, got {shown(count)}")
    check_integer(name, count, 1, most)


def _preview(arguments: argparse.Namespace) -> int:
    _check_sample(arguments)
    _check_count("--rows", arguments.rows, MOST_ROWS)
    check_picture(arguments.output)
    synth, case = _synthesizer(arguments), _case(arguments)
    healthy = _healthy(case, synth.config.hu_range)
    pair = _sample(synth, case, healthy, arguments.index, arguments.lung_fraction)
    title = (
        f"{case.name}, slices {case.slab[0]}-{case.slab[1] - 1}, {arguments.preset}, seed {arguments.seed}, "
    )
    save_preview(
        arguments.output,
        case.hu,
        case.lung_mask,
        healthy,
        pair,
        spacing=case.spacing,
        first_slice=case.slab[0],
        rows=arguments.rows,
        title=f"{title}index {arguments.index}",
    )
    print(
        f"{name_of(arguments.output)}: {int(pair.labels.max())} lesions in slices {case.slab[0]} to "
        f"{case.slab[1] - 1}"
    )
    return 0


def _synth(arguments: argparse.Namespace) -> int:
    _check_sample(arguments, arguments.count)
    synth, case = _synthesizer(arguments), _case(arguments)
    healthy = _healthy(case, synth.config.hu_range)
    settings = {
        "preset": arguments.preset,
        "lengths": arguments.lengths,
        "hu_range": list(synth.config.hu_range),
    }
    last = arguments.index + arguments.count
    folders = {n: arguments.output / f"{case.name}_{n:06d}" for n in range(arguments.index, last)}
    for folder in folders.values():  # before any is written
        check_output(folder, overwrite=arguments.overwrite, inputs=(arguments.input, arguments.mask))
    for index, folder in folders.items():
        pair = _sample(synth, case, healthy, index, arguments.lung_fraction)
        write_sample(
            folder, case, pair, file_format=arguments.format, settings=settings, overwrite=arguments.overwrite
        )
        print(f"{name_of(folder)}: {int(pair.labels.max())} lesions, {(pair.labels > 0).sum()} voxels")
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    _check(arguments)
    if arguments.output is not None:
        inputs = (arguments.plan, arguments.input, arguments.mask)
        check_output(arguments.output, overwrite=arguments.overwrite, inputs=inputs)
    plan = read_plan(arguments.plan)
    beside = arguments.plan.parent / "record.json"
    record = read_record(beside) if beside.exists() else {}
    slab = None
    if "slab" in record and arguments.slice is None:
        slab = (int(record["slab"][0]), int(record["slab"][1]))
    if arguments.input is None and "input" in record.get("source", {}):
        drawn_on = record["source"]["input"]
        raise ValueError(f"{arguments.plan} was drawn on {name_of(drawn_on)}: give it as INPUT, with --mask")
    if arguments.input is None:
        arguments.phantom_seed = record.get("source", {}).get("phantom_seed", arguments.phantom_seed)
    case = _case(arguments, slab)
    low, high = record.get("hu_range", LesionConfig().hu_range)
    synth = LesionSynthesizer(LesionConfig(), threads=arguments.threads)
    pair = synth.render(plan, _healthy(case, (low, high)), case.lung_mask)
    if arguments.output is not None:
        settings = {key: record[key] for key in ("preset", "lengths") if key in record} | {
            "hu_range": [low, high]
        }
        write_sample(
            arguments.output,
            case,
            pair,
            file_format=arguments.format,
            settings=settings,
            overwrite=arguments.overwrite,
        )
    return _compare(record.get("checksums"), checksums(case, pair))


def _compare(stored: dict[str, str] | None, found: dict[str, str]) -> int:
    """Say which checksums agree."""
    if not stored:
        print("no record.json beside the plan: nothing to compare with")
        return 0
    different = [name for name, value in found.items() if stored.get(name) != value]
    if different:
        print(f"differs from the record: {', '.join(different)}")
        return DIFFERS
    print(f"agrees with the record: {', '.join(found)}")
    return 0


def _case(arguments: argparse.Namespace, slab: tuple[int, int] | None = None) -> Case:
    return load_case(
        arguments.input,
        arguments.mask,
        phantom_seed=arguments.phantom_seed,
        slab=slab,
        middle=arguments.slice,
        depth=arguments.depth,
    )


def _synthesizer(arguments: argparse.Namespace) -> LesionSynthesizer:
    config = replace(presets.get(arguments.preset), lengths=arguments.lengths)
    return LesionSynthesizer(config, seed=arguments.seed, threads=arguments.threads)


def _healthy(case: Case, hu_range: tuple[float, float]) -> npt.NDArray[np.float32]:
    """H = H' M."""
    out: npt.NDArray[np.float32] = window_hu(case.hu, hu_range) * case.lung_mask
    return out


def _presets_of_ct() -> list[str]:
    """Presets whose images are HU, which is what commands read."""
    return sorted(name for name, preset in presets.BY_NAME.items() if preset().value_range is None)


def _sample(
    synth: LesionSynthesizer,
    case: Case,
    healthy: npt.NDArray[np.float32],
    index: int,
    lung_fraction: float | None,
) -> LesionPair:
    return synth(healthy, case.lung_mask, index=index, lung_fraction=lung_fraction, spacing=case.spacing)


def _info(arguments: argparse.Namespace) -> int:
    print(f"lesionsynth  {lesionsynth.__version__} in {Path(lesionsynth.__file__).parent}")
    print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("numpy", "scipy", "numba", "SimpleITK", "nibabel", "matplotlib", "cupy"):
        print(f"{name:<12} {_version(name)}")
    print(f"cpu          Numba kernels, {default_threads()} threads of {os.cpu_count()} cores")
    print(f"kernel cache {_kernel_cache()}")
    print(f"cuda         {_cuda()}")
    print(f"presets      {', '.join(presets.BY_NAME)}")
    return 0


def _version(name: str) -> str:
    """Return a distribution's version without importing it."""
    names = [name] if name != "cupy" else ["cupy-cuda13x", "cupy-cuda12x", "cupy"]
    for candidate in names:
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed" + (
        " (pip install 'lesionsynth[io]')" if name in ("SimpleITK", "nibabel", "matplotlib") else ""
    )


def _kernel_cache() -> str:
    """Say where compiled kernels are kept."""
    try:
        return f"{kernel_folder()} (LESIONSYNTH_CACHE_DIR moves it)"
    except OSError as error:
        return f"none, every process compiles: {error} (LESIONSYNTH_CACHE_DIR names a folder)"


def _cuda() -> str:
    """Say whether arrays on a GPU can be used; nothing is initialised before this is asked."""
    if importlib.util.find_spec("lesionsynth.cuda") is None:
        return "no CUDA backend in this version"
    if importlib.util.find_spec("cupy") is None:
        return "not usable: CuPy is not installed (pip install 'lesionsynth[cuda13]')"
    cupy = importlib.import_module("cupy")
    return "usable" if cupy.is_available() else "not usable: no driver or no device"
