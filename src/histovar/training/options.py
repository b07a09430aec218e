"""Options of training, checked before any work."""

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
    refuse_type,
    refuse_value,
    shown,
)

from .checkpoint_files import RESUMABLE
from .isolation import quiet_lightning

# More than any machine has, and any cluster.
MOST_DEVICES, MOST_NODES = 1024, 100_000


def _devices(value: Any) -> int | str | list[int]:
    if isinstance(value, str):
        return value or refuse_value("a number of devices, -1 for all, or 'auto'")
    if isinstance(value, (list, tuple)):
        numbers = [_index(number) for number in value]
        if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
            refuse_value("at least one device, each once")
        return numbers
    number = _index(value)
    if not (1 <= number <= MOST_DEVICES or number == -1):
        refuse_value(f"at least 1 and at most {MOST_DEVICES}, or -1 for all (the CPU is accelerator='cpu')")
    return number


def _index(value: Any) -> int:
    if isinstance(value, bool):
        refuse_type("a number of devices or a list of their numbers")
    try:
        return operator.index(value)
    except TypeError:
        refuse_type("a number of devices or a list of their numbers")


def _callbacks(value: Any) -> tuple[Callback, ...]:
    callbacks = (value,) if isinstance(value, Callback) else value
    if not isinstance(callbacks, (list, tuple)) or not all(isinstance(c, Callback) for c in callbacks):
        refuse_type("a list of Lightning callbacks")
    return tuple(callbacks)


def _logger(value: Any) -> Any:
    loggers = value if isinstance(value, (list, tuple)) else [value]
    if value is not None and not isinstance(value, bool) and not all(isinstance(logger, Logger) for logger in loggers):
        refuse_type("True, False or Lightning loggers")
    return value


def _directory(value: str | Path) -> Path:
    path = Path(value)
    if path.exists() and not path.is_dir():
        refuse_value("a directory, not a file")
    return path


def _checkpoint(value: str | Path) -> Path:
    """The checkpoint to continue from, where its directory may be named in its place."""
    file = Path(value)
    candidates = [file / name for name in RESUMABLE] if file.is_dir() else [file]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"resume_from: no checkpoint at {str(file)!r}; a training with checkpoint_dir writes one")


@dataclass
class TrainingOptions:
    """How a stage is trained. Names are Lightning's where Lightning has them.

    Numbers may be Python's or NumPy's.

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
        Where ``best.ckpt`` and ``last.ckpt`` are kept, the latter written every epoch; None keeps none. A directory
        that has checkpoints already is refused unless `resume_from` names one of them, and so is one in which another
        training runs.
    resume_from
        A ``last.ckpt`` to continue from, or the directory that has it. Data, configuration and options must be those
        of the checkpoint; `max_epochs` may be raised.
    callbacks
        Further Lightning callbacks.
    random_state
        Seed. The global random state is left as it was.

    Raises
    ------
    TypeError
        If an option is of another type.
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
        """Options of a stage whose defaults are other ones, refused if there are none of such a name.

        Parameters
        ----------
        options
            As the user gave them.
        **defaults
            The stage's own defaults.

        Raises
        ------
        TypeError
            If a name is unknown; the message lists those that are known.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"unknown training options {unknown}; the options are {known}")
        checked = cls(**{**defaults, **options})
        _ = checked.world_size  # Lightning refuses hardware that is not there
        return checked

    def resolved_accelerator(self) -> str:
        """The accelerator, with ``"auto"`` decided."""
        if self.accelerator != "auto":
            return self.accelerator
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def is_distributed(self) -> bool:
        """Whether several processes were asked for; otherwise a job's environment variables (SLURM's) are ignored."""
        return self.devices != 1 or self.num_nodes != 1 or self.strategy != "auto"

    @cached_property
    def world_size(self) -> int:
        """Number of processes.

        Raises
        ------
        ValueError
            If Lightning has no such accelerator, devices, strategy or precision.
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
        """Spots of a batch over all processes."""
        return self.batch_size * self.world_size

    def trainer(self, **more: Any) -> Trainer:
        """Lightning's trainer with these options and more."""
        return Trainer(
            accelerator=self.resolved_accelerator(),
            devices=self.devices,  # type: ignore[arg-type]
            num_nodes=self.num_nodes,
            strategy=deepcopy(self.strategy),  # an object of Lightning's serves one trainer alone
            precision=self.precision,
            plugins=None if self.is_distributed else [LightningEnvironment()],
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
