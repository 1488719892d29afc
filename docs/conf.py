"""Sphinx configuration; built with warnings as errors (``nox -s docs``)."""

import sys
from importlib.metadata import version as distribution_version
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
import configuration_keys
import framework_keys

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


def setup(app: Sphinx) -> None:
    """Generate the pages of keys before the sources are read."""
    app.connect("builder-inited", lambda app: configuration_keys.write(Path(app.srcdir, "generated", "keys.md")))
    app.connect("builder-inited", lambda app: framework_keys.write(Path(app.srcdir, "generated", "framework-keys.md")))
