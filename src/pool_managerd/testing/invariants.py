"""The oracle of a simulated run: what must always hold (DESIGN §8), asked after every callback of the daemon's loop.

It knows the truth, which the daemon only hears of: the machine, the disk, and what clients were promised. The first rule that is
broken ends the run.
"""

from __future__ import annotations

from pool_managerd.core.breaker import Circuit
from pool_managerd.core.event import Event
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Phase, Policy, PoolState, validate, view
from pool_managerd.core.lifecycle.phase import SERVING, TRANSITIONAL
from pool_managerd.core.registry import LeaseChange
from pool_managerd.core.restart_limit import RestartRules
from pool_managerd.supervision.fetching import STEP as FETCH
from pool_managerd.supervision.pool import Pool
from pool_managerd.testing.scenario import ACQUIRE, SUBMITTED
from pool_managerd.testing.scene import Scene
from pool_managerd.testing.simulated_clients import SimulatedClients
from pool_managerd.testing.simulated_machine import SimulatedEngine
from pool_managerd.testing.simulated_staging import FETCH_PIECE_S

CANDIDATE_LAUNCHES = 1 + Policy().port_retries
LATE_S = 2.0
ANSWER_LATE_S = 5.0
DOWN_ENDS_S = 180.0
ENDS_S = 7_200.0
_LEFT_NOTHING = (Phase.DOWN, Phase.BACKOFF, Phase.OPEN)
_ENDS = (Phase.ADOPTING, Phase.STOPPING, Phase.FAILED)
_MANUAL = ("start", "restart", "reset_breaker", "release", "preload", "ensure_ready", ACQUIRE, "undrain", "submit", "uncordon")


