"""Fitting the linear part of the prior: ridge regression, its penalty chosen on folds held out."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from torch import Tensor

from histovar.model.prior import ConditionalMeanPrior

from .standardization import PENALTIES


def fit_linear(
    prior: ConditionalMeanPrior, features: Tensor, targets: Tensor, weights: Tensor, folds: Tensor, n_folds: int
) -> None:
    """Fit the linear part of a prior whose members are trained, and decide how much of it to take.

    Parameters
    ----------
    prior
        Its linear part is set in place.
    features
        (n_spots, n_features) of training spots.
    targets
        (n_spots, n_genes + 1): standardised genes, then depth.
    weights
        (n_spots,) weight of each spot.
    folds
        (n_spots,) fold of each spot.
    n_folds
        Number of folds; the linear part of cross-fitted member ``m`` leaves out fold ``m % n_folds``.
    """
    linear = prior.linear
    linear.share.fill_(0)
    x, y, w, fold = (t.numpy() for t in (features, targets, weights, folds))
    split = PredefinedSplit(fold)
    if split.get_n_splits() < 2:
        return
    search = GridSearchCV(Ridge(), {"alpha": PENALTIES}, scoring="neg_mean_squared_error", cv=split, refit=False)
    penalty = search.fit(x, y, sample_weight=w).best_params_["alpha"]
    seen = [fold != k for k in range(n_folds)] + [np.ones(len(fold), bool)]
    fitted = [Ridge(penalty).fit(x[rows], y[rows], sample_weight=w[rows]) for rows in seen]
    of_member = [fitted[m % n_folds] for m in range(prior.config.n_members)] + fitted[-1:]
    linear.weight.copy_(torch.from_numpy(np.stack([ridge.coef_.T for ridge in of_member])))
    linear.bias.copy_(torch.from_numpy(np.stack([ridge.intercept_[None] for ridge in of_member])))
    unseen = np.empty_like(y)
    for k in np.unique(fold):
        unseen[fold == k] = fitted[k].predict(x[fold == k])
    n_genes = prior.config.n_genes
    members = prior.out_of_fold(features, folds, n_folds)
    linear.set_share(targets[:, :n_genes], members, torch.from_numpy(unseen)[:, :n_genes], weights)
