"""Sphinx configuration; built with warnings as errors (``nox -s docs``)."""

from importlib.metadata import version as distribution_version

project = "rlcore"
author = "The rlcore authors"
release = distribution_version("rlcore")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"rlcore {release}"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
default_role = "code"
nitpicky = False
suppress_warnings = ["ref.python"]  # the same name re-exported by a package and defined in its module
