"""Where things are in the phantom's chest: sizes drawn from the seed, and signed distances to the lungs.

Coordinates are millimetres in the chest's own frame: x from the midline to the patient's left, y from the
middle of the chest to the back, z from the deepest recess of the lungs to the head. Signed distances are
negative inside. They are first-order approximations, good to a millimetre near a surface, which is where
partial volume needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float32]
Point = tuple[float, float, float]

RIGHT, LEFT = -1, 1
"""Sign of x on either side of the patient."""
CARINA = 0.60
"""Height of the tracheal bifurcation over the lungs' height."""


@dataclass(frozen=True)
class Anatomy:
    """Sizes of one chest in mm; every seed draws its own."""

    height: float
    """From the deepest recess to the apex of the lungs."""
    half_width: float
    """Of the pleural cavity."""
    half_depth: float
    dome: tuple[float, float]
    """Height of the right and left diaphragm domes."""
    heart: tuple[Point, Point]
    """Centre and semi-axes (x, y, z)."""
    mediastinum: float
    """Factor on the width of the mediastinum."""
    fat: float
    """Thickness of the fat under the skin."""
    muscle: float
    """Thickness of the chest wall between pleura and fat."""
    rib_phase: float
    rib_pitch: float
    """Distance between ribs along z."""
    fissure_tilt: float
    roll: float
    """Rotation of the patient about z, radians."""
    waves: npt.NDArray[np.float64]
    """(n, 4): wave vector (x, y, z) in rad/mm and phase of the surface's irregularity."""

    @property
    def body_half_width(self) -> float:
        """Half the width of the body at the level of the heart."""
        return self.half_width + self.muscle + self.fat + 4

    @property
    def body_half_depth(self) -> float:
        """Half the depth of the body."""
        return self.half_depth + self.muscle + self.fat + 8

    def hilum(self, side: int) -> Point:
        """Where vessels and main bronchi enter a lung."""
        return (side * 30.0 * self.mediastinum + 4, 14.0, (CARINA - 0.09 + 0.02 * side) * self.height)


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw the sizes of an adult chest."""
    height, width = rng.uniform(245, 295), rng.uniform(124, 142)
    heart_width = rng.uniform(54, 66)
    heart = (
        (rng.uniform(12, 22), rng.uniform(-34, -26), 0.34 * height),
        (heart_width, rng.uniform(44, 52), rng.uniform(56, 66)),
    )
    waves = np.concatenate([rng.normal(0, 1 / 30, (6, 3)), rng.uniform(0, 2 * np.pi, (6, 1))], axis=1)
    return Anatomy(
        height=height,
        half_width=width,
        half_depth=rng.uniform(92, 108),
        dome=(rng.uniform(70, 88), rng.uniform(58, 72)),
        heart=heart,
        mediastinum=rng.uniform(0.9, 1.12),
        fat=rng.uniform(5, 17),
        muscle=rng.uniform(13, 19),
        rib_phase=rng.uniform(0, 24),
        rib_pitch=rng.uniform(23, 27),
        fissure_tilt=rng.uniform(0.85, 1.15),
        roll=rng.uniform(-0.04, 0.04),
        waves=waves,
    )


def ellipse(x: Any, y: Any, center: tuple[float, float], axes: tuple[float, float]) -> Any:
    """Signed distance to an ellipse, first order."""
    px, py = (x - center[0]) / axes[0], (y - center[1]) / axes[1]
    inner = np.sqrt(px * px + py * py)
    slope = np.sqrt((px / axes[0]) ** 2 + (py / axes[1]) ** 2) + 1e-6
    return (inner - 1) * np.maximum(inner, 0.05) / slope


def superellipse(x: Any, y: Any, axes: tuple[Any, Any], power: float) -> Any:
    """Signed distance to |x/a|^p + |y/b|^p = 1 about the origin, first order."""
    px, py = np.abs(x / axes[0]), np.abs(y / axes[1])
    total = px**power + py**power + 1e-9
    inner = total ** (1 / power)
    slope = total ** (1 / power - 1) * np.sqrt(
        (px ** (power - 1) / axes[0]) ** 2 + (py ** (power - 1) / axes[1]) ** 2
    )
    return (inner - 1) / (slope + 1e-6)


def segment(x: Any, y: Any, a: tuple[float, float], b: tuple[float, float], radius: float) -> Any:
    """Signed distance to a stadium around the segment a-b."""
    ax, ay = b[0] - a[0], b[1] - a[1]
    t = np.clip(((x - a[0]) * ax + (y - a[1]) * ay) / (ax * ax + ay * ay), 0, 1)
    return np.hypot(x - a[0] - t * ax, y - a[1] - t * ay) - radius


def smooth_min(a: Any, b: Any, k: float) -> Any:
    """Union of two shapes, its corners filled with radius about k."""
    h = np.maximum(k - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h / (4 * k)


def smooth_max(a: Any, b: Any, k: float) -> Any:
    """Intersection of two shapes, its corners rounded with radius about k."""
    h = np.maximum(k - np.abs(a - b), 0)
    return np.maximum(a, b) + h * h / (4 * k)


def cage(anatomy: Anatomy, x: Any, y: Any, z: Any) -> Any:
    """Signed distance to the pleural cavity's outer wall: two shells that close to domes at the apices."""
    t = z / anatomy.height
    taper = np.clip((t - 0.4) / 0.6, 0, 1)
    scale = np.sqrt(np.maximum(1 - taper**1.75, 0)) + 1e-3
    # the lower ribs close in a little; towards the apices each lung closes about its own axis, near the back
    low = np.clip(0.35 - t, 0, 1) / 0.35
    px = np.abs(np.abs(x) - 0.36 * anatomy.half_width * (1 - scale) * np.clip(4 * taper, 0, 1))
    py = y - 12 * taper
    py = np.where(py > 0, py, py * (1.0 + 0.12 * (px / anatomy.half_width) ** 2))  # flatter back
    axes = (anatomy.half_width * scale * (1 - 0.08 * low), anatomy.half_depth * scale)
    wall = superellipse(px, py, axes, 2.25)
    ripple = sum(np.sin(w[0] * x + w[1] * y + w[2] * z + w[3]) for w in anatomy.waves.astype(np.float32))
    return wall + ripple


