"""Training options, checked before training starts."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]
from pydantic import AfterValidator, Field

from histovar._arguments import (
    Converted,
    Count,
    Key,
    NotNegative,
    Number,
    PathLike,
    Positive,
    Rate,
    Seed,
    checked,
    did_you_mean,
    nearest,
    refuse_type,
    refuse_value,
    shown,
)

from .checkpoint_files import RESUMABLE
from .isolation import quiet_lightning

# Upper limits, above what any machine and cluster has.
MOST_DEVICES, MOST_NODES = 1024, 100_000


def _devices(value: Any) -> int | str | list[int]:
    """Check ``devices``: a number, a list of device numbers, or a word of Lightning's."""
    if isinstance(value, str):
        return value or refuse_value("a number of devices, -1 for all, or 'auto'")
    if isinstance(value, (list, tuple)):
        numbers = [_index(number) for number in value]
        if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
            refuse_value("at least one device number, without repeats")
        return numbers
    number = _index(value)
    if not (1 <= number <= MOST_DEVICES or number == -1):
        refuse_value(f"at least 1 and at most {MOST_DEVICES}, or -1 for all (the CPU is accelerator='cpu')")
    return number


def _index(value: Any) -> int:
    """Convert a value to an integer; refuse booleans and fractions."""
    if isinstance(value, bool):
        refuse_type("a number of devices or a list of their numbers")
    try:
        return operator.index(value)
    except TypeError:
        refuse_type("a number of devices or a list of their numbers")


def _callbacks(value: Any) -> tuple[Callback, ...]:
    """Check ``callbacks``; a single one makes a tuple."""
    callbacks = (value,) if isinstance(value, Callback) else value
    if not isinstance(callbacks, (list, tuple)) or not all(isinstance(c, Callback) for c in callbacks):
        refuse_type("a list of Lightning callbacks")
    return tuple(callbacks)


def _logger(value: Any) -> Any:
    """Check ``logger``."""
    loggers = value if isinstance(value, (list, tuple)) else [value]
    if value is not None and not isinstance(value, bool) and not all(isinstance(logger, Logger) for logger in loggers):
        refuse_type("True, False or Lightning loggers")
    return value


def _directory(value: str | Path) -> Path:
    """Check ``checkpoint_dir``, which need not exist."""
    path = Path(value)
    if path.exists() and not path.is_dir():
        refuse_value("a directory, not a file")
    return path


def _checkpoint(value: str | Path) -> Path:
    """Find the checkpoint of ``resume_from``, which may also name its directory."""
    file = Path(value)
    candidates = [file / name for name in RESUMABLE] if file.is_dir() else [file]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"resume_from: no checkpoint at {str(file)!r}; training with checkpoint_dir writes one")


