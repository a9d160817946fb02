"""Long operations: accepted at once, finished later, readable by id all along (SPEC §20 no. 12)."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import copy
from itertools import islice
from typing import Any

from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.supervision.protocols import Journal

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
    """The newest operations by id; finished ones go first when there are too many. With a ``journal`` they outlive the daemon."""

    def __init__(self, new_id: Callable[[], str], clock_ms: Callable[[], int], journal: Journal | None = None) -> None:
        self._new_id = new_id
        self._clock_ms = clock_ms
        self._journal = journal
        self._known: OrderedDict[str, Operation] = OrderedDict()

    def restore(self) -> None:
        """Those of earlier daemons. What was still running when its daemon ended has failed (NODE_RESTARTED)."""
        for body in [] if self._journal is None else self._journal.recall_operations():
            with suppress(KeyError, TypeError):  # not of this version: it is not known
                operation = _recalled(body)
                self._known[operation.operation_id] = operation
        for operation in self.all():
            if operation.status == "running":
                self.finish(operation, error=_unfinished(operation))
        self._forget_oldest()

    def begin(self, kind: str, pool_id: str) -> Operation:
        operation = Operation(self._new_id(), kind, pool_id, self._clock_ms())
        self._known[operation.operation_id] = operation
        self._write(operation)
        self._forget_oldest()
        return operation

    def finish(self, operation: Operation, outcome: dict[str, Any] | None = None, error: PoolError | None = None) -> None:
        """It has ended, one way or the other."""
        operation.finish(self._clock_ms(), outcome, error)
        self._write(operation)

    def discard(self, operation: Operation) -> None:
        """The request was refused after all: there never was such an operation."""
        self._forget(operation.operation_id)

    def _forget_oldest(self) -> None:
        surplus = len(self._known) - KEPT
        if surplus > 0:
            finished = (key for key, operation in self._known.items() if operation.status != "running")
            for operation_id in list(islice(finished, surplus)):
                self._forget(operation_id)

    def _forget(self, operation_id: str) -> None:
        self._known.pop(operation_id, None)
        if self._journal is not None:
            self._journal.put_operation(operation_id, None)

    def _write(self, operation: Operation) -> None:
        if self._journal is not None:
            self._journal.put_operation(operation.operation_id, operation.to_dict())

    def get(self, operation_id: str) -> Operation:
        """Raises RequestError OPERATION_NOT_FOUND."""
        operation = self._known.get(operation_id)
        if operation is None:
            raise RequestError(f"operation {operation_id[:64]!r} not found", code="OPERATION_NOT_FOUND", status=404)
        return operation

    def all(self) -> list[Operation]:
        return list(self._known.values())


def _recalled(body: Mapping[str, Any]) -> Operation:
    """The inverse of ``to_dict``. Raises KeyError or TypeError for what is no operation."""
    operation = Operation(body["operation_id"], body["kind"], body["pool_id"], body["started_at_ms"])
    failure = body["error"]
    error = None if failure is None else PoolError(failure["message"], code=failure["code"], hint=failure["hint"])
    if body["status"] != "running":
        operation.finish(body["ended_at_ms"], body["outcome"], error)
    return operation


def _unfinished(operation: Operation) -> NodeError:
    what = f"the {operation.kind.replace('_', ' ')} of pool {operation.pool_id}"
    return NodeError(
        f"cannot tell how {what} ended: the daemon ended before it was finished", code="NODE_RESTARTED",
        hint=f"see what the pool does now (pool-managerd status {operation.pool_id}), and ask again if it is still wanted",
    )  # fmt: skip
