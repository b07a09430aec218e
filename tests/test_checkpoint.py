import json
from pathlib import Path

import numpy as np
import pytest
import torch

import histovar as hv

from .conftest import small_config


def test_saved_model_predicts_the_same(model, query, tmp_path):
    model.save(tmp_path / "m")
    again = hv.TwoStageVARST.load(tmp_path / "m")
    assert again.registry == model.registry and again.config == model.config
    one, other = (hv.tl.predict(query, m, copy=True) for m in (model, again))
    np.testing.assert_array_equal(one.obsm["histovar"], other.obsm["histovar"])
    for stage, frame in model.history.items():
        np.testing.assert_allclose(again.history[stage], frame)
    assert {f.suffix for f in (tmp_path / "m").iterdir()} == {".json", ".safetensors"}


def test_stages_travel_apart(model, query, tmp_path):
    model.save_stage(tmp_path / "one", 1)
    model.save_stage(tmp_path / "two", 2)
    alone = hv.TwoStageVARST.load(tmp_path / "one")
    assert alone.stage2 is None
    with pytest.raises(ValueError, match="no stage 2"):
        hv.tl.predict(query, alone)
    alone.load_stage(tmp_path / "two", 2)
    expected, made = (hv.tl.predict(query, m, copy=True).obsm["histovar"] for m in (model, alone))
    np.testing.assert_array_equal(expected, made)
    with pytest.raises(ValueError, match="holds stages"):
        alone.load_stage(tmp_path / "two", 1)
    with pytest.raises(ValueError, match="stage 2 alone"):
        hv.TwoStageVARST.load(tmp_path / "two")


def test_other_genes_are_refused(model, tmp_path):
    model.save(tmp_path / "m")
    other = hv.TwoStageVARST(small_config())
    other.registry["genes"] = ["A", "B"]
    with pytest.raises(ValueError, match="genes of"):
        other.load_stage(tmp_path / "m", 1)


def test_what_is_not_a_model_is_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model directory"):
        hv.TwoStageVARST.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not a saved model"):
        hv.TwoStageVARST.load(tmp_path / "empty")

    path = tmp_path / "m"
    model.save(path)
    card = json.loads((path / "model.json").read_text())

    def written(text):
        (path / "model.json").write_text(text)
        return path

    with pytest.raises(ValueError, match="truncated or not JSON"):
        hv.TwoStageVARST.load(written(json.dumps(card)[:100]))
    with pytest.raises(ValueError, match="does not describe a histovar model"):
        hv.TwoStageVARST.load(written("{}"))
    with pytest.raises(ValueError, match="upgrade histovar"):
        hv.TwoStageVARST.load(written(json.dumps(card | {"format_version": 99})))
    with pytest.raises(ValueError, match="does not fit the configuration"):
        hv.TwoStageVARST.load(written(json.dumps(card | {"config": card["config"] | {"prior_hidden": 7}})))
    written(json.dumps(card))
    weights = path / "stage1.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        hv.TwoStageVARST.load(path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="lacks stage1.safetensors"):
        hv.TwoStageVARST.load(path)


def test_stage2_cannot_be_put_on_another_stage1(model):
    config = model.config.replace(codebook_size=64)
    with pytest.raises(ValueError, match="codebook_size.*differ from the trained stage 1"):
        model.add_stage2(config)
    assert isinstance(model.stage2.transformer.parents, torch.Tensor)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "data").glob("model-*")), ids=lambda p: p.name)
def test_models_of_every_release_still_predict(path, query):
    model = hv.TwoStageVARST.load(path)
    hv.tl.predict(query, model)
    hv.tl.evaluate(query)
    assert query.uns["histovar"]["evaluation"].loc["S4", "PCC-all"] > 0.2
