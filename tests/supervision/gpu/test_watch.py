"""What is made of Xid events: which GPU they count against, and when the GPUs are scanned at for them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from pool_managerd.core.gpu.devices import DeviceIncident, DeviceScan, ScanProblem
from pool_managerd.core.gpu.health import Probation, Quarantined
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.errors import NodeError
from pool_managerd.supervision.gpu.watch import MAX_EARLY
from pool_managerd.testing.manual_clock import settle
from tests.supervision.gpu_world import TWO, GpuWorld

FELL_OFF = DeviceIncident(79, "kernel_log", pci_bus_id="0000:02:00")
SECOND = TWO[1].uuid


@pytest.fixture
async def world() -> AsyncIterator[GpuWorld]:
    made = GpuWorld(*TWO)
    yield made
    await made.pools.close()


async def test_an_xid_of_a_gpu_that_is_gone_does_not_bar_it_when_it_is_back(world: GpuWorld) -> None:
    await world.see(*TWO)
    await world.see(TWO[0])
    world.fakes.watch.on_incident(FELL_OFF)
    for _ in range(3):
        await world.see(*TWO)
    assert world.fakes.watch.health_of(SECOND).usable, "that it was away is the evidence of a reset"


async def test_an_xid_that_is_told_before_the_first_scan_counts_against_its_gpu(world: GpuWorld) -> None:
    world.fakes.watch.on_incident(FELL_OFF)
    await world.see(*TWO)
    health = world.fakes.watch.health_of(SECOND)
    assert isinstance(health.state, Quarantined) and "Xid 79" in str(health.state.reason)


async def test_an_xid_from_when_the_gpus_could_not_be_seen_counts_however_long_that_took(world: GpuWorld) -> None:
    await world.see(problem=ScanProblem("nvml_hung", "it hangs"))
    for _ in range(MAX_EARLY):  # the kernel repeats itself, which must leave room for another GPU's
        world.fakes.watch.on_incident(DeviceIncident(119, "kernel_log", pci_bus_id="0000:01:00", text="Timeout after 6s"))
    world.fakes.watch.on_incident(FELL_OFF)
    await world.fakes.clock.advance(3600)
    await world.see(problem=ScanProblem("nvml_hung", "it hangs"))
    await world.see(*TWO)
    assert not any(world.fakes.watch.health_of(d.uuid).usable for d in TWO)


async def test_releasing_the_driver_is_no_evidence_of_a_reset(world: GpuWorld) -> None:
    watch = world.fakes.watch
    await world.see(*TWO)
    watch.on_incident(DeviceIncident(119, "nvml", uuid=SECOND))
    await watch.release()
    await watch.resume()
    for _ in range(4):
        await world.see(*TWO)
    health = watch.health_of(SECOND)
    assert isinstance(health.state, Quarantined) and f"devices uncordon {SECOND}" in health.remedy
    await watch.uncordon("1")
    assert watch.health_of(SECOND).usable


async def test_the_xids_of_programs_do_not_make_the_gpus_be_scanned(world: GpuWorld) -> None:
    watching = asyncio.create_task(world.fakes.watch.run())
    await world.see(*TWO)
    world.fakes.watch.wake()
    await settle()
    before = world.fakes.monitor.scans
    for _ in range(5):
        world.fakes.watch.on_incident(DeviceIncident(31, "kernel_log", pci_bus_id="0000:02:00"))
        await settle()
    assert world.fakes.monitor.scans == before
    world.fakes.watch.on_incident(DeviceIncident(63, "kernel_log", pci_bus_id="0000:02:00"))
    await settle()
    watching.cancel()
    assert world.fakes.monitor.scans == before + 1, "an Xid that may be the GPU's does"


# --- scans that cross each other ---


async def test_an_older_scan_that_ends_later_changes_nothing(world: GpuWorld) -> None:
    await world.see(*TWO)
    answer: asyncio.Future[DeviceScan] = asyncio.get_running_loop().create_future()
    world.fakes.monitor.scan = lambda: answer  # type: ignore[assignment,return-value]
    slow = asyncio.create_task(world.fakes.watch.rescan())
    await settle()
    del world.fakes.monitor.scan
    newer = await world.fakes.watch.rescan()
    answer.set_result(DeviceScan(TWO[:1], taken_at=math.nextafter(newer.taken_at, 0.0)))
    assert await slow is newer is world.fakes.watch.scan
    assert world.fakes.watch.health_of(SECOND).usable, "it did not see a GPU that the newer one saw"


@pytest.mark.parametrize("order", [(False, True), (True, False)])
async def test_a_periodic_scan_counts_once_for_a_probation_whoever_shares_its_answer(
    world: GpuWorld, order: tuple[bool, bool]
) -> None:
    await world.see(*TWO)
    await world.see(TWO[0])
    watch = world.fakes.watch
    for number in range(3):
        answer: asyncio.Future[DeviceScan] = asyncio.get_running_loop().create_future()
        world.fakes.monitor.scan = lambda shared=answer: shared  # type: ignore[method-assign,misc]
        scans = [asyncio.create_task(watch.rescan(periodic=periodic)) for periodic in order]
        await settle()
        answer.set_result(DeviceScan(TWO, taken_at=9000.0 + number))
        await asyncio.gather(*scans)
        assert watch.health_of(SECOND).usable == (number == 2)


async def test_a_periodic_scan_that_begins_during_another_one_counts_once(world: GpuWorld) -> None:
    await world.see(*TWO)
    await world.see(TWO[0])
    answers: list[asyncio.Future[DeviceScan]] = [asyncio.get_running_loop().create_future() for _ in range(2)]
    asked: Iterator[Any] = iter(answers)
    world.fakes.monitor.scan = lambda: next(asked)  # type: ignore[method-assign]
    scans = [asyncio.create_task(world.fakes.watch.rescan(periodic=periodic)) for periodic in (False, True)]
    await settle()
    for number, answer in enumerate(answers):
        answer.set_result(DeviceScan(TWO, taken_at=9000.0 + number))
        await settle()
    await asyncio.gather(*scans)
    state = world.fakes.watch.health_of(SECOND).state
    assert isinstance(state, Probation) and state.healthy_scans == 1


async def test_a_periodic_scan_that_told_nothing_leaves_no_count_to_the_next(world: GpuWorld) -> None:
    await world.see(*TWO)
    await world.see(TWO[0])
    await world.see(problem=ScanProblem("nvml_hung", "it hangs"))
    for _ in range(5):
        await world.see(*TWO, periodic=False)
    state = world.fakes.watch.health_of(SECOND).state
    assert isinstance(state, Probation) and state.healthy_scans == 0


async def test_one_wake_is_one_scan(world: GpuWorld) -> None:
    watching = asyncio.create_task(world.fakes.watch.run())
    world.fakes.monitor.show(*TWO)
    world.fakes.watch.wake()
    await settle()
    before = world.fakes.monitor.scans
    for _ in range(5):
        await world.fakes.clock.advance(1)
    watching.cancel()
    assert before == 1 and world.fakes.monitor.scans == before, "nobody scans without a pause"


async def test_an_xid_that_comes_while_a_cordon_is_written_is_kept_beside_it(world: GpuWorld) -> None:
    await world.see(*TWO)
    watch, written = world.fakes.watch, asyncio.Event()
    put = world.fakes.records.put_fact

    async def slowly(kind: str, key: str, value: Mapping[str, Any] | None) -> None:
        await written.wait()
        await put(kind, key, value)

    world.fakes.records.put_fact = slowly  # type: ignore[method-assign]
    cordon = asyncio.create_task(watch.cordon("1"))
    await settle()
    watch.on_incident(FELL_OFF)
    written.set()
    await cordon
    health = watch.health_of(SECOND)
    assert isinstance(health.state, Quarantined) and health.cordoned and "Xid 79" in str(health.state.reason)


async def test_a_release_that_fails_is_told_and_the_gpus_are_scanned_on(world: GpuWorld) -> None:
    await world.see(*TWO)
    watching = asyncio.create_task(world.fakes.watch.run())

    async def stuck() -> None:
        raise NodeError("cannot release the GPU driver: process 7 is stuck in it and cannot be killed")

    world.fakes.monitor.release = stuck  # type: ignore[method-assign]
    before = world.fakes.monitor.scans
    with pytest.raises(NodeError, match="process 7 is stuck"):
        await world.fakes.watch.release()
    await settle()
    watching.cancel()
    assert world.fakes.monitor.scans == before + 1 and not world.fakes.watch.scan.stale
    assert not [event for event in world.fakes.told if event.type == "devices_released"]


# --- GPUs that cannot be read, that move, that are gone ---


async def test_a_gpu_that_cannot_be_read_ends_no_engine_and_takes_no_start_and_the_others_go_on(world: GpuWorld) -> None:
    world.needs("b", 20)
    for pool_id in "ab":
        await world.begin(pool_id)
    assert (world.runs_on("a"), world.phase("b")) == ([0], Phase.BACKOFF)
    unreadable = replace(TWO[0], unreadable="UNKNOWN (999)")
    await world.see(unreadable, TWO[1])
    a = world.pools.get("a")
    assert view(a.state).ready and not a.state.quarantined
    assert not world.fakes.watch.effective_health(unreadable.uuid).usable
    await world.begin("c")
    assert world.runs_on("c") == [1]
    await world.see(*TWO)
    assert world.fakes.watch.effective_health(TWO[0].uuid).usable
    told = [(e.type, e.human) for e in world.fakes.told if e.type in ("device_unclear", "device_clear")]
    assert told == [
        ("device_unclear", "GPU 0 cannot be read: UNKNOWN (999); nothing new starts on it, what runs there goes on"),
        ("device_clear", "GPU 0 can be read again"),
    ]


async def test_a_start_that_must_be_on_a_gpu_that_cannot_be_read_is_refused_and_says_so() -> None:
    world = GpuWorld(*TWO, pool={"devices": [0]})
    await world.see(replace(TWO[0], unreadable="UNKNOWN (999)"), TWO[1])
    a = await world.begin("a")
    assert "cannot start pool a: GPU 0 cannot be read: UNKNOWN (999)" in str(a.state.last_error)
    await world.see(*TWO)
    await world.fakes.clock.advance(5)
    assert view(a.state).ready, "by itself, when it can be read"
    await world.pools.close()


async def test_a_gpu_that_is_gone_is_not_called_by_the_index_that_another_one_took(world: GpuWorld) -> None:
    await world.see(*TWO)
    await world.see(replace(TWO[1], id=0))
    watch = world.fakes.watch
    gone, there = watch.health_of(TWO[0].uuid), watch.health_of(SECOND)
    assert (gone.label, there.label) == (TWO[0].uuid, "0")
    assert gone.objection.startswith(f"GPU {TWO[0].uuid} is quarantined: it is lost: it is no longer there")
    await watch.uncordon("0")
    assert not watch.health_of(TWO[0].uuid).usable, "that was the GPU that is called 0 now"
    await world.see(*TWO)
    assert watch.health_of(TWO[0].uuid).label == "0"
