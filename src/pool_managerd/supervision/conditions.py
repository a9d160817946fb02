"""What each pool is to somebody who wants a slot of it."""

from __future__ import annotations

from pool_managerd.core.demand.turns import Condition, Seen
from pool_managerd.core.lifecycle import Phase, sleeps_evicted, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.phase import IDLE, RISING
from pool_managerd.errors import RequestError
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.settling import objection


class Conditions:
    """Of a node's pools, as they are when they are asked for."""

    def __init__(self, pools: Pools, services: Services) -> None:
        self._pools, self._s = pools, services

    def of_id(self, pool_id: str) -> Seen:
        """Of one that is no more: nobody is to wait for it."""
        if (pool := self._pools.find(pool_id)) is not None:
            return self.of(pool)
        return Seen(Condition.REFUSED, refusal=RequestError(f"pool {pool_id} not found", code="POOL_NOT_FOUND", status=404))

    def of(self, pool: Pool) -> Seen:
        """Of one that waits before its next start only for room, that it is down: with room it starts. So does a sleeper."""
        state, i = pool.state, pool.instance
        if view(state).ready and not self._pools.precedence.tries(pool.pool_id):
            total, free = self._s.registry.get_slots(pool.pool_id)
            return Seen(Condition.READY, 1 if total is None else free or 0)
        reloads = self._pools.precedence.has(pool.pool_id)
        asleep = sleeps_evicted(state) and not reloads
        if reloads or i.phase in (Phase.READY, Phase.ATTACHED) or (i.phase is Phase.SLEEPING and not asleep):
            return Seen(Condition.ENDING)
        if i.phase in RISING or (i.phase is Phase.BACKOFF and not state.lacks_room):
            return Seen(Condition.LOADING)
        refusal = objection(state, ev.Start(origin="demand"), self._s.clock.monotonic(), pool.definition.policy)
        if refusal is not None:
            return Seen(Condition.REFUSED, refusal=refusal)
        return Seen(Condition.DOWN if asleep or i.phase in IDLE else Condition.ENDING)
