"""What a GPU met just before an engine on it ended is evidence, and of its class."""

from __future__ import annotations

import pytest

from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.core.crash_report import UNDECIDED
from pool_managerd.core.gpu.devices import DeviceIncident
from pool_managerd.testing.manual_clock import settle
from tests.supervision.gpu_world import TWO, GpuWorld


@pytest.mark.parametrize(("xid", "crash"), [(31, "cuda"), (94, "ecc"), (45, "signal")])
async def test_an_xid_of_its_gpu_explains_the_end_of_an_engine(made: list[GpuWorld], xid: int, crash: str) -> None:
    made.append(world := GpuWorld(*TWO))
    await world.begin("a")
    device = TWO[world.runs_on("a")[0]]
    world.fakes.watch.on_incident(DeviceIncident(xid, "kernel_log", uuid=device.uuid))
    world.fakes.launcher.processes[0].end(ExitRecord(signal=6))
    await settle()
    (report,) = world.fakes.crashes.recent("a")
    assert report.crash == crash and f"GPU {device.label} reported Xid {xid}: " in report.evidence[-1].text
    assert report.evidence[-1].source == "kernel_log"


async def test_what_another_gpu_met_or_this_one_long_ago_explains_nothing(made: list[GpuWorld]) -> None:
    made.append(world := GpuWorld(*TWO))
    await world.begin("a")
    own, other = TWO[world.runs_on("a")[0]], TWO[1 - world.runs_on("a")[0]]
    world.fakes.watch.on_incident(DeviceIncident(31, "nvml", uuid=own.uuid))
    await world.fakes.clock.advance(60)
    world.fakes.watch.on_incident(DeviceIncident(31, "nvml", uuid=other.uuid))
    world.fakes.launcher.processes[0].end(ExitRecord(signal=6))
    await settle()
    (report,) = world.fakes.crashes.recent("a")
    assert report.crash == "signal" and len(report.evidence) == 1


async def test_what_is_done_is_added_when_the_memory_was_seen_free(made: list[GpuWorld]) -> None:
    made.append(world := GpuWorld(*TWO))
    pool = await world.begin("a")
    seen: list[str] = []
    world.fakes.events.listen(lambda e: seen.append(str(e.fields.get("action"))) if e.type == "crash" else None)
    world.fakes.launcher.processes[0].end(ExitRecord(signal=11))
    await settle()
    await world.fakes.clock.advance(0.5)
    (report,) = world.fakes.crashes.recent("a")
    assert seen == [UNDECIDED] and report.action.startswith("starting it again in ")
    await world.fakes.clock.advance(5)
    assert pool.instance.epoch == 2 and world.fakes.crashes.recent("a") == [report]
