"""Removing a tree that an engine filled as it liked: no link is followed, no depth and no number of names hurts."""

from __future__ import annotations

import os
import stat
from collections import deque
from contextlib import suppress


def remove_tree(parent: int, name: str) -> bool:
    """Remove ``name`` in the directory ``parent`` (a descriptor), whatever it is; False when something is left.

    Nested directories are moved up beside it before they are looked into, so that every path stays one name long.
    Does not raise for what an engine may have done; blocks for as long as there is something to remove.
    """
    if not _is_directory(parent, name):
        with suppress(OSError):
            os.unlink(name, dir_fd=parent)
        return not _exists(parent, name)
    pending, number, clean = deque([name]), 0, True
    while pending:
        current = pending.popleft()
        try:
            fd = _enter(parent, current)
        except OSError:
            clean = False
            continue
        try:
            for entry in os.listdir(fd):
                try:
                    if _is_directory(fd, entry):
                        moved = f".{name}.{os.getpid()}.{number}.removed"
                        number += 1
                        _open_up(fd, entry)  # its ".." is rewritten
                        os.rename(entry, moved, src_dir_fd=fd, dst_dir_fd=parent)
                        pending.append(moved)
                    else:
                        os.unlink(entry, dir_fd=fd)
                except OSError:
                    clean = False
        finally:
            os.close(fd)
        try:
            os.rmdir(current, dir_fd=parent)
        except OSError:
            clean = False
    return clean


def _enter(parent: int, name: str) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=parent)
    except PermissionError:
        _open_up(parent, name)
        return os.open(name, flags, dir_fd=parent)


def _open_up(parent: int, name: str) -> None:
    """Only for what is our own user's: root needs no permission, and must not give any through a link put there meanwhile."""
    if os.geteuid() != 0:
        with suppress(OSError):
            os.chmod(name, 0o700, dir_fd=parent)


def _is_directory(parent: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _exists(parent: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return False
    return True
