"""Interrupted training continues where it stopped, on the same data with the same options, or not at all."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from numpy.typing import NDArray
from torch import Tensor

from histovar.model import ModelConfig

from .callbacks import History
from .checkpoint_files import (
    BEST,
    LAST,
    PRIOR,
    RESUMABLE,
    START,
    checkpoints_in,
    link_whole,
    locked,
    read_checkpoint,
    save_whole,
)
from .options import TrainingOptions

logger = logging.getLogger(__name__)

# Options that change what is learnt; `max_epochs` may be raised, and hardware may be another.
OPTIONS_THAT_MATTER = (
    "limit_train_batches",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "gradient_clip_val",
    "averaging_decay",
    "patience",
    "precision",
    "random_state",
    "world_size",
)
DIGEST = "blake2b:"
# The loss on the inner held-out spots, which says when to stop and which epoch is best.
MONITOR = "val_loss"


class Digests:
    """Fingerprints of arrays that come part after part, wherever one part ends and the next begins."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def update(self, name: str, *arrays: Tensor | NDArray[Any] | None) -> None:
        """Add rows of one or several arrays, which have the same number of rows, to what bears a name."""
        for number, array in enumerate(arrays):
            values = array.numpy() if isinstance(array, Tensor) else np.asarray(() if array is None else array)
            key = f"{name}/{number}/{values.dtype}/{values.shape[1:]}"
            digest = self._hashes.setdefault(key, hashlib.blake2b(digest_size=16))
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def result(self) -> dict[str, str]:
        """One fingerprint for each name."""
        whole: dict[str, Any] = {}
        for key, digest in sorted(self._hashes.items()):
            total = whole.setdefault(key.partition("/")[0], hashlib.blake2b(digest_size=16))
            total.update(key.encode() + digest.digest())
        return {name: DIGEST + digest.hexdigest() for name, digest in whole.items()}


def identity(stage: int, options: TrainingOptions, config: ModelConfig, data: Mapping[str, str]) -> dict[str, str]:
    """What must be the same for a training to be continued, by name.

    Parameters
    ----------
    stage
        1 or 2.
    options
        How it is trained.
    config
        Of the model.
    data
        Fingerprints of what is learnt from.
    """
    settings = {name: getattr(options, name) for name in OPTIONS_THAT_MATTER}
    settings = {"stage": stage, **asdict(config), **settings}
    return {**data, **{name: repr(value) for name, value in settings.items()}}


