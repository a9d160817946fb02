"""A subreaper's duty: what an engine forked comes back to its shim, to be collected and, at the end, killed.

It comes whatever session, title or environment it has; once the shim is dead nothing ties it to the engine any more but
what the shim wrote down. Stdlib only: it runs in the shim.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable
from contextlib import suppress

from pool_managerd.runtime import procfs

_LEFTOVER_SECONDS = 5.0
_TURN_SECONDS = 0.02
_TRACKER_SECONDS = 2.0
MAX_KEPT = 512
_FIRST_SECONDS, _OFTEN_SECONDS, _SELDOM_SECONDS = 0.02, 2.0, 10.0
_YOUNG_SECONDS = 30.0
_SHARE = 50  # a look may cost a fiftieth of the time
_GONE_SECONDS = 60.0


def reap_orphans(engine: int) -> None:
    """Collect dead descendants; never the engine itself, whose pid must stay taken until its group was killed."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while (dead := os.waitid(os.P_ALL, 0, flags)) is not None and dead.si_pid != engine:
        os.waitpid(dead.si_pid, 0)


def has_living_children() -> bool:
    """Whether one of our children has not ended; zombies have."""
    return bool(_living_children())


def _living_children() -> list[int]:
    seen = ((pid, procfs.stat(pid)) for pid in procfs.children(os.getpid()))
    return [pid for pid, found in seen if found is not None and found.state not in "ZX"]


def kill_all_but_trackers(wakeup: int) -> None:
    """Where a Python of theirs has a resource tracker, kill the others first: it then unlinks what they shared, and ends."""
    until = time.monotonic() + _TRACKER_SECONDS
    while time.monotonic() < until:
        living = _living_children()
        others = [pid for pid in living if not procfs.is_resource_tracker(pid)]
        if len(others) == len(living):
            return
        _kill(others, wakeup)


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
        _kill(left, wakeup)


def _kill(children: Iterable[int], wakeup: int) -> None:
    """Kill them, and wait a moment for one to end."""
    for pid in children:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)  # a child of ours that is not reaped: the pid is still its own
    select.select([wakeup], [], [], _TURN_SECONDS)
    with suppress(BlockingIOError):
        os.read(wakeup, 4096)


class Lineage:
    """The descendants of the shim, its engine left out. They are looked at often while they change, and while it is young."""

    def __init__(self, shim: int, engine: int) -> None:
        self._shim, self._engine = shim, engine
        self._began = self._last = time.monotonic()
        self._gap = _FIRST_SECONDS
        self._seen: dict[int, int] = {}
        self._gone: dict[int, float] = {}

    def pids(self) -> set[int]:
        """The engine, and what it was seen to have started: what ended a while ago, too, as that may be why it ends now."""
        since = time.monotonic() - _GONE_SECONDS
        return {self._engine, *self._seen, *(pid for pid, at in self._gone.items() if at >= since)}

    def milliseconds_to_look(self) -> float:
        """When the next look is due."""
        return max(0.0, (self._last + self._gap - time.monotonic()) * 1000 + 1)

    def look_again_soon(self) -> None:
        """Things are about to change: the daemon is gone."""
        self._began = time.monotonic()
        self._gap = 0.0

    def look(self) -> list[list[int]] | None:
        """Pid and start ticks of each when there are others than at the last look; None when not, or when none is due."""
        began = time.monotonic()
        if began < self._last + self._gap:
            return None
        found = procfs.descendants(self._shim)
        found.pop(self._engine, None)
        self._last = time.monotonic()
        age = self._last - self._began
        longest = _OFTEN_SECONDS if age < _YOUNG_SECONDS else _SELDOM_SECONDS
        calm = min(longest, max(_FIRST_SECONDS, self._gap * 2)) if found == self._seen else _FIRST_SECONDS
        self._gap = max(calm, (self._last - began) * _SHARE)
        if found == self._seen:
            return None
        self._remember(self._seen.keys() - found.keys())
        self._seen = found
        return [[pid, ticks] for pid, ticks in list(found.items())[-MAX_KEPT:]]

    def _remember(self, gone: set[int]) -> None:
        since = self._last - _GONE_SECONDS
        kept = {pid: at for pid, at in self._gone.items() if at >= since}
        self._gone = dict(list({**kept, **dict.fromkeys(gone, self._last)}.items())[-MAX_KEPT:])
