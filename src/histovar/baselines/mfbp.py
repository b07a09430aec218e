"""MFBP baseline: each spot attends to a pooled context of its section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ._torch import TorchRegressor, shuffle_batches, train

# Number of context vectors to which a section is pooled.
N_CONTEXT = 8


class _Network(nn.Module):
    """Attention pooling of a section, cross-attention of its spots, multilayer perceptron."""

    def __init__(self, width: int, n_genes: int) -> None:
        super().__init__()
        heads = next(h for h in (8, 4, 2, 1) if width % h == 0)
        self.queries = nn.Parameter(torch.randn(1, N_CONTEXT, width) / width**0.5)
        self.pool = nn.MultiheadAttention(width, heads, batch_first=True)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)

        def layer(n_in: int, n_out: int) -> list[nn.Module]:
            return [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(0.1)]

        self.head = nn.Sequential(*layer(2 * width, 1024), *layer(1024, 512), nn.Linear(512, n_genes))

    def forward(self, spots: Tensor, section: Tensor) -> Tensor:
        """Predict expression, (n, n_genes), of spots (n, width) of a section (n_section, width)."""
        context, _ = self.pool(self.queries, section[None], section[None], need_weights=False)
        attended, _ = self.attend(spots[None], context, context, need_weights=False)
        out: Tensor = self.head(torch.cat([spots, attended[0]], 1))
        return out


class MFBP(TorchRegressor):
    """Regressor on each spot and its cross-attention to the attention-pooled context of its section.

    An MLP takes both, side by side, and is trained by squared error. Its hidden layers of 1,024 and 512 are as
    published; chosen here, as not published: 8 context vectors, dropout 0.1, AdamW at 3e-4, 30 epochs, batches of 64
    spots of one section.

    Parameters
    ----------
    random_state
        Seed.
    """

    def fit(self, features: NDArray[Any], expression: NDArray[Any], sections: NDArray[Any]) -> Self:
        """Fit to features (n_spots, n_features) and expression (n_spots, n_genes), with the section of each spot."""
        x = self._fit_inputs(features)._inputs(features)
        y = self._fit_targets(expression)
        groups = [torch.from_numpy(np.flatnonzero(sections == s)) for s in np.unique(sections)]

        def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            pairs = [(group, group[rows]) for group in groups for rows in shuffle_batches(len(group))]
            return ((x[pairs[i][1]], x[pairs[i][0]], y[pairs[i][1]]) for i in torch.randperm(len(pairs)).tolist())

        def loss(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            return nn.functional.mse_loss(network(*batch[:2]), batch[2])

        self.network_ = train(
            lambda: _Network(x.shape[1], y.shape[1]),
            loss,
            batches,
            epochs=30,
            learning_rate=3e-4,
            weight_decay=0.01,
            random_state=self.random_state,
        )
        return self

    def predict(self, features: NDArray[Any], sections: NDArray[Any]) -> NDArray[Any]:
        """Predict expression, (n_spots, n_genes)."""
        x = self._inputs(features)
        predicted = torch.empty(len(x), len(self.mean_))
        for section in np.unique(sections):
            rows = torch.from_numpy(np.flatnonzero(sections == section))
            predicted[rows] = self.network_(x[rows], x[rows])
        return self._restore(predicted)
