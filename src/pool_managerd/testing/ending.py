"""How every simulated run ends: all faults cease, every pool must become ready, then all are stopped, and nothing may be left."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from pool_managerd.core.lifecycle import view
from pool_managerd.errors import PoolError
from pool_managerd.supervision.pool import Pool
from pool_managerd.testing.daemons import Daemons
from pool_managerd.testing.invariants import Oracle
from pool_managerd.testing.scene import Scene

HEALING_S = 2_400.0
"""So long it may take until everything that can run is ready."""
CLEARING_S = 60.0
GONE_S = 30.0


class Ending:
    """Of one run. It does what a person would do: lift what holds pools back, start them, and stop them in the end."""

    def __init__(self, scene: Scene, oracle: Oracle, daemons: Daemons) -> None:
        self._scene, self._oracle, self._daemons = scene, oracle, daemons

    def begin(self) -> None:
        """From here on nothing goes wrong any more."""
        scene = self._scene
        scene.note("world", "every fault is over")
        self._daemons.calm()
        scene.timeline.after(CLEARING_S, self._want_all, scene.timeline.now + HEALING_S)

    def _want_all(self, until: float) -> None:
        scene, over = self._scene, self._scene.timeline.now > until
        if scene.node is None:
            if over:
                scene.fail("without faults a daemon comes up", "none did")
            scene.timeline.after(CLEARING_S, self._want_all, until)
            return
        self._oracle.sweep(scene.pools())
        runnable = [pool for pool in scene.pools() if pool.current and (pool.config is not None or pool.submitted is not None)]
        unready = [pool for pool in runnable if not view(pool.state).ready and pool.state.reason != "not_together"]
        if unready and over and not scene.scenario.tight:
            scene.fail("without faults every pool becomes ready", str(unready[0].state))
        if not unready or over:
            self._do(self._stop_all())
            return
        for pool in unready:
            self._do(self._bring_up(pool))
        scene.timeline.after(CLEARING_S, self._want_all, until)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        self._scene.life_loop().create_task(work)

    async def _bring_up(self, pool: Pool) -> None:
        scene, pool_id = self._scene, pool.pool_id
        node = scene.node
        if node is None:
            return
        for gpu in scene.machine.gpus:
            await self._tried(node.uncordon(gpu.uuid))
        if node.yields():
            await self._tried(node.end_yield())
        for ask in (node.release, node.reset_breaker, node.start):
            if not view(pool.state).ready:
                self._oracle.on_request("start", pool_id)
                await self._tried(ask(pool_id))

    async def _stop_all(self) -> None:
        node = self._scene.node
        if node is None:
            return
        for pool_id in node.pool_ids():
            await self._tried(node.stop(pool_id))
        self._scene.timeline.after(GONE_S, self._look_for_remains)

    async def _tried(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await work
        except PoolError as problem:
            self._scene.note("refused", f"{problem.code}: {problem.message}")

    def _look_for_remains(self) -> None:
        """Half a minute after the last stop nothing is left of anything."""
        scene, machine = self._scene, self._scene.machine
        self._oracle.sweep(scene.pools())
        left: dict[str, list[Any]] = {
            "second engines": [pool.instance for pool in scene.pools() if not pool.current],
            "processes": [engine.pid for engine in machine.running()],
            "pid files": sorted(machine.pids), "handoff files": sorted(machine.handoffs),
            "GPU memory": [gpu for gpu in machine.gpus if gpu.held],
            "reservations": scene.adapters.gpus.memory.ledger.all() if scene.adapters is not None else [],
            "operations": [row for row in (scene.node.operations() if scene.node else []) if row["status"] == "running"],
        }  # fmt: skip
        for name, things in left.items():
            if things:
                scene.fail("nothing is left after all was stopped", f"{name}: {things}")
        scene.finished = True
