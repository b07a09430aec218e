import json

import pytest

from histovar import ModelConfig, TwoStageVARST
from histovar.model import count_parameters


def test_reference_has_the_parameters_of_the_reference():
    model = TwoStageVARST(ModelConfig.reference())
    stage2 = model.var_stage
    assert count_parameters([model.stage1]) == 649_604
    assert count_parameters([stage2.condition]) == 799_296
    assert count_parameters([stage2.transformer, stage2.head]) == 84_036_096
    assert count_parameters([model]) == 85_484_996


def test_default_is_small():
    model = TwoStageVARST(ModelConfig.default(200, 1024))
    assert 500_000 < count_parameters([model]) < 4_000_000
    assert model.config.n_tokens == 241


@pytest.mark.parametrize("config", [ModelConfig.reference(), ModelConfig.default(77, (32, 16), n_covariates=3)])
def test_json_round_trip(config):
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("n_genes", [20, 33, 1000])
def test_default_takes_any_number_of_genes(n_genes):
    assert ModelConfig.default(n_genes).scales[-1] == n_genes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": (1, 8, 8, 200)}, "scales: expected numbers that increase"),
        ({"scales": (1, 8, 32, 100)}, "the last of scales must be n_genes=200"),
        ({"components": (4, 2, 1)}, "components needs one number a scale"),
        ({"components": (4, 2, 1, 2)}, "the last of components must be 1"),
        ({"width": 100, "n_heads": 8}, "width=100 must be divisible by n_heads=8"),
        ({"dropout": 1.0}, "dropout: expected less than 1, got 1.0"),
        ({"order": "diagonal"}, "order: expected 'scale' or 'token', got 'diagonal'"),
        ({"n_neighbors": (8, 8)}, "n_neighbors: expected numbers that increase"),
        ({"codebook_size": 0}, "codebook_size: expected at least 1, got 0"),
        ({"codebook_size": 2**31}, "codebook_size: expected at most 2147483647"),
        ({"n_members": 1}, "n_members=1 cannot be cross-fitted"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.default(200).replace(**changes)


def test_unknown_fields_are_refused():
    values = json.loads(ModelConfig.default(50).to_json()) | {"colour": "red"}
    with pytest.raises(ValueError, match="unknown fields.*colour"):
        ModelConfig.from_json(json.dumps(values))
