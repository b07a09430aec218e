"""Write files and directories so that a kill or a full disk leaves the old or the new, whole.

All is written beside its destination, under a hidden name, flushed to the disk and then renamed. The hidden name holds
the process that writes it, so that what a killed process left is told from what a live one writes, and is removed by
the next write to the same destination.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

# Characters of the destination's name that hidden names repeat: file systems take 255 bytes, 4 of them a character.
NAME_LENGTH = 48
# Seconds between tries for a lock.
LOCK_INTERVAL = 0.02
# Linux: relative to the working directory; exchange two names.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file beside its destination and rename it when the block ends without an error.

    Parameters
    ----------
    path
        Destination; its directory exists. A link is followed. What is neither a file nor absent, such as
        ``/dev/stdout``, is written to as it is.

    Yields
    ------
    Path
        Where to write: in the same directory, of the same suffix. It is removed if the block raises.

    Raises
    ------
    FileNotFoundError
        If the directory is missing.
    IsADirectoryError
        If the destination is a directory.
    OSError
        If the disk is full or writing is refused; the destination is then as it was.

    Notes
    -----
    The mode follows the umask, whoever writes the file and however.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"path: {str(path)!r} is a directory; give the name of a file")
    if path.exists() and not path.is_file():
        yield path
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: no directory {str(path.parent)!r} to write {path.name!r} to; make it first")
    remove_leftovers(path)
    beside = _beside(path, "tmp")
    descriptor = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = os.fstat(descriptor).st_mode & 0o777
    os.close(descriptor)
    try:
        yield beside
        beside.chmod(mode)
        _flush(beside)
        os.replace(beside, path)
        flush_directory(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Write a directory beside its destination and rename it when the block ends without an error.

    The destination is replaced with all that it holds: callers make sure beforehand that it is theirs to replace.
    Linux exchanges the two in one step. Elsewhere the old one is renamed aside and the new one renamed in; a process
    killed between the two leaves the old one under a hidden name, and the next call puts it back first. Of two
    processes that write one destination, the later one's directory stays.

    Parameters
    ----------
    path
        Destination; its parent exists. A link is followed.

    Yields
    ------
    Path
        An empty directory beside it, removed if the block raises.

    Raises
    ------
    FileNotFoundError
        If the parent is missing.
    NotADirectoryError
        If the destination is a file.
    OSError
        If the disk is full or writing is refused; the destination is then as it was.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"path: {str(path)!r} is a file; give the name of a directory")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: no directory {str(path.parent)!r} to write {path.name!r} to; make it first")
    remove_leftovers(path)
    beside = _beside(path, "tmp")
    beside.mkdir()
    try:
        yield beside
        flush_tree(beside)
        rename_directory(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def directory_lock(path: Path, *, seconds: float, shared: bool = False) -> Iterator[bool | None]:
    """Hold the lock of a directory, which ends with the process.

    Parameters
    ----------
    path
        An existing directory.
    seconds
        How long to wait for others.
    shared
        For reading: several may hold it at once.

    Yields
    ------
    bool or None
        Whether the lock is held; not so after the time is up. None on Windows, and where the file system has no locks.
    """
    if sys.platform == "win32":
        yield None
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield _try_lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, seconds)
    finally:
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine left beside a destination, and put back what they set aside.

    Parameters
    ----------
    path
        The destination, not a link.
    """
    pattern = re.compile(rf"\.{re.escape(path.name[:NAME_LENGTH])}\.(\w+)-(\d+)-\w+\.(tmp|old)(\..*)?", re.DOTALL)
    for name in os.listdir(path.parent):
        match = pattern.fullmatch(name)
        if match and match[1] == _machine() and not _is_running(int(match[2])):
            leftover = path.parent / name
            if match[3] == "old" and not path.exists():
                leftover.rename(path)
            elif leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def flush_tree(path: Path) -> None:
    """Write a directory's files, and the names of all that is in it, to the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            _flush(Path(folder, name))
        flush_directory(Path(folder))


def flush_directory(path: Path) -> None:
    """Write a directory's names to the disk, where the system can."""
    if sys.platform != "win32":
        _flush(path)


def _flush(path: Path) -> None:
    writing = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY
    descriptor = os.open(path, writing)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def _beside(path: Path, kind: str) -> Path:
    """A hidden name beside a destination, of its suffix."""
    writer = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.parent / f".{path.name[:NAME_LENGTH]}.{writer}.{kind}{path.suffix[:NAME_LENGTH]}"


def _machine() -> str:
    """What tells this machine, and this container's process numbers, from others."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return hashlib.sha256(f"{platform.node()} {processes}".encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    if sys.platform == "win32":  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _try_lock(descriptor: int, kind: int, seconds: float) -> bool | None:
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(LOCK_INTERVAL)
        except OSError:
            return None


def rename_directory(new: Path, path: Path) -> None:
    """Give a directory the name of another, which is removed, or of none; as :func:`atomic_directory` does at its end.

    Parameters
    ----------
    new
        On the same file system.
    path
        Its new name, not a link.
    """
    _rename_in(new, path)
    flush_directory(path.parent)


def _rename_in(new: Path, path: Path) -> None:
    while True:
        if path.exists():
            if _exchange(new, path):
                shutil.rmtree(new, ignore_errors=True)
                return
            aside = _beside(path, "old")
            try:
                path.rename(aside)
            except FileNotFoundError:
                continue
            try:
                new.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    aside.rename(path)
                    raise
                shutil.rmtree(aside, ignore_errors=True)
                continue
            shutil.rmtree(aside, ignore_errors=True)
            return
        try:
            new.rename(path)
            return
        except OSError as error:  # another process was quicker
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    done: int = rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return done == 0
