"""One daemon per state directory and per runtime directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from pool_managerd.errors import NodeError
from pool_managerd.store.ownership import claim_directory


class DirectoryLock:
    """An exclusive lock that the kernel drops when its holder dies; the file names the holder's pid for people.

    The directory is made with ``mode`` where it is missing; ``repaired`` says what had to be closed to other users.
    """

    def __init__(self, directory: Path, what: str, mode: int = 0o700) -> None:
        self.repaired: list[str] = []
        self._mode = mode
        self._path = directory / "daemon.lock"
        self._what = what
        self._fd: int | None = None

    def acquire(self) -> None:
        """Does nothing when it is held already.

        Raises NodeError: ALREADY_RUNNING with the holder's pid, DIRECTORY_NOT_OURS, or STATE_UNWRITABLE.
        """
        if self._fd is not None:
            return
        try:
            self.repaired += claim_directory(self._path.parent, self._what, self._mode)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            os.fchmod(fd, 0o600)  # who may open it may lock it
        except OSError as problem:
            raise unwritable(self._path.parent, self._what, problem) from problem
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise NodeError(
                f"cannot use {self._what} {self._path.parent}: another pool-managerd (pid {holder}) is using it",
                code="ALREADY_RUNNING", status=409, retriable=False, details={"pid": holder},
                hint=f"stop the daemon with pid {holder}, or give this one its own --state-dir and --runtime-dir",
            ) from None  # fmt: skip
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as problem:
            os.close(fd)
            raise unwritable(self._path.parent, self._what, problem) from problem
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def unwritable(directory: Path, what: str, problem: OSError) -> NodeError:
    return NodeError(
        f"cannot write to {what} {directory}: {problem.strerror or problem}",
        code="STATE_UNWRITABLE", status=507, retriable=False,
        hint="make the directory writable and leave some space, or choose another one with --state-dir / --runtime-dir",
    )  # fmt: skip
