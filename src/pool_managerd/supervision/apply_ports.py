"""Ports that a configuration gives to a pool and another program has: told with the plan, before an engine is sent there."""

from __future__ import annotations

import os

from pool_managerd.config.plan import Step
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services

LOOPBACK = "127.0.0.1"
MAX_ASKED = 8
"""So many ports of a pool are looked at; who has more has one to spare."""


async def taken_ports(step: Step, pools: Pools, services: Services) -> list[str]:
    """A sentence for each port that the pool has not had until now and that something else has."""
    new, pool = step.config, pools.find(step.pool_id)
    if new is None or new.provisioning.mode == "external":
        return []
    known = pool.config.provisioning.ports if pool is not None and pool.config is not None else ()
    ports = [port for port in new.provisioning.ports[:MAX_ASKED] if port not in known]
    held = {port: who for port in ports if (who := await _holder(step.pool_id, port, pools, services))}
    return [f"port {port} is taken by {who}: the pool does not get it while that is so" for port, who in held.items()]


async def _holder(pool_id: str, port: int, pools: Pools, services: Services) -> str | None:
    """Who listens there; None for nobody, and for the pool's own engine."""
    for other in pools.instances():
        engine = other.launch.prepared
        if other.instance.has_process and isinstance(engine, PreparedEngine) and engine.port == port:
            return None if other.pool_id == pool_id else f"pool '{other.pool_id}'"
    found = await services.listener(os.getpid(), LOOPBACK, port)
    return (found.who or "another program") if found.owner == "other" else None
