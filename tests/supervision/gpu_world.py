"""Pools on simulated scans of GPUs."""

from __future__ import annotations

from typing import Any

from pool_managerd.core.gpu.devices import DeviceSnapshot, ScanProblem
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.memory.estimate import EngineSettings
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.supervision.pool import Pool
from pool_managerd.testing.manual_clock import settle
from tests.core.gpus import GIB, gpu
from tests.supervision.test_pools import World

TWO = (gpu(0, 24), gpu(1, 12))


class GpuWorld(World):
    """Pools a, b, c, each needing ``gib`` on one GPU."""

    def __init__(self, *devices: DeviceSnapshot, gib: float = 10, **config: Any) -> None:
        super().__init__(ids=["a", "b", "c"], **config)
        self.fakes.monitor.show(*devices)
        for pool in self.config.pools:
            self.needs(pool.id, gib)

    def needs(self, pool_id: str, gib: float) -> None:
        self.fakes.needs[pool_id] = LaunchInputs("fake-1", pool_id, EngineSettings(), overhead_bytes=int(gib * GIB))

    async def begin(self, pool_id: str) -> Pool:
        """Start and let everything happen that can."""
        pool = self.pools.find(pool_id)
        if pool is None:
            pool = self.pools.add(pool_id, next(p for p in self.config.pools if p.id == pool_id))
        await self.pools.change(pool, "start", ev.Start(), "up", desired="up")
        await settle()
        return pool

    async def see(self, *devices: DeviceSnapshot, problem: ScanProblem | None = None, periodic: bool = True) -> None:
        self.fakes.monitor.show(*devices, problem=problem)
        await self.fakes.watch.rescan(periodic=periodic)
        await settle()

    def phase(self, pool_id: str) -> Phase:
        return self.pools.get(pool_id).instance.phase

    def runs_on(self, pool_id: str) -> list[int]:
        allocation = self.pools.get(pool_id).launch.allocation
        return [] if allocation is None else [d.id for d in allocation.devices]
