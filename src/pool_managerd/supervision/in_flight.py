"""What an engine has in hand beside leases: the requests of clients that take none. A drain waits for those, too."""

from __future__ import annotations

import aiohttp

from pool_managerd.core.engines import ENGINES
from pool_managerd.core.registry import Registry
from pool_managerd.supervision.pause import pause
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.services import Services

_ANSWER_S = 1.0
GAP_S = 0.25


async def requests_of(pool: Pool, services: Services, unheard: int = 0) -> int:
    """How many the engine says it works on, those that wait included; 0 where it does not say, ``unheard`` where not at once."""
    engine = pool.launch.prepared
    kind = None if engine is None else ENGINES.get(engine.engine)
    if engine is None or kind is None or kind.counters is None:
        return 0
    try:
        told = await services.prober.counters(engine.url, kind.counters, _ANSWER_S)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
        return unheard
    return 0 if told is None else told.requests


def in_hand(pool: Pool, registry: Registry) -> int:
    """What a drain of this instance waits for: its leases, or what the engine was last seen to have while it drains."""
    return max(registry.leases_on(pool.pool_id, pool.instance.epoch), pool.launch.requests)


async def a_moment(services: Services) -> None:
    """Between two questions."""
    await pause(services.clock, GAP_S)
