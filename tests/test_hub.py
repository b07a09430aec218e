"""Models on the Hugging Face Hub, without a network: from a cache that was filled before."""

import sys

import pytest

import histovar as hv
from histovar.model.checkpoint import verify

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_model_is_loaded_from_the_cache(model, cache):
    folder = cache / "models--lab--breast"
    model.save(folder / "snapshots" / REVISION)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    for address in ("hf://lab/breast", f"hf://lab/breast@{REVISION}"):
        loaded = hv.TwoStageVARST.load(address)
        assert loaded.registry == model.registry
    assert len(verify(folder / "snapshots" / REVISION)) == 64


def test_what_is_not_to_be_had_is_one_line(model, cache, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="path: 'lab/absent' is not to be had from the Hugging Face Hub"
    ) as error:
        hv.TwoStageVARST.load("hf://lab/absent")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="path: expected hf://owner/name"):
        hv.TwoStageVARST.load("hf://absent")
    with pytest.raises(ValueError, match="repository: expected 'owner/name', got 'absent'"):
        model.push("absent")
    with pytest.raises(ConnectionError, match="repository: 'lab/breast' could not be written") as error:
        model.push("lab/breast")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'histovar\[hub\]'"):
        hv.TwoStageVARST.load("hf://lab/breast")


def test_card_for_people_says_what_the_model_is(model, tmp_path):
    model.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: histovar\n")
    for text in (*model.registry["genes"], "180 spots of 3 sections: S1, S2, S3", "X_histology (16 numbers)", "Limits"):
        assert text in card
    (tmp_path / "README.md").write_text("mine")
    model.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
