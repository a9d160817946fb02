"""One reload that is under way, and how its parts ask pools for what they need."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from pool_managerd import failpoints
from pool_managerd.core.baselines import Baselines
from pool_managerd.core.lifecycle import Desired
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.reload import ReloadRequest, Stage, Strategy
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.asking import Asking
from pool_managerd.supervision.in_flight import in_hand
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.reload_target import Target
from pool_managerd.supervision.services import Services


@dataclass
class Reload:
    """One that is under way. ``served``: the engine before it did when it began; ``desired`` is what was wanted of the pool then.
    ``down_at``: since when no lease is given. ``tried`` is the instance that is to stay.
    """

    request: ReloadRequest
    target: Target
    operation: Operation
    began: float
    served: bool
    desired: Desired
    measured: Baselines
    strategy: Strategy = Strategy.STOP_START
    stage: Stage = Stage.STAGING
    tried: Pool | None = None
    down_at: float | None = None
    task: asyncio.Task[None] | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pool(self) -> Pool:
        return self.target.pool


async def emptied(reload: Reload, asking: Asking, services: Services, event: ev.Drain | ev.Sleep, goal: str) -> None:
    """Its requests have ended, and ``event`` has led to ``goal``. Raises PoolError; where they have not by the deadline the
    engine serves on: nobody's request is cut off for a reload.
    """
    reload.stage, pool = Stage.DRAINING, reload.pool
    part = await asking.begin(pool, event, goal)
    reload.down_at = services.clock.monotonic()
    failpoints.reach("reload.draining")
    try:
        await part.wait()
    except PoolError as problem:
        if problem.code != "OPERATION_CANCELLED":
            raise
        left = in_hand(pool, services.registry)
        raise RequestError(
            f"drain timeout: {left} requests were still in flight after {reload.target.deadline_ms} ms; the engine goes on",
            code="DRAIN_TIMEOUT", status=409, pool_id=pool.pool_id, retriable=True, hint="try again later, or give it longer",
        ) from None  # fmt: skip


async def broken_off(reload: Reload) -> None:
    """Unless it is being committed: that is carried through."""
    if reload.task is not None:
        if reload.stage is not Stage.COMMITTING:
            reload.task.cancel()
        await asyncio.gather(reload.task, return_exceptions=True)
