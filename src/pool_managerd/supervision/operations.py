"""Long operations: accepted at once, finished later, readable by id all along (SPEC §20 no. 12).

``Operation`` and ``Operations`` are what callers see; ``Waiting`` and ``settle`` tie one to the launch that it is about, and
say when it has ended.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from pool_managerd.core.lifecycle import Phase, Policy, PoolState, step, view
from pool_managerd.core.lifecycle.effects import Effect, Refuse
from pool_managerd.core.lifecycle.events import Event
from pool_managerd.core.lifecycle.phase import IDLE, SERVING
from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.supervision.failures import operation_error
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Clock, Journal

_T = TypeVar("_T")

KEPT = 1_000
_STATUS = {"POOL_UNREADY": 503, "POOL_UNAVAILABLE": 503, "CIRCUIT_OPEN": 503}
OnEnd = Callable[["Operation", dict[str, Any] | None, PoolError | None], None]
Ended = tuple[Any, PoolError | None]
"""Outcome and error; exactly one of them counts."""


class Operation:
    """``status`` is running, succeeded or failed. ``outcome`` is set on success, ``error`` on failure; ``progress`` until
    then, of some kinds: done, in total, and in words.

    ``goal`` is what its end is: ``now``, ``up``, ``down`` or ``drained`` (``settle`` has the rules). ``key`` is the caller's own
    name for it. ``pool_id`` is empty for what concerns several.
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


# --- when it has ended -----------------------------------------------------------------------------------------------


@dataclass
class Waiting:
    """A request in the inbox and the operation it becomes: it is over when launch ``epoch`` is up, or down.

    Several callers may wait for one launch; what one of them began, the others joined.
    """

    operation: Operation
    goal: str
    on_end: OnEnd
    epoch: int = 0
    answer: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def accept(self, before: PoolState, after: PoolState) -> None:
        """The request was taken: from here on only its end is awaited."""
        if self.goal == "up":  # a stop that is under way comes before the launch that was asked for
            self.epoch = after.active.epoch + (after.active.phase in (Phase.STOPPING, Phase.BACKOFF))
        else:
            self.epoch = before.active.epoch
        if not self.answer.done():
            self.answer.set_result(None)

    def refuse(self, error: PoolError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


def unlisted(pool_id: str, goal: str, clock: Clock) -> tuple[Operation, OnEnd]:
    """An operation that nobody is told of, as a part of another one, and what ends it."""

    def ended(operation: Operation, outcome: dict[str, Any] | None, error: PoolError | None) -> None:
        operation.finish(clock.wall_ms(), outcome, error)

    return Operation("", "part", pool_id, clock.wall_ms(), goal), ended


def refusal(pool_id: str, effects: tuple[Effect, ...]) -> RequestError | None:
    """The refusal among ``effects`` as the caller is told it, None when the request was taken."""
    refused = next((effect for effect in effects if isinstance(effect, Refuse)), None)
    if refused is None:
        return None
    wait_ms = None if refused.retry_after_s is None else max(1, round(refused.retry_after_s * 1000))
    again = refused.code == "OPERATION_IN_PROGRESS" or wait_ms is not None
    return RequestError(
        refused.message, code=refused.code, status=_STATUS.get(refused.code, 409), pool_id=pool_id, retriable=again,
        retry_after_ms=wait_ms,
    )  # fmt: skip


def objection(pool: PoolState, event: Event, now: float, policy: Policy) -> RequestError | None:
    """The refusal that ``event`` would meet now; asking changes nothing."""
    return refusal(pool.pool_id, step(pool, event, now, policy)[1])


def settle(waiting: Waiting, pool: Pool) -> bool:
    """True when the operation has ended; it was told how. What counts as an end depends on its goal:

    1. ``now``: the request itself was all there was to do.
    2. ``up``: the launch that was asked for is ready, or it will not be (``_end_of_start``).
    3. ``down`` and ``drained``: the engine holds nothing any more, or would not end (``_end_of_stop``).
    """
    if waiting.goal == "now":  # 1
        ended: Ended | None = ({"pool_id": pool.pool_id}, None)
    elif waiting.goal == "up":  # 2
        ended = _end_of_start(waiting.epoch, pool)
    else:  # 3
        ended = _end_of_stop(waiting, pool)
    if ended is None:
        return False
    waiting.on_end(waiting.operation, *ended)
    return True


def _end_of_start(epoch: int, pool: Pool) -> Ended | None:
    """In this order:

    1. It waits for a hold or a quarantine to end: nobody knows when that will be.
    2. The launch before it is still on its way out: wait.
    3. It is ready.
    4. It answers, and its GPU is in quarantine.
    5. It is down: the start was cancelled.
    6. It failed, or waits for another try: that is the next start, not the one that was asked for.
    """
    state, i = pool.state, pool.instance
    if i.phase is Phase.DOWN and state.pending_start:  # 1
        text = f"cannot start pool '{pool.pool_id}': it is {'held' if state.held else 'quarantined'}"
        return None, _refused(pool, text, "POOL_HELD" if state.held else "POOL_UNAVAILABLE")
    if i.epoch < epoch and i.phase not in (Phase.DOWN, Phase.FAILED, Phase.OPEN):  # 2
        return None
    if view(state).ready:  # 3
        pid = pool.launch.process.pid if pool.launch.process is not None else None
        return {"pool_id": pool.pool_id, "pid": pid, "handoff_path": pool.launch.handoff_path}, None
    if state.quarantined and i.phase in SERVING:  # 4
        text = state.last_error or f"one of the GPUs of pool '{pool.pool_id}' is quarantined"
        return None, _refused(pool, text, "POOL_UNAVAILABLE", 503)
    if i.phase is Phase.DOWN:  # 5
        text = state.last_error or f"the start of pool '{pool.pool_id}' was cancelled"
        return None, _refused(pool, text, "OPERATION_CANCELLED")
    if i.phase in IDLE or (i.phase is Phase.ATTACHED and state.reason is not None):  # 6
        return None, operation_error(pool.pool_id, state.last_error, pool.launch)
    return None


def _end_of_stop(waiting: Waiting, pool: Pool) -> Ended | None:
    """In this order:

    1. It is down, or a newer launch has begun, which the engine that was to end did not survive.
    2. It would not end, or its memory is still held.
    3. The drain was taken back.
    """
    state, i = pool.state, pool.instance
    if (i.phase in IDLE and i.phase is not Phase.FAILED) or i.epoch > waiting.epoch:  # 1
        return (pool.last_drain if waiting.goal == "drained" else {"pool_id": pool.pool_id}), None
    if i.phase is Phase.FAILED:  # 2
        code, status = ("VRAM_HELD", 503) if state.reason == "vram_held" else ("STOP_FAILED", 500)
        text = state.last_error or "the engine could not be stopped"
        return None, PoolError(text, code=code, status=status, pool_id=pool.pool_id)
    if waiting.goal == "drained" and i.phase not in (Phase.DRAINING, Phase.STOPPING, Phase.ADOPTING):  # 3
        return None, _refused(pool, f"the drain of pool '{pool.pool_id}' was taken back", "OPERATION_CANCELLED")
    return None


def _refused(pool: Pool, text: str, code: str, status: int = 409) -> RequestError:
    return RequestError(text, code=code, status=status, pool_id=pool.pool_id)
