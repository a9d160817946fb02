"""The stores of one daemon's life on a simulated disk: as durable as the real ones promise, and no more.

What a store is given is taken up by its writer a moment later and is on disk another moment later: a daemon that is killed
in between loses it. Whoever waits is told after that, so that a daemon may also be killed with a change on disk that nobody was
told of. While the disk fails nothing is written: whoever waits is told so, and what nobody waits for is kept until it can be.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from pool_managerd.core.event import Event
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.registry import KeptLeases, LeaseChange
from pool_managerd.errors import NodeError
from pool_managerd.store.contents import Contents
from pool_managerd.testing.life import Life

ID_BLOCK = 10_000
MAX_EVENTS = 4_000
FULL = "database or disk is full"


def unwritable() -> NodeError:
    return NodeError(f"cannot write to state directory /state: {FULL}", code="STATE_UNWRITABLE", status=507)


class _Writer:
    """A thread's work on virtual time: one batch after the other, each of all that is there when it begins."""

    def __init__(self, life: Life, write: Callable[[], bool]) -> None:
        self._life, self._write = life, write
        self._waiting: list[asyncio.Future[bool]] = []
        self._busy = self._again = False

    def wake(self) -> None:
        if self._busy:
            self._again = True
        else:
            self._busy = True
            machine = self._life.machine
            self._life.later(machine.soon(0.0001, 0.004), self._run)

    def _run(self) -> None:
        waiting, self._waiting = self._waiting, []
        done = self._write()
        for told in waiting:
            self._life.loop.call_soon(_settle, told, done)
        self._busy = False
        if self._again:
            self._again = False
            self.wake()

    async def written(self) -> bool:
        """Whether all that was left before is on disk."""
        told: asyncio.Future[bool] = self._life.loop.create_future()
        self._waiting.append(told)
        self.wake()
        return await told


def _settle(told: asyncio.Future[bool], done: bool) -> None:
    if not told.done():
        told.set_result(done)


class SimulatedState:
    """As ``store.state.StateStore``: what is wanted of pools, counters and facts."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._contents = Contents()
        self._orders: list[tuple[Callable[[Contents], None], asyncio.Future[bool] | None]] = []
        self._writer = _Writer(life, self._write)
        self._facts: dict[str, dict[str, dict[str, Any]]] = {}
        self._opened = False

    def open(self) -> dict[str, StoredPool]:
        disk, self._opened = self._life.disk, True
        self._contents = Contents(dict(disk.pools), {key: json.loads(text) for key, text in disk.facts.items()})
        for (kind, key), value in self._contents.facts.items():
            self._facts.setdefault(kind, {})[key] = value
        return dict(disk.pools)

    def facts(self, kind: str) -> dict[str, dict[str, Any]]:
        return self._facts.get(kind, {})

    async def put_pool(self, pool: StoredPool) -> None:
        await self._durable(lambda contents: contents.put_pool(pool))

    async def remove_pool(self, pool_id: str) -> None:
        await self._durable(lambda contents: contents.remove_pool(pool_id))

    async def put_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None:
        await self._durable(lambda contents: contents.put_fact(kind, key, value))

    def note_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None:
        kept = None if value is None else json.loads(json.dumps(value))
        self._note(lambda contents: contents.put_fact(kind, key, kept))

    async def noted(self) -> None:
        await self._writer.written()

    def note_counters(self, pool_id: str, crash_count: int, restart_count: int) -> None:
        self._note(lambda contents: contents.put_counters(pool_id, crash_count, restart_count))

    def note_down(self, pool_id: str) -> None:
        self._note(lambda contents: contents.put_down(pool_id))

    def _note(self, change: Callable[[Contents], None]) -> None:
        self._orders.append((change, None))
        self._writer.wake()

    async def _durable(self, change: Callable[[Contents], None]) -> None:
        told: asyncio.Future[bool] = self._life.loop.create_future()
        self._orders.append((change, told))
        self._writer.wake()
        if not await asyncio.shield(told):
            raise unwritable()

    def _write(self) -> bool:
        orders, self._orders = self._orders, []
        disk, wanted = self._life.disk, self._contents.copy()
        for change, told in orders:
            if not disk.fails or told is None:
                change(wanted)
        self._contents = wanted
        if not disk.fails:
            disk.pools = dict(wanted.pools)
            for key in [key for key in wanted.touched if not isinstance(key, str)]:
                if (value := wanted.facts.get(key)) is None:
                    disk.facts.pop(key, None)
                else:
                    disk.facts[key] = json.dumps(value)
            wanted.touched.clear()
        for _, told in orders:
            if told is not None:
                self._life.loop.call_soon(_settle, told, not disk.fails)
        return not disk.fails

    def retry(self) -> None:
        """The disk can be written again."""
        if self._opened:
            self._writer.wake()

    async def close(self) -> None:
        await self._writer.written()


class SimulatedLeases:
    """As ``store.leases.LeaseStore``."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._changes: list[LeaseChange] = []
        self._writer = _Writer(life, self._write)

    def open(self) -> list[KeptLeases]:
        disk, found = self._life.disk, []
        for pool_id in sorted(disk.newest_leases):
            rows = [(epoch, lease) for of, epoch, lease in disk.leases.values() if of == pool_id]
            rows.sort(key=lambda row: int(row[1].lease_id.rpartition("-")[2], 16))
            found.append(KeptLeases(pool_id, disk.newest_leases[pool_id], tuple(rows)))
        return found

    def put(self, change: LeaseChange) -> None:
        self._changes.append(change)
        self._writer.wake()

    async def kept(self) -> None:
        if not await self._writer.written():
            raise unwritable()

    def _write(self) -> bool:
        disk = self._life.disk
        if disk.fails:
            return False
        for change in self._changes:
            if change.lease is None:
                disk.leases.pop(change.lease_id, None)
            else:
                disk.leases[change.lease_id] = (change.pool_id, change.epoch, change.lease)
            if change.new:
                disk.newest_leases[change.pool_id] = change.lease_id
        self._changes.clear()
        return True

    async def close(self) -> None:
        await self._writer.written()


