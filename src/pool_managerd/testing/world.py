"""A whole node in one process on virtual time: the real supervision, store rules and registry on a simulated machine.

``run(draw(seed))`` plays one scenario and tells which rule was broken, if any. The daemon's own death is one of the faults:
everything of it is gone at that instant, and another one begins on what was on disk and on what runs. At the end every fault
ceases: all pools must become ready, then all are stopped, and nothing may be left.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

from structlog.testing import capture_logs

from pool_managerd.core.event import Event
from pool_managerd.testing.daemons import Daemons
from pool_managerd.testing.ending import Ending
from pool_managerd.testing.gateway_rules import GatewayRules
from pool_managerd.testing.invariants import Oracle
from pool_managerd.testing.scenario import ACQUIRE, APPLY, RELOAD, REQUESTS, YIELD, Action, Scenario
from pool_managerd.testing.scene import Scene, Violation
from pool_managerd.testing.simulated_clients import SimulatedClients
from pool_managerd.testing.simulated_faults import strike
from pool_managerd.testing.simulated_gateways import SimulatedGateways
from pool_managerd.testing.timeline import START_S
from pool_managerd.testing.traffic import THROUGH_GATEWAY

MAX_STEPS = 3_000_000


@dataclass
class Outcome:
    """What a run came to. ``trace`` is what happened, by second: what was done to the node, and the events it told of."""

    scenario: Scenario
    broken: Violation | None
    trace: list[tuple[float, str, Event | str]]
    node_hours: float
    acknowledged: int
    lives: int

    def lines(self) -> list[str]:
        """The trace to read: a line each, seconds from the beginning first."""
        return [f"{at - START_S:12.6f} {_shown(kind, what)}" for at, kind, what in self.trace]


def _shown(kind: str, what: Event | str) -> str:
    if isinstance(what, str):
        return f"* {kind}: {what}"
    return f"  {what.id} {what.level} {what.type}: {what.human}"


class World:
    """One run. ``left_out`` are the indices of actions that do not happen."""

    def __init__(self, scenario: Scenario, left_out: frozenset[int] = frozenset()) -> None:
        scene = self._scene = Scene(scenario)
        self._clients = SimulatedClients(scene)
        self._oracle = Oracle(scene, self._clients)
        self._clients.on_answer = self._oracle.on_request
        rules = GatewayRules(scene)
        self._gateways = SimulatedGateways(scene, self._clients.demand, rules)
        self._daemons = Daemons(scene, self._clients, self._oracle, self._gateways)
        scene.machine.on_launch = self._oracle.engine_started
        for action in scenario.actions:
            if action.index not in left_out:
                scene.timeline.at(START_S + action.at, self._act, action)
        ending = Ending(scene, self._oracle, self._daemons)
        scene.timeline.at(START_S + scenario.hours * 3600, ending.begin)

    def run(self) -> Outcome:
        """To the end, or to the first rule that is broken."""
        scene = self._scene
        self._daemons.begin()
        self._gateways.begin()
        for _ in range(MAX_STEPS):
            if scene.finished or scene.broken is not None or not self._step():
                break
        if not scene.finished:
            scene.fail("a run ends", "nothing happens any more, or too much")
        if scene.life is not None:
            scene.life.end()
        self._gateways.close()
        hours = (scene.timeline.now - START_S) / 3600
        return Outcome(scene.scenario, scene.broken, scene.trace, hours, self._clients.acknowledged, self._daemons.lives)

    def _step(self) -> bool:
        """The next thing that happens, and what the daemon makes of it; false when nothing does any more."""
        timeline = self._scene.timeline
        times = [at for at in (timeline.next_at(), self._daemons.next_at(), self._gateways.next_at()) if at is not None]
        if not times:
            return False
        timeline.now = max(timeline.now, min(times))
        while timeline.happen():
            if self._scene.broken is not None:
                return True
        self._daemons.turn()
        self._gateways.turn()
        return True

    def _act(self, action: Action) -> None:
        scene = self._scene
        if scene.ending:
            return
        pool_id = scene.config.pools[action.pool % len(scene.config.pools)].id
        self._oracle.sweep(scene.pools())
        if action.kind in THROUGH_GATEWAY:
            self._gateways.act(action)
        elif action.kind not in REQUESTS and action.kind not in (RELOAD, APPLY, ACQUIRE, YIELD):
            scene.note("fault", f"{action} {pool_id}")
            strike(scene, self._daemons, action, pool_id)
        elif scene.node is not None:
            self._oracle.on_request(action.kind, pool_id)
            self._clients.ask(action, pool_id, scene.node)


def run(scenario: Scenario, left_out: frozenset[int] = frozenset()) -> Outcome:
    """Play it. Without the garbage collector: what is told of lost tasks must not depend on when it comes by."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with capture_logs():
            return World(scenario, left_out).run()
    finally:
        if collects:
            gc.enable()
