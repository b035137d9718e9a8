"""Smooth random fields fixed in space, and the correlated noise of a scanner."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Field = npt.NDArray[np.float32]

# Variance of a cubic B-spline sum of unit normals is the mean over a cell of the sum of squared weights,
# 151/315 per axis.
_UNIT = (315 / 151) ** 1.5


class SmoothField:
    """Cubic B-spline of normal coefficients on a lattice in mm: about unit variance, fixed in space.

    Parameters
    ----------
    rng : numpy.random.Generator
        Gives the coefficients.
    low, high : (3,) floats
        Corners (z, y, x) in mm of the box in which the field is asked for; it is constant outside.
    pitch : float
        Lattice spacing in mm; structures are about two pitches across.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        low: tuple[float, float, float],
        high: tuple[float, float, float],
        pitch: float,
    ) -> None:
        counts = [math.ceil((b - a) / pitch) + 4 for a, b in zip(low, high, strict=True)]
        self._low, self._pitch = low, pitch
        self._coefficients = (_UNIT * rng.standard_normal(counts)).astype(np.float32)

    def plane(self, z: float, y: npt.NDArray[Any], x: npt.NDArray[Any]) -> Field:
        """Evaluate on one axial plane.

        Parameters
        ----------
        z : float
            Height in mm.
        y, x : (Y,) and (X,) float arrays
            Coordinates in mm.

        Returns
        -------
        (Y, X) float32 array
        """
        counts = self._coefficients.shape
        along_z = _weights(np.array([z]), self._low[0], self._pitch, counts[0])[0]
        near = np.flatnonzero(along_z)
        sheet: Field = np.tensordot(along_z[near], self._coefficients[near], axes=1)
        along_y = _weights(y, self._low[1], self._pitch, counts[1])
        along_x = _weights(x, self._low[2], self._pitch, counts[2])
        return np.asarray(along_y @ (sheet @ along_x.T), np.float32)


def _weights(at: npt.NDArray[Any], low: float, pitch: float, count: int) -> Field:
    """(n, count) weights of the cubic B-spline."""
    u = np.clip((at - low) / pitch, 0, count - 4) + 1
    d = np.abs(u[:, None] - np.arange(count)[None, :])
    w = np.where(d < 1, 2 / 3 - d * d + d**3 / 2, np.maximum(2 - d, 0) ** 3 / 6)
    return w.astype(np.float32)


def scanner_noise(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    step: tuple[float, float, float],
    *,
    grain: float,
    sharpness: float,
) -> Field:
    """Noise of unit standard deviation, correlated like that of a reconstruction kernel.

    Parameters
    ----------
    rng : numpy.random.Generator
    shape, step
        Voxels and voxel size in mm (z, y, x).
    grain : float
        Standard deviation of the kernel in mm.
    sharpness : float
        Share of a kernel 2.2 times as wide that is taken away, in [0, 1): sharp kernels suppress low
        frequencies.

    Returns
    -------
    (Z, Y, X) float32 array
    """
    out = rng.standard_normal(shape, dtype=np.float32)
    sigma = (0.5 * grain / step[0], grain / step[1], grain / step[2])
    ndimage.gaussian_filter(out, sigma, output=out, mode="wrap", truncate=2.5)
    if sharpness > 0:
        wide = (0.0, 2.0 * sigma[1], 2.0 * sigma[2])  # after the first pass: 2.2 in all
        out -= sharpness * ndimage.gaussian_filter(out, wide, mode="wrap", truncate=2.0)
    out /= out.std()
    return out
