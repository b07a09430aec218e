"""The guide keeps up with the code."""

import runpy
from dataclasses import fields
from pathlib import Path

import pytest

import histovar as hv
from histovar.training import TrainingOptions

ROOT = Path(__file__).parents[1]


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
