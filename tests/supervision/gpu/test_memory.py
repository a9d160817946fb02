"""When an ended engine's memory is seen free, where pids can be matched and where not, and what is learnt from it."""

from __future__ import annotations

import asyncio

import pytest

from pool_managerd.core.artifacts import ExitRecord, PreparedEngine
from pool_managerd.core.gpu.devices import DeviceScan, DeviceSnapshot, ScanProblem
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import PoolError
from pool_managerd.supervision.pool import Pool
from pool_managerd.testing.manual_clock import settle
from tests.core.gpus import GIB, gpu, process
from tests.supervision.gpu_world import GpuWorld


async def test_a_stop_is_complete_when_the_memory_is_seen_free_and_not_before(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    a = await world.begin("a")
    await world.see(gpu(0, 24, processes=(process(4000, 9, start_ticks=5),)))
    stop = await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    world.fakes.monitor.show(gpu(0, 24, processes=(process(4000, 9),)))
    await settle()
    assert world.phase("a") is Phase.STOPPING and stop.status == "running"
    assert world.fakes.gpus.memory.ledger.get(InstanceId("a")) is not None
    world.fakes.monitor.show(gpu(0, 24))
    await world.fakes.clock.advance(1)
    assert world.phase("a") is Phase.DOWN and stop.status == "succeeded"
    assert world.fakes.gpus.memory.ledger.get(InstanceId("a")) is None


async def stopped_but_held(world: GpuWorld) -> Pool:
    """Pool a, whose engine was stopped and keeps 19 GiB beyond every deadline."""
    a = await world.begin("a")
    world.fakes.monitor.show(gpu(0, 24, processes=(process(4000, 19, name="llama-server"),)))
    await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    await world.fakes.clock.advance(40)
    return a


async def test_memory_that_is_not_given_back_is_withheld_and_its_holder_named(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24), gib=20)
    made.append(world)
    a = await stopped_but_held(world)
    assert world.phase("a") is Phase.FAILED and a.state.reason == "vram_held"
    assert "held by pid 4000 (llama-server), 19 GiB" in str(a.state.last_error)
    b = await world.begin("b")
    assert world.phase("b") is Phase.BACKOFF and "INSUFFICIENT_VRAM" in str(b.launch.cause and b.launch.cause.code)
    world.fakes.monitor.show(gpu(0, 24))
    await world.fakes.clock.advance(10)
    assert world.phase("a") is Phase.DOWN and view(b.state).ready


async def test_what_an_ended_engine_still_holds_is_foreign_to_the_next_start_and_the_forecast_says_the_same(
    made: list[GpuWorld],
) -> None:
    world = GpuWorld(gpu(0, 24), gib=4)
    made.append(world)
    a = await stopped_but_held(world)
    assert a.state.reason == "vram_held"
    where, _ = await world.fakes.admission.forecast(a)
    assert where == "4 GiB on GPU 0 (NVIDIA Test)"
    world.needs("a", 6)
    with pytest.raises(PoolError, match=r"5 GiB of 24 GiB .* pid 4000 \(llama-server\) 19 GiB") as foretold:
        await world.fakes.admission.forecast(a)
    await world.begin("a")
    assert foretold.value.message in str(a.state.last_error)


