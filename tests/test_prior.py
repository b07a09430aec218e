"""The conditional mean: members that have seen all, members that have not, and the linear part."""

import pytest
import torch

import histovar as hv
from histovar.model.linear import LinearPart
from histovar.model.prior import ConditionalMeanPrior
from histovar.training.linear import fit_linear

from .conftest import small_config


@pytest.fixture
def prior():
    torch.manual_seed(0)
    return ConditionalMeanPrior(small_config(n_genes=12, scales=(1, 4, 10, 12)), 6).eval()


def test_members_learn_from_the_spots_they_may_see_alone(prior):
    features, targets = torch.randn(20, 6), torch.randn(20, 13)
    folds = torch.arange(20) % 3
    prior.loss(features, targets, torch.ones(20), folds, 3).backward()
    first = prior.output.weight.grad.clone()
    prior.zero_grad()
    elsewhere = torch.where(folds[:, None] == 0, targets + 5, targets)
    prior.loss(features, elsewhere, torch.ones(20), folds, 3).backward()
    changed = (prior.output.weight.grad - first).abs().amax((1, 2)) > 1e-6
    # Of three cross-fitted members the first leaves out fold 0; the others are to see everything.
    assert changed.tolist() == [False, True, True, True, True, True]


def test_new_spots_are_predicted_by_members_that_saw_all(prior):
    features = torch.randn(5, 6)
    before = prior(features, torch.zeros(5)), prior(features, torch.zeros(5), cross_fitted=True)
    with torch.no_grad():
        prior.output.bias[3:] += 1
    after = prior(features, torch.zeros(5)), prior(features, torch.zeros(5), cross_fitted=True)
    torch.testing.assert_close(after[0], before[0] + 1)
    torch.testing.assert_close(after[1], before[1])


def test_linear_part_is_taken_where_it_is_better(prior):
    features = torch.randn(90, 6)
    targets = features @ torch.randn(6, 13) + 0.1 * torch.randn(90, 13)
    folds = torch.arange(90) % 3
    fit_linear(prior, features, targets, torch.ones(90), folds, 3)  # against members that were never trained
    assert prior.linear.share > 0.9
    new = torch.randn(30, 6)
    expected = new @ torch.linalg.lstsq(features, targets[:, :12]).solution
    assert hv.metrics.mean_pearson(prior(new, torch.zeros(30)).mean(0).detach().numpy(), expected.numpy()) > 0.95
    unseen = prior.out_of_fold(features, folds, 3)
    assert hv.metrics.mean_pearson(unseen.numpy(), targets[:, :12].numpy()) > 0.95


def test_linear_part_leaves_out_the_fold_of_its_member(prior):
    features, targets = torch.randn(60, 6), torch.randn(60, 13)
    folds = torch.arange(60) % 3
    means = []
    for shift in (0.0, 7.0):
        fit_linear(prior, features, targets + shift * (folds[:, None] == 1), torch.ones(60), folds, 3)
        means.append(prior.linear.bias.mean((1, 2)))
    shifts = means[1] - means[0]
    torch.testing.assert_close(shifts, torch.tensor([3.5, 0.0, 3.5, 7 / 3]), atol=0.3, rtol=0)


def test_share_is_nothing_where_members_are_better_and_all_where_they_are_noise():
    part, truth = LinearPart(2, 3, 4), torch.randn(500, 4)
    part.set_share(truth, truth + 0.1 * torch.randn(500, 4), truth + torch.randn(500, 4), torch.ones(500))
    assert part.share == 0
    linear = truth + torch.randn(500, 4)
    part.set_share(truth, linear + torch.randn(500, 4), linear, torch.ones(500))
    assert part.share == pytest.approx(1, abs=0.1)
