"""Resume interrupted training from checkpoints, after checking that data, configuration and options are the same."""

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
    link_atomically,
    locked,
    read_checkpoint,
    save_atomically,
)
from .options import TrainingOptions

logger = logging.getLogger(__name__)

# Options that must be the same when training is resumed; `max_epochs` and hardware may differ.
COMPARED_OPTIONS = (
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
# Loss on the inner held-out spots, for early stopping and the choice of the best epoch.
MONITOR = "val_loss"


class Digests:
    """Fingerprints of arrays that arrive in parts; they do not depend on how the arrays are divided."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def update(self, name: str, *arrays: Tensor | NDArray[Any] | None) -> None:
        """Add rows of one or several arrays to the fingerprint of a name."""
        for number, array in enumerate(arrays):
            values = array.numpy() if isinstance(array, Tensor) else np.asarray(() if array is None else array)
            key = f"{name}/{number}/{values.dtype}/{values.shape[1:]}"
            digest = self._hashes.setdefault(key, hashlib.blake2b(digest_size=16))
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def result(self) -> dict[str, str]:
        """Fingerprint of each name."""
        totals: dict[str, Any] = {}
        for key, digest in sorted(self._hashes.items()):
            total = totals.setdefault(key.partition("/")[0], hashlib.blake2b(digest_size=16))
            total.update(key.encode() + digest.digest())
        return {name: DIGEST + digest.hexdigest() for name, digest in totals.items()}


def identity(stage: int, options: TrainingOptions, config: ModelConfig, data: Mapping[str, str]) -> dict[str, str]:
    """Describe a training run by all that must be the same when it is resumed: data, configuration and options.

    Parameters
    ----------
    stage
        1 or 2.
    options
        Training options.
    config
        Configuration of the model.
    data
        Fingerprints of the training data, by name.
    """
    settings = {name: getattr(options, name) for name in COMPARED_OPTIONS}
    settings = {"stage": stage, **asdict(config), **settings}
    return {**data, **{name: repr(value) for name, value in settings.items()}}


def _differences(stored: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """List what differs between two identities, with values unless these are fingerprints."""
    names = [name for name in {**stored, **current} if stored.get(name) != current.get(name)]
    return [
        name
        if str(stored.get(name, current.get(name))).startswith(DIGEST)
        else f"{name} (was {stored.get(name)}, now {current.get(name)})"
        for name in names
    ]


class StageCheckpoint(Checkpoint):
    """Lightning callback that writes a checkpoint when the monitored loss improves, and another every epoch.

    Parameters
    ----------
    directory
        Directory of the checkpoints.
    identity
        See :func:`identity`.
    monitor
        Name of the loss that is lowest in ``best.ckpt``; None for no such file.
    last
        Name of the file that is written every epoch; None for no such file.
    """

    def __init__(self, directory: Path, identity: dict[str, str], *, monitor: str | None, last: str | None) -> None:
        self.directory, self.identity, self.monitor, self.last = directory, identity, monitor, last
        self.best_score, self.best_epoch = math.inf, -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Use the directory of the first process in all processes of a distributed run."""
        self.directory = Path(trainer.strategy.broadcast(str(self.directory)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoints of an epoch."""
        best = self.directory / BEST
        score = float(trainer.callback_metrics[self.monitor]) if self.monitor else math.inf
        if improved := score < self.best_score:
            self.best_score, self.best_epoch = score, trainer.current_epoch
            trainer.save_checkpoint(best)
        if self.last is None:
            return
        if not improved or best.is_dir():  # a directory, if the strategy shards the model
            trainer.save_checkpoint(self.directory / self.last)
        elif trainer.is_global_zero:
            link_atomically(best, self.directory / self.last)  # same content, so write it once

    def state_dict(self) -> dict[str, Any]:
        """Identity of the run and its best score, for checkpoints."""
        return _state(self.identity, self.monitor, self.best_score, self.best_epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score of a checkpoint."""
        self.best_score, self.best_epoch = state_dict["best_score"], state_dict["best_epoch"]


def _state(
    identity: dict[str, str], monitor: str | None, best_score: float = math.inf, best_epoch: int = -1
) -> dict[str, Any]:
    """State of :class:`StageCheckpoint` in a checkpoint."""
    return {"identity": identity, "monitor": monitor, "best_score": best_score, "best_epoch": best_epoch}


class StageRun:
    """Checkpoints of a stage: the directory to write to, and the state to resume from.

    Parameters
    ----------
    options
        Training options of the stage.
    identity
        See :func:`identity`.
    max_epochs
        Maximum number of epochs.

    Attributes
    ----------
    state : dict of Tensor or None
        State dict of the module to resume from.
    ckpt_path : Path or None
        Lightning checkpoint to resume from.
    prior_ckpt_path : Path or None
        Lightning checkpoint of the prior to resume from, if its training was interrupted.
    history_rows : list
        History of the epochs so far.
    is_finished : bool
        Whether the stage has been trained to the end.

    Raises
    ------
    ValueError
        If the checkpoint is damaged, or from a different training run.
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
        """Read the checkpoint to resume from."""
        checkpoint = read_checkpoint(file)
        callbacks = checkpoint.get("callbacks", {})
        own = _verify(file, checkpoint, self.identity)
        if own["monitor"] is None:
            self.prior_ckpt_path = file
            return
        # The trained weights, not their average: averages of frozen weights, such as the prior's, have rounding errors.
        self.state = checkpoint.get("current_model_state", checkpoint["state_dict"])
        if checkpoint["epoch"] < 0:
            return
        n_epochs = checkpoint["epoch"] + 1
        if n_epochs > max_epochs:
            raise ValueError(
                f"max_epochs: got {max_epochs}, but {str(file)!r} already has {n_epochs} epochs; give at least as many"
            )
        best = file.with_name(BEST)
        epoch = _best_epoch(best, self.identity)
        # A run that is killed between writing the two files leaves a best epoch later than the last one.
        if epoch != own["best_epoch"] and epoch <= checkpoint["epoch"]:
            raise ValueError(
                f"resume_from: {str(best)!r} has epoch {epoch}, which is not the best epoch of {str(file)!r}"
            )
        self.ckpt_path = file
        self.history_rows = callbacks[History.__name__]["rows"]
        stopping = [state for key, state in callbacks.items() if key.startswith(EarlyStopping.__name__)]
        stopped_early = any(state["wait_count"] >= state["patience"] for state in stopping)
        self.is_finished = n_epochs == max_epochs or stopped_early
        logger.info("%s after epoch %d, from %s", "finished" if self.is_finished else "resuming", n_epochs, file)

    def bring_checkpoints(self, directory: Path) -> None:
        """Link the checkpoints to resume from into the directory of this run."""
        is_own = self.writes or directory != self.directory  # a temporary directory belongs to this process
        if is_own and self.ckpt_path is not None and self.ckpt_path.parent.resolve() != directory.resolve():
            link_atomically(self.ckpt_path.with_name(BEST), directory / BEST)
            link_atomically(self.ckpt_path, directory / LAST)

    def save_start(self, module: LightningModule) -> None:
        """Save the state before the first epoch: after the warm-up of stage 1, or the prior of stage 2."""
        if self.directory is None or self.ckpt_path is not None or not self.writes:
            return
        callbacks = {StageCheckpoint.__name__: _state(self.identity, MONITOR)}
        start = {"state_dict": module.state_dict(), "epoch": -1, "callbacks": callbacks}
        save_atomically(start, self.directory / START)
        (self.directory / PRIOR).unlink(missing_ok=True)


def _verify(file: Path, checkpoint: dict[str, Any], identity: Mapping[str, str]) -> dict[str, Any]:
    """Return the state of :class:`StageCheckpoint`; refuse one from a different training run."""
    own = checkpoint.get("callbacks", {}).get(StageCheckpoint.__name__)
    if own is None:
        raise ValueError(
            f"resume_from: {str(file)!r} does not say what it was trained on, unlike checkpoints of this version of "
            "histovar; start training from scratch"
        )
    differing = _differences(own["identity"], identity)
    if differing:
        raise ValueError(
            f"resume_from: {str(file)!r} is from a different training run, which differs in {', '.join(differing)}; "
            "give the same as in that run, or start from scratch in another checkpoint_dir"
        )
    return dict(own)


def _best_epoch(file: Path, identity: Mapping[str, str]) -> int:
    """Epoch of a verified checkpoint."""
    checkpoint = read_checkpoint(file)
    _verify(file, checkpoint, identity)
    return int(checkpoint["epoch"])


def trained_epochs(directory: Path) -> int:
    """Number of epochs trained in a directory, by its last checkpoint; 0 without one."""
    file = directory / LAST
    return read_checkpoint(file, "checkpoint_dir")["epoch"] + 1 if file.is_file() else 0


def resumable(directory: Path) -> bool:
    """Whether a directory has a checkpoint to resume from."""
    return any((directory / name).is_file() for name in RESUMABLE)


@contextmanager
def lock_directory(options: TrainingOptions) -> Iterator[None]:
    """Lock the checkpoint directory, if there is one; in a distributed run, only in the first process.

    Raises
    ------
    ValueError
        If another training run uses it.
    """
    if options.checkpoint_dir is None or not _writes(options):
        yield
        return
    with locked(Path(options.checkpoint_dir)):
        yield


@contextmanager
def checkpoint_directory(options: TrainingOptions) -> Iterator[None]:
    """Lock the checkpoint directory of a stage, and refuse one whose checkpoints would be overwritten.

    Raises
    ------
    ValueError
        If another training run uses it, or it has checkpoints that `resume_from` does not name.
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
        Naming the checkpoints.
    """
    if present := checkpoints_in(directory):
        raise ValueError(
            f"checkpoint_dir: {str(directory)!r} has checkpoints ({', '.join(present)}) that would be overwritten; "
            "resume from them (resume=True; of a single stage, resume_from), or choose another directory"
        )


def _writes(options: TrainingOptions) -> bool:
    """Whether this process is the one that writes checkpoints."""
    return not options.is_distributed or _is_first_process()


def _is_first_process() -> bool:
    """Whether this is the first process of a distributed run, even before the processes are connected."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)
