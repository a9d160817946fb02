"""One pool's part of an apply, carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pool_managerd.config import Config
from pool_managerd.config.plan import Action, PoolNow, Step
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Desired, Phase, sleeps_evicted
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.phase import IDLE, WAITING
from pool_managerd.core.reload import ReloadRequest
from pool_managerd.errors import RequestError
from pool_managerd.supervision import policy
from pool_managerd.supervision.asking import Asking
from pool_managerd.supervision.intents import desired_of
from pool_managerd.supervision.made_of import runs_by_another
from pool_managerd.supervision.pool import Definition, Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.reload import Reloads
from pool_managerd.supervision.reload_target import FileReload
from pool_managerd.supervision.services import Services

_STARTING = (Action.RELOAD, Action.RESTART, Action.START)
DRAINED = (Phase.READY, Phase.SLEEPING, Phase.DRAINING)
"""Where a pool that is let go may have leases, which are waited for."""


def pool_now(pool: Pool, pools: Pools, services: Services) -> PoolNow | None:
    """A configured pool as the plan has to know it."""
    if pool.config is None:
        return None
    i, desired = pool.instance, pool.state.desired
    ends = i.phase is Phase.STOPPING or sleeps_evicted(pool.state)  # a drain may be taken back: its engine goes on then
    serves = i.phase not in IDLE and not ends
    return PoolNow(
        pool.config, serves=serves, wanted=desired is Desired.WANTED and not pool.state.held,
        by_demand=desired in (Desired.ON_DEMAND, Desired.EVICTED) and not pool.state.held,
        outdated=serves and i.has_process and runs_by_another(pool, services.records),
        reloaded=tuple(sorted(pools.overrides.changes(pool.pool_id, {}))),
    )  # fmt: skip


def reload_of(step: Step) -> ReloadRequest:
    """What is asked of a pool. Where the file says nothing new of it, what it was reloaded with by hand stays."""
    return FileReload(step.pool_id, changes={}, to=step.config) if step.said else ReloadRequest(step.pool_id, changes={})


def starts(step: Step, pools: Pools) -> bool:
    """Whether a pool that is new is started: not where only demand does that, or a person has stopped one of its name."""
    pool, kept = pools.find(step.pool_id), pools.intents.get(step.pool_id) or StoredPool(step.pool_id)
    return not (pool is not None and pool.state.held) and desired_of(kept, step.config) is Desired.WANTED


class ApplySteps:
    """``do`` returns what is told of a step that is done, and raises PoolError for one that is not."""

    def __init__(self, pools: Pools, services: Services, reloads: Reloads, config: Callable[[], Config]) -> None:
        self._pools, self._s, self._reloads, self._config = pools, services, reloads, config
        self._asking = Asking(pools, services.clock)

    async def do(self, step: Step) -> Mapping[str, Any]:
        if step.action in _STARTING and step.config is not None and self._was_stopped(step.pool_id):
            await self._take_over(self._pools.get(step.pool_id), step)
            return {}
        match step.action:
            case Action.REMOVE:
                return await self._remove(self._pools.get(step.pool_id))
            case Action.RELOAD:
                operation = await self._reloads.begin(reload_of(step))
                outcome = await operation.wait()
                told = ("strategy", "downtime_ms", "duration_ms", "rolled_back")
                return {key: outcome.get(key) for key in told}
            case Action.ADD:
                return await self._add(step)
            case Action.RESTART:
                pool = self._pools.get(step.pool_id)
                await self._let_go(pool)
                return await self._start_anew(pool, step)
            case Action.START:
                return await self._start_anew(self._pools.get(step.pool_id), step)
            case _:
                await self._take_over(self._pools.get(step.pool_id), step)
                return {}

    def _was_stopped(self, pool_id: str) -> bool:
        """Whether a person has, since the plan was made, and it is down: it goes by the file when it is started again."""
        pool = self._pools.find(pool_id)
        return pool is not None and pool.instance.phase in IDLE and (pool.state.desired.stays_down or pool.state.held)

    async def define(self, pool: Pool, definition: Definition) -> None:
        """The pool is to run that from its next launch on, and goes by its rules from now on."""
        policy.learn_secrets(self._s.events.redactor, pool.pool_id, definition)
        await self._asking.begin(pool, ev.Tick(), "now", definition)

    async def _take_over(self, pool: Pool, step: Step) -> None:
        if sleeps_evicted(pool.state):  # it would be woken as what it was
            await self._asking.until(pool, ev.Evict(), "down")
        await self.define(pool, self._pools.definitions.of(pool.pool_id, step.config))
        self._pools.overrides.forget(pool.pool_id)

    async def _start_anew(self, pool: Pool, step: Step) -> Mapping[str, Any]:
        """By the new keys, and without what the ones before them have failed at."""
        await self._take_over(pool, step)
        if pool.instance.phase in WAITING:
            self._pools.post(pool.pool_id, ev.ResetBreaker())
        operation = await self._pools.request(pool, "start", ev.Start(), "up")
        outcome = await operation.wait()
        return {"pid": outcome.get("pid")}

    async def _add(self, step: Step) -> Mapping[str, Any]:
        pool = self._pools.find(step.pool_id)
        if pool is None:
            pool = self._pools.add(step.pool_id, step.config)
        else:
            await self._take_over(pool, step)
        if not starts(step, self._pools):
            return {}
        operation = await self._pools.request(pool, "start", ev.Start(origin="boot"), "up")
        outcome = await operation.wait()
        return {"pid": outcome.get("pid")}

    async def _remove(self, pool: Pool) -> Mapping[str, Any]:
        """Not durable until it is forgotten: the next daemon has the file, which does not name it."""
        await self._let_go(pool)
        if not await self._pools.remove(pool):
            raise RequestError(f"pool {pool.pool_id} is gone already", code="POOL_NOT_FOUND", status=404)
        return {}

    async def _let_go(self, pool: Pool) -> None:
        """Down, after its leases have ended or their time is over."""
        phase, deadline_ms = pool.instance.phase, self._config().lifecycle.drain_deadline_ms
        if phase in DRAINED:
            operation = await self._pools.request(pool, "drain", ev.Drain(deadline_ms, 0), "drained")
        elif phase is Phase.DOWN:
            return
        else:
            operation = await self._pools.request(pool, "stop", ev.Stop(), "down")
        await operation.wait()