class Oracle:
    """Of one run. What is broken is told to the scene."""

    def __init__(self, scene: Scene, clients: SimulatedClients) -> None:
        self._scene, self._clients = scene, clients
        self._rules = RestartRules(**scene.config.supervision.restart_limit.model_dump())
        self._seen: dict[int, tuple[Pool, PoolState]] = {}
        self._given: set[str] = set()
        self._last_event_id = 0
        self._restarts: dict[str, list[float]] = {}
        self._asked_at: dict[str, float] = {}
        self._trials: dict[str, tuple[object, ...]] = {}
        self._epochs: dict[str, set[int]] = {}

    # --- after every callback ---

    def look(self, pools: list[Pool]) -> None:
        """Every pool that has changed."""
        for pool in pools:
            _, before = self._seen.get(id(pool), (pool, None))
            if before is not pool.state:
                self._seen[id(pool)] = pool, pool.state
                self._look_at(pool, before)

    def _look_at(self, pool: Pool, before: PoolState | None) -> None:
        state, i, now = pool.state, pool.instance, self._scene.timeline.now
        try:
            validate(state, now, pool.definition.policy)
        except AssertionError as problem:
            self._scene.fail("validate(pool)", str(problem))
        seen, pool_id = view(state), pool.pool_id
        if seen.ready and not i.external:
            answered = self._scene.machine.answered.get((pool_id, i.epoch))
            # What was seen does not age while the daemon itself stands.
            seen_at = None if answered is None else max(answered, self._scene.resumed_at)
            if seen_at is None or i.last_good_at is None or i.last_good_at - seen_at > ANSWER_LATE_S:
                self._scene.fail("ready means a good answer of this launch's own engine", f"{pool_id}: {answered} {i}")
            if any(e.asleep and e.launch.epoch == i.epoch for e in self._scene.machine.running(pool_id)):
                self._scene.fail("an engine that sleeps is not shown as ready", f"{pool_id}: {i}")
        if i.phase in _LEFT_NOTHING and before is not None and before.active.phase is not i.phase:
            self._look_for_remains(pool)
        if not pool.current:
            return
        if state.history.circuit is not Circuit.HALF_OPEN:
            self._trials.pop(pool_id, None)
        elif before is None or before.active.epoch != i.epoch:
            self._look_at_trial(pool)

    def _look_for_remains(self, pool: Pool) -> None:
        """Down means that nothing of it is left."""
        scene, pool_id, key = self._scene, pool.pool_id, pool.instance_id
        running = [e.pid for e in scene.machine.running(pool_id) if e.launch.epoch == pool.instance.epoch]
        left = {
            "a process": running,
            "a pid file": key in scene.machine.pids,
            "a handoff file": key in scene.machine.handoffs,
            "a lease": scene.adapters is not None and scene.adapters.registry.leases_on(pool_id, pool.instance.epoch) > 0,
            "a reservation": scene.adapters is not None and scene.adapters.gpus.memory.ledger.get(key) is not None,
        }
        if any(left.values()):
            self._scene.fail("down means that nothing is left", f"{pool_id}: {[name for name, is_so in left.items() if is_so]}")

    def _look_at_trial(self, pool: Pool) -> None:
        pool_id, i, history = pool.pool_id, pool.instance, pool.state.history
        if i.phase is Phase.STAGING:
            trial = (history.general.open_until, history.general.opened, history.cuda.open_until, history.cuda.opened)
            asked = self._clients.asks_for(pool_id) or self._is_reloaded(pool_id)
            if self._trials.get(pool_id) == trial and not asked:
                self._scene.fail("half-open admits exactly one start", f"{pool_id}: launch {i.epoch}")
            self._trials[pool_id] = trial

    def _is_reloaded(self, pool_id: str) -> bool:
        """Its starts are those of a person."""
        node = self._scene.node
        return node is not None and (node.status(pool_id)["reload"] is not None or node._applies.busy)

    def engine_started(self, engine: SimulatedEngine) -> None:
        """One engine process of a pool at a time, or two while one replaces the other; and each of a launch of its own."""
        pool_id, epoch, used = engine.pool_id, engine.launch.epoch, self._epochs.setdefault(engine.pool_id, set())
        if epoch in used or epoch < max(used, default=0) - CANDIDATE_LAUNCHES:  # a candidate's are given before it loads
            self._scene.fail("epochs never go back", f"{pool_id}: {epoch} after {max(used)}")
        used.add(epoch)
        promise, now = self._clients.desired.get(pool_id), self._scene.timeline.now
        if promise is not None and promise.stays_down and now > promise.told_at + LATE_S and not self._scene.ending:
            self._scene.fail("what a person has stopped is not started", f"{pool_id}: {promise}")
        running = self._scene.machine.running(pool_id)
        instances = {e.launch.instance for e in running}
        node = self._scene.node
        # A daemon that has just died may have begun the second one of a reload, of which the next one will know.
        beside = node is None or node.status(pool_id)["beside"] is not None
        if len(running) > len(instances) or len(running) > 1 + beside:
            self._scene.fail("one engine of a pool at a time", f"{pool_id}: {[(e.pid, e.launch.epoch) for e in running]}")
        for group in self._scene.config.together.groups:
            loaded = [name for name in group.pools if self._scene.machine.running(name)]
            if pool_id in group.pools and len(loaded) > 1:
                self._scene.fail("one pool of a group at a time", f"{group.id}: {loaded}")

    # --- as it happens ---

    def on_event(self, event: Event) -> None:
        if not event.journal:
            return
        self._scene.note_event(event)
        if event.id <= self._last_event_id:
            self._scene.fail("ids of events are never given twice", f"{event.id} after {self._last_event_id}")
        self._last_event_id = event.id
        if event.type == "internal_error":
            self._scene.fail("no fault of our own", event.human)
        elif event.type == "not_adopted" and event.pool_id is not None:
            if running := self._scene.machine.running(event.pool_id):
                self._scene.fail("what was left running is taken over", f"{running[0].pid}: {event.human}")
        elif event.type == "evicted" and event.pool_id is not None:
            if left := self._leases_on_present(event.pool_id):
                self._scene.fail("nobody's request is cut off to make room", f"{event.human}: {left} leases")
        elif event.type == "preload_failed" and event.pool_id is not None:
            self._look_at_download(event.pool_id, event.human)
        elif event.type == "restart" and event.pool_id is not None:
            self._restarted(event.pool_id)
        elif event.type in ("reload_failed", "reload_undone") and event.pool_id is not None:
            self._asked_at[event.pool_id] = self._scene.timeline.now  # what ran before is started as by a person
        elif event.type in ("port_conflict", "quarantine", "hold") and event.pool_id is not None:
            self._trials.pop(event.pool_id, None)

    def _look_at_download(self, pool_id: str, reason: str) -> None:
        moved_at = self._scene.machine.downloads.moved_at.get(pool_id, float("-inf"))
        if "no progress" in reason and self._scene.timeline.now - moved_at < FETCH_PIECE_S + LATE_S:
            self._scene.fail("a start that fetches is not late as long as bytes come", f"{pool_id}: {reason}")

    def _restarted(self, pool_id: str) -> None:
        rules, now = self._rules, self._scene.timeline.now
        if self._is_reloaded(pool_id):
            self._asked_at[pool_id] = now
        since = now - rules.window_ms / 1000 + 0.001  # one that is as old as the window has left it
        times = [t for t in self._restarts.get(pool_id, []) if t > since] + [now]
        self._restarts[pool_id] = times
        if len(times) > rules.max_restarts and self._asked_at.get(pool_id, float("-inf")) < times[0]:
            self._scene.fail("restarts in any window are limited", f"{pool_id}: {times}")

    def on_request(self, kind: str, pool_id: str) -> None:
        """What a person asks for is not limited as restarts by itself are."""
        if kind in _MANUAL:
            for one in self._pool_ids() if kind == "uncordon" else (pool_id, SUBMITTED):
                self._asked_at[one] = self._scene.timeline.now
                self._trials.pop(one, None)

    def on_lease(self, change: LeaseChange) -> None:
        if not change.new or self._scene.node is None:
            return
        told = change.lease_id in self._clients.keys  # one that nobody was told of, on a full disk, may be given again
        if told or change.lease_id in self._given:
            self._scene.fail("ids of leases are never given twice", change.lease_id)
        self._given.add(change.lease_id)
        self._scene.lease_epochs[change.lease_id] = change.epoch
        pool = self._scene.pool(change.pool_id)
        serves = pool is not None and pool.instance.phase in SERVING and view(pool.state).ready
        if pool is None or not serves or pool.instance.epoch != change.epoch:
            self._scene.fail("leases are given on ready pools alone", f"{change.pool_id}: {pool and pool.state}")
        entry = self._scene.node.registry.get(change.pool_id)
        if entry is not None and entry.slots_total is not None:
            given = self._scene.node.registry.leases_on(change.pool_id, change.epoch)
            if not 0 <= given <= entry.slots_total:
                self._scene.fail("leases are at most slots", f"{change.pool_id}: {given} of {entry.slots_total}")

    # --- now and then ---

    def sweep(self, pools: list[Pool]) -> None:
        """What goes wrong by nothing happening, and what is true of all pools together."""
        for pool in pools:
            self._look_for_stuck(pool)
            possible = self._clients.slots.get(pool.pool_id)
            if pool.current and pool.config is not None and possible is not None and pool.config.slots not in possible:
                self._scene.fail("a reload is committed or undone", f"{pool.pool_id}: {pool.config.slots}, not {possible}")
        self._look_at_gpus(pools)
        self._look_for_lost_leases()
        self._look_at_operations()
        if late := self._clients.waits_too_long(ANSWER_LATE_S + 60):
            self._scene.fail("nobody waits longer than they said", f"{late[0]}")

    def _leases_on_present(self, pool_id: str) -> int:
        """Those on the engine that the pool has now: one that was replaced goes on with its own."""
        scene = self._scene
        epochs = [pool.instance.epoch for pool in scene.pools() if pool.current and pool.pool_id == pool_id]
        return sum(scene.node.registry.leases_on(pool_id, epoch) for epoch in epochs) if scene.node is not None else 0

    def _look_for_stuck(self, pool: Pool) -> None:
        i, policy, now = pool.instance, pool.definition.policy, self._scene.timeline.now
        woken = self._scene.resumed_at
        if i.phase in TRANSITIONAL and i.deadline is not None and now > max(i.deadline, woken) + LATE_S:
            self._scene.fail("no pool is stuck", f"{pool.pool_id}: {i}")
        if view(pool.state).ready and i.last_good_at is not None:
            asked_s = policy.probe_interval_s + 2 * policy.probe_timeout_s  # that it is old is seen when it is asked again
            if now - max(i.last_good_at, woken) > policy.fresh_s + asked_s + LATE_S:
                self._scene.fail("ready means a fresh good probe", f"{pool.pool_id}: {i}")

    def _look_at_gpus(self, pools: list[Pool]) -> None:
        if self._scene.adapters is None:
            return
        ledger = self._scene.adapters.gpus.memory.ledger
        for pool in pools:
            if pool.instance.phase is Phase.STAGING and pool.launch.step == FETCH and ledger.get(pool.instance_id) is not None:
                self._scene.fail("a download keeps no memory from others", str(pool.instance))
            if pool.instance.has_process and ledger.get(pool.instance_id) is None:
                running = self._scene.machine.running(pool.pool_id)
                if any(e.launch.epoch == pool.instance.epoch and e.launch.reserved_bytes for e in running):
                    self._scene.fail("the memory of an engine that runs is promised to it", str(pool.instance))
        reservations = ledger.all()
        for gpu in self._scene.machine.gpus:
            reserved = sum(r.bytes_by_device.get(gpu.uuid, 0) for r in reservations)
            if reserved + gpu.foreign_bytes > gpu.total_bytes or gpu.used_bytes > gpu.total_bytes:
                self._scene.fail("no more GPU memory is promised than there is", f"{gpu}: {reservations}")

    def _look_for_lost_leases(self) -> None:
        scene = self._scene
        if scene.node is None:
            return
        now = scene.timeline.now
        for lease_id, lease in list(self._clients.leases.items()):
            both = [pool for pool in scene.pools() if pool.pool_id == lease.pool_id]
            pool = next((pool for pool in both if pool.instance.epoch == lease.epoch), None)
            over = lease.maybe or (lease.until is not None and now >= lease.until)
            if pool is None or over:
                del self._clients.leases[lease_id]
            elif (
                pool.instance.has_process
                and pool.instance.phase not in _ENDS
                and lease_id not in {found.lease_id for found in scene.node.registry.leases(lease.pool_id)}
            ):
                self._scene.fail("an acknowledged lease lasts as long as its engine", f"{lease_id} of {lease}")

    def _look_at_operations(self) -> None:
        scene = self._scene
        for operation_id, (operation, since, lost_s) in list(self._clients.operations.items()):
            if operation.status != "running":
                del self._clients.operations[operation_id]
                self._clients.ended(operation)
                continue
            limit = DOWN_ENDS_S if operation.goal in ("down", "drained", "now") else ENDS_S
            if scene.timeline.now - since - (scene.lost_s - lost_s) > limit:
                self._scene.fail("every acknowledged operation ends", f"{operation.to_dict()} since {since}")

    def _pool_ids(self) -> set[str]:
        return {pool.pool_id for pool, _ in self._seen.values()}

    # --- a daemon begins ---

    def daemon_died(self) -> None:
        self._trials.clear()
        # What was not written yet is lost.
        self._asked_at = dict.fromkeys((*self._pool_ids(), SUBMITTED), self._scene.timeline.now)
        self._seen.clear()
        self._given.clear()

    def look_at_disk(self) -> None:
        """What was acknowledged is what the next daemon finds."""
        clients, stored = self._clients, self._scene.disk.pools
        for pool_id, promise in clients.desired.items():
            found = stored.get(pool_id, StoredPool(pool_id))
            if "up" in promise.possible and clients.may_be_evicted(promise):
                promise.possible.add("auto")  # what is stopped to make room comes up as it is configured
            if found.desired not in promise.possible:
                self._scene.fail("acknowledged changes last", f"{pool_id} is stored as {found.desired}, not {promise.possible}")
            if found.held not in clients.held[pool_id].possible:
                self._scene.fail("acknowledged changes last", f"{pool_id} is stored as held={found.held}")
        if (SUBMITTED in stored) not in clients.exists[SUBMITTED].possible:
            self._scene.fail("acknowledged changes last", f"{SUBMITTED} is {'there' if SUBMITTED in stored else 'gone'}")

    def look_at_boot(self, pools: list[Pool]) -> None:
        """What was stored is what the new daemon goes by, and operations that were acknowledged are known to it."""
        scene = self._scene
        for pool in pools:
            if not pool.current:
                continue
            stored = scene.booted_with.get(pool.pool_id, StoredPool(pool.pool_id))
            if pool.state.held is not stored.held or (stored.desired == "drained" and not pool.state.desired.stays_down):
                self._scene.fail("what was stored holds", f"{stored}: {pool.state}")
        known = {row["operation_id"]: row for row in (scene.node.operations() if scene.node is not None else ())}
        journal_ok = self._scene.disk_failed_at == float("-inf")
        for operation_id, (operation, since, lost_s) in list(self._clients.operations.items()):
            if operation_id in known and scene.node is not None:
                again = scene.node_operation(operation_id)
                self._clients.operations[operation_id] = (again, since, lost_s)
            else:
                del self._clients.operations[operation_id]
                if journal_ok:
                    self._scene.fail("acknowledged operations are known", f"{operation.to_dict()}")
