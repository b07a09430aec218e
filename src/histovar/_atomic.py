"""Write files and directories atomically: a kill or a full disk leaves either the old or the new one, complete.

Everything is written under a hidden name beside its destination, flushed to the disk and then renamed. The hidden name
contains the id of the writing process, so that leftovers of killed processes can be told from files still being
written; the next write to the same destination removes them.
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

# Hidden names repeat this many characters of the destination's name: file systems allow 255 bytes, a character takes
# up to 4.
NAME_LENGTH = 48
# Seconds between attempts to get a lock.
LOCK_INTERVAL = 0.02
# Constants of Linux's renameat2: paths are relative to the working directory; exchange the two names.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: beside its destination, renamed when the block ends without an error.

    Parameters
    ----------
    path
        Destination; its directory exists. Links are followed. Anything that exists and is not a regular file, such as
        ``/dev/stdout``, is written to directly.

    Yields
    ------
    Path
        Where to write: in the same directory, with the same suffix. It is removed if the block raises.

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
    The file's mode follows the umask, also where the writing library would set another.
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
    """Write a directory atomically: beside its destination, renamed when the block ends without an error.

    The destination is replaced with everything in it: callers must check beforehand that they may replace it. Linux
    exchanges the two in one step. Elsewhere the old one is renamed aside and the new one renamed into place; a process
    killed between the two steps leaves the old one under a hidden name, and the next call first puts it back. If two
    processes write to the same destination, the one that finishes last wins.

    Parameters
    ----------
    path
        Destination; its parent exists. Links are followed.

    Yields
    ------
    Path
        An empty directory beside the destination, removed if the block raises.

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
    """Lock a directory; the lock is released when the block or the process ends.

    Parameters
    ----------
    path
        An existing directory.
    seconds
        How long to wait for other processes.
    shared
        Lock for reading: several processes may hold it at once.

    Yields
    ------
    bool or None
        True if the lock is held, False if the time was up before. None on Windows, and where the file system has no
        locks.
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
    """Remove temporary files that killed processes of this machine left beside a destination; restore an old directory.

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
    """Flush a directory to the disk: all files and the names of everything in it."""
    for folder, _, names in os.walk(path):
        for name in names:
            _flush(Path(folder, name))
        flush_directory(Path(folder))


def flush_directory(path: Path) -> None:
    """Flush the names in a directory to the disk, where the system supports it."""
    if sys.platform != "win32":
        _flush(path)


def _flush(path: Path) -> None:
    writing = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY
    descriptor = os.open(path, writing)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot flush
            raise
    finally:
        os.close(descriptor)


def _beside(path: Path, kind: str) -> Path:
    """Make up a hidden name beside a destination, with its suffix."""
    writer = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.parent / f".{path.name[:NAME_LENGTH]}.{writer}.{kind}{path.suffix[:NAME_LENGTH]}"


def _machine() -> str:
    """Digest that identifies this machine and, in a container, its process namespace."""
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
    """Rename a directory, replacing an existing one of that name; the last step of :func:`atomic_directory`.

    Parameters
    ----------
    new
        The directory; on the same file system as ``path``.
    path
        Its new name, not a link.
    """
    _replace_directory(new, path)
    flush_directory(path.parent)


def _replace_directory(new: Path, path: Path) -> None:
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
    """Exchange two names in one step; return False where the system or file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    status: int = rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return status == 0
