"""How many pools may load at the same time while the node boots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


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
