"""A small file that is there as a whole or not at all, whenever the machine stops; and a lock among all who change some."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_note(path: Path, text: str) -> None:
    """Have ``path`` say ``text``: on the disk, name included, when this returns. Raises OSError."""
    draft = path.with_suffix(f".{os.getpid()}.new")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        left = text.encode()
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(draft, path)  # noqa: PTH104 - beside the other calls of the kernel, one each
    sync_folder(path.parent)


def remove_note(path: Path) -> None:
    """And have it be gone on the disk, too. Raises OSError."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """What was named or deleted in it is so on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """One at a time, of all threads and processes; it ends with its holder. Blocks: nobody has it for long. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
