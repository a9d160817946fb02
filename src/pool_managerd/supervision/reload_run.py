"""One reload that is under way, and how its parts ask pools for what they need."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from pool_managerd.core.baselines import Baselines
from pool_managerd.core.lifecycle import Desired
from pool_managerd.core.reload import ReloadRequest, Stage, Strategy
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.reload_target import Target


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


async def broken_off(reload: Reload) -> None:
    """Unless it is being committed: that is carried through."""
    if reload.task is not None:
        if reload.stage is not Stage.COMMITTING:
            reload.task.cancel()
        await asyncio.gather(reload.task, return_exceptions=True)
