"""Sphinx: `make docs` builds docs/_build/html from these pages."""

from importlib.metadata import version as installed

project = "fusedres"
author = "fusedres contributors"
release = version = installed("fusedres")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
# Pages of studies and of trainings are there once those have been run; tests/test_docs.py looks for all others.
suppress_warnings = ["toc.not_readable"]
html_theme = "furo"
html_title = "fusedres"
html_show_copyright = False
html_extra_path = ["coverage.csv", "figures.json"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
