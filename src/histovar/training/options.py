"""Options of training: converted and checked once, here, before any work."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]

from .checkpoint_files import RESUMABLE
from .isolation import quiet_lightning

# Least value of every option that is a whole number; those in OPTIONAL may be None.
WHOLE_NUMBERS = {
    "max_epochs": 1,
    "limit_train_batches": 1,
    "batch_size": 1,
    "warmup_steps": 0,
    "patience": 1,
    "num_nodes": 1,
    "random_state": 0,
}
OPTIONAL = ("max_epochs", "limit_train_batches")
# scikit-learn takes no larger seeds.
MOST_RANDOM_STATE = 2**32 - 1


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
    strategy: Any = "auto"
    precision: Any = "32-true"
    logger: Any = False
    enable_progress_bar: bool = True
    checkpoint_dir: str | Path | None = None
    resume_from: str | Path | None = None
    callbacks: Sequence[Callback] = ()
    random_state: int = 0

    def __post_init__(self) -> None:
        for name, least in WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            number = whole_number(value, name)
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
            setattr(self, name, number)
        if self.random_state > MOST_RANDOM_STATE:
            raise ValueError(f"random_state must be at most {MOST_RANDOM_STATE}, got {self.random_state}")
        for name in ("learning_rate", "weight_decay", "gradient_clip_val", "averaging_decay"):
            setattr(self, name, real_number(getattr(self, name), name))
        for name in ("learning_rate", "gradient_clip_val"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.averaging_decay < 1:
            raise ValueError(f"averaging_decay must lie in [0, 1), got {self.averaging_decay}")
        self.enable_progress_bar = truth(self.enable_progress_bar, "enable_progress_bar")
        if not isinstance(self.accelerator, str):
            raise TypeError(f"accelerator must be text such as 'cpu', got {self.accelerator!r}")
        self.devices = _devices(self.devices)
        self.callbacks = _callbacks(self.callbacks)
        self.logger = _logger(self.logger)
        if self.checkpoint_dir is not None:
            self.checkpoint_dir = path(self.checkpoint_dir, "checkpoint_dir")
            if self.checkpoint_dir.exists() and not self.checkpoint_dir.is_dir():
                raise ValueError(f"checkpoint_dir: {str(self.checkpoint_dir)!r} is a file; name a directory")
        if self.resume_from is not None:
            self.resume_from = _checkpoint(path(self.resume_from, "resume_from"))

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
        """Whether several processes were asked for: else a job's environment variables (SLURM's) do not matter."""
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
                f"Lightning refuses accelerator={self.accelerator!r}, devices={self.devices!r}, strategy="
                f"{self.strategy!r}, precision={self.precision!r}: {' '.join(str(error).split())}"
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
            strategy=self.strategy,
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


def whole_number(value: Any, name: str) -> int:
    """An integer of Python or NumPy as int.

    Raises
    ------
    TypeError
        If it is a truth value, text, None or anything else.
    ValueError
        If it has a fraction, or is NaN or infinite.
    """
    if isinstance(value, (float, np.floating)):
        if not float(value).is_integer():
            raise ValueError(f"{name} must be a whole number, got {value}")
        return int(value)
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be a whole number, got {value!r}")


def real_number(value: Any, name: str) -> float:
    """A number of Python or NumPy as float.

    Raises
    ------
    TypeError
        If it is a truth value, text, None or anything else.
    ValueError
        If it is NaN or infinite.
    """
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def truth(value: Any, name: str) -> bool:
    """True or False, Python's or NumPy's, as bool.

    Raises
    ------
    TypeError
        If it is anything else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def path(value: Any, name: str) -> Path:
    """A path.

    Raises
    ------
    TypeError
        If it is neither text nor a path.
    ValueError
        If it is empty.
    """
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{name} must be a path, got {value!r}")
    if value == "":
        raise ValueError(f"{name} must be a path, got an empty text")
    return Path(value)


def _devices(value: Any) -> int | str | list[int]:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        numbers = [whole_number(number, "devices") for number in value]
        if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
            raise ValueError(f"devices must name at least one device, each once, got {value!r}")
        return numbers
    number = whole_number(value, "devices")
    if number < 1 and number != -1:
        raise ValueError(f"devices must be at least 1, or -1 for all, got {number}; the CPU is accelerator='cpu'")
    return number


def _callbacks(value: Any) -> tuple[Callback, ...]:
    callbacks = (value,) if isinstance(value, Callback) else value
    if not isinstance(callbacks, (list, tuple)) or not all(isinstance(c, Callback) for c in callbacks):
        raise TypeError(f"callbacks must be a list of Lightning callbacks, got {value!r}")
    return tuple(callbacks)


def _logger(value: Any) -> Any:
    loggers = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if value is not None and not all(isinstance(logger, Logger) for logger in loggers):
        raise TypeError(f"logger must be True, False or Lightning loggers, got {value!r}")
    return value


def _checkpoint(file: Path) -> Path:
    """The checkpoint to continue from, where its directory may be named in its place."""
    candidates = [file / name for name in RESUMABLE] if file.is_dir() else [file]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"resume_from: no checkpoint at {str(file)!r}; a training with checkpoint_dir writes one")
