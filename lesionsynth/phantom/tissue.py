"""The chest without its vessels, one axial slice at a time: skin, fat, muscle, bones, inner organs.

Each tissue is painted over the last with a soft edge: its weight is the share of the voxel that lies inside
the surface, taken from a signed distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lesionsynth.phantom import anatomy as an
from lesionsynth.phantom.anatomy import Anatomy, Field

AIR, FAT, MUSCLE, BLOOD, SKIN = -1000.0, -105.0, 52.0, 42.0, -20.0
CARTILAGE, MARROW, CORTEX, CORD = 95.0, 190.0, 620.0, 25.0
LIVER, SPLEEN, STOMACH = 58.0, 48.0, 28.0
NECK_VESSELS = (
    (-17.0, -22.0, 7.0),
    (-6.0, -14.0, 6.0),
    (14.0, -4.0, 5.0),
    (22.0, 6.0, 5.0),
    (18.0, -26.0, 6.0),
)
"""Centre (x, y) and radius in mm of the vessels above the aortic arch."""


@dataclass(frozen=True)
class Slices:
    """Axial planes to be painted, in the chest's frame."""

    x: Field
    """(Y, X) mm."""
    y: Field
    """(Y, X) mm."""
    edge: float
    """Width of a tissue's edge in mm."""


def paint(hu: Field, value: Any, distance: Any, edge: float) -> None:
    """Paint `value` over `hu`, in place, where the signed `distance` in mm is negative."""
    weight = np.clip(0.5 - distance / edge, 0, 1)
    hu += weight * (value - hu)


def slice_hu(anatomy: Anatomy, plane: Slices, z: float, marbling: Field) -> tuple[Field, Field]:
    """Paint one slice of everything but lung parenchyma, vessels and airways.

    Parameters
    ----------
    anatomy : Anatomy
        Sizes of the chest.
    plane : Slices
        Coordinates of the slice's voxels.
    z : float
        Height in mm.
    marbling : (Y, X) float32 array
        Smooth noise of unit variance, for fat between muscles and uneven organs.

    Returns
    -------
    hu : (Y, X) float32 array
        With blood in place of the lungs.
    lung : (Y, X) float32 array
        Signed distance to the lungs in mm.
    """
    x, y, edge = plane.x, plane.y, plane.edge
    hu = np.full(x.shape, AIR, np.float32)
    wall = an.cage(anatomy, x, y, z)
    lung = an.lungs(anatomy, x, y, z)
    _table(hu, anatomy, plane)
    _body(hu, anatomy, plane, z, wall, marbling)
    _inside(hu, anatomy, plane, z, wall, marbling)
    _cage_bones(hu, anatomy, plane, z, wall)
    _spine(hu, anatomy, plane, z, marbling)
    paint(hu, BLOOD, lung, edge)
    return hu, np.asarray(lung, np.float32)


def _table(hu: Field, anatomy: Anatomy, plane: Slices) -> None:
    """Paint the scanner's table: two thin curved sheets below the back."""
    top = anatomy.body_half_depth + 9
    for depth in (0.0, 22.0):
        sheet = np.hypot(plane.x, plane.y - top - depth + 420) - 420
        paint(hu, -420.0, np.abs(sheet) - 1.0, 2 * plane.edge)


