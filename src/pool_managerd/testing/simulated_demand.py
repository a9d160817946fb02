"""What gateways ask of a simulated daemon, as far as it bears on what its clients were promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from pool_managerd.testing.scene import Scene
from pool_managerd.testing.simulated_promises import Promise

AFTER_S = 60.0
"""So long what was asked for may still be made room for."""


class Demand:
    """``desired`` are the clients' promises. ``on_demand`` hears of the pools that are asked for, at both ends of a call.

    Demand starts what is not stopped, and leaves alone what a person has stopped or drained.
    """

    def __init__(self, scene: Scene, desired: dict[str, Promise], on_demand: Callable[[str], None]) -> None:
        self._scene, self._desired, self._on_demand = scene, desired, on_demand
        self._asked: Counter[str] = Counter()
        self._evicts_until = float("-inf")

    def begins(self, model: str | None, *, evicts: bool) -> None:
        """A call of a gateway has arrived; without a ``model`` it wants no slot."""
        if evicts or model is not None:
            self._evicts_until = self._scene.timeline.now + AFTER_S
        for pool_id in self._pools(model):
            self._asked[pool_id] += 1
            self._on_demand(pool_id)
            promise = self._desired[pool_id]
            if not promise.possible <= {"down", "drained"}:
                promise.possible = promise.possible | {"auto"}

    def ends(self, model: str | None, *, evicts: bool) -> None:
        """It was answered, or nobody waits for the answer."""
        if evicts:
            self._evicts_until = self._scene.timeline.now + AFTER_S
        for pool_id in self._pools(model):
            self._asked[pool_id] -= 1
            self._on_demand(pool_id)
            self._evicts_until = self._scene.timeline.now + AFTER_S

    def of(self, pool_id: str) -> bool:
        """Somebody waits for it."""
        return self._asked[pool_id] > 0

    def evicts_until(self) -> float:
        """Until when others may have to make room for it."""
        return self._scene.timeline.now if self._asked.total() else self._evicts_until

    def daemon_died(self) -> None:
        """Nobody waits any more."""
        if self._asked.total():
            self._evicts_until = self._scene.timeline.now
        self._asked.clear()

    def _pools(self, model: str | None) -> list[str]:
        """Those that answer to the name."""
        pools = self._scene.config.pools
        if any(pool.id == model for pool in pools):
            return [model or ""]
        return [pool.id for pool in pools if model in (pool.served_name, *pool.aliases)]
