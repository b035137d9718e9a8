"""A pneumonia that owes nothing to the lesion generator: fields of distance to the pleura, not blobs.

Air in the lungs is replaced by fluid: at a share f of filling a voxel of H becomes H + f (FLUID - H).
Vessels, fluid already, keep their value and show through the haze. f is built from a soft threshold of a
score that is high near the pleura, at the back and at the base, with a random field for irregular margins
(ground glass), from the score's peaks (consolidation) and from the zero surfaces of a finer random field
(reticulation).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lesionsynth.phantom.checks import check_number, check_seed, check_spacing
from lesionsynth.phantom.noise import Field, SmoothField

FLUID = 40.0
"""HU of a lung without air."""
TYPICAL = -850.0
"""HU of healthy parenchyma, by which visibility is judged."""
VISIBLE = 100.0
"""HU added to typical parenchyma from which on a voxel counts as lesion."""


class Pneumonia(NamedTuple):
    """A chest with pneumonia."""

    hu: npt.NDArray[np.int16]
    """(Z, Y, X) int16, Hounsfield units; nowhere below the healthy chest's."""
    lesion_mask: npt.NDArray[np.bool_]
    """(Z, Y, X) bool: where parenchyma of -850 HU would gain more than 100 HU; vessels inside included."""


def add_pneumonia(
    hu: npt.NDArray[Any],
    lung_mask: npt.NDArray[Any],
    spacing: tuple[float, float, float],
    seed: int = 0,
    *,
    severity: float = 0.15,
) -> Pneumonia:
    """Add ground glass, consolidation and reticulation to a healthy chest CT.

    Parameters
    ----------
    hu : (Z, Y, X) integer or float array
        Hounsfield units. Never modified.
    lung_mask : (Z, Y, X) bool array
        Both lungs.
    spacing : (3,) floats
        Voxel size (z, y, x) in mm.
    seed : int
        At least 0; each seed is another disease.
    severity : float
        Share of the masked lung that becomes lesion, in (0, 0.9]; kept to a few hundredths of it.

    Returns
    -------
    Pneumonia
        Density is only ever added, and only inside `lung_mask`.

    Raises
    ------
    TypeError, ValueError
        Wrong rank or dtype, shapes that differ, an empty or non-binary mask, HU not finite, spacing <= 0, a
        negative seed, `severity` out of range.

    Notes
    -----
    Lengths are relative to the lung: the haze's depth is a share of the largest distance to the pleura, so
    that a chest shrunk to a small field of view gets lesions to match.
    """
    voxel = check_spacing(spacing)
    check_seed(seed)
    mask = _check_volumes(hu, lung_mask)
    severity = check_number("severity", severity, math.ulp(0.0), 0.9, "in (0, 0.9]")
    rng = np.random.Generator(np.random.PCG64(seed))
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    healthy = np.asarray(hu[box], np.float32)
    share = _filling(healthy, mask[box], voxel, rng, severity)
    out = np.array(hu)
    added = share * np.maximum(FLUID - healthy, 0)
    out = np.clip(np.rint(out), -32768, 32767).astype(np.int16)
    out[box] += np.rint(added).astype(np.int16)
    lesion = np.zeros(mask.shape, np.bool_)
    lesion[box] = np.rint(share * (FLUID - TYPICAL)) > VISIBLE
    return Pneumonia(out, lesion)


def _check_volumes(hu: Any, lung_mask: Any) -> npt.NDArray[np.bool_]:
    for name, array in (("hu", hu), ("lung_mask", lung_mask)):
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
        if array.ndim != 3:
            raise ValueError(f"{name} must be (z, y, x), got shape {array.shape}")
    if hu.shape != lung_mask.shape:
        raise ValueError(f"lung_mask must have the shape of hu, got {lung_mask.shape} and {hu.shape}")
    if hu.dtype.kind not in "iuf":
        raise TypeError(f"hu must be integers or floats, got {hu.dtype}")
    if hu.dtype.kind == "f" and not np.isfinite(hu).all():
        raise ValueError("hu must be finite, found NaN or infinity")
    if lung_mask.dtype != np.bool_ and not np.isin(lung_mask, (0, 1)).all():
        raise ValueError("lung_mask must be binary (bool, or 0 and 1)")
    mask: npt.NDArray[np.bool_] = lung_mask.astype(np.bool_)
    if not mask.any():
        raise ValueError("lung_mask must not be empty")
    return mask


