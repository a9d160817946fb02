"""All pools of a node: their drivers, what is asked of them, and the intent that survives the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.driver import PoolDriver
from pool_managerd.supervision.operations import Operation, Operations
from pool_managerd.supervision.policy import policy_for
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.settling import Waiting

MAX_SUBMITTED = 1_000


class IntentStore(Protocol):
    """Durable intent: a write is on disk when its wait ends."""

    async def put_pool(self, pool: StoredPool) -> None: ...
    def note_down(self, pool_id: str) -> None: ...
    async def remove_pool(self, pool_id: str) -> None: ...


class SubmissionCodec(Protocol):
    """Submitted engines as JSON objects and back."""

    def parse_prepared(self, body: Mapping[str, Any], pool_id: str) -> PreparedEngine: ...
    def prepared_to_json(self, engine: PreparedEngine) -> dict[str, Any] | None: ...


class Pools:
    """Drivers by pool id. ``change`` asks, makes the intent durable, and only then acknowledges."""

    def __init__(
        self, config: Config, services: Services, store: IntentStore, codec: SubmissionCodec, new_id: Callable[[], str]
    ) -> None:
        self._config = config
        self._s = services
        self._store = store
        self._codec = codec
        self._drivers: dict[str, PoolDriver] = {}
        self._stored: dict[str, StoredPool] = {}
        self.operations = Operations(new_id, services.clock.wall_ms)
        self.closing = False

    def ids(self) -> list[str]:
        return sorted(self._drivers)

    def all(self) -> list[PoolDriver]:
        return [self._drivers[pool_id] for pool_id in self.ids()]

    def find(self, pool_id: str) -> PoolDriver | None:
        return self._drivers.get(pool_id)

    def get(self, pool_id: str) -> PoolDriver:
        """Raises RequestError POOL_NOT_FOUND."""
        driver = self._drivers.get(pool_id)
        if driver is None:
            raise RequestError(f"pool {pool_id} not found", code="POOL_NOT_FOUND", status=404)
        return driver

    def add(self, pool_id: str, pool: PoolConfig | None = None) -> PoolDriver:
        """A driver for a new pool, down. Raises RequestError TOO_MANY_POOLS."""
        if len(self._drivers) >= MAX_SUBMITTED + len(self._config.pools):
            raise RequestError(
                f"cannot add pool {pool_id}: there are {len(self._drivers)} already", code="TOO_MANY_POOLS", status=409
            )
        policy = policy_for(self._config, pool_id, pool, self._s.node_id)
        driver = self._drivers[pool_id] = PoolDriver(pool_id, pool, policy, self._s)
        return driver

    async def boot(self, stored: dict[str, StoredPool]) -> None:
        """Bring back what the configuration and the stored intent say, in the order of pool ids."""
        self._stored = stored
        configured = {pool.id: pool for pool in self._config.pools}
        for pool_id in sorted(configured.keys() | {p.pool_id for p in stored.values() if p.submitted}):
            await self._boot_one(pool_id, configured.get(pool_id), stored.get(pool_id))

    async def _boot_one(self, pool_id: str, pool: PoolConfig | None, stored: StoredPool | None) -> None:
        driver = self.add(pool_id, pool)
        wanted = pool is not None and pool.preload
        if stored is not None:
            wanted = stored.desired == "up" or (wanted and stored.desired == "auto")
            if pool is None and stored.submitted is not None:
                wanted = self._recall(driver, stored.submitted) and wanted
            driver.restore(stored, owed=wanted and stored.held)
        if wanted and not driver.instance.held:
            await self.request(driver, "start", ev.Start(origin="boot"), "up")

    def _recall(self, driver: PoolDriver, submitted: Mapping[str, Any]) -> bool:
        """The engine that a request submitted to an earlier daemon; false, and said so, when it cannot be read any more."""
        try:
            driver.submitted = self._codec.parse_prepared(submitted, driver.pool_id)
        except PoolError as problem:
            human = f"The stored engine of pool '{driver.pool_id}' cannot be used any more: {problem.message}"
            self._s.events.emit("notice", human, level="error", pool_id=driver.pool_id)
            return False
        return True

    async def change(
        self, driver: PoolDriver, kind: str, event: ev.Event, goal: str, *, desired: str | None = None, held: bool | None = None
    ) -> Operation:
        """Ask the driver; once it agreed, make the intent durable; only then acknowledge. Raises PoolError."""
        if self.closing:
            raise RequestError("cannot change anything: the daemon is shutting down", code="NODE_UNAVAILABLE", status=503)
        operation = await self.request(driver, kind, event, goal)
        await self._remember(driver, desired, held)
        return operation

    async def request(self, driver: PoolDriver, kind: str, event: ev.Event, goal: str, *, target_epoch: int = 0) -> Operation:
        """Ask the driver, without making anything durable. Raises the RequestError of a refusal."""
        operation = self.operations.begin(kind, driver.pool_id)
        waiting = Waiting(operation, goal, self._on_end, target_epoch)
        driver.post(event, waiting)
        try:
            await waiting.answer
        except PoolError:
            self.operations.discard(operation)
            raise
        return operation

    async def remove(self, driver: PoolDriver) -> None:
        """Forget a pool that is down."""
        await self._store.remove_pool(driver.pool_id)
        self._stored.pop(driver.pool_id, None)
        del self._drivers[driver.pool_id]
        await driver.close()
        self._s.engines.release(driver.pool_id)
        self._s.registry.deregister(driver.pool_id)
        self._s.events.emit("pool_removed", f"Pool '{driver.pool_id}' is forgotten", pool_id=driver.pool_id)

    async def stop_all(self, deadline_ms: int) -> None:
        """Drain and stop every pool; their intent stays as it is, so that the next daemon starts them again."""
        self.closing = True
        idle = (Phase.DOWN, Phase.FAILED)
        running = [driver for driver in self.all() if driver.instance.phase not in idle or driver.instance.has_process]
        await asyncio.gather(*(self._stop_one(driver, deadline_ms) for driver in running))
        for driver in self.all():
            await driver.close()

    async def _stop_one(self, driver: PoolDriver, deadline_ms: int) -> None:
        on_its_way = driver.instance.phase in (Phase.DRAINING, Phase.STOPPING)
        try:
            operation = await self.request(driver, "shutdown", ev.Tick() if on_its_way else ev.Drain(deadline_ms, 0), "down")
            await operation.wait()
        except PoolError as problem:
            human = f"Pool '{driver.pool_id}' could not be stopped: {problem.message}"
            self._s.events.emit("notice", human, level="error", pool_id=driver.pool_id)

    async def _remember(self, driver: PoolDriver, desired: str | None, held: bool | None) -> None:
        old = self._stored.get(driver.pool_id)
        new = replace(old or StoredPool(driver.pool_id), submitted=None)
        if driver.config is None and driver.submitted is not None:
            new = replace(new, submitted=self._codec.prepared_to_json(driver.submitted))
        new = replace(new, desired=desired or new.desired, held=new.held if held is None else held)
        if new != old:
            await self._store.put_pool(new)
            self._stored[driver.pool_id] = new

    def _on_end(self, operation: Operation, outcome: dict[str, Any] | None, error: PoolError | None) -> None:
        driver = self._drivers.get(operation.pool_id)
        if error is not None and operation.kind == "preload" and driver is not None and driver.config is None:
            self._store.note_down(operation.pool_id)
        operation.finish(self._s.clock.wall_ms(), outcome, error)
        human = f"{operation.kind.replace('_', ' ').capitalize()} of pool '{operation.pool_id}' {operation.status}"
        self._s.events.emit(
            "operation", human, level="debug", pool_id=operation.pool_id, operation_id=operation.operation_id,
            kind=operation.kind, status=operation.status,
        )  # fmt: skip
