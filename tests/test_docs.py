"""The documentation agrees with the code."""

import inspect
import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

import histovar as hv
from histovar.training import TrainingOptions

ROOT = Path(__file__).parents[1]


VERBS = [getattr(module, name) for module in (hv.pp, hv.tl, hv.pl, hv.get) for name in module.__all__]
# What a parameter is, in the same words wherever there is one of its name; what a verb does with it may follow.
# Docstrings hold these words themselves, for editors, help() and Sphinx to show the same.
SHARED = {
    "ax": ("Axes to draw on", "Two axes to draw on"),
    "batch_size": ("Spots in a batch.", "Patches in a batch."),
    "copy": ("Return a copy of the table instead of writing in place.",),
    "data": ("AnnData or SpatialData",),
    "device": ('``"auto"`` (CUDA if there is any, else the CPU) or a torch device.',),
    "group_key": ("Column of ``obs`` with the individual (patient, animal)",),
    "key": ("Prefix of the slots",),
    "key_added": ("Prefix of the slots",),
    "library_key": ("Column of ``obs`` with the section",),
    "random_state": ("Seed",),
    "save": ("File to write.",),
    "show": ("Call ``plt.show()``.",),
    "show_progress_bar": ("Show progress",),
    "spatial_key": ("Key of ``obsm`` with coordinates",),
    "table_name": ("Table of a SpatialData.",),
    "use_rep": ("Key of ``obsm``",),
}


def parameters(verb):
    """Names and descriptions in a docstring's section of parameters."""
    section = (inspect.getdoc(verb) or "").partition("Parameters\n----------\n")[2].partition("\n\n")[0]
    for entry in re.split(r"\n(?=\S)", section):
        names, _, text = entry.partition("\n")
        yield from ((name.lstrip("*"), " ".join(text.split())) for name in names.split(", "))


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: f"{verb.__module__}.{verb.__name__}")
def test_parameters_are_described_in_the_same_words(verb):
    described = dict(parameters(verb))
    assert set(described) == set(inspect.signature(verb).parameters)
    for name, text in described.items():
        if name in SHARED and not text.startswith("As in :func:"):
            assert text.startswith(SHARED[name]), f"{name}: {text}"


@pytest.mark.parametrize("name", [f.name for c in (hv.ModelConfig, TrainingOptions) for f in fields(c)])
def test_guide_describes_every_parameter(name):
    assert f"`{name}`" in (ROOT / "docs" / "guide.md").read_text()


@pytest.mark.parametrize("module", ["pp", "tl", "pl", "get", "io", "datasets", "encoders"])
def test_api_lists_every_public_function(module):
    text = (ROOT / "docs" / "api.md").read_text()
    names = getattr(hv, module).__all__
    assert all(f"{module}.{name}\n" in text for name in names)


def test_page_of_scores_is_that_of_the_registry():
    page = runpy.run_path(str(ROOT / "docs" / "metrics.py"))["page"]
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == page()


def test_changelog_has_this_version():
    assert f"## [{hv.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
