"""The daemons of a simulated run, one after the other: begun, paused, asked to end, and killed at any callback of their loop."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

from pool_managerd.errors import PoolError
from pool_managerd.node import PoolManager
from pool_managerd.supervision.pool import Pool
from pool_managerd.testing.invariants import Oracle
from pool_managerd.testing.life import Life
from pool_managerd.testing.scene import Scene
from pool_managerd.testing.simulated_clients import SimulatedClients
from pool_managerd.testing.simulated_gateways import SimulatedGateways
from pool_managerd.testing.simulated_node import SimulatedAdapters, simulated_node


class Daemons:
    """One at a time. ``lives`` counts them."""

    def __init__(self, scene: Scene, clients: SimulatedClients, oracle: Oracle, gateways: SimulatedGateways) -> None:
        self._scene, self._clients, self._oracle, self._gateways = scene, clients, oracle, gateways
        self.lives = 0
        self._paused_until = 0.0
        self._kill_in: int | None = None
        self._down_s = 1.0
        self._shown: list[Pool] = []

    def next_at(self) -> float | None:
        """When the one that runs has something to do again; None for never."""
        life, now = self._scene.life, self._scene.timeline.now
        at = None if life is None else life.loop.next_at()
        return at if at is None or self._paused_until <= now else max(at, self._paused_until)

    def turn(self) -> None:
        """It does what there is to do now, unless it is paused."""
        life, scene = self._scene.life, self._scene
        if life is None or scene.timeline.now < self._paused_until:
            return
        self._shown = scene.pools()
        life.loop.turn()
        if life.loop.problems:
            scene.fail("no exception is left to nobody", life.loop.problems[0])
        if self._kill_in is not None and self._kill_in < 0:
            self._die()

    def begin(self) -> None:
        if self._scene.life is not None:
            return
        self.lives += 1
        life = Life(self.lives, self._scene.machine, self._scene.disk, Random(f"order {self._scene.scenario.seed} {self.lives}"))
        adapters = SimulatedAdapters(self._scene.config, life, self._scene.scenario.needs, str(self._scene.scenario.seed))
        adapters.events.listen(self._oracle.on_event)
        adapters.on_lease = self._oracle.on_lease
        adapters.fatal = lambda problem: self._scene.fail("no fault of our own", repr(problem))
        self._scene.note("daemon", f"number {self.lives} begins")
        self._oracle.look_at_disk()
        self._scene.booted_with = dict(self._scene.disk.pools)
        self._scene.life, self._scene.adapters, self._scene.machine.daemon = life, adapters, self.lives
        self._scene.resumed_at = self._scene.timeline.now
        life.loop.after_each = self._after_callback
        node = simulated_node(adapters)
        life.loop.create_task(node.__aenter__()).add_done_callback(lambda task: self._booted(task, node))

    def _booted(self, task: asyncio.Task[Any], node: PoolManager) -> None:
        if (problem := task.exception()) is not None:
            self._scene.note("daemon", f"could not begin: {problem!r}")
            if not isinstance(problem, PoolError):
                self._scene.fail("a daemon begins or says why not", repr(problem))
            self._kill_in, self._down_s = 0, 5.0
            return
        self._scene.node, self._scene.node_since = node, self._scene.timeline.now
        self._oracle.look_at_boot(self._scene.pools())

    def kill(self, callbacks: int, down_s: float) -> None:
        """Once it has run so many more callbacks; 0: now. Another one begins ``down_s`` later."""
        if self._scene.life is None:
            return
        self._down_s = down_s
        if callbacks:
            self._kill_in = callbacks
        else:
            self._die()

    def _die(self) -> None:
        if self._scene.life is None:
            return
        self._scene.note("daemon", f"number {self._scene.life.number} is killed; the next one begins in {self._down_s:.3f} s")
        self._gone()

    def _gone(self) -> None:
        self._goes_away()
        life, self._scene.life, self._scene.adapters, self._scene.node = self._scene.life, None, None, None
        self._kill_in, self._paused_until, self._scene.machine.daemon = None, 0.0, 0
        self._oracle.daemon_died()
        self._clients.daemon_died()
        self._gateways.daemon_died()
        if life is not None:
            life.end()
        self._scene.lost_s += self._down_s
        self._scene.timeline.after(self._down_s, self.begin)

    def _goes_away(self) -> None:
        if self._scene.away_since <= self._scene.node_since:
            self._scene.away_since = self._scene.timeline.now

    def shut_down(self, down_s: float) -> None:
        """Ask it to end, as a service manager does."""
        if self._scene.node is None or self._scene.life is None:
            return
        life, began = self._scene.life, self._scene.timeline.now
        self._goes_away()

        def over(task: asyncio.Task[None]) -> None:
            if self._scene.life is life:
                if task.exception() is not None:
                    self._scene.fail("a daemon ends when asked to", repr(task.exception()))
                self._scene.note("daemon", f"number {life.number} has ended")
                self._scene.lost_s += self._scene.timeline.now - began
                self._down_s, self._kill_in = down_s, 0

        life.loop.create_task(self._scene.node.shutdown()).add_done_callback(over)

    def pause(self, seconds: float) -> None:
        """As SIGSTOP, and SIGCONT after that."""
        self._paused_until = self._scene.timeline.now + seconds
        self._scene.resumed_at = self._paused_until
        self._scene.lost_s += seconds
        self._gateways.daemon_pauses()

    def calm(self) -> None:
        """No more faults and no more requests; what was about to strike does not."""
        self._scene.ending, self._kill_in = True, None
        self._paused_until = min(self._paused_until, self._scene.timeline.now)
        self._gateways.calm()
        self._scene.machine.heal()
        self._scene.mend_disk()

    def _after_callback(self) -> bool:
        self._oracle.look(self._shown)
        if self._kill_in is not None:
            self._kill_in -= 1
            if self._kill_in < 0:
                return True
        return self._scene.broken is not None
