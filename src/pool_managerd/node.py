"""PoolManager: the façade that the API, the CLI and embedders call. Runs in the caller's event loop.

It installs no signal handlers and configures no logging. Reads never block; changes are durable before they are acknowledged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pool_managerd._version import __version__
from pool_managerd.config import Config
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.demand.request import MAX_WAIT_MS, AcquireRequest
from pool_managerd.core.drain import DrainRequest
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.registry import Registry
from pool_managerd.core.reload import ReloadRequest
from pool_managerd.supervision.applied import Applied
from pool_managerd.supervision.apply import Applies
from pool_managerd.supervision.bench import Benches
from pool_managerd.supervision.boot import boot
from pool_managerd.supervision.demand import Demand
from pool_managerd.supervision.event_log import EventLog, Subscription
from pool_managerd.supervision.gpu.view import snapshots_view
from pool_managerd.supervision.handoffs import HandoffIntake
from pool_managerd.supervision.leases import Leases
from pool_managerd.supervision.log_places import LogPlaces
from pool_managerd.supervision.model_cache import ModelCacheWork
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.purge import Purges
from pool_managerd.supervision.reload import Reloads
from pool_managerd.supervision.shutdown import stop_all
from pool_managerd.supervision.status import beside, capabilities_of, command_of, explanation, health_of, lease_rows, status_of
from pool_managerd.supervision.upkeep import keep_up
from pool_managerd.wiring.acquire_calls import AcquireCalls
from pool_managerd.wiring.adapters import Adapters, default_adapters
from pool_managerd.wiring.apply_calls import ApplyCalls
from pool_managerd.wiring.device_calls import DeviceCalls
from pool_managerd.wiring.model_calls import ModelCalls
from pool_managerd.wiring.pool_calls import PoolCalls
from pool_managerd.wiring.tracing import node_spans


class PoolManager(DeviceCalls, ApplyCalls, PoolCalls, AcquireCalls, ModelCalls):
    """One GPU node's pools. ``async with PoolManager(config) as node:`` starts what the configuration says.

    Raises SpecError for a configuration that this version cannot honour, and on entry NodeError when the state or
    runtime directory cannot be used or belongs to a running daemon.
    """

    def __init__(self, config: Config, adapters: Adapters | None = None) -> None:
        self.config = config
        self.version = __version__
        self._a = adapters or default_adapters(config)
        self.events: EventLog = self._a.events
        self.registry: Registry = self._a.registry
        self._spans = node_spans(self.events)
        self.started_at_ms = self._a.clock.wall_ms()
        self._gpus = self._a.gpus
        self._pools = Pools(config, self._a.services, self._a.store, self._a, self._a.new_id)
        self._reloads = Reloads(self._pools, self._a.services, lambda: self.config)
        self._applies = Applies(self._pools, self._a.services, self._reloads, lambda: self.config, self.use_config)
        self.applied = Applied(self._a.services.records, self._a.clock.wall_ms)
        self._benches = Benches(self._pools, self._a.services)
        self._purges = Purges(self._pools, self._a.services, lambda: self.config)
        self._models = ModelCacheWork(self._pools, self._a.services, self._a.shelf, lambda: self.config)
        self._leases = Leases(self._pools, self.registry, self._a.clock, self._a.leases)
        self._demand = Demand(
            self._pools, self._a.services, self._leases, self._reloads.times, lambda: self.config, self._a.new_id
        )
        self._shutdown: asyncio.Task[None] | None = None
        self._hard = False
        self._watching: list[asyncio.Task[None]] = []

    # --- life ---

    def claim(self) -> None:
        """Take state and runtime directory, as entering does. Raises NodeError ALREADY_RUNNING with the pid of who has them."""
        self._a.claim()

    def unclaim(self) -> None:
        """Give back what ``claim`` took, when the node was never entered; leaving it does the same."""
        self._a.unclaim()

    def on_fatal(self, call: Callable[[BaseException], None]) -> None:
        """Call ``call`` when a pool's task has failed too often to be relied on; a daemon then ends itself (A11)."""
        self._a.fatal = call

    async def __aenter__(self) -> PoolManager:
        stored = await self._a.open()
        try:
            await self._begin(stored)
        except BaseException:
            await self.shutdown()
            raise
        return self

    async def _begin(self, stored: dict[str, StoredPool]) -> None:
        s = self._a.services
        gpus = (self._gpus.watch, self._gpus.mask_gpus, self._gpus.yields)
        for part in (s.epochs, s.histories, self._pools.operations, *gpus, s.admission, self._reloads, self.applied):
            part.restore()
        for notice in self._a.notices:
            self.events.emit("notice", notice, level="warn")
        await boot(self._pools, s, stored, self._a.kept_leases)
        self._demand.open = True
        intake = HandoffIntake(self._pools, self.events)
        own = {"the queue": self._demand.run, "the care of the model cache": self._models.gc.care}
        for what, work in {**self._a.own_tasks(intake.on_handoff, intake.on_error), **own}.items():
            self._watching.append(asyncio.create_task(keep_up(work, what, self._a.clock, self.events, s.on_fatal)))

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    async def shutdown(self, *, hard: bool = False) -> None:
        """Drain and stop everything, then close; ``hard``: what is still running is killed. ``on_exit: leave`` leaves engines."""
        if hard:
            self._hard = self._gpus.hurry = True
            self._pools.kill_all()
        if self._shutdown is None:
            self._pools.closing = self._gpus.closing = True
            self._shutdown = asyncio.create_task(self._close())
        await asyncio.shield(self._shutdown)

    async def _close(self) -> None:
        for task in self._watching:
            task.cancel()
        await self._demand.close()
        await self._applies.close()
        await self._benches.close()
        await self._purges.close()
        await self._models.close()
        await self._reloads.close()
        if self.config.daemon.on_exit == "leave" and not self._hard:
            await self._pools.close(leave=True)
        else:
            await stop_all(self._pools, self._a.services, self.config.lifecycle.drain_deadline_ms)
        if self._spans is not None:
            self._spans.close()
        self.events.close()
        await self._a.close()

    # --- reads ---

    def pool_ids(self) -> list[str]:
        """Ids of all pools, sorted."""
        return self._pools.ids()

    def status(self, pool_id: str) -> dict[str, Any]:
        """What a pool is now: the fields of the API's status. Raises RequestError POOL_NOT_FOUND."""
        clock, crash = self._a.clock, self._a.services.crashes.last(pool_id)
        pool, now, wall_ms = self._pools.get(pool_id), clock.monotonic(), clock.wall_ms()
        known = status_of(pool, self.registry, self.config.profile, now, wall_ms, crash)
        other = beside(self._pools.replacements.find(pool_id), self.registry)
        return {
            **known,
            "reload": self._reloads.stage_of(pool_id),
            "beside": other,
            "reloaded": sorted(self._pools.overrides.changes(pool_id, {})),
            "waiting": self._demand.waiting(pool_id),
            "idle_ms": self._demand.idle.ms(pool),
            "unapplied": self._applies.unapplied(pool_id),
        }

    def statuses(self) -> list[dict[str, Any]]:
        """All pools' statuses, by id."""
        return [self.status(pool_id) for pool_id in self.pool_ids()]

    def health(self, pool_id: str) -> dict[str, Any]:
        """The three booleans and the metrics that placement reads (OC-CTRL-2001)."""
        return health_of(self.status(pool_id))

    def leases(self, pool_id: str) -> list[dict[str, Any]]:
        """The pool's leases, oldest first. Raises RequestError POOL_NOT_FOUND."""
        self._pools.get(pool_id)
        return lease_rows(self.registry.leases(pool_id), self._a.clock)

    def crashes(self, pool_id: str | None = None) -> list[dict[str, Any]]:
        """The reports of crashes that are kept, newest last, over restarts of the daemon. Raises RequestError POOL_NOT_FOUND."""
        if pool_id is not None:
            self._pools.get(pool_id)
        return [report.to_json() for report in self._a.services.crashes.recent(pool_id)]

    def command(self, pool_id: str) -> dict[str, Any]:
        """What is executed; secrets masked. Raises RequestError POOL_UNREADY until the engine was prepared once."""
        return command_of(self._pools.get(pool_id), self.events.redactor)

    def log_path(self, pool_id: str, replica_id: str | None = None) -> Path:
        """The engine's raw log, whether it exists or not; of ``replica_id``, such as one that a reload has tried, where that is
        given. Raises RequestError POOL_NOT_FOUND.
        """
        present = self._pools.get(pool_id).instance_id
        return self._a.files.log_path(present if replica_id is None else InstanceId(pool_id, replica_id))

    def log_places(self, pool_id: str) -> LogPlaces:
        """Where the engine's log stood when: what to read for ``since`` a time, or for the launch before the last one."""
        return self._pools.get(pool_id).log_places

    def log_tail(self, pool_id: str, max_lines: int = 100) -> list[str]:
        """The last lines of that log. Raises RequestError POOL_NOT_FOUND."""
        return self._a.files.tail_log(self._pools.get(pool_id).instance_id, 1024 * max_lines, max_lines)

    def readiness(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether every configured pool that is to be preloaded is ready, and which are not."""
        wanted = [pool.id for pool in self.config.pools if pool.preload]
        waiting = [s for s in map(self.status, wanted) if not s["ready"]]
        return not waiting, [{key: s[key] for key in ("pool_id", "state", "reason", "last_error")} for s in waiting]

    def snapshots(self) -> dict[str, Any]:
        """Every pool at one instant, and how old the metrics of its GPUs are; ``version`` grows with every change."""
        return snapshots_view(self.registry, self._gpus, self._a.clock)

    def capabilities(self) -> dict[str, Any]:
        """What this node can run, per engine, and what its pools offer."""
        return capabilities_of(self.version, self.config.profile, self.statuses())

    def operation(self, operation_id: str) -> dict[str, Any]:
        """One operation by its id. Raises RequestError OPERATION_NOT_FOUND."""
        return self._pools.operations.get(operation_id).to_dict()

    def operations(self) -> list[dict[str, Any]]:
        """The operations that are kept, oldest first."""
        return [operation.to_dict() for operation in self._pools.operations.all()]

    async def explain(self, pool_id: str) -> dict[str, Any]:
        """What a start would do now, without doing it. Raises RequestError POOL_NOT_FOUND."""
        pool = self._pools.get(pool_id)
        steps = self._a.engines.plan(pool.config)["steps"] if pool.config is not None else []
        return await explanation(pool, self.config, steps, self._a.services)

    def subscribe(self, pool_id: str | None = None, *, after_id: int | None = None) -> Subscription:
        """What happens from now on, or after event ``after_id``: ``with node.subscribe() as events:`` and ``async for event in
        events:``. An event ``gap`` comes first where not all of it is kept. ``pool_id``: of that pool, which need not exist.
        """
        return self.events.subscribe(after_id, pool_id)

    # --- changes ---

    async def preload(self, pool_id: str, engine: PreparedEngine | None = None) -> Operation:
        """Bring the pool up; with ``engine`` given, that engine verbatim, creating an unknown pool durably.

        Raises RequestError OPERATION_IN_PROGRESS, ALREADY_READY, POLICY_DENIED or POOL_NOT_FOUND.
        """
        if engine is None:
            return await self._pools.change(self._pools.get(pool_id), "preload", ev.Start(join=False), "up", desired="up")
        return await self._pools.submit(pool_id, engine)

    async def cancel_preload(self, pool_id: str) -> Operation:
        """Give up a start that is under way; the pool stays down. Raises RequestError when there is none."""
        return await self._pools.change(self._pools.get(pool_id), "cancel_preload", ev.CancelStart(), "down", desired="down")

    async def start(self, pool_id: str) -> Operation:
        """Bring the engine up as configured, or as it was submitted; joins a start that is under way or done.

        Raises RequestError POOL_HELD, POOL_DRAINING, POOL_UNAVAILABLE, POOL_NOT_CONFIGURED or POOL_NOT_FOUND.
        """
        return await self._pools.change(self._pools.get(pool_id), "start", ev.Start(), "up", desired="up")

    async def stop(self, pool_id: str) -> Operation:
        """Stop without waiting for leases; the pool stays down until it is started. Raises RequestError POOL_NOT_FOUND."""
        return await self._pools.change(self._pools.get(pool_id), "stop", ev.Stop(), "down", desired="down")

    async def evict(self, pool_id: str) -> Operation:
        """Stop to make room: unlike a stopped pool, an evicted one may be started again by whoever needs it.

        After a restart of the daemon its configuration holds: it comes up with `preload`, else on demand.

        Leases that a router only keeps for its next request come back for it. Raises RequestError POOL_IN_USE while others are in
        flight, EXTERNAL_ENGINE, POOL_NOT_FOUND.
        """
        if self.registry.get_active_leases(pool_id):
            await self._demand.routes.recall(lambda: not self.registry.get_active_leases(pool_id), self._a.clock)
        return await self._pools.change(self._pools.get(pool_id), "evict", ev.Evict(), "down", desired="evicted")

    async def restart(self, pool_id: str) -> Operation:
        """Stop if need be, then start. Raises RequestError OPERATION_IN_PROGRESS while the pool drains, POOL_HELD."""
        return await self._pools.change(self._pools.get(pool_id), "restart", ev.Restart(), "up", desired="up")

    async def reload(self, request: ReloadRequest) -> Operation:
        """Replace what the pool runs: gated, durable, and undone when the new engine does not do (OC-CTRL-2003).

        The operation's outcome has ``strategy``, ``engine_version``, ``model_id``, ``downtime_ms``, ``duration_ms`` and
        ``rolled_back``; its error begins with "reload failed". Raises SpecError, RequestError OPERATION_IN_PROGRESS,
        POOL_UNAVAILABLE or POOL_NOT_FOUND.
        """
        return await self._reloads.begin(request)

    async def plan_reload(self, request: ReloadRequest) -> dict[str, Any]:
        """What ``reload`` would do, how long the pool would be down, what it would need; nothing happens. Raises PoolError."""
        return await self._reloads.plan(request)

    async def hold(self, pool_id: str) -> Operation:
        """Nothing starts by itself until ``release``."""
        return await self._pools.change(self._pools.get(pool_id), "hold", ev.Hold(), "now", held=True)

    async def release(self, pool_id: str) -> Operation:
        """End a hold; a start that was due happens now."""
        return await self._pools.change(self._pools.get(pool_id), "release", ev.Release(), "now", held=False)

    async def drain(self, pool_id: str, deadline_ms: int | None = None) -> Operation:
        """Refuse leases, wait, stop at the latest at the deadline (default lifecycle.drain_deadline_ms).

        The operation's outcome has the fields of DrainOutcome.
        """
        default = self.config.lifecycle.drain_deadline_ms
        request = DrainRequest(pool_id, default if deadline_ms is None else deadline_ms)
        event = ev.Drain(request.deadline_ms, 0)
        return await self._pools.change(self._pools.get(pool_id), "drain", event, "drained", desired="drained")

    async def undrain(self, pool_id: str) -> Operation:
        """Take a drain back. Raises RequestError INVALID_PARAMS when the engine is down already."""
        return await self._pools.change(self._pools.get(pool_id), "undrain", ev.Undrain(), "now", desired="up")

    async def reset_breaker(self, pool_id: str) -> Operation:
        """Forget the failures so far; a start that waited for its backoff happens now."""
        return await self._pools.change(self._pools.get(pool_id), "reset_breaker", ev.ResetBreaker(), "now")

    async def register(self, pool_id: str) -> bool:
        """Make ``pool_id`` known without an engine; true when it is new."""
        return await self._pools.register(pool_id)

    async def deregister(self, pool_id: str) -> bool:
        """Forget a pool that is down and not configured; true when it existed."""
        return await self._pools.deregister(pool_id)

    async def ensure_ready(self, pool_id: str) -> dict[str, Any]:
        """As ``acquire`` for the pool of that id, without a lease: the pool's status, once it is ready. Raises PoolError, such as
        POOL_STOPPED for a pool that a person stopped or drained.
        """
        self._pools.get(pool_id)
        await self._demand.acquire(AcquireRequest(pool_id, MAX_WAIT_MS, slot=False))
        return self.status(pool_id)

    # --- inside ---

    def parse_prepared(self, body: Mapping[str, Any], pool_id: str) -> PreparedEngine:
        """A submitted PreparedEngine (SPEC §6.5). Raises SpecError naming the key."""
        return self._a.parse_prepared(body, pool_id)


__all__ = ["EventLog", "Operation", "PoolManager"]
