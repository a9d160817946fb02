"""Whether the kernel's OOM killer was at work when an engine ended. Standard library only: it runs in the shim.

Three witnesses, from the surest to the weakest: the kernel's log names the process; the engine's own memory cgroup counts
its kills; a cgroup that the engine shares with others, or the machine, counts one about when it ended. Counters are looked
at every half a minute, so that a kill of long ago is not taken for this one's.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress

from pool_managerd.core.cgroups import counted, memory_groups

_LOOK_SECONDS, _FIRST_SECONDS = 30.0, 0.5
_READ_BYTES = 8192
_MAX_RECORDS = 20_000
_MAX_SECONDS = 0.1
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The number that every kernel gives to it: the kernel's log counts pids as it does."""
_RECORD = re.compile(r"(\d{1,10}),\d{1,20},[^;]{0,200};(.*)", re.DOTALL)
_KILLED = re.compile(r"[Oo]ut of memory: Killed process (\d{1,10})\b")
_MAX_LINE_CHARS = 300


def victim_of(record: str) -> tuple[int, str] | None:
    """Pid and words of a record of /dev/kmsg in which the kernel itself says that it killed for want of memory."""
    found = _RECORD.match(record)
    if found is None or int(found[1]) >> 3:  # the facility: 0 is the kernel, and only it can claim to be that
        return None
    words = found[2].split("\n", 1)[0]
    killed = _KILLED.search(words)
    return None if killed is None else (int(killed[1]), words[:_MAX_LINE_CHARS])


class OomWatch:
    """Of one engine, from its start to its end. Nothing raises: what cannot be read is not known."""

    def __init__(self, engine: int, *, root: str = "/", kernel_log: str = "/dev/kmsg") -> None:
        self._engine, self._root = engine, root
        self._log = _opened_at_end(kernel_log)
        self._place: str | None = None
        self._scope = ""
        self._before: tuple[int | None, int | None] = (None, None)
        self._due = 0.0
        self._gap = _FIRST_SECONDS
        self.look()

    def look(self) -> None:
        """Remember how the counters stand, when that is due: an engine that has ended has no cgroup to be found any more. Called
        at every turn, of which there are enough.
        """
        now = time.monotonic()
        if now < self._due:
            return
        self._due, self._gap = now + self._gap, _LOOK_SECONDS
        self._place = self._counter_of(str(self._engine))
        self._scope = "shared" if self._place == self._counter_of("self") else "engine"
        self._before = self._counts()

    def kills(self) -> tuple[int | None, str | None]:
        """How many kills were counted since the last look, and where: ``engine``, ``shared`` or ``host``; None: not known."""
        (group, host), (group_before, host_before) = self._counts(), self._before
        in_group = None if group is None or group_before is None else max(0, group - group_before)
        on_host = None if host is None or host_before is None else max(0, host - host_before)
        if in_group or (in_group is not None and not on_host):
            return in_group, self._scope
        return on_host, None if on_host is None else "host"

    def line_about(self, pids: set[int]) -> str | None:
        """The line in which the kernel says that it killed one of ``pids``, if it has said so since the engine began to run."""
        if self._log is None:
            return None
        until = time.monotonic() + _MAX_SECONDS
        with suppress(OSError):
            for _ in range(_MAX_RECORDS):
                try:
                    record = os.read(self._log, _READ_BYTES)
                except BrokenPipeError:  # the log overran us; the next read goes on after the gap
                    continue
                found = victim_of(record.decode("utf-8", "replace"))
                if found is not None and found[0] in pids:
                    return found[1]
                if not record or time.monotonic() > until:
                    break
        return None

    def _counts(self) -> tuple[int | None, int | None]:
        """Of the engine's memory cgroup, as it was last seen, and of the machine."""
        group = None if self._place is None else counted(_text(self._place), "oom_kill")
        return group, counted(_text(os.path.join(self._root, "proc/vmstat")), "oom_kill")

    def _counter_of(self, pid: str) -> str | None:
        """Where the memory cgroup of ``pid`` counts; None where it is in none but the root, which counts nothing of its own."""
        v1, v2 = memory_groups(_text(os.path.join(self._root, "proc", pid, "cgroup")))
        for path, mount, name in ((v1, "sys/fs/cgroup/memory", "memory.oom_control"), (v2, "sys/fs/cgroup", "memory.events")):
            if path is not None and path != "/":
                place = os.path.join(self._root, mount, path.lstrip("/"), name)
                if os.path.exists(place):
                    return place
        return None


def _opened_at_end(path: str) -> int | None:
    """The kernel's log behind what is there now; None where it is not ours to read, or counts pids otherwise than we do."""
    with suppress(OSError):
        if os.readlink("/proc/self/ns/pid") != _FIRST_PID_NAMESPACE:
            return None
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.lseek(fd, 0, os.SEEK_END)
        except OSError:
            os.close(fd)
            raise
        return fd
    return None


def _text(path: str) -> str:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 65_536).decode("utf-8", "replace")
        finally:
            os.close(fd)
    return ""
