"""A whole node in one process on virtual time: the real supervision, store rules and registry on a simulated machine.

``run(draw(seed))`` plays one scenario and tells which rule was broken, if any. The daemon's own death is one of the faults:
everything of it is gone at that instant, and another one begins on what was on disk and on what runs. At the end every fault
ceases: all pools must become ready, then all are stopped, and nothing may be left.
"""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass, field
from random import Random
from typing import Any

from pool_managerd.core.event import Event
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.restart_limit import RestartRules
from pool_managerd.errors import PoolError
from pool_managerd.node import PoolManager
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pool import Pool
from pool_managerd.testing.ending import Ending
from pool_managerd.testing.invariants import Oracle, Violation
from pool_managerd.testing.life import Life
from pool_managerd.testing.scenario import GPU_BYTES, REQUESTS, Action, Scenario
from pool_managerd.testing.simulated_clients import SimulatedClients
from pool_managerd.testing.simulated_disk import SimulatedDisk
from pool_managerd.testing.simulated_faults import strike
from pool_managerd.testing.simulated_machine import SimulatedMachine
from pool_managerd.testing.simulated_node import SimulatedAdapters, simulated_node
from pool_managerd.testing.timeline import START_S, Timeline

MAX_TURNS = 3_000_000


@dataclass
class Outcome:
    """What a run came to. ``trace`` is what happened, by second: what was done to the node, and the events it told of."""

    scenario: Scenario
    broken: Violation | None
    trace: list[tuple[float, str, Event | str]]
    node_hours: float
    acknowledged: int
    lives: int
    ended_at: float = 0.0
    loop_problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The trace to read: a line each, seconds from the beginning first."""
        return [f"{at - START_S:12.6f} {_shown(kind, what)}" for at, kind, what in self.trace]


def _shown(kind: str, what: Event | str) -> str:
    if isinstance(what, str):
        return f"* {kind}: {what}"
    return f"  {what.id} {what.level} {what.type}: {what.human}"


class World:
    """One run. ``left_out`` are the indices of actions that do not happen; ``until`` ends it early."""

    def __init__(self, scenario: Scenario, left_out: frozenset[int] = frozenset()) -> None:
        self.scenario, self.timeline, self.disk = scenario, Timeline(), SimulatedDisk()
        self.config = scenario.node_config()
        self.restart_rules = RestartRules(**self.config.supervision.restart_limit.model_dump())
        self.machine = SimulatedMachine(self.timeline, Random(f"machine {scenario.seed}"), scenario.gpus, GPU_BYTES)
        self.machine.attributable = scenario.attributable
        self.oracle = Oracle(self)
        self.clients = SimulatedClients(self, [pool.id for pool in self.config.pools])
        self.trace: list[tuple[float, str, Event | str]] = []
        self.life: Life | None = None
        self.adapters: SimulatedAdapters | None = None
        self.node: PoolManager | None = None
        self.booted_with: dict[str, StoredPool] = {}
        self.resumed_at = self.lost_s = 0.0
        self._lives = 0
        self._paused_until = 0.0
        self._kill_in: int | None = None
        self._down_s = 1.0
        self.ending = self.finished = False
        self._shown: list[Pool] = []
        self.machine.on_launch = self.oracle.engine_started
        for action in scenario.actions:
            if action.index not in left_out:
                self.timeline.at(START_S + action.at, self._act, action)
        self.timeline.at(START_S + scenario.hours * 3600, Ending(self).begin)

    # --- the run ---

    def run(self) -> Outcome:
        """To the end, or to the first rule that is broken."""
        self._begin_daemon()
        for _ in range(MAX_TURNS):
            if self.finished or self.oracle.broken is not None or not self._step():
                break
        else:
            self.oracle.fail("a run ends", f"{MAX_TURNS} turns were not enough")
        if not self.finished:
            self.oracle.fail("a run ends", "nothing happens any more")
        hours = (self.timeline.now - START_S) / 3600
        if self.life is not None:
            self.life.end()
        return Outcome(
            self.scenario, self.oracle.broken, self.trace, hours, self.clients.acknowledged, self._lives, self.timeline.now
        )

    def _step(self) -> bool:
        """The next thing that happens, and what the daemon makes of it."""
        loop = self.life.loop if self.life is not None else None
        daemon_at = None if loop is None else loop.next_at()
        if daemon_at is not None and self._paused_until > self.timeline.now:
            daemon_at = max(daemon_at, self._paused_until)
        times = [at for at in (self.timeline.next_at(), daemon_at) if at is not None]
        if not times:
            return False
        self.timeline.now = max(self.timeline.now, min(times))
        while self.timeline.happen():
            if self.oracle.broken is not None:
                return True
        if self.life is not None and self.life.loop is loop and self.timeline.now >= self._paused_until:
            self._shown = self.pools()
            loop.turn()
            if loop.problems:
                self.oracle.fail("no exception is left to nobody", loop.problems[0])
            if self._kill_in is not None and self._kill_in < 0:
                self._die()
        return True

    def _after_callback(self) -> bool:
        self.oracle.look(self._shown)
        if self._kill_in is not None:
            self._kill_in -= 1
            if self._kill_in < 0:
                return True
        return self.oracle.broken is not None

    def _act(self, action: Action) -> None:
        if self.ending:
            return
        pools = [pool.id for pool in self.config.pools]
        pool_id = pools[action.pool % len(pools)]
        if self.adapters is not None:
            self.oracle.sweep(self.pools())
        if action.kind not in REQUESTS:
            self.note("fault", f"{action} {pool_id}")
            strike(self, action, pool_id)
        elif self.node is not None:
            self.oracle.on_request(action.kind, pool_id)
            self.clients.ask(action, pool_id, self.node)

    # --- the daemon ---

    def _begin_daemon(self) -> None:
        if self.life is not None:
            return
        self._lives += 1
        life = Life(self._lives, self.machine, self.disk, Random(f"order {self.scenario.seed} {self._lives}"))
        adapters = SimulatedAdapters(self.config, life, self.scenario.needs, str(self.scenario.seed))
        adapters.events.listen(self.oracle.on_event)
        adapters.on_lease = self.oracle.on_lease
        adapters.fatal = lambda problem: self.oracle.fail("no fault of our own", repr(problem))
        self.note("daemon", f"number {self._lives} begins")
        self.oracle.look_at_disk()
        self.booted_with = dict(self.disk.pools)
        self.life, self.adapters, self.machine.daemon = life, adapters, self._lives
        self.resumed_at = self.timeline.now
        life.loop.after_each = self._after_callback
        node = simulated_node(adapters)
        life.loop.create_task(node.__aenter__()).add_done_callback(lambda task: self._booted(task, node))

    def _booted(self, task: asyncio.Task[Any], node: PoolManager) -> None:
        if (problem := task.exception()) is not None:
            self.note("daemon", f"could not begin: {problem!r}")
            if not isinstance(problem, PoolError):
                self.oracle.fail("a daemon begins or says why not", repr(problem))
            self._kill_in, self._down_s = 0, 5.0
            return
        self.node = node
        self.oracle.look_at_boot(self.pools())

    def kill_daemon(self, callbacks: int, down_s: float) -> None:
        """Once it has run so many more callbacks; 0: now. Another one begins ``down_s`` later."""
        if self.life is None:
            return
        self._down_s = down_s
        if callbacks:
            self._kill_in = callbacks
        else:
            self._die()

    def _die(self) -> None:
        if self.life is None:
            return
        self.note("daemon", f"number {self.life.number} is killed; the next one begins in {self._down_s:.3f} s")
        self._gone()

    def _gone(self) -> None:
        life, self.life, self.adapters, self.node = self.life, None, None, None
        self._kill_in, self._paused_until, self.machine.daemon = None, 0.0, 0
        self.oracle.daemon_died()
        self.clients.daemon_died()
        if life is not None:
            life.end()
        self.lost_s += self._down_s
        self.timeline.after(self._down_s, self._begin_daemon)

    def shut_down(self, down_s: float) -> None:
        """Ask it to end, as a service manager does."""
        if self.node is None or self.life is None:
            return
        life, began = self.life, self.timeline.now

        def over(task: asyncio.Task[None]) -> None:
            if self.life is life:
                if task.exception() is not None:
                    self.oracle.fail("a daemon ends when asked to", repr(task.exception()))
                self.note("daemon", f"number {life.number} has ended")
                self.lost_s += self.timeline.now - began
                self._down_s, self._kill_in = down_s, 0

        life.loop.create_task(self.node.shutdown()).add_done_callback(over)

    def pause(self, seconds: float) -> None:
        """As SIGSTOP, and SIGCONT after that."""
        self._paused_until = self.timeline.now + seconds
        self.resumed_at = self._paused_until
        self.lost_s += seconds

    def calm(self) -> None:
        """No more faults and no more requests; what was about to strike does not."""
        self.ending, self._kill_in = True, None
        self._paused_until = min(self._paused_until, self.timeline.now)
        self.machine.heal()
        self.mend_disk()

    def mend_disk(self) -> None:
        """It can be written again."""
        self.disk.fails = False
        self.oracle.disk_failed_at = max(self.oracle.disk_failed_at, self.timeline.now)
        if self.adapters is not None:
            self.adapters.store.retry()

    # --- for its parts ---

    def pools(self) -> list[Pool]:
        """Those of the daemon that runs."""
        return [] if self.adapters is None else list(self.adapters.gpus.pools())

    def pool(self, pool_id: str) -> Pool | None:
        return next((pool for pool in self.pools() if pool.pool_id == pool_id), None)

    def node_operation(self, operation_id: str) -> Operation:
        """The operation as the present daemon has it."""
        if self.node is None:
            raise LookupError(operation_id)
        return self.node._pools.operations.get(operation_id)

    def life_loop(self) -> asyncio.AbstractEventLoop:
        if self.life is None:
            raise LookupError("no daemon runs")
        return self.life.loop

    def is_alive(self, task: asyncio.Task[Any]) -> bool:
        return self.life is not None and task.get_loop() is self.life.loop

    def note(self, kind: str, what: str) -> None:
        self.trace.append((self.timeline.now, kind, what))

    def note_event(self, event: Event) -> None:
        self.trace.append((self.timeline.now, "event", event))


def run(scenario: Scenario, left_out: frozenset[int] = frozenset()) -> Outcome:
    """Play it. Without the garbage collector: what is told of lost tasks must not depend on when it comes by."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return World(scenario, left_out).run()
    finally:
        if collects:
            gc.enable()
