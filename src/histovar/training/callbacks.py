"""Lightning callbacks: seeding, history of metrics, weight averaging, progress bar, check for divergence."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EpochSeed(Callback):
    """Seeds torch at the start of every epoch, so that a resumed run gives the same model as an uninterrupted one.

    Parameters
    ----------
    random_state
        Seed of the run.
    """

    def __init__(self, random_state: int) -> None:
        self.random_state = random_state

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed torch with a number that depends on run and epoch."""
        torch.manual_seed(self.random_state * 1_000_003 + trainer.current_epoch)


class History(Callback):
    """Keeps all logged metrics, one row for each epoch; saved in checkpoints."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append the epoch's metrics."""
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append({"epoch": trainer.current_epoch, **row})

    def state_dict(self) -> dict[str, Any]:
        """Rows to save in a checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])

    def frame(self) -> pd.DataFrame:
        """The history as a DataFrame indexed by epoch."""
        return pd.DataFrame(self.rows).set_index("epoch") if self.rows else pd.DataFrame()


class WeightAverage(WeightAveraging):
    """Exponential moving average of the weights, on the device that trains them.

    Parameters
    ----------
    decay
        Decay of the average in each step, 0 to 1.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move the module to its device first: Lightning does so later, and the average would stay on the CPU."""
        pl_module.to(trainer.strategy.root_device)
        super().setup(trainer, pl_module, stage)


class StepProgressBar(RichProgressBar):
    """Progress bar on standard error that names the step, such as ``stage 1: codebook, epoch 3/30``.

    Parameters
    ----------
    step
        Name of the training step.
    """

    def __init__(self, step: str) -> None:
        super().__init__(console_kwargs={"stderr": True})
        self.step = step

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{self.step}, epoch {current_epoch + 1}/{self.trainer.max_epochs}"

    @property
    def validation_description(self) -> str:
        """Label of the bar for the inner held-out spots."""
        return f"{self.step}, held-out spots"


class DivergenceCheck(Callback):
    """Stops training with an error when a loss or weight is no longer finite.

    Parameters
    ----------
    step
        Name of the training step, for the message.
    """

    def __init__(self, step: str) -> None:
        self.step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check losses and weights, only once per epoch, as each check waits for the device."""
        losses = {name: float(v) for name, v in trainer.callback_metrics.items() if name.endswith("loss")}
        broken = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
        if broken or not is_finite(pl_module):
            raise divergence_error(
                self.step, f"epoch {trainer.current_epoch}: {', '.join(broken) or 'weights are not finite'}"
            )


def is_finite(module: torch.nn.Module) -> bool:
    """Whether all weights and buffers of a module are finite."""
    tensors = [t for t in module.state_dict().values() if t.is_floating_point()]
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def divergence_error(step: str, reason: str) -> FloatingPointError:
    """Make the error that says that training has diverged, and what to do about it."""
    return FloatingPointError(
        f"{step}: training diverged ({reason}); lower learning_rate, or look for extreme values in expression and "
        "embeddings"
    )
