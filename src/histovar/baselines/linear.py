"""Linear baselines: ridge regression by two recipes, and partial least squares."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.cross_decomposition import PLSRegression
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

PENALTIES = np.logspace(1, 6, 11)


class HestRidge(RegressorMixin, BaseEstimator):
    """Ridge regression by HEST-Benchmark's exact recipe: 256 principal components, penalty 100 / (256 x genes).

    Source: Jaume et al. 2024, HEST-1k, section 4 and its code.
    """

    def fit(self, features: NDArray[Any], expression: NDArray[Any]) -> Self:
        """Fit to features (n_spots, n_features) and expression (n_spots, n_genes)."""
        n_components = min(256, *features.shape)
        penalty = 100 / (n_components * expression.shape[1])
        self.model_ = make_pipeline(StandardScaler(), PCA(n_components, random_state=0), Ridge(penalty))
        self.model_.fit(features, expression)
        return self

    def predict(self, features: NDArray[Any]) -> NDArray[Any]:
        """Predict expression, (n_spots, n_genes)."""
        predicted: NDArray[Any] = self.model_.predict(features)
        return predicted


class TunedRidge(RegressorMixin, BaseEstimator):
    """Ridge regression on standardised features, the penalty chosen by leaving training groups out.

    The penalty is one of eleven from 10 to 1,000,000; with only one group, it is chosen on five folds of spots.
    """

    def fit(self, features: NDArray[Any], expression: NDArray[Any], groups: NDArray[Any] | None = None) -> Self:
        """Fit to features (n_spots, n_features) and expression (n_spots, n_genes), tuned across `groups`."""
        n_groups = 1 if groups is None else len(np.unique(groups))
        folds = GroupKFold(min(n_groups, 5)) if n_groups > 1 else KFold(5, shuffle=True, random_state=0)
        search = GridSearchCV(
            make_pipeline(StandardScaler(), Ridge()),
            {"ridge__alpha": PENALTIES},
            scoring="neg_mean_squared_error",
            cv=folds,
        )
        self.model_ = search.fit(features, expression, groups=groups if n_groups > 1 else None)
        return self

    def predict(self, features: NDArray[Any]) -> NDArray[Any]:
        """Predict expression, (n_spots, n_genes)."""
        predicted: NDArray[Any] = self.model_.predict(features)
        return predicted


def pls() -> Any:
    """Partial least squares with 15 components on standardised features."""
    return make_pipeline(StandardScaler(), PLSRegression(15, scale=False))
