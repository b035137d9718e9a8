"""Sphinx configuration; `make docs` builds with warnings as errors and without network."""

from __future__ import annotations

import lesionsynth

project = "lesionsynth"
author = "lesionsynth developers"
copyright = "lesionsynth developers"
version = release = lesionsynth.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "lesionsynth"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

napoleon_google_docstring = False
napoleon_use_ivar = True  # attributes sections of dataclasses do not collide with their annotations
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and units stand in the docstrings
autodoc_default_options = {"members": True}
default_role = "code"

rst_epilog = r".. |M| replace:: \|M\|"  # the number of mask voxels, as docstrings write it
suppress_warnings = ["ref.python"]  # attributes called alike in several classes, such as spacing
