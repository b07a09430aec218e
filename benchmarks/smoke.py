"""The training of smoke modes: a small model for an epoch, to see that a benchmark runs."""

from __future__ import annotations

from typing import Any

import histovar as hv

SMALL: dict[str, Any] = {
    "codebook_size": 256,
    "codebook_dim": 32,
    "width": 32,
    "n_layers": 1,
    "feedforward": 64,
    "n_members": 3,
    "prior_hidden": 32,
}


def quick_options(n_genes: int) -> dict[str, Any]:
    """Options of :func:`histovar.tl.train` for a panel of so many genes."""
    return {"config": hv.ModelConfig.default(n_genes, **SMALL), "max_epochs": 1, "enable_progress_bar": False}
