"""How a node's pools go down with it: drained and stopped; their intent stays, so that the next daemon starts them again."""

from __future__ import annotations

import asyncio

from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.phase import SERVING
from pool_managerd.errors import PoolError
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services


async def stop_all(pools: Pools, services: Services, deadline_ms: int) -> None:
    """Drain and stop every pool, each in ``deadline_ms`` and its own grace at most, and end their actors."""
    pools.closing = True
    await asyncio.gather(*(_stop(pool, pools, services, deadline_ms) for pool in pools.instances()))
    await pools.close()


async def _stop(pool: Pool, pools: Pools, services: Services, deadline_ms: int) -> None:
    clock, phase = services.clock, pool.instance.phase
    late = clock.call_at(clock.monotonic() + deadline_ms / 1000, lambda: pools.tell(pool, ev.Stop()))
    event: ev.Event = ev.Drain(deadline_ms, 0) if phase in SERVING else ev.Stop()
    if phase is Phase.DRAINING:
        event = ev.Tick()
    try:
        try:
            operation = await pools.request(pool, "shutdown", event, "down")
        except PoolError:  # it has moved on since
            operation = await pools.request(pool, "shutdown", ev.Stop(), "down")
        await operation.wait()
    except PoolError as problem:
        if pools.find(pool.pool_id) is pool:  # else it was forgotten meanwhile
            human = f"Pool '{pool.pool_id}' could not be stopped: {problem.message}"
            services.events.emit("notice", human, level="error", pool_id=pool.pool_id)
    finally:
        late.cancel()
