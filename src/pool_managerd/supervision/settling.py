"""When a requested operation has reached its end, one way or the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pool_managerd.core.lifecycle import Instance, Phase, Policy, step, view
from pool_managerd.core.lifecycle.effects import Effect, Refuse
from pool_managerd.core.lifecycle.events import Event
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.workers import operation_error

if TYPE_CHECKING:
    from pool_managerd.supervision.driver import PoolDriver

_STATUS = {"POOL_UNREADY": 503, "POOL_UNAVAILABLE": 503, "CIRCUIT_OPEN": 503}
_ENDED_BADLY = (Phase.DOWN, Phase.FAILED, Phase.BACKOFF, Phase.OPEN)


@dataclass
class Waiting:
    """A request in the inbox and the operation it becomes: it is over when launch ``epoch`` is up, or down.

    Several callers may wait for one launch; what one of them began, the others joined.
    """

    operation: Operation
    goal: str
    on_end: Callable[[Operation, dict[str, Any] | None, PoolError | None], None]
    epoch: int = 0
    answer: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def accept(self, before: Instance, after: Instance) -> None:
        """The request was taken: from here on only its end is awaited."""
        if self.goal == "up":  # a stop that is under way comes before the launch that was asked for
            self.epoch = after.epoch + (after.phase in (Phase.STOPPING, Phase.BACKOFF))
        else:
            self.epoch = before.epoch
        if not self.answer.done():
            self.answer.set_result(None)

    def refuse(self, error: PoolError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


def refusal(pool_id: str, effects: tuple[Effect, ...]) -> RequestError | None:
    """The refusal among ``effects`` as the caller is told it, None when the request was taken."""
    refused = next((effect for effect in effects if isinstance(effect, Refuse)), None)
    if refused is None:
        return None
    return RequestError(refused.message, code=refused.code, status=_STATUS.get(refused.code, 409), pool_id=pool_id)


def objection(i: Instance, event: Event, now: float, policy: Policy) -> RequestError | None:
    """The refusal that ``event`` would meet now; asking changes nothing."""
    return refusal(i.pool_id, step(i, event, now, policy)[1])


def settle(waiting: Waiting, i: Instance, driver: PoolDriver) -> bool:
    """True when the operation is finished; it was told how."""
    result = _judge(waiting, i, driver)
    if result is None:
        return False
    outcome, error = result
    waiting.on_end(waiting.operation, outcome, error)
    return True


def _judge(waiting: Waiting, i: Instance, driver: PoolDriver) -> tuple[dict[str, Any] | None, PoolError | None] | None:
    if waiting.goal == "now":
        return {"pool_id": i.pool_id}, None
    if waiting.goal == "up":
        return _judge_up(waiting, i, driver)
    if i.phase in (Phase.DOWN, Phase.BACKOFF, Phase.OPEN) or i.epoch > waiting.epoch:
        return (driver.last_drain if waiting.goal == "drained" else {"pool_id": i.pool_id}), None
    if i.phase is Phase.FAILED:
        code, status = ("VRAM_HELD", 503) if i.reason == "vram_held" else ("STOP_FAILED", 500)
        text = i.last_error or "the engine could not be stopped"
        return None, PoolError(text, code=code, status=status, pool_id=i.pool_id)
    if waiting.goal == "drained" and i.phase not in (Phase.DRAINING, Phase.STOPPING):
        text = f"the drain of pool '{i.pool_id}' was taken back"
        return None, RequestError(text, code="OPERATION_CANCELLED", status=409, pool_id=i.pool_id)
    return None


def _judge_up(waiting: Waiting, i: Instance, driver: PoolDriver) -> tuple[dict[str, Any] | None, PoolError | None] | None:
    if i.phase is Phase.DOWN and i.owed:
        text = f"cannot start pool '{i.pool_id}': it is {'held' if i.held else 'quarantined'}"
        return None, RequestError(text, code="POOL_HELD" if i.held else "POOL_UNAVAILABLE", status=409, pool_id=i.pool_id)
    if i.epoch < waiting.epoch and i.phase not in (Phase.DOWN, Phase.FAILED):
        return None
    if view(i).ready:
        return driver.up_outcome(), None
    if i.quarantined and i.phase in (Phase.READY, Phase.ATTACHED):
        text = i.last_error or f"one of the GPUs of pool '{i.pool_id}' is quarantined"
        return None, RequestError(text, code="POOL_UNAVAILABLE", status=503, pool_id=i.pool_id)
    if i.phase is Phase.DOWN:
        text = f"the start of pool '{i.pool_id}' was cancelled" if i.last_error is None else i.last_error
        return None, RequestError(text, code="OPERATION_CANCELLED", status=409, pool_id=i.pool_id)
    if i.phase in _ENDED_BADLY or (i.phase is Phase.ATTACHED and i.reason is not None):
        return None, operation_error(i.pool_id, i.last_error, driver.launch.cause, driver.launch.log_tail)
    return None
