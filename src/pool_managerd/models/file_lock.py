"""A lock between processes on one file, which ends with its holder; waited for without blocking the event loop."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from pool_managerd.models.part import disk_error

POLL_S = 0.25


@asynccontextmanager
async def locked(path: Path, waiting: Callable[[], None]) -> AsyncIterator[bool]:
    """Hold the lock of ``path``; true where somebody else had it before. ``waiting`` is called as long as they have.

    Raises NodeError.
    """
    waited = False
    while (fd := await asyncio.to_thread(try_lock, path)) is None:
        waited = True
        waiting()
        await asyncio.sleep(POLL_S)
    try:
        yield waited
    finally:
        await asyncio.shield(asyncio.to_thread(_release, path, fd))


def _release(path: Path, fd: int) -> None:
    path.unlink(missing_ok=True)
    os.close(fd)


def try_lock(path: Path) -> int | None:
    """The descriptor that holds the lock of ``path``; None while somebody else does. Blocks. Raises NodeError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as problem:
        raise disk_error(path, problem) from problem
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.stat()):  # else its holder has removed it meanwhile: it locks nothing
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as problem:
        os.close(fd)
        raise disk_error(path, problem) from problem
    os.close(fd)
    return None


def is_locked(path: Path) -> bool:
    """Whether somebody has the lock of ``path``; nothing is made to find out. Blocks."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
