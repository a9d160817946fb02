"""All pools of a node: their drivers, what is asked of them, and the intent that survives the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any, Protocol

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.redaction import secrets_in
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.driver import PoolDriver
from pool_managerd.supervision.operations import Operation, Operations
from pool_managerd.supervision.policy import policy_for
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.settling import Waiting, objection
from pool_managerd.supervision.submissions import check_submission

MAX_SUBMITTED = 1_000
MAX_SUBMITTED_CHARS = 8 << 20
MAX_OLD_SECRETS = 256


def _not_kept(pool_id: str, names: Any) -> RequestError:
    shown = ", ".join(str(name)[:80] for name in names[:8]) if isinstance(names, list) else "some"
    return RequestError(
        f"cannot start pool {pool_id} again: its secrets ({shown}) are not written to disk, and went with the daemon before",
        code="SECRETS_NOT_KEPT", status=409, pool_id=pool_id, hint="preload it again with them, or configure the pool",
    )  # fmt: skip


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
        self._turns: dict[str, asyncio.Lock] = {}
        services.gpus.attach(self.all)
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
        self._learn_secrets(driver)
        return driver

    def _learn_secrets(self, driver: PoolDriver, *engines: PreparedEngine | None) -> None:
        """From now on nothing that leaves the node shows them."""
        found: set[str] = set()
        if driver.config is not None:
            given = driver.config.provisioning
            found |= secrets_in(given.env, (*given.flags, given.url or ""))
        for engine in (driver.submitted, *engines):
            if engine is not None:
                found |= secrets_in(engine.env, engine.flags)
        # What it had before stays known: its engine's log may hold it still.
        self._s.events.redactor.know(driver.pool_id, found | set(self._s.events.redactor.known(driver.pool_id, MAX_OLD_SECRETS)))

    async def boot(self, stored: dict[str, StoredPool]) -> None:
        """Bring back what the configuration and the stored intent say, in the order of pool ids."""
        self._stored = stored
        configured = {pool.id: pool for pool in self._config.pools}
        requested = {p.pool_id for p in stored.values() if p.submitted or p.desired == "known"}
        for pool_id in sorted(configured.keys() | requested):
            await self._boot_one(pool_id, configured.get(pool_id), stored.get(pool_id))

    async def _boot_one(self, pool_id: str, pool: PoolConfig | None, stored: StoredPool | None) -> None:
        driver = self.add(pool_id, pool)
        wanted = pool is not None and pool.preload
        if stored is not None:
            wanted = stored.desired == "up" or (wanted and stored.desired == "auto")
            if pool is None and stored.submitted is not None:
                wanted = self._recall(driver, stored.submitted) and wanted
                if (kept := self._intended(driver, driver.submitted, None, None)) != stored:
                    await self._store_intent(kept)  # an earlier version wrote secrets down
            driver.restore(stored, owed=wanted and stored.held)
        if wanted and not driver.instance.held:
            await self.request(driver, "start", ev.Start(origin="boot"), "up")

    def announce(self, pool_id: str) -> PoolDriver:
        """The driver of an engine that a handoff file tells of: known, or new with what was stored of it."""
        driver = self._drivers.get(pool_id)
        if driver is None:
            driver = self.add(pool_id)
            if (stored := self._stored.get(pool_id)) is not None:
                driver.restore(stored, owed=False)
        return driver

    def _recall(self, driver: PoolDriver, submitted: Mapping[str, Any]) -> bool:
        """The engine that a request submitted to an earlier daemon; false, and said so, when it cannot be read any more."""
        try:
            if withheld := submitted.get("withheld"):
                raise _not_kept(driver.pool_id, withheld)
            engine = self._codec.parse_prepared(submitted, driver.pool_id)
            check_submission(self._config, driver.pool_id, engine)
        except PoolError as problem:
            driver.barred = problem
            human = f"The stored engine of pool '{driver.pool_id}' cannot be used any more: {problem.message}"
            self._s.events.emit("notice", human, level="error", pool_id=driver.pool_id, hint=problem.hint)
            return False
        driver.submitted = engine
        self._learn_secrets(driver)
        return True

    async def change(
        self, driver: PoolDriver, kind: str, event: ev.Event, goal: str, *, desired: str | None = None, held: bool | None = None,
        engine: PreparedEngine | None = None,
    ) -> Operation:  # fmt: skip
        """Make the intent durable, then ask the driver, then acknowledge. One at a time per pool. Raises PoolError.

        What would be refused now changes nothing. A state that cannot be written refuses before anything has begun.
        """
        async with self._turn(driver):
            self._check_open(driver)
            if (refused := objection(driver.instance, event, self._s.clock.monotonic(), driver.policy)) is not None:
                raise refused
            if engine is not None:
                self._check_room(driver, engine)
            elif goal == "up":
                self._check_startable(driver)
            before, submitted = self._stored.get(driver.pool_id), driver.submitted
            self._learn_secrets(driver, engine)
            await self._store_intent(self._intended(driver, engine or submitted, desired, held))
            if engine is not None:
                driver.submitted, driver.barred = engine, None
            try:
                self._check_open(driver)
                return await self.request(driver, kind, event, goal)
            except PoolError:  # things have moved while the disk was written
                if driver.submitted is engine:
                    driver.submitted = submitted
                await self._store_intent(before or StoredPool(driver.pool_id))
                raise

    async def register(self, driver: PoolDriver) -> None:
        """Make a pool without an engine durable."""
        async with self._turn(driver):
            self._check_open(driver)
            await self._store_intent(self._intended(driver, driver.submitted, None, None))

    def _check_startable(self, driver: PoolDriver) -> None:
        """Raises PoolError when there is nothing to run, or nothing that may run: policy is asked at every start."""
        if driver.barred is not None:
            raise copy(driver.barred)
        if driver.submitted is not None and driver.submitted.attach_url is None:
            check_submission(self._config, driver.pool_id, driver.submitted)
        if driver.submitted is None and driver.config is None:
            raise RequestError(
                f"cannot start pool {driver.pool_id}: it has neither a configuration nor a submitted engine",
                code="POOL_NOT_CONFIGURED", status=409, pool_id=driver.pool_id,
                hint="add it to the configuration, or preload it with an engine",
            )  # fmt: skip

    def _check_room(self, driver: PoolDriver, engine: PreparedEngine) -> None:
        """Raises RequestError when all submitted engines together would take more than the node keeps for them."""
        others = (d.submitted.size_chars for d in self._drivers.values() if d.submitted is not None and d is not driver)
        if sum(others) + engine.size_chars > MAX_SUBMITTED_CHARS:
            raise RequestError(
                f"cannot take the engine of pool {driver.pool_id}: the submitted engines have {MAX_SUBMITTED_CHARS >> 20} MiB of"
                " flags and environment already",
                code="TOO_MANY_POOLS", status=409, pool_id=driver.pool_id, hint="delete pools that are not needed any more",
            )  # fmt: skip

    def _turn(self, driver: PoolDriver) -> asyncio.Lock:
        """Changes of one pool wait for each other: what is stored last is what was done last."""
        return self._turns.setdefault(driver.pool_id, asyncio.Lock())

    def _check_open(self, driver: PoolDriver) -> None:
        if self.closing:
            raise RequestError("cannot change anything: the daemon is shutting down", code="NODE_UNAVAILABLE", status=503)
        if self._drivers.get(driver.pool_id) is not driver:
            raise RequestError(f"pool {driver.pool_id} not found", code="POOL_NOT_FOUND", status=404)

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
        """Forget a pool that is down. Raises RequestError when it is not."""
        async with self._turn(driver):
            self._check_open(driver)
            if driver.instance.has_process or driver.instance.phase not in (Phase.DOWN, Phase.FAILED, Phase.ATTACHED):
                raise RequestError(
                    f"cannot deregister pool {driver.pool_id}: it is {driver.instance.phase.value}",
                    code="OPERATION_IN_PROGRESS", status=409, hint="stop it first",
                )  # fmt: skip
            await self._store.remove_pool(driver.pool_id)
            self._stored.pop(driver.pool_id, None)
            await self.discard(driver)
        self._s.events.emit("pool_removed", f"Pool '{driver.pool_id}' is forgotten", pool_id=driver.pool_id)

    async def discard(self, driver: PoolDriver) -> None:
        """Drop a driver whose pool is down and not stored, as if it had never been added."""
        if self._drivers.get(driver.pool_id) is driver:
            del self._drivers[driver.pool_id]
            del self._turns[driver.pool_id]
            await driver.close()
            self._s.engines.release(driver.pool_id)
            self._s.gpus.forget(driver.pool_id)
            self._s.registry.deregister(driver.pool_id)
            self._s.events.redactor.know(driver.pool_id, ())

    async def stop_all(self, deadline_ms: int) -> None:
        """Drain and stop every pool; their intent stays as it is, so that the next daemon starts them again."""
        self.closing = True
        await asyncio.gather(*(self._stop_one(driver, deadline_ms) for driver in self.all()))
        for driver in self.all():
            await driver.close()

    async def _stop_one(self, driver: PoolDriver, deadline_ms: int) -> None:
        clock, phase = self._s.clock, driver.instance.phase
        late = clock.call_at(clock.monotonic() + deadline_ms / 1000, lambda: driver.post(ev.Stop()))
        event: ev.Event = ev.Drain(deadline_ms, 0) if phase in (Phase.READY, Phase.ATTACHED) else ev.Stop()
        if phase is Phase.DRAINING:
            event = ev.Tick()
        try:
            try:
                operation = await self.request(driver, "shutdown", event, "down")
            except PoolError:  # it has moved on since
                operation = await self.request(driver, "shutdown", ev.Stop(), "down")
            await operation.wait()
        except PoolError as problem:
            human = f"Pool '{driver.pool_id}' could not be stopped: {problem.message}"
            self._s.events.emit("notice", human, level="error", pool_id=driver.pool_id)
        finally:
            late.cancel()

    def _intended(self, driver: PoolDriver, engine: PreparedEngine | None, desired: str | None, held: bool | None) -> StoredPool:
        old = self._stored.get(driver.pool_id, StoredPool(driver.pool_id))
        new = replace(old, desired=desired or old.desired, held=old.held if held is None else held, submitted=None)
        if driver.config is not None:
            return new
        if driver.barred is not None and engine is None:
            return replace(new, submitted=old.submitted)
        if engine is None:
            return replace(new, desired="known")
        return replace(new, submitted=self._codec.prepared_to_json(engine))

    async def _store_intent(self, new: StoredPool) -> None:
        if new != self._stored.get(new.pool_id):
            await self._store.put_pool(new)
            self._stored[new.pool_id] = new

    def _on_end(self, operation: Operation, outcome: dict[str, Any] | None, error: PoolError | None) -> None:
        driver = self._drivers.get(operation.pool_id)
        if (
            error is not None
            and not self.closing
            and operation.kind == "preload"
            and driver is not None
            and driver.config is None
        ):
            self._store.note_down(operation.pool_id)
            if (stored := self._stored.get(operation.pool_id)) is not None:
                self._stored[operation.pool_id] = replace(stored, desired="down")
        if error is not None:
            self._s.events.clean_error(error)
        operation.finish(self._s.clock.wall_ms(), outcome, error)
        human = f"{operation.kind.replace('_', ' ').capitalize()} of pool '{operation.pool_id}' {operation.status}"
        self._s.events.emit(
            "operation", human, level="debug", pool_id=operation.pool_id, operation_id=operation.operation_id,
            kind=operation.kind, status=operation.status,
        )  # fmt: skip
