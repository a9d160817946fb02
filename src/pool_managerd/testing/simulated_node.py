"""A node whose every adapter is simulated: the real ``PoolManager`` on the parts of one daemon's life."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from random import Random
from typing import TYPE_CHECKING, Any, cast

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.baselines import Baselines
from pool_managerd.core.handoff import Handoff
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.memory.estimate import EngineSettings
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.core.preflight import Report
from pool_managerd.core.registry import KeptLeases, LeaseChange, Registry
from pool_managerd.node import PoolManager
from pool_managerd.supervision.boot_gate import BootGate
from pool_managerd.supervision.crash_log import CrashLog
from pool_managerd.supervision.epochs import Epochs
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.gpu.admission import Admission, AdmissionRules
from pool_managerd.supervision.gpu.mask_gpus import MaskGpus
from pool_managerd.supervision.gpu.pool_gpus import Gpus
from pool_managerd.supervision.gpu.watch import GpuWatch, WatchSettings
from pool_managerd.supervision.gpu.yields import Yields
from pool_managerd.supervision.histories import Histories
from pool_managerd.supervision.services import Services
from pool_managerd.testing.life import Life
from pool_managerd.testing.simulated_processes import SimulatedAdoption, SimulatedLauncher
from pool_managerd.testing.simulated_slots import SimulatedSlots
from pool_managerd.testing.simulated_staging import (
    SimulatedEngines,
    SimulatedFiles,
    SimulatedHandoffs,
    SimulatedModels,
    SimulatedShelf,
)
from pool_managerd.testing.simulated_stores import SimulatedJournal, SimulatedLeases, SimulatedState
from pool_managerd.testing.simulated_watch import SimulatedListeners, SimulatedMonitor, SimulatedProber, SimulatedUsages
from pool_managerd.wiring.adapters import Adapters
from pool_managerd.wiring.gpu_parts import free_rules

if TYPE_CHECKING:
    from pool_managerd.testing.timeline import Timeline

BOOT_ID = "boot"
RAM_BYTES = 64 << 30


class SimulatedClock:
    """Virtual time, as the daemon's loop has it."""

    def __init__(self, life: Life, timeline: Timeline) -> None:
        self._life, self._timeline = life, timeline

    def monotonic(self) -> float:
        return self._timeline.now

    def wall_ms(self) -> int:
        return self._timeline.wall_ms()

    def call_at(self, when: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self._life.loop.call_at(when, call)


class SimulatedGpuParts:
    """What the node asks of its GPU parts beside the watch."""

    notices: tuple[str, ...] = ()

    def ram(self) -> tuple[int, int]:
        return RAM_BYTES, RAM_BYTES


class SimulatedAdapters:
    """As ``wiring.adapters.Adapters``. ``needs`` is what each pool's engine takes of GPU memory, in bytes; ``seed`` makes the
    ids of this run's leases and operations.
    """

    def __init__(self, config: Config, life: Life, needs: Mapping[str, int], seed: str) -> None:
        self.config, self._life, self._needs, self._seed = config, life, needs, seed
        self._sizes_known = Random(f"sizes {seed}").random() < 0.5  # in some runs: then two engines of a pool may run
        self.clock = SimulatedClock(life, life.machine.timeline)
        self.journal, self.store, self.leases = SimulatedJournal(life), SimulatedState(life), SimulatedLeases(life)
        self.events = EventLog(self.clock.wall_ms, None, self.journal)
        self.kept_leases: list[KeptLeases] = []
        self.on_lease: Callable[[LeaseChange], None] = lambda change: None
        self.registry = Registry(self.clock.wall_ms, salt=f"{seed}:{life.number}", on_lease=self._lease)
        self.files, self.models, self.engines = SimulatedFiles(life), SimulatedModels(life), SimulatedEngines(life)
        self.shelf = SimulatedShelf()
        self.prober, self.monitor = SimulatedProber(life), SimulatedMonitor(life)
        self._adoption = SimulatedAdoption(life)
        self.notices: list[str] = []
        self.fatal: Callable[[BaseException], None] = lambda problem: None
        self.gpu_parts = SimulatedGpuParts()
        watch = GpuWatch(
            self.monitor, self.clock, self.events, self.store, WatchSettings(config.gpu.rescan_interval_ms / 1000, BOOT_ID)
        )
        yields = Yields(watch, self.clock, self.events, self.store, lambda: free_rules(self.config))
        self.gpus = Gpus(watch, self.registry, self.clock, MaskGpus(self.store), yields)
        rules = AdmissionRules(cpu_allowed=True, fit=config.gpu.fit)
        self.services = Services(
            clock=self.clock, registry=self.registry, events=self.events, crashes=CrashLog(self.journal),
            epochs=Epochs(self.store),
            histories=Histories(self.store, BOOT_ID), baselines=Baselines(), launcher=SimulatedLauncher(life, self.files),
            adoption=self._adoption, models=self.models, engines=self.engines, files=self.files, prober=self.prober,
            listener=SimulatedListeners(life), usages=SimulatedUsages(life), records=self.store,
            gate=BootGate(config.daemon.preload_parallelism),
            preflight=self._preflight, gpus=self.gpus,
            admission=Admission(self.gpus, self._size, lambda: RAM_BYTES, self.store, rules, config.together.rules),
            sizer=self._size, slots=SimulatedSlots(life), node_id="simulated", on_fatal=self._on_fatal,
        )  # fmt: skip
        self._ids = 0

    parse_prepared = staticmethod(Adapters.parse_prepared)
    prepared_to_json = staticmethod(Adapters.prepared_to_json)

    def _on_fatal(self, problem: BaseException) -> None:
        self.fatal(problem)

    def _lease(self, change: LeaseChange) -> None:
        self.on_lease(change)
        self.leases.put(change)

    def new_id(self) -> str:
        self._ids += 1
        return f"op-{self._life.number}-{self._ids}"

    def use_config(self, config: Config) -> None:
        """Other pools, and sections that a running daemon takes over."""
        self.config = config
        self.services.admission.together = config.together.rules

    def claim(self) -> None:
        """There is one daemon at a time."""

    def unclaim(self) -> None:
        """Nothing was taken."""

    async def open(self) -> dict[str, StoredPool]:
        """As the real one, in its order."""
        self.events.restore()
        self.services.crashes.restore()
        await self._life.pass_time(0.0, 0.01)
        stored = self.store.open()
        self.kept_leases = self.leases.open()
        self._adoption.find()
        await self._life.pass_time(0.0, 0.1)
        return stored

    async def close(self) -> None:
        for store in (self.store, self.leases, self.journal):
            await store.close()

    def own_tasks(
        self, on_handoff: Callable[[Handoff, float], None], on_error: Callable[[str, str], None]
    ) -> dict[str, Callable[[], Coroutine[Any, Any, None]]]:
        return {"the watch of handoff files": SimulatedHandoffs().run, "the watch of the GPUs": self.gpus.watch.run}

    async def _preflight(self, pool_id: str) -> Report:
        return Report("dev", ())

    async def _size(self, pool: PoolConfig | None, submitted: PreparedEngine | None) -> LaunchInputs:
        pool_id = submitted.pool_id if submitted is not None else pool.id if pool is not None else ""
        needs = self._needs.get(pool_id, 0)
        said = max(1, needs) if self._sizes_known else None
        return LaunchInputs("simulated-1", pool_id, EngineSettings(), overhead_bytes=needs, configured_bytes=said)


def simulated_node(adapters: SimulatedAdapters) -> PoolManager:
    """The node itself; nothing of it is simulated."""
    return PoolManager(adapters.config, cast("Adapters", adapters))
