"""Draw the pictures of presets.md.

``python docs/preset_pictures.py --output docs/images/presets [PRESET ...]``

Each shows a healthy organ, the same with lesions, and their outlines. Lungs are those of
`lesionsynth.phantom` (seed 3); the other organs are drawn here, by procedure: a few smooth shapes with
vessels, HU of presets.md and the noise of a scanner (seed 0). Lesions are those of seed 0 and the index in
`SCENES`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion, gaussian_filter, zoom

import lesionsynth as ls
from lesionsynth.phantom.vessels import draw_tubes, grow_tree, tubes

Volume = Any  # (z, y, x) float32
FAT, MUSCLE, BLOOD, NOISE = -105.0, 60.0, 165.0, 11.0
LIVER, KIDNEY, PANCREAS = 116.0, 195.0, 76.0
OUTLINE = (255, 190, 0)
WIDTH, GREYS = 380, 40
"""Of a panel in pixels, and its shades: few of both, for a small file."""


class Scene(NamedTuple):
    """A healthy organ in the preset's window."""

    image: Volume
    mask: Any
    spacing: tuple[float, float, float]
    window: tuple[float, float]
    """Values of `image` shown as black and white."""


# --- Organs ---


def lungs(preset: ls.LesionConfig, shown: tuple[float, float]) -> Scene:
    """The phantom's chest with all around its lungs; lesions enter the lungs alone."""
    chest = ls.phantom.chest_ct((48, 300, 400), (1.25, 0.9, 0.9), seed=3, level=0.55)
    low, high = preset.hu_range
    window = (shown[0] - low) / (high - low), (shown[1] - low) / (high - low)
    return Scene(ls.window_hu(chest.hu, (low, high)), chest.lung_mask, chest.spacing, window)


def liver(preset: ls.LesionConfig, shown: tuple[float, float]) -> Scene:
    """A wedge of liver with the tree of a vein, beside spine and aorta."""
    z, y, x, rng = grid((64, 150, 200), spacing := (1.5, 1.2, 1.2))
    wobble = smooth(z.shape, spacing, 14.0, rng)
    wall = superellipsoid(0 * z, y, x, (1, 84, 114), 2.6)
    whole = superellipsoid(z, y + 6, x + 22, (64, 66, 84), 2.4) + 0.04 * wobble
    cut = (x - 22 - 0.65 * y + 14 * np.cos(y / 22)) / 70 + 0.05 * wobble
    organ = np.maximum(whole, cut) + 0.06 * np.exp(-((np.abs(whole - cut) / 0.15) ** 2))
    spine, aorta = np.hypot(x - 6, y - 62) - 19, np.hypot(x - 8, y - 32) - 10
    hu = np.where(wall < 0, MUSCLE, -1000.0)
    hu[np.abs(wall - 0.02) < 0.07] = FAT
    hu[wall < -0.14] = FAT
    mask = (organ < 0) & (spine > 4) & (aorta > 3) & (wall < -0.15)
    hu[mask] = LIVER + 3 * wobble[mask]
    hu += (BLOOD - LIVER) * vein(mask & (organ < -0.12), (-4.0, 8.0, -20.0), 70, 1.7, spacing, rng)
    hu[aorta < 0], hu[spine < 0] = BLOOD, 260.0
    return finished(hu, mask, spacing, preset, shown, rng)


def kidney(preset: ls.LesionConfig, shown: tuple[float, float]) -> Scene:
    """A kidney with its sinus of fat and a vein in it."""
    z, y, x, rng = grid((90, 110, 130), spacing := (1.25, 0.9, 0.9))
    wobble = smooth(z.shape, spacing, 7.0, rng)
    organ = superellipsoid(z, y, x, (56, 29, 31), 2.2) + 0.04 * wobble
    sinus = superellipsoid(z, y, x - 20, (36, 11, 24), 2.0) + 0.18 * wobble
    hu = np.full(z.shape, FAT)
    hu[(y > 40 + 0.1 * x) | (x > 50)] = MUSCLE
    mask = (organ < 0) & (sinus > 0)
    hu[mask] = KIDNEY + 4 * wobble[mask]
    tube = np.hypot(z / 1.5, y - 1 - 0.08 * x) < 5.5
    hu[tube & (x > 6) & ~mask] = BLOOD
    return finished(hu, mask, spacing, preset, shown, rng)


