"""MLP baseline: the mean of four multilayer perceptrons with strong dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ._torch import TorchRegressor, shuffle_batches, tensor, train
from .neighbors import UnitPCA


class MLP(TorchRegressor):
    """Mean of four multilayer perceptrons on 128 principal components.

    Two hidden layers of 256 (layer norm, GELU, dropout 0.5), input dropout 0.2, AdamW at 2e-3 with weight decay 0.1 and
    a one-cycle schedule, 30 epochs, batches of 64, squared error on standardised genes.

    Parameters
    ----------
    random_state
        Seed.
    """

    def fit(self, features: NDArray[Any], expression: NDArray[Any]) -> Self:
        """Fit to features (n_spots, n_features) and expression (n_spots, n_genes)."""
        x = self._fit_inputs(features)._inputs(features)
        y = self._fit_targets(expression)

        def make() -> nn.Module:
            def block(n_in: int) -> list[nn.Module]:
                return [nn.Linear(n_in, 256), nn.LayerNorm(256), nn.GELU(), nn.Dropout(0.5)]

            return nn.Sequential(nn.Dropout(0.2), *block(x.shape[1]), *block(256), nn.Linear(256, y.shape[1]))

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            return ((x[rows], y[rows]) for rows in shuffle_batches(len(x)))

        def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.mse_loss(network(batch[0]), batch[1])

        options: dict[str, Any] = {"epochs": 30, "learning_rate": 2e-3, "weight_decay": 0.1}
        self.networks_ = [
            train(make, loss, batches, **options, random_state=4 * self.random_state + seed) for seed in range(4)
        ]
        return self

    def _fit_inputs(self, features: NDArray[Any]) -> Self:
        """Fit the principal components."""
        self.components_ = UnitPCA().fit(features)
        return self

    def _inputs(self, features: NDArray[Any]) -> Tensor:
        """Principal components with a mean square of one each, as suits a network, not with a norm of one."""
        components = self.components_.transform(features)
        return tensor(components * np.sqrt(components.shape[1]))

    def predict(self, features: NDArray[Any]) -> NDArray[Any]:
        """Predict expression, (n_spots, n_genes)."""
        x = self._inputs(features)
        predicted: Tensor = torch.stack([network(x) for network in self.networks_]).mean(0)
        return self._restore(predicted)