@dataclass
class TrainingOptions:
    """Options for training a stage, named as in Lightning where it has them.

    Numbers may be Python's or NumPy's.

    Parameters
    ----------
    max_epochs
        Maximum number of epochs; by default as many as give the stage's usual number of steps.
    limit_train_batches
        Maximum number of batches in an epoch; by default all. With very many spots, fewer batches mean more frequent
        validation.
    batch_size
        Spots in a batch of each process.
    learning_rate, weight_decay
        Learning rate and weight decay of AdamW.
    warmup_steps
        Steps in which the learning rate rises linearly from zero; at most a tenth of all steps.
    gradient_clip_val
        Maximum norm of the gradient.
    averaging_decay
        Decay of the exponential moving average of the weights; the averaged weights are validated and kept.
    patience
        Number of epochs without improvement on the inner held-out spots after which training stops.
    accelerator
        As in Lightning; ``"auto"`` is CUDA if available, otherwise the CPU, but never MPS.
    devices, num_nodes, strategy, precision, logger, enable_progress_bar
        As in Lightning.
    checkpoint_dir
        Directory for the checkpoints ``best.ckpt`` and ``last.ckpt``, the latter written every epoch; None keeps none.
        A directory that already has checkpoints is refused, unless `resume_from` names one of them, and so is one that
        another training run uses.
    resume_from
        Checkpoint ``last.ckpt`` to continue from, or its directory. Data, configuration and options must be the same as
        before; only `max_epochs` may be increased.
    callbacks
        Additional Lightning callbacks.
    random_state
        Seed. The global random state is not changed.

    Raises
    ------
    TypeError
        If an option has the wrong type.
    ValueError
        If an option is out of range.
    FileNotFoundError
        If there is no checkpoint to resume from.
    """

    max_epochs: Count | None = None
    limit_train_batches: Count | None = None
    batch_size: Count = 64
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 0.01
    warmup_steps: Number = 100
    gradient_clip_val: Positive = 1.0
    averaging_decay: Rate = 0.99
    patience: Count = 5
    accelerator: Key = "auto"
    devices: Annotated[int | str | Sequence[int], Converted(_devices)] = 1
    num_nodes: Annotated[Count, Field(le=MOST_NODES)] = 1
    strategy: Any = "auto"
    precision: Any = "32-true"
    logger: Annotated[Any, Converted(_logger)] = False
    enable_progress_bar: bool = True
    checkpoint_dir: Annotated[PathLike, AfterValidator(_directory)] | None = None
    resume_from: Annotated[PathLike, AfterValidator(_checkpoint)] | None = None
    callbacks: Annotated[Sequence[Callback], Converted(_callbacks)] = ()
    random_state: Seed = 0

    def __post_init__(self) -> None:
        for name, value in checked(type(self), vars(self)).items():
            setattr(self, name, value)

    @classmethod
    def checked(cls, options: dict[str, Any], **defaults: Any) -> Self:
        """Make options from a user's dictionary, with the defaults of a stage.

        Parameters
        ----------
        options
            Options that the user gave.
        **defaults
            Defaults of the stage, where they differ.

        Raises
        ------
        TypeError
            If a name is unknown; the message lists the options.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            suggestion = did_you_mean(map(repr, nearest(unknown, known)))
            raise TypeError(f"unknown training options {unknown}; the options are {known}{suggestion}")
        checked = cls(**{**defaults, **options})
        _ = checked.world_size  # Lightning refuses hardware that is not available
        return checked

    def resolved_accelerator(self) -> str:
        """The accelerator, with ``"auto"`` resolved to CUDA or the CPU."""
        if self.accelerator != "auto":
            return self.accelerator
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def is_distributed(self) -> bool:
        """Whether the options ask for several processes; if not, environment variables of SLURM jobs are ignored."""
        return self.devices != 1 or self.num_nodes != 1 or self.strategy != "auto"

    @cached_property
    def world_size(self) -> int:
        """Number of processes.

        Raises
        ------
        ValueError
            If Lightning refuses accelerator, devices, strategy or precision.
        """
        try:
            with quiet_lightning():
                return self.trainer().world_size
        except (MisconfigurationException, ImportError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"Lightning refuses accelerator={self.accelerator!r}, devices={shown(self.devices)}, strategy="
                f"{shown(self.strategy)}, precision={shown(self.precision)}: {' '.join(str(error).split())}"
            ) from None

    @property
    def global_batch_size(self) -> int:
        """Spots in the batches of all processes together."""
        return self.batch_size * self.world_size

    def trainer(self, **arguments: Any) -> Trainer:
        """Make Lightning's trainer with these options and further arguments."""
        return Trainer(
            accelerator=self.resolved_accelerator(),
            devices=self.devices,  # type: ignore[arg-type]
            num_nodes=self.num_nodes,
            strategy=deepcopy(self.strategy),  # a strategy object can serve only one trainer
            precision=self.precision,
            plugins=None if self.is_distributed else [LightningEnvironment()],
            **{"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, **arguments},
        )

    def epochs(self, n_spots: int, steps: int, least: int = 1) -> int:
        """Number of epochs: `max_epochs`, or as many as give about `steps` steps, but at least `least`."""
        if self.max_epochs is not None:
            return self.max_epochs
        return max(least, round(steps / self.batches(n_spots)))

    def batches(self, n_spots: int) -> int:
        """Number of batches in an epoch."""
        return min(math.ceil(n_spots / self.global_batch_size), self.limit_train_batches or n_spots)
