"""A procedural healthy chest CT, and an independent pneumonia to add to it.

The embedded default of every command, and what is evaluated on where no labelled patient data is at hand.
Nothing here shares code with the lesion generator: a network must not be tested on what it was trained with.
"""

from __future__ import annotations

from lesionsynth.phantom.chest import ChestCT, chest_ct
from lesionsynth.phantom.pneumonia import Pneumonia, add_pneumonia

__all__ = ["ChestCT", "Pneumonia", "add_pneumonia", "chest_ct"]
