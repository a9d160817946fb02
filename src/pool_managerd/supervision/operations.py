"""Long operations: accepted at once, finished later, readable by id all along (SPEC §20 no. 12).

What callers see of them; when one has ended that is about a launch says settling.py.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from copy import copy
from itertools import islice
from typing import Any, TypeVar

from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.supervision.protocols import Journal

_T = TypeVar("_T")

KEPT = 1_000


class Operation:
    """``status`` is running, succeeded or failed. ``outcome`` is set on success, ``error`` on failure; ``progress`` until
    then, of some kinds: done, in total, and in words.

    ``goal`` is what its end is: ``now``, ``up``, ``asleep``, ``down`` or ``drained`` (settling.py has the rules). ``key`` is the
    caller's own name for it. ``pool_id`` is empty for what concerns several.
    """

    def __init__(
        self, operation_id: str, kind: str, pool_id: str, started_at_ms: int, goal: str = "", key: str | None = None
    ) -> None:
        self.operation_id = operation_id
        self.key = key
        self.kind = kind
        self.pool_id = pool_id
        self.goal = goal
        self.status = "running"
        self.outcome: dict[str, Any] | None = None
        self.error: PoolError | None = None
        self.progress: dict[str, Any] | None = None
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
        failure: dict[str, Any] | None = None
        if self.error is not None:
            failure = {"code": self.error.code, "message": self.error.message, "hint": self.error.hint}
            if self.kind in ("reload", "apply"):
                failure["details"] = self.error.details
        return {
            "operation_id": self.operation_id, "kind": self.kind, "pool_id": self.pool_id or None, "status": self.status,
            "outcome": self.outcome, "error": failure, "progress": self.progress if self.status == "running" else None,
            "started_at_ms": self.started_at_ms, "ended_at_ms": self.ended_at_ms,
        }  # fmt: skip


class Operations:
    """The newest operations by id; finished ones go first when there are too many. With a ``journal`` they outlive the daemon."""

    def __init__(self, new_id: Callable[[], str], clock_ms: Callable[[], int], journal: Journal | None = None) -> None:
        self._new_id = new_id
        self._clock_ms = clock_ms
        self._journal = journal
        self._known: OrderedDict[str, Operation] = OrderedDict()
        self._unfinished: list[Operation] = []

    def restore(self) -> None:
        """Those of earlier daemons; what was still running then waits for ``resume``."""
        for body in [] if self._journal is None else self._journal.recall_operations():
            with suppress(KeyError, TypeError):  # not of this version: it is not known
                operation = _recalled(body)
                self._known[operation.operation_id] = operation
        self._unfinished = [operation for operation in self.all() if operation.status == "running"]
        self._forget_oldest()

    def resume(self, goes_on: Callable[[Operation], bool]) -> None:
        """What was running when its daemon ended goes on, or it has failed (NODE_RESTARTED)."""
        unfinished, self._unfinished = self._unfinished, []
        for operation in unfinished:
            if not goes_on(operation):
                self.finish(operation, error=_unfinished(operation))

    def begin(self, kind: str, pool_id: str, goal: str = "", key: str | None = None) -> Operation:
        operation = Operation(self._new_id(), kind, pool_id, self._clock_ms(), goal, key)
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

    async def kept(self) -> None:
        """Return when what is known by now is known to the next daemon, too, if that can be."""
        if self._journal is not None:
            await self._journal.kept()

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
            body = {**operation.to_dict(), "goal": operation.goal, "key": operation.key}
            self._journal.put_operation(operation.operation_id, body)

    def get(self, operation_id: str) -> Operation:
        """Raises RequestError OPERATION_NOT_FOUND."""
        operation = self._known.get(operation_id)
        if operation is None:
            raise RequestError(f"operation {operation_id[:64]!r} not found", code="OPERATION_NOT_FOUND", status=404)
        return operation

    def all(self) -> list[Operation]:
        return list(self._known.values())

    def keyed(self, kind: str, pool_id: str, key: str) -> Operation | None:
        """The one that a caller has named so, None when there is none. In ``key`` of it a digest of the request comes first."""
        of_pool = (one for one in reversed(self.all()) if (one.kind, one.pool_id) == (kind, pool_id))
        return next((one for one in of_pool if one.key is not None and one.key.partition(":")[2] == key), None)


def _recalled(body: Mapping[str, Any]) -> Operation:
    """The inverse of ``to_dict``. Raises KeyError or TypeError for what is no operation."""
    operation = Operation(
        body["operation_id"], body["kind"], body["pool_id"] or "", body["started_at_ms"], body.get("goal", ""), body.get("key")
    )
    failure = body["error"]
    error = None
    if failure is not None:
        told = {key: failure[key] for key in ("code", "hint")}
        error = PoolError(failure["message"], **told, details=failure.get("details"))
    if body["status"] != "running":
        operation.finish(body["ended_at_ms"], body["outcome"], error)
    return operation


def _unfinished(operation: Operation) -> NodeError:
    if operation.kind == "reload":
        return NodeError(
            "reload failed: the daemon ended before it was finished; it was undone, what ran before runs on or is started again",
            code="NODE_RESTARTED", hint="reload it again if it is still wanted", details={"rolled_back": True},
        )  # fmt: skip
    if operation.kind == "apply":
        return NodeError(
            "cannot tell how the apply ended: the daemon ended before it was finished; the next one has started by its file",
            code="NODE_RESTARTED", hint="apply the file again: the plan shows what is not as it says",
        )  # fmt: skip
    if operation.kind in ("model_pull", "model_verify"):
        return NodeError(
            "cannot tell how it ended with the model: the daemon ended before; what was fetched by then is kept",
            code="NODE_RESTARTED", hint="ask again: it goes on where it was",
        )  # fmt: skip
    what = f"the {operation.kind.replace('_', ' ')} of pool {operation.pool_id}"
    return NodeError(
        f"cannot tell how {what} ended: the daemon ended before it was finished", code="NODE_RESTARTED",
        hint=f"see what the pool does now (pool-managerd status {operation.pool_id}), and ask again if it is still wanted",
    )  # fmt: skip


async def carried_through(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``, which goes on when the caller is cancelled."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to be told of it
    return await asyncio.shield(task)
