"""GPU memory that is to be free for others: pools that hold some of it go, as soon as nothing is in flight on them, and those
that run with the daemon come back afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from pool_managerd.core.demand.room import Resident, RoomPlan, plan_room
from pool_managerd.core.gpu.kept_free import KeptFree
from pool_managerd.core.lifecycle import Desired, Phase, sleeps_evicted
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.phase import ENDING, IDLE
from pool_managerd.errors import PoolError
from pool_managerd.supervision.demand_work import DemandWork
from pool_managerd.supervision.making_room import MakingRoom
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services

_LOOK_AGAIN_S = 10.0
_STAYS_AWAY_S = 60.0
"""Of a GPU where others hold now more and now less: a pool does not come and go with that."""


class GivingWay:
    """``closing`` are pools that must go and are in use: nobody is given a slot of them any more."""

    def __init__(self, pools: Pools, services: Services, room: MakingRoom, work: DemandWork) -> None:
        self._pools, self._s, self._room, self._work = pools, services, room, work
        self.closing: frozenset[str] = frozenset()
        self.look_again_s: float | None = None
        """While somebody is to come back: memory of others becomes free without a word."""
        self._gone: dict[str, float] = {}
        """Those that had to go, and before when none comes back."""

    async def look(self) -> None:
        """One look at what holds memory that is to be free, and what follows."""
        short = self._s.gpus.shortfalls()
        plan, now = await self._plan(short), self._s.clock.monotonic()
        why, whole = "; ".join(dict.fromkeys(one.why for one in short.values())), any(one.whole for one in short.values())
        for name in plan.evict:
            self._gone[name] = now if whole else now + _STAYS_AWAY_S
            self._work.evict(name, f"as GPU memory is left to others: {why}")
        self.closing = frozenset(plan.waits_for)
        for name in list(self._gone):
            await self._bring_back(name)
        self.look_again_s = _LOOK_AGAIN_S if self._gone else None

    async def _plan(self, short: Mapping[str, KeptFree]) -> RoomPlan:
        if not short:
            return RoomPlan()
        held = [pool for pool in self._pools.all() if pool.instance.phase not in IDLE and short.keys() & pool.launch.device_uuids]
        ends = [pool.instance_id for pool in held if _ends(pool)]
        there = [pool for pool in held if pool.instance_id not in ends]
        by_id = {pool.pool_id: pool.instance_id for pool in there}
        whole = {uuid for uuid, one in short.items() if one.whole}
        left = {pool.pool_id for pool in there if whole & {*pool.launch.device_uuids}}
        residents = [_may_go(one, left=one.pool_id in left) for one in await self._room.residents(there)]

        def fits(gone: Collection[str]) -> bool:
            return not self._s.gpus.shortfalls([*ends, *(by_id[name] for name in gone)])

        if (plan := plan_room(residents, fits)) is not None:
            return plan
        may_go = [one for one in residents if not one.kept]  # less than is asked for, as others must stay
        idle = tuple(one.pool_id for one in may_go if not one.in_hand)
        return RoomPlan(idle, tuple(one.pool_id for one in may_go if one.in_hand))

    async def _bring_back(self, name: str) -> None:
        """One that had to go, once it has room: where it runs with the daemon. Others start when they are asked for."""
        pool = self._pools.find(name)
        if pool is None or not _comes_back(pool):
            del self._gone[name]
            return
        soon = self._s.clock.monotonic() < self._gone[name]
        if soon or pool.instance.phase is not Phase.DOWN or (await self._room.look(pool, 0.0)).why_not is not None:
            return
        del self._gone[name]
        try:
            await self._pools.change(pool, "start", ev.Start(origin="gpus"), "up", desired="auto")
        except PoolError:  # somebody else has decided over it meanwhile
            return


def _ends(pool: Pool) -> bool:
    falls_asleep = pool.instance.phase is Phase.SLEEPING and not sleeps_evicted(pool.state)
    return pool.instance.phase in ENDING or falls_asleep


def _comes_back(pool: Pool) -> bool:
    """It was wanted, and is not up again already; nobody wants it down."""
    runs_with_the_daemon = pool.config is not None and pool.config.preload
    return (
        runs_with_the_daemon
        and not pool.state.held
        and (pool.state.desired is Desired.EVICTED or pool.instance.phase not in IDLE)
    )


def _may_go(one: Resident, *, left: bool) -> Resident:
    """From a GPU that was left to others altogether everything goes, unless it is being reloaded."""
    return replace(one, kept="") if left and not one.reloaded else one
