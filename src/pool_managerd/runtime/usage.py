"""What an engine's processes use, and whether one of them is stopped or stuck: read from /proc, a little at each probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pool_managerd.core.narration import printable
from pool_managerd.runtime import procfs
from pool_managerd.runtime.clients import silent_clients
from pool_managerd.runtime.identity import is_shim
from pool_managerd.runtime.waiting import in_own_thread

_FAMILY_LASTS = 12
_MAX_READ = 256


@dataclass(frozen=True, slots=True)
class EngineUsage:
    """Of all processes of one engine. ``data_bytes`` (read and written) and ``blocked`` are None and empty in a short reading.

    ``stopped`` and ``blocked`` name the first process that is, and ``blocked`` where in the kernel it sleeps.
    """

    cpu_s: float
    memory_bytes: int
    data_bytes: int | None = None
    stopped: str = ""
    blocked: str = ""


class EngineUsages:
    """How this machine's engines are seen from outside."""

    def reader(self, pid: int) -> UsageReader:
        return UsageReader(pid)

    def stuck(self, pid: int) -> str:
        """In which uninterruptible sleep ``pid`` is; empty when in none."""
        return stuck(pid)

    async def silent_clients(self, port: int) -> tuple[float, ...]:
        """For how many seconds each open connection to ``port`` has brought nothing new."""
        return await in_own_thread(silent_clients, port)


class UsageReader:
    """Reads one engine. Which processes it has is looked up anew at every full reading, and now and then."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._family: dict[int, int] = {}
        self._lasts = 0

    async def read(self, *, full: bool) -> EngineUsage | None:
        """None when the engine is gone. ``full`` costs a hundred small reads, otherwise it is one per process."""
        return await in_own_thread(self._read, True) if full else self._read(False)

    def _read(self, full: bool) -> EngineUsage | None:
        self._lasts -= 1
        if full or self._lasts < 0:
            seen = procfs.stat(self._pid)
            if seen is None:
                return None
            root = seen.parent_pid if is_shim(seen.parent_pid) else self._pid
            self._family, self._lasts = {self._pid: seen.start_ticks, **procfs.descendants(root)}, _FAMILY_LASTS
        found = ((pid, procfs.usage(pid), start) for pid, start in list(self._family.items())[:_MAX_READ])
        used = {pid: usage for pid, usage, start in found if usage is not None and usage.start_ticks == start}
        return self._sum(used, full) if self._pid in used else None

    def _sum(self, used: Mapping[int, procfs.Usage], full: bool) -> EngineUsage:
        return EngineUsage(
            cpu_s=sum(usage.cpu_ticks for usage in used.values()) / procfs.TICKS_PER_S,
            memory_bytes=sum(usage.rss_bytes for usage in used.values()),
            data_bytes=sum(procfs.moved_bytes(pid) or 0 for pid in used) if full else None,
            stopped=next((_named(pid) for pid, usage in used.items() if usage.state == "T"), ""),
            blocked=next(filter(None, map(stuck, used)), "") if full else "",
        )


def stuck(pid: int) -> str:
    """``pid 7 (x) is in uninterruptible sleep (D) in nfs_wait`` when it or a thread of it is; else nothing."""
    where = procfs.blocked(pid)
    if where is None:
        return ""
    return f"{_named(pid)} is in uninterruptible sleep (D)" + (f" in {where}" if where else "")


def _named(pid: int) -> str:
    return f"pid {pid} ({printable(procfs.name(pid) or 'gone')})"