def _body(hu: Field, anatomy: Anatomy, plane: Slices, z: float, wall: Any, marbling: Field) -> None:
    """Skin, fat and muscle; shoulders at the top."""
    x, y, edge = plane.x, plane.y, plane.edge
    t = z / anatomy.height
    shoulders = float(np.clip((t - 0.5) / 0.5, 0, 1))
    half_x = anatomy.body_half_width + 34 * shoulders**1.5
    half_y = anatomy.body_half_depth - 26 * shoulders**1.5
    outline = an.superellipse(x, y - 10 * shoulders - 2, (half_x, half_y), 2.45)
    # the outline sinks in along the spine
    outline = outline + 5 * np.exp(-((x / 14) ** 2)) * (y > 0)
    fat = anatomy.fat * (1 + 0.35 * np.cos(2 * np.arctan2(y, x)) * -1 + 0.06 * marbling)
    paint(hu, SKIN, outline, edge)
    paint(hu, FAT + 6 * marbling, outline + 2.0, edge)
    muscle = an.smooth_max(outline + fat, wall - anatomy.muscle - 9 - 60 * shoulders, 12.0)
    muscle = an.smooth_min(muscle, an.segment(x, y, (-38.0, 92.0), (38.0, 92.0), 24.0), 10.0)
    paint(hu, MUSCLE + 5 * marbling, an.smooth_max(muscle, outline + 4.0, 3.0), edge)
    planes = np.abs(marbling + 0.6 * np.sin(0.16 * wall)) * 9 - 1.0
    paint(hu, MUSCLE - 75, np.maximum(planes, np.maximum(muscle + 3, 11 - wall)), 2.5 * edge)


def _inside(hu: Field, anatomy: Anatomy, plane: Slices, z: float, wall: Any, marbling: Field) -> None:
    """Mediastinum and upper abdomen."""
    x, y, edge = plane.x, plane.y, plane.edge
    t, b = z / anatomy.height, anatomy.half_depth
    paint(hu, -70 + 12 * marbling, wall - 1.5, 2 * edge)
    below = an.diaphragm(anatomy, x, y, z)
    paint(hu, MUSCLE, np.maximum(below, wall), edge)
    organ = np.maximum(below + 3.5, wall + 5)
    if (organ < 0).any():
        liver = np.maximum(organ, np.maximum(x - 28 - 0.3 * (y + 30), y - 62 + 0.25 * x))
        spleen = np.maximum(organ, an.ellipse(x, y, (82.0, 30.0), (44.0, 52.0)))
        stomach = np.maximum(organ, an.ellipse(x, y, (62.0, -36.0), (46.0, 40.0)))
        paint(hu, -95.0, organ + 0.5, edge)
        paint(hu, LIVER + 4 * marbling, liver, edge)
        paint(hu, SPLEEN + 3 * marbling, spleen, edge)
        paint(hu, STOMACH + 8 * marbling, stomach, edge)
    paint(hu, BLOOD + 3 * marbling, an.heart(anatomy, x, y, z) + 4, edge)
    if t > 0.42:
        aorta = an.ellipse(x, y, (-8.0 + 60 * (t - 0.45), -22.0), (15.0, 14.0))
        paint(hu, BLOOD, aorta + 40 * max(0.0, t - 0.70), edge)
        trunk = an.ellipse(x, y, (17.0, -26.0 + 30 * (t - 0.42)), (13.0, 15.0))
        paint(hu, BLOOD, trunk + 60 * max(0.0, t - 0.60), edge)
        paint(hu, BLOOD, an.ellipse(x, y, (-22.0, -12.0), (8.0, 9.0)), edge)
    if 0.655 < t < 0.72:
        arch = an.segment(x, y, (-10.0, -20.0), (20.0, 0.28 * b), 12.0)
        paint(hu, BLOOD, arch, edge)
    if t > 0.70:
        for cx, cy, r in NECK_VESSELS:
            paint(hu, BLOOD, an.ellipse(x, y, (cx, cy), (r, r)), edge)
    if t < 0.70:
        paint(hu, BLOOD, an.ellipse(x, y, (21.0, 0.30 * b), (12.0, 12.0)), edge)
    paint(hu, 35.0, an.ellipse(x, y, (5.0, 0.24 * b), (8.0, 6.0)), edge)


