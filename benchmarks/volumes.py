"""What is rendered on: the phantom always, real lungs where a folder with CT is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import lesionsynth as ls

SHAPE = (32, 512, 512)
QUICK_SHAPE = (16, 128, 128)
REAL = "healthy_lidc_0002.nii.gz"
VESSEL_HU = -500


@dataclass(frozen=True)
class Volume:
    """A slab for pairs, and bright structures of the whole scan for labelling."""

    name: str
    source: str
    image: npt.NDArray[np.float32]
    """H in [0, 1], 0 outside the lungs."""
    mask: npt.NDArray[np.bool_]
    vessels: npt.NDArray[np.bool_]
    """(HU > -500) & lung."""
    rimmed: tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]
    """Whole image and a mask that is a little too wide, with erroneous edges to remove."""

    def describe(self) -> dict[str, Any]:
        """Return the entry for the result file."""
        return {
            "source": self.source,
            "shape": list(self.image.shape),
            "mask_voxels": int(self.mask.sum()),
            "vessels_shape": list(self.vessels.shape),
            "vessel_voxels": int(self.vessels.sum()),
        }


def phantom(shape: tuple[int, int, int]) -> Volume:
    """Draw the built-in healthy chest."""
    chest = ls.phantom.chest_ct(shape=shape, seed=1)
    source = f"lesionsynth.phantom.chest_ct(shape={shape}, seed=1)"
    return _volume("phantom", source, chest.hu, chest.lung_mask, chest.hu, chest.lung_mask)


def real_lungs(folder: Path, shape: tuple[int, int, int]) -> Volume:
    """Read a real scan, segment its lungs, and cut a slab from the middle."""
    from normnet.prepare.lungs import segment_lungs

    ct = ls.io.read_ct(folder / REAL)
    mask = segment_lungs(ct.hu, ct.spacing)
    first = (len(ct.hu) - shape[0]) // 2
    slab = slice(first, first + shape[0])
    hu = _centred(ct.hu[slab], shape, ct.hu.min())
    source = f"{REAL}, slices {first} to {first + shape[0] - 1}, centred in plane"
    return _volume("lung", source, hu, _centred(mask[slab], shape, False), ct.hu, mask)


def _volume(name: str, source: str, hu: Any, mask: Any, whole_hu: Any, whole_mask: Any) -> Volume:
    image = ls.window_hu(hu) * mask
    wide = np.array(whole_mask)
    for axis, step in ((1, 1), (1, -1), (2, 1), (2, -1)):
        wide |= np.roll(wide, step, axis)
    vessels = (whole_hu > VESSEL_HU) & whole_mask
    return Volume(name, source, image, mask, vessels, (ls.window_hu(whole_hu), wide))


def _centred(volume: Any, shape: tuple[int, int, int], fill: Any) -> Any:
    """Crop or pad centrally in plane."""
    out = np.full((len(volume), *shape[1:]), fill, volume.dtype)
    source, to = [slice(None)], [slice(None)]
    for have, want in zip(volume.shape[1:], shape[1:], strict=True):
        n = min(have, want)
        source.append(slice((have - n) // 2, (have - n) // 2 + n))
        to.append(slice((want - n) // 2, (want - n) // 2 + n))
    out[tuple(to)] = volume[tuple(source)]
    return out
