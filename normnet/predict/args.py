"""Segment patients: ``python -m normnet.predict IN... --output OUT`` (PAPER.md III-A, III-D).

Each model calls a bright voxel healthy where its probability exceeds a threshold, 0.95 in the paper; the
majority of the models decides. What is bright and not healthy becomes a lesion in post-processing. Results
are written on the input's own grid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lesionsynth.strict import name_of, read_json, shown
from normnet.config import PredictConfig
from normnet.prepare.case import LungMethod
from normnet.settings import from_record


@dataclass(frozen=True, kw_only=True)
class PredictArgs:
    """Segment CT volumes with trained models.

    Exit status: 0 when every case is done, 1 when some failed or a file that was named was passed over (the
    others are written), 2 for a wrong call. A call that was interrupted goes on where it stopped when it is
    given again.
    """

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """NIfTI, NRRD or MetaImage files, DICOM folders, and folders of these."""
    output: Path = Path("predictions")
    """Folder for <case>_lesions.nii.gz, <case>_lung.nii.gz, <case>.json and volumes.csv; where thresholds
    find other lungs than the network, also <case>_classical.nii.gz, theirs."""
    models: tuple[Path, ...] = ()
    """Run folders or weights files; several vote. Those that ship with the package where omitted."""
    series: str = "largest"
    """DICOM series to read: the "largest" of a folder, "all", or a SeriesInstanceUID."""
    name: tuple[str, ...] = ()
    """Case names, one per CT; file names where omitted."""
    masks: Path | None = None
    """Lung mask of a single CT, or folder with a <case>_lung file per case; segmented where omitted."""
    label: tuple[int, ...] = ()
    """Labels of the masks that are lung; all above zero where omitted."""
    lungs: LungMethod = "network"
    """How lungs are segmented: network, that of this package; classical, thresholds and morphology; lungmask,
    the network of that package, if installed; or weights of your own (normnet.train --task lungs)."""
    save_probability: bool = False
    """Also write <case>_probability.nii.gz, the mean healthy probability, 0 outside the lung, and
    <case>_healthy.nii.gz, the bright voxels that the models' vote calls healthy: what Table II needs."""
    save_core: bool = False
    """Also write <case>_core.nii.gz: the lesions before region growing."""
    dicom_seg: bool = False
    """Also write <case>_lesions.dcm, a DICOM Segmentation of lungs and lesions; for DICOM input. A case whose
    headers do not allow one fails, but has its other files."""
    overwrite: bool = False
    """Replace results of other settings, models, CTs or methods. Files that no call wrote stay."""
    config: Path | None = None
    """Settings as JSON: a PredictConfig, or the settings.json or <case>.json of an earlier call. Flags
    override them."""
    device: str = "auto"
    """"auto" takes CUDA where there is some, else the CPU."""
    threads: int | None = None
    """CPU threads; all cores where omitted."""
    settings: PredictConfig = field(default_factory=PredictConfig)
    """Thresholds and post-processing; the paper's. In Python, `config` is not read: pass these."""


def parse(argv: Sequence[str] | None) -> PredictArgs:
    """Read the command line; the settings of --config are the defaults of the flags."""
    given = sys.argv[1:] if argv is None else argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(given)[0].config
    default = PredictArgs(
        inputs=tyro.MISSING, settings=PredictConfig() if path is None else read_config(path)
    )
    return tyro.cli(PredictArgs, args=given, default=default, prog="normnet.predict", description=__doc__)


def read_config(path: Path) -> PredictConfig:
    """Read a PredictConfig: its JSON, or a JSON with the entry "settings", as a call writes.

    Raises
    ------
    ValueError
        The file is not readable or holds something else.
    """
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"config must be a JSON file with settings, got {name_of(path)}: {error}") from error
    if isinstance(record, dict) and "settings" in record:
        if not isinstance(models := record.get("models", []), list):
            raise ValueError(f"{name_of(path)}: models must be a list, got {shown(models)}")
        record = record["settings"]
    try:
        return from_record(PredictConfig, record)
    except ValueError as error:
        raise ValueError(f"{name_of(path)}: {error}") from error
