"""Run Lightning's trainer: the loop that both stages share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision

from histovar._memory import keep_freed_memory

from .callbacks import DivergenceCheck, EpochSeed, History, StepProgressBar, WeightAverage, divergence_error, is_finite
from .checkpoint_files import BEST, LAST, PRIOR, AtomicCheckpointIO, read_checkpoint
from .data import Spots, train_loader, validation_loader
from .isolation import interruptible, quiet_lightning
from .options import TrainingOptions
from .resume import MONITOR, StageCheckpoint, StageRun

# Fewest genes that a training step takes. Each step takes others, at random: on held-out sections, models trained on a
# third of the genes per step are as good as those trained on all (benchmarks/genes_per_step.py).
LEAST_GENES = 64


class StageModule(LightningModule):
    """Base class of Lightning modules: AdamW with linear warm-up, and logging.

    Parameters
    ----------
    options
        Training options.
    """

    def __init__(self, options: TrainingOptions) -> None:
        super().__init__()
        self.options = options

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up over the trainable parameters."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.adamw(parameters, lr=self.options.learning_rate, weight_decay=self.options.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, min(self.options.warmup_steps, steps // 10))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def adamw(self, parameters: Iterable[Any], **options: Any) -> torch.optim.AdamW:
        """AdamW, on CPUs in a single kernel, which saves most of its time."""
        # In mixed precision, Lightning refuses to clip gradients for this kernel.
        is_mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        is_fused = self.trainer.strategy.root_device.type == "cpu" and not is_mixed
        # None leaves the choice to torch, which False would not.
        return torch.optim.AdamW(parameters, fused=True if is_fused else None, **options)

    def watch(self, prefix: str, n_spots: int, **values: torch.Tensor | float) -> None:
        """Log values as ``prefix_name``, averaged over the spots of the epoch."""
        for name, value in values.items():
            self.log(f"{prefix}_{name}", value, on_epoch=True, on_step=False, batch_size=n_spots, sync_dist=True)

    def choose_genes(self, n_genes: int, most: int, *, random: bool) -> torch.Tensor | None:
        """Choose at most `most` genes, at random or evenly spaced, in increasing order; None for all."""
        if n_genes <= most:
            return None
        if random:
            return torch.randperm(n_genes, device=self.device)[:most].sort().values
        return torch.arange(most, device=self.device) * n_genes // most


def genes_per_step(n_genes: int, most: int) -> int:
    """Number of genes of a panel that one training step takes: a third, at least 64 and at most `most`."""
    return min(max(n_genes // 3, LEAST_GENES), most, n_genes)


def fit(
    module: LightningModule,
    train: Spots,
    validation: Spots | None,
    options: TrainingOptions,
    *,
    step: str,
    max_epochs: int,
    run: StageRun | None = None,
    averaging: bool = True,
) -> pd.DataFrame:
    """Train a module; with validation spots, stop early and restore the weights of the best epoch.

    Parameters
    ----------
    module
        Module to train.
    train, validation
        Training spots and inner held-out spots. Without the latter this is a preliminary step, and the user's
        callbacks are not called.
    options
        Training options.
    step
        Name of the training step, for progress bar and messages.
    max_epochs
        Maximum number of epochs.
    run
        Checkpoints of the stage, to write and to resume from.
    averaging
        Whether to average the weights.

    Returns
    -------
    DataFrame
        Metrics of training, one row for each epoch.

    Raises
    ------
    FloatingPointError
        If training diverges.
    """
    keep_freed_memory()
    history = History()
    callbacks: list[Callback] = [EpochSeed(options.random_state), history, DivergenceCheck(step)]
    if validation is not None:
        callbacks += options.callbacks
    if averaging:
        callbacks.append(WeightAverage(options.averaging_decay))
    if options.enable_progress_bar:
        callbacks.append(StepProgressBar(step))
    with tempfile.TemporaryDirectory() as scratch, quiet_lightning():
        checkpoints = None
        directory = Path(scratch) if run is None or run.directory is None else run.directory
        if run is not None:
            last = None if run.directory is None else PRIOR if validation is None else LAST
            monitor = None if validation is None else MONITOR
            checkpoints = StageCheckpoint(directory, run.identity, monitor=monitor, last=last)
            callbacks.append(checkpoints)
            run.bring_checkpoints(directory)
        if validation is not None:
            callbacks.append(EarlyStopping(MONITOR, patience=options.patience, check_on_train_epoch_end=True))
        trainer = options.trainer(
            logger=options.logger,
            enable_progress_bar=options.enable_progress_bar,
            enable_model_summary=False,
            enable_checkpointing=checkpoints is not None,
            gradient_clip_val=options.gradient_clip_val,
            max_epochs=max_epochs,
            limit_train_batches=options.limit_train_batches,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            callbacks=callbacks,
            default_root_dir=scratch,
            log_every_n_steps=1,
        )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        loader = train_loader(train, options.batch_size, options.random_state, trainer.world_size, trainer.global_rank)
        validation_batches = None if validation is None else validation_loader(validation, options.batch_size)
        checkpoint: dict[str, Any] = {}
        if run is not None and (ckpt_path := run.prior_ckpt_path if validation is None else run.ckpt_path):
            checkpoint = {"ckpt_path": ckpt_path, "weights_only": True}
        if run is not None and run.is_finished:
            history.rows = run.history_rows
        else:
            try:
                with interruptible():
                    trainer.fit(module, loader, validation_batches, **checkpoint)
            except (RuntimeError, ValueError, AssertionError) as error:
                if is_finite(module):
                    raise
                raise divergence_error(step, f"{type(error).__name__}: {error}".splitlines()[0]) from error
        if checkpoints is not None and validation is not None:
            module.load_state_dict(read_checkpoint(checkpoints.directory / BEST)["state_dict"])
        trainer.strategy.barrier()  # before the first process removes the directory
    module.cpu()
    if not is_finite(module):
        raise divergence_error(step, "weights are not finite")
    return history.frame()
