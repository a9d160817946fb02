"""A driver that shows what a test says."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

from pool_managerd.core.gpu.devices import DeviceScan, DeviceSnapshot, ScanProblem


class FakeMonitor:
    """Sees ``now``: no GPU and no driver, until a test says otherwise. Every look is later than the one before, and none is
    younger than ``clock`` says. ``gate`` holds back every look while it is set.
    """

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        self._clock = clock
        self._taken_at = 0.0
        self.now = DeviceScan(problem=ScanProblem("nvml_unavailable", "there is no NVML library"))
        self.scans = 0
        self.released = False
        self.gate: asyncio.Event | None = None

    def show(self, *devices: DeviceSnapshot, problem: ScanProblem | None = None) -> None:
        """With a ``problem`` and nothing else, the devices are the last known ones, as the real one tells them."""
        devices = self.now.devices if problem is not None and not devices else devices
        self.now = DeviceScan(devices, driver_version="570.86.15", cuda_version="12.8", problem=problem)

    async def scan(self) -> DeviceScan:
        self.scans += 1
        if self.gate is not None:
            await self.gate.wait()
        self._taken_at = max(math.nextafter(self._taken_at, math.inf), self._clock())
        if self.released:
            return replace(self.now, taken_at=self._taken_at, problem=ScanProblem("released", "the library was released"))
        return replace(self.now, taken_at=self._taken_at)

    async def release(self) -> None:
        self.released = True

    async def resume(self) -> None:
        self.released = False
