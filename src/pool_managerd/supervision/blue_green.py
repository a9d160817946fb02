"""One engine in another's place where both fit: the new one comes up beside the old one, which serves until then, and drains."""

from __future__ import annotations

from pool_managerd import failpoints
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.phase import SERVING
from pool_managerd.core.reload import Stage
from pool_managerd.errors import PoolError
from pool_managerd.supervision.asking import Asking
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.reload_run import Reload
from pool_managerd.supervision.services import Services


class BlueGreen:
    """As StopStart. The pool itself is not asked for anything before the new engine has its place."""

    def __init__(self, pools: Pools, services: Services) -> None:
        self._replacements, self._s, self._asking = pools.replacements, services, Asking(pools, services.clock)

    async def bring_up(self, reload: Reload) -> Pool:
        """The new engine is ready beside the old one. Raises PoolError."""
        reload.stage = Stage.LOADING
        candidate = reload.tried = self._replacements.begin(reload.pool, reload.target.new)
        failpoints.reach("reload.loading")
        await self._asking.until(candidate, ev.Start(retry=False, join=False), "up")
        failpoints.reach("reload.loaded")
        return candidate

    def take_over(self, reload: Reload) -> None:
        """It is committed: leases are given on the new one alone; those on the old one, if any, have until the deadline."""
        if reload.tried is not None:
            old = self._replacements.switch(reload.tried, reload.target.new)
            failpoints.reach("reload.taken_over")
            serves = old.instance.phase in SERVING
            self._replacements.see_off(old, ev.Drain(reload.target.deadline_ms, 0) if serves else ev.Stop())

    async def put_back(self, reload: Reload) -> None:
        """The new one ends; the old one has never stopped. Raises PoolError when it would not end."""
        if reload.tried is not None:
            await self._replacements.end(reload.tried, ev.Stop())

    def undone(self, reload: Reload, second: PoolError | None) -> str:
        """What is so after ``put_back``, or after ``second`` kept it from being so."""
        left = "" if second is None else f"; the new one could not be ended: {second.message}"
        return f"what ran before has served all along{left}"

    def give_up(self, reload: Reload) -> None:
        """Somebody stops the pool, and with it whatever runs beside it."""
