"""What the baselines in torch share: standardised targets, seeded and one-cycle training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histovar.training import seeded


def tensor(values: NDArray[Any]) -> Tensor:
    """Single-precision copy."""
    return torch.as_tensor(values).float().clone()


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