async def test_grandchildren_that_hold_memory_are_waited_for(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    a = await world.begin("a")
    await world.see(gpu(0, 24, processes=(process(5001, 9, start_ticks=7, nonce="nonce-4000"),)))
    world.fakes.launcher.processes[0].end(ExitRecord(signal=9))
    world.fakes.monitor.show(gpu(0, 24, processes=(process(5001, 9),)))
    await settle(40)
    assert world.phase("a") is Phase.STOPPING and a.instance.vram_pending


async def test_an_engine_with_a_replica_id_of_its_own_holds_its_memory_under_it(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    world.needs("x", 6)
    pool = world.pools.add("x")
    engine = PreparedEngine("x", "/engine", port=9000, replica_id="r7", device_mask="0", verbatim=True)
    await world.pools.change(pool, "preload", ev.Start(retry=False), "up", desired="up", engine=engine)
    await settle()
    await world.see(gpu(0, 24, processes=(process(4000, 5),)))
    own = InstanceId("x", "r7")
    assert [r.instance_id for r in world.fakes.gpus.memory.ledger.all()] == [own]
    assert world.fakes.gpus.memory.measured() == {own: {"GPU-00000000": 5 * GIB}}
    await world.pools.change(pool, "stop", ev.Stop(), "down", desired="down")
    await world.see(gpu(0, 24))
    await world.fakes.clock.advance(1)
    assert pool.instance.phase is Phase.DOWN and world.fakes.gpus.memory.ledger.all() == []


# --- a GPU that is not to be used ---


async def test_a_forgotten_pool_leaves_no_reservation_and_no_binding(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    pool = world.pools.add("x")
    engine = PreparedEngine("x", "/engine", port=9000, device_mask="0", verbatim=True)
    await world.pools.change(pool, "preload", ev.Start(retry=False), "up", desired="up", engine=engine)
    await settle()
    assert world.fakes.records.facts("device_binding").keys() == {"x"}
    world.fakes.monitor.show(gpu(0, 24, processes=(process(4000, 9),)))
    await world.pools.change(pool, "stop", ev.Stop(), "down", desired="down")
    await world.fakes.clock.advance(40)
    assert pool.instance.phase is Phase.FAILED
    await world.pools.remove(pool)
    assert world.fakes.gpus.memory.ledger.all() == [] and world.fakes.records.facts("device_binding") == {}


async def test_a_daemon_that_ends_does_not_wait_long_for_memory(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    await world.begin("a")
    world.fakes.monitor.show(gpu(0, 24), problem=ScanProblem("nvml_hung", "the driver does not answer"))
    world.fakes.gpus.closing = True
    await world.pools.change(world.pools.get("a"), "stop", ev.Stop(), "down", desired="down")
    await settle(60)
    assert world.phase("a") is Phase.FAILED
    error = str(world.pools.get("a").state.last_error)
    assert error.endswith("is free: the GPUs cannot be scanned: the driver does not answer")


async def test_a_hanging_look_holds_up_no_shutdown_and_is_not_taken_for_free_memory(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    a = await world.begin("a")
    world.fakes.monitor.gate = asyncio.Event()
    world.fakes.gpus.hurry = True
    await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    async with asyncio.timeout(5):
        while a.instance.phase is Phase.STOPPING:
            await asyncio.sleep(0.02)
    assert a.state.reason == "vram_held" and "the GPU driver does not answer" in str(a.state.last_error)
    assert world.fakes.gpus.memory.ledger.get(InstanceId("a")) is not None
    world.fakes.monitor.gate.set()
    await settle()


# --- where processes are not attributable ---


def unattributable(gib: float) -> tuple[DeviceSnapshot, ...]:
    return (gpu(0, 24, processes=(process(77, gib, certain=False),)),)


async def test_where_processes_are_not_attributable_a_neighbours_start_does_not_keep_a_pool_from_recovering(
    made: list[GpuWorld],
) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    a = await world.begin("a")
    await world.see(*unattributable(9))
    await world.begin("b")
    await world.see(*unattributable(18))
    world.fakes.launcher.processes[0].end(ExitRecord(signal=11))
    world.fakes.monitor.show(*unattributable(9))
    await world.fakes.clock.advance(5)
    assert view(a.state).ready and a.state.restart_count == 1
    notices = [e.human for e in world.fakes.told if e.fields.get("confidence") == "low"]
    assert len(notices) == 1 and "processes are not attributable (its use fell)" in notices[0]


async def test_where_processes_are_not_attributable_death_has_to_do_at_the_deadline(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    a = await world.begin("a")
    world.fakes.monitor.show(*unattributable(20))
    await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    await world.fakes.clock.advance(29)
    assert world.phase("a") is Phase.STOPPING
    await world.fakes.clock.advance(3)
    assert world.phase("a") is Phase.DOWN


async def test_what_is_inferred_is_not_learnt_from(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    await world.begin("a")
    await world.see(*unattributable(3))
    assert world.fakes.gpus.memory.measured() == {} and world.fakes.records.facts("footprint") == {}


# --- the watch itself ---


async def test_what_an_engine_held_is_reserved_to_the_next_of_its_kind(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    a = await world.begin("a")
    await world.see(gpu(0, 24, processes=(process(4000, 3, start_ticks=5),)))
    world.fakes.monitor.show(gpu(0, 24))
    await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    await world.fakes.clock.advance(1)
    await world.begin("a")
    reserved = world.fakes.gpus.memory.ledger.get(InstanceId("a"))
    assert reserved is not None and 3 * GIB <= reserved.bytes_by_device["GPU-00000000"] < 4 * GIB


async def test_a_look_that_began_before_the_engine_was_ready_teaches_nothing(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24), gib=9)
    made.append(world)
    a = await world.begin("a")
    half = DeviceScan((gpu(0, 24, processes=(process(4000, 2, start_ticks=5),)),), taken_at=(a.instance.ready_since or 0) - 1)
    world.fakes.watch.scan = half
    world.fakes.admission.learn()
    assert world.fakes.admission.measured("a") is None
    await world.see(gpu(0, 24, processes=(process(4000, 9, start_ticks=5),)))
    assert world.fakes.admission.measured("a") == {"GPU-00000000": 9 * GIB}


@pytest.mark.parametrize("neighbour_gib", [8.3, 8.0], ids=["over-its-reservation", "as-reserved"])
async def test_an_engine_that_crashed_before_it_used_a_gpu_is_not_waited_for(made: list[GpuWorld], neighbour_gib: float) -> None:
    world = GpuWorld(gpu(0, 24), gib=8)
    made.append(world)
    await world.begin("b")
    there = (process(4000, neighbour_gib, start_ticks=5),)
    await world.see(gpu(0, 24, processes=there))
    a = await world.begin("a")
    world.fakes.monitor.show(gpu(0, 24, processes=(*there, process(77, 3, name="game"))))
    world.fakes.launcher.processes[1].end(ExitRecord(code=1))
    await settle(20)
    assert a.instance.phase is Phase.BACKOFF, "what pids that match others hold is not its memory"
    assert not [event for event in world.fakes.told if event.type == "notice" and "counts as free" in event.human]


async def test_where_processes_are_not_attributable_a_neighbours_reservation_does_not_hide_what_is_still_held(
    made: list[GpuWorld],
) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    await world.begin("a")
    await world.see(gpu(0, 24, free_gib=14))
    await world.begin("b")
    await world.pools.change(world.pools.get("a"), "stop", ev.Stop(), "down", desired="down")
    await settle(20)
    assert world.phase("a") is Phase.STOPPING, "not a byte of it was given back; the neighbour has loaded nothing yet"
    await world.begin("c")
    assert world.phase("c") is Phase.BACKOFF
    await world.see(gpu(0, 24))
    await world.fakes.clock.advance(1)
    assert world.phase("a") is Phase.DOWN
