"""One engine in another's place where both do not fit: the old one drains and ends before the new one loads."""

from __future__ import annotations

from contextlib import suppress

from pool_managerd import failpoints
from pool_managerd.core.lifecycle import Desired
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.phase import IDLE
from pool_managerd.core.reload import Stage
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.asking import Asking
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.reload_run import Reload, emptied
from pool_managerd.supervision.services import Services


class StopStart:
    """``bring_up``, and ``put_back`` where what came up does not stay."""

    def __init__(self, pools: Pools, services: Services) -> None:
        self._pools, self._s, self._asking = pools, services, Asking(pools, services.clock)

    async def bring_up(self, reload: Reload) -> Pool:
        """The new engine is ready in the old one's place. Raises PoolError."""
        if reload.served:
            drain = ev.Drain(reload.target.deadline_ms, 0, recall=True)
            await emptied(reload, self._asking, self._s, drain, "drained")
        elif reload.pool.instance.phase not in IDLE:
            await self._asking.until(reload.pool, ev.Stop(), "down")
        reload.stage = Stage.SWITCHING
        failpoints.reach("reload.switching")
        start = ev.Start(retry=False, join=False, anew=True)
        await self._asking.until(reload.pool, start, "up", reload.target.new)
        failpoints.reach("reload.switched")
        return reload.pool

    def take_over(self, reload: Reload) -> None:
        """It is committed; the pool is what it was, with another engine."""

    async def put_back(self, reload: Reload) -> None:
        """As it was. Raises PoolError when the engine before it does not come up again."""
        pool, old, ask = reload.pool, reload.target.old, self._asking.until
        if not reload.served and reload.desired in (Desired.ON_DEMAND, Desired.EVICTED):
            with suppress(RequestError):  # leases are given already
                return await ask(pool, ev.Evict(), "down", old)
        drained = reload.desired is Desired.DRAINED
        await ask(pool, ev.Drain(0, 0) if drained else ev.Stop(), "down", old)
        await ask(pool, ev.ResetBreaker(), "now")  # what the new one has failed at is not held against the old one
        if reload.desired is Desired.WANTED:
            await ask(pool, ev.Start(join=False, anew=True), "up", old)
        return None

    def undone(self, reload: Reload, second: PoolError | None) -> str:
        """What is so after ``put_back``, or after ``second`` kept it from being so."""
        if second is not None:
            return f"what ran before did not start again either, and is tried again: {second.message}"
        return "what ran before runs again" if reload.desired is Desired.WANTED else "the pool stays down, as it was"

    def give_up(self, reload: Reload) -> None:
        """Somebody stops the pool: what is to run from now on is what ran before."""
        self._pools.post(reload.pool.pool_id, ev.Stop(), reload.target.old)
