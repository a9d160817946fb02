"""Whether an engine sleeps, as it says itself."""

from __future__ import annotations

import asyncio

import aiohttp

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.sleep_dialect import SleepDialect
from pool_managerd.errors import EngineError
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.services import Services

_ANSWER_S = 2.0


async def is_asleep(pool: Pool, services: Services) -> bool:
    """Raises TimeoutError, aiohttp.ClientError, OSError or ValueError where it does not say."""
    dialect = dialect_of(pool)
    async with asyncio.timeout(_ANSWER_S):
        return dialect.is_asleep(await services.prober.ask(url_of(pool), dialect.asleep))


async def left_asleep(pool: Pool, services: Services) -> bool:
    """Of an engine that an earlier daemon has left: it must be woken. One that falls asleep by itself wakes by itself."""
    try:
        return not dialect_of(pool).by_itself and await is_asleep(pool, services)
    except (EngineError, TimeoutError, aiohttp.ClientError, OSError, ValueError):
        return False  # its probes will tell


def dialect_of(pool: Pool) -> SleepDialect:
    """Raises EngineError for an engine that cannot sleep."""
    engine = pool.launch.prepared
    if not isinstance(engine, PreparedEngine) or engine.sleep is None:
        raise EngineError("its engine cannot sleep", pool_id=pool.pool_id)
    return engine.sleep


def url_of(pool: Pool) -> str:
    engine = pool.launch.prepared
    return "" if engine is None else engine.url
