"""Removing what an engine filled as it liked, and what its end leaves on memory disks. Stdlib only: it runs in the shim.

No link is followed; no depth and no number of names hurts.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from pool_managerd.runtime import procfs

TEMPORARY = "tmp."
_REMOVED = re.compile(r"\.(.+)\.[0-9-]+\.removed")
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where POSIX shared memory is
_MEASURED_DEPTH = 64
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_temporary(workdir: str, temporary: str) -> None:
    """Remove the engine's directory ``temporary`` in ``workdir``, which is of one launch alone. Never raises."""
    remove_where(workdir, lambda _, name: name == temporary)


def remove_shared_memory(uid: int) -> None:
    """Remove the shared memory of ``uid`` when nothing runs as it. Never raises.

    Another launch of the pool has the same uid: this must be over before there can be one. ``uid`` 0 is no engine's own.
    """
    shared = os.path.realpath(SHARED_MEMORY)
    if uid > 0 and _owns_something_in(shared, uid) and not any(_runs_as(pid, uid) for pid in procfs.pids()):
        remove_where(shared, lambda fd, name: os.stat(name, dir_fd=fd, follow_symlinks=False).st_uid == uid)


def _runs_as(pid: int, uid: int) -> bool:
    """A zombie, which keeps its uid until somebody collects it, does not run."""
    return uid in procfs.uids(pid) and (seen := procfs.stat(pid)) is not None and seen.state not in "ZX"


def _owns_something_in(directory: str, uid: int) -> bool:
    """Most engines leave nothing, and looking for that is quick where looking at every process is not."""
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid == uid:
                    return True
    return False


def remove_where(directory: str, unwanted: Callable[[int, str], bool]) -> None:
    """Remove what is ``unwanted`` in ``directory``; it is asked with the directory's descriptor and a name. Never raises."""
    with suppress(OSError):
        fd = os.open(directory, _DIRECTORY)
        try:
            for name in os.listdir(fd):
                with suppress(OSError):
                    if unwanted(fd, name):
                        remove_tree(fd, name)
        finally:
            os.close(fd)


Failed = Callable[[str, OSError], None]
"""Is told of what stays: its path from the parent on, and why."""


def removed_name(of: str, number: int = 0) -> str:
    """A name for what is no longer to be found as ``of`` and is about to be removed; of such a name, another one."""
    return f".{removed_from(of) or of}.{time.monotonic_ns()}-{number}.removed"


def removed_from(name: str) -> str | None:
    """What had the name that ``removed_name`` took from it; None for any other name."""
    found = _REMOVED.fullmatch(name)
    return None if found is None else found[1]


def remove_tree(parent: int, name: str, failed: Failed = lambda _, __: None) -> int:
    """Remove ``name`` in the directory ``parent`` (a descriptor), whatever it is; how many bytes of disk its files took.

    Nested directories are moved up beside it before they are looked into, so that every path stays one name long. What cannot
    be removed stays, also under a ``removed_name``; ``failed`` is told. Does not raise for what an engine may have done;
    blocks for as long as there is something to remove.
    """
    if not _is_directory(parent, name):
        return _unlink(parent, name, name, failed)
    pending, number, freed = deque([name]), 0, 0
    while pending:
        current = pending.popleft()
        try:
            fd = _enter(parent, current)
        except OSError as error:
            _tell(failed, current, error)
            continue
        try:
            for entry in _names(fd, current, failed):
                if not _is_directory(fd, entry):
                    freed += _unlink(fd, entry, f"{current}/{entry}", failed)
                    continue
                moved = removed_name(name, number)
                number += 1
                _open_up(fd, entry)  # its ".." is rewritten
                try:
                    os.rename(entry, moved, src_dir_fd=fd, dst_dir_fd=parent)
                except OSError as error:
                    _tell(failed, f"{current}/{entry}", error)
                else:
                    pending.append(moved)
        finally:
            os.close(fd)
        try:
            os.rmdir(current, dir_fd=parent)
        except OSError as error:
            _tell(failed, current, error)
    return freed


def _names(directory: int, path: str, failed: Failed) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        _tell(failed, path, error)
        return []


def _tell(failed: Failed, path: str, error: OSError) -> None:
    """What is gone already has not failed."""
    if not isinstance(error, FileNotFoundError):
        failed(path, error)


def measure_tree(parent: int, name: str) -> int:
    """How many bytes ``remove_tree`` would free, while what is there may change; what lies deeper than 64 is not counted."""
    if not _is_directory(parent, name):
        return _size(parent, name)
    total, opened = 0, list[tuple[int, list[str]]]()

    def enter(directory: int, entry: str) -> None:
        with suppress(OSError):
            fd = os.open(entry, _DIRECTORY, dir_fd=directory)
            try:
                opened.append((fd, os.listdir(fd)))
            except OSError:
                os.close(fd)

    enter(parent, name)
    while opened:
        fd, entries = opened[-1]
        if not entries:
            os.close(opened.pop()[0])
        elif not _is_directory(fd, entry := entries.pop()):
            total += _size(fd, entry)
        elif len(opened) < _MEASURED_DEPTH:
            enter(fd, entry)
    return total


def _unlink(parent: int, name: str, path: str, failed: Failed) -> int:
    """The bytes that this has freed."""
    size = _size(parent, name)
    try:
        os.unlink(name, dir_fd=parent)
    except OSError as error:
        _tell(failed, path, error)
        return 0
    return size


def _size(parent: int, name: str) -> int:
    """What a file takes on disk; nothing where it has another name as well, and stays."""
    try:
        info = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return 0
    return info.st_blocks * 512 if stat.S_ISREG(info.st_mode) and info.st_nlink == 1 else 0


def _enter(parent: int, name: str) -> int:
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent)
    except PermissionError:
        _open_up(parent, name)
        return os.open(name, _DIRECTORY, dir_fd=parent)


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