def _cage_bones(hu: Field, anatomy: Anatomy, plane: Slices, z: float, wall: Any) -> None:
    """Ribs that slope down to the front, breastbone, shoulder blades and collarbones."""
    x, y, edge = plane.x, plane.y, plane.edge
    t, b = z / anatomy.height, anatomy.half_depth
    around = np.arctan2(np.abs(x), y + 4) / np.pi  # 0 at the back, 1 in front
    climb = z + 125 * around**1.1 - 35 * around**6 - anatomy.rib_phase
    offset = np.abs(np.mod(climb, anatomy.rib_pitch) - anatomy.rib_pitch / 2)
    # the rib's cut: an ellipse across the wall; 0.8 is the share of the offset that lies across its axis
    rib = (np.hypot((wall - 7.0) / 4.2, offset * 0.8 / 6.0) - 1) * 4.2
    rib = np.maximum(rib, (9 - np.abs(x)) * 0.7)
    cartilage = np.clip((around - 0.80) / 0.04, 0, 1)
    paint(hu, CORTEX * (1 - cartilage) + CARTILAGE * cartilage, rib, 1.5 * edge)
    paint(hu, MARROW * (1 - cartilage) + CARTILAGE * cartilage, rib + 1.7, 1.5 * edge)
    if 0.30 < t < 0.92:
        sternum = an.superellipse(x, y + b + 7, (17.0 + 8 * max(0.0, t - 0.75) / 0.2, 6.0), 3.0)
        paint(hu, CORTEX - 200, sternum, 1.5 * edge)
        paint(hu, MARROW - 40, sternum + 1.8, 1.5 * edge)
    if t > 0.42:
        length = 46 * float(np.clip((t - 0.42) / 0.25, 0, 1))
        for side in (an.RIGHT, an.LEFT):
            inner = (side * 74.0, 0.86 * b + 22 - 8 * t)
            outer = (side * (74.0 + length), 0.86 * b + 16 - 0.75 * length)
            blade = np.maximum(an.segment(x, y, inner, outer, 3.4), 17 - wall)
            paint(hu, CORTEX, blade, 1.5 * edge)
            paint(hu, MARROW, blade + 2.0, 1.5 * edge)
            if t > 0.86:
                clavicle = an.segment(
                    x, y, (side * 16.0, -62.0), (side * 84.0, -60.0 + 300 * (t - 0.86)), 5.5
                )
                clavicle = np.maximum(clavicle, np.abs(np.abs(x) - 24 - 420 * (t - 0.86)) - 24)
                paint(hu, CORTEX, clavicle, 1.5 * edge)
                paint(hu, MARROW, clavicle + 2.0, 1.5 * edge)


def _spine(hu: Field, anatomy: Anatomy, plane: Slices, z: float, marbling: Field) -> None:
    """Vertebral body or disc, canal, arch and processes."""
    x, y, edge = plane.x, plane.y, plane.edge
    back = 0.58 * anatomy.half_depth
    beat = np.mod(z + anatomy.rib_phase, anatomy.rib_pitch) / anatomy.rib_pitch
    disc = float(np.clip((np.abs(beat - 0.5) - 0.36) / 0.05, 0, 1))
    body = an.ellipse(x, y, (0.0, back), (17.5, 14.5))
    paint(hu, (CORTEX - 120) * (1 - disc) + 90 * disc, body, 1.5 * edge)
    paint(hu, (MARROW + 25 * marbling) * (1 - disc) + 80 * disc, body + 2.0, 2 * edge)
    arch = an.ellipse(x, y, (0.0, back + 23), (15.0, 12.0))
    paint(hu, CORTEX - 80, arch, 1.5 * edge)
    paint(hu, MARROW + 60, arch + 1.8, 1.5 * edge)
    if 0.15 < beat < 0.85:
        spinous = an.segment(x, y, (0.0, back + 32), (0.0, back + 52), 3.4)
        paint(hu, CORTEX - 120, spinous, 1.5 * edge)
    if 0.3 < beat < 0.75:
        for side in (an.RIGHT, an.LEFT):
            process = an.segment(x, y, (side * 12.0, back + 22), (side * 34.0, back + 30), 4.2)
            paint(hu, CORTEX - 100, process, 1.5 * edge)
            paint(hu, MARROW + 30, process + 1.8, 1.5 * edge)
    paint(hu, CORD, an.ellipse(x, y, (0.0, back + 21), (9.0, 7.5)), edge)
