"""What follows when an operation has ended, or an engine that was submitted has done its work."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from pool_managerd.core.event import Event
from pool_managerd.core.lifecycle import Phase
from pool_managerd.errors import PoolError
from pool_managerd.supervision.intents import Intents
from pool_managerd.supervision.operations import Operation, Operations
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.services import Services


class Node(Protocol):
    """The pools, as far as their ends need them."""

    intents: Intents
    operations: Operations
    closing: bool

    def find(self, pool_id: str) -> Pool | None: ...
    def turn(self, pool: Pool) -> asyncio.Lock: ...


class Endings:
    """Of all pools of a node."""

    def __init__(self, pools: Node, services: Services) -> None:
        self._pools, self._s = pools, services

    def hear(self, event: Event) -> None:
        """A submitted engine that has done its work is not begun again by the next daemon, unless it is just asked for."""
        pool = self._pools.find(event.pool_id) if event.type == "exit" and event.pool_id else None
        if pool is None or pool.config is not None or self._pools.turn(pool).locked():
            return
        if event.fields.get("replica_id") in (None, pool.instance_id.replica_id):
            self._pools.intents.note_down(pool.pool_id)

    def tell(self, operation: Operation, outcome: dict[str, Any] | None, error: PoolError | None) -> None:
        """Its end, to whoever waits and to the log."""
        pool = self._pools.find(operation.pool_id)
        failed = error is not None and not self._pools.closing and operation.kind == "preload"
        # In another phase than failed somebody's later start goes on.
        if failed and pool is not None and pool.config is None and pool.instance.phase is Phase.FAILED:
            self._pools.intents.note_down(operation.pool_id)
        if error is not None:
            self._s.events.clean_error(error)
        self._pools.operations.finish(operation, outcome, error)
        human = f"{operation.kind.replace('_', ' ').capitalize()} of pool '{operation.pool_id}' {operation.status}"
        self._s.events.emit(
            "operation", human, level="debug", pool_id=operation.pool_id, operation_id=operation.operation_id,
            kind=operation.kind, status=operation.status,
        )  # fmt: skip
