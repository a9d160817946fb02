"""Time that only moves when a test says so."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable


class ManualTimer:
    """A call that has not been made yet."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self._call = None

    def fire(self) -> None:
        if self._call is not None:
            self._call()


class ManualClock:
    """A clock for actors under test. ``advance`` fires what falls due, in order, letting tasks run in between."""

    def __init__(self, start: float = 1_000.0) -> None:
        self._now = start
        self._start = start
        self._due: list[tuple[float, int, ManualTimer]] = []
        self._order = itertools.count()

    def monotonic(self) -> float:
        return self._now

    def wall_ms(self) -> int:
        """Unix milliseconds that advance with the clock, from a fixed day."""
        return 1_700_000_000_000 + round((self._now - self._start) * 1000)

    def call_at(self, when: float, call: Callable[[], None]) -> ManualTimer:
        timer = ManualTimer(call)
        heapq.heappush(self._due, (when, next(self._order), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Move on by ``seconds``."""
        end = self._now + seconds
        await settle()
        while self._due and self._due[0][0] <= end:
            when, _, timer = heapq.heappop(self._due)
            self._now = max(self._now, when)
            timer.fire()
            await settle()
        self._now = end


async def settle(rounds: int = 20) -> None:
    """Let every task that can run do so; nothing here waits for real time."""
    for _ in range(rounds):
        await asyncio.sleep(0)
