"""Long operations: accepted at once, finished later, readable by id all along (SPEC §20 no. 12)."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from typing import Any

from pool_managerd.errors import PoolError, RequestError

KEPT = 1_000


class Operation:
    """``status`` is running, succeeded or failed. ``outcome`` is set on success, ``error`` on failure."""

    def __init__(self, operation_id: str, kind: str, pool_id: str, started_at_ms: int) -> None:
        self.operation_id = operation_id
        self.kind = kind
        self.pool_id = pool_id
        self.status = "running"
        self.outcome: dict[str, Any] | None = None
        self.error: PoolError | None = None
        self.started_at_ms = started_at_ms
        self.ended_at_ms: int | None = None
        self._done = asyncio.Event()

    async def wait(self) -> dict[str, Any]:
        """The outcome. Raises the operation's PoolError. A caller that goes away does not end the operation."""
        await self._done.wait()
        if self.error is not None:
            raise copy(self.error)  # what is kept stays without the frames of whoever it was raised for
        return self.outcome or {}

    def finish(self, now_ms: int, outcome: dict[str, Any] | None = None, error: PoolError | None = None) -> None:
        """For the node: it has ended."""
        self.status = "failed" if error else "succeeded"
        self.outcome = outcome
        self.error = error
        if error is not None:
            error.__traceback__ = error.__cause__ = error.__context__ = None
        self.ended_at_ms = now_ms
        self._done.set()

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        failure = None
        if self.error is not None:
            failure = {"code": self.error.code, "message": self.error.message, "hint": self.error.hint}
        return {
            "operation_id": self.operation_id, "kind": self.kind, "pool_id": self.pool_id, "status": self.status,
            "outcome": self.outcome, "error": failure, "started_at_ms": self.started_at_ms, "ended_at_ms": self.ended_at_ms,
        }  # fmt: skip


class Operations:
    """The newest operations by id; finished ones go first when there are too many."""

    def __init__(self, new_id: Callable[[], str], clock_ms: Callable[[], int]) -> None:
        self._new_id = new_id
        self._clock_ms = clock_ms
        self._known: OrderedDict[str, Operation] = OrderedDict()

    def begin(self, kind: str, pool_id: str) -> Operation:
        operation = Operation(self._new_id(), kind, pool_id, self._clock_ms())
        self._known[operation.operation_id] = operation
        if len(self._known) > KEPT:
            finished = next((key for key, op in self._known.items() if op.status != "running"), None)
            if finished is not None:
                del self._known[finished]
        return operation

    def discard(self, operation: Operation) -> None:
        """The request was refused after all: there never was such an operation."""
        self._known.pop(operation.operation_id, None)

    def get(self, operation_id: str) -> Operation:
        """Raises RequestError OPERATION_NOT_FOUND."""
        operation = self._known.get(operation_id)
        if operation is None:
            raise RequestError(f"operation {operation_id[:64]!r} not found", code="OPERATION_NOT_FOUND", status=404)
        return operation

    def all(self) -> list[Operation]:
        return list(self._known.values())
