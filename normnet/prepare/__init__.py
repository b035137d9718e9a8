"""Prepare chest CT: read, find the lungs, resample, store (PAPER.md IV-A, IV-B).

`prepare` fills a store for training, `load_case` gives one CT in memory for prediction, `segment_lungs` is
the classical lung segmentation. ``python -m normnet.prepare`` is the command.
"""

from normnet.prepare.case import ISO_SPACING, LoadedCase, load_case
from normnet.prepare.lungs import segment_lungs, split_lungs
from normnet.prepare.run import CaseSummary, Summary, prepare
from normnet.prepare.store import Case, Store

__all__ = [
    "ISO_SPACING",
    "Case",
    "CaseSummary",
    "LoadedCase",
    "Store",
    "Summary",
    "load_case",
    "prepare",
    "segment_lungs",
    "split_lungs",
]
