"""Draw predicted lesions over a CT.

``python docs/pictures.py CT LESIONS --slices 10 20 --output picture.png``

Made the overlays of results.md. Slices count from 0 at the feet, as in `normnet.prepare`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import lesionsynth as ls
from normnet.draw import LUNG_WINDOW, grey, lung_box, overlay, side_by_side


def main() -> None:
    """Write one row of slices: the CT above, its predicted lesions in red below."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ct", type=Path)
    parser.add_argument("lesions", type=Path)
    parser.add_argument("--slices", type=int, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--width", type=int, default=1200, help="pixels of the picture; default 1200")
    args = parser.parse_args()
    volume = ls.io.read_ct(args.ct)
    lesions = ls.io.read_mask(args.lesions, volume)
    rows, columns = lung_box(volume.hu > -300, margin=0)
    nothing = np.zeros(volume.hu[0, rows, columns].shape, dtype=bool)
    plain = [grey(volume.hu[z, rows, columns], LUNG_WINDOW) for z in args.slices]
    marked = [
        overlay(picture, lesions[z, rows, columns], nothing)
        for z, picture in zip(args.slices, plain, strict=True)
    ]
    panel = np.concatenate([side_by_side(plain), side_by_side(marked)])
    picture = Image.fromarray(panel)
    picture.thumbnail((args.width, args.width))
    picture.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
