import numpy as np
import pytest
import torch

from histovar.metrics import pearson
from histovar.model import MultiScaleGeneVQVAE, SharedVectorQuantizer, group_genes
from histovar.model.quantizer import perplexity, usage

from .conftest import small_config


def test_groups_are_nested_and_follow_coexpression():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(300, 3))
    truth = np.arange(30) % 3
    expression = factor[:, truth] + 0.3 * rng.normal(size=(300, 30))
    groups = group_genes(expression, (1, 3, 10, 30))
    for level, n in zip(groups, (1, 3, 10, 30), strict=True):
        assert sorted(set(level)) == list(range(n))
    for coarse, fine in zip(groups[:-1], groups[1:], strict=True):
        assert all(len(set(coarse[fine == g])) == 1 for g in set(fine))
    assert len({(a, b) for a, b in zip(groups[1], truth, strict=True)}) == 3


@pytest.fixture
def fitted():
    torch.manual_seed(0)
    expression = torch.rand(200, 30) @ torch.rand(30, 30)
    config = small_config()
    stage1 = MultiScaleGeneVQVAE(config)
    stage1.scales.fit(expression, group_genes(expression.numpy(), config.scales))
    return stage1, expression


def test_scales_split_expression_without_loss(fitted):
    stage1, expression = fitted
    parts = stage1.scales.split(stage1.scales.standardize(expression))
    assert [tuple(p.shape[1:]) for p in parts] == [(1, 2), (4, 1), (10, 1), (30, 1)]
    torch.testing.assert_close(stage1.assemble(parts), expression, atol=1e-4, rtol=1e-4)


def test_some_genes_are_encoded_and_decoded_as_among_all(fitted):
    stage1, expression = fitted
    stage1.train()
    stage1.start_codebook(expression)
    stage1.eval()
    some = torch.tensor([2, 7, 28])
    whole, part = stage1(expression), stage1(expression, some)
    n_coarse = sum(stage1.config.scales[:-1])
    assert torch.equal(part.tokens[:, :n_coarse], whole.tokens[:, :n_coarse])
    assert torch.equal(part.tokens[:, n_coarse:], whole.tokens[:, n_coarse + some])
    torch.testing.assert_close(part.rebuilt, whole.rebuilt[:, some])
    rebuilt = stage1.scales.standardize(stage1.decode(whole.tokens))
    torch.testing.assert_close(whole.rebuilt, rebuilt, atol=1e-4, rtol=1e-4)


def test_coarse_scales_explain_most(fitted):
    stage1, expression = fitted
    genes = stage1.scales.standardize(expression)
    parts = stage1.scales.split(genes)
    coarse = sum(stage1.scales.spread(p, k) for k, p in enumerate(parts[:-1]))
    assert (genes - coarse).square().mean() < 0.6 * genes.square().mean()


def test_quantizer_takes_the_nearest_code_and_passes_gradients():
    torch.manual_seed(0)
    quantizer = SharedVectorQuantizer(small_config())
    latents = torch.randn(50, 8, 16, requires_grad=True)
    quantizer.start([latents.detach()])
    quantized, tokens, loss = quantizer(latents)
    distance = torch.cdist(latents.detach().reshape(-1, 16), quantizer.codebook)
    assert torch.equal(tokens.flatten(), distance.argmin(1))
    torch.testing.assert_close(quantizer.decode(tokens), quantized.detach())
    quantized.sum().backward()
    torch.testing.assert_close(latents.grad, torch.ones_like(latents))
    assert loss > 0


def test_moving_average_codebook_follows_its_latents():
    torch.manual_seed(0)
    quantizer = SharedVectorQuantizer(small_config(codebook_decay=0.5))
    latents = torch.randn(40, 8, 16)
    quantizer.start([latents])
    moved = latents + 0.5
    before = quantizer(moved)[2]
    for _ in range(20):
        quantizer.update([moved], [quantizer.encode(moved)])
    assert quantizer(moved)[2] < 0.7 * before


def test_gradient_codebook_is_a_parameter_that_learns():
    torch.manual_seed(0)
    quantizer = SharedVectorQuantizer(small_config(codebook_update="gradient"))
    quantizer(torch.randn(10, 8, 16))[2].backward()
    assert [p.grad.abs().sum() > 0 for p in quantizer.parameters()] == [True]


def test_usage_and_perplexity():
    counts = usage(torch.tensor([[0, 1], [2, 3]]), 8)
    assert counts.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert float(perplexity(counts)) == pytest.approx(4)


def test_trained_stage_reconstructs_and_uses_its_codes(model, prepared):
    genes = model.registry["genes"]
    expression = torch.from_numpy(prepared[:, genes].layers["lognorm"].toarray())
    tokens = model.tokenize(expression)
    assert tokens.shape == (prepared.n_obs, 45)
    assert pearson(model.decode(tokens).numpy(), expression.numpy()).mean() > 0.95
    assert (model.stage1.code_counts.sum(0) > 0).float().mean() > 0.5
    assert torch.equal(model.reconstruct(expression), model.decode(tokens))
