"""What an engine's end leaves on memory disks. Stdlib only: it runs in the shim."""

from __future__ import annotations

import os
from contextlib import suppress

from pool_managerd.runtime import procfs
from pool_managerd.runtime.removal import remove_tree

TEMPORARY = "tmp."
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where POSIX shared memory is


def sweep(workdir: str, temporary: str, uid: int) -> None:
    """Remove the engine's directory ``temporary`` in ``workdir``, and the shared memory of ``uid`` when nothing runs as it.

    With ``uid`` 0, which is no engine's own, shared memory stays. Never raises.
    """
    with suppress(OSError):
        fd = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            remove_tree(fd, temporary)
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
