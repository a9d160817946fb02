"""One after the other on each GPU."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager


class Turns:
    """By device UUID. Who wants several gets them in one order, so that no two wait for each other."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def of(self, uuids: Collection[str]) -> AsyncIterator[None]:
        async with AsyncExitStack() as held:
            for uuid in sorted(set(uuids)):
                await held.enter_async_context(self._locks.setdefault(uuid, asyncio.Lock()))
            yield
