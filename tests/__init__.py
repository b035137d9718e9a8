"""Tests; a package, so that test modules share `tests.oracles` and `tests.tolerances`."""
