"""Baselines that compare with training spots: kernel ridge regression and nearest neighbours in embedding space."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.kernel_ridge import KernelRidge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


class UnitPCA(TransformerMixin, BaseEstimator):
    """Principal components of standardised features, scaled to a mean squared norm of one.

    Parameters
    ----------
    n_components
        Maximum number of components.
    """

    def __init__(self, n_components: int = 128) -> None:
        self.n_components = n_components

    def fit(self, features: NDArray[Any], y: Any = None) -> Self:
        """Fit to features, (n_spots, n_features)."""
        n_components = min(self.n_components, *features.shape)
        self.axes_ = make_pipeline(StandardScaler(), PCA(n_components, random_state=0))
        projected = self.axes_.fit_transform(features)
        self.scale_ = np.sqrt((projected**2).sum(1).mean())
        return self

    def transform(self, features: NDArray[Any]) -> NDArray[Any]:
        """Project features: (n_spots, n_components)."""
        projected: NDArray[Any] = self.axes_.transform(features) / self.scale_
        return projected


class _CentredKernelRidge(KernelRidge):
    """Kernel ridge regression on standardised targets, as scikit-learn's has no intercept."""

    def fit(self, features: NDArray[Any], expression: NDArray[Any]) -> Self:
        self.centre_, self.spread_ = expression.mean(0), expression.std(0) + 1e-9
        super().fit(features, (expression - self.centre_) / self.spread_)
        return self

    def predict(self, features: NDArray[Any]) -> NDArray[Any]:
        predicted: NDArray[Any] = super().predict(features) * self.spread_ + self.centre_
        return predicted


def kernel_ridge() -> Any:
    """Kernel ridge regression: Gaussian kernel of gamma 0.5 on 128 components of unit mean squared norm, penalty 1."""
    return make_pipeline(UnitPCA(), _CentredKernelRidge(kernel="rbf", gamma=0.5, alpha=1.0))


def knn() -> Any:
    """Retrieval: mean of the 50 nearest training spots in 128 components, or of a quarter of all if that is fewer."""
    return make_pipeline(UnitPCA(), _CappedNeighbors(50))


class _CappedNeighbors(KNeighborsRegressor):
    """Nearest neighbours, at most 50 and at most a quarter of the training spots."""

    def fit(self, features: NDArray[Any], expression: NDArray[Any]) -> Self:
        self.n_neighbors = max(1, min(50, len(features) // 4))
        super().fit(features, expression)
        return self
