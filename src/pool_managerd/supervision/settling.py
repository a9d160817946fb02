"""Ties an operation to the launch that it is about, and says when that has ended, and how."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pool_managerd.core.lifecycle import Phase, Policy, PoolState, sleeps_evicted, step, view
from pool_managerd.core.lifecycle.effects import Effect, Refuse
from pool_managerd.core.lifecycle.events import Event
from pool_managerd.core.lifecycle.phase import IDLE, SERVING
from pool_managerd.errors import EngineError, NodeError, PoolError, RequestError
from pool_managerd.supervision.failures import operation_error
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Clock

_STATUS = {"POOL_UNREADY": 503, "POOL_UNAVAILABLE": 503, "CIRCUIT_OPEN": 503}
OnEnd = Callable[["Operation", dict[str, Any] | None, PoolError | None], None]
Ended = tuple[Any, PoolError | None]
"""Outcome and error; exactly one of them counts."""


@dataclass
class Waiting:
    """A request in the inbox and the operation it becomes: it is over when launch ``epoch`` is up, or down.

    Several callers may wait for one launch; what one of them began, the others joined. ``was_down``: nothing was to end.
    """

    operation: Operation
    goal: str
    on_end: OnEnd
    epoch: int = 0
    was_down: bool = False
    answer: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def accept(self, before: PoolState, after: PoolState) -> None:
        """The request was taken: from here on only its end is awaited."""
        if self.goal == "up":  # a stop that is under way comes before the launch that was asked for
            self.epoch = after.active.epoch + (after.active.phase in (Phase.STOPPING, Phase.BACKOFF))
        else:
            self.epoch = before.active.epoch
            i = before.active
            at_rest = i.phase in (Phase.DOWN, Phase.FAILED)
            self.was_down = at_rest and not (i.has_process or i.vram_pending or before.pending_start)
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
    3. ``asleep``: the engine sleeps, or it will not (``_end_of_falling_asleep``).
    4. ``down`` and ``drained``: the engine holds nothing any more, or would not end (``_end_of_stop``).
    """
    if waiting.goal == "now":  # 1
        ended: Ended | None = ({"pool_id": pool.pool_id}, None)
    elif waiting.goal == "up":  # 2
        ended = _end_of_start(waiting.epoch, pool)
    elif waiting.goal == "asleep":  # 3
        ended = _end_of_falling_asleep(pool)
    else:  # 4
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
    5. It sleeps on, as there is no room for it awake.
    6. It is down: the start was cancelled.
    7. It failed, or waits for another try: that is the next start, not the one that was asked for.
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
    if sleeps_evicted(state):  # 5
        text = state.last_error or f"the engine of pool '{pool.pool_id}' sleeps"
        return None, NodeError(text, code="INSUFFICIENT_VRAM", status=503, pool_id=pool.pool_id, retriable=True)
    if i.phase is Phase.DOWN:  # 6
        text = state.last_error or f"the start of pool '{pool.pool_id}' was cancelled"
        return None, _refused(pool, text, "OPERATION_CANCELLED")
    if i.phase in IDLE or (i.phase is Phase.ATTACHED and state.reason is not None):  # 7
        return None, operation_error(pool.pool_id, state.last_error, pool.launch, pool.tried_as)
    return None


def _end_of_falling_asleep(pool: Pool) -> Ended | None:
    """In this order:

    1. It sleeps, or is about to.
    2. Requests were still in flight at the deadline: it serves on.
    3. It would not, and wakes, or has ended.
    """
    i = pool.instance
    if i.phase is Phase.SLEEPING:  # 1
        return ({"pool_id": pool.pool_id}, None) if i.deadline is None else None
    if i.phase is Phase.DRAINING and i.drain_sleeps:
        return None
    if i.phase in (Phase.READY, Phase.STARTING):  # 2
        return None, _refused(pool, f"the drain of pool '{pool.pool_id}' was taken back", "OPERATION_CANCELLED")
    text = pool.state.last_error or f"the engine of pool '{pool.pool_id}' has ended"  # 3
    hint = f"its log may say why (`pool-managerd logs {pool.pool_id}`); `--strategy stop_start` does not need its sleep"
    return None, EngineError(text, code="SLEEP_FAILED", status=503, pool_id=pool.pool_id, hint=hint)


def _end_of_stop(waiting: Waiting, pool: Pool) -> Ended | None:
    """In this order:

    1. It is down, or a newer launch has begun, which the engine that was to end did not survive.
    2. It would not end, or its memory is still held.
    3. The drain was taken back.
    """
    state, i = pool.state, pool.instance
    if (i.phase in IDLE and (waiting.was_down or i.phase is not Phase.FAILED)) or i.epoch > waiting.epoch:  # 1
        unchanged = {"unchanged": True} if waiting.was_down else {}
        return (pool.last_drain if waiting.goal == "drained" else {"pool_id": pool.pool_id, **unchanged}), None
    if i.phase is Phase.FAILED:  # 2
        code, status = ("VRAM_HELD", 503) if state.reason == "vram_held" else ("STOP_FAILED", 500)
        text = state.last_error or "the engine could not be stopped"
        return None, PoolError(text, code=code, status=status, pool_id=pool.pool_id)
    if waiting.goal == "drained" and i.phase not in (Phase.DRAINING, Phase.STOPPING, Phase.ADOPTING):  # 3
        return None, _refused(pool, f"the drain of pool '{pool.pool_id}' was taken back", "OPERATION_CANCELLED")
    return None


def _refused(pool: Pool, text: str, code: str, status: int = 409) -> RequestError:
    return RequestError(text, code=code, status=status, pool_id=pool.pool_id)
