"""Attention masks of the transformer, and agreement of all ways of generating tokens."""

import numpy as np
import pytest
import torch

from histovar.model import Decoding, Histology, TwoStageVARST
from histovar.model.dropout import dropout
from histovar.model.feedforward import FeedForward
from histovar.model.head import TokenHead

from .conftest import small_config


def histology_of(config, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sources = tuple(torch.randn(n, width, generator=generator) for width in config.aligned_dims)
    place = torch.rand(n, 2 * config.coordinates, generator=generator)
    return Histology(sources, place, torch.randn(n, config.n_covariates, generator=generator), torch.zeros(n))


@pytest.fixture(params=[("scale", 64), ("scale", 1), ("token", 1)], ids=["scale", "wide", "token"])
def ordered(request, loaded):
    """The trained model in either order, or with scales that do not attend to themselves; its head is not at zero."""
    order, limit = request.param
    config = loaded.config.replace(order=order, attention_limit=limit)
    state = loaded.stage2.state_dict()
    loaded.add_stage2(config)
    loaded.stage2.load_state_dict(state)
    torch.manual_seed(0)
    torch.nn.init.normal_(loaded.stage2.head.output.weight, std=0.5)
    return loaded.eval()


def scale_of(config):
    return np.repeat(np.arange(len(config.scales)), config.scales)


@torch.no_grad()
def test_no_token_sees_itself_or_what_comes_after(ordered):
    config, scales = ordered.config, scale_of(ordered.config)
    histology = histology_of(config, 2)
    tokens = torch.randint(0, config.codebook_size, (2, config.n_tokens))
    before = ordered.token_logits(histology, tokens)
    reached = 0
    for t in range(config.n_tokens):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 17) % config.codebook_size
        moved = (ordered.token_logits(histology, changed) - before).abs().amax((0, 2)) > 1e-5
        forbidden = scales <= scales[t] if config.order == "scale" else np.arange(config.n_tokens) <= t
        assert not moved.numpy()[forbidden].any()
        reached += int(moved.any())
    assert reached > 5


@torch.no_grad()
def test_first_token_is_predicted_from_the_condition(ordered):
    config = ordered.config
    tokens = torch.zeros(2, config.n_tokens, dtype=torch.long)
    first = [ordered.token_logits(histology_of(config, 2, seed), tokens)[:, 0] for seed in (0, 1)]
    assert (first[0] - first[1]).abs().max() > 1e-3
    assert first[0].std() > 0


