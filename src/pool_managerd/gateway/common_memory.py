"""Memory that all worker processes of a gateway have in common: a file without a name, which each of them maps."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager


def shared(size: int) -> int:
    """The descriptor of ``size`` bytes, all zero, for processes that are given it."""
    fd = os.memfd_create("pool-managerd-gateway", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


class CommonMemory:
    """``size`` bytes of what is behind ``fd``; None: of this process alone, which nobody else changes."""

    def __init__(self, size: int, fd: int | None = None) -> None:
        self._fd = fd
        self.bytes = mmap.mmap(-1 if fd is None else fd, size)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process is in here, too: for microseconds. Whoever is killed in here is out of it."""
        if self._fd is None:
            yield
            return
        fcntl.lockf(self._fd, fcntl.LOCK_EX, 1)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1)