class SimulatedJournal:
    """As ``store.journal.Journal``."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.last_id = 0
        self._events: list[Event] = []
        self._operations: dict[str, str | None] = {}
        self._crashes: dict[str, str | None] = {}
        self._drop_to = 0
        self._writer = _Writer(life, self._write)

    def open(self, tell: Callable[[str, str], None]) -> None:
        disk = self._life.disk
        self.last_id = disk.reserved_id
        disk.reserved_id += ID_BLOCK

    def recall_events(self) -> list[Event]:
        return list(self._life.disk.events)

    def recall_operations(self) -> list[dict[str, Any]]:
        return [json.loads(body) for body in self._life.disk.operations.values()]

    def recall_crashes(self) -> list[dict[str, Any]]:
        return [json.loads(body) for body in self._life.disk.crashes.values()]

    def put_crash(self, crash_id: str, body: Mapping[str, Any] | None) -> None:
        self._crashes[crash_id] = None if body is None else json.dumps(body)
        self._writer.wake()

    def put_event(self, event: Event) -> None:
        self._events.append(event)
        self._writer.wake()

    def drop_events(self, up_to_id: int) -> None:
        self._drop_to = up_to_id

    def put_operation(self, operation_id: str, body: Mapping[str, Any] | None) -> None:
        self._operations[operation_id] = None if body is None else json.dumps(body)
        self._writer.wake()

    async def kept(self) -> None:
        await self._writer.written()

    def _write(self) -> bool:
        disk = self._life.disk
        if disk.fails:
            return False
        disk.events += self._events
        if self._events:
            disk.reserved_id = max(disk.reserved_id, self._events[-1].id + ID_BLOCK // 2)
        self._events.clear()
        if (disk.events and disk.events[0].id <= self._drop_to) or len(disk.events) > 2 * MAX_EVENTS:
            disk.events = [event for event in disk.events if event.id > self._drop_to][-MAX_EVENTS:]
        for waiting, kept in ((self._operations, disk.operations), (self._crashes, disk.crashes)):
            for key, body in waiting.items():
                if body is None:
                    kept.pop(key, None)
                else:
                    kept[key] = body
            waiting.clear()
        return True

    async def close(self) -> None:
        await self._writer.written()
