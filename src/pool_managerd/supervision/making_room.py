"""Room for a pool that somebody waits for: what would have to go, as it is seen now, and letting that go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from pool_managerd.core.artifacts import NOT_FETCHED
from pool_managerd.core.demand.room import Fits, Resident, RoomPlan, plan_room
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import Phase, sleeps_evicted, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.phase import IDLE, RISING
from pool_managerd.core.narration import count
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.asleep import dialect_of
from pool_managerd.supervision.in_flight import in_hand, requests_of
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.times import Times

_UNMEASURED_S = 10.0
_IN_VAIN_S = 15.0
"""What sleeps for no longer than this before it is stopped after all did not make enough room."""
Objection = Callable[[Collection[InstanceId]], PoolError | None]


@dataclass(frozen=True, slots=True)
class Room:
    """How there is room for one pool. ``why_not``: it fits now (None), or why not. ``plan`` says what has to go, None where that
    would not do; then ``in_vain`` is the refusal, unless what is in the way goes by itself: then ``ends`` names it.
    """

    why_not: PoolError | None = None
    plan: RoomPlan | None = None
    in_vain: PoolError | None = None
    ends: tuple[str, ...] = ()
    residents: tuple[Resident, ...] = ()

    @property
    def sleep_may_do(self) -> bool:
        """It lacks nothing but memory of GPUs."""
        return self.why_not is not None and self.why_not.code == "INSUFFICIENT_VRAM"


class MakingRoom:
    """``idle_since`` tells since which monotonic second a pool has had no request; ``residency_s`` how long one that was just
    loaded stays.
    """

    def __init__(self, pools: Pools, services: Services, times: Times, idle_since: Callable[[Pool], float]) -> None:
        self._pools, self._s, self._times, self._idle_since = pools, services, times, idle_since
        self._in_vain: set[str] = set()

    async def look(self, pool: Pool, residency_s: float, waited_for: Collection[str] = ()) -> Room:
        """What a start of ``pool`` would meet now, and what could go for it; pools that are ``waited_for`` stay."""
        try:
            return await self._seen(pool, residency_s, waited_for)
        except PoolError as problem:  # no room would help
            return Room(problem, in_vain=problem)

    async def _seen(self, pool: Pool, residency_s: float, waited_for: Collection[str]) -> Room:
        if pool.definition.external:  # somebody else has found room for it
            return Room()
        try:
            objection: Objection = await self._s.admission.trial(pool)
        except PoolError as problem:
            if problem.code == NOT_FETCHED:  # its start fetches it, and then it is known what it needs
                return Room()
            raise
        if (why_not := objection(())) is None:
            return Room()
        ending = [one for one in self._others(pool) if self._ends(one)]
        ends = [one.instance_id for one in ending]
        if ending and objection(ends) is None:
            return Room(why_not, ends=tuple(sorted({one.pool_id for one in ending})))
        residents = [
            replace(one, kept=one.kept or (_WAITED_FOR if one.pool_id in waited_for else ""))
            for one in await self.residents(
                (one for one in self._others(pool) if one.current and one.instance.phase not in IDLE), residency_s
            )
        ]
        by_id = {one.pool_id: one.instance_id for one in self._others(pool) if one.current}

        ways = self._s.admission.together.ways(pool.pool_id, by_id)

        def fits(gone: Collection[str]) -> bool:
            return objection([*ends, *(by_id[name] for name in gone)]) is None

        plan = plan_room(residents, fits, ways)
        if plan is not None:
            return Room(why_not, plan, residents=tuple(residents))
        passing = {one.pool_id for one in residents if one.kept in _PASSES}
        unless_passing = [replace(one, kept="") if one.kept in _PASSES else one for one in residents]
        if passing and plan_room(unless_passing, fits, ways) is not None:
            return Room(why_not, ends=tuple(sorted(passing)), residents=tuple(residents))
        may_go = [by_id[one.pool_id] for one in residents if not one.kept]
        in_vain = _keeping(objection([*ends, *may_go]) or why_not, residents, fits, ways)
        return Room(why_not, in_vain=in_vain, residents=tuple(residents))

    async def let_go(self, pool_id: str, *, asleep: bool = False) -> Operation:
        """Stop it, unless it has been asked for meanwhile. Where sleep may do (``asleep``) and its engine can, it is put to
        sleep, unless that was tried and did not do. Raises RequestError POOL_IN_USE.
        """
        pool = self._pools.get(pool_id)
        if requests := await requests_of(pool, self._s):  # of clients without a lease
            raise RequestError(
                f"cannot evict pool '{pool_id}': {count(requests, 'request')} in flight", code="POOL_IN_USE", status=409,
                pool_id=pool_id, retriable=True,
            )  # fmt: skip
        if asleep and self._can_sleep(pool):
            return await self._pools.change(pool, "evict", ev.Evict(asleep=True), "asleep", desired="evicted")
        if sleeps_evicted(pool.state) and self._s.clock.monotonic() - pool.instance.since < _IN_VAIN_S:
            self.slept_in_vain(pool_id)
        return await self._pools.change(pool, "evict", ev.Evict(), "down", desired="evicted")

    def slept_in_vain(self, pool_id: str) -> None:
        """Its sleep made no room: it is stopped the next time."""
        self._in_vain.add(pool_id)

    def _can_sleep(self, pool: Pool) -> bool:
        """It does so when it is told to, and is ready. What it holds on others' GPUs as an exclusive one keeps everybody away."""
        if pool.pool_id in self._in_vain or pool.instance.phase is not Phase.READY or pool.launch.sleepless:
            return False
        if pool.config is not None and pool.config.exclusive:
            return False
        try:
            return not dialect_of(pool).by_itself and bool(pool.launch.device_uuids)
        except PoolError:
            return False

    def _ends(self, one: Pool) -> bool:
        i = one.instance
        if i.phase is Phase.SLEEPING:
            return not sleeps_evicted(one.state) or self._pools.precedence.has(one.pool_id)
        return i.phase in (Phase.STOPPING, Phase.DRAINING)

    def shown(self, room: Room) -> list[dict[str, Any]]:
        """What would be stopped or waited for, and what that costs, for people and machines."""
        told = {one.pool_id: one for one in room.residents}
        plan = room.plan or RoomPlan()
        return [
            {
                "pool_id": name, "action": "wait for its requests" if name in plan.waits_for else self._action(name, room),
                "in_flight": told[name].in_hand, "idle_ms": round(told[name].idle_s * 1000),
                "stop_ms": self._measured(name, "stop"), "load_again_ms": self._measured(name, "load"),
            }
            for name in (*plan.waits_for, *plan.evict)
        ]  # fmt: skip

    def _action(self, name: str, room: Room) -> str:
        pool = self._pools.find(name)
        return "put to sleep" if pool is not None and room.sleep_may_do and self._can_sleep(pool) else "stop"

    def _measured(self, pool_id: str, kind: str) -> int | None:
        known = self._times.of(pool_id, kind)
        return round(median(known)) if known else None

    def _others(self, pool: Pool) -> list[Pool]:
        everything = [*self._pools.all(), *self._pools.replacements.all()]
        return [one for one in everything if one.instance_id != pool.instance_id and not one.definition.external]

    async def residents(self, there: Iterable[Pool], residency_s: float = 0.0) -> tuple[Resident, ...]:
        """These pools, as they are seen now."""
        return tuple(await asyncio.gather(*(self._resident(one, residency_s) for one in there)))

    async def _resident(self, pool: Pool, residency_s: float) -> Resident:
        now, ready_since = self._s.clock.monotonic(), pool.instance.ready_since
        requests = await requests_of(pool, self._s) if view(pool.state).ready else 0
        back_ms = [median(known) for kind in ("stop", "load") if (known := self._times.of(pool.pool_id, kind))]
        return Resident(
            pool.pool_id, max(in_hand(pool, self._s.registry), requests), max(0.0, now - self._idle_since(pool)),
            sum(back_ms) / 1000 if back_ms else _UNMEASURED_S,
            1.0 if pool.config is None else pool.config.eviction_weight,
            self._kept(pool, now - (now if ready_since is None else ready_since), residency_s),
            self._pools.precedence.has(pool.pool_id),
        )  # fmt: skip

    def _kept(self, pool: Pool, resident_s: float, residency_s: float) -> str:
        """Why it must not go; empty when it may."""
        if pool.config is not None and pool.config.pinned:
            return _PINNED
        if pool.state.held:
            return _HELD
        if self._pools.precedence.has(pool.pool_id):
            return _RELOADED
        if pool.instance.phase in RISING:
            return _LOADS
        if sleeps_evicted(pool.state):
            return ""
        if pool.instance.phase is not Phase.READY:
            return _ENDS
        return _STAYS if resident_s < residency_s else ""


