"""One way to run Lightning, shared by both stages."""

from __future__ import annotations

import logging
import math
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, RichProgressBar
from lightning.pytorch.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]
from rich import get_console

from histovar._memory import keep_freed_memory

from .callbacks import EpochSeed, History
from .data import Spots, train_loader, validation_loader


@dataclass
class TrainingOptions:
    """How a stage is trained. Names are Lightning's where Lightning has them.

    Parameters
    ----------
    max_epochs
        Most epochs; None leaves it to the stage, which counts in steps.
    limit_train_batches
        Most batches of an epoch; None for all. Of very many spots, training is watched more often with fewer.
    batch_size
        Spots a batch, of each process of a distributed run.
    learning_rate, weight_decay
        Of AdamW.
    warmup_steps
        Steps over which the learning rate rises linearly from zero; at most a tenth of all steps.
    gradient_clip_val
        Largest norm of the gradient.
    averaging_decay
        Decay of the moving average of the weights, which is what is validated and kept.
    patience
        Epochs without improvement on the inner held-out spots before training stops.
    accelerator
        Lightning's; ``"auto"`` takes CUDA if there is any and the CPU otherwise, never MPS by itself.
    devices, num_nodes, strategy, precision, logger, enable_progress_bar
        Lightning's.
    checkpoint_dir
        Where ``best.ckpt`` and ``last.ckpt`` are kept; None for a temporary directory.
    resume_from
        A ``last.ckpt`` to continue from.
    callbacks
        Further Lightning callbacks.
    random_state
        Seed. The global random state is left as it was.
    """

    max_epochs: int | None = None
    limit_train_batches: int | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    gradient_clip_val: float = 1.0
    averaging_decay: float = 0.99
    patience: int = 5
    accelerator: str = "auto"
    devices: int | str | Sequence[int] = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: Any = "32-true"
    logger: Any = False
    enable_progress_bar: bool = True
    checkpoint_dir: str | Path | None = None
    resume_from: str | Path | None = None
    callbacks: Sequence[Callback] = ()
    random_state: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "patience", "max_epochs", "limit_train_batches"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip_val"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.averaging_decay < 1:
            raise ValueError(f"averaging_decay must lie in [0, 1), got {self.averaging_decay}")
        if self.resume_from is not None and not Path(self.resume_from).is_file():
            raise FileNotFoundError(f"resume_from: no checkpoint at {str(self.resume_from)!r}")

    def resolved_accelerator(self) -> str:
        """The accelerator, with ``"auto"`` decided."""
        if self.accelerator != "auto":
            return self.accelerator
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def _is_distributed(self) -> bool:
        """Whether several processes were asked for: else a job's environment variables (SLURM's) do not matter."""
        return self.devices != 1 or self.num_nodes != 1 or self.strategy != "auto"

    @cached_property
    def world_size(self) -> int:
        """Number of processes."""
        with quiet_lightning():
            return self.trainer().world_size

    @property
    def global_batch_size(self) -> int:
        """Spots of a batch over all processes."""
        return self.batch_size * self.world_size

    def trainer(self, **more: Any) -> Trainer:
        """Lightning's trainer with these options and more."""
        return Trainer(
            accelerator=self.resolved_accelerator(),
            devices=self.devices,  # type: ignore[arg-type]
            num_nodes=self.num_nodes,
            strategy=self.strategy,
            precision=self.precision,
            plugins=None if self._is_distributed else [LightningEnvironment()],
            **{"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, **more},
        )

    def epochs(self, n_spots: int, steps: int, least: int = 1) -> int:
        """`max_epochs`, or as many as make about `steps` steps, at the least `least`."""
        if self.max_epochs is not None:
            return self.max_epochs
        return max(least, round(steps / self.batches(n_spots)))

    def batches(self, n_spots: int) -> int:
        """Batches of an epoch."""
        return min(math.ceil(n_spots / self.global_batch_size), self.limit_train_batches or n_spots)


class StageModule(LightningModule):
    """AdamW with linear warm-up over the trainable parameters.

    Parameters
    ----------
    options
        How to train.
    """

    def __init__(self, options: TrainingOptions) -> None:
        super().__init__()
        self.options = options

    def configure_optimizers(self) -> Any:
        """Lightning's hook."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.options.learning_rate, weight_decay=self.options.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, min(self.options.warmup_steps, steps // 10))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def watch(self, part: str, n_spots: int, **values: torch.Tensor | float) -> None:
        """Log values as ``part_name``, averaged over the epoch's spots."""
        for name, value in values.items():
            self.log(f"{part}_{name}", value, on_epoch=True, on_step=False, batch_size=n_spots, sync_dist=True)

    def some_genes(self, n_genes: int, most: int, *, random: bool) -> torch.Tensor | None:
        """At most so many genes, increasing: at random, or evenly spaced; None where that is all."""
        if n_genes <= most:
            return None
        if random:
            return torch.randperm(n_genes, device=self.device)[:most].sort().values
        return evenly_spaced(n_genes, most, self.device)


def evenly_spaced(n_genes: int, most: int, device: torch.device | None = None) -> torch.Tensor:
    """At most so many genes, increasing."""
    n = min(n_genes, most)
    return torch.arange(n, device=device) * n_genes // n


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's banners and advice while our own training runs."""
    loggers = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*(num_workers|LeafSpec|isinstance.treespec).*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def seeded(random_state: int) -> Iterator[None]:
    """Run with torch seeded, and put the global random state back."""
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt; Lightning makes it SystemExit, and ignores further ones."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def fit(
    module: LightningModule,
    train: Spots,
    validation: Spots | None,
    options: TrainingOptions,
    *,
    max_epochs: int,
    monitor: str | None = None,
    averaging: bool = True,
    resumable: bool = True,
) -> pd.DataFrame:
    """Train a module; with a `monitor`, stop early and restore the best weights.

    Parameters
    ----------
    module
        What to train.
    train, validation
        Training spots and inner held-out spots.
    options
        How to train.
    max_epochs
        Most epochs.
    monitor
        The validation loss that decides.
    averaging
        Whether to average the weights.
    resumable
        Whether `options` about checkpoints apply to this run.

    Returns
    -------
    DataFrame
        The history, one row an epoch.
    """
    keep_freed_memory()
    history = History()
    callbacks: list[Callback] = [EpochSeed(options.random_state), history, *(options.callbacks if resumable else ())]
    if averaging:
        callbacks.append(EMAWeightAveraging(decay=options.averaging_decay, use_buffers=False))
    if options.enable_progress_bar:
        callbacks.append(RichProgressBar(console_kwargs={"stderr": get_console().stderr}))
    with tempfile.TemporaryDirectory() as scratch, quiet_lightning():
        directory = options.checkpoint_dir if resumable and options.checkpoint_dir else scratch
        if monitor:
            callbacks += [
                EarlyStopping(monitor, patience=options.patience, check_on_train_epoch_end=True),
                ModelCheckpoint(
                    directory,
                    filename="best",
                    monitor=monitor,
                    save_last=True,
                    save_on_train_epoch_end=True,
                    enable_version_counter=False,
                ),
            ]
        trainer = options.trainer(
            logger=options.logger,
            enable_progress_bar=options.enable_progress_bar,
            enable_model_summary=False,
            enable_checkpointing=bool(monitor),
            gradient_clip_val=options.gradient_clip_val,
            max_epochs=max_epochs,
            limit_train_batches=options.limit_train_batches,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            callbacks=callbacks,
            default_root_dir=scratch,
            log_every_n_steps=1,
        )
        loader = train_loader(train, options.batch_size, options.random_state, trainer.world_size, trainer.global_rank)
        watched = None if validation is None else validation_loader(validation, options.batch_size)
        checkpoint = options.resume_from if resumable else None
        with interruptible():
            trainer.fit(module, loader, watched, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        keeper = trainer.checkpoint_callback
        if isinstance(keeper, ModelCheckpoint) and keeper.best_model_path:
            best = torch.load(keeper.best_model_path, map_location="cpu", weights_only=True)
            module.load_state_dict(best["state_dict"])
        trainer.strategy.barrier()  # the first process removes the directory
    module.cpu()
    return history.frame()
