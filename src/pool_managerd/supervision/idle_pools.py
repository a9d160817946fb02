"""Since when pools have had nothing to do, and which of them have had nothing for too long."""

from __future__ import annotations

from collections.abc import Callable, Collection

from pool_managerd.config import Config
from pool_managerd.core.lifecycle import sleeps_evicted, view
from pool_managerd.supervision.in_flight import in_hand
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services


class IdlePools:
    """Told of each lease that comes or goes."""

    def __init__(self, pools: Pools, services: Services, config: Callable[[], Config]) -> None:
        self._pools, self._s, self._config = pools, services, config
        self._used_at: dict[str, float] = {}

    def touch(self, pool_id: str) -> None:
        """It was in use just now."""
        self._used_at[pool_id] = self._s.clock.monotonic()

    def since(self, pool: Pool) -> float:
        """Since which monotonic second it has had no request that is known of."""
        return max(self._used_at.get(pool.pool_id, 0.0), pool.instance.ready_since or 0.0)

    def ms(self, pool: Pool) -> int | None:
        """How long it has had nothing to do; None while it has, and while it is not ready."""
        if not view(pool.state).ready or in_hand(pool, self._s.registry):
            return None
        return max(0, round((self._s.clock.monotonic() - self.since(pool)) * 1000))

    def due(self, pool: Pool) -> float | None:
        """When it will have been idle for too long; None for never."""
        there = view(pool.state).ready or sleeps_evicted(pool.state)
        if not (ttl_s := self.ttl_s(pool)) or pool.state.held or not there:
            return None
        busy = in_hand(pool, self._s.registry) or self._pools.precedence.has(pool.pool_id)
        return None if busy else self.since(pool) + ttl_s

    def overdue(self, waited_for: Collection[str]) -> list[tuple[str, float]]:
        """Pools that have been idle for too long, and for how long. Where clients without a lease are served, that is looked at
        again later.
        """
        now, found = self._s.clock.monotonic(), list[tuple[str, float]]()
        for pool in self._pools.all():
            due = self.due(pool)
            if due is not None and now >= due and pool.pool_id not in waited_for:
                found.append((pool.pool_id, now - self.since(pool)))
                self.touch(pool.pool_id)
        return found

    def ttl_s(self, pool: Pool) -> float:
        """How long it may be idle; 0: for ever."""
        config = pool.config
        if config is None or config.pinned or pool.definition.external:
            return 0.0
        return (self._config().lifecycle.idle_ttl_ms if config.idle_ttl_ms is None else config.idle_ttl_ms) / 1000
