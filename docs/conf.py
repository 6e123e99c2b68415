"""Sphinx: `pip install -e ".[docs]" && sphinx-build -W docs site`."""

project = "flax_nets"
author = "flax_nets contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
autodoc_typehints = "description"
