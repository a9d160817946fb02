"""How a reload is to be carried out: beside the old engine where both are known to fit, else while it sleeps, or in its place."""

from __future__ import annotations

from collections.abc import Callable

import aiohttp

from pool_managerd.config import Config
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.lifecycle.phase import SERVING
from pool_managerd.core.reload import ReloadRequest, Strategy
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.asleep import dialect_of, is_asleep
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
        asked = request.strategy
        obstacle = await self._beside_obstacle(target)
        if asked != Strategy.SLEEP_OLD and not obstacle:
            return Strategy.BLUE_GREEN, "there is room for both engines"
        sleepless, tried = await self._sleep_obstacle(target, asked=asked is not None), target.pool.launch.sleepless
        if asked == Strategy.BLUE_GREEN:
            others = "sleep_old or stop_start" if not sleepless else "stop_start"
            raise _cannot(request, "with both engines side by side", obstacle, others)
        before = f"; its engine's sleep was tried before, in vain: {tried}" if tried else ""
        if not sleepless:
            why = f"the engine can sleep while the new one loads, and both do not run side by side: {obstacle}"
            return Strategy.SLEEP_OLD, f"as asked for{before}" if asked else why
        if asked == Strategy.SLEEP_OLD:
            raise _cannot(request, "while its engine sleeps", sleepless, "stop_start")
        return Strategy.STOP_START, f"{obstacle}{before}"

    async def _beside_obstacle(self, target: Target) -> str:
        """Why both engines cannot run at the same time; empty when they can."""
        if obstacle := self._obstacle(target):
            return obstacle
        try:
            await self._s.admission.room_for(target.beside())
        except PoolError as problem:
            return problem.message
        return ""

    async def _sleep_obstacle(self, target: Target, *, asked: bool) -> str:
        """Why the engine cannot sleep while another one takes its place; empty when it can.

        One that anybody's request wakes is put to sleep where that is ``asked`` for.
        """
        if obstacle := self._obstacle(target):
            return obstacle
        try:
            dialect = dialect_of(target.pool)
        except PoolError as problem:
            return problem.message
        if not asked and (dialect.by_itself or target.pool.launch.sleepless):
            return target.pool.launch.sleepless or "anybody's request would wake it"
        try:
            await is_asleep(target.pool, self._s)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as problem:
            needs = f"; it needs {dialect.needs}" if dialect.needs else ""
            return f"it has {dialect.flag} and does not say whether it sleeps ({problem}){needs}"
        try:
            await self._s.admission.room_for(target.in_its_place())
        except PoolError as problem:
            return problem.message
        return ""

    def _obstacle(self, target: Target) -> str:
        """Why two engines of the pool cannot run, whatever room there is; empty when they can."""
        pool, config = target.pool, target.new.config
        if pool.instance.phase not in SERVING:
            return "no engine of it serves now"
        before, after = pool.launch.prepared, target.new.submitted
        ports = set() if config is None else set(config.provisioning.ports)
        if isinstance(before, PreparedEngine) and ports == {before.port}:
            return f"both would have to be at port {before.port}"
        if isinstance(before, PreparedEngine) and isinstance(after, PreparedEngine) and before.port == after.port:
            return f"both would be at port {after.port}"
        return ""


def _cannot(request: ReloadRequest, how: str, obstacle: str, others: str) -> RequestError:
    return RequestError(
        f"cannot reload pool '{request.pool_id}' {how}: {obstacle}", code="POOL_UNAVAILABLE", status=409, pool_id=request.pool_id,
        hint=f"leave the strategy out, or ask for {others}",
    )  # fmt: skip