def pancreas(preset: ls.LesionConfig, shown: tuple[float, float]) -> Scene:
    """A bent, lobulated gland in fat, with the vein behind it."""
    z, y, x, rng = grid((56, 110, 190), spacing := (1.25, 0.9, 0.9))
    wobble, lobules = smooth(z.shape, spacing, 9.0, rng), smooth(z.shape, spacing, 2.6, rng)
    organ = np.full(z.shape, np.inf)
    for along in np.linspace(-58, 62, 61):
        bend = 15 * np.cos(along / 30 + 0.3) - 4
        thick = 8.5 + 8.0 * np.exp(-(((along + 52) / 16) ** 2)) + 1.0 * np.sin(along / 9)
        apart = np.sqrt((x - along) ** 2 + (y - bend) ** 2 + ((z + 0.05 * along) / 1.3) ** 2)
        organ = np.minimum(organ, apart - thick)
    organ += 0.9 * lobules + 0.8 * wobble
    hu = np.full(z.shape, FAT)
    hu[y > 42 + 3 * wobble] = MUSCLE
    mask = organ < 0
    hu[mask] = PANCREAS + 3 * wobble[mask]
    line = np.hypot((z + 0.05 * x) / 1.1, y - 15 * np.cos(x / 30 + 0.3) - 10)
    hu[(line < 4.5) & (np.abs(x + 4) < 70) & ~mask] = BLOOD
    ball(hu, (z, y - 36, x + 6), 10, BLOOD)
    return finished(hu, mask, spacing, preset, shown, rng)


def brain(preset: ls.LesionConfig, shown: tuple[float, float]) -> Scene:
    """Folded grey matter around white, dark ventricles; in standard deviations of the brain."""
    z, y, x, rng = grid((40, 190, 160), spacing := (2.0, 1.0, 1.0))
    wobble, folds = smooth(z.shape, spacing, 12.0, rng), smooth(z.shape, spacing, 5.0, rng)
    whole = (superellipsoid(z, y, x, (64, 84, 67), 2.1) + 0.02 * wobble) * 67
    sulci = np.abs(folds) * 3.2 - 0.9  # winding sheets that lead inwards
    cleft = np.maximum(np.abs(x + wobble) - 1.3, 26 - np.abs(y + 6))
    outer = np.maximum(whole + 3, np.minimum(sulci, cleft) * -1 - np.where(whole < -15, 9, 0))
    outer = np.maximum(outer, -cleft)
    depth = np.maximum(outer, -np.maximum(sulci, -15 - whole))
    white = np.maximum(whole + 13 + 2.5 * folds, 3.2 - np.abs(x)) < 0
    white &= ~(np.maximum(sulci - 2.2, -22 - whole) < 0)
    horn = np.hypot((np.abs(x) - 9 - 0.1 * np.abs(y)) / 5.5, y / 31) - 1 + np.abs(z) / 60 + 0.08 * wobble
    fluid, grey = horn < 0, depth < 0
    values = np.full(z.shape, -3.6)
    values[whole < 0] = -2.6
    values[grey] = 0.75
    white &= ~fluid & grey
    values[white] = -0.25 + 0.08 * wobble[white]
    values[fluid] = -2.6
    shell = superellipsoid(z, y, x, (74, 94, 77), 2.1) * 77
    values[(np.abs(shell) < 3)] = 1.0
    values[(shell > -3) & (shell < -1)] = -3.0
    values = gaussian_filter(values, [0.7 / s for s in spacing])
    values += 0.22 * grain(z.shape, spacing, rng)
    low, high = preset.window
    return Scene(np.clip(values, low, high).astype(np.float32), white, spacing, shown)


