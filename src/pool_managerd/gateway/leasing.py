"""A lease for each request: one that was kept from the last request, or a new one; and the tasks that keep them true.

The node is followed all the time. While it is away (restarted, upgraded) what is held is used on, and new leases are waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog

from pool_managerd.core.demand.kept_leases import HeldLease, KeptLeases
from pool_managerd.errors import NodeError, PoolError
from pool_managerd.gateway.concurrency import Concurrency, Counted
from pool_managerd.gateway.directory import Directory
from pool_managerd.gateway.gate import Gate
from pool_managerd.gateway.link import Link
from pool_managerd.gateway.sharing import Common
from pool_managerd.gateway.unanswered import Unanswered

_SHUNNED_S = 5.0
"""An engine that just broke: others of the name are asked instead, until the node has found out what is so."""
_NOTICED_S = 0.5
"""The node needs a moment until it says that an engine has ended."""
_HEARD_S = 1.0
"""A node that is away is found to be so sooner."""
_AT_ONCE = 16
"""Leases that are renewed, or given back, at the same time."""
log = structlog.get_logger("pool_managerd.gateway")


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """In seconds: how long a lease is kept between requests, how long it lasts when nobody renews it (as this process has ended),
    how long a request waits for one (loading included) and for a node that is away, and how often that is tried again.
    """

    linger_s: float = 2.0
    ttl_s: float = 30.0
    wait_s: float = 300.0
    away_s: float = 15.0
    again_s: float = 0.1


class Leasing:
    """``common`` has what the node knows this worker by, and its siblings. ``clock`` tells monotonic seconds. ``run`` is its
    task.
    """

    def __init__(
        self, link: Link, times: LeaseTimes | None = None, common: Common | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._link, self._times, self._common = link, times or LeaseTimes(), common or Common()
        self._now = clock
        self.directory = Directory()
        self._kept = KeptLeases(self._times.linger_s)
        self._owed: dict[str, tuple[HeldLease, float]] = {}
        """To be given back, until it has ended by itself."""
        self._news, self._back = asyncio.Event(), asyncio.Event()
        self._gate, self._again, self._unanswered = Gate(), Gate(), Unanswered(link)
        self._concurrency = Concurrency(self.directory, self._common.tally)
        self._before = self._common.holders if self._common.of > 1 else None
        self._broken: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.connected = False
        self._why = "cannot reach the daemon"

    async def counted(self, model: str) -> Counted | None:
        """Where a request for ``model`` is counted; None: nothing limits them. Raises RequestError MODEL_NOT_FOUND,
        CONCURRENCY_LIMIT (429).
        """
        if not self.directory.known:
            await self.learnt()
        return self._concurrency.counted(model, self._sound(model)) if self.directory.limits else None

    async def take(self, model: str, request_id: str, counted: Counted | None = None) -> HeldLease:
        """A slot of ``model``, which may be waited for. Raises RequestError MODEL_NOT_FOUND, and what the node refuses with."""
        if not self.directory.known:
            await self.learnt()
            if (kept := self.kept(model, counted)) is not None:
                return kept
        wanted, until = self._wanted(model, counted), self._now() + self._times.wait_s
        async with self._gate.turn(model, self._times.wait_s):
            given = await self._with_patience(wanted, request_id, until)
        self._kept.add(given)
        return given

    async def again(self, model: str, session: bytes, request_id: str, counted: Counted | None = None) -> HeldLease | None:
        """A slot of the pool that served ``session`` last, where it has one at once. Raises RequestError MODEL_NOT_FOUND."""
        pool_id = self._common.sessions.last(session)
        place = None if pool_id is None else self.directory.place(pool_id)
        if place is None or not place.open or place.pool_id not in self._sound(model, counted):
            return None
        if counted is not None:
            counted.goes_to(place.pool_id)
        if (kept := self._kept.take((place.pool_id,))) is not None or self._kept.used(place.pool_id) >= place.slots:
            return kept
        try:
            async with self._again.turn(place.pool_id, 0.0):
                given = await self._asked(place.pool_id, request_id, wait_ms=0)
        except PoolError:  # it has none, or the node is away: as without a session
            return None
        self._kept.add(given)
        return given

    def served(self, session: bytes, lease: HeldLease) -> None:
        """A request of it has that slot."""
        self._common.sessions.served(session, lease.pool_id)

    async def learnt(self) -> None:
        """Returns once it is known which models there are. Raises NodeError when the node does not say so for too long."""
        if not self.directory.known:
            await self._node_is_there()

    def kept(self, model: str, counted: Counted | None = None) -> HeldLease | None:
        """A lease of ``model`` that is kept; it is in use from now on. Raises RequestError MODEL_NOT_FOUND."""
        return self._kept.take(self._sound(model, counted)) if self.directory.known else None

    def _wanted(self, model: str, counted: Counted | None) -> str:
        """Whom the node is asked for: any pool of the name, or one where some are not to be asked."""
        pools = self._sound(model, counted)
        if pools == self.directory.pools(model) and (counted is None or len(pools) == 1 or not counted.one_only()):
            return model
        return counted.pool_id if counted is not None and counted.pool_id in pools else min(pools, key=self._kept.used)

    def _sound(self, model: str, counted: Counted | None = None) -> tuple[str, ...]:
        """Its pools that may have the request, without those that just broke where others are ready. Raises RequestError
        MODEL_NOT_FOUND.
        """
        pools = self.directory.pools(model) if counted is None else counted.pools()
        if not self._broken or len(pools) == 1:
            return pools
        now = self._now()
        self._broken = {pool_id: until for pool_id, until in self._broken.items() if until > now}
        places = (self.directory.place(pool_id) for pool_id in pools if pool_id not in self._broken)
        return tuple(place.pool_id for place in places if place is not None and place.open) or pools

    async def moves_on(self, model: str, lease: HeldLease, *, gone: bool) -> bool:
        """Whether a request for ``model`` that its engine did not answer may be asked again: of another pool that answers to that
        name, or of the launch that follows, where the engine may be ``gone``. One that is there all the same is not asked twice.
        """
        until = self._now() + (_NOTICED_S if gone else 0.0)
        while True:
            place = self.directory.place(lease.pool_id)
            if place is None or not place.open or place.epoch != lease.epoch or self._others(model, lease):
                return True
            if self._now() >= until:
                return False
            await asyncio.sleep(0.02)

    def _others(self, model: str, lease: HeldLease) -> bool:
        places = (self.directory.place(pool_id) for pool_id in self.directory.pools(model) if pool_id != lease.pool_id)
        return any(place is not None and place.open for place in places)

    def done(self, lease: HeldLease, *, broken: bool = False) -> None:
        """Its request has ended. ``broken``: the engine did not answer, so that nobody else is to have it from here."""
        if broken:
            self._broken[lease.pool_id] = self._now() + _SHUNNED_S
        if broken or self._kept.done(lease, self._now()):
            self._kept.forget(lease.lease_id)
            self._owe([lease])
        elif self._timer is None:
            self._arm()

    def holder_of(self, request_id: str) -> str:
        """What a request is called in the node's queue, and its lease."""
        return f"{self._common.holder}/{request_id}"

    async def queue(self) -> list[dict[str, Any]]:
        """Who waits on the node, in their order. Raises PoolError."""
        return await self._link.queue()

    async def unload(self, pool_id: str) -> None:
        """The pool ends where nobody uses it; leases that are only kept here are given back first. Raises PoolError."""
        await self.let_go(pool_id)
        await self._common.siblings.ask("let_go", pool_id)
        await self._link.evict(pool_id)

    async def let_go(self, pool_id: str) -> None:
        """Leases of it that are only kept here are given back."""
        for lease in self._kept.let_go(pool_id):
            try:
                await self._link.give_back(lease)
            except PoolError:  # it is tried again
                self._owe([lease])

    def used(self) -> int:
        """Leases that are in use."""
        return len(self._kept.in_use)

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._give_back())
            tasks.create_task(self._reclaim())
            tasks.create_task(self._renew())

    async def close(self) -> None:
        """What is held is given back, as far as the node can be reached at once."""
        for lease in self._kept.all():
            self._kept.forget(lease.lease_id)
            self._owe([lease])
        gone = [self._link.give_back(lease) for lease, _ in self._owed.values()]
        async with asyncio.timeout(1.0):
            await asyncio.gather(*gone, return_exceptions=True)

    # --- the tasks ---

    async def _follow(self) -> None:
        told_away = False
        while True:
            try:
                whole = True
                async for told in self._link.routes():
                    self.directory.learn(told, whole=whole)
                    self._kept.see(self.directory.open_launches(), waiting=self.directory.waiting)
                    if whole:
                        log.info("The gateway follows the daemon", action="connected")
                        await self._end_predecessors()
                    whole, told_away, self.connected = False, False, True
                    self._news.set()
                    self._back.set()
                    self._unanswered.node_is_back()
                why = "it closed the connection"
            except PoolError as problem:
                why = problem.message
            self._why, self.connected = why, False
            self._back.clear()
            self._kept.see(self.directory.open_launches(), waiting=False)  # nobody can be served by what goes back now
            if not told_away:
                told_away = True
                log.warning(f"The gateway serves on without the daemon: {why}", action="away")
            await asyncio.sleep(self._times.again_s)

    async def _end_predecessors(self) -> None:
        """The worker before this one, which was killed, has no use for its leases any more. Once."""
        before, self._before = self._before, None
        if before is not None:
            with suppress(PoolError):  # they run out
                own = self._common.holder
                self._owe(await self._link.held_by(lambda name: name.startswith(before) and not name.startswith(own)))

    async def _reclaim(self) -> None:
        """What the node gave and nobody heard of goes back."""
        while True:
            found = await self._unanswered.found()
            known = {lease.lease_id for lease in self._kept.all()}
            self._owe([lease for lease in found if lease.lease_id not in known])

    async def _give_back(self) -> None:
        while True:
            self._owe(self._kept.due(self._now()))
            for lease, since in list(self._owed.values()):
                if self._now() - since > self._times.ttl_s:
                    del self._owed[lease.lease_id]  # it has ended by itself
            if self._owed and self.connected:
                await asyncio.gather(*(self._return(lease) for lease, _ in list(self._owed.values())[:_AT_ONCE]))
            if self._owed:
                await asyncio.sleep(0 if self.connected else self._times.again_s)
                continue
            self._arm()
            await self._news.wait()
            self._news.clear()

    async def _return(self, lease: HeldLease) -> None:
        try:
            await self._link.give_back(lease)
        except NodeError:
            return  # the node is away: it is tried again
        except PoolError as problem:
            log.warning(f"A lease could not be given back: {problem.message}", action="give_back", pool_id=lease.pool_id)
        self._owed.pop(lease.lease_id, None)

    async def _renew(self) -> None:
        """Often enough that one that is missed does no harm, and at once when the node is back."""
        while True:
            await self._back.wait()
            leases = self._kept.all()
            for at in range(0, len(leases), _AT_ONCE):
                await asyncio.gather(*(self._renewed(lease) for lease in leases[at : at + _AT_ONCE]))
            await asyncio.sleep(self._times.ttl_s / 4)

    async def _renewed(self, lease: HeldLease) -> None:
        with suppress(PoolError):  # the node is away, or has too much to do: there are further rounds
            if not await self._link.renew(lease, round(self._times.ttl_s * 1000)):
                self._kept.forget(lease.lease_id)

    # --- inside ---

    def _arm(self) -> None:
        """Look again when a lease will have been kept for long enough."""
        if self._timer is not None:
            self._timer.cancel()
        due, self._timer = self._kept.next_due(), None
        if due is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due - self._now()), self._look)

    def _look(self) -> None:
        self._timer = None
        self._news.set()

    def _owe(self, leases: list[HeldLease]) -> None:
        now = self._now()
        self._owed.update({lease.lease_id: (lease, now) for lease in leases})
        if leases:
            self._news.set()

    async def _node_is_there(self) -> None:
        try:
            async with asyncio.timeout(self._times.away_s):
                await self._back.wait()
        except TimeoutError:
            raise NodeError(self._why, hint="pool-managerd serve --config FILE starts a daemon", retry_after_ms=1000) from None

    async def _asked(self, wanted: str, request_id: str, wait_ms: int) -> HeldLease:
        with self._unanswered.asking(self.holder_of(request_id)) as name:
            return await self._link.acquire(wanted, name, round(self._times.ttl_s * 1000), wait_ms)

    async def _with_patience(self, wanted: str, request_id: str, until: float) -> HeldLease:
        """Asked again while the node is away, for a while, and with what is left of its time. That a question was not answered
        at once shows that the node was there until then.
        """
        away_since = None
        while True:
            asked_at = self._now()
            try:
                return await self._asked(wanted, request_id, max(0, round((until - asked_at) * 1000)))
            except PoolError as problem:
                now = self._now()
                heard = now - asked_at > _HEARD_S
                if away_since is None or heard:
                    away_since = now if heard else asked_at
                over = (heard and now >= until) or now - away_since >= self._times.away_s
                if over or problem.code != NodeError.code:
                    raise
                await asyncio.sleep(self._times.again_s)
