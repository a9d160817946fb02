"""What an engine's end leaves on memory disks. Stdlib only: it runs in the shim."""

from __future__ import annotations

import os
from contextlib import suppress

from pool_managerd.runtime import procfs
from pool_managerd.runtime.removal import remove_tree

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where POSIX shared memory is


def sweep(workdir: str, uid: int) -> None:
    """Remove the engine's temporary files, and its shared memory when nobody else has ``uid`` (0: somebody may).

    Shared memory of a process that still runs stays. Never raises.
    """
    with suppress(OSError):
        fd = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            remove_tree(fd, "tmp")
        finally:
            os.close(fd)
    if uid <= 0 or any(uid in procfs.uids(pid) for pid in procfs.pids()):
        return
    with suppress(OSError):
        fd = os.open(SHARED_MEMORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in os.listdir(fd):
                with suppress(OSError):
                    if os.stat(name, dir_fd=fd, follow_symlinks=False).st_uid == uid:
                        remove_tree(fd, name)
        finally:
            os.close(fd)