_PINNED, _HELD = "it is pinned", "it is held"
_RELOADED, _LOADS, _ENDS = "it is being reloaded", "it is loading", "it ends"
_STAYS, _WAITED_FOR = "it was just loaded", "others wait for it"
_PASSES = frozenset({_RELOADED, _LOADS, _ENDS, _STAYS, _WAITED_FOR})
"""What keeps a pool only for a while."""


def _keeping(problem: PoolError, residents: Sequence[Resident], fits: Fits, ways: Iterable[Collection[str]]) -> PoolError:
    """``problem`` with those pools that a person keeps there, where it would fit without them, and how to let them go."""
    plan = plan_room([replace(one, kept="") if one.kept in (_PINNED, _HELD) else one for one in residents], fits, ways)
    gone = () if plan is None else (*plan.evict, *plan.waits_for)
    kept = [one for one in residents if one.pool_id in gone and one.kept in (_PINNED, _HELD)]
    if not kept:
        return problem
    told, names = copy(problem), " ".join(one.pool_id for one in kept)
    told.message = "; ".join([problem.message, *(f"pool '{one.pool_id}' does not go for it, as {one.kept}" for one in kept)])
    told.args = (told.message,)
    told.hint = f"`pool-managerd evict {names}` makes room by hand, where nothing is in flight there"
    return told


def why_it_waits(room: Room) -> str:
    """For whoever waits."""
    if room.ends:
        return f"{', '.join(room.ends)} must end first"
    if room.plan is not None and room.plan.waits_for:
        return f"{', '.join(room.plan.waits_for)} must end what it has in hand first"
    return "" if room.why_not is None else room.why_not.message
