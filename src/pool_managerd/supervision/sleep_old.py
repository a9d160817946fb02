"""One engine in another's place while that sleeps: its process stays, and it wakes where the new one does not pass."""

from __future__ import annotations

from pool_managerd import failpoints
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.reload import Stage
from pool_managerd.errors import EngineError, PoolError
from pool_managerd.supervision.asking import Asking
from pool_managerd.supervision.blue_green import BlueGreen
from pool_managerd.supervision.in_flight import a_moment
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.reload_run import Reload, emptied
from pool_managerd.supervision.services import Services


class SleepOld:
    """As BlueGreen, from when the engine before it sleeps until it wakes."""

    def __init__(self, pools: Pools, services: Services) -> None:
        self._replacements, self._s, self._asking = pools.replacements, services, Asking(pools, services.clock)
        self._beside = BlueGreen(pools, services)

    async def bring_up(self, reload: Reload) -> Pool:
        """The new engine is ready, the old one asleep. Raises PoolError."""
        try:
            await emptied(reload, self._asking, self._s, ev.Sleep(reload.target.deadline_ms), "asleep")
        except PoolError as problem:
            if problem.code == "SLEEP_FAILED":
                reload.stage = Stage.LOADING  # it does not serve: whoever undoes this waits until it does
                self._note(reload, problem.message)
            raise
        reload.stage = Stage.LOADING
        failpoints.reach("reload.asleep")
        await self._memory_is_seen_free(reload)
        return await self._beside.bring_up(reload)

    async def _memory_is_seen_free(self, reload: Reload) -> None:
        """What the engine says of its sleep is not believed: whether the new one fits is seen on the GPUs. Raises PoolError."""
        clock = self._s.clock
        until = clock.monotonic() + reload.pool.definition.policy.vram_wait_s
        while True:
            try:
                return await self._s.admission.room_for(reload.target.beside())
            except PoolError as problem:
                if clock.monotonic() >= until:
                    held = f"its engine sleeps, and does not free the memory that the new one needs: {problem.message}"
                    self._note(reload, held)
                    raise EngineError(
                        held, code="SLEEP_FAILED", status=503, pool_id=reload.pool.pool_id,
                        hint="the next reload of this engine is not tried in this way, unless it is asked for",
                    ) from problem  # fmt: skip
            await a_moment(self._s)

    def _note(self, reload: Reload, why: str) -> None:
        """What was learnt of this launch, for the next reload's choice."""
        if (actor := self._replacements.actor_of(reload.pool)) is not None:
            actor.learn(reload.pool.instance.epoch, sleepless=why)

    def take_over(self, reload: Reload) -> None:
        """It is committed: what sleeps has no leases, and ends."""
        self._beside.take_over(reload)

    async def put_back(self, reload: Reload) -> None:
        """The new one ends, then the old one wakes. Raises PoolError where it does not serve again."""
        second: PoolError | None = None
        try:
            await self._beside.put_back(reload)
        except PoolError as problem:  # it holds what the old one would wake into: that is begun anew when there is room
            second = problem
        begin = ev.Start() if second is None else ev.Restart()
        await self._asking.until(reload.pool, begin, "up")
        if second is not None:
            raise second

    def undone(self, reload: Reload, second: PoolError | None) -> str:
        """What is so after ``put_back``, or after ``second`` kept it from being so."""
        if second is not None:
            return f"what ran before does not serve yet, and is tried again: {second.message}"
        return "what ran before is awake and serves again"

    def give_up(self, reload: Reload) -> None:
        """Somebody stops the pool, and with it whatever sleeps or runs beside it."""
