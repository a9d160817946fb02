"""The seeds' API by name: thin forms of what the node does, for those who embed the library."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from pool_managerd.core.drain import DrainOutcome, DrainRequest
from pool_managerd.core.registry import Registry as CoreRegistry
from pool_managerd.core.reload import ReloadRequest
from pool_managerd.node import PoolManager


class Registry(CoreRegistry):
    """A registry of your own, with the system's time for heartbeats."""

    def __init__(self, clock_ms: Callable[[], int] | None = None) -> None:
        super().__init__(clock_ms or (lambda: time.time_ns() // 1_000_000), salt=secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class PreloadOutcome:
    """A finished preload: the engine's pid (None for an attached one) and where its handoff file is."""

    pool_id: str
    pid: int | None
    handoff_path: str | None

    @classmethod
    async def execute(cls, pool_id: str, node: PoolManager) -> PreloadOutcome:
        """Model present, engine prepared, healthy, registry ready (ORCH-3002). Raises PoolError; ``last_error`` is set then."""
        operation = await node.preload(pool_id)
        outcome = await operation.wait()
        return cls(pool_id, outcome["pid"], outcome["handoff_path"])


async def execute_drain(request: DrainRequest, node: PoolManager) -> DrainOutcome:
    """Drain a pool and wait for its end (ORCH-3031). Raises RequestError for an unknown or already draining pool."""
    operation = await node.drain(request.pool_id, request.deadline_ms)
    return DrainOutcome(**await operation.wait())


@dataclass(frozen=True, slots=True)
class ReloadOutcome:
    """A reload whose new engine stayed: what it runs now, how long no lease was given, and how long it took in all.

    ``leases_on_the_old_engine`` were in flight beside it when it took over; None where no old engine was left.
    """

    pool_id: str
    strategy: str
    engine_version: str | None
    model_id: str | None
    downtime_ms: int
    duration_ms: int
    rolled_back: bool = False
    leases_on_the_old_engine: int | None = None


async def execute_reload(request: ReloadRequest, node: PoolManager) -> ReloadOutcome:
    """Replace what a pool runs and wait for the end (ORCH-3038). Raises PoolError ("reload failed: …"); ``details`` of it say
    whether what ran before runs again.
    """
    operation = await node.reload(request)
    return ReloadOutcome(**await operation.wait())
