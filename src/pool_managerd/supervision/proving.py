"""What a new engine must show before it stays: an answer, a rate, and a time without failing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import aiohttp

from pool_managerd.config import Config
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.baselines import Baselines
from pool_managerd.core.crash_report import remediation
from pool_managerd.core.event import Event
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.reload import TRIES, slower, unexpected
from pool_managerd.errors import EngineError
from pool_managerd.supervision.in_flight import a_moment, requests_of
from pool_managerd.supervision.measured import baseline_key
from pool_managerd.supervision.pause import pause
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.services import Services

_EXPLAINED_S = 10.0


class Proving:
    """Called when the pool is ready. ``config`` is what is in force."""

    def __init__(self, services: Services, config: Callable[[], Config]) -> None:
        self._s, self._config = services, config

    async def look_at(self, pool: Pool, measured: Baselines) -> None:
        """How fast the engine is that is to be replaced, now, beside whatever else this machine does."""
        engine = pool.launch.prepared
        if not isinstance(engine, PreparedEngine) or not engine.warmable or measured.get(baseline_key(engine)) is None:
            return
        if await requests_of(pool, self._s) >= engine.slots_total:
            return  # it would wait behind clients, and be one more request that a drain waits for
        await self._keep_slots(pool, engine)
        try:
            first_ms, rate = await self._s.prober.warm_up(engine, pool.definition.policy.warmup_timeout_s)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
            return  # it is replaced for a reason
        measured.relax(baseline_key(engine), first_ms, rate)

    async def prove(self, pool: Pool, measured: Baselines) -> None:
        """Raises EngineError GATE_FAILED with what it did not show; ``measured`` is what was measured before it."""
        epoch, engine, rules = pool.instance.epoch, pool.launch.prepared, self._config().reload_rules(pool.config)
        try:
            if isinstance(engine, PreparedEngine) and engine.warmable:
                await self._keep_slots(pool, engine)
                await self._rate(pool, engine, measured, rules.baseline_share)
            if isinstance(engine, PreparedEngine) and engine.warmup == "completion" and rules.smoke_prompt is not None:
                timeout_s = pool.definition.policy.warmup_timeout_s
                answer = await self._s.prober.complete(engine, rules.smoke_prompt, timeout_s)
                if (wrong := unexpected(answer, rules.smoke_expect)) is not None:
                    raise _failed(pool, wrong)
        except TimeoutError:
            if not await requests_of(pool, self._s):  # else clients have all its slots, and it answers those
                raise _failed(pool, "it did not answer in time") from None
        except (aiohttp.ClientError, OSError, ValueError) as problem:
            raise _failed(pool, f"it could not be asked: {str(problem) or type(problem).__name__}") from problem
        await self._stays_ready(pool, epoch, rules.bake_ms / 1000)

    async def _keep_slots(self, pool: Pool, engine: PreparedEngine) -> None:
        """A prompt of ours takes a slot, and what is in it is to be there for whichever engine is stopped next."""

        def emit(type_: str, human: str, *, level: str = "info", **fields: Any) -> None:
            self._s.events.emit(type_, human, level=level, pool_id=pool.pool_id, **fields)

        if engine.keeps_slots and pool.instance.phase is Phase.READY:
            await self._s.slots.save(pool, emit)

    async def _rate(self, pool: Pool, engine: PreparedEngine, measured: Baselines, share: float) -> None:
        before, best = measured.get(baseline_key(engine)), (math.inf, 0.0)
        wrong: str | None = None
        for _ in range(TRIES):
            first_ms, rate = await self._s.prober.warm_up(engine, pool.definition.policy.warmup_timeout_s)
            best = min(best[0], first_ms), max(best[1], rate)
            if (wrong := slower(before, *best, share)) is None:
                return
        hint = "where the machine was busy with something else, try again, or lower reload.baseline_share"
        raise _failed(pool, wrong or "it is slower than before", hint)

    async def _until_explained(self, pool: Pool, epoch: int) -> None:
        """How an engine ended is known a moment after that it did."""
        until = self._s.clock.monotonic() + _EXPLAINED_S
        while pool.instance.epoch == epoch and pool.instance.phase is Phase.STOPPING and self._s.clock.monotonic() < until:
            await a_moment(self._s)

    async def _stays_ready(self, pool: Pool, epoch: int, seconds: float) -> None:
        """For ``seconds``, looked at whenever something happens to it."""
        over = asyncio.Event()

        def hear(event: Event) -> None:
            if event.pool_id == pool.pool_id and not serves():
                over.set()

        def serves() -> bool:
            return pool.instance.epoch == epoch and view(pool.state).ready

        stop_listening = self._s.events.listen(hear)
        try:
            await pause(self._s.clock, seconds, over)
        finally:
            stop_listening()
        await self._until_explained(pool, epoch)
        if not serves():
            why = pool.state.last_error or f"it is {view(pool.state).state}"
            found = pool.launch.diagnosis
            hint = None if found is None else remediation(found.remedy, pool.pool_id, pool.tried_as).sentence
            raise _failed(pool, f"it did not stay ready for {seconds:g} s: {why}", hint)


def _failed(pool: Pool, why: str, hint: str | None = None) -> EngineError:
    return EngineError(f"the new engine did not pass: {why}", code="GATE_FAILED", status=500, pool_id=pool.pool_id, hint=hint)