@torch.no_grad()
def test_cached_generation_agrees_with_teacher_forcing(ordered):
    histology = histology_of(ordered.config)
    made = ordered.predict(histology, Decoding("greedy"), keep_logits=True)
    torch.testing.assert_close(ordered.token_logits(histology, made.tokens), made.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_wide_scale_is_the_same_in_chunks(loaded, monkeypatch):
    """Given coarser scales, tokens of a wide scale are independent, so they are generated and trained in chunks."""
    state = loaded.stage2.state_dict()
    loaded.add_stage2(loaded.config.replace(attention_limit=1))
    loaded.stage2.load_state_dict(state)
    torch.manual_seed(0)
    torch.nn.init.normal_(loaded.stage2.head.output.weight, std=0.5)
    loaded.eval()
    histology, config = histology_of(loaded.config), loaded.config
    whole = loaded.predict(histology)
    scored_whole = loaded.token_loss_and_rank(histology, whole.tokens)
    monkeypatch.setattr("histovar.model.transformer.TOKENS_AT_ONCE", 7)
    monkeypatch.setattr("histovar.model.decoding.SPOTS_AT_ONCE", 4)
    torch.testing.assert_close(loaded.predict(histology).expression, whole.expression, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr("histovar.model.feedforward.HIDDEN_AT_ONCE", 512)
    monkeypatch.setattr("histovar.model.code_softmax.LOGITS_AT_ONCE", 512)
    torch.testing.assert_close(loaded.predict(histology).expression, whole.expression, atol=1e-4, rtol=1e-4)
    genes = torch.tensor([0, 3, 4, 21])
    n_coarse = config.n_tokens - config.n_genes
    columns = torch.cat([torch.arange(n_coarse), n_coarse + genes])
    for genes_asked, asked in ((None, slice(None)), (genes, columns)):
        scored = loaded.token_loss_and_rank(histology, whole.tokens, genes=genes_asked)
        for some, every in zip(scored, scored_whole, strict=True):
            torch.testing.assert_close(some, every[:, asked], atol=1e-3, rtol=1e-4)


def test_both_implementations_of_attention_agree(ordered, monkeypatch):
    """Plain products and ``scaled_dot_product_attention``: the same scores, predictions and gradients."""
    histology, config = histology_of(ordered.config), ordered.config
    tokens = torch.randint(0, config.codebook_size, (6, config.n_tokens), generator=torch.Generator().manual_seed(0))
    weights = [p for name, p in ordered.stage2.transformer.named_parameters() if "self_attention" in name]

    def found():
        logits = ordered.token_logits(histology, tokens)
        return ordered.predict(histology).expression, logits, *torch.autograd.grad(logits.square().mean(), weights)

    few = found()
    monkeypatch.setattr("histovar.model.transformer.FEW_KEYS", 0)
    for plain, library in zip(few, found(), strict=True):
        torch.testing.assert_close(plain, library, atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("style", ["modern", "reference"])
def test_mixed_precision_loses_little_of_loss_and_ranks(loaded, style):
    torch.manual_seed(0)
    if style == "reference":
        loaded.add_stage2(loaded.config.replace(n_members=0, style=style))
        loaded.stage2.head.set_codes(loaded.stage1)
    histology, config = histology_of(loaded.config, 32), loaded.eval().config
    tokens = loaded.predict(histology, Decoding("sample"), generator=torch.Generator().manual_seed(0)).tokens
    loss, rank = loaded.token_loss_and_rank(histology, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed_loss, mixed_rank = loaded.token_loss_and_rank(histology, tokens)
        expression = torch.rand(32, config.n_genes)
        mixed_tokens = loaded.stage1(expression).tokens
    assert (loss - mixed_loss).abs().max() < 0.05
    assert ((rank < 5) != (mixed_rank < 5)).float().mean() < 0.05
    assert mixed_tokens.equal(loaded.tokenize(expression))


@torch.no_grad()
def test_half_precision_means_are_near(loaded):
    loaded.stage2.head.gate.fill_(1)
    histology = histology_of(loaded.config, 32)
    full, half = loaded.predict(histology), loaded.in_precision("bf16").predict(histology)
    apart = (full.expression - half.expression).abs() / loaded.stage1.scales.std
    assert 0 < apart.mean() < 0.01
    assert ((full.std - half.std).abs() / loaded.stage1.scales.std).mean() < 0.01
    assert loaded.predict(histology).expression.equal(full.expression)  # the model itself is as it was


@torch.no_grad()
@pytest.mark.parametrize("style", ["modern", "reference"])
def test_half_precision_means_are_near_without_a_prior(loaded, style):
    torch.manual_seed(0)
    loaded.add_stage2(loaded.config.replace(n_members=0, style=style))
    loaded.stage2.head.set_codes(loaded.stage1)
    torch.nn.init.normal_(loaded.stage2.head.output.weight, std=0.1)
    histology = histology_of(loaded.config, 32)
    full, half = loaded.eval().predict(histology), loaded.in_precision("bf16").predict(histology)
    apart = (full.expression - half.expression).abs() / loaded.stage1.scales.std
    assert full.expression.std(0).min() > 0  # else it would be near whatever the head made of it
    assert 0 < apart.mean() < 0.01
    assert ((full.std - half.std).abs() / loaded.stage1.scales.std).mean() < 0.01


@torch.no_grad()
@pytest.mark.parametrize("codebook_dim", [16, 64], ids=["narrow codes", "wide codes"])
def test_expected_values_are_the_means_over_the_logits(codebook_dim):
    torch.manual_seed(0)
    model = TwoStageVARST(small_config(codebook_dim=codebook_dim, embedding_dims=(16,))).eval()
    model.stage1.code_counts += 1
    model.stage2.head.set_codes(model.stage1)
    for parameter in model.stage2.head.output.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    generated = model.predict(histology_of(model.config), keep_logits=True)
    for k, logits in enumerate(generated.logits.split(model.config.scales, 1)):
        assert logits.softmax(-1).max() < 0.99  # else the mean is a single code's value
        expected = logits.softmax(-1) @ model.stage1.code_values(k)
        torch.testing.assert_close(generated.values[k], expected, atol=1e-5, rtol=1e-4)
    assert (generated.tokens == generated.logits.argmax(-1)).float().mean() > 0.99  # but for ties


@torch.no_grad()
@pytest.mark.parametrize("gate", [(0, 0, 0, 0), (0, 0.5, 0, 0), (0, 0, 0, 1)])
def test_what_is_left_out_does_not_change_the_rest(ordered, gate):
    ordered.stage2.head.gate.copy_(torch.tensor(gate))
    histology = histology_of(ordered.config)
    whole = ordered.predict(histology)
    for tokens in (True, False):
        part = ordered.predict(histology, tokens=tokens, std=False)
        torch.testing.assert_close(part.expression, whole.expression, atol=1e-5, rtol=1e-5)
        assert part.std is None
        assert (part.tokens is not None and part.tokens.equal(whole.tokens)) if tokens else part.tokens is None


def test_both_orders_have_the_same_weights():
    one, other = (TwoStageVARST(small_config(embedding_dims=(16,), order=order)) for order in ("scale", "token"))
    other.load_state_dict(one.state_dict())
    assert [n for n, _ in one.named_parameters()] == [n for n, _ in other.named_parameters()]


@torch.no_grad()
def test_sampling_repeats_with_its_seed_and_varies_without(ordered):
    histology = histology_of(ordered.config)

    mean = ordered.prior_members(histology).mean(0, keepdim=True)

    def draw(seed, **rule):
        generator = torch.Generator().manual_seed(seed)
        return ordered.predict(histology, Decoding("sample", **rule), members=mean, generator=generator).tokens

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    greedy = ordered.predict(histology, Decoding("greedy")).tokens
    assert torch.equal(draw(0, top_k=1), greedy)
    assert torch.equal(draw(0, top_p=1e-6), greedy)


@torch.no_grad()
def test_mean_of_samples_is_the_expected_decoding(model):
    histology = histology_of(model.config, 4)
    expected = model.predict(histology)
    drawn = model.predict(
        histology, Decoding("sample"), n_samples=600, generator=torch.Generator().manual_seed(0)
    ).expression.view(4, 600, -1)
    error = (drawn.mean(1) - expected.expression).abs()
    assert (error < 0.25 * expected.std).float().mean() > 0.9
    ratio = drawn.std(1) / expected.std
    assert 0.8 < ratio.median() < 1.25


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert (Decoding("sample", top_k=2).filter(logits) > 0).tolist() == [[True, True, False, False]]
    assert (Decoding("sample", top_p=0.7).filter(logits) > 0).tolist() == [[True, True, False, False]]
    hot = Decoding("sample", temperature=1e4).filter(logits)
    torch.testing.assert_close(hot, torch.full((1, 4), 0.25), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"mode": "best"}, "mode: expected 'expected', 'sample' or 'greedy', got 'best'"),
        ({"temperature": 0}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_impossible_rules_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**rule)


@torch.no_grad()
def test_gate_decides_between_prior_and_token_model(ordered):
    histology = histology_of(ordered.config)
    head = ordered.stage2.head
    head.gate.zero_()
    closed = ordered.predict(histology).expression
    prior = ordered.conditional_mean(histology)
    torch.testing.assert_close(closed, ordered.stage1.scales.restore(prior), atol=1e-3, rtol=1e-3)
    head.gate.fill_(1)
    assert (ordered.predict(histology).expression - closed).abs().max() > 1e-3


def test_gate_opens_for_what_helps_and_not_by_chance():
    torch.manual_seed(0)

    def best(n_spots, signal):
        truth, noise = torch.randn(2, n_spots, 8, 1)
        return TokenHead.best_gate(truth, torch.zeros_like(truth), 2 * (signal * truth + (1 - signal) * noise))

    assert best(2000, 0.0) < 0.05
    assert 0.4 < best(2000, 1.0) <= 0.5  # the shift is twice what it should be
    assert sum(best(25, 0.0) > 0 for _ in range(200)) < 20


def test_loss_matches_cross_entropy(loaded):
    config = loaded.config
    loaded.add_stage2(config)
    loaded.stage2.head.set_codes(loaded.stage1)
    torch.manual_seed(0)
    torch.nn.init.normal_(loaded.stage2.head.output.weight, std=0.5)
    loaded.eval()
    histology = histology_of(config)
    used = (loaded.stage1.code_counts[-1] > 0).nonzero()[:, 0]
    tokens = used[torch.randint(0, len(used), (6, config.n_tokens))]
    loss = loaded.token_loss(histology, tokens)[:, -config.n_genes :]
    logits = loaded.token_logits(histology, tokens)[:, -config.n_genes :]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, -config.n_genes :], reduction="none")
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-3)
    weight = loaded.stage2.head.output.weight
    ours, theirs = (torch.autograd.grad(x.sum(), weight, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-3)


@torch.no_grad()
def test_a_code_never_used_is_learnt_as_the_one_of_nearest_value(loaded):
    histology = histology_of(loaded.config)
    k = len(loaded.config.scales) - 1
    values, is_used = loaded.stage1.code_values(k)[:, 0], loaded.stage1.code_counts[k] > 0
    unused = (~is_used).nonzero()[0, 0]
    used = is_used.nonzero()[:, 0]
    nearest = used[(values[used] - values[unused]).abs().argmin()]
    tokens = used[torch.randint(0, len(used), (6, loaded.config.n_tokens))]
    losses = []
    for code in (unused, nearest):
        tokens[:, -1] = code  # the last token of the finest scale, which no other takes in
        losses.append(loaded.token_loss(histology, tokens)[:, -1])
    assert losses[0].max() < 100
    torch.testing.assert_close(*losses)


@torch.no_grad()
def test_rank_counts_the_codes_that_are_more_probable(ordered):
    histology = histology_of(ordered.config)
    tokens = ordered.predict(histology, Decoding("sample"), generator=torch.Generator().manual_seed(0)).tokens
    loss, rank = ordered.token_loss_and_rank(histology, tokens)
    assert torch.equal(loss, ordered.token_loss(histology, tokens))
    logits = ordered.token_logits(histology, tokens)
    own = logits.gather(2, tokens[..., None])
    # Codes within rounding of the true one may be counted either way.
    fewest, most = ((logits > own + margin).sum(2) for margin in (1e-3, -1e-3))
    assert (rank >= fewest).all() and (rank <= most).all()
    assert rank.unique().numel() > 10


def test_training_one_stage_freezes_the_other():
    model = TwoStageVARST(small_config(embedding_dims=(16,)))
    model.set_training_stage(1)
    assert all(p.requires_grad for p in model.stage1.parameters())
    assert not any(p.requires_grad for p in model.stage2.parameters())
    assert model.stage1.training and not model.stage2.training
    model.set_training_stage(2)
    assert not any(p.requires_grad for p in model.stage1.parameters())
    assert model.stage2.training and not model.stage1.training
    with pytest.raises(ValueError, match="stage must be 1 or 2"):
        model.set_training_stage(3)
    with pytest.raises(ValueError, match="no stage 2"):
        TwoStageVARST(small_config()).set_training_stage(2)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_keeps_the_expectation_and_drops_each_element_by_itself(p):
    torch.manual_seed(0)
    x = torch.ones(400, 96, requires_grad=True)
    y = dropout(x, p, training=True)
    y.sum().backward()
    dropped = (y == 0).float()
    assert abs(dropped.mean() - p) < 0.01 and abs(y.mean() - 1) < 0.02
    assert torch.equal(x.grad, y.detach())
    # Eight elements come of one random number.
    together = torch.corrcoef(dropped.view(-1, 8).T) - torch.eye(8)
    assert together.abs().max() < 0.06
    assert dropout(x, p, training=False) is x


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_feed_forward_of_some_rows_at_a_time(activation, monkeypatch):
    monkeypatch.setattr("histovar.model.feedforward.HIDDEN_AT_ONCE", 100)  # seven rows at a time
    torch.manual_seed(0)
    layers, x = FeedForward(6, 14, activation, dropout=0.0), torch.randn(5, 4, 6, requires_grad=True)
    at_once, before = torch.nn.Sequential(*layers), x.detach().clone()
    expected = at_once(x)
    torch.testing.assert_close(layers(x), expected)
    wanted = (x, *layers.parameters())
    some, every = (torch.autograd.grad(made(x).square().sum(), wanted) for made in (layers, at_once))
    torch.testing.assert_close(some, every)
    with torch.no_grad():
        # Rows of less precision, as under autocast.
        torch.testing.assert_close(layers(x.bfloat16()), expected, atol=0.03, rtol=0)
    assert torch.equal(x, before)


def test_feed_forward_drops_in_training_alone():
    layers, x = FeedForward(6, 64, "relu", dropout=0.5), torch.randn(3, 6)
    assert not torch.equal(layers(x), layers(x))
    layers.eval()
    assert torch.equal(layers(x), layers(x))


def test_options_of_the_condition_reach_the_prediction(loaded):
    config = loaded.config.replace(coordinates=True, n_covariates=2)
    loaded.add_stage2(config)
    loaded.stage2.head.set_codes(loaded.stage1)
    histology = histology_of(config)
    loaded.eval()
    base = loaded.predict(histology).expression
    for changed in (
        histology._replace(coordinates=1 - histology.coordinates),
        histology._replace(covariates=histology.covariates + 1),
        histology._replace(sources=(*histology.sources[:-1], histology.sources[-1] + 1)),
    ):
        assert (loaded.predict(changed).expression - base).abs().max() > 1e-4
