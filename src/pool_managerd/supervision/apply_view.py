"""What an apply would do, as it is shown: each pool's part, what it costs in time, and nothing that is secret."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pool_managerd.config import Config, PoolConfig
from pool_managerd.config.plan import Action, Plan, Step
from pool_managerd.core.artifacts import NOT_FETCHED
from pool_managerd.core.lifecycle import Phase, PoolState
from pool_managerd.core.redaction import masked_text
from pool_managerd.core.reload import Forecast
from pool_managerd.errors import PoolError
from pool_managerd.supervision import policy
from pool_managerd.supervision.apply_ports import taken_ports
from pool_managerd.supervision.apply_steps import DRAINED, reload_of, starts
from pool_managerd.supervision.foresight import foreseen_of
from pool_managerd.supervision.launch import Launch
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.reload import Reloads
from pool_managerd.supervision.reload_target import Target, Targets
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.times import kept_times

_FORECAST = ("strategy", "forecast_downtime_ms", "forecast_spread_ms", "forecast_duration_ms")
_STOPS = frozenset({Action.REMOVE, Action.RELOAD, Action.RESTART})


class ApplyView:
    """Asks the planner of reloads for each pool that one is planned for."""

    def __init__(self, pools: Pools, services: Services, reloads: Reloads, config: Callable[[], Config]) -> None:
        self._pools, self._s, self._reloads = pools, services, reloads
        self._targets = Targets(pools, services, config)

    async def of(self, plan: Plan, drain_deadline_ms: int) -> dict[str, Any]:
        """``pools`` in the order in which they are changed. ``forecast_duration_ms`` is null where a part was never measured.

        ``drain_deadline_ms`` is what leases on a pool that goes will have; how long they take of it is in no forecast.
        ``by_hand`` are pools that stay what a reload has made of them; ``old`` of a change is what that was, ``new`` the file's.
        """
        rows = [await self._row(step, drain_deadline_ms) for step in plan.steps]
        begun = {step.pool_id for step in plan.steps if step.action is Action.ADD and starts(step, self._pools)}
        takes = (row for row in rows if row["restarts"] or row["action"] == "start" or row["pool_id"] in begun)
        costs = [row["forecast_duration_ms"] for row in takes]
        return {
            "digest": plan.digest, "would_change": plan.would_change, "pools": rows, "at_once": list(plan.at_once),
            "waiting": list(plan.waiting), "untouched": plan.untouched,
            "by_hand": [self._by_hand(pool) for pool in plan.by_hand],
            "forecast_duration_ms": None if None in costs else sum(costs),
        }  # fmt: skip

    async def _row(self, step: Step, drain_deadline_ms: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "pool_id": step.pool_id, "action": step.action.value, "why": step.why, "restarts": step.action in _STOPS,
            "changes": [], **dict.fromkeys(_FORECAST), "where": None, "problem": None, "ends_by": None, "drain_deadline_ms": None,
            "warnings": await taken_ports(step, self._pools, self._s),
        }  # fmt: skip
        if step.action is Action.ADD and step.config is not None:
            row["adds"] = {
                "engine": step.config.engine, "model": masked_text(step.config.model), "slots": step.config.slots,
                "ctx": step.config.ctx, "devices": list(step.config.devices), "preload": step.config.preload,
            }  # fmt: skip
            await self._foresee(step.config, row)
        elif step.changes:
            row["changes"] = self._changes(step.pool_id, step.config)
        if step.action in (Action.RELOAD, Action.START):
            await self._forecast(step, row)
        elif step.action is Action.REMOVE:
            row |= self._ending(step.pool_id, drain_deadline_ms)
        return row

    async def _foresee(self, config: PoolConfig, row: dict[str, Any]) -> None:
        """Where a pool would run that is new and whose model is to be fetched; of a model that is here its start says it."""
        definition = self._pools.definitions.of(config.id, config)
        pool = Pool(config.id, definition, PoolState.new(config.id), Launch())
        fetch, obstacle = (None, None) if definition.external else await foreseen_of(pool, self._s)
        try:
            if fetch is not None:
                row["where"], _ = await self._s.admission.forecast(pool)
        except PoolError as problem:
            obstacle = None if problem.code == NOT_FETCHED else problem
        if obstacle is not None and obstacle.code != "POLICY_DENIED":  # the policy may be changed in the same step
            row["problem"] = self._s.events.clean_error(obstacle).message

    def _ending(self, pool_id: str, drain_deadline_ms: int) -> dict[str, Any]:
        """How its engine ends, and how long the stop takes: an engine that is down takes none."""
        phase = self._pools.get(pool_id).instance.phase
        takes = Forecast.of([0.0] if phase is Phase.DOWN else kept_times(self._s.records, pool_id, "stop"))
        ends_by = "drain" if phase in DRAINED else None if phase is Phase.DOWN else "stop"
        return {
            "ends_by": ends_by, "drain_deadline_ms": drain_deadline_ms if ends_by == "drain" else None,
            "forecast_duration_ms": takes.ms, "forecast_spread_ms": takes.spread_ms,
        }  # fmt: skip

    def _by_hand(self, said: PoolConfig) -> dict[str, Any]:
        runs = self._pools.get(said.id).instance.has_process
        return {"pool_id": said.id, "runs": runs, "changes": self._changes(said.id, said)}

    def _changes(self, pool_id: str, config: PoolConfig | None) -> list[dict[str, Any]]:
        pool, new = self._pools.get(pool_id), self._pools.definitions.of(pool_id, config)
        policy.learn_secrets(self._s.events.redactor, pool_id, new)
        return self._targets.shown(Target(pool, pool.definition, new, {}, 0))

    async def _forecast(self, step: Step, row: dict[str, Any]) -> None:
        """What stands in the way of it now stands there; the rest of the plan does not depend on it."""
        if step.config is not None and step.config.provisioning.mode == "external":
            return
        try:
            told = await self._reloads.plan(reload_of(step))
        except PoolError as problem:
            row["problem"] = self._s.events.clean_error(problem).message
            return
        row |= {key: told[key] for key in _FORECAST} | {"where": told["vram"]["where"]}
        if step.action is Action.START:  # nothing is replaced, and nothing tried: it is up when it is
            row |= {"strategy": None, "forecast_duration_ms": told["forecast_downtime_ms"], "forecast_downtime_ms": None}
