"""Everything a pool's driver works with, in one value."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from pool_managerd.core.baselines import Baselines
from pool_managerd.core.registry import Registry
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.gpu.admission import Admission
from pool_managerd.supervision.gpu.pool_gpus import Gpus
from pool_managerd.supervision.protocols import (
    Clock,
    Engines,
    Files,
    Launcher,
    ListenerLookup,
    Models,
    Preflight,
    Prober,
    Records,
)  # fmt: skip


@dataclass(frozen=True)
class Services:
    """Adapters and shared state. ``gate`` bounds how many pools load at boot; ``on_fatal`` ends the daemon.

    ``silent`` are the pools whose engine is somebody else's and did not answer its last probe.
    """

    clock: Clock
    registry: Registry
    events: EventLog
    baselines: Baselines
    launcher: Launcher
    models: Models
    engines: Engines
    files: Files
    prober: Prober
    listener: ListenerLookup
    records: Records
    gate: BootGate
    preflight: Preflight
    gpus: Gpus
    admission: Admission
    node_id: str
    on_fatal: Callable[[BaseException], None]
    silent: set[str] = field(default_factory=set)


class BootGate:
    """Bounded parallelism for loads at boot; those who wait are served in the order they asked (SPEC §2.4)."""

    def __init__(self, width: int) -> None:
        self._slots = asyncio.Semaphore(width)
        self._inside: set[str] = set()

    async def enter(self, pool_id: str) -> None:
        await self._slots.acquire()
        self._inside.add(pool_id)

    async def queue(self, pool_id: str, every_s: float, still_waiting: Callable[[], None]) -> None:
        """Enter, and call ``still_waiting`` each ``every_s`` until then. A caller that gives up leaves its place free."""
        entering = asyncio.create_task(self.enter(pool_id))
        try:
            while not (await asyncio.wait({entering}, timeout=every_s))[0]:
                still_waiting()
        except asyncio.CancelledError:
            entering.cancel()
            self.leave(pool_id)
            raise

    def leave(self, pool_id: str) -> None:
        """Idempotent: a pool that is not inside changes nothing."""
        if pool_id in self._inside:
            self._inside.discard(pool_id)
            self._slots.release()
