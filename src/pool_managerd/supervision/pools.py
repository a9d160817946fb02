"""All pools of a node: their actors, what is asked of them, and the intent that survives the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import AnyEngine, PreparedEngine
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Phase, PoolState, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision import policy
from pool_managerd.supervision.actor import PoolActor
from pool_managerd.supervision.changes import Asked, Changes
from pool_managerd.supervision.definitions import Definitions
from pool_managerd.supervision.endings import Endings
from pool_managerd.supervision.in_flight import requests_of
from pool_managerd.supervision.intents import Intents, IntentStore, SubmissionCodec, state_of
from pool_managerd.supervision.operations import Operation, Operations, carried_through
from pool_managerd.supervision.overrides import Overrides
from pool_managerd.supervision.pool import Definition, Pool
from pool_managerd.supervision.precedence import Nobody, Precedence, Wanted
from pool_managerd.supervision.replacements import Replacements
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.settling import OnEnd, Waiting

MAX_SUBMITTED = 1_000


class Pools:
    """Pools by id. ``change`` asks, makes the intent durable, and only then acknowledges.

    What it gives out are the pools' records, to be read; their actors stay in here.
    """

    def __init__(
        self, config: Config, services: Services, store: IntentStore, codec: SubmissionCodec, new_id: Callable[[], str]
    ) -> None:
        self._config = config
        self._s = services
        self.intents = Intents(store, codec)
        self.definitions = Definitions(config, services, codec)
        self._actors: dict[str, PoolActor] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self.replacements = Replacements(self._actors, services)
        services.gpus.attach(self.instances, self.tell)
        self.operations = Operations(new_id, services.clock.wall_ms, services.events.journal)
        self.closing = False
        self.on_leases: Callable[[str], None] = lambda pool_id: None
        """Called with the pool at every change of a lease."""
        self.other_needs: list[Callable[[], Iterable[Wanted]]] = []
        """What is needed beside what pools are configured with and run: asked of whoever changes them in several steps."""
        self._changes = Changes(self, services, lambda: self._config)
        self.overrides = Overrides(services.records, services.events)
        self.precedence: Precedence = Nobody()
        self.endings = Endings(self, services)
        services.events.listen(self.endings.hear)

    def use_config(self, config: Config) -> None:
        """What is in force from now on, of pools to come and of requests; those that are there have what they were defined by."""
        self._config = config
        self.definitions.use_config(config)

    # --- reads ---

    def ids(self) -> list[str]:
        return sorted(self._actors)

    def all(self) -> list[Pool]:
        return [self._actors[pool_id].pool for pool_id in self.ids()]

    def instances(self) -> list[Pool]:
        """All pools, and the other instances of those that have two."""
        return [*self.all(), *self.replacements.all()]

    def find(self, pool_id: str) -> Pool | None:
        actor = self._actors.get(pool_id)
        return None if actor is None else actor.pool

    def get(self, pool_id: str) -> Pool:
        """Raises RequestError POOL_NOT_FOUND."""
        actor = self._actors.get(pool_id)
        if actor is None:
            raise _not_found(pool_id)
        return actor.pool

    def needs(self) -> list[Wanted]:
        """What is needed for what is under way."""
        return [wanted for tell in self.other_needs for wanted in tell()]

    # --- to one pool ---

    def post(self, pool_id: str, event: ev.Event, definition: Definition | None = None) -> None:
        """Let the pool know; one that is gone needs to know nothing."""
        if (actor := self._actors.get(pool_id)) is not None:
            if definition is not None:
                policy.learn_secrets(self._s.events.redactor, pool_id, definition)
            actor.post(event, definition=definition)

    def tell(self, pool: Pool, event: ev.Event) -> None:
        """As ``post``, this very instance."""
        if (actor := self.replacements.actor_of(pool)) is not None:
            actor.post(event)

    def leases_changed(self, pool_id: str, *, expiry: bool = False) -> None:
        """A lease was given or ended; ``expiry``: its end may come sooner than anything else."""
        self.on_leases(pool_id)
        for actor in self.replacements.actors(pool_id):
            actor.leases_changed(expiry=expiry)

    def learn(self, pool_id: str, epoch: int, **known: Any) -> None:
        """Write down what is known of launch ``epoch`` now, and tell the registry; of one that is over nothing."""
        if (actor := self._actors.get(pool_id)) is not None:
            actor.learn(epoch, **known, tell=True)

    def kill_all(self) -> None:
        """Every engine, at once."""
        for pool_id in self._actors:
            for actor in self.replacements.actors(pool_id):
                actor.kill()

    # --- coming and going ---

    async def find_or_add(self, pool_id: str) -> tuple[Pool, bool]:
        """The pool, and whether it is new; one of this name that is just being forgotten is gone first. Raises as ``add``."""
        while (leaving := self._leaving.get(pool_id)) is not None:
            await asyncio.shield(leaving)
        known = self.find(pool_id)
        return (known, False) if known is not None else (self.add(pool_id), True)

    def add(self, pool_id: str, config: PoolConfig | None = None) -> Pool:
        """A new pool, down, with what was stored of it. Raises RequestError TOO_MANY_POOLS, or that it is being forgotten."""
        if pool_id in self._leaving:
            raise RequestError(
                f"cannot add pool {pool_id}: it is just being forgotten", code="OPERATION_IN_PROGRESS", status=409, retriable=True
            )
        if len(self._actors) >= MAX_SUBMITTED + len(self._config.pools):
            raise RequestError(
                f"cannot add pool {pool_id}: there are {len(self._actors)} already", code="TOO_MANY_POOLS", status=409
            )
        stored = self.intents.get(pool_id) or StoredPool(pool_id)
        definition = self.definitions.of(pool_id, config, stored.submitted)
        new = replace(PoolState.new(pool_id, self._s.epochs.first(pool_id)), history=self._s.histories.of(pool_id))
        barred = None if definition.barred is None else self._s.events.clean(definition.barred.message)
        state = state_of(new, stored, config, barred)
        policy.learn_secrets(self._s.events.redactor, pool_id, definition)
        actor = self._actors[pool_id] = PoolActor(definition, state, self._s)
        return actor.pool

    async def restore(self, stored: dict[str, StoredPool]) -> None:
        """What the configuration and the stored intent name, in the order of pool ids; nothing of it is started."""
        self.intents.restore(stored)
        self.overrides.restore()
        configured = {pool.id: self.overrides.in_force(pool, self._config.base_dir) for pool in self._config.pools}
        requested = {p.pool_id for p in stored.values() if p.submitted or p.desired == "known"}
        await self._s.launcher.forget_others(configured.keys() | requested)
        self._s.histories.forget_others(configured.keys() | requested)
        self._s.crashes.forget_others(configured.keys() | requested)
        for pool_id in sorted(configured.keys() | requested):
            pool = self.add(pool_id, configured.get(pool_id))
            if pool.submitted is not None or pool.definition.barred is not None:
                await self.intents.keep(pool, pool.submitted)  # an earlier version wrote secrets down

    def resume(self, operation: Operation) -> None:
        """Go on waiting for the end of what an earlier daemon began. Raises RequestError POOL_NOT_FOUND."""
        pool = self.get(operation.pool_id)
        self._actors[pool.pool_id].post(ev.Tick(), Waiting(operation, operation.goal, self.endings.tell))

    async def remove(self, pool: Pool) -> bool:
        """Forget a pool that is down; false when another caller has done so. Raises RequestError when it is not down."""
        return await carried_through(self._remove(pool))

    async def _remove(self, pool: Pool) -> bool:
        pool_id, pool = pool.pool_id, pool.latest()
        async with self.turn(pool):
            if self.find(pool_id) is not pool:
                return False
            self.check_open(pool)
            reloaded, i = self.precedence.has(pool_id) or self.replacements.find(pool_id), pool.instance
            if reloaded or i.has_process or i.phase not in (Phase.DOWN, Phase.FAILED, Phase.ATTACHED):
                raise RequestError(
                    f"cannot deregister pool {pool_id}: it is {'being reloaded' if reloaded else view(pool.state).state}",
                    code="OPERATION_IN_PROGRESS", status=409, hint="stop it first",
                )  # fmt: skip
            await self._s.epochs.forget(pool_id)
            await self.intents.remove(pool_id)
            await self.discard(pool)
        self._s.events.emit("pool_removed", f"Pool '{pool_id}' is forgotten", pool_id=pool_id)
        return True

    async def discard(self, pool: Pool) -> None:
        """Drop a pool that is down and not stored, as if it had never been added.

        Nobody finds it from now on, and none of its name is made until all of it is gone: what is cleared away by its name
        here must not be the next one's.
        """
        pool_id = pool.pool_id
        if self.find(pool_id) is not pool:
            return
        actor = self._actors.pop(pool_id)
        self._turns.pop(pool_id, None)
        gone = self._leaving[pool_id] = asyncio.get_running_loop().create_future()
        try:
            await actor.close()
            self._s.histories.forget(pool_id)
            self._s.engines.release(pool_id)
            self._s.gpus.forget(pool_id)
            self._s.admission.forget(pool_id)
            self._s.registry.deregister(pool_id)
            self._s.crashes.forget(pool_id)
            self.overrides.forget(pool_id)
            self._s.events.redactor.know(pool_id, ())
            await self._s.launcher.forget(pool_id)
        finally:
            del self._leaving[pool_id]
            gone.set_result(None)

    # --- changes ---

    async def change(
        self, pool: Pool, kind: str, event: ev.Event, goal: str, *, desired: str | None = None, held: bool | None = None,
        engine: AnyEngine | None = None,
    ) -> Operation:  # fmt: skip
        """Make the intent durable, then ask the pool, then acknowledge. One at a time per pool. Raises PoolError.

        What would be refused now changes nothing. A state that cannot be written refuses before anything has begun.
        A caller that goes away in between leaves no half of a change: it is carried through all the same.
        """
        return await self._changes.change(pool, Asked(kind, event, goal, desired, held, engine))

    async def submit(self, pool_id: str, engine: PreparedEngine) -> Operation:
        """Preload an engine of somebody's own, on a new pool where none has that id. Raises RequestError, SpecError."""
        policy.check_submission(self._config, pool_id, engine)
        pool, new = await self.find_or_add(pool_id)
        try:
            start = ev.Start(retry=False, join=False)
            return await self.change(pool, "preload", start, "up", desired="up", engine=engine)
        except PoolError:
            if new and self.intents.get(pool_id) in (None, StoredPool(pool_id)):  # else another caller has made it theirs
                await self.discard(pool)
            raise

    async def register(self, pool_id: str) -> bool:
        """A pool without an engine, durably; true when it is new. Raises SpecError for an id that cannot name a pool."""
        policy.check_pool_id(pool_id)
        pool, new = await self.find_or_add(pool_id)
        if not new:
            return False
        try:
            async with self.turn(pool):
                self.check_open(pool)
                await self.intents.keep(pool, pool.submitted)
        except PoolError:
            await self.discard(pool)
            raise
        return True

    async def deregister(self, pool_id: str) -> bool:
        """Forget a pool that is down and not configured; true when it existed. Raises RequestError."""
        pool = self.find(pool_id)
        if pool is None:
            return False
        if pool.config is not None:
            raise RequestError(
                f"cannot deregister pool {pool_id}: it is configured", status=409, hint="remove it from the configuration"
            )
        return await self.remove(pool)

    def turn(self, pool: Pool) -> asyncio.Lock:
        """Changes of one pool wait for each other: what is stored last is what was done last."""
        return self._turns.setdefault(pool.pool_id, asyncio.Lock())

    def check_open(self, pool: Pool) -> None:
        """Raises RequestError when nothing is changed any more, or this pool is gone."""
        if self.closing:
            raise RequestError("cannot change anything: the daemon is shutting down", code="NODE_UNAVAILABLE", status=503)
        if self.find(pool.pool_id) is not pool:
            raise _not_found(pool.pool_id)

    async def request(
        self, pool: Pool, kind: str, event: ev.Event, goal: str, definition: Definition | None = None,
        accepted: Operation | None = None,
    ) -> Operation:  # fmt: skip
        """Ask the pool, without making anything durable. Raises the RequestError of a refusal."""
        operation = accepted or self.operations.begin(kind, pool.pool_id, goal)
        try:
            await self.ask(pool, event, operation, self.endings.tell, definition)
        except PoolError:
            if accepted is None:
                self.operations.discard(operation)
            raise
        return operation

    async def ask(
        self, pool: Pool, event: ev.Event, operation: Operation, on_end: OnEnd, definition: Definition | None = None
    ) -> None:
        """Ask the pool for what ``operation`` stands for; ``on_end`` is told its end. Raises the RequestError of a refusal."""
        actor = self.replacements.actor_of(pool)
        if actor is None:
            raise _not_found(pool.pool_id)
        if isinstance(event, ev.Drain | ev.Sleep):
            event = replace(event, in_flight=await requests_of(pool, self._s))
        waiting = Waiting(operation, operation.goal, on_end)
        actor.post(event, waiting, definition)
        await waiting.answer

    async def close(self, *, leave: bool = False) -> None:
        """End all actors; their engines must be down by now, or are to ``leave`` running."""
        await self.replacements.close()
        self._changes.close()
        for pool_id in self.ids():
            for actor in self.replacements.actors(pool_id):
                await actor.close(leave=leave)


def _not_found(pool_id: str) -> RequestError:
    return RequestError(f"pool {pool_id} not found", code="POOL_NOT_FOUND", status=404)
