"""How a reload is to be carried out: beside the old engine where both are known to fit, else in its place."""

from __future__ import annotations

from collections.abc import Callable

from pool_managerd.config import Config
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.lifecycle.phase import SERVING
from pool_managerd.core.reload import ReloadRequest, Strategy
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.reload_target import Target
from pool_managerd.supervision.services import Services


class Strategies:
    """``config`` is what is in force."""

    def __init__(self, pools: Pools, services: Services, config: Callable[[], Config]) -> None:
        self._pools, self._s, self._config = pools, services, config

    async def choose(self, request: ReloadRequest, target: Target) -> tuple[Strategy, str]:
        """The strategy, and in half a sentence why that one. Raises RequestError where the one that is asked for cannot be."""
        if request.strategy == Strategy.STOP_START:
            return Strategy.STOP_START, "as asked for"
        obstacle = self._obstacle(target)
        if obstacle is None:
            try:
                await self._s.admission.room_beside(target.beside())
            except PoolError as problem:
                obstacle = problem.message
        if obstacle is None:
            return Strategy.BLUE_GREEN, "there is room for both engines"
        if request.strategy == Strategy.BLUE_GREEN:
            raise RequestError(
                f"cannot reload pool '{request.pool_id}' with both engines side by side: {obstacle}", code="POOL_UNAVAILABLE",
                status=409, pool_id=request.pool_id, hint="leave the strategy out, or ask for stop_start",
            )  # fmt: skip
        return Strategy.STOP_START, obstacle

    def _obstacle(self, target: Target) -> str | None:
        """Why two engines of the pool cannot run, whatever room there is; None when they can."""
        pool, config = target.pool, target.new.config
        if pool.instance.phase not in SERVING:
            return "no engine of it serves now"
        before, after = pool.launch.prepared, target.new.submitted
        ports = set() if config is None else set(config.provisioning.ports)
        if isinstance(before, PreparedEngine) and ports == {before.port}:
            return f"both would have to be at port {before.port}"
        if isinstance(before, PreparedEngine) and isinstance(after, PreparedEngine) and before.port == after.port:
            return f"both would be at port {after.port}"
        return None
