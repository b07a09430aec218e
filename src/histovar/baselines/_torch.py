"""What the baselines in torch share: standardised targets, seeded and one-cycle training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from torch import Tensor, nn

from histovar.training import seeded


def tensor(values: NDArray[Any]) -> Tensor:
    """Single-precision copy."""
    return torch.as_tensor(values).float().clone()


class TorchRegressor(RegressorMixin, BaseEstimator):
    """Standardised features and genes in, genes in their own units out.

    Parameters
    ----------
    random_state
        Seed.
    """

    def __init__(self, random_state: int = 0) -> None:
        self.random_state = random_state

    def _fit_inputs(self, features: NDArray[Any]) -> Self:
        """Learn how features, (n_spots, n_features), are standardised."""
        self.centre_, self.scale_ = features.mean(0), features.std(0) + 1e-6
        return self

    def _inputs(self, features: NDArray[Any]) -> Tensor:
        """What the network takes: (n_spots, n_inputs)."""
        return tensor((features - self.centre_) / self.scale_)

    def _fit_targets(self, expression: NDArray[Any]) -> Tensor:
        """Learn how genes are standardised, and standardise them: (n_spots, n_genes)."""
        y = tensor(expression)
        self.mean_, self.std_ = y.mean(0), y.std(0).clamp(min=1e-6)
        return (y - self.mean_) / self.std_

    def _restored(self, genes: Tensor) -> NDArray[Any]:
        """Standardised genes in the units of the expression."""
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
    """Make a network and train it by AdamW with a one-cycle schedule, in evaluation mode at the end.

    Parameters
    ----------
    make
        Makes the network.
    loss
        Of network and batch.
    batches
        Gives the batches of an epoch; called once an epoch.
    epochs, learning_rate, weight_decay, random_state
        How to train.
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


def shuffled(n: int, batch_size: int = 64) -> tuple[Tensor, ...]:
    """Rows of the batches of one epoch."""
    return torch.randperm(n).split(batch_size)
