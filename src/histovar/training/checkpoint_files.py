"""Checkpoint files: atomic writes, reading without pickle, and a lock on their directory."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

# Checkpoints of a stage: the best epoch, the last epoch, the state before the first epoch, and the last epoch of the
# prior, which is deleted once the prior is trained.
BEST, LAST, START, PRIOR = "best.ckpt", "last.ckpt", "start.ckpt", "prior.ckpt"
# Checkpoints to resume from, the most advanced first.
RESUMABLE = (LAST, START, PRIOR)
LOCK = ".training.lock"
# Suffix of temporary files.
PART = ".part"
# An unreadable lock is being written, or, after this many seconds, was left by a process that died while writing it.
SECONDS_TO_WRITE_LOCK = 60

_locked_here: set[Path] = set()


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: to a temporary file, which is flushed to disk and renamed.

    Parameters
    ----------
    file
        Path of the file.
    write
        Function that writes the content to a given path.

    Raises
    ------
    OSError
        If the file cannot be written, for instance because the disk is full; an earlier file is then unchanged.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        raise OSError(error.errno, f"checkpoint_dir: {str(file)!r} cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def link_atomically(file: Path, target: Path) -> None:
    """Hard-link a checkpoint to a second name, or copy it where the file system has no links."""
    import shutil

    def write(path: Path) -> None:
        try:
            os.link(file, path)
        except OSError:
            shutil.copyfile(file, path)

    write_atomically(target, write)


def save_atomically(checkpoint: dict[str, Any], file: Path) -> None:
    """Save a checkpoint atomically, see :func:`write_atomically`."""
    # Through memory, as torch's own writer does not report that the disk is full.
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_atomically(file, lambda path: path.write_bytes(content.getbuffer()))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints atomically; its own moves across file systems are not atomic."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint atomically."""
        save_atomically(checkpoint, Path(path))


def read_checkpoint(file: Path, argument: str = "resume_from") -> dict[str, Any]:
    """Read a checkpoint without unpickling arbitrary objects.

    Raises
    ------
    FileNotFoundError
        If it is missing.
    ValueError
        If it is truncated or not a checkpoint.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{argument}: no checkpoint at {str(file)!r}")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{argument}: {str(file)!r} is truncated, damaged or not a checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{argument}: {str(file)!r} is not a training checkpoint")
    return checkpoint


def checkpoints_in(directory: Path) -> list[str]:
    """Names of the checkpoints in a directory."""
    return [name for name in (PRIOR, START, BEST, LAST) if (directory / name).exists()]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a directory against other training runs; it is created if absent.

    A lock left by a dead process of this machine is taken over.

    Raises
    ------
    ValueError
        If another training run uses the directory, or it is not writable.
    """
    lock = directory.resolve() / LOCK
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _take(lock)
    except OSError as error:
        raise ValueError(f"checkpoint_dir: {str(directory)!r} cannot be written to ({error})") from None
    _locked_here.add(lock)
    try:
        for name in (BEST, LAST, START, PRIOR):  # temporary files of a process that was killed
            for unfinished in directory.glob(f".{name}.*{PART}"):
                unfinished.unlink(missing_ok=True)
        yield
    finally:
        _locked_here.discard(lock)
        lock.unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):  # not empty any more
                directory.rmdir()


def _take(lock: Path) -> None:
    """Create the lock file; one of a dead process is removed first."""
    for _ in range(2):
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            owner = _read_lock(lock)
            if _is_held(lock, owner):
                raise _refusal(lock, owner) from None
            # Rename it and look again before deleting: meanwhile another process may have replaced the dead lock by its
            # own, which is then put back.
            renamed = lock.with_name(f"{LOCK}.{uuid.uuid4().hex[:8]}")
            with suppress(FileNotFoundError):
                os.rename(lock, renamed)
                renamed_owner = _read_lock(renamed)
                if renamed_owner != owner:
                    with suppress(OSError):
                        os.link(renamed, lock)
                renamed.unlink()
                if renamed_owner != owner:
                    raise _refusal(lock, renamed_owner) from None
        else:
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": _process_start(os.getpid())}
            with os.fdopen(descriptor, "w") as file:
                json.dump(owner, file)
            return
    raise _refusal(lock, _read_lock(lock))


def _refusal(lock: Path, owner: dict[str, Any]) -> ValueError:
    """Make the error that says which process has locked the directory."""
    process = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"
    return ValueError(
        f"checkpoint_dir: another training run ({process}) writes to {str(lock.parent)!r}; choose another directory, "
        f"or delete {str(lock)!r} if that process is dead"
    )


def _read_lock(lock: Path) -> dict[str, Any]:
    """Read which process made a lock; empty if the file is absent or unreadable."""
    try:
        owner = json.loads(lock.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_held(lock: Path, owner: dict[str, Any]) -> bool:
    """Whether the process that made a lock may still be running."""
    if not isinstance(owner.get("pid"), int):
        try:
            return time.time() - lock.stat().st_mtime < SECONDS_TO_WRITE_LOCK
        except FileNotFoundError:
            return False
    if owner.get("host") != socket.gethostname():
        return True
    if owner["pid"] == os.getpid():
        return lock in _locked_here
    if os.name != "posix":
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    # Another process may have the same id by now.
    return _process_start(owner["pid"]) == owner.get("started")


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks; None if the system does not say, "dead" for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "dead" if fields[0] in "ZX" else fields[19]
