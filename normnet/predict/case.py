"""Segment a CT file: maps on its own grid, and volumes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lesionsynth.io import Scan
from normnet.config import PredictConfig
from normnet.model import Model
from normnet.postprocess import Mask
from normnet.predict.volume import predict_volume
from normnet.prepare import load_case
from normnet.prepare.case import LungMethod
from normnet.records import volumes_of


@dataclass(frozen=True, eq=False)
class CasePrediction:
    """What `predict_case` found, on the CT's own grid (z, y, x)."""

    lesions: Mask
    """Final lesions."""
    core: Mask
    """Before region growing."""
    lung: Mask
    """The lungs that were searched."""
    classical: Mask | None
    """The lungs by thresholds, where these and the lung network disagree; else None."""
    probability: npt.NDArray[np.float32] | None
    """Mean healthy probability, 0 outside the lung. None where it was not asked for."""
    healthy: Mask | None
    """Bright lung voxels that the majority of the models calls healthy; the mean cannot tell (Table II). None
    where the probability was not asked for."""
    volumes: dict[str, float | None]
    """Lungs and lesions in ml and percent, see `normnet.records.volumes_of`."""
    inflation: float
    """What HU in the lungs were multiplied with, see `normnet.inflation`."""
    ct: Scan
    """The CT; ``ct.write_like(lesions, "lesions.nii.gz")`` writes a map."""


def predict_case(
    path: str | os.PathLike[str],
    models: Sequence[Model],
    config: PredictConfig | None = None,
    *,
    mask_path: str | os.PathLike[str] | None = None,
    label: Sequence[int] = (),
    series: str | None = None,
    lungs: LungMethod = "network",
    device: str = "auto",
    keep_probability: bool = True,
) -> CasePrediction:
    """Segment one CT file or DICOM folder.

    Parameters
    ----------
    path : path
        What `lesionsynth.io.read_ct` reads.
    models : sequence of Model
        They are moved to `device`.
    config : PredictConfig, optional
        The paper's where omitted.
    mask_path : path, optional
        Lung mask on the CT's grid; the lungs are segmented where it is omitted.
    label : sequence of int
        Labels of the mask that are lung; all above zero where omitted.
    series : str, optional
        SeriesInstanceUID, in a DICOM folder with several.
    lungs : str
        How lungs are segmented, see `normnet.prepare.load_case`.
    device : str
        As in `predict_volume`.
    keep_probability : bool
        Also return the mean probability and the voxels called healthy.

    Returns
    -------
    CasePrediction

    Raises
    ------
    FileNotFoundError, ValueError
        As `normnet.prepare.load_case` and `predict_volume`.
    """
    loaded = load_case(path, mask_path, series=series, lungs=lungs, label=label)
    native, lung = loaded.to_native, loaded.native_mask
    found = predict_volume(
        loaded.hu,
        loaded.mask,
        models,
        config or PredictConfig(),
        device=device,
        keep_probability=keep_probability,
    )
    masks = {"lesions": found.lesions, "core": found.lesions_without_growing}
    if keep_probability:
        masks["healthy"] = found.healthy
    chances, inflation = found.probability, found.inflation
    # each map of the working grid is let go once it lies on the CT's: both together would be the peak
    del found
    on_ct: dict[str, Mask] = {}
    for name in tuple(masks):
        on_ct[name] = native(masks.pop(name))
        on_ct[name] &= lung
    volumes = volumes_of(on_ct["lesions"], lung, loaded.volume.spacing, loaded.native_sides)
    probability = None
    if chances is not None:
        probability = native(chances)
        probability[~lung] = 0
    return CasePrediction(
        on_ct["lesions"],
        on_ct["core"],
        lung,
        loaded.native_classical if loaded.apart else None,
        probability,
        on_ct.get("healthy"),
        volumes,
        inflation,
        loaded.volume,
    )
