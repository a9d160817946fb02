"""What demand has begun: starts, and ends of pools that make room. Each is a task; whoever takes the turns waits for none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context

from pool_managerd.core.lifecycle import Phase, sleeps_evicted
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import PoolError
from pool_managerd.supervision import fetching
from pool_managerd.supervision.making_room import MakingRoom
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services

_MOMENT_S = 1.0
_NO_ROOM = ("INSUFFICIENT_VRAM", "INSUFFICIENT_RAM", "GPU_NOT_SHARED", "NOT_TOGETHER", "GPU_YIELDED")


class DemandWork:
    """``failed`` tells all who wait for a pool why it did not start; ``ring`` is called when something is over.

    ``begun`` are the operations of starts, by pool id, and ``evictions`` the ends that are under way.
    """

    def __init__(
        self, pools: Pools, services: Services, room: MakingRoom, failed: Callable[[str, PoolError], None],
        ring: Callable[[], None],
    ) -> None:  # fmt: skip
        self._pools, self._s, self._room, self._failed, self._ring = pools, services, room, failed, ring
        self._loads: dict[str, asyncio.Task[None]] = {}
        self.begun: dict[str, Operation] = {}
        self.evictions: dict[str, asyncio.Task[None]] = {}
        self._stays_until: dict[str, float] = {}

    def load(self, pool_id: str, context: Context | None = None) -> None:
        """Begin a start, in the ``context`` of whoever it is for, or join the one that is under way."""
        if pool_id not in self._loads:
            task = asyncio.create_task(self._loaded(pool_id), name=f"demand:{pool_id}", context=context)
            self._loads[pool_id] = task
            task.add_done_callback(lambda _: self._over(self._loads, pool_id))

    async def _loaded(self, pool_id: str) -> None:
        slept = False
        try:
            pool, start = self._pools.get(pool_id), ev.Start(origin="demand")
            slept = sleeps_evicted(pool.state)
            self.begun[pool_id] = operation = await self._pools.change(pool, "ensure_ready", start, "up", desired="auto")
            self._ring()
            await operation.wait()
        except PoolError as problem:
            # Else somebody was faster, or it did not wake and is started anew: it is looked again.
            if problem.code not in _NO_ROOM and not slept:
                self._failed(pool_id, problem)
        finally:
            self.begun.pop(pool_id, None)

    def has_yet_to_reserve(self) -> bool:
        """A start that was begun has not come to its admission yet."""
        for pool_id in self._loads:
            pool = self._pools.find(pool_id)
            launch = None if pool is None or pool.instance.phase is not Phase.STAGING else pool.launch
            staging = launch is not None and launch.sizing is None and launch.step != fetching.STEP  # that may take hours
            waking = pool is not None and pool.instance.phase is Phase.WAKING and self._s.admission.sleepers.has_left(pool)
            if staging or waking or pool_id not in self.begun:
                return True
        return False

    def evict(self, pool_id: str, why: str, *, asleep: bool = False) -> None:
        """Stop it, where nothing is in flight on it, or put it to sleep where it can and that may do (``asleep``). One that would
        not go is left alone for a moment.
        """
        if pool_id not in self.evictions and self._s.clock.monotonic() >= self._stays_until.get(pool_id, 0.0):
            task = self.evictions[pool_id] = asyncio.create_task(self._evicted(pool_id, why, asleep), name=f"evict:{pool_id}")
            task.add_done_callback(lambda _: self._over(self.evictions, pool_id))

    async def _evicted(self, pool_id: str, why: str, asleep: bool) -> None:
        try:
            operation = await self._room.let_go(pool_id, asleep=asleep)
        except PoolError:  # somebody was faster
            until = self._stays_until[pool_id] = self._s.clock.monotonic() + _MOMENT_S
            self._s.clock.call_at(until, self._ring)
            return
        goes = "put to sleep" if operation.goal == "asleep" else "stopped"
        self._s.events.emit("evicted", f"Pool '{pool_id}' is {goes} {why}", pool_id=pool_id)
        try:
            await operation.wait()
        except PoolError:  # it would not end: whoever looks next sees that
            if operation.goal == "asleep":
                self._room.slept_in_vain(pool_id)

    def _over(self, tasks: dict[str, asyncio.Task[None]], pool_id: str) -> None:
        tasks.pop(pool_id, None)
        self._ring()

    async def close(self) -> None:
        """Nothing is waited for any more."""
        tasks = [*self._loads.values(), *self.evictions.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
