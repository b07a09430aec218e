import inspect
import shutil
from pathlib import Path
from typing import get_type_hints

from anndata import AnnData
from matplotlib.axes import Axes
from pandas import DataFrame
from spatialdata import SpatialData
from sphinx.ext.intersphinx import InventoryAdapter

import histovar.training.callbacks

project = "histovar"
author = copyright = "histovar developers"
version = release = histovar.__version__
repository = "https://github.com/histovar/histovar"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "sphinxext.opengraph",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
templates_path = ["_templates"]

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_title = "histovar"
html_theme_options = {
    "repository_url": repository,
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "navbar_persistent": [],  # no second search box: the side bar has one
}

autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False

nb_execution_mode = "off"  # notebooks are committed with their outputs
nb_merge_streams = True  # a single block for all log lines of a cell
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"
copybutton_exclude = ".linenos, .gp, .go"
ogp_site_url = "https://histovar.readthedocs.io/en/latest/"
ogp_image = "_static/demo_map.png"
ogp_social_cards = {"enable": False}

# Without a network, the empty inventory takes the place of each; see ignore_packages_out_of_reach.
intersphinx_mapping = {
    name: (url, (None, "empty.inv"))
    for name, url in {
        "python": "https://docs.python.org/3/",
        "anndata": "https://anndata.readthedocs.io/en/stable/",
        "lightning": "https://lightning.ai/docs/pytorch/stable/",
        "matplotlib": "https://matplotlib.org/stable/",
        "numpy": "https://numpy.org/doc/stable/",
        "pandas": "https://pandas.pydata.org/docs/",
        "scanpy": "https://scanpy.readthedocs.io/en/stable/",
        "spatialdata": "https://spatialdata.scverse.org/en/stable/",
        "torch": "https://docs.pytorch.org/docs/stable/",
    }.items()
}
nitpicky = True
nitpick_ignore = [  # types that their packages do not document as classes
    ("py:class", "numpy.float64"),
    ("py:class", "numpy.int64"),
    ("py:class", "torch._C.Generator"),
]
# Internal types in the signatures of public classes.
nitpick_ignore_regex = [
    ("py:class", rf"histovar\.{name}")
    for name in (
        r"anndata_io\.normalization\.Normalization",
        r"model\.condition\.Moments",
        r"model\.head\.Expectation",
        r"model\.transformer\.Block",
        r"training\.(data\.Spots|statistics\.MeasuredSpots)",
    )
]

# Refer to types by the names under which their packages document them.
for documented, module in (
    (AnnData, "anndata"),
    (SpatialData, "spatialdata"),
    (DataFrame, "pandas"),
    (Axes, "matplotlib.axes"),
    (histovar.training.callbacks.Callback, "lightning.pytorch.callbacks"),
):
    documented.__module__ = module

# Notebooks are at the top level, where users look for them; Sphinx needs them beside its pages.
for notebook in (Path(__file__).parent.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, Path(__file__).parent)


def ignore_packages_out_of_reach(app):
    """Without a network, check only references to this package."""
    reached = InventoryAdapter(app.env).named_inventory
    for name in intersphinx_mapping:
        if not reached.get(name):
            roots = r"(collections|pathlib|os|typing|types)" if name == "python" else name
            app.config.nitpick_ignore_regex.append(("py:.*", rf"{roots}\..*"))


def show_plain_types(app, function, is_method):
    """Show types of arguments and fields without the checks that their annotations contain."""
    function = inspect.unwrap(getattr(function, "__func__", function), stop=_set_plain_types)
    _set_plain_types(function)
    owner = getattr(function, "__qualname__", "").split(".")[0]
    _set_plain_types(getattr(function, "__globals__", {}).get(owner, function))


def _set_plain_types(documented):
    try:
        types = get_type_hints(inspect.unwrap(documented), localns={"Data": AnnData | SpatialData})
        documented.__annotations__ = types
    except (NameError, TypeError, AttributeError):  # names that only type checkers import; built-in functions
        pass


def setup(app):
    app.connect("builder-inited", ignore_packages_out_of_reach, priority=900)  # after intersphinx
    app.connect("autodoc-before-process-signature", show_plain_types)
