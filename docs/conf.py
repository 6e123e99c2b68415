"""Sphinx: `pip install -e ".[docs]" && sphinx-build -W docs site`."""

project = "flax_nets"
author = "flax_nets contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_heading_anchors = 2  # docs/networks.md links to its own sections
autodoc_typehints = "description"