def heart(anatomy: Anatomy, x: Any, y: Any, z: Any) -> Any:
    """Signed distance to the heart, tilted to the left, front and feet."""
    (cx, cy, cz), (ax, ay, az) = anatomy.heart
    dz = (z - cz) / az
    room = np.sqrt(np.maximum(1 - dz * dz, 0)) + 1e-3
    px = x - cx + 0.30 * (z - cz)
    py = y - cy - 0.15 * (z - cz)
    # 0.35 turns the long axis from left-front to right-back
    rx, ry = px * 0.94 - py * 0.35, px * 0.35 + py * 0.94
    return np.where(np.abs(dz) < 1, ellipse(rx, ry, (0.0, 0.0), (ax * room, ay * room)), 30 + 0 * rx)


def mediastinum(anatomy: Anatomy, x: Any, y: Any, z: Any) -> Any:
    """Signed distance to what lies between the lungs: heart, great vessels, aorta, spine, hila."""
    t = z / anatomy.height
    wide, b = anatomy.mediastinum, anatomy.half_depth
    knots = (0.0, 0.2, 0.38, 0.5, 0.62, 0.72, 0.85, 1.0)
    half_x = wide * np.interp(t, knots, (38, 36, 25, 29, 31, 29, 24, 20)).astype(np.float32)
    half_y = np.interp(t, knots, (80, 70, 50, 46, 46, 44, 44, 44)).astype(np.float32)
    mid_x = np.interp(t, knots, (4, 6, 4, 3, 1, 0, 0, 0)).astype(np.float32)
    out = ellipse(x, y, (mid_x, -8.0), (half_x, half_y))
    out = smooth_min(out, heart(anatomy, x, y, z), 14.0)
    front = segment(x, y, (1.0, -b - 20), (1.0, -20.0), 2.9)
    widen = 12 * np.clip(0.35 - t, 0, 1) + 5 * np.clip(t - 0.74, 0, 1)
    out = smooth_min(out, front - 14 * widen, 14.0)
    out = smooth_min(out, ellipse(x, y, (0.0, 0.6 * b), (23.0, 30.0)), 12.0)
    out = smooth_min(out, segment(x, y, (0.0, 0.6 * b), (0.0, b + 40), 16.0), 14.0)
    if_aorta = 30 * np.clip(t - 0.70, 0, 1) / 0.03
    out = smooth_min(out, ellipse(x, y, (21.0, 0.30 * b), (13.0, 13.0)) + if_aorta, 8.0)
    for side in (RIGHT, LEFT):
        hx, hy, hz = anatomy.hilum(side)
        ball = np.sqrt((x - hx) ** 2 + (y - hy) ** 2 + (0.6 * (z - hz)) ** 2) - 13.0
        out = smooth_min(out, ball, 10.0)
    return out


