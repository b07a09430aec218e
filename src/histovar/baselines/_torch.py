"""Base class and training loop of the baselines in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from torch import Tensor, nn

from histovar.training import seeded


def tensor(values: NDArray[Any]) -> Tensor:
    """Copy an array to a tensor of single precision."""
    return torch.as_tensor(values).float().clone()


class TorchRegressor(RegressorMixin, BaseEstimator):
    """Base class of regressors in torch, with standardised features and targets.

    Parameters
    ----------
    random_state
        Seed.
    """

    def __init__(self, random_state: int = 0) -> None:
        self.random_state = random_state

    def _fit_inputs(self, features: NDArray[Any]) -> Self:
        """Fit the standardisation of features, (n_spots, n_features)."""
        self.centre_, self.scale_ = features.mean(0), features.std(0) + 1e-6
        return self

    def _inputs(self, features: NDArray[Any]) -> Tensor:
        """Turn features into inputs of the network, (n_spots, n_inputs)."""
        return tensor((features - self.centre_) / self.scale_)

    def _fit_targets(self, expression: NDArray[Any]) -> Tensor:
        """Fit the standardisation of genes, and apply it: (n_spots, n_genes)."""
        y = tensor(expression)
        self.mean_, self.std_ = y.mean(0), y.std(0).clamp(min=1e-6)
        return (y - self.mean_) / self.std_

    def _restore(self, genes: Tensor) -> NDArray[Any]:
        """Turn standardised genes into the units of the expression again."""
        restored: NDArray[Any] = (genes * self.std_ + self.mean_).numpy()
        return restored


def train(
    make: Callable[[], nn.Module],
    loss: Callable[[Any, Any], Tensor],
    batches: Callable[[], Iterator[Any]],
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    random_state: int,
) -> Any:
    """Make a network, train it by AdamW with a one-cycle schedule, and return it in evaluation mode.

    Parameters
    ----------
    make
        Function that makes the network.
    loss
        Loss function, given the network and a batch.
    batches
        Function that yields the batches of an epoch; called once for each epoch, and once more to count them.
    epochs, learning_rate, weight_decay, random_state
        Number of epochs, options of AdamW, and seed.
    """
    with seeded(random_state):
        network = make()
        steps = sum(1 for _ in batches()) * epochs
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        for _ in range(epochs):
            for batch in batches():
                optimizer.zero_grad()
                loss(network, batch).backward()
                optimizer.step()
                schedule.step()
    return network.eval().requires_grad_(False)


def shuffle_batches(n: int, batch_size: int = 64) -> tuple[Tensor, ...]:
    """Shuffle `n` rows, and split them into the batches of an epoch."""
    return torch.randperm(n).split(batch_size)
