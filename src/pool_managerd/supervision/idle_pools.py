"""Since when pools have had nothing to do, and which of them have had nothing for too long."""

from __future__ import annotations

from collections.abc import Callable

from pool_managerd.config import Config
from pool_managerd.core.lifecycle import view
from pool_managerd.supervision.in_flight import in_hand
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services


class IdlePools:
    """Looked at whenever a lease comes or goes."""

    def __init__(self, pools: Pools, services: Services, config: Callable[[], Config]) -> None:
        self._pools, self._s, self._config = pools, services, config
        self._used_at: dict[str, float] = {}
        self._in_use: set[str] = set()

    def note(self) -> None:
        """Who has something in hand now, and who has nothing any more."""
        for pool in self._pools.all():
            if in_hand(pool, self._s.registry):
                self._in_use.add(pool.pool_id)
            elif pool.pool_id in self._in_use:
                self._in_use.discard(pool.pool_id)
                self.touch(pool.pool_id)

    def touch(self, pool_id: str) -> None:
        """It was in use just now."""
        self._used_at[pool_id] = self._s.clock.monotonic()

    def since(self, pool: Pool) -> float:
        """Since which monotonic second it has had no request that is known of."""
        return max(self._used_at.get(pool.pool_id, 0.0), pool.instance.ready_since or 0.0)

    def due(self, pool: Pool) -> float | None:
        """When it will have been idle for too long; None for never."""
        config = pool.config
        if config is None or config.pinned or pool.definition.external or pool.state.held or not view(pool.state).ready:
            return None
        ttl_ms = self._config().lifecycle.idle_ttl_ms if config.idle_ttl_ms is None else config.idle_ttl_ms
        busy = in_hand(pool, self._s.registry) or self._pools.precedence.has(pool.pool_id)
        return self.since(pool) + ttl_ms / 1000 if ttl_ms and not busy else None
