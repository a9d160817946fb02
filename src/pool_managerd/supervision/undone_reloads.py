"""Reloads that were under way when their daemon ended: the next one undoes them, at its boot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pool_managerd.supervision.kept_drains import forget_drain
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services


class UndoneReloads:
    """``restore`` once the pools are there, ``epochs`` before engines are adopted, ``forget`` at the end."""

    def __init__(self, pools: Pools, services: Services) -> None:
        self._pools, self._s, self._overrides = pools, services, pools.overrides

    def restore(self) -> None:
        """The drains that belonged to them are not gone on with."""
        for pool_id in self._overrides.pending():
            forget_drain(pool_id, self._s.records)

    def epochs(self) -> dict[str, int]:
        """By pool id, the reloads that ended with the daemon before: what was launched after that epoch is not adopted."""
        pending = self._overrides.pending().items()
        return {pool_id: int(fact.get("epoch", 0)) for pool_id, fact in pending if not self._is_done(pool_id, fact)}

    def replaced(self) -> dict[str, int]:
        """By pool id, the epoch of what a reload that was done had replaced, and that may not have ended yet."""
        done = {pool_id: int(f["epoch"]) for pool_id, f in self._overrides.pending().items() if self._is_done(pool_id, f)}
        return {**done, **self._overrides.replaced()}

    def is_committed(self, operation: Operation) -> bool:
        """One that its daemon has not told the end of, and that was done all the same."""
        done = self._overrides.pending().keys() - self.epochs().keys()
        return operation.operation_id in self._overrides.committed() or operation.pool_id in done

    def _is_done(self, pool_id: str, pending: Mapping[str, Any]) -> bool:
        """What is stored of a submitted engine is another one than when the reload began: it was committed."""
        return pending.get("submitted") not in (None, self._pools.intents.digest_of(pool_id))

    async def forget(self) -> None:
        """Told, and over: the pools run what they ran before, or will."""
        undone = self.epochs()
        for pool_id in self._overrides.pending():
            if pool_id in undone:
                human = f"The reload of pool '{pool_id}' that the daemon before had begun is undone: it runs what it ran before"
                self._s.events.emit("reload_undone", human, level="warn", pool_id=pool_id)
            await self._overrides.give_up(pool_id)
