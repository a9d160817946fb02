"""Asking instances for what brings them somewhere, as parts of something larger: nobody is told of an operation."""

from __future__ import annotations

from pool_managerd.core.lifecycle import events as ev
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pool import Definition, Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.protocols import Clock
from pool_managerd.supervision.settling import unlisted


class Asking:
    """What ``Pools.ask`` does, without an operation of one's own."""

    def __init__(self, pools: Pools, clock: Clock) -> None:
        self._pools, self._clock = pools, clock

    async def until(self, pool: Pool, event: ev.Event, goal: str, definition: Definition | None = None) -> None:
        """Ask, and wait for the end of that. Raises PoolError."""
        await (await self.begin(pool, event, goal, definition)).wait()

    async def begin(self, pool: Pool, event: ev.Event, goal: str, definition: Definition | None = None) -> Operation:
        """Ask; what that leads to can be waited for. Raises the RequestError of a refusal."""
        part, on_end = unlisted(pool.pool_id, goal, self._clock)
        await self._pools.ask(pool, event, part, on_end, definition)
        return part
