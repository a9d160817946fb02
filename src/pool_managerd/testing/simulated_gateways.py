"""The gateways of a simulated run, one after the other: each is a process of its own that outlives the daemons, and may be
paused, asked to end, and killed as they are.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from random import Random

from pool_managerd.errors import PoolError
from pool_managerd.gateway.leasing import Leasing
from pool_managerd.gateway.sharing import Common, holders
from pool_managerd.testing.gateway_rules import GatewayRules
from pool_managerd.testing.scenario import Action
from pool_managerd.testing.scene import Scene
from pool_managerd.testing.simulated_demand import Demand
from pool_managerd.testing.simulated_link import SimulatedLink
from pool_managerd.testing.simulated_requests import BrokenAnswerError, Service, SimulatedRequest
from pool_managerd.testing.traffic import ASK, GATEWAY_END, GATEWAY_KILL, GATEWAY_PAUSE, UNLOAD, Traffic
from pool_managerd.testing.virtual_loop import VirtualLoop


class GatewayLife:
    """One gateway, from its start to its end."""

    def __init__(self, number: int, scene: Scene, traffic: Traffic, demand: Demand, rules: GatewayRules) -> None:
        self.number, seed, timeline = number, scene.scenario.seed, scene.timeline
        self.loop = VirtualLoop(lambda: timeline.now, Random(f"gateway order {seed} {number}"))  # type: ignore[abstract]
        self.link = SimulatedLink(scene, Random(f"link {seed} {number}"), demand, rules.lost)
        common = Common(holders=holders(number), token=f"{seed}")
        self.leasing = Leasing(self.link, traffic.times, common, self.loop.time)
        self.service = Service(scene, self.leasing, rules)
        self.following = self.loop.create_task(self.leasing.run())
        self.ending = False


class SimulatedGateways:
    """One at a time; none in runs without traffic. ``requests`` are those in flight."""

    def __init__(self, scene: Scene, demand: Demand, rules: GatewayRules) -> None:
        self._scene, self._demand, self._rules, self._traffic = scene, demand, rules, scene.scenario.traffic
        self._life: GatewayLife | None = None
        self._number, self._paused_until, self._down_s = 100, 0.0, 1.0
        self._chance = Random(f"gateways {scene.scenario.seed}")

    def next_at(self) -> float | None:
        """When the one that runs has something to do again; None for never."""
        at, now = None if self._life is None else self._life.loop.next_at(), self._scene.timeline.now
        return at if at is None or self._paused_until <= now else max(at, self._paused_until)

    def turn(self) -> None:
        """It does what there is to do now, unless it is paused."""
        life, scene = self._life, self._scene
        if life is None or scene.timeline.now < self._paused_until:
            return
        life.loop.turn()
        if life.loop.problems:
            scene.fail("no exception is left to nobody", life.loop.problems[0])
        if life.following.done() and not life.ending:
            scene.fail("a gateway follows the daemon until it ends", repr(life.following))

    def begin(self) -> None:
        """Where the scenario has traffic."""
        if self._traffic is None or self._life is not None:
            return
        self._number += 1
        self._life = GatewayLife(self._number, self._scene, self._traffic, self._demand, self._rules)
        self._rules.begins(self._number)
        self._scene.note("gateway", f"number {self._number} begins")

    # --- what the scenario says ---

    def act(self, action: Action) -> None:
        """One thing that is drawn."""
        if self._traffic is None or self._life is None:
            return
        match action.kind:
            case _ if action.kind == ASK:
                self._ask(action, self._life)
            case _ if action.kind == UNLOAD:
                self._unload(action, self._life)
            case _ if action.kind == GATEWAY_KILL:
                self._kill(0.05 + 30 * action.share**4)
            case _ if action.kind == GATEWAY_END:
                self._end(self._life, 0.05 + 30 * action.share**4)
            case _ if action.kind == GATEWAY_PAUSE:
                self._pause(60.0 * action.share**3)

    def _ask(self, action: Action, life: GatewayLife) -> None:
        """One request, or several at the same time."""
        scene, models = self._scene, self._models()
        chance = Random(f"ask {scene.scenario.seed} {action.index}")
        if life.ending:
            return
        for n in range(1 + (action.number % 24 if action.number % 5 == 0 else 0)):
            request = SimulatedRequest.drawn(f"{action.index}.{n}", models, chance, scene.timeline.now)
            task = request.task = life.loop.create_task(life.service.run(request))
            scene.note("gateway", f"is asked for {request.model} ({request.name}), {request.length_s:.3f} s")
            self._rules.asked(request)
            task.add_done_callback(partial(self._answered, request))
            if chance.random() < 0.3:
                scene.timeline.after(chance.expovariate(1 / chance.choice((0.01, 1.0, 20.0))), self._goes_away, life, request)

    def _models(self) -> list[str]:
        """Ids, aliases and the name that is shared; more often those that are not wrong."""
        names = [name for pool in self._scene.config.pools for name in (pool.id, *pool.aliases, pool.served_name) if name]
        return [*names, *names, *names, "nobody"]

    def _goes_away(self, life: GatewayLife, request: SimulatedRequest) -> None:
        if life is self._life and request.task is not None:
            request.task.cancel()

    def _answered(self, request: SimulatedRequest, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        self._rules.over(request, error)
        told = "went away" if task.cancelled() else "was answered" if error is None else f"was not served: {error!r}"
        self._scene.note("gateway", f"{request.name} {told}")
        if error is not None and not isinstance(error, PoolError | BrokenAnswerError):
            self._scene.fail("a request ends with an answer or a PoolError", f"{request}: {error!r}")

    def _unload(self, action: Action, life: GatewayLife) -> None:
        pool = self._scene.config.pools[action.pool % len(self._scene.config.pools)]

        def over(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            self._scene.note("gateway", f"unloaded {pool.id}: {error!r}")
            if error is not None and not isinstance(error, PoolError):
                self._scene.fail("a request ends with an answer or a PoolError", f"unload: {error!r}")

        life.loop.create_task(life.leasing.unload(pool.id)).add_done_callback(over)

    # --- its own fate ---

    def _pause(self, seconds: float) -> None:
        self._scene.note("gateway", f"stands for {seconds:.3f} s")
        self._paused_until = max(self._paused_until, self._scene.timeline.now + seconds)
        self._rules.disturbed(self._paused_until)

    def _kill(self, down_s: float) -> None:
        if self._life is None:
            return
        life, self._life = self._life, None
        self._scene.note("gateway", f"number {life.number} is gone; the next one begins in {down_s:.3f} s")
        self._paused_until = 0.0
        life.link.process_died()
        life.loop.end()
        self._rules.ended(life.number)
        if self._chance.random() < 0.5:  # the daemon's own: it sees the end of the process
            self._scene.timeline.after(self._chance.random() ** 2, self._tell_daemon, life.number)
        self._scene.timeline.after(down_s, self.begin)

    def _tell_daemon(self, number: int) -> None:
        node = self._scene.node
        if node is not None:
            self._rules.freed(number)
            self._scene.life_loop().call_soon(node.gateway_is_gone, number)

    def _end(self, life: GatewayLife, down_s: float) -> None:
        """As SIGTERM: requests end, and its leases go back."""
        if life.ending:
            return
        life.ending = True
        life.loop.create_task(self._ended(life)).add_done_callback(
            lambda _: self._scene.timeline.after(0.0, self._gone, life, down_s)
        )

    async def _ended(self, life: GatewayLife) -> None:
        for request in self._rules.live():
            if request.task is not None:
                request.task.cancel()
        await asyncio.sleep(0)
        life.following.cancel()
        with suppress(TimeoutError):
            await life.leasing.close()

    def _gone(self, life: GatewayLife, down_s: float) -> None:
        if self._life is life:
            self._kill(down_s)

    def calm(self) -> None:
        """No more faults, and no more traffic: whoever is served still is."""
        self._paused_until = min(self._paused_until, self._scene.timeline.now)
        self.begin()
        if self._life is not None:
            for request in self._rules.live():
                self._goes_away(self._life, request)

    def close(self) -> None:
        """The run is over."""
        if self._life is not None:
            self._life.loop.end()

    # --- the daemon's fate ---

    def daemon_died(self) -> None:
        """Its connections to the gateway are reset."""
        if self._life is not None:
            self._life.link.daemon_died()

    def daemon_pauses(self) -> None:
        """It says nothing for a while."""
        self._rules.daemon_stands(self._scene.resumed_at)
        if self._life is not None:
            self._life.link.daemon_pauses()
