"""Fit the linear part of the prior by ridge regression, with the penalty chosen by cross-validation."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from torch import Tensor

from histovar.model.linear import LinearPart
from histovar.model.prior import ConditionalMeanPrior

PENALTIES = np.logspace(1, 6, 11)


def fit_linear(prior: ConditionalMeanPrior, features: Tensor, targets: Tensor, weights: Tensor, folds: Tensor) -> None:
    """Fit the linear part of a prior whose members are trained, and its weight in the prediction.

    Parameters
    ----------
    prior
        The prior, whose linear part is set in place.
    features
        (n_spots, n_features) of training spots.
    targets
        (n_spots, n_genes): true values of what the members predict.
    weights
        (n_spots,) weight of each spot.
    folds
        (n_spots,) fold of each spot.
    """
    prior.linear.share.fill_(0)
    scale = targets.std(0).clamp(min=1e-6)
    unseen = _fit_ridge(prior, prior.linear, features, targets / scale, weights, folds)
    if unseen is None:
        return
    prior.linear.weight.mul_(scale)
    prior.linear.bias.mul_(scale)
    members = prior.out_of_fold(features, folds).mean
    prior.linear.set_share(targets / scale, members / scale, unseen, weights)


def fit_depth(prior: ConditionalMeanPrior, features: Tensor, log_totals: Tensor, folds: Tensor) -> None:
    """Fit the linear prediction of depth of a prior.

    Parameters
    ----------
    prior
        The prior, whose linear prediction of depth is set in place.
    features, folds
        As in :func:`fit_linear`.
    log_totals
        (n_spots, 1) log total counts.
    """
    _fit_ridge(prior, prior.linear_depth, features, log_totals - prior.depth_mean, torch.ones(len(features)), folds)
    prior.linear_depth.bias.add_(prior.depth_mean)


def _fit_ridge(
    prior: ConditionalMeanPrior,
    linear_part: LinearPart,
    features: Tensor,
    targets: Tensor,
    weights: Tensor,
    folds: Tensor,
) -> Tensor | None:
    """Fit the ridge regressions of a linear part; return their out-of-fold predictions, or None with only one fold.

    The regression of cross-fitted member ``m`` leaves out fold ``m % n_folds``.
    """
    x, y, w, fold = (t.numpy() for t in (features, targets, weights, folds))
    split = PredefinedSplit(fold)
    if split.get_n_splits() < 2:
        return None
    search = GridSearchCV(Ridge(), {"alpha": PENALTIES}, scoring="neg_mean_squared_error", cv=split, refit=False)
    penalty = search.fit(x, y, sample_weight=w).best_params_["alpha"]
    n_folds = prior.n_folds
    seen = [fold != k for k in range(n_folds)] + [np.ones(len(fold), bool)]
    fitted = [Ridge(penalty).fit(x[rows], y[rows], sample_weight=w[rows]) for rows in seen]
    by_member = [fitted[m % n_folds] for m in range(prior.config.n_members)] + fitted[-1:]
    linear_part.weight.copy_(torch.from_numpy(np.stack([np.atleast_2d(ridge.coef_).T for ridge in by_member])))
    linear_part.bias.copy_(torch.from_numpy(np.stack([np.atleast_1d(ridge.intercept_)[None] for ridge in by_member])))
    unseen = np.empty_like(y)
    for k in np.unique(fold):
        unseen[fold == k] = fitted[k].predict(x[fold == k]).reshape(-1, y.shape[1])
    return torch.from_numpy(unseen)