def _differences(stored: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of what differs, with the values of those that can be read."""
    names = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    return [
        name
        if str(stored.get(name, now.get(name))).startswith(DIGEST)
        else f"{name} (was {stored.get(name)}, now {now.get(name)})"
        for name in names
    ]


class StageCheckpoint(Checkpoint):
    """Writes one checkpoint when the monitored loss improves, and another every epoch.

    Parameters
    ----------
    directory
        Where to.
    identity
        See :func:`identity`.
    monitor
        Name of the loss of which ``best.ckpt`` is the lowest; None for no such file.
    last
        Name of the file that is written every epoch; None for no such file.
    """

    def __init__(self, directory: Path, identity: dict[str, str], *, monitor: str | None, last: str | None) -> None:
        self.directory, self.identity, self.monitor, self.last = directory, identity, monitor, last
        self.best_score, self.best_epoch = math.inf, -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have all processes of a distributed run use the directory of the first."""
        self.directory = Path(trainer.strategy.broadcast(str(self.directory)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is due."""
        best = self.directory / BEST
        score = float(trainer.callback_metrics[self.monitor]) if self.monitor else math.inf
        if improved := score < self.best_score:
            self.best_score, self.best_epoch = score, trainer.current_epoch
            trainer.save_checkpoint(best)
        if self.last is None:
            return
        if not improved or best.is_dir():  # directories are of strategies that shard the model
            trainer.save_checkpoint(self.directory / self.last)
        elif trainer.is_global_zero:
            link_whole(best, self.directory / self.last)  # the same content, written once

    def state_dict(self) -> dict[str, Any]:
        """What was trained, and the best score."""
        return _state(self.identity, self.monitor, self.best_score, self.best_epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best score of a checkpoint."""
        self.best_score, self.best_epoch = state_dict["best_score"], state_dict["best_epoch"]


def _state(
    identity: dict[str, str], monitor: str | None, best_score: float = math.inf, best_epoch: int = -1
) -> dict[str, Any]:
    return {"identity": identity, "monitor": monitor, "best_score": best_score, "best_epoch": best_epoch}


class StageRun:
    """Where a stage's checkpoints go, and where its training continues from.

    Parameters
    ----------
    options
        How the stage is trained.
    identity
        See :func:`identity`.
    max_epochs
        Most epochs.

    Attributes
    ----------
    state : dict of Tensor or None
        Weights of the module to continue from.
    ckpt_path : Path or None
        Lightning checkpoint to continue from.
    prior_ckpt_path : Path or None
        The same of the prior, where that has not been trained to its end.
    history_rows : list
        History of the epochs before.
    is_finished : bool
        Whether there is nothing left to train.

    Raises
    ------
    ValueError
        If the checkpoint is damaged, or of another training.
    """

    def __init__(self, options: TrainingOptions, identity: dict[str, str], max_epochs: int) -> None:
        self.identity = identity
        self.directory = None if options.checkpoint_dir is None else Path(options.checkpoint_dir)
        self.writes = _writes(options)
        self.state: dict[str, Tensor] | None = None
        self.ckpt_path: Path | None = None
        self.prior_ckpt_path: Path | None = None
        self.history_rows: list[dict[str, float]] = []
        self.is_finished = False
        if options.resume_from is not None:
            self._read(Path(options.resume_from), max_epochs)

    def _read(self, file: Path, max_epochs: int) -> None:
        checkpoint = read_checkpoint(file)
        callbacks = checkpoint.get("callbacks", {})
        own = _verified(file, checkpoint, self.identity)
        if own["monitor"] is None:
            self.prior_ckpt_path = file
            return
        # As trained, not averaged: averages of weights that are frozen, as the prior's, are off by rounding.
        self.state = checkpoint.get("current_model_state", checkpoint["state_dict"])
        if checkpoint["epoch"] < 0:
            return
        n_epochs = checkpoint["epoch"] + 1
        if n_epochs > max_epochs:
            raise ValueError(
                f"max_epochs: {max_epochs} asked for, {str(file)!r} has had {n_epochs} already; give at least that"
            )
        best = file.with_name(BEST)
        epoch = _best_epoch(best, self.identity)
        # A training killed between the two files leaves a best epoch that the last one does not know of yet.
        if epoch != own["best_epoch"] and epoch <= checkpoint["epoch"]:
            raise ValueError(f"resume_from: {str(best)!r} is not the best epoch of {str(file)!r}, but epoch {epoch}")
        self.ckpt_path = file
        self.history_rows = callbacks[History.__name__]["rows"]
        stopping = [state for key, state in callbacks.items() if key.startswith(EarlyStopping.__name__)]
        stopped_early = any(state["wait_count"] >= state["patience"] for state in stopping)
        self.is_finished = n_epochs == max_epochs or stopped_early
        logger.info("%s after epoch %d of %s", "finished" if self.is_finished else "continuing", n_epochs, file)

    def bring_checkpoints(self, directory: Path) -> None:
        """Have the checkpoints to continue from in the directory of this run, too."""
        is_own = self.writes or directory != self.directory  # a temporary directory is this process's own
        if is_own and self.ckpt_path is not None and self.ckpt_path.parent.resolve() != directory.resolve():
            link_whole(self.ckpt_path.with_name(BEST), directory / BEST)
            link_whole(self.ckpt_path, directory / LAST)

    def save_start(self, module: LightningModule) -> None:
        """Keep what was trained before the first epoch: the warm-up of stage 1, the prior of stage 2."""
        if self.directory is None or self.ckpt_path is not None or not self.writes:
            return
        callbacks = {StageCheckpoint.__name__: _state(self.identity, MONITOR)}
        start = {"state_dict": module.state_dict(), "epoch": -1, "callbacks": callbacks}
        save_whole(start, self.directory / START)
        (self.directory / PRIOR).unlink(missing_ok=True)


def _verified(file: Path, checkpoint: dict[str, Any], identity: Mapping[str, str]) -> dict[str, Any]:
    """The state of :class:`StageCheckpoint`, refused if it is of another training."""
    own = checkpoint.get("callbacks", {}).get(StageCheckpoint.__name__)
    if own is None:
        raise ValueError(
            f"resume_from: {str(file)!r} does not say what it was trained on, as checkpoints of this version of "
            "histovar do; train anew"
        )
    differing = _differences(own["identity"], identity)
    if differing:
        raise ValueError(
            f"resume_from: {str(file)!r} is of another training, which differs in {', '.join(differing)}; give what "
            "it was trained with, or train anew in another checkpoint_dir"
        )
    return dict(own)


def _best_epoch(file: Path, identity: Mapping[str, str]) -> int:
    checkpoint = read_checkpoint(file)
    _verified(file, checkpoint, identity)
    return int(checkpoint["epoch"])


def trained_epochs(directory: Path) -> int:
    """Epochs of the last checkpoint of a directory; 0 where there is none."""
    file = directory / LAST
    return read_checkpoint(file, "checkpoint_dir")["epoch"] + 1 if file.is_file() else 0


def resumable(directory: Path) -> bool:
    """Whether a directory has a checkpoint to continue from."""
    return any((directory / name).is_file() for name in RESUMABLE)


@contextmanager
def lock_directory(options: TrainingOptions) -> Iterator[None]:
    """Lock the directory of the checkpoints, if there is one; in a distributed run, the first process does.

    Raises
    ------
    ValueError
        If another training runs in it.
    """
    if options.checkpoint_dir is None or not _writes(options):
        yield
        return
    with locked(Path(options.checkpoint_dir)):
        yield


@contextmanager
def checkpoint_directory(options: TrainingOptions) -> Iterator[None]:
    """Lock the directory of a stage's checkpoints, and refuse one whose checkpoints would be overwritten unasked.

    Raises
    ------
    ValueError
        If another training runs in it, or it has checkpoints that are not to be continued from.
    """
    with lock_directory(options):
        if options.checkpoint_dir is not None and _writes(options):
            directory = Path(options.checkpoint_dir)
            resumed = None if options.resume_from is None else Path(options.resume_from).parent
            if resumed is None or resumed.resolve() != directory.resolve():
                refuse_overwriting(directory)
        yield


def refuse_overwriting(directory: Path) -> None:
    """Refuse a directory that has checkpoints.

    Raises
    ------
    ValueError
        If it has.
    """
    if present := checkpoints_in(directory):
        raise ValueError(
            f"checkpoint_dir: {str(directory)!r} has checkpoints ({', '.join(present)}) that would be overwritten; "
            "continue from them with resume_from (in tl.train, resume=True), or name another directory"
        )


def _writes(options: TrainingOptions) -> bool:
    """Whether this process writes what only one process should."""
    return not options.is_distributed or _is_first_process()


def _is_first_process() -> bool:
    """Whether this is the first process of a distributed run, also before the processes know of each other."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)
