"""How many requests ask the daemon for a slot at once: it has others to answer, and no model keeps another one waiting."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pool_managerd.errors import RequestError

AT_ONCE_PER_MODEL = 16
MAX_WAITING = 4096


class Gate:
    """First come, first served, for each model."""

    def __init__(self, at_once: int = AT_ONCE_PER_MODEL, max_waiting: int = MAX_WAITING) -> None:
        self._at_once, self._max_waiting = at_once, max_waiting
        self._gates: dict[str, asyncio.Semaphore] = {}
        self._asking: Counter[str] = Counter()

    @asynccontextmanager
    async def turn(self, model: str, wait_s: float) -> AsyncIterator[None]:
        """Raises RequestError QUEUE_FULL (429), QUEUE_TIMEOUT (503)."""
        if self._asking.total() >= self._max_waiting:
            raise RequestError(
                f"cannot wait for {model[:80]!r}: {self._max_waiting} requests wait at this gateway already", code="QUEUE_FULL",
                status=429, retriable=True, retry_after_ms=1000,
            )  # fmt: skip
        gate = self._gates.setdefault(model, asyncio.Semaphore(self._at_once))
        self._asking[model] += 1
        try:
            await self._entered(gate, model, wait_s)
            try:
                yield
            finally:
                gate.release()
        finally:
            self._asking[model] -= 1
            if not self._asking[model]:
                del self._asking[model], self._gates[model]

    async def _entered(self, gate: asyncio.Semaphore, model: str, wait_s: float) -> None:
        if not gate.locked():
            await gate.acquire()
            return
        try:
            async with asyncio.timeout(wait_s):
                await gate.acquire()
        except TimeoutError:
            raise RequestError(
                f"no slot of {model[:80]!r} within {wait_s:.0f} s: {self._asking[model] - 1} others wait for it, too",
                code="QUEUE_TIMEOUT", status=503, retriable=True, retry_after_ms=1000,
            ) from None  # fmt: skip
