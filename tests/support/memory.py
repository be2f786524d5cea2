"""Memory between pages that nobody may touch, and work that may crash."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable

import numpy as np

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """`array`, uint8 [size], that ends at a forbidden page (or begins behind one, where not `at_end`)."""

    def __init__(self, size: int, at_end: bool) -> None:
        pages = -(-size // PAGE)
        self.memory = mmap.mmap(-1, (pages + 2) * PAGE)
        whole = np.frombuffer(self.memory, np.uint8)
        self.address = whole.ctypes.data
        self.guards = (self.address, self.address + (pages + 1) * PAGE)
        start = PAGE + (pages * PAGE - size if at_end else 0)
        self.array = whole[start : start + size]

    def protect(self, access: int) -> None:
        for guard in self.guards:
            if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), access):
                raise OSError(ctypes.get_errno(), "mprotect failed")

    def __enter__(self) -> Guarded:
        self.protect(0)
        return self

    def __exit__(self, *_: object) -> None:
        self.protect(mmap.PROT_READ | mmap.PROT_WRITE)


def survives(work: Callable[[], None], seconds: int = 120) -> bool:
    """Runs `work` in a child process, forked here; whether it came to its end in time."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0
