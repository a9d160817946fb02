"""Saving and restoring the slots of simulated engines: it takes a while, does not always come to an end, and breaks at times."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, nullcontext

from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.slot_cache import Restored
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Emit
from pool_managerd.testing.life import Life

BREAKS, STANDS = 0.02, 0.02
TOKENS = 2_000


class SimulatedSlots:
    """What was saved of a pool is on the machine, as the files of a real one are."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def launching(self, pool: Pool, emit: Emit) -> None:
        """Every simulated engine can."""

    def unwanted(self, pool_id: str) -> AbstractContextManager[None]:
        """Saving costs a simulated engine nothing."""
        return nullcontext()

    async def save(self, pool: Pool, emit: Emit) -> None:
        await self._work(pool, pool.definition.policy.save_timeout_s)
        self._life.machine.saved_slots.add(pool.pool_id)
        emit("cache_saved", f"Saved 1 slot of pool '{pool.pool_id}'", slots=1, tokens=TOKENS, bytes=TOKENS)

    async def restore(self, pool: Pool, emit: Emit) -> Restored:
        if pool.pool_id not in self._life.machine.saved_slots:
            return Restored()
        self._life.machine.saved_slots.discard(pool.pool_id)
        await self._work(pool, pool.definition.policy.restore_timeout_s)
        emit("cache_restored", f"Restored 1 slot of pool '{pool.pool_id}'", slots=1, tokens=TOKENS)
        return Restored(1, TOKENS)

    async def _work(self, pool: Pool, limit_s: float) -> None:
        """An engine that does not answer is waited for as long as that may take, and once in a while for ever."""
        machine, engine = self._life.machine, pool.launch.prepared
        found = None if engine is None else machine.listening(int(engine.url.rpartition(":")[2]))
        bounded = pool.instance.phase in (Phase.STOPPING, Phase.WARMING)  # by the lifecycle, whatever this does
        drawn = machine.chance.random() if bounded else 1.0
        if drawn < BREAKS:
            raise RuntimeError("the simulated work on slots broke")
        if drawn < BREAKS + STANDS:
            await asyncio.get_running_loop().create_future()
        answers = found is not None and not (found.hung or found.busy)
        await asyncio.sleep(machine.soon(0.01, 2.0) if answers else limit_s)
        if answers and found is not None:
            machine.answered[found.pool_id, found.launch.epoch] = machine.timeline.now