def diaphragm(anatomy: Anatomy, x: Any, y: Any, z: Any) -> Any:
    """Signed distance to the tissue below the two domes (negative below)."""
    out = None
    for side, height in zip((RIGHT, LEFT), anatomy.dome, strict=True):
        px, py = (x - side * 66) / 88.0, (y + 0.16 * anatomy.half_depth) / (1.10 * anatomy.half_depth)
        rho = px * px + py * py
        top = height * (1 - rho**1.25) + 8 * np.sin(0.035 * x + 0.028 * y + anatomy.rib_phase)
        slope = 2.5 * height * rho**0.75 * np.sqrt((px / 88.0) ** 2 + (py / (1.10 * anatomy.half_depth)) ** 2)
        distance = (z - top) / np.sqrt(1 + np.minimum(slope, 3.0) ** 2)
        out = distance if out is None else np.where(x * side > 0, distance, out)
    return out


def lungs(anatomy: Anatomy, x: Any, y: Any, z: Any) -> Any:
    """Signed distance to both lungs: inside the cage, outside the mediastinum, above the diaphragm."""
    out = smooth_max(cage(anatomy, x, y, z), -mediastinum(anatomy, x, y, z), 9.0)
    return smooth_max(out, -diaphragm(anatomy, x, y, z), 5.0)


def fissures(anatomy: Anatomy, x: Any, y: Any, z: Any) -> tuple[Any, Any]:
    """Signed heights in mm above the oblique fissures, and above the right lung's horizontal one."""
    h = anatomy.height
    bow = 0.0022 * (np.abs(x) - 60) ** 2 + 5 * np.sin(0.045 * x + anatomy.rib_phase) + 3 * np.sin(0.06 * y)
    oblique = z - (0.42 * h - anatomy.fissure_tilt * y * -0.95 + bow)
    horizontal = z - (0.50 * h - 0.10 * y - 0.0016 * (np.abs(x) - 70) ** 2)
    return oblique * 0.72, horizontal * 0.97


def lobe(anatomy: Anatomy, x: Any, y: Any, z: Any) -> npt.NDArray[np.int8]:
    """Return the lobe of each point: 0 lower, 1 upper, 2 middle (right lung only)."""
    oblique, horizontal = fissures(anatomy, x, y, z)
    # the upper lobes lie in front of and above the oblique fissure
    upper = np.asarray(oblique > 0)
    middle = upper & np.asarray(horizontal < 0) & np.asarray(x < 0)
    out: npt.NDArray[np.int8] = upper.astype(np.int8) + middle.astype(np.int8)
    return out
