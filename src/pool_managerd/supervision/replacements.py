"""The other instance of a pool while one takes the other's place: a candidate, and from the switch on what it has replaced.

Each of the two has an actor of its own, and a lifecycle. The pool's id stands for one of them at any moment; the other one is
known to reloads, to whoever counts GPU memory, and to its leases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from pool_managerd.core.launch_record import LaunchRecord
from pool_managerd.core.lifecycle import Desired, Instance, Phase, PoolState
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import PoolError
from pool_managerd.supervision.actor import PoolActor
from pool_managerd.supervision.in_flight import a_moment, requests_of
from pool_managerd.supervision.pool import Definition, Pool, Role
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.settling import Waiting, unlisted


class Replacements:
    """``actors`` are those that pools' ids stand for."""

    def __init__(self, actors: dict[str, PoolActor], services: Services) -> None:
        self._actors, self._s = actors, services
        self._others: dict[str, PoolActor] = {}
        self._ends: set[asyncio.Task[None]] = set()

    # --- reads ---

    def all(self) -> list[Pool]:
        return [actor.pool for actor in self._others.values()]

    def find(self, pool_id: str) -> Pool | None:
        """The pool's other instance, where there are two."""
        actor = self._others.get(pool_id)
        return None if actor is None else actor.pool

    def actors(self, pool_id: str) -> list[PoolActor]:
        """The pool's own, and that of its other instance."""
        both = self._actors.get(pool_id), self._others.get(pool_id)
        return [actor for actor in both if actor is not None]

    def actor_of(self, pool: Pool) -> PoolActor | None:
        """Whose record this very one is; None for one that is gone."""
        return next((actor for actor in self.actors(pool.pool_id) if actor.pool is pool), None)

    # --- coming and going ---

    def begin(self, pool: Pool, definition: Definition) -> Pool:
        """A candidate for the place of ``pool``, down. Should it fail, it is not tried again."""
        state = self._actors[pool.pool_id].candidate()
        tried = replace(definition.named(state.active.id), policy=replace(definition.policy, restart="never"))
        actor = self._others[pool.pool_id] = PoolActor(tried, state, self._s, Role.CANDIDATE)
        return actor.pool

    def switch(self, candidate: Pool, definition: Definition) -> Pool:
        """The pool's id stands for its candidate from now on, in one step for everybody; what it stood for until now is left."""
        pool_id = candidate.pool_id
        old, new = self._actors[pool_id], self._others[pool_id]
        self._actors[pool_id], self._others[pool_id] = new, old
        new.take_place(old, definition.named(candidate.instance_id))
        self._s.gpus.refresh()
        return old.pool

    def adopt(self, pool: Pool, left: LaunchRecord) -> None:
        """An earlier daemon had replaced ``left``: its drain goes on."""
        state = PoolState(Instance(left.instance), desired=Desired.DRAINED)
        actor = self._others[pool.pool_id] = PoolActor(pool.definition, state, self._s, Role.RETIRING)
        actor.post(ev.Adopt(left.epoch, left.instance.replica_id))
        self.see_off(actor.pool, ev.Tick())

    def see_off(self, other: Pool, event: ev.Event) -> None:
        """Ask it for what will end it, such as to drain, and forget it when nothing of it is left."""
        self._keep(self._see_off(other, event))

    async def _see_off(self, other: Pool, event: ev.Event) -> None:
        try:
            await self.end(other, event)
        except PoolError as problem:
            human = f"The engine that pool '{other.pool_id}' ran before could not be ended: {problem.message}"
            self._s.events.emit("notice", human, level="error", pool_id=other.pool_id, hint=problem.hint)

    async def end(self, other: Pool, event: ev.Event) -> None:
        """As ``see_off``, waited for. Raises PoolError where it would not end: it is kept in view until nothing of it is left."""
        actor = self._others.get(other.pool_id)
        if actor is None or actor.pool is not other:
            return
        if isinstance(event, ev.Drain):
            event = replace(event, in_flight=await requests_of(other, self._s))
        part, on_end = unlisted(other.pool_id, "down", self._s.clock)
        waiting = Waiting(part, part.goal, on_end)
        actor.post(event, waiting)
        try:
            await waiting.answer
            await part.wait()
        except PoolError:
            self._keep(self._forget_when_down(actor))
            raise
        await self._forget(actor)

    async def _forget_when_down(self, actor: PoolActor) -> None:
        while actor.pool.instance.phase is not Phase.DOWN:
            await a_moment(self._s)
        await self._forget(actor)

    async def _forget(self, actor: PoolActor) -> None:
        pool_id = actor.pool.pool_id
        if self._others.get(pool_id) is actor:  # else another caller has done so
            del self._others[pool_id]
            await actor.close()
            self._s.engines.release_port(actor.pool.instance_id)
            self._s.gpus.refresh()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def close(self) -> None:
        """Nobody waits for their ends any more."""
        for task in tuple(self._ends):
            task.cancel()
        await asyncio.gather(*self._ends, return_exceptions=True)
