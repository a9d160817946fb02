"""Engines that sleep to make room: what they have left of their memory, and having it again before they wake.

What each still holds is known to the next daemon, too: it must not promise again what may be another's by then.
"""

from __future__ import annotations

from pool_managerd.core.gpu.accounts import Reservation
from pool_managerd.core.launch_record import LaunchRecord
from pool_managerd.errors import NodeError, PoolError
from pool_managerd.supervision.gpu.pool_gpus import Gpus
from pool_managerd.supervision.gpu.watch import objection
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Facts

LEFT = "left_memory"
"""The kind of the facts about what sleepers still hold, by pool id."""
_MOST = 0.8


class Sleepers:
    """One per node."""

    def __init__(self, gpus: Gpus, facts: Facts) -> None:
        self._gpus, self._facts = gpus, facts

    async def leave(self, pool: Pool, epoch: int) -> bool:
        """What a launch that sleeps is seen not to hold is anybody's from now on. False while it holds most of what it has
        reserved, where the driver does not say what it holds, and where that cannot be written down.
        """
        await self._gpus.watch.rescan()
        memory = self._gpus.memory
        has, holds = memory.ledger.get(pool.instance_id), memory.measured().get(pool.instance_id)
        if has is None or has.epoch != epoch or holds is None or sum(holds.values()) > _MOST * sum(has.bytes_by_device.values()):
            return False
        try:
            await self._facts.put_fact(LEFT, pool.pool_id, {"epoch": epoch, "holds": holds})
        except NodeError:
            return False
        memory.ledger.leave(pool.instance_id, epoch, holds)
        self._gpus.refresh()
        return True

    async def retake(self, pool: Pool) -> str | None:
        """An engine that is to wake has again what it had reserved; why not, where it has not."""
        if self.has_left(pool) and (barred := self.barred(pool)) is not None:
            return barred.message
        if (holder := await self._gpus.in_the_way(pool)) is not None:
            return f"its GPU memory is held by {holder}"
        if self.has_left(pool):
            self._gpus.memory.ledger.retake(pool.instance_id, self._gpus.memory.accounts())
            self._facts.note_fact(LEFT, pool.pool_id, None)
            self._gpus.refresh()
        return None

    def barred(self, pool: Pool) -> PoolError | None:
        """Why nothing new may begin on the GPUs that it sleeps on; None where it may."""
        due = self._gpus.memory.ledger.due(pool.instance_id)
        known = [self._gpus.watch.effective_health(uuid) for uuid in (() if due is None else due.bytes_by_device)]
        return next((objection(one, pool.pool_id) for one in known if not one.usable), None)

    def has_left(self, pool: Pool) -> bool:
        """It has not yet again what it had reserved before it fell asleep."""
        return self._gpus.memory.ledger.has_left(pool.instance_id)

    def restore(self, launch: LaunchRecord) -> None:
        """Reserve again what a launch has that an earlier daemon has left running: of one that sleeps, what it held then."""
        ledger = self._gpus.memory.ledger
        ledger.restore(Reservation(launch.instance, launch.epoch, dict(launch.reserved_bytes), launch.exclusive))
        left = self._facts.facts(LEFT).get(launch.instance.pool_id, {})
        if left.get("epoch") == launch.epoch and isinstance(holds := left.get("holds"), dict):
            ledger.leave(launch.instance, launch.epoch, {str(uuid): int(part) for uuid, part in holds.items()})

    def is_awake(self, pool: Pool) -> None:
        """Its engine is: what it had reserved is its own, and in use."""
        ledger = self._gpus.memory.ledger
        if ledger.has_left(pool.instance_id) and (due := ledger.due(pool.instance_id)) is not None:
            ledger.restore(due)
            self._facts.note_fact(LEFT, pool.pool_id, None)
