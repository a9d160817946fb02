"""Reloads, carried out: one pool's engine replaced by another, or everything as it was (core/reload.py has the rules).

A reload is a part of no other change: while it is under way a start waits for its end, a stop gives it up, and everything else
is refused. How the new engine comes up and goes again is its strategy's (stop_start.py, sleep_old.py, blue_green.py). Until it
is committed, in one write, the next daemon undoes it: what ran before is started again, or goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from pool_managerd import failpoints
from pool_managerd.config import Config
from pool_managerd.core.artifacts import NOT_FETCHED
from pool_managerd.core.lifecycle import Desired, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.phase import SERVING
from pool_managerd.core.narration import count, duration, size
from pool_managerd.core.reload import Forecast, ReloadRequest, Stage, Strategy, steps
from pool_managerd.errors import EngineError, PoolError, RequestError, SpecError
from pool_managerd.supervision.blue_green import BlueGreen
from pool_managerd.supervision.foresight import foreseen_of, require_possible
from pool_managerd.supervision.operations import Operation, carried_through
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.precedence import Wanted
from pool_managerd.supervision.proving import Proving
from pool_managerd.supervision.reload_run import Reload, broken_off
from pool_managerd.supervision.reload_strategy import Strategies
from pool_managerd.supervision.reload_target import Target, Targets
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.sleep_old import SleepOld
from pool_managerd.supervision.stop_start import StopStart
from pool_managerd.supervision.times import Times


class Reloads:
    """Of all pools of a node."""

    def __init__(self, pools: Pools, services: Services, config: Callable[[], Config]) -> None:
        self._pools, self._s, self._overrides, self._config = pools, services, pools.overrides, config
        self._running: dict[str, Reload] = {}
        self._targets = Targets(pools, services, config)
        self.times = Times(services.events, services.records)
        self._proving = Proving(services, config)
        self._strategies = Strategies(pools, services, config)
        self._ways: dict[Strategy, StopStart | SleepOld | BlueGreen] = {
            Strategy.STOP_START: StopStart(pools, services), Strategy.SLEEP_OLD: SleepOld(pools, services),
            Strategy.BLUE_GREEN: BlueGreen(pools, services),
        }  # fmt: skip
        pools.precedence = self
        pools.other_needs.append(self._needs)

    # --- for the node ---

    def restore(self) -> None:
        """What earlier daemons measured, once the state is open."""
        self.times.restore()

    def stage_of(self, pool_id: str) -> str | None:
        """How far the pool's reload is; None when it is not being reloaded."""
        reload = self._running.get(pool_id)
        return None if reload is None else reload.stage.value

    async def plan(self, request: ReloadRequest) -> dict[str, Any]:
        """What a reload would do, and how long it would take, without doing any of it. Raises PoolError where it would not."""
        self._require_free(self._pools.get(request.pool_id).pool_id)
        target = self._targets.of(request)
        pool_id, serves = target.pool.pool_id, target.pool.instance.phase in SERVING
        strategy, why = await self._strategies.choose(request, target)
        beside, bake_ms = strategy is Strategy.BLUE_GREEN, self._config().reload_rules(target.new.config).bake_ms
        where, needs = await self._forecast(target.beside() if beside else target.in_its_place())
        load = self.times.of(pool_id, "load")
        first = self.times.of(pool_id, "sleep" if strategy is Strategy.SLEEP_OLD else "stop")
        takes = Forecast.of(first, load) if serves and not beside else Forecast.of(load)
        down = Forecast(0, 0) if beside else takes
        wait_s = target.pool.definition.policy.vram_wait_s
        told = steps(pool_id, strategy, target.model(), target.deadline_ms, bake_ms, serves=serves, vram_wait_s=wait_s)
        if self._runs_it(target):
            told, why, down, takes, bake_ms = (
                ("nothing: it runs that already",),
                "nothing is to change",
                *(Forecast(0, 0),) * 2,
                0,
            )
        return {
            "pool_id": pool_id, "strategy": strategy.value, "why": why, "changes": self._targets.shown(target),
            "steps": list(told),
            "forecast_downtime_ms": down.ms, "forecast_spread_ms": down.spread_ms,
            "forecast_duration_ms": None if takes.ms is None else takes.ms + bake_ms,
            "vram": {"where": where, "needs": list(needs)},
        }  # fmt: skip

    async def begin(self, request: ReloadRequest) -> Operation:
        """Accept a reload; its end is the operation's. Raises PoolError for what is refused at once."""
        if request.key is not None and (known := self._pools.operations.keyed("reload", request.pool_id, request.key)):
            if known.key != request.named():
                raise RequestError(
                    f"cannot reload pool '{request.pool_id}': the idempotency key {request.key[:64]!r} was another request's",
                    status=409, pool_id=request.pool_id, hint="give each request a key of its own",
                )  # fmt: skip
            return known
        async with self._pools.turn(self._pools.get(request.pool_id)):  # whatever is being changed now is changed first
            reload = self._accepted(request)
        await self._pools.operations.kept()
        return reload.operation

    def _accepted(self, request: ReloadRequest) -> Reload:
        self._require_free(request.pool_id)
        target = self._targets.of(request)
        operation = self._pools.operations.begin("reload", request.pool_id, key=request.named())
        serves = target.pool.instance.phase in SERVING
        desired = Desired.WANTED if serves else target.pool.state.desired
        reload = Reload(request, target, operation, self._s.clock.monotonic(), serves, desired, self._s.baselines.copy())
        self._running[request.pool_id] = reload
        reload.task = asyncio.create_task(self._run(reload), name=f"reload:{request.pool_id}")
        reload.task.add_done_callback(lambda _: self._over(reload))
        return reload

    def _require_free(self, pool_id: str) -> None:
        """Raises RequestError while it is being reloaded, or ends what an earlier reload has replaced."""
        if self.has(pool_id):
            raise RequestError(
                f"cannot reload pool '{pool_id}': it is being reloaded already", code="OPERATION_IN_PROGRESS",
                status=409, pool_id=pool_id, retriable=True,
            )  # fmt: skip
        if (other := self._pools.replacements.find(pool_id)) is not None:
            left = count(self._s.registry.leases_on(pool_id, other.instance.epoch), "lease")
            raise RequestError(
                f"cannot reload pool '{pool_id}': the engine that it ran before has not ended yet ({left} in flight)",
                code="OPERATION_IN_PROGRESS", status=409, pool_id=pool_id, retriable=True,
                hint="wait for its leases to end; stopping the pool ends both engines",
            )  # fmt: skip

    async def close(self) -> None:
        """The daemon ends: what is not committed is left for the next one to undo."""
        for reload in tuple(self._running.values()):
            await broken_off(reload)

    def has(self, pool_id: str) -> bool:
        """It is being reloaded."""
        return pool_id in self._running

    def tries(self, pool_id: str) -> bool:
        """What is up in the pool's place is not known to stay: nobody who can wait is to have a slot of it yet."""
        reload = self._running.get(pool_id)
        return reload is not None and reload.strategy is Strategy.STOP_START and reload.stage in _TRIED

    def defers(self, pool_id: str, event: ev.Event) -> bool:
        """A start is accepted, and waits for the reload's end."""
        return self.has(pool_id) and isinstance(event, ev.Start) and event.join

    async def wait(self, pool: Pool, event: ev.Event) -> None:
        """Whoever else wants to change the pool: waits, ends the reload, or is refused. Raises RequestError."""
        reload, stops = self._running.get(pool.pool_id), isinstance(event, ev.Stop)
        if reload is not None and isinstance(event, ev.Start) and event.join:
            await reload.over.wait()
        elif reload is not None and stops:
            await carried_through(self._give_up(reload))  # whoever asks may go away
        elif reload is not None:
            raise RequestError(
                f"cannot do that now: pool '{pool.pool_id}' is being reloaded", code="OPERATION_IN_PROGRESS", status=409,
                pool_id=pool.pool_id, retriable=True, hint="wait for the reload, or stop the pool, which gives it up",
            )  # fmt: skip
        if stops and (other := self._pools.replacements.find(pool.pool_id)) is not None:
            self._pools.replacements.see_off(other, event)

    def _needs(self) -> Iterator[Wanted]:
        """What is tried, and what is gone back to."""
        for pool_id, target in ((pool_id, reload.target) for pool_id, reload in self._running.items()):
            yield Wanted(pool_id, "is being reloaded to it", target.new.config, target.new.submitted)
            yield Wanted(pool_id, "goes back to it where its reload fails", target.old.config, target.old.submitted)

    # --- carrying it out ---

    async def _run(self, reload: Reload) -> None:
        pool_id = reload.pool.pool_id
        self._s.events.emit("reload_started", f"Reloading pool '{pool_id}'", level="debug", pool_id=pool_id)
        try:
            await self._replace(reload)
        except PoolError as problem:
            await self._undo(reload, problem)
        except Exception as problem:  # noqa: BLE001 - the task's boundary: whoever waits must be told, and nothing stay half done
            await self._undo(reload, self._s.events.fault(f"while pool '{pool_id}' was reloaded", problem, pool_id))

    def _over(self, reload: Reload) -> None:
        """Its task has ended, perhaps before its first step: it was given up at once."""
        self._running.pop(reload.pool.pool_id, None)
        reload.over.set()

    async def _replace(self, reload: Reload) -> None:
        if self._runs_it(reload.target):
            return self._succeeded(reload, reload.pool, downtime_ms=0, unchanged=True)
        await self._stage(reload)
        await self._begin(reload)
        way = self._ways[reload.strategy]
        tried = await way.bring_up(reload)
        reload.stage = Stage.GATING
        if tried is not reload.pool:
            await self._proving.look_at(reload.pool, reload.measured)  # they share the machine now
        await self._proving.prove(tried, reload.measured)
        failpoints.reach("reload.proven")
        reload.stage = Stage.COMMITTING
        await self._commit(reload, tried)
        way.take_over(reload)
        since = tried.instance.ready_since or self._s.clock.monotonic()
        return self._succeeded(reload, tried, 0 if reload.down_at is None else round((since - reload.down_at) * 1000))

    async def _forecast(self, pool: Pool) -> tuple[str, tuple[str, ...]]:
        fetch, obstacle = await foreseen_of(pool, self._s)
        if obstacle is not None:
            raise obstacle
        try:
            where, needs = await self._s.admission.forecast(pool)
        except PoolError as problem:
            if problem.code != NOT_FETCHED:
                raise
            return "its model is fetched first: what it needs is known then", ()
        return where, needs if fetch is None else (fetch["detail"], *needs)

    def _runs_it(self, target: Target) -> bool:
        return target.new == target.old and view(target.pool.state).ready and not target.pool.launch.outdated

    async def _stage(self, reload: Reload) -> None:
        """Everything that can be known to be in the way of the new engine, while the one before it serves."""
        failpoints.reach("reload.staging")
        config, pool = reload.target.new.config, reload.pool
        if config is not None:
            telling = partial(_tell_of_model, reload.operation)
            await require_possible(reload.target.in_its_place(), self._s)
            model = await self._s.models.ensure_present(config.model, config.checksums, progress=telling)
            reload.operation.progress = None
            found = await self._s.engines.obstacles(config, model.local_path)
            if found:
                raise SpecError("; ".join(problem.message for problem in found), pool_id=pool.pool_id, hint=found[0].hint)
        else:
            self._s.launcher.check(reload.target.new.submitted)
        reload.strategy, _ = await self._strategies.choose(reload.request, reload.target)
        if reload.strategy is not Strategy.BLUE_GREEN:
            await self._s.admission.forecast(reload.target.in_its_place())
        if reload.served:
            await self._proving.look_at(pool, reload.measured)

    async def _begin(self, reload: Reload) -> None:
        await self._overrides.begin(reload.pool.pool_id, {
            "epoch": reload.pool.instance.epoch, "submitted": self._pools.intents.digest_of(reload.pool.pool_id),
        })  # fmt: skip
        failpoints.reach("reload.begun")

    async def _commit(self, reload: Reload, tried: Pool) -> None:
        """By one write: the intent of a submitted engine, what is changed of a configured pool. What else is written may fail."""
        pool, operation_id = reload.pool, reload.operation.operation_id
        replaced = None if tried is pool else pool.instance.epoch
        if reload.request.engine is not None:
            await self._pools.intents.keep_reloaded(pool, tried.submitted)
            with suppress(PoolError):  # the stored engine is another one than when it began: by that it is known to be done
                await self._overrides.commit(pool.pool_id, operation_id, None, {}, replaced)
        else:
            await self._overrides.commit(pool.pool_id, operation_id, self._targets.base(pool), reload.target.changes, replaced)
            with suppress(PoolError):
                await self._pools.intents.keep_reloaded(pool, None)
        failpoints.reach("reload.committed")

    def _succeeded(self, reload: Reload, pool: Pool, downtime_ms: int, *, unchanged: bool = False) -> None:
        engine = pool.launch.prepared
        took_ms = round((self._s.clock.monotonic() - reload.began) * 1000)
        outcome: dict[str, Any] = {
            "pool_id": pool.pool_id, "strategy": reload.strategy.value,
            "engine_version": None if engine is None else engine.engine_version,
            "model_id": None if engine is None else engine.model_id, "downtime_ms": downtime_ms, "duration_ms": took_ms,
            "rolled_back": False,
        }  # fmt: skip
        down = f"it was down for {downtime_ms} ms" if downtime_ms else "it was never down"
        if (other := self._pools.replacements.find(pool.pool_id)) is not None:
            outcome["leases_on_the_old_engine"] = left = self._s.registry.leases_on(pool.pool_id, other.instance.epoch)
            down += f"; {count(left, 'lease')} on the old engine may run on for {duration(reload.target.deadline_ms / 1000)}"
        human = f"Pool '{pool.pool_id}' is reloaded; {down}"
        if unchanged:
            outcome["unchanged"], human = True, f"Nothing was to change: pool '{pool.pool_id}' runs that already"
        self._s.events.emit("reload_succeeded", human, pool_id=pool.pool_id, duration_ms=took_ms, downtime_ms=downtime_ms)
        self._pools.operations.finish(reload.operation, outcome)

    # --- undoing it ---

    async def _undo(self, reload: Reload, problem: PoolError) -> None:
        """The engine before it serves again, as far as that can be; the operation has failed."""
        failed_at, second = reload.stage, None
        if failed_at in _TOUCHED:
            reload.stage = Stage.UNDOING
            failpoints.reach("reload.undoing")
            try:
                await self._ways[reload.strategy].put_back(reload)
            except PoolError as worse:
                second = worse
        await self._overrides.give_up(reload.pool.pool_id)
        self._failed(reload, failed_at, problem, second)

    def _failed(self, reload: Reload, stage: Stage, problem: PoolError, second: PoolError | None) -> None:
        pool_id, why = reload.pool.pool_id, problem.message
        told = f"reload failed: {why}"
        if stage in _TOUCHED:
            told += f"; {self._ways[reload.strategy].undone(reload, second)}"
        rolled_back = second is None or reload.strategy is Strategy.BLUE_GREEN  # the old one has never stopped
        evidence = {"stage": stage.value, "log_tail": problem.details.get("log_tail", [])}
        error = EngineError(
            told, code=problem.code, status=problem.status, pool_id=pool_id, hint=problem.hint, retriable=problem.retriable,
            details={"rolled_back": rolled_back, "evidence": evidence},
        )  # fmt: skip
        self._s.events.clean_error(error)
        reason = "rollback_failed" if not rolled_back else _REASONS.get(problem.code, stage.value)
        took_ms = round((self._s.clock.monotonic() - reload.began) * 1000)
        human = f"Reload of pool '{pool_id}' failed: {error.message.removeprefix('reload failed: ')}"
        self._s.events.emit("reload_failed", human, level="error", pool_id=pool_id, reason=reason, duration_ms=took_ms)
        self._pools.operations.finish(reload.operation, error=error)

    async def _give_up(self, reload: Reload) -> None:
        """Somebody stops the pool: the reload ends, and what is to run from now on is what ran before."""
        await broken_off(reload)
        if reload.operation.status != "running":
            return  # it was just being committed
        stopped = RequestError("the pool was stopped by request", code="OPERATION_CANCELLED", status=409)
        self._ways[reload.strategy].give_up(reload)
        await self._overrides.give_up(reload.pool.pool_id)
        self._failed(reload, Stage.STAGING, stopped, None)


_TRIED = (Stage.SWITCHING, Stage.GATING, Stage.COMMITTING, Stage.UNDOING)
_TOUCHED = (Stage.LOADING, Stage.SWITCHING, Stage.GATING, Stage.COMMITTING)
_REASONS = {"DRAIN_TIMEOUT": "drain_timeout", "OPERATION_CANCELLED": "cancelled", "GATE_FAILED": "gate"}


def _tell_of_model(operation: Operation, done: int, total: int) -> None:
    human = f"Fetching or verifying the model: {size(done)}" + (f" of {size(total)}" if total else "")
    operation.progress = {"done": done, "total": total, "human": human}
