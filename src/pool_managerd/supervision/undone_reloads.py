"""Reloads that were under way when their daemon ended: the next one undoes them, at its boot."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.launch_record import argv_digest
from pool_managerd.errors import PoolError
from pool_managerd.supervision.launch_work import DRAIN
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pool import Definition
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services


class UndoneReloads:
    """``restore`` once the pools are there, ``epochs`` before engines are adopted, ``forget`` at the end."""

    def __init__(self, pools: Pools, services: Services) -> None:
        self._pools, self._s, self._overrides = pools, services, pools.overrides

    def restore(self) -> None:
        """The drains that belonged to them are not gone on with."""
        for pool_id in self._overrides.pending():
            self._s.records.facts(DRAIN).pop(pool_id, None)
            self._s.records.note_fact(DRAIN, pool_id, None)

    def epochs(self) -> dict[str, int]:
        """By pool id, the reloads that ended with the daemon before: what was launched after that epoch is not adopted."""
        pending = self._overrides.pending().items()
        return {pool_id: int(fact.get("epoch", 0)) for pool_id, fact in pending if not self._is_done(pool_id, fact)}

    def is_committed(self, operation: Operation) -> bool:
        """One that its daemon has not told the end of, and that was done all the same."""
        done = self._overrides.pending().keys() - self.epochs().keys()
        return operation.operation_id in self._overrides.committed() or operation.pool_id in done

    def _is_done(self, pool_id: str, pending: Mapping[str, Any]) -> bool:
        """Its engine is the pool's already."""
        pool = self._pools.find(pool_id)
        return pool is not None and pending.get("argv") not in (None, argv_of(pool.definition))

    async def forget(self) -> None:
        """Told, and over: the pools run what they ran before, or will."""
        undone = self.epochs()
        for pool_id in self._overrides.pending():
            if pool_id in undone:
                human = f"The reload of pool '{pool_id}' that the daemon before had begun is undone: it runs what it ran before"
                self._s.events.emit("reload_undone", human, level="warn", pool_id=pool_id)
            with suppress(PoolError):  # a state that cannot be written now: the next daemon does it again, which changes nothing
                await self._overrides.give_up(pool_id)


def argv_of(definition: Definition) -> str | None:
    """A digest of a submitted engine's command line; None for a configured pool."""
    submitted = definition.submitted
    return argv_digest(submitted.argv) if isinstance(submitted, PreparedEngine) else None
