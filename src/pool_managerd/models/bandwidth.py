"""How fast downloads may be, all of them together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


class Bandwidth:
    """``bytes_per_s`` None is no limit. Whoever spends waits until all that was spent before is paid for, so that nothing is ever
    made up for: an hour without downloads is no burst after it.
    """

    def __init__(
        self, bytes_per_s: int | None, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:  # fmt: skip
        self._bytes_per_s, self._clock, self._sleep = bytes_per_s, clock, sleep
        self._paid_at = 0.0

    async def spend(self, count: int) -> None:
        """``count`` bytes have come: the next ones are to come when these are paid for."""
        if self._bytes_per_s is None:
            return
        now = self._clock()
        self._paid_at = max(now, self._paid_at) + count / self._bytes_per_s
        await self._sleep(self._paid_at - now)
