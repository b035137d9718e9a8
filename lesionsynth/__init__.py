"""Synthetic lesions for label-free lesion segmentation in lung CT (Yao et al., NormNet).

Healthy slab and lung mask in, training pair out, reproducibly from (seed, index)::

    import lesionsynth as ls

    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)
    pair = synth(image, lung_mask, index=17, lung_fraction=0.8)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lesionsynth import commands as _commands  # noqa: F401  first: it sees to interrupts while others load
from lesionsynth import presets
from lesionsynth._backend import release_memory
from lesionsynth._dlpack import DLPackArray
from lesionsynth.config import BlobClass, LesionConfig, Part, Texture, Warp
from lesionsynth.lungs import remove_erroneous_edges
from lesionsynth.plan import Component, LesionPlan
from lesionsynth.sampling import Blob
from lesionsynth.synthesizer import LesionPair, LesionSynthesizer
from lesionsynth.window import threshold, window_hu

if TYPE_CHECKING:
    from lesionsynth import cuda, io, monai, ops, phantom

__version__ = "0.1.0"

__all__ = [
    "Blob",
    "BlobClass",
    "Component",
    "DLPackArray",
    "LesionConfig",
    "LesionPair",
    "LesionPlan",
    "LesionSynthesizer",
    "Part",
    "Texture",
    "Warp",
    "cuda",
    "io",
    "monai",
    "ops",
    "phantom",
    "presets",
    "release_memory",
    "remove_erroneous_edges",
    "threshold",
    "window_hu",
]

_LAZY = ("cuda", "io", "monai", "ops", "phantom")
"""Submodules loaded on first use, so that the generator does not wait for them."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