def grid(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> tuple[Any, ...]:
    """Positions z, y, x in mm from the middle, and a generator."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    return (*np.meshgrid(*axes, indexing="ij"), np.random.default_rng(0))


def superellipsoid(z: Any, y: Any, x: Any, half: tuple[float, float, float], power: float) -> Any:
    """Below 0 inside, -1 in the middle."""
    parts = (np.abs(p / h) ** power for p, h in zip((z, y, x), half, strict=True))
    return sum(parts) ** (1 / power) - 1


def ball(hu: Volume, from_middle: tuple[Any, Any, Any], radius: float, value: float) -> None:
    """A vessel or bone that runs along z, wherever its z is 0."""
    _, y, x = from_middle
    hu[np.hypot(y, x) < radius] = value


def smooth(shape: tuple[int, ...], spacing: tuple[float, ...], sigma: float, rng: np.random.Generator) -> Any:
    """Noise of deviation 1 that changes over `sigma` mm."""
    noise = gaussian_filter(rng.standard_normal(shape), [sigma / s for s in spacing])
    return noise / noise.std()


def grain(shape: tuple[int, ...], spacing: tuple[float, ...], rng: np.random.Generator) -> Any:
    """The noise of a scanner."""
    return smooth(shape, spacing, 0.65, rng)


def vein(
    inside: Any,
    root: tuple[float, float, float],
    count: int,
    tip: float,
    spacing: Any,
    rng: np.random.Generator,
) -> Volume:
    """Coverage of a tree that reaches everywhere in an organ."""
    places = np.argwhere(inside)
    chosen = places[rng.choice(len(places), count, replace=False)]
    origin = -(np.array(inside.shape) - 1) / 2 * spacing
    targets = (origin + chosen * spacing)[:, ::-1]
    tree = grow_tree(root, targets, np.zeros(count, np.int8), tip_radius=tip, root_radius=7.0, balance=0.5)
    out = np.zeros(inside.shape, np.float32)
    draw_tubes(out, tubes(tree), origin[::-1].copy(), np.array(spacing[::-1]), 0.6)
    return out * inside


def finished(
    hu: Volume, mask: Any, spacing: Any, preset: ls.LesionConfig, shown: Any, rng: np.random.Generator
) -> Scene:
    """Blur and noise of a scanner, and the preset's window."""
    hu = gaussian_filter(hu, [0.6 / s for s in spacing]) + NOISE * grain(hu.shape, spacing, rng)
    low, high = preset.hu_range
    window = (shown[0] - low) / (high - low), (shown[1] - low) / (high - low)
    return Scene(ls.window_hu(hu, (low, high)), mask, spacing, window)


# --- Pictures ---

SCENES: dict[str, tuple[Callable[..., Scene], tuple[float, float], int]] = {
    "ground_glass": (lungs, (-1000.0, 100.0), 4),
    "consolidation": (lungs, (-1000.0, 100.0), 0),
    "nodules": (lungs, (-1000.0, 100.0), 8),
    "emphysema": (lungs, (-1050.0, -450.0), 1),
    "liver_metastases": (liver, (-60.0, 220.0), 4),
    "kidney_tumours": (kidney, (-120.0, 240.0), 9),
    "pancreas_cysts": (pancreas, (-140.0, 220.0), 4),
    "brain_lesions_mr": (brain, (-3.6, 4.5), 2),
}
"""Organ, what is shown in black and white, index."""


def picture(name: str, index: int | None = None) -> Image.Image:
    """One row: healthy, with lesions, outlines; the slice with most lesion."""
    make, shown, own = SCENES[name]
    config = ls.presets.get(name)
    scene = make(config, shown)
    synth = ls.LesionSynthesizer(config, seed=0)
    pair = synth(scene.image, scene.mask, index=own if index is None else index, spacing=scene.spacing)
    lesions = np.asarray(pair.labels)
    z = int(np.argmax((lesions > 0).sum((1, 2))))
    part = (z, *around(scene.mask, scene.spacing))
    factor = WIDTH / lesions[part].shape[1]
    low, high = scene.window
    panels = []
    for volume in (scene.image, pair.image, pair.image):
        grey = np.clip((volume[part].astype(float) - low) / (high - low), 0, 1)
        grey = zoom(grey, factor, order=1, grid_mode=True, mode="nearest")
        grey = np.round(grey * (GREYS - 1)) / (GREYS - 1)
        panels.append(np.repeat((grey * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=-1))
    fine = zoom(lesions[part], factor, order=0, grid_mode=True, mode="nearest")
    panels[2][outline(fine)] = OUTLINE
    gap = np.full((len(fine), 4, 3), 255, np.uint8)
    row = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)
    return Image.fromarray(row).quantize(GREYS + 8, dither=Image.Dither.NONE)


def around(mask: Any, spacing: tuple[float, float, float]) -> tuple[slice, slice]:
    """The organ and 12 mm around it, in plane."""
    found = []
    for axis in (1, 2):
        places = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        margin = round(12 / spacing[axis])
        found.append(slice(max(0, places[0] - margin), places[-1] + 1 + margin))
    return found[0], found[1]


def outline(labels: Any) -> Any:
    """Pixels of a lesion beside another label."""
    edge = np.zeros(labels.shape, bool)
    for label in np.unique(labels[labels > 0]):
        edge |= (labels == label) & ~binary_erosion(labels == label)
    return edge


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=list(SCENES), metavar="PRESET")
    parser.add_argument("--output", type=Path, default=Path("docs/images/presets"))
    parser.add_argument("--index", type=int, help="another sample than that of the page")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.presets:
        path = args.output / f"{name}.png"
        picture(name, args.index).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
