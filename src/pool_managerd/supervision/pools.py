"""All pools of a node: their drivers, what is asked of them, and the intent that survives the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.driver import PoolDriver
from pool_managerd.supervision.operations import Operation, Operations
from pool_managerd.supervision.policy import policy_for
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.settling import Waiting, objection
from pool_managerd.supervision.submissions import check_room, check_startable, check_submission, learn_secrets, not_kept

_T = TypeVar("_T")

MAX_SUBMITTED = 1_000
_AT_REST = (Phase.DOWN, Phase.FAILED, Phase.BACKOFF)


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
        self.operations = Operations(new_id, services.clock.wall_ms, services.events.journal)
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
        learn_secrets(self._s.events.redactor, driver)
        return driver

    async def boot(self, stored: dict[str, StoredPool]) -> None:
        """Bring back what the configuration and the stored intent say, in the order of pool ids."""
        self._stored = stored
        configured = {pool.id: pool for pool in self._config.pools}
        requested = {p.pool_id for p in stored.values() if p.submitted or p.desired == "known"}
        await self._s.launcher.forget_others(configured.keys() | requested)
        for pool_id in sorted(configured.keys() | requested):
            await self._boot_one(pool_id, configured.get(pool_id), stored.get(pool_id))

    async def _boot_one(self, pool_id: str, pool: PoolConfig | None, stored: StoredPool | None) -> None:
        driver = self.add(pool_id, pool)
        wanted = pool is not None and pool.preload
        if stored is not None:
            wanted = stored.desired == "up" or (wanted and stored.desired == "auto")
            if pool is None and stored.submitted is not None:
                wanted = self._recall(driver, stored.submitted) and wanted
                await self._store_intent(driver, driver.submitted)  # an earlier version wrote secrets down
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
                raise not_kept(driver.pool_id, withheld)
            engine = self._codec.parse_prepared(submitted, driver.pool_id)
            check_submission(self._config, driver.pool_id, engine)
        except PoolError as problem:
            driver.barred = problem
            human = f"The stored engine of pool '{driver.pool_id}' cannot be used any more: {problem.message}"
            self._s.events.emit("notice", human, level="error", pool_id=driver.pool_id, hint=problem.hint)
            return False
        self._submit(driver, engine)
        learn_secrets(self._s.events.redactor, driver)
        return True

    def _submit(self, driver: PoolDriver, engine: PreparedEngine | None) -> None:
        driver.submitted, driver.barred = engine, None
        driver.policy = policy_for(self._config, driver.pool_id, driver.config, self._s.node_id, engine)

    async def change(
        self, driver: PoolDriver, kind: str, event: ev.Event, goal: str, *, desired: str | None = None, held: bool | None = None,
        engine: PreparedEngine | None = None,
    ) -> Operation:  # fmt: skip
        """Make the intent durable, then ask the driver, then acknowledge. One at a time per pool. Raises PoolError.

        What would be refused now changes nothing. A state that cannot be written refuses before anything has begun.
        A caller that goes away in between leaves no half of a change: it is carried through all the same.
        """
        return await _carried_through(self._change(driver, kind, event, goal, desired, held, engine))

    async def _change(
        self, driver: PoolDriver, kind: str, event: ev.Event, goal: str, desired: str | None, held: bool | None,
        engine: PreparedEngine | None,
    ) -> Operation:  # fmt: skip
        async with self._turn(driver):
            self._check_open(driver)
            if (refused := objection(driver.instance, event, self._s.clock.monotonic(), driver.policy)) is not None:
                raise refused
            if engine is not None:
                check_room(driver, engine, self._drivers.values())
            elif goal == "up" and not _from_configuration(driver, event):
                check_startable(self._config, driver)
            before, submitted = self._stored.get(driver.pool_id), driver.submitted
            if engine is None and not _from_configuration(driver, event):
                engine = submitted
            learn_secrets(self._s.events.redactor, driver, engine)
            await self._store_intent(driver, engine, desired, held)
            if engine is not submitted:
                self._submit(driver, engine)
            try:
                self._check_open(driver)
                return await self.request(driver, kind, event, goal)
            except PoolError:  # things have moved while the disk was written
                if engine is not submitted and driver.submitted is engine:
                    self._submit(driver, submitted)
                await self._write(before or StoredPool(driver.pool_id))
                raise

    async def register(self, driver: PoolDriver) -> None:
        """Make a pool without an engine durable."""
        async with self._turn(driver):
            self._check_open(driver)
            await self._store_intent(driver, driver.submitted)

    def _turn(self, driver: PoolDriver) -> asyncio.Lock:
        """Changes of one pool wait for each other: what is stored last is what was done last."""
        return self._turns.setdefault(driver.pool_id, asyncio.Lock())

    def _check_open(self, driver: PoolDriver) -> None:
        if self.closing:
            raise RequestError("cannot change anything: the daemon is shutting down", code="NODE_UNAVAILABLE", status=503)
        if self._drivers.get(driver.pool_id) is not driver:
            raise RequestError(f"pool {driver.pool_id} not found", code="POOL_NOT_FOUND", status=404)

    async def request(self, driver: PoolDriver, kind: str, event: ev.Event, goal: str) -> Operation:
        """Ask the driver, without making anything durable. Raises the RequestError of a refusal."""
        operation = self.operations.begin(kind, driver.pool_id)
        waiting = Waiting(operation, goal, self._on_end)
        driver.post(event, waiting)
        try:
            await waiting.answer
        except PoolError:
            self.operations.discard(operation)
            raise
        return operation

    async def remove(self, driver: PoolDriver) -> bool:
        """Forget a pool that is down; false when another caller has done so. Raises RequestError when it is not down."""
        return await _carried_through(self._remove(driver))

    async def _remove(self, driver: PoolDriver) -> bool:
        async with self._turn(driver):
            if self.find(driver.pool_id) is not driver:
                return False
            self._check_open(driver)
            if driver.instance.has_process or driver.instance.phase not in (Phase.DOWN, Phase.FAILED, Phase.ATTACHED):
                raise RequestError(
                    f"cannot deregister pool {driver.pool_id}: it is {view(driver.instance).state}",
                    code="OPERATION_IN_PROGRESS", status=409, hint="stop it first",
                )  # fmt: skip
            await self._store.remove_pool(driver.pool_id)
            self._stored.pop(driver.pool_id, None)
            await self.discard(driver)
        self._s.events.emit("pool_removed", f"Pool '{driver.pool_id}' is forgotten", pool_id=driver.pool_id)
        return True

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
            await self._s.launcher.forget(driver.pool_id)

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
        if desired == "auto" and old.desired == "up":
            desired = "up"  # demand joins what a person wants up, and leaves it wanted
        new = replace(old, desired=desired or old.desired, held=old.held if held is None else held, submitted=None)
        if driver.config is not None:
            return new
        if driver.barred is not None and engine is None:
            return replace(new, submitted=old.submitted)
        if engine is None:
            return replace(new, desired="known")
        return replace(new, submitted=self._codec.prepared_to_json(engine))

    async def _store_intent(
        self, driver: PoolDriver, engine: PreparedEngine | None, desired: str | None = None, held: bool | None = None
    ) -> None:
        """Written once more when a preload failed meanwhile, which is written down too: what is asked for last is what stays."""
        while (new := self._intended(driver, engine, desired, held)) != self._stored.get(driver.pool_id):
            await self._write(new)

    async def _write(self, new: StoredPool) -> None:
        before = self._stored.get(new.pool_id)
        await self._store.put_pool(new)
        if self._stored.get(new.pool_id) is before:
            self._stored[new.pool_id] = new

    def _on_end(self, operation: Operation, outcome: dict[str, Any] | None, error: PoolError | None) -> None:
        driver = self._drivers.get(operation.pool_id)
        if (
            error is not None
            and not self.closing
            and operation.kind == "preload"
            and driver is not None
            and driver.config is None
            and driver.instance.phase is Phase.FAILED  # else somebody's later start goes on
        ):
            self._store.note_down(operation.pool_id)
            if (stored := self._stored.get(operation.pool_id)) is not None:
                self._stored[operation.pool_id] = replace(stored, desired="down")
        if error is not None:
            self._s.events.clean_error(error)
        self.operations.finish(operation, outcome, error)
        human = f"{operation.kind.replace('_', ' ').capitalize()} of pool '{operation.pool_id}' {operation.status}"
        self._s.events.emit(
            "operation", human, level="debug", pool_id=operation.pool_id, operation_id=operation.operation_id,
            kind=operation.kind, status=operation.status,
        )  # fmt: skip


async def _carried_through(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``, which goes on when the caller is cancelled."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to be told of it
    return await asyncio.shield(task)


def _from_configuration(driver: PoolDriver, event: ev.Event) -> bool:
    """True for a start of a configured pool that begins anew: what its configuration says holds again."""
    return isinstance(event, ev.Start) and driver.config is not None and driver.instance.phase in _AT_REST
