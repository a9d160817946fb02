from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from pool_managerd.core.gpu.devices import DeviceIncident
from pool_managerd.host.monitor import MonitorLimits, NvmlMonitor
from pool_managerd.host.simulation import simulated_environment
from pool_managerd.host.worker_process import WorkerOptions, Workers
from tests.host.simulated import ONE_24, topology

QUICK = MonitorLimits(first_s=5.0, later_s=1.0, death_s=2.0, backoff_s=0.05)


class Bench:
    """A monitor on simulated GPUs, and what it told of them."""

    def __init__(self, file: Path, library: Path, kmsg: Path | None = None, limits: MonitorLimits = QUICK) -> None:
        self.file = file
        self.incidents: list[DeviceIncident] = []
        self.options = WorkerOptions(simulated_environment(library, file), kmsg)
        self.monitor = NvmlMonitor(on_incident=self.incidents.append, workers=Workers(self.options), limits=limits)

    def becomes(self, text: str, *lines: str) -> None:
        topology(self.file, text, *lines)


@pytest.fixture
async def make_bench(tmp_path: Path, simulated_driver: Path) -> AsyncIterator[Callable[..., Bench]]:
    """Monitors on a topology, closed with the test."""
    made: list[Bench] = []

    def make(text: str = ONE_24, *lines: str, **options: object) -> Bench:
        file = topology(tmp_path / f"gpus-{len(made)}", text, *lines)
        made.append(Bench(file, simulated_driver, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for bench in made:
        await bench.monitor.close()


@pytest.fixture(scope="session")
def simulated_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the simulated libnvidia-ml.so.1."""
    from pool_managerd.host.simulation import build_simulated_driver

    return build_simulated_driver(tmp_path_factory.mktemp("simulated-driver"))
