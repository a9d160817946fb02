"""Changes of one pool that somebody asks for: made durable, then done, then acknowledged; one at a time per pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from pool_managerd.config import Config
from pool_managerd.core.artifacts import AnyEngine
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import PoolError
from pool_managerd.supervision import policy
from pool_managerd.supervision.definitions import Definitions
from pool_managerd.supervision.endings import Endings
from pool_managerd.supervision.intents import Intents
from pool_managerd.supervision.operations import Operation, Operations, carried_through
from pool_managerd.supervision.pool import Definition, Pool
from pool_managerd.supervision.precedence import Precedence
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.settling import objection

_AT_REST = (Phase.DOWN, Phase.FAILED, Phase.BACKOFF, Phase.OPEN)


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody wants of a pool: ``event``, and what is then stored of it. ``goal`` is what ends the operation."""

    kind: str
    event: ev.Event
    goal: str
    desired: str | None = None
    held: bool | None = None
    engine: AnyEngine | None = None


class Node(Protocol):
    """The pools, as far as changes need them."""

    intents: Intents
    operations: Operations
    definitions: Definitions
    precedence: Precedence
    endings: Endings

    def all(self) -> list[Pool]: ...
    def turn(self, pool: Pool) -> asyncio.Lock: ...
    def check_open(self, pool: Pool) -> None: ...
    async def request(
        self, pool: Pool, kind: str, event: ev.Event, goal: str, definition: Definition | None = None,
        accepted: Operation | None = None,
    ) -> Operation: ...  # fmt: skip


class Changes:
    """Of all pools of a node. ``config`` is what is in force."""

    def __init__(self, pools: Node, services: Services, config: Callable[[], Config]) -> None:
        self._pools, self._s, self._config = pools, services, config
        self._deferred: set[asyncio.Task[None]] = set()

    async def change(self, pool: Pool, asked: Asked) -> Operation:
        """As ``Pools.change``. What has to wait for a reload is accepted all the same: its operation waits."""
        if not self._pools.precedence.defers(pool.pool_id, asked.event):
            return await self._in_turn(pool, asked)
        intents, before = self._pools.intents, self._pools.intents.get(pool.pool_id)
        if asked.desired is not None:
            await intents.want(pool.pool_id, intents.joined(pool.pool_id, asked.desired))
        operation = self._pools.operations.begin(asked.kind, pool.pool_id, asked.goal)
        task = asyncio.create_task(self._later(pool, asked, operation, before))
        self._deferred.add(task)
        task.add_done_callback(self._deferred.discard)
        await self._pools.operations.kept()
        return operation

    def close(self) -> None:
        """Nothing begins any more."""
        for task in self._deferred:
            task.cancel()

    async def _later(self, pool: Pool, asked: Asked, operation: Operation, before: StoredPool | None) -> None:
        """``before`` is what was wanted of it: so it is again, where this is refused after all."""
        try:
            await self._in_turn(pool, asked, operation)
        except PoolError as problem:
            if before is not None:
                with suppress(PoolError):
                    await self._pools.intents.want(pool.pool_id, before.desired)
            self._pools.endings.tell(operation, None, problem)

    async def _in_turn(self, pool: Pool, asked: Asked, operation: Operation | None = None) -> Operation:
        while True:
            await self._pools.precedence.wait(pool.latest(), asked.event)
            begun = await carried_through(self._change(pool.latest(), asked, operation))
            if begun is not None:
                return begun

    async def _change(self, pool: Pool, asked: Asked, accepted: Operation | None) -> Operation | None:
        """None when a reload has begun before it was this one's turn. ``accepted``: whoever asks was given that."""
        pools, event, engine = self._pools, asked.event, asked.engine
        async with pools.turn(pool):
            pools.check_open(pool)
            if pools.precedence.has(pool.pool_id):
                return None
            refused = objection(pool.state, event, self._s.clock.monotonic(), pool.definition.policy)
            if refused is not None:
                raise refused
            if engine is not None:
                policy.check_room(pool, engine, pools.all())
            elif not _from_configuration(pool, event):
                if asked.goal == "up":
                    policy.check_startable(self._config(), pool)
                engine = pool.submitted
            anew = engine is not pool.submitted
            definition = pools.definitions.with_engine(pool.pool_id, pool.definition, engine) if anew else None
            policy.learn_secrets(self._s.events.redactor, pool.pool_id, definition or pool.definition)
            before = pools.intents.get(pool.pool_id)
            await pools.intents.keep(pool, engine, asked.desired, asked.held)
            try:
                pools.check_open(pool)
                operation = await pools.request(pool, asked.kind, event, asked.goal, definition, accepted)
            except PoolError:  # things have moved while the disk was written
                await pools.intents.put(before or StoredPool(pool.pool_id))
                raise
            if isinstance(event, ev.Drain):
                await self._s.records.noted()  # the deadline, to which the next daemon goes on
            await pools.operations.kept()
            return operation


def _from_configuration(pool: Pool, event: ev.Event) -> bool:
    """True for a start of a configured pool that begins anew: what its configuration says holds again."""
    return isinstance(event, ev.Start) and pool.config is not None and pool.instance.phase in _AT_REST
