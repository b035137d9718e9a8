"""Which libraries take part: SciPy, twice, always, the others where they are installed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from benchmarks.common import NOT_INSTALLED
from benchmarks.scipy_pipeline import PlainSciPy, SciPy

OTHERS = {
    "MONAI": ("benchmarks.monai_pipeline", "Monai"),
    "TorchIO": ("benchmarks.torchio_pipeline", "TorchIO"),
    "batchgeneratorsv2": ("benchmarks.batchgenerators_pipeline", "BatchGenerators"),
}
PLAIN = "SciPy, plain"
TORCH_THREADS = ("MONAI", "batchgeneratorsv2")
"""Those whose speed depends on torch's number of threads."""


@dataclass(frozen=True)
class Libraries:
    """What can be timed, and what cannot."""

    present: dict[str, Any]
    """Name -> `benchmarks.pipeline.Library`."""
    missing: dict[str, str]
    """Name -> reason."""

    def describe(self) -> dict[str, Any]:
        """Return the section for the result file."""
        found = {
            name: {
                "installed": True,
                "cannot_express": list(getattr(library, "cannot", ())),
                "gaussian": getattr(library, "smoothing_rule", "scipy.ndimage.gaussian_filter itself"),
            }
            for name, library in self.present.items()
        }
        return found | {
            name: {"installed": False, "reason": f"{NOT_INSTALLED}: {why}"}
            for name, why in self.missing.items()
        }


def load() -> Libraries:
    """Import what is there."""
    present: dict[str, Any] = {"SciPy": SciPy(), PLAIN: PlainSciPy()}
    missing = {}
    for name, (module, adapter) in OTHERS.items():
        try:
            present[name] = getattr(importlib.import_module(module), adapter)()
        except ImportError as error:
            missing[name] = str(error)
    return Libraries(present, missing)
