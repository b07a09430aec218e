"""Checkpoint files: written whole or not at all, read without pickle, by one training of a directory at a time."""

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

# Checkpoints of a stage: the best epoch, the last one, what is there before the first, and the prior's last epoch, kept
# until the prior is trained.
BEST, LAST, START, PRIOR = "best.ckpt", "last.ckpt", "start.ckpt", "prior.ckpt"
# Those to continue from, the furthest first.
RESUMABLE = (LAST, START, PRIOR)
LOCK = ".training.lock"
# End of the names of files that are being written.
PART = ".part"
# A lock of which nothing can be read is being written, or was left by a process that died while it wrote it.
SECONDS_TO_WRITE_LOCK = 60

_locked_here: set[Path] = set()


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, flush it to disk and rename it, so that it is never there in part.

    Parameters
    ----------
    file
        Where it belongs.
    write
        Writes it to the path it is given.

    Raises
    ------
    OSError
        If it cannot be written, for instance to a full disk; what was there before stays.
    """
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(beside, file)
    except OSError as error:
        raise OSError(error.errno, f"checkpoint_dir: {str(file)!r} cannot be written ({error.strerror})") from error
    finally:
        beside.unlink(missing_ok=True)


def link_whole(file: Path, target: Path) -> None:
    """Give a checkpoint a second name without writing it again; a copy where the file system has no links."""
    import shutil

    def write(beside: Path) -> None:
        try:
            os.link(file, beside)
        except OSError:
            shutil.copyfile(file, beside)

    write_whole(target, write)


def save_whole(checkpoint: dict[str, Any], file: Path) -> None:
    """Write a checkpoint by :func:`write_whole`."""
    # Through memory: torch's own writer does not say that the disk is full.
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_whole(file, lambda beside: beside.write_bytes(content.getbuffer()))


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint files by :func:`write_whole`: its own are moved across file systems, thus in part."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint."""
        save_whole(checkpoint, Path(path))


def read_checkpoint(file: Path, argument: str = "resume_from") -> dict[str, Any]:
    """Read a checkpoint without unpickling objects.

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
        raise ValueError(f"{argument}: {str(file)!r} is not a checkpoint of a training")
    return checkpoint


def checkpoints_in(directory: Path) -> list[str]:
    """Names of the checkpoints that a directory has."""
    return [name for name in (PRIOR, START, BEST, LAST) if (directory / name).exists()]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other trainings out of a directory, which is made if absent.

    A lock that a dead process of this machine left is taken over.

    Raises
    ------
    ValueError
        If another training runs in it, or it cannot be written to.
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
        for name in (BEST, LAST, START, PRIOR):  # what a process left that was killed while it wrote
            for unfinished in directory.glob(f".{name}.*{PART}"):
                unfinished.unlink(missing_ok=True)
        yield
    finally:
        _locked_here.discard(lock)
        lock.unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):  # it is no longer empty
                directory.rmdir()


def _take(lock: Path) -> None:
    """Make the lock; where there is one of a dead process, remove it first."""
    for _ in range(2):
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            found = _read_lock(lock)
            if _is_held(lock, found):
                raise _refusal(lock, found) from None
            # Renamed, not deleted: of two processes that find the same dead lock, one renames what the other has made.
            aside = lock.with_name(f"{LOCK}.{uuid.uuid4().hex[:8]}")
            with suppress(FileNotFoundError):
                os.rename(lock, aside)
                taken = _read_lock(aside)
                if taken != found:
                    with suppress(OSError):
                        os.link(aside, lock)
                aside.unlink()
                if taken != found:
                    raise _refusal(lock, taken) from None
        else:
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": _process_start(os.getpid())}
            with os.fdopen(descriptor, "w") as file:
                json.dump(owner, file)
            return
    raise _refusal(lock, _read_lock(lock))


def _refusal(lock: Path, owner: dict[str, Any]) -> ValueError:
    who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"
    return ValueError(
        f"checkpoint_dir: another training ({who}) writes to {str(lock.parent)!r}; name another directory, or delete "
        f"{str(lock)!r} if that process is dead"
    )


def _read_lock(lock: Path) -> dict[str, Any]:
    try:
        owner = json.loads(lock.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_held(lock: Path, owner: dict[str, Any]) -> bool:
    """Whether the process that made the lock may still be running."""
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
    # Another process may have the number by now.
    return _process_start(owner["pid"]) == owner.get("started")


def _process_start(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where the system does not tell, "dead" of a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "dead" if fields[0] in "ZX" else fields[19]
