"""Models on the Hugging Face Hub, without a network, from a cache that was filled before."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import histovar as hv
from histovar.model.checkpoint import verify
from histovar.model.summary import summarize

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


def test_models_that_cannot_be_fetched_are_one_line(model, cache, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="path: 'lab/absent' could not be downloaded from the Hugging Face Hub"
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


def test_card_for_people_says_what_the_model_is(model, tmp_path, caplog):
    model.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: histovar\n")
    for text in (*model.registry["genes"], "180 spots of 3 sections: S1, S2, S3", "X_histology (16 numbers)", "Limits"):
        assert text in card
    assert not caplog.messages
    for others in ("mine", card.replace("the end of what is written", "the end")):
        caplog.clear()
        (tmp_path / "README.md").write_text(others)
        model.save(tmp_path)
        assert (tmp_path / "README.md").read_text() == others
        assert len(caplog.messages) == 1 and "README.md: the marks around histovar's description" in caplog.text
    (tmp_path / "README.md").write_text(card.split("---\n\n")[1])
    model.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == card


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_what_people_write_around_the_card_stays(loaded, tmp_path):
    """Text above, below and in the metadata stays; the model's own part is written anew."""
    file = tmp_path / "README.md"
    loaded.save(tmp_path)
    assert "license" not in metadata(file.read_text()) and "Tissue" not in file.read_text()
    card = file.read_text().replace("# Gene expression from H&E histology", "# Our model\n\nBy us.")
    card = card.replace("tags:\n", "datasets: [lab/breast]\ntags:\n- ours\n").replace("180 spots", "7 spots")
    file.write_text(card + "\nThanks to everybody.\n")
    loaded.describe(tissue="breast cancer", species="human", licence="cc-by-4.0")
    loaded.save(tmp_path)
    card = file.read_text()
    assert (
        "# Our model\n\nBy us." in card and card.endswith("\nThanks to everybody.\n") and "H&E histology\n" not in card
    )
    assert "180 spots" in card and " 7 spots" not in card and "| Tissue | breast cancer |" in card
    there = metadata(card)
    assert there["license"] == "cc-by-4.0" and there["datasets"] == ["lab/breast"]
    assert {"ours", "histology", "breast-cancer", "human"} <= set(there["tags"])
    model = hv.TwoStageVARST.load(tmp_path)
    assert model.registry["description"] == {"tissue": "breast cancer", "species": "human", "licence": "cc-by-4.0"}
    model.describe(licence="For use within the lab")
    model.save(tmp_path)
    assert metadata(file.read_text())["license"] == "other"
    assert metadata(file.read_text())["license_name"] == "For use within the lab"
    model.save(tmp_path)
    again = file.read_text()
    model.save(tmp_path)
    assert file.read_text() == again


def test_metadata_say_what_is_described_now(loaded, tmp_path):
    """Tags and licence of an earlier description go; those that people wrote stay."""
    file = tmp_path / "README.md"

    def saved(**description):
        loaded.describe(**description)
        loaded.save(tmp_path)
        return metadata(file.read_text())

    loaded.registry["description"] = None
    saved(tissue="breast | Duct", species="human", licence="Apache-2.0")
    file.write_text(file.read_text().replace("tags:\n", "tags:\n- ours\n"))
    there = saved(tissue="lung")
    assert {"ours", "lung", "human", "histology"} <= set(there["tags"]) and "breast-|-duct" not in there["tags"]
    assert there["license"] == "apache-2.0" and "license_name" not in there
    there = saved(tissue="", licence="proprietary")
    assert "lung" not in there["tags"] and (there["license"], there["license_name"]) == ("other", "proprietary")
    assert not {"license", "license_name"} & set(saved(licence=""))
    facts = summarize(loaded.registry, loaded.config)
    assert facts["Species"] == "human" and not {"Tissue", "Licence"} & set(facts)


def test_one_stage_is_saved_with_what_is_described_now(loaded, tmp_path):
    loaded.describe(tissue="breast", licence="mit")
    loaded.save(tmp_path)
    loaded.registry["description"] = {"tissue": "lung"}
    for stage, species in ((1, "human"), (2, "mouse")):
        loaded.describe(species=species)
        loaded.save_stage(tmp_path, stage)
        described = hv.TwoStageVARST.load(tmp_path).registry["description"]
        assert described == {"tissue": "lung", "licence": "mit", "species": species}
    for stage in (1, 2):
        loaded.describe(tissue="breast", licence="mit")
        loaded.save(tmp_path)
        loaded.describe(tissue="")
        loaded.save_stage(tmp_path, stage)
        assert "Tissue" not in (tmp_path / "README.md").read_text()
        again = hv.TwoStageVARST.load(tmp_path)
        assert not again.registry["description"]["tissue"] and again.registry["description"]["licence"] == "mit"


def test_push_keeps_what_people_wrote_on_the_hub(loaded, cache, monkeypatch):
    import huggingface_hub

    uploaded = {}

    class Api:
        def create_repo(self, *_, **__):
            pass

        def upload_folder(self, *, folder_path, **_):
            uploaded.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
            return SimpleNamespace(oid=REVISION)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder = cache / "models--lab--breast"
    loaded.save(folder / "snapshots" / REVISION)
    with (folder / "snapshots" / REVISION / "README.md").open("a") as file:
        file.write("\nThanks to everybody.\n")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    loaded.describe(tissue="breast")
    assert loaded.push("lab/breast") == REVISION
    card = uploaded["README.md"].decode()
    assert "| Tissue | breast |" in card and card.endswith("\nThanks to everybody.\n")
    assert {"model.json", "stage1.safetensors", "stage2.safetensors"} <= set(uploaded)