class _Fields(NamedTuple):
    """Random fields of a disease, evaluated on the volume; about unit variance."""

    patches: Field
    """Which regions are ill."""
    margins: Field
    """Irregular edges."""
    cores: Field
    """Where haze becomes consolidation."""
    septa: Field
    """Its zero surfaces are the lines of the reticulation."""


def _fields(
    shape: tuple[int, ...], spacing: tuple[float, float, float], unit: float, rng: np.random.Generator
) -> _Fields:
    """Draw the fields with lengths in units of the lung's depth."""
    axes = [np.arange(n) * step for n, step in zip(shape, spacing, strict=True)]
    high = tuple(float(a[-1]) + 1e-3 for a in axes)
    out = []
    for pitch in (0.75, 0.22, 0.40, 0.075):
        field = SmoothField(rng, (0.0, 0.0, 0.0), (high[0], high[1], high[2]), pitch * unit)
        out.append(np.stack([field.plane(float(z), axes[1], axes[2]) for z in axes[0]]))
    return _Fields(*out)


def _filling(
    healthy: Field,
    mask: npt.NDArray[np.bool_],
    spacing: tuple[float, float, float],
    rng: np.random.Generator,
    severity: float,
) -> Field:
    """Share of the air that is replaced, 0 outside the mask."""
    to_pleura = ndimage.distance_transform_edt(np.pad(mask, ((0, 0), (1, 1), (1, 1))), sampling=spacing)
    depth = np.asarray(to_pleura[:, 1:-1, 1:-1], np.float32)
    # no less than a twentieth of the box: the fields' lattices stay small for masks as thin as a shell
    extent = max(n * step for n, step in zip(mask.shape, spacing, strict=True))
    unit = max(float(np.percentile(depth[mask], 99.5)), 0.05 * extent)
    fields = _fields(mask.shape, spacing, unit, rng)
    score = _score(mask, depth / unit, fields, rng)
    cut = float(np.quantile(score[mask], 1 - severity))
    softness = rng.uniform(0.10, 0.18)
    rise = score - cut
    haze_level = rng.uniform(0.26, 0.46)
    # 0.115 of filling is the visible limit; the logistic passes it at the cut
    haze = haze_level / (1 + np.exp(-rise / softness) * (haze_level / 0.115 - 1))
    haze = np.where(haze > 0.02, haze, 0)
    haze = haze * (1 + 0.12 * fields.margins)
    peak = rise + 0.5 * fields.cores + 0.15 * fields.margins - rng.uniform(0.7, 1.3)
    dense = rng.uniform(0.75, 0.95) / (1 + np.exp(-peak / 0.2))
    dense *= np.clip(rise / softness, 0, 1) * (1 - 0.04 * np.abs(fields.septa))
    lines = (
        0.22 * rng.uniform(0.2, 1.0) * np.exp(-((fields.septa / 0.22) ** 2)) * np.clip(rise / softness, 0, 1)
    )
    # bronchi stay open: what is much darker than parenchyma is not filled
    open_air = np.clip((healthy + 960) / 50, 0.15, 1) if rng.random() < 0.7 else 1.0
    share = np.maximum(np.clip(haze, 0, 0.6) + lines, dense * open_air)
    return np.asarray(np.clip(share, 0, 0.97) * mask, np.float32)


def _score(
    mask: npt.NDArray[np.bool_], depth: Field, fields: _Fields, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """How likely a voxel is ill: peripheral, to the back, to the base, and by chance."""
    z, y, x = (
        np.linspace(-1, 1, n, dtype=np.float32).reshape([-1 if i == k else 1 for i in range(3)])
        for k, n in enumerate(mask.shape)
    )
    back, base, outer = rng.uniform(0.3, 0.9), rng.uniform(0.1, 0.4), rng.uniform(0.4, 0.8)
    score = fields.patches * rng.uniform(0.7, 1.0) + 0.28 * fields.margins
    score -= rng.uniform(1.6, 3.0) * np.minimum(depth, 0.8)
    score += back * y - base * z + outer * np.abs(x) + rng.normal(0, 0.35) * np.sign(x)
    return np.asarray(score, np.float32)
