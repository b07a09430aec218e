"""What happens around an epoch: seeding and the history of metrics."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class EpochSeed(Callback):
    """Seeds torch at the start of every epoch, so that a resumed run repeats an uninterrupted one.

    Parameters
    ----------
    random_state
        Seed of the run.
    """

    def __init__(self, random_state: int) -> None:
        self.random_state = random_state

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed by run and epoch."""
        torch.manual_seed(self.random_state * 1_000_003 + trainer.current_epoch)


class History(Callback):
    """Keeps every logged metric, one row an epoch, across interruptions."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append the epoch's metrics."""
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append({"epoch": trainer.current_epoch, **row})

    def state_dict(self) -> dict[str, Any]:
        """The rows, for checkpoints."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The rows of a checkpoint."""
        self.rows = list(state_dict["rows"])

    def frame(self) -> pd.DataFrame:
        """The history as a DataFrame indexed by epoch."""
        return pd.DataFrame(self.rows).set_index("epoch") if self.rows else pd.DataFrame()
