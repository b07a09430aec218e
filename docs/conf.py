import inspect
import shutil
from pathlib import Path
from typing import get_type_hints

from anndata import AnnData
from spatialdata import SpatialData

import histovar

project = "histovar"
author = copyright = "histovar developers"
version = release = histovar.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_title = "histovar"
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
templates_path = ["_templates"]

nb_execution_mode = "off"  # the notebook is committed with its outputs
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

# Notebooks live at the top level, where users look for them; Sphinx wants them beside its pages.
for notebook in (Path(__file__).parent.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, Path(__file__).parent)


def show_plain_types(app, function, is_method):
    """Show types of arguments, and of a class's fields, without the conditions that their annotations hold."""
    function = inspect.unwrap(getattr(function, "__func__", function), stop=_set_plain_types)
    owner = getattr(function, "__qualname__", "").split(".")[0]
    _set_plain_types(getattr(function, "__globals__", {}).get(owner, function))


def _set_plain_types(documented):
    try:
        types = get_type_hints(inspect.unwrap(documented), localns={"Data": AnnData | SpatialData})
        documented.__annotations__ = types
    except (NameError, TypeError, AttributeError):  # names for type checkers alone; built-in functions
        pass


def setup(app):
    app.connect("autodoc-before-process-signature", show_plain_types)
