"""What befalls pools when a GPU is lost, quarantined, cordoned, late or replaced, and when it is back."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.core.gpu.devices import DeviceIncident, ScanProblem
from pool_managerd.core.gpu.health import Probation
from pool_managerd.core.health import ProbeOutcome, ProbeResult
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import NodeError, PoolError, RequestError, SpecError
from pool_managerd.supervision.gpu.view import devices_view
from pool_managerd.testing.fake_watch import GOOD
from pool_managerd.testing.manual_clock import settle
from tests.core.gpus import gpu, mig, process
from tests.supervision.gpu_world import TWO, GpuWorld


async def test_a_lost_gpu_ends_its_engine_and_the_pool_moves_to_another(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    a = await world.begin("a")
    lost = replace(TWO[0], error="GPU_IS_LOST (15)", processes=(process(4000, 9),))  # what was known last, the engine included
    await world.see(lost, TWO[1])
    await settle(60)
    assert world.fakes.launcher.processes[0].signals == ["term"]
    await world.see(lost, TWO[1])
    await world.fakes.clock.advance(5)
    assert view(a.state).ready and world.runs_on("a") == [1]


async def test_a_masked_pool_waits_for_its_gpu_through_probation(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [0]})
    made.append(world)
    a = await world.begin("a")
    lost = (replace(TWO[0], error="GPU_IS_LOST (15)"), TWO[1])
    await world.see(*lost)
    await world.fakes.clock.advance(60)
    await world.see(*lost)
    assert world.phase("a") is Phase.DOWN and a.state.quarantined and a.state.pending_start
    with pytest.raises(RequestError, match="one of its GPUs is quarantined"):
        await world.begin("a")
    for _ in range(2):
        await world.see(*TWO)
    assert a.state.quarantined, "two healthy scans are not enough"
    await world.see(*TWO)
    await settle(60)
    assert view(a.state).ready and world.runs_on("a") == [0]


async def test_a_fatal_xid_quarantines_and_one_of_a_program_does_not(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [0]})
    made.append(world)
    a = await world.begin("a")
    world.fakes.watch.on_incident(DeviceIncident(31, "kmsg", pci_bus_id="0000:01:00"))
    await settle()
    assert view(a.state).ready
    world.fakes.watch.on_incident(DeviceIncident(79, "kmsg", pci_bus_id="0000:01:00"))
    await settle(60)
    assert not view(a.state).ready and "Xid 79: the GPU has fallen off the bus (reboot" in str(a.state.last_error)
    xids = [(e.fields["device"], e.fields["xid"], e.level) for e in world.fakes.told if e.type == "xid"]
    assert xids == [("0", 31, "warn"), ("0", 79, "error")]


async def test_without_sight_of_the_gpus_nothing_starts_and_what_runs_goes_on(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    a = await world.begin("a")
    await world.see(*TWO, problem=ScanProblem("driver_mismatch", "library and kernel module differ", "reboot"))
    b = await world.begin("b")
    assert view(a.state).ready and world.phase("b") is Phase.BACKOFF and len(world.fakes.launcher.processes) == 1
    assert "the GPUs cannot be scanned: library and kernel module differ (reboot)" in str(b.state.last_error)


async def test_a_cordoned_gpu_takes_nothing_new_and_survives_the_daemon(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, gib=5)
    made.append(world)
    await world.see(*TWO)
    a = await world.begin("a")
    await world.fakes.watch.cordon("0")
    assert view(a.state).ready
    await world.begin("b")
    assert world.runs_on("b") == [1]
    later = GpuWorld(*TWO, gib=5, pool={"devices": [0]})
    made.append(later)
    later.fakes.records.known = world.fakes.records.known
    later.fakes.watch.restore()
    c = await later.begin("c")
    assert "GPU 0 is cordoned (pool-managerd devices uncordon 0)" in str(c.state.last_error)
    await later.fakes.watch.uncordon("GPU-00000000")
    await later.fakes.clock.advance(5)
    assert view(c.state).ready


async def test_a_released_driver_stops_starts_until_it_is_reinitialised(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    await world.fakes.watch.release()
    a = await world.begin("a")
    assert world.phase("a") is Phase.BACKOFF
    await world.fakes.watch.resume()
    await world.fakes.clock.advance(5)
    assert view(a.state).ready


async def test_mig_turned_on_under_a_pool_takes_its_gpu_away_from_it(made: list[GpuWorld]) -> None:
    whole, parent = gpu(0, 80), gpu(0, 80, mig_enabled=True)
    world = GpuWorld(whole, gib=5, pool={"devices": [0]})
    made.append(world)
    a = await world.begin("a")
    await world.see(parent, mig(parent, 1))
    await world.fakes.clock.advance(1)
    assert world.phase("a") is Phase.DOWN and a.state.pending_start
    assert "GPU 0 is in MIG mode now" in str(a.state.last_error)
    await world.see(whole)
    await settle(60)
    assert view(a.state).ready


async def test_what_befalls_a_gpu_in_mig_mode_befalls_its_instances(made: list[GpuWorld]) -> None:
    parent = gpu(0, 80, mig_enabled=True)
    devices = (parent, mig(parent, 1), mig(parent, 2))
    world = GpuWorld(*devices, gib=5, pool={"devices": ["MIG-0-1"]})
    made.append(world)
    await world.see(*devices)
    await world.fakes.watch.cordon("0")
    a = await world.begin("a")
    assert "GPU 0 is cordoned" in str(a.state.last_error)
    await world.fakes.watch.uncordon("0")
    await world.fakes.clock.advance(5)
    assert view(a.state).ready
    world.fakes.watch.on_incident(DeviceIncident(79, "nvml", uuid=parent.uuid))
    await settle(60)
    assert not view(a.state).ready and "Xid 79" in str(a.state.last_error)
    rows = devices_view(world.fakes.gpus, world.fakes.clock, (1, 2), simulated=False)["devices"]
    assert [row["state"] for row in rows] == ["quarantined"] * 3


async def test_a_listener_that_fails_does_not_end_the_looking(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)

    def broken() -> None:
        raise RuntimeError("broken listener")

    world.fakes.watch.listen(broken)
    a = await world.begin("a")
    assert view(a.state).ready
    await world.see(replace(TWO[0], error="GPU_IS_LOST (15)"), TWO[1])
    assert a.state.quarantined or view(a.state).ready is False
    assert any(e.type == "internal_error" and "broken listener" in e.human for e in world.fakes.told)


async def test_being_woken_often_does_not_shorten_a_probation(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    await world.see(replace(TWO[0], error="lost"), TWO[1])
    world.fakes.monitor.show(*TWO)
    watching = asyncio.create_task(world.fakes.watch.run())
    for _ in range(9):
        world.fakes.watch.wake()
        await settle()
    watching.cancel()
    health = world.fakes.watch.health_of("GPU-00000000")
    assert isinstance(health.state, Probation) and health.state.healthy_scans == 1


async def test_a_cordoned_instance_shares_its_gpus_fate_all_the_same(made: list[GpuWorld]) -> None:
    parent = gpu(0, 80, mig_enabled=True)
    world = GpuWorld(parent, mig(parent, 1), gib=5, pool={"devices": ["MIG-0-1"]})
    made.append(world)
    a = await world.begin("a")
    await world.fakes.watch.cordon("MIG-0-1")
    world.fakes.watch.on_incident(DeviceIncident(79, "nvml", uuid=parent.uuid))
    await settle(60)
    assert not view(a.state).ready


async def test_what_is_gone_for_good_can_be_forgotten_and_a_partition_taken_down_is_no_fault(made: list[GpuWorld]) -> None:
    parent = gpu(0, 80, mig_enabled=True)
    world = GpuWorld()
    made.append(world)
    await world.see(parent, mig(parent, 1), gpu(1))
    await world.see(parent)
    rows = {h.uuid: h.state.name for h in world.fakes.watch.known()}
    assert rows == {"GPU-00000000": "ok", "GPU-00000001": "quarantined"}
    await world.fakes.watch.uncordon("GPU-00000001")
    await world.see(parent)
    assert [h.uuid for h in world.fakes.watch.known()] == ["GPU-00000000"]


async def test_a_pool_that_was_drained_while_its_gpu_was_lost_stays_down(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [0]})
    made.append(world)
    a = await world.begin("a")
    await world.see(replace(TWO[0], error="lost"), TWO[1])
    await world.fakes.clock.advance(20)
    assert a.state.pending_start
    await world.pools.change(a, "drain", ev.Drain(1000, 0), "drained", desired="down")
    for _ in range(4):
        await world.see(*TWO)
    assert world.phase("a") is Phase.DOWN and not a.state.pending_start


async def test_a_stopped_engine_that_will_not_die_is_not_brought_back_by_its_gpu(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [0]})
    made.append(world)
    a = await world.begin("a")
    stuck = world.fakes.launcher.processes[0]
    stuck.stop = lambda grace_ms: None  # type: ignore[method-assign]
    stuck.kill = lambda: None  # type: ignore[method-assign]
    await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    await world.fakes.clock.advance(60)
    assert a.state.reason == "stop_failed"
    for _ in range(3):
        await world.see(replace(TWO[0], error="lost"), TWO[1])
    assert sum(e.type == "quarantine" for e in world.fakes.told) == 1
    stuck.end(ExitRecord(signal=9))
    for _ in range(5):
        await world.see(*TWO)
        await world.fakes.clock.advance(5)
    assert not view(a.state).ready and a.instance.phase in (Phase.FAILED, Phase.DOWN)


# --- what is learnt and shown ---


async def test_a_masked_gpu_that_is_late_at_the_daemons_start_brings_its_pool_up_when_it_comes(made: list[GpuWorld]) -> None:
    before = GpuWorld(*TWO, pool={"devices": [1]})
    made.append(before)
    await before.begin("a")
    assert before.runs_on("a") == [1]

    world = GpuWorld(TWO[0], pool={"devices": [1]})
    made.append(world)
    world.fakes.records.known.update(before.fakes.records.known)
    world.fakes.gpus.mask_gpus.restore()
    a, b = await world.begin("a"), await world.begin("b")
    assert a.instance.phase is Phase.BACKOFF and "which is gone" in str(a.state.last_error), "it was bound to that GPU"
    assert b.instance.phase is Phase.FAILED and "there is no device 1" in str(b.state.last_error), "it never ran"
    await world.see(TWO[0], gpu(1, 24))
    await world.fakes.clock.advance(5)
    assert view(a.state).ready and view(b.state).ready and world.runs_on("b") == [1]


async def test_pools_that_failed_while_the_driver_library_was_away_start_when_it_is_back(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    await world.see(*TWO)
    await world.see(problem=ScanProblem("nvml_unavailable", "the library is gone"))
    world.fakes.preflight_error = NodeError(
        "GPU-only enforcement: nvcc/nvidia-smi not found", code="GPU_REQUIRED", retriable=False
    )
    a = await world.begin("a")
    assert (a.instance.phase, a.state.reason) == (Phase.FAILED, "gpu_required")
    world.fakes.preflight_error = None
    await world.see(*TWO)
    assert view(a.state).ready


async def test_gpus_that_come_and_go_do_not_start_pools_whose_configuration_is_wrong(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [0]})
    made.append(world)
    await world.see(*TWO)
    world.fakes.preflight_error = SpecError("cannot use the flag --nope")
    a = await world.begin("a")
    assert (a.instance.phase, a.state.reason) == (Phase.FAILED, "config_error")
    for _ in range(3):
        await world.see(TWO[0])
        await world.see(*TWO)
    assert a.instance.epoch == 1, "its own GPU was there all the time"


async def test_a_gpu_replaced_in_its_slot_is_used_by_the_running_daemon(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [1]})
    made.append(world)
    a = await world.begin("a")
    new = replace(TWO[1], uuid="GPU-new")
    for _ in range(2):
        await world.see(TWO[0], new)
        await world.fakes.clock.advance(5)
    assert view(a.state).ready and a.launch.allocation is not None
    assert [d.uuid for d in a.launch.allocation.devices] == ["GPU-new"]


async def test_a_pool_whose_gpu_is_barred_while_it_loads_says_why_it_is_not_ready(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    world.fakes.prober.result = ProbeResult(ProbeOutcome.ERROR, "answered 503")
    a = world.pools.add("a", world.config.pools[0])
    operation = await world.pools.change(a, "preload", ev.Start(), "up", desired="up")
    await settle()
    pending = (replace(TWO[0], reset_pending=True), TWO[1])
    await world.see(*pending)
    world.fakes.prober.result = GOOD
    await world.fakes.clock.advance(2)
    assert a.instance.phase is Phase.READY and not view(a.state).ready
    assert "waits for a reset" in str(a.state.last_error)
    assert operation.status == "failed" and operation.error is not None and operation.error.code == "POOL_UNAVAILABLE"
    assert not [event for event in world.fakes.told if event.type == "preload_succeeded"]
    for _ in range(4):
        await world.see(*TWO)
    assert view(a.state).ready and a.state.last_error is None


async def test_an_unknown_device_cannot_be_cordoned(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    await world.see(*TWO)
    with pytest.raises(PoolError, match="device 7 not found") as refused:
        await world.fakes.watch.cordon("7")
    assert refused.value.status == 404 and refused.value.hint == "there are: 0, 1"
