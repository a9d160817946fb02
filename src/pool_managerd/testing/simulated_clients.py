"""Clients of a simulated node, and what they were promised: what was acknowledged must be so ever after.

A request without an answer may have been carried out or not; so may one whose client went away. Until the next acknowledged one
both are right.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from pool_managerd.config import Config
from pool_managerd.config.plan import with_pool
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.demand.request import AcquireRequest
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.reload import ReloadRequest
from pool_managerd.errors import PoolError
from pool_managerd.node import PoolManager
from pool_managerd.supervision.operations import Operation
from pool_managerd.testing.scenario import ACQUIRE, APPLY, RELOAD, SUBMITTED, Action
from pool_managerd.testing.scene import Scene
from pool_managerd.testing.simulated_demand import Demand
from pool_managerd.testing.simulated_promises import GivenLease, Promise, Question, Touched

CLOUDY_S = 60.0
"""So long what an abandoned request asked for may still come."""
YIELD_ENDS_S = 3_600.0
"""So long after its time pools may still go for a yield: what they have in hand is waited for."""
_DESIRED = {
    "start": "up", "restart": "up", "undrain": "up", "preload": "up", "submit": "up", "ensure_ready": "auto", "stop": "down",
    "cancel_preload": "down", "drain": "drained", ACQUIRE: "auto",
}  # fmt: skip
_BY_DEMAND = ("ensure_ready", ACQUIRE)
_EVICTS = ("ensure_ready", ACQUIRE, "evict")
_HELD = {"hold": True, "release": False}
_EXISTS = {"submit": True, "register": True, "deregister": False}


def _slots_asked(action: Action) -> int:
    return 1 + action.number % 3


class SimulatedClients:
    """Asks what the scenario says, and holds what was promised."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        configured = [pool.id for pool in scene.config.pools]
        self.desired = {pool_id: Promise({"auto"}) for pool_id in configured}
        self.held = {pool_id: Promise({False}) for pool_id in configured}
        self.exists = {SUBMITTED: Promise({False})}
        self.slots = {pool.id: {pool.slots} for pool in scene.config.pools}
        """What each pool may be configured with now: reloads change it."""
        self._reloads: dict[str, tuple[Question, int]] = {}
        self._applies: dict[str, Config] = {}
        self._taken = dict(self._filed_slots())
        """What the daemon has taken of the file: what says the same touches no pool, and what was reloaded stays."""
        self._unapplied: set[str] = set()  # pools that the file says something of that may not be in force
        self._unheard: set[str] = set()  # of these, those of which nobody has heard whether the daemon has taken it
        self.leases: dict[str, GivenLease] = {}
        self.keys: dict[str, str] = {}
        self.operations: dict[str, tuple[Operation, float, float]] = {}
        self.acknowledged = self.unanswered = 0
        self.on_answer: Callable[[str, str], None] = lambda kind, pool_id: None
        """It was carried out between the question and now."""
        self.demand = Demand(scene, self.desired, lambda pool_id: self.on_answer(ACQUIRE, pool_id))
        self._asking: list[Question] = []
        self._evicts_until = -1.0

    # --- asking ---

    def ask(self, action: Action, pool_id: str, node: PoolManager) -> None:
        """Send it; what is answered is heard of later."""
        if action.kind in _EXISTS:
            pool_id = SUBMITTED
        question = Question(action, pool_id)
        work = self._call(question, node)
        if work is None:
            return
        for kinds, promises in ((_DESIRED, self.desired), (_HELD, self.held), (_EXISTS, self.exists)):
            if action.kind in kinds and pool_id in promises:
                promise, value = promises[pool_id], kinds[action.kind]
                if value == "auto" and "up" in promise.possible:
                    value = "up"  # demand leaves what a person wants as it is
                promise.asked += 1
                alone = promise.asking == 0 and self._scene.timeline.now >= promise.cloudy_until
                question.touched.append(Touched(promise, value, set(promise.possible), promise.asked if alone else None))
                promise.possible = promise.possible | ({value, "auto"} if action.kind in _BY_DEMAND else {value})
                promise.asking += 1
        if action.kind == RELOAD:  # committed, the pool is wanted up; nobody hears of when that was
            self.desired[pool_id].possible |= {"up"}
            new = _slots_asked(action)
            question.new_slots = None if new in self.slots[pool_id] else new
            self.slots[pool_id].add(new)
        task = self._scene.life_loop().create_task(work)
        self._asking.append(question)
        task.add_done_callback(lambda done: self._heard(question, done))
        if action.number % 7 == 0:
            self._scene.timeline.after(action.share * 0.02, self._go_away, question, task)

    def _go_away(self, question: Question, task: asyncio.Task[Any]) -> None:
        if task.done() or not self._scene.is_alive(task):
            return
        task.cancel()
        for touched in question.touched:
            touched.promise.cloudy_until = self._scene.timeline.now + CLOUDY_S

    def _call(self, question: Question, node: PoolManager) -> Coroutine[Any, Any, Any] | None:
        action, pool_id = question.action, question.pool_id
        match action.kind:
            case "lease":
                return self._lease(question, node)
            case "release_lease" | "renew_lease":
                return self._of_lease(question, node)
            case "drain":
                return node.drain(pool_id, round(60_000 * action.share**3))
            case "reload":
                changes = {"slots": _slots_asked(action), "ctx": 1024 << action.number % 4}
                return node.reload(ReloadRequest(pool_id, changes=changes, drain_deadline_ms=round(60_000 * action.share**3)))
            case "acquire":
                wait_s = 600 * action.share**2
                question.asked_at, question.waits_s = self._scene.timeline.now, wait_s
                ttl_ms = 1 + round(30_000 * action.share) if self._scene.scenario.crowded else None
                question.until = None if ttl_ms is None else self._scene.timeline.now + ttl_ms / 1000
                return node.take_slot(AcquireRequest(pool_id, round(wait_s * 1000), ttl_ms, action.number % 5 - 2))
            case "yield":
                return self._yielded(action, node)
            case "apply":
                return node.apply(self._edited(question))
            case "submit":
                engine = PreparedEngine(SUBMITTED, "/engine", port=9_000, slots_total=2, verbatim=True)
                return node.preload(SUBMITTED, engine)
            case "cordon" | "uncordon" if self._scene.machine.gpus:
                uuid = self._scene.machine.gpus[action.number % len(self._scene.machine.gpus)].uuid
                return node.cordon(uuid) if action.kind == "cordon" else node.uncordon(uuid)
            case "cordon" | "uncordon":
                return None
            case _:
                work: Coroutine[Any, Any, Any] = getattr(node, action.kind)(pool_id)
                return work

    def _yielded(self, action: Action, node: PoolManager) -> Coroutine[Any, Any, Any] | None:
        """One GPU, or all, for a while; or all of them back."""
        gpus = self._scene.machine.gpus
        if not gpus:
            return None
        if action.number % 4 == 0:
            return node.end_yield()
        for_s = 1 + 900 * action.share**2
        self._evicts_until = max(self._evicts_until, self._scene.timeline.now + for_s + YIELD_ENDS_S)
        return node.yield_gpus([gpus[action.number % len(gpus)].uuid] if action.number % 3 else [], round(for_s * 1000))

    def _edited(self, question: Question) -> Config:
        """The file with one line changed. The next daemon begins by it, whatever becomes of the apply; one applies all of it."""
        scene, pool_id = self._scene, question.pool_id
        pool = next(one for one in scene.config.pools if one.id == pool_id)
        question.file = scene.config = with_pool(scene.config, pool.model_copy(update={"slots": _slots_asked(question.action)}))
        if self._filed(pool_id) != self._taken[pool_id]:
            self._unapplied.add(pool_id)
        for one in self._unapplied:
            self.slots[one].add(self._filed(one))
            self.desired[one].possible |= {"up"}
        return question.file

    def _filed_slots(self) -> Iterator[tuple[str, int]]:
        return ((pool.id, pool.slots) for pool in self._scene.config.pools)

    def _filed(self, pool_id: str) -> int:
        """What the file says of the pool now."""
        return dict(self._filed_slots())[pool_id]

    def _cannot_be(self, pool_id: str, slots: int | None) -> None:
        """It was undone, or never begun; but the file may say so as well."""
        if slots is not None and slots != self._filed(pool_id):
            self.slots[pool_id].discard(slots)

    def _applied(self, config: Config) -> None:
        """All of it is in force, but for what has been written into the file since.

        What a reload had changed may come back, where that it does not hold any more could not be written; and it stays where the
        same was applied before it, unheard.
        """
        cloudy = self._scene.disk.fails or self._scene.disk_failed_at + CLOUDY_S > self._scene.timeline.now
        for pool in config.pools:
            if pool.id in self._unapplied and pool.slots != self._taken[pool.id] and not self._is_reloaded(pool.id):
                before = self.slots[pool.id] if cloudy or pool.id in self._unheard else set()
                self.slots[pool.id] = {pool.slots, self._filed(pool.id), *before}
            if pool.slots == self._filed(pool.id):
                self._unapplied.discard(pool.id)
            self._unheard.discard(pool.id)
            self._taken[pool.id] = pool.slots

    def _is_reloaded(self, pool_id: str) -> bool:
        return any(other.pool_id == pool_id for other, _ in self._reloads.values())

    async def _lease(self, question: Question, node: PoolManager) -> Any:
        action = question.action
        ttl_ms = 1 + round(600_000 * action.share) if action.number % 3 == 0 else None
        question.until = None if ttl_ms is None else self._scene.timeline.now + ttl_ms / 1000
        key = f"key-{action.index}" if action.number % 2 else None
        pool_id = SUBMITTED if action.number % 9 == 0 and SUBMITTED in node.pool_ids() else question.pool_id
        question.pool_id = pool_id
        given = await node.take_lease(pool_id, "client", ttl_ms, key=key)
        if key is not None and action.number % 5 == 0:  # the answer was lost, the client asks again
            again = await node.take_lease(pool_id, "client", ttl_ms, key=key)
            if again["lease_id"] != given["lease_id"] and given["lease_id"] in self._active(node, pool_id):
                self._scene.fail("a key is one lease", f"{key}: {given['lease_id']} and {again['lease_id']}")
            given = again
        return given

    def _active(self, node: PoolManager, pool_id: str) -> set[str]:
        return {row["lease_id"] for row in node.leases(pool_id)}

    def _of_lease(self, question: Question, node: PoolManager) -> Coroutine[Any, Any, Any] | None:
        action = question.action
        mine = [lease_id for lease_id, lease in self.leases.items() if lease.pool_id == question.pool_id]
        if not mine:
            return None
        question.lease_id = lease_id = mine[action.number % len(mine)]
        if action.kind == "release_lease":
            self.leases[lease_id].maybe = True
            return node.give_lease_back(question.pool_id, lease_id)
        ttl_ms = 1 + round(600_000 * action.share)
        lease = self.leases[lease_id]
        question.until = self._scene.timeline.now + ttl_ms / 1000
        lease.until = question.until if lease.until is None else min(lease.until, question.until)
        return node.prolong_lease(question.pool_id, lease_id, ttl_ms)

    def waits_too_long(self, late_s: float) -> list[Question]:
        """Who should have had a slot, or been told that there is none, by now. A daemon that stands hears of nobody."""
        now, woken = self._scene.timeline.now, self._scene.resumed_at
        return [question for question in self._asking if now > max(question.asked_at, woken) + question.waits_s + late_s]

    def may_be_evicted(self, promise: Promise) -> bool:
        """Somebody has made room, or may have, since it was said that the pool is wanted up."""
        asks = any(question.action.kind in _EVICTS for question in self._asking)
        return asks or max(self._evicts_until, self.demand.evicts_until()) >= promise.told_at

    def asks_for(self, pool_id: str) -> bool:
        """Somebody waits for an answer about the pool."""
        return self.demand.of(pool_id) or any(question.pool_id == pool_id for question in self._asking)

    # --- hearing ---

    def _heard(self, question: Question, task: asyncio.Task[Any]) -> None:
        scene, action = self._scene, question.action
        self._asking.remove(question)
        if action.kind in _EVICTS:
            self._evicts_until = max(self._evicts_until, scene.timeline.now + CLOUDY_S)
        for touched in question.touched:
            touched.promise.asking -= 1
        if task.cancelled():
            self.unanswered += 1
            self._unheard |= self._unapplied if action.kind == APPLY else set()
            scene.note("client went away", f"{action} of {question.pool_id}")
            return
        error = task.exception()
        if error is not None and not isinstance(error, PoolError):
            scene.fail("a request ends with an answer or a PoolError", f"{action}: {error!r}")
            return
        if error is not None:
            scene.note("refused", f"{action} of {question.pool_id}: {error.code}")
            self._refused(question)
            return
        self.acknowledged += 1
        self.on_answer(action.kind, question.pool_id)
        scene.note("acknowledged", f"{action} of {question.pool_id}")
        for touched in question.touched:
            if touched.alone:
                joined = {touched.value, "auto"} & touched.promise.possible
                touched.promise.possible = joined if action.kind in _BY_DEMAND else {touched.value}
            touched.promise.told_at = scene.timeline.now
        self._given(question, task.result())

    def _refused(self, question: Question) -> None:
        """Nothing has changed, unless the disk failed while what was written was taken back."""
        self._cannot_be(question.pool_id, question.new_slots)
        if self._scene.disk_failed_at + CLOUDY_S > self._scene.timeline.now:
            return
        for touched in question.touched:
            if touched.alone and question.action.kind not in _BY_DEMAND:
                touched.promise.possible = touched.before

    def _given(self, question: Question, result: Any) -> None:
        scene, kind = self._scene, question.action.kind
        if kind == "drain" and not self.asks_for(question.pool_id):
            self._drain_is_kept(question.pool_id)
        if isinstance(result, Operation):
            self.operations[result.operation_id] = (result, scene.timeline.now, scene.lost_s)
            if kind == APPLY:
                self._applies[result.operation_id] = question.file or scene.config
            if kind == RELOAD:
                self._reloads[result.operation_id] = question, _slots_asked(question.action)
        elif kind in ("lease", ACQUIRE):
            self._lease_given(question, result["lease_id"])
        elif kind == "release_lease" and question.lease_id is not None:
            self.leases.pop(question.lease_id, None)

    def _drain_is_kept(self, pool_id: str) -> None:
        """A daemon that began now would go on with it, to its deadline."""
        pool, cloudy = self._scene.pool(pool_id), self._scene.disk_failed_at + CLOUDY_S > self._scene.timeline.now
        if pool is None or pool.instance.phase is not Phase.DRAINING or cloudy or self._scene.disk.fails:
            return
        kept = json.loads(self._scene.disk.facts.get(("drain", pool_id), "{}"))
        if kept.get("epoch") != pool.instance.epoch:
            self._scene.fail("an acknowledged drain goes on under the next daemon", f"{pool_id}: {kept}")

    def _lease_given(self, question: Question, lease_id: str) -> None:
        who = f"{question.action.index}"
        if self.keys.setdefault(lease_id, who) != who:
            self._scene.fail("lease ids are never given twice", lease_id)
        epoch = self._scene.lease_epochs.get(lease_id, -1)
        self.leases[lease_id] = GivenLease(question.pool_id, epoch, question.until)

    def ended(self, operation: Operation) -> None:
        """What it was acknowledged for is so, or is not."""
        if (config := self._applies.pop(operation.operation_id, None)) is not None:
            self._applied(config) if operation.status == "succeeded" else self._unheard.update(self._unapplied)
        if (asked := self._reloads.pop(operation.operation_id, None)) is None:
            return
        question, new = asked
        pool_id = question.pool_id
        if operation.status != "succeeded":
            self._cannot_be(pool_id, question.new_slots)
        elif not self._is_reloaded(pool_id):
            self.slots[pool_id] = {new, self._filed(pool_id)} if pool_id in self._unapplied else {new}

    def daemon_died(self) -> None:
        """Whoever waits gets no answer."""
        self.unanswered += len(self._asking)
        if any(question.action.kind in _EVICTS for question in self._asking):
            self._evicts_until = max(self._evicts_until, self._scene.timeline.now)
        self._asking.clear()
        self.demand.daemon_died()
        self._taken = dict(self._filed_slots())
        self._unheard.clear()
        for promises in (self.desired, self.held, self.exists):
            for promise in promises.values():
                promise.asking, promise.cloudy_until = 0, 0.0
