"""Calls that find lungs by thresholds: for tests that are about something else, and on bodies of boxes.

The lung network is slower, and what it makes of such bodies nobody has promised.
"""

from __future__ import annotations

from functools import partial

from normnet import prepare as package

FLAGS = ["--lungs", "classical"]
"""The same for the commands."""

load_case = partial(package.load_case, lungs="classical")
prepare = partial(package.prepare, lungs="classical")
