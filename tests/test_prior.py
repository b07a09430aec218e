"""The conditional mean: members trained on all spots, cross-fitted members, and the linear part."""

import pytest
import torch

import histovar as hv
from histovar.model.linear import LinearPart
from histovar.model.prior import ConditionalMeanPrior
from histovar.training.linear import fit_depth, fit_linear

from .conftest import small_config

VIEWS = [[range(2), range(2, 6)], [range(2, 8)]]


def make(of_rates=False):
    torch.manual_seed(0)
    prior = ConditionalMeanPrior(small_config(n_genes=12, scales=(1, 4, 10, 12)), VIEWS, 8).eval()
    prior.set_trained(of_rates=of_rates, n_folds=3)
    return prior


@pytest.fixture
def prior():
    return make()


def squared_error(targets):
    return lambda predicted: (predicted - targets).square().mean(2)


def test_members_learn_from_the_spots_they_may_see_alone(prior):
    features, targets = torch.randn(20, 8), torch.randn(20, 12)
    folds = torch.arange(20) % 3
    prior.loss(features, squared_error(targets), folds).backward()
    first = prior.genes.output.weight.grad.clone()
    prior.zero_grad()
    elsewhere = torch.where(folds[:, None] == 0, targets + 5, targets)
    prior.loss(features, squared_error(elsewhere), folds).backward()
    changed = (prior.genes.output.weight.grad - first).abs().amax((1, 2)) > 1e-6
    # Of three cross-fitted members the first leaves out fold 0; the others are to see everything.
    assert changed.tolist() == [False, True, True, True, True, True]


def test_members_see_views_in_turn(prior):
    features = torch.randn(5, 8)
    before = prior(features)
    features[:, :2] += 1  # of the first view alone
    changed = (prior(features) - before).abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [True, False, True]


def test_new_spots_are_predicted_by_members_that_saw_all(prior):
    features = torch.randn(5, 8)
    before = prior(features), prior(features, cross_fitted=True)
    with torch.no_grad():
        prior.genes.output.bias[3:] += 1
    after = prior(features), prior(features, cross_fitted=True)
    torch.testing.assert_close(after[0], before[0] + 1)
    torch.testing.assert_close(after[1], before[1])


def test_the_linear_part_is_used_where_it_is_better(prior):
    features = torch.randn(90, 8)
    targets = features @ torch.randn(8, 12) + 0.1 * torch.randn(90, 12)
    folds = torch.arange(90) % 3
    fit_linear(prior, features, targets, torch.ones(90), folds)  # against members that were never trained
    assert prior.linear.share > 0.9
    new = torch.randn(30, 8)
    expected = new @ torch.linalg.lstsq(features, targets).solution
    assert hv.metrics.mean_pearson(prior(new).mean(0).detach().numpy(), expected.numpy()) > 0.95
    unseen = prior.out_of_fold(features, folds).mean
    assert hv.metrics.mean_pearson(unseen.numpy(), targets.numpy()) > 0.95


def test_linear_part_leaves_out_the_fold_of_its_member(prior):
    features, targets = torch.randn(60, 8), torch.randn(60, 12)
    folds = torch.arange(60) % 3
    means = []
    for shift in (0.0, 7.0):
        fit_linear(prior, features, targets + shift * (folds[:, None] == 1), torch.ones(60), folds)
        means.append(prior.linear.bias.mean((1, 2)))
    shifts = means[1] - means[0]
    torch.testing.assert_close(shifts, torch.tensor([3.5, 0.0, 3.5, 7 / 3]), atol=0.3, rtol=0)


def test_depth_goes_on_along_a_line_beyond_training():
    prior = make(of_rates=True)
    features = torch.randn(90, 8)
    log_totals = 8 + features[:, :1]
    prior.depth_mean.fill_(8)
    fit_depth(prior, features, log_totals, torch.arange(90) % 3)
    with torch.no_grad():
        prior.depths.output.weight.zero_()  # perceptrons that know the mean alone
        prior.depths.output.bias.zero_()
    far = torch.zeros(1, 8)
    far[0, 0] = -4
    near, novel = (prior.log_depth(far, torch.tensor([novelty])).detach() for novelty in (0.0, 1.0))
    assert float(near.mean()) == pytest.approx(8 - 4 / 4, abs=0.2)
    assert float(novel.mean()) == pytest.approx(8 - 4 * 3 / 4, abs=0.3)


def test_rates_are_positive_however_far_the_line_goes():
    prior = make(of_rates=True)
    prior.linear.share.fill_(1)
    prior.linear.bias.fill_(-5)
    assert (prior(torch.randn(4, 8)) > 0).all()


def test_the_linear_share_is_0_where_members_are_better_and_1_where_they_are_noise():
    part, truth = LinearPart(2, 3, 4), torch.randn(500, 4)
    part.set_share(truth, truth + 0.1 * torch.randn(500, 4), truth + torch.randn(500, 4), torch.ones(500))
    assert part.share == 0
    linear = truth + torch.randn(500, 4)
    part.set_share(truth, linear + torch.randn(500, 4), linear, torch.ones(500))
    assert part.share == pytest.approx(1, abs=0.1)
