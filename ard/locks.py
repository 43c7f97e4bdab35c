"""One process at a time on the folder of a run or a store.

The lock is the operating system's (flock) on a file in the folder. It ends with its process, however that
ends. On NFS, Linux asks the server for it. Where a file system has no locks, a warning says so, and nothing
keeps two processes apart.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import warnings
from datetime import datetime
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: dict[Path, IO[str]] = {}


def _path(folder: Path, rank: int) -> Path:
    # Processes that share the work of a folder have a file each; of two jobs there, those of rank 0 meet.
    return folder.resolve() / (".lock" if rank == 0 else f".lock-{rank}")


def _lock(file: IO[str]) -> int | None:
    """Lock an open file; the number of the error where that does not work."""
    if fcntl is None:
        return errno.ENOSYS
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno
    return None


def _is_still(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@functools.cache
def _warn_without_locks(folder: Path) -> None:
    warnings.warn(
        f"{folder}: no file locks there: nothing keeps a second process off this folder", stacklevel=3
    )


def acquire(folder: Path, rank: int = 0) -> None:
    """Keep other processes of this rank off a folder, which is made if it is not there, until `release`.

    A process that has the lock already keeps it.

    Raises:
        ValueError: another process has it; the message says which.
    """
    path = _path(folder, rank)
    if path in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        problem = _lock(file)
        if problem is None:
            # Whoever held the lock may have removed the file between the two lines above.
            if _is_still(path, file):
                break
            file.close()
            continue
        if problem in _WITHOUT_LOCKS:
            _warn_without_locks(folder)
            break
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(
            f"{folder}: is in use by {holder}; accepted is one process at a time: wait for it, or name "
            "another folder with --out"
        )
    file.truncate(0)
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    file.write(f"process {os.getpid()} on {platform.node()} since {since}\n")
    file.flush()
    _held[path] = file


def release(folder: Path, rank: int = 0) -> None:
    """Let other processes in; nothing happens where this one has no lock."""
    path = _path(folder, rank)
    if (file := _held.pop(path, None)) is not None:
        path.unlink(missing_ok=True)  # while it is locked: see `acquire`
        file.close()
