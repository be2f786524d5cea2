"""One run at a time in a folder: a lock that the kernel releases when its process dies, however it dies.

The file `lock` in the run's folder is locked with flock(2) and holds "<host> <pid>" for the message.
Where the file system has no locks, its text alone decides: a process of this host that has ended
holds nothing, one of another host holds the folder until the file is removed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LOCK = "lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the folder of a run, which is made if it is not there.

    Raises:
        ValueError: another process, or another run in this one, holds it. The message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        holder = os.pread(descriptor, 400, 0).decode(errors="replace").split()
        if not _take(descriptor, holder):
            raise ValueError(_refusal(folder, path, holder))
        if holder:
            log.warning("%s was left locked by %s, which has ended", folder, _shown(holder))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take(descriptor: int, holder: list[str]) -> bool:
    """Whether the lock is this process's now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return not _is_alive(holder)
    return True


def _is_alive(holder: list[str]) -> bool:
    """Whether the process that a lock names may still run."""
    if len(holder) != 2 or not holder[1].isdecimal():
        return False
    host, pid = holder[0], int(holder[1])
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _refusal(folder: Path, path: Path, holder: list[str]) -> str:
    ending = "end it, or give another folder"
    if holder and holder[0] != socket.gethostname():
        ending += f"; if that host is gone, remove {path}"
    return f"{folder} is in use by the run of {_shown(holder)}: {ending}"


def _shown(holder: list[str]) -> str:
    return f"process {holder[1]} on {holder[0]}" if len(holder) == 2 else "another process"
