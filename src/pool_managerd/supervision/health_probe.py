"""One question to an engine, and whose answer it was."""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.health import ProbeOutcome, ProbeResult
from pool_managerd.core.lifecycle import Phase
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.services import Services

_LOOK_S = 5.0
"""After so long without a listener, and again each time, it is looked where else the engine listens."""


class HealthProbe:
    """Of one pool, launch after launch."""

    def __init__(self, pool: Pool, services: Services) -> None:
        self._pool, self._s = pool, services
        self._epoch, self._look_at, self._elsewhere = -1, 0.0, ""

    async def ask(self) -> tuple[ProbeResult, bool]:
        """The answer, and whether it settles the matter. It counts only while our own process holds the port (invariant 3)."""
        engine, process = self._pool.launch.prepared, self._pool.launch.process
        if engine is None:
            return ProbeResult(ProbeOutcome.ERROR, "had no engine to ask"), False
        result = await self._s.prober.probe(engine.url + engine.health_path, self._pool.definition.policy.probe_timeout_s)
        if not isinstance(engine, PreparedEngine) or process is None:
            return result, False
        if result.refused:  # the kernel has said who listens there: nobody
            return replace(result, reason=result.reason + await self._where_else(process.pid)), False
        found, port = await self._s.listener(process.pid, engine.host, engine.port), engine.port
        if found.owner == "other":
            why = f"was answered by another program: port {port} is not held by this engine but by {found.who}"
            return ProbeResult(ProbeOutcome.ERROR, why), True
        if found.owner == "nobody" and result.ok:
            result = ProbeResult(ProbeOutcome.ERROR, f"was answered, but nothing listens on port {port} any more")
        return result, False

    async def _where_else(self, pid: int) -> str:
        """What is to be added of an engine that has had its time, and listens, but not where it should."""
        i, now = self._pool.instance, self._s.clock.monotonic()
        if i.epoch != self._epoch:
            self._epoch, self._look_at, self._elsewhere = i.epoch, i.since + _LOOK_S, ""
        if i.phase is Phase.STARTING and now >= self._look_at:
            self._look_at = now + _LOOK_S
            found = await self._s.listener.elsewhere(pid)
            self._elsewhere = f"; this engine listens on {' and '.join(found)} instead" if found else ""
        return self._elsewhere
