"""The one door for starts on demand: somebody wants a slot of a model, and gets a lease once there is one.

A model that is loaded is leased at once. Else the request waits in a queue (core/demand), whose turns are taken here by one
task: it joins starts that are under way, begins others, has idle pools make room, and gives up what nobody waits for any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Set
from contextvars import copy_context
from copy import copy
from typing import Any

from pool_managerd.config import Config
from pool_managerd.core.demand.queue import Queue, QueueRules, Ticket
from pool_managerd.core.demand.request import AcquireRequest
from pool_managerd.core.demand.spill import to_a_free_one, to_one_that_starts
from pool_managerd.core.demand.turns import Condition, Seen, turn
from pool_managerd.core.event import Event
from pool_managerd.core.lifecycle import sleeps_evicted, view
from pool_managerd.core.lifecycle.phase import RISING
from pool_managerd.core.narration import duration
from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.supervision.conditions import Conditions
from pool_managerd.supervision.demand_view import planned, row, too_late, waits_for
from pool_managerd.supervision.demand_work import DemandWork
from pool_managerd.supervision.failures import on_demand
from pool_managerd.supervision.giving_way import GivingWay
from pool_managerd.supervision.idle_pools import IdlePools
from pool_managerd.supervision.in_flight import in_hand
from pool_managerd.supervision.leases import Leases
from pool_managerd.supervision.making_room import MakingRoom, Room
from pool_managerd.supervision.names import Names
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.protocols import Timer
from pool_managerd.supervision.routes import Routes
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.times import Times

Granted = tuple[Pool, dict[str, Any]]
_LOOK_AGAIN_S = 1.0
"""While something is in the way: memory that is not ours becomes free without a word."""
_HEARD = frozenset({
    "transition", "lease_expired", "device_scan", "uncordon", "reload_succeeded", "reload_failed", "release", "pool_removed",
})  # fmt: skip
"""Events after which somebody may have what they wait for."""


class Demand:
    """``run`` is the task; ``new_id`` names tickets, ``config`` is what is in force."""

    def __init__(
        self, pools: Pools, services: Services, leases: Leases, times: Times, config: Callable[[], Config],
        new_id: Callable[[], str],
    ) -> None:  # fmt: skip
        self._pools, self._s, self._leases, self._times = pools, services, leases, times
        self._config, self._new_id = config, new_id
        self._conditions = Conditions(pools, services)
        self._names = Names(pools.all, services.registry)
        self.routes = Routes(pools, self._names, services.events, lambda: bool(self._waiting or self._way.closing))
        self.idle = IdlePools(pools, services, config)
        self._room = MakingRoom(pools, services, times, self.idle.since)
        self._queue = Queue()
        self._waiting: dict[str, asyncio.Future[Granted]] = {}
        self._blocked: dict[str, Room] = {}
        self._closing: dict[str, str] = {}
        self._bell = asyncio.Event()
        self.open = False
        self._timer: Timer | None = None
        self._work = DemandWork(pools, services, self._room, self._refuse_all, self._bell.set)
        self._way = GivingWay(pools, services, self._room, self._work)
        services.gpus.on_kept_free(self._bell.set)
        pools.on_leases = self._leases_changed
        services.events.listen(self._hear)

    # --- for callers ---

    async def acquire(self, asked: AcquireRequest, ticket_id: str | None = None) -> dict[str, Any]:
        """A lease: ``{lease_id, pool_id, url, epoch, queued_ms, started}``; empty without ``slot``. Whoever goes
        away does not wait.

        Raises RequestError MODEL_NOT_FOUND, QUEUE_FULL (429), QUEUE_TIMEOUT (503), POOL_STOPPED and what else keeps the pool from
        starting; the PoolError of a start that failed; SpecError.
        """
        if not self.open:
            raise NodeError("cannot acquire a slot: the node is not running", hint="enter it first: async with node")
        (pool, *others), began = self._names.resolve(asked.model), self._s.clock.monotonic()
        self._leases.check_ttl(asked.ttl_ms)
        ready = self._conditions.of(pool)
        if not asked.slot and ready.condition is Condition.READY:
            return {}
        if asked.slot and ready.free and not self._queue.of(pool.pool_id) and pool.pool_id not in self._leaving():
            return self._answer(await self._leases.take(pool, asked.holder, asked.ttl_ms), pool, began, started=False)
        started, future = not view(pool.state).ready, asyncio.get_running_loop().create_future()
        patience_s = self._rules().patience_s if asked.wait_ms is None else asked.wait_ms / 1000
        ticket = Ticket(
            ticket_id or self.new_ticket_id(), pool.pool_id, began, began + patience_s, asked.priority, asked.holder,
            asked.ttl_ms, asked.slot, tuple(other.pool_id for other in others), copy_context(),
        )  # fmt: skip
        self._queue.add(ticket, self._rules())
        self._waits(ticket, future)
        try:
            pool, given = await future
        except asyncio.CancelledError:
            if asked.slot and future.done() and not future.cancelled() and future.exception() is None:
                self._leases.release(future.result()[0].latest(), future.result()[1]["lease_id"])
            raise
        finally:
            self._queue.remove(ticket.ticket_id)
            self._waits_no_more(ticket)
        if not asked.slot:
            return {}
        return self._answer(await self._leases.confirmed(pool.latest(), given), pool, began, started=started)

    def _waits(self, ticket: Ticket, future: asyncio.Future[Granted]) -> None:
        self._waiting[ticket.ticket_id] = future
        self._bell.set()
        if len(self._waiting) == 1:
            self.routes.changed()

    def _waits_no_more(self, ticket: Ticket) -> None:
        self._waiting.pop(ticket.ticket_id, None)
        self._bell.set()
        if not self._waiting:
            self.routes.changed()

    def new_ticket_id(self) -> str:
        """A name for a request that is to be found in the queue."""
        return self._new_id()

    def _answer(self, given: dict[str, Any], pool: Pool, began: float, *, started: bool) -> dict[str, Any]:
        waited_ms = round((self._s.clock.monotonic() - began) * 1000)
        told = {key: given[key] for key in ("lease_id", "url", "epoch")}
        return {**told, "pool_id": pool.pool_id, "queued_ms": waited_ms, "started": started}

    def cancel(self, ticket_id: str) -> None:
        """Whoever waits with it is told so. Raises RequestError TICKET_NOT_FOUND."""
        if (future := self._waiting.get(ticket_id)) is None or future.done():
            raise RequestError(f"ticket {ticket_id[:64]!r} does not wait", code="TICKET_NOT_FOUND", status=404)
        future.set_exception(RequestError("the request was cancelled", code="OPERATION_CANCELLED", status=409))

    def waiting(self, pool_id: str) -> int:
        """How many wait for a slot of it."""
        return len(self._queue.of(pool_id))

    def rows(self) -> list[dict[str, Any]]:
        """Those who wait, in their order."""
        return [self._row(ticket) for ticket in self._queue]

    def find(self, ticket_id: str) -> dict[str, Any] | None:
        """One who waits; None when it does not."""
        return next((self._row(ticket) for ticket in self._queue if ticket.ticket_id == ticket_id), None)

    def _row(self, ticket: Ticket) -> dict[str, Any]:
        pool, blocked, place = self._pools.find(ticket.pool_id), self._blocked.get(ticket.pool_id), self._queue.place(ticket)
        otherwise = "a slot" if pool is None else self._waits_for(pool, self._conditions.of(pool))
        return row(ticket, place, pool, blocked, otherwise, self._times, self._s.clock.monotonic())

    def _waits_for(self, pool: Pool, seen: Seen) -> str:
        gone_for = {**{pool_id: pool_id for pool_id in {*self._work.evictions, *self._way.closing}}, **self._closing}
        reloaded = self._pools.precedence.has(pool.pool_id)
        return waits_for(pool, seen, self._s.registry, reloaded=reloaded, kept_for=gone_for.get(pool.pool_id))

    async def plan(self, model: str) -> dict[str, Any]:
        """What acquiring ``model`` would lead to now; nothing happens. Raises RequestError MODEL_NOT_FOUND."""
        pool = self._names.resolve(model)[0]
        seen, room = self._conditions.of(pool), Room()
        if seen.condition is Condition.DOWN:
            waited_for = [one for one in self._queue.pools() if one != pool.pool_id]
            room = await self._room.look(pool, self._rules().residency_s, waited_for)
        at_once = seen.condition is Condition.READY and seen.free and pool.pool_id not in self._leaving()
        otherwise = "" if at_once else self._waits_for(pool, seen)
        waiting = len(self._queue.of(pool.pool_id))
        return {"model": model, **planned(pool, seen, room, self._room.shown(room), otherwise, waiting, self._times)}

    # --- the task ---

    async def run(self) -> None:
        """Until it is cancelled: at every change of a pool or a lease, and at deadlines."""
        while True:
            self._bell.clear()
            await self._look()
            self._arm()
            await self._bell.wait()

    async def close(self) -> None:
        """Nobody is served any more."""
        self.open = False
        await self._work.close()
        for ticket in self._queue:
            self._refuse(ticket, NodeError("the daemon is shutting down"))
        if self._timer is not None:
            self._timer.cancel()

    async def _look(self) -> None:
        await self._give_way()
        await self._spill(self._seen())
        rules, seen = self._rules(), self._seen()  # others may have asked while that took its time
        found = turn(self._queue, seen, self._s.clock.monotonic(), self._leaving())
        for ticket in found.granted:
            self._grant(ticket)
        for ticket in found.expired:
            self._refuse(ticket, too_late(ticket, self._row(ticket)))
        for ticket, why in found.refused:
            self._refuse(ticket, why)
        for pool_id, one in seen.items():
            if one.condition is Condition.LOADING:
                self._work.load(pool_id)
        blocked: dict[str, Room] = {}
        for pool_id in found.starts:
            if not self._work.has_yet_to_reserve():  # else the next one would be promised the same memory
                room = await self._begin(pool_id, rules, first=not blocked)
                blocked.update({} if room is None else {pool_id: room})
        self._blocked = blocked
        if (closing := self._to_be_kept_free(rules)) != self._closing:
            self._closing = closing
            self._bell.set()
        self._give_up_unwanted()
        self._stop_idle()

    def _seen(self) -> dict[str, Seen]:
        return {pool_id: self._conditions.of_id(pool_id) for pool_id in self._queue.choices()}

    async def _give_way(self) -> None:
        before = self._way.closing
        await self._way.look()
        if self._way.closing != before:
            self._bell.set()
            self.routes.changed()

    async def _spill(self, seen: Mapping[str, Seen]) -> None:
        """Who is served sooner by another pool of the name waits there. One that is down starts where nothing goes for it."""
        for ticket, pool_id in to_a_free_one(self._queue, seen, self._leaving()):
            self._queue.move(ticket, pool_id)
        for ticket, pool_id in to_one_that_starts(self._queue, seen, self._times.load_s, self._s.clock.monotonic()):
            pool = self._pools.find(pool_id)
            if pool is not None and (await self._room.look(pool, 0.0)).why_not is None:
                self._queue.move(ticket, pool_id)

    def _grant(self, ticket: Ticket) -> None:
        future = self._waiting.get(ticket.ticket_id)
        self._queue.remove(ticket.ticket_id)
        if future is None or future.done():
            return
        try:
            pool = self._pools.get(ticket.pool_id)
            future.set_result((pool, self._leases.allocate(pool, ticket.holder, ticket.ttl_ms) if ticket.slot else {}))
        except PoolError as problem:
            future.set_exception(problem)

    def _refuse(self, ticket: Ticket, why: PoolError) -> None:
        self._queue.remove(ticket.ticket_id)
        if (future := self._waiting.get(ticket.ticket_id)) is not None and not future.done():
            future.set_exception(copy(on_demand(why) if ticket.slot else why))

    def _refuse_all(self, pool_id: str, why: PoolError) -> None:
        for ticket in self._queue.of(pool_id):
            self._refuse(ticket, why)

    # --- starting, and making room ---

    async def _begin(self, pool_id: str, rules: QueueRules, *, first: bool) -> Room | None:
        """Start it where it fits; else what is in its way. Only for the ``first`` something may have to go."""
        starving, waiting = self._starves(pool_id, rules), self._queue.of(pool_id)
        if not waiting or (pool := self._pools.find(pool_id)) is None:
            return None
        stays_s = 0.0 if starving else rules.residency_s
        room = await self._room.look(pool, stays_s, self._waited_for(pool_id, starving))
        if room.in_vain is not None and sleeps_evicted(pool.state):
            self._work.evict(pool_id, "as it cannot wake where it sleeps")  # perhaps it can be started on another GPU
            return room
        if room.in_vain is not None:
            self._refuse_all(pool_id, room.in_vain)
            return None
        if room.why_not is None:
            self._work.load(pool_id, waiting[0].context)
            return None
        if first and room.plan is not None and not room.plan.waits_for:
            for other in room.plan.evict:
                self._work.evict(other, f"to make room for pool '{pool_id}'", asleep=room.sleep_may_do)
        return room

    def _waited_for(self, pool_id: str, starving: bool) -> list[str]:
        """Pools that stay for those who wait for them: all, unless somebody starves; then those whose turn was before."""
        waited_for = self._queue.pools()
        return waited_for[: waited_for.index(pool_id)] if starving else [one for one in waited_for if one != pool_id]

    def _starves(self, pool_id: str, rules: QueueRules) -> bool:
        now = self._s.clock.monotonic()
        return any(ticket.starves(now, rules) for ticket in self._queue.of(pool_id))

    def _to_be_kept_free(self, rules: QueueRules) -> dict[str, str]:
        """What is in use and must go for whoever is first, and starves: the pool that it goes for."""
        for pool_id, room in self._blocked.items():
            if room.plan is not None and room.plan.waits_for and self._starves(pool_id, rules):
                return dict.fromkeys((*room.plan.waits_for, *room.plan.evict), pool_id)
            break
        return {}

    def _give_up_unwanted(self) -> None:
        """A load that was begun here, and that nobody waits for any more, here or elsewhere."""
        for pool_id, begun in self._work.begun.items():
            pool, same = self._pools.find(pool_id), (begun.pool_id, begun.goal, begun.status)
            others = (one for one in self._pools.operations.all() if one is not begun)
            wanted = pool_id in self._queue.choices() or any((one.pool_id, one.goal, one.status) == same for one in others)
            reloads = self._pools.precedence.has(pool_id)
            unused = pool is not None and pool.instance.phase in RISING and not in_hand(pool, self._s.registry)
            if unused and not (wanted or reloads):
                self._work.evict(pool_id, "as nobody waits for it any more")

    def _stop_idle(self) -> None:
        for pool_id, idle_s in self.idle.overdue(self._queue.pools()):
            self._work.evict(pool_id, f"as it was idle for {duration(idle_s)}")

    # --- inside ---

    def _leases_changed(self, pool_id: str) -> None:
        """Of each lease that is given on the hot path, too: nothing is looked at where nobody waits."""
        self.idle.touch(pool_id)
        pool = self._pools.find(pool_id)
        if len(self._queue) or (pool is not None and self.idle.ttl_s(pool)):
            self._bell.set()

    def _hear(self, event: Event) -> None:
        if event.type in _HEARD:
            self._bell.set()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now = self._s.clock.monotonic()
        again = now + _LOOK_AGAIN_S if self._blocked or self._queue.has_choices() else None
        idle = (self.idle.due(pool) for pool in self._pools.all() if not self._queue.of(pool.pool_id))
        way = None if self._way.look_again_s is None else now + self._way.look_again_s
        times = [self._queue.next_deadline(), again, way, *idle]
        due = min((at for at in times if at is not None), default=None)
        self._timer = None if due is None else self._s.clock.call_at(max(due, now), self._bell.set)

    def _leaving(self) -> Set[str]:
        """Pools that are to go: nobody is given a slot of them any more."""
        return self._closing.keys() | self._work.evictions.keys() | self._way.closing

    def _rules(self) -> QueueRules:
        q = self._config().queue
        return QueueRules(q.max_waiting, q.max_waiting_per_pool, q.wait_ms / 1000, q.starving_ms / 1000, q.residency_ms / 1000)
