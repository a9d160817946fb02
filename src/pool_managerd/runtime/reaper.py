"""A subreaper's duty: what an engine forked comes back to its shim, to be collected and, at the end, killed."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress

from pool_managerd.runtime import procfs

_LEFTOVER_SECONDS = 5.0
_TURN_SECONDS = 0.02


def reap_orphans(engine: int) -> None:
    """Collect dead descendants; never the engine itself, whose pid must stay taken until its group was killed."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while (dead := os.waitid(os.P_ALL, 0, flags)) is not None and dead.si_pid != engine:
        os.waitpid(dead.si_pid, 0)


def has_living_children() -> bool:
    """Whether one of our children has not ended; zombies have."""
    states = (procfs.stat(pid) for pid in procfs.children(os.getpid()))
    return any(found is not None and found.state not in "ZX" for found in states)


def kill_descendants(wakeup: int) -> list[int]:
    """Kill until no child is left; returns those that would not die in time (stuck in the kernel).

    A killed process's children come to us in turn, so going by direct children reaches every generation.
    ``wakeup`` is readable whenever a child ended.
    """
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    me = os.getpid()
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return []  # the kernel's word that nobody is left
        left = procfs.children(me)
        if time.monotonic() >= deadline:
            return left
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)  # a child of ours that is not reaped: the pid is still its own
        select.select([wakeup], [], [], _TURN_SECONDS)
        with suppress(BlockingIOError):
            os.read(wakeup, 4096)
