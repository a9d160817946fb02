"""What there is in one simulated run, for all who play in it: time, machine, disk, the daemon that runs now, what happened."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random
from typing import Any

from pool_managerd.core.event import Event
from pool_managerd.core.intent import StoredPool
from pool_managerd.node import PoolManager
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pool import Pool
from pool_managerd.testing.life import Life
from pool_managerd.testing.scenario import GPU_BYTES, Scenario
from pool_managerd.testing.simulated_disk import SimulatedDisk
from pool_managerd.testing.simulated_machine import Downloads, SimulatedMachine
from pool_managerd.testing.simulated_node import SimulatedAdapters
from pool_managerd.testing.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Violation:
    """``rule`` was broken at second ``at``; ``what`` shows it."""

    rule: str
    what: str
    at: float


class Scene:
    """``life``, ``adapters`` and ``node`` are those of the daemon that runs, None while none does or it has not come up.

    ``broken`` is the first rule that was broken. ``node_since`` is when the daemon that runs came up, ``away_since`` when one
    went away last. ``resumed_at`` is when a daemon began or went on last, ``lost_s`` how long none
    did anything in all.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.config = scenario, scenario.node_config()
        self.timeline, self.disk = Timeline(), SimulatedDisk()
        self.machine = SimulatedMachine(self.timeline, Random(f"machine {scenario.seed}"), scenario.gpus, GPU_BYTES)
        self.machine.attributable, self.machine.sleepers = scenario.attributable, scenario.sleepers
        self.machine.downloads = Downloads(scenario.downloads, scenario.seed)
        self.trace: list[tuple[float, str, Event | str]] = []
        self.broken: Violation | None = None
        self.life: Life | None = None
        self.adapters: SimulatedAdapters | None = None
        self.node: PoolManager | None = None
        self.booted_with: dict[str, StoredPool] = {}
        self.lease_epochs: dict[str, int] = {}
        self.disk_failed_at = self.away_since = float("-inf")
        self.node_since = float("-inf")
        self.resumed_at = self.lost_s = 0.0
        self.ending = self.finished = False

    def fail(self, rule: str, what: str) -> None:
        """A rule is broken: the run ends with it."""
        if self.broken is None:
            self.broken = Violation(rule, what, self.timeline.now)

    def mend_disk(self) -> None:
        """It can be written again."""
        self.disk.fails = False
        self.disk_failed_at = max(self.disk_failed_at, self.timeline.now)
        if self.adapters is not None:
            self.adapters.store.retry()

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
