"""The oracle of a simulated run: what must always hold (DESIGN §8), asked after every callback of the daemon's loop.

It knows the truth, which the daemon only hears of: the machine, the disk, and what clients were promised. The first rule that is
broken ends the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pool_managerd.core.breaker import Circuit
from pool_managerd.core.event import Event
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Phase, PoolState, validate, view
from pool_managerd.core.lifecycle.phase import SERVING, TRANSITIONAL
from pool_managerd.core.registry import LeaseChange
from pool_managerd.supervision.pool import Pool
from pool_managerd.testing.scenario import SUBMITTED

if TYPE_CHECKING:
    from pool_managerd.testing.simulated_machine import SimulatedEngine
    from pool_managerd.testing.world import World

LATE_S = 2.0
ANSWER_LATE_S = 5.0
DOWN_ENDS_S = 180.0
ENDS_S = 7_200.0
_LEFT_NOTHING = (Phase.DOWN, Phase.BACKOFF, Phase.OPEN)
_ENDS = (Phase.ADOPTING, Phase.STOPPING, Phase.FAILED)
_MANUAL = ("start", "restart", "reset_breaker", "release", "preload", "ensure_ready", "undrain", "submit", "uncordon")


@dataclass(frozen=True, slots=True)
class Violation:
    """``rule`` was broken at second ``at``; ``what`` shows it."""

    rule: str
    what: str
    at: float


class Oracle:
    """``broken`` is the first violation. ``stopped_pools`` are to be down for good: the run is at its end."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.broken: Violation | None = None
        self.lease_epochs: dict[str, int] = {}
        self.disk_failed_at = float("-inf")
        self._seen: dict[str, PoolState] = {}
        self._given: set[str] = set()
        self._last_event_id = 0
        self._restarts: dict[str, list[float]] = {}
        self._asked_at: dict[str, float] = {}
        self._trials: dict[str, tuple[object, ...]] = {}
        self._highest_epoch: dict[str, int] = {}

    def fail(self, rule: str, what: str) -> None:
        if self.broken is None:
            self.broken = Violation(rule, what, self._world.timeline.now)

    # --- after every callback ---

    def look(self, pools: list[Pool]) -> None:
        """Every pool that has changed."""
        for pool in pools:
            state = pool.state
            if self._seen.get(pool.pool_id) is not state:
                before = self._seen.get(pool.pool_id)
                self._seen[pool.pool_id] = state
                self._look_at(pool, before)

    def _look_at(self, pool: Pool, before: PoolState | None) -> None:
        state, i, now = pool.state, pool.instance, self._world.timeline.now
        try:
            validate(state, now, pool.definition.policy)
        except AssertionError as problem:
            self.fail("validate(pool)", str(problem))
        seen, pool_id = view(state), pool.pool_id
        if seen.ready and not i.external:
            answered = self._world.machine.answered.get((pool_id, i.epoch))
            if answered is None or i.last_good_at is None or i.last_good_at - answered > ANSWER_LATE_S:
                self.fail("ready means a good answer of this launch's own engine", f"{pool_id}: {answered} {i}")
        if i.phase in _LEFT_NOTHING and before is not None and before.active.phase is not i.phase:
            self._look_for_remains(pool)
        if state.history.circuit is not Circuit.HALF_OPEN:
            self._trials.pop(pool_id, None)
        elif before is None or before.active.epoch != i.epoch:
            self._look_at_trial(pool)

    def _look_for_remains(self, pool: Pool) -> None:
        """Down means that nothing of it is left."""
        world, pool_id, key = self._world, pool.pool_id, pool.instance_id
        running = [e.pid for e in world.machine.running(pool_id) if e.launch.epoch == pool.instance.epoch]
        left = {
            "a process": running,
            "a pid file": key in world.machine.pids,
            "a handoff file": key in world.machine.handoffs,
            "a reservation": world.adapters is not None and world.adapters.gpus.memory.ledger.get(key) is not None,
        }
        if any(left.values()):
            self.fail("down means that nothing is left", f"{pool_id}: {[name for name, is_so in left.items() if is_so]}")

    def _look_at_trial(self, pool: Pool) -> None:
        pool_id, i, history = pool.pool_id, pool.instance, pool.state.history
        if i.phase is Phase.STAGING:
            trial = (history.general.open_until, history.general.opened, history.cuda.open_until, history.cuda.opened)
            if self._trials.get(pool_id) == trial and not self._world.clients.asks_for(pool_id):
                self.fail("half-open admits exactly one start", f"{pool_id}: launch {i.epoch}")
            self._trials[pool_id] = trial

    def engine_started(self, engine: SimulatedEngine) -> None:
        """One engine process of a pool at a time, and each of a launch of its own."""
        pool_id, epoch = engine.pool_id, engine.launch.epoch
        if epoch <= self._highest_epoch.get(pool_id, 0):
            self.fail("epochs never go back", f"{pool_id}: {epoch} after {self._highest_epoch[pool_id]}")
        self._highest_epoch[pool_id] = epoch
        running = self._world.machine.running(pool_id)
        if len(running) > 1:
            self.fail("one engine of a pool at a time", f"{pool_id}: {[(e.pid, e.launch.epoch) for e in running]}")

    # --- as it happens ---

    def on_event(self, event: Event) -> None:
        if not event.journal:
            return
        self._world.note_event(event)
        if event.id <= self._last_event_id:
            self.fail("ids of events are never given twice", f"{event.id} after {self._last_event_id}")
        self._last_event_id = event.id
        if event.type == "internal_error":
            self.fail("no fault of our own", event.human)
        elif event.type == "restart" and event.pool_id is not None:
            self._restarted(event.pool_id)
        elif event.type in ("port_conflict", "quarantine", "hold") and event.pool_id is not None:
            self._trials.pop(event.pool_id, None)

    def _restarted(self, pool_id: str) -> None:
        rules, now = self._world.restart_rules, self._world.timeline.now
        since = now - rules.window_ms / 1000
        times = [t for t in self._restarts.get(pool_id, []) if t > since] + [now]
        self._restarts[pool_id] = times
        if len(times) > rules.max_restarts and self._asked_at.get(pool_id, float("-inf")) < times[0]:
            self.fail("restarts in any window are limited", f"{pool_id}: {times}")

    def on_request(self, kind: str, pool_id: str) -> None:
        """What a person asks for is not limited as restarts by itself are."""
        if kind in _MANUAL:
            for one in self._seen if kind == "uncordon" else (pool_id, SUBMITTED):
                self._asked_at[one] = self._world.timeline.now
                self._trials.pop(one, None)

    def on_lease(self, change: LeaseChange) -> None:
        if not change.new or self._world.node is None:
            return
        told = change.lease_id in self._world.clients.keys  # one that nobody was told of, on a full disk, may be given again
        if told or change.lease_id in self._given:
            self.fail("ids of leases are never given twice", change.lease_id)
        self._given.add(change.lease_id)
        self.lease_epochs[change.lease_id] = change.epoch
        pool = self._world.pool(change.pool_id)
        if pool is None or pool.instance.phase not in SERVING or not view(pool.state).ready:
            self.fail("leases are given on ready pools alone", f"{change.pool_id}: {pool and pool.state}")
        entry = self._world.node.registry.get(change.pool_id)
        if entry is not None and entry.slots_total is not None:
            given = len(self._world.node.registry.leases(change.pool_id))
            if not 0 <= given <= entry.slots_total:
                self.fail("leases are at most slots", f"{change.pool_id}: {given} of {entry.slots_total}")

    # --- now and then ---

    def sweep(self, pools: list[Pool]) -> None:
        """What goes wrong by nothing happening, and what is true of all pools together."""
        for pool in pools:
            self._look_for_stuck(pool)
        self._look_at_gpus()
        self._look_for_lost_leases()
        self._look_at_operations()

    def _look_for_stuck(self, pool: Pool) -> None:
        i, policy, now = pool.instance, pool.definition.policy, self._world.timeline.now
        woken = self._world.resumed_at
        if i.phase in TRANSITIONAL and i.deadline is not None and now > max(i.deadline, woken) + LATE_S:
            self.fail("no pool is stuck", f"{pool.pool_id}: {i}")
        if view(pool.state).ready and i.last_good_at is not None:
            asked_s = policy.probe_interval_s + 2 * policy.probe_timeout_s  # that it is old is seen when it is asked again
            if now - max(i.last_good_at, woken) > policy.fresh_s + asked_s + LATE_S:
                self.fail("ready means a fresh good probe", f"{pool.pool_id}: {i}")

    def _look_at_gpus(self) -> None:
        if self._world.adapters is None:
            return
        reservations = self._world.adapters.gpus.memory.ledger.all()
        for gpu in self._world.machine.gpus:
            reserved = sum(r.bytes_by_device.get(gpu.uuid, 0) for r in reservations)
            if reserved + gpu.foreign_bytes > gpu.total_bytes or gpu.used_bytes > gpu.total_bytes:
                self.fail("no more GPU memory is promised than there is", f"{gpu}: {reservations}")

    def _look_for_lost_leases(self) -> None:
        world = self._world
        if world.node is None:
            return
        now = world.timeline.now
        for lease_id, lease in list(world.clients.leases.items()):
            pool = world.pool(lease.pool_id)
            over = lease.maybe or (lease.until is not None and now >= lease.until)
            if pool is None or over or pool.instance.epoch > lease.epoch:
                del world.clients.leases[lease_id]
            elif (
                pool.instance.has_process
                and pool.instance.phase not in _ENDS
                and lease_id not in {found.lease_id for found in world.node.registry.leases(lease.pool_id)}
            ):
                self.fail("an acknowledged lease lasts as long as its engine", f"{lease_id} of {lease}")

    def _look_at_operations(self) -> None:
        world = self._world
        for operation_id, (operation, since, lost_s) in list(world.clients.operations.items()):
            if operation.status != "running":
                del world.clients.operations[operation_id]
                continue
            limit = DOWN_ENDS_S if operation.goal in ("down", "drained", "now") else ENDS_S
            if world.timeline.now - since - (world.lost_s - lost_s) > limit:
                self.fail("every acknowledged operation ends", f"{operation.to_dict()} since {since}")

    # --- a daemon begins ---

    def daemon_died(self) -> None:
        self._trials.clear()
        self._asked_at = dict.fromkeys((*self._seen, SUBMITTED), self._world.timeline.now)  # what was not written yet is lost
        self._seen.clear()
        self._given.clear()

    def look_at_disk(self) -> None:
        """What was acknowledged is what the next daemon finds."""
        clients, stored = self._world.clients, self._world.disk.pools
        for pool_id, promise in clients.desired.items():
            found = stored.get(pool_id, StoredPool(pool_id))
            if found.desired not in promise.possible:
                self.fail("acknowledged changes last", f"{pool_id} is stored as {found.desired}, not {promise.possible}")
            if found.held not in clients.held[pool_id].possible:
                self.fail("acknowledged changes last", f"{pool_id} is stored as held={found.held}")
        if (SUBMITTED in stored) not in clients.exists[SUBMITTED].possible:
            self.fail("acknowledged changes last", f"{SUBMITTED} is {'there' if SUBMITTED in stored else 'gone'}")

    def look_at_boot(self, pools: list[Pool]) -> None:
        """What was stored is what the new daemon goes by, and operations that were acknowledged are known to it."""
        world = self._world
        for pool in pools:
            stored = world.booted_with.get(pool.pool_id, StoredPool(pool.pool_id))
            if pool.state.held is not stored.held or (stored.desired == "drained" and not pool.state.desired.stays_down):
                self.fail("what was stored holds", f"{stored}: {pool.state}")
        known = {row["operation_id"]: row for row in (world.node.operations() if world.node is not None else ())}
        journal_ok = self.disk_failed_at == float("-inf")
        for operation_id, (operation, since, lost_s) in list(world.clients.operations.items()):
            if operation_id in known and world.node is not None:
                again = world.node_operation(operation_id)
                world.clients.operations[operation_id] = (again, since, lost_s)
            else:
                del world.clients.operations[operation_id]
                if journal_ok:
                    self.fail("acknowledged operations are known", f"{operation.to_dict()}")
