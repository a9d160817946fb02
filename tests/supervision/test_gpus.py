"""Pools on simulated looks at GPUs: who gets what, what is refused and why, what happens when a GPU is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from pool_managerd.core.artifacts import ExitRecord, PreparedEngine
from pool_managerd.core.devices import DeviceIncident, DeviceScan, DeviceSnapshot, ScanProblem
from pool_managerd.core.fit import DeviceFraction, EngineSettings
from pool_managerd.core.health import ProbeOutcome, ProbeResult
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.sizing import LaunchFacts
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.admission import Admission, AdmissionRules
from pool_managerd.supervision.device_view import devices_view
from pool_managerd.supervision.driver import PoolDriver
from pool_managerd.testing.fake_parts import GOOD
from pool_managerd.testing.manual_clock import settle
from tests.core.gpus import GIB, gpu, mig, process
from tests.supervision.test_pools import World

TWO = (gpu(0, 24), gpu(1, 12))
NO_RETRY: dict[str, Any] = {"supervision": {"restart": "on-failure"}}


class GpuWorld(World):
    """Pools a, b, c, each needing ``gib`` on one GPU."""

    def __init__(self, *devices: DeviceSnapshot, gib: float = 10, **config: Any) -> None:
        super().__init__(ids=["a", "b", "c"], **config)
        self.fakes.monitor.show(*devices)
        for pool in self.config.pools:
            self.needs(pool.id, gib)

    def needs(self, pool_id: str, gib: float) -> None:
        self.fakes.needs[pool_id] = LaunchFacts("fake-1", pool_id, EngineSettings(), overhead_bytes=int(gib * GIB))

    async def begin(self, pool_id: str) -> PoolDriver:
        """Start and let everything happen that can."""
        driver = self.pools.find(pool_id)
        if driver is None:
            driver = self.pools.add(pool_id, next(p for p in self.config.pools if p.id == pool_id))
        await self.pools.change(driver, "start", ev.Start(), "up", desired="up")
        await settle()
        return driver

    async def see(self, *devices: DeviceSnapshot, problem: ScanProblem | None = None, periodic: bool = True) -> None:
        self.fakes.monitor.show(*devices, problem=problem)
        await self.fakes.watch.look(periodic=periodic)
        await settle()

    def phase(self, pool_id: str) -> Phase:
        return self.pools.get(pool_id).instance.phase

    def runs_on(self, pool_id: str) -> list[int]:
        assignment = self.pools.get(pool_id).launch.assignment
        return [] if assignment is None else [d.id for d in assignment.devices]


@pytest.fixture
async def made() -> AsyncIterator[list[GpuWorld]]:
    worlds: list[GpuWorld] = []
    yield worlds
    for world in worlds:
        for driver in world.pools.all():
            await driver.close()


async def test_a_pool_without_a_mask_gets_the_gpu_with_most_room_and_sees_it_alone(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    a, b = await world.begin("a"), await world.begin("b")
    assert (world.runs_on("a"), world.runs_on("b")) == ([0], [0])
    await world.begin("c")
    assert world.runs_on("c") == [1]
    assert a.launch.prepared is not None and a.launch.prepared.env == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-00000000",
    }  # fmt: skip
    assert view(b.instance).ready


async def test_a_start_that_does_not_fit_fails_with_needed_free_and_holders_and_is_retried(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24, processes=(process(77, 6, name="blender"),)))
    made.append(world)
    await world.begin("a")
    b = await world.begin("b")
    assert world.phase("b") is Phase.BACKOFF and world.fakes.launcher.processes[1:] == []
    error = str(b.instance.last_error)
    assert "needs 10 GiB" in error and "8 GiB of 24 GiB" in error
    assert "pool a 10 GiB" in error and "pid 77 (blender) 6 GiB" in error
    await world.see(gpu(0, 24))
    await world.fakes.clock.advance(5)
    assert view(b.instance).ready


async def test_two_starts_at_once_cannot_both_take_the_memory(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24), gib=14)
    made.append(world)
    for pool in world.config.pools[:2]:
        world.pools.add(pool.id, pool).post(ev.Start())
    await settle(60)
    phases = sorted(world.pools.get(p).instance.phase.value for p in "ab")
    assert phases == ["backoff", "ready"]
    assert [r.pool_id for r in world.fakes.gpus.memory.ledger.all()] == ["a"]


async def test_a_stop_is_complete_when_the_memory_is_seen_free_and_not_before(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    a = await world.begin("a")
    await world.see(gpu(0, 24, processes=(process(4000, 9, start_ticks=5),)))
    stop = await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    world.fakes.monitor.show(gpu(0, 24, processes=(process(4000, 9),)))
    await settle()
    assert world.phase("a") is Phase.STOPPING and stop.status == "running"
    assert world.fakes.gpus.memory.ledger.get("a") is not None
    world.fakes.monitor.show(gpu(0, 24))
    await world.fakes.clock.advance(1)
    assert world.phase("a") is Phase.DOWN and stop.status == "succeeded"
    assert world.fakes.gpus.memory.ledger.get("a") is None


async def test_memory_that_is_not_given_back_is_withheld_and_its_holder_named(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24), gib=20)
    made.append(world)
    a = await world.begin("a")
    world.fakes.monitor.show(gpu(0, 24, processes=(process(4000, 19, name="llama-server"),)))
    await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    await world.fakes.clock.advance(40)
    assert world.phase("a") is Phase.FAILED and a.instance.reason == "vram_held"
    assert "held by pid 4000 (llama-server), 19 GiB" in str(a.instance.last_error)
    b = await world.begin("b")
    assert world.phase("b") is Phase.BACKOFF and "INSUFFICIENT_VRAM" in str(b.launch.cause and b.launch.cause.error_code)
    world.fakes.monitor.show(gpu(0, 24))
    await world.fakes.clock.advance(10)
    assert world.phase("a") is Phase.DOWN and view(b.instance).ready


async def test_grandchildren_that_hold_memory_are_waited_for(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    a = await world.begin("a")
    await world.see(gpu(0, 24, processes=(process(5001, 9, start_ticks=7, nonce="nonce-4000"),)))
    world.fakes.launcher.processes[0].end(ExitRecord(signal=9))
    world.fakes.monitor.show(gpu(0, 24, processes=(process(5001, 9),)))
    await settle(40)
    assert world.phase("a") is Phase.STOPPING and a.instance.vram_pending


# --- a GPU that is not to be trusted ---


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
    assert view(a.instance).ready and world.runs_on("a") == [1]


async def test_a_masked_pool_waits_for_its_gpu_through_probation(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [0]})
    made.append(world)
    a = await world.begin("a")
    lost = (replace(TWO[0], error="GPU_IS_LOST (15)"), TWO[1])
    await world.see(*lost)
    await world.fakes.clock.advance(60)
    await world.see(*lost)
    assert world.phase("a") is Phase.DOWN and a.instance.quarantined and a.instance.owed
    with pytest.raises(RequestError, match="one of its GPUs is quarantined"):
        await world.begin("a")
    for _ in range(2):
        await world.see(*TWO)
    assert a.instance.quarantined, "two good looks are not enough"
    await world.see(*TWO)
    await settle(60)
    assert view(a.instance).ready and world.runs_on("a") == [0]


async def test_a_fatal_xid_quarantines_and_one_of_a_program_does_not(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [0]})
    made.append(world)
    a = await world.begin("a")
    world.fakes.watch.on_incident(DeviceIncident(31, "kmsg", pci_bus_id="0000:01:00"))
    await settle()
    assert view(a.instance).ready
    world.fakes.watch.on_incident(DeviceIncident(79, "kmsg", pci_bus_id="0000:01:00"))
    await settle(60)
    assert not view(a.instance).ready and "Xid 79: the GPU has fallen off the bus (reboot" in str(a.instance.last_error)
    xids = [(e.fields["device"], e.fields["xid"], e.level) for e in world.fakes.told if e.type == "xid"]
    assert xids == [("0", 31, "warn"), ("0", 79, "error")]


async def test_without_sight_of_the_gpus_nothing_starts_and_what_runs_goes_on(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    a = await world.begin("a")
    await world.see(*TWO, problem=ScanProblem("driver_mismatch", "library and kernel module differ", "reboot"))
    b = await world.begin("b")
    assert view(a.instance).ready and world.phase("b") is Phase.BACKOFF and len(world.fakes.launcher.processes) == 1
    assert "the GPUs cannot be looked at: library and kernel module differ (reboot)" in str(b.instance.last_error)


async def test_a_cordoned_gpu_takes_nothing_new_and_survives_the_daemon(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, gib=5)
    made.append(world)
    await world.see(*TWO)
    a = await world.begin("a")
    await world.fakes.watch.cordon("0")
    assert view(a.instance).ready
    await world.begin("b")
    assert world.runs_on("b") == [1]
    later = GpuWorld(*TWO, gib=5, pool={"devices": [0]})
    made.append(later)
    later.fakes.records.known = world.fakes.records.known
    later.fakes.watch.restore()
    c = await later.begin("c")
    assert "GPU 0 is cordoned (pool-managerd devices uncordon 0)" in str(c.instance.last_error)
    await later.fakes.watch.uncordon("GPU-00000000")
    await later.fakes.clock.advance(5)
    assert view(c.instance).ready


async def test_a_released_driver_stops_starts_until_it_is_taken_up_again(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    await world.fakes.watch.release()
    a = await world.begin("a")
    assert world.phase("a") is Phase.BACKOFF
    await world.fakes.watch.resume()
    await world.fakes.clock.advance(5)
    assert view(a.instance).ready


async def test_an_unknown_device_in_a_mask_is_a_configuration_error(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [5]})
    made.append(world)
    a = await world.begin("a")
    assert (world.phase("a"), a.instance.reason) == (Phase.FAILED, "config_error")
    assert "there is no device 5; there are 0 (NVIDIA Test), 1 (NVIDIA Test)" in str(a.instance.last_error)


async def test_a_pool_stays_on_its_gpu_when_the_numbering_changes(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [1]})
    made.append(world)
    a = await world.begin("a")
    await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    await settle()
    later = GpuWorld(replace(TWO[1], id=0), replace(TWO[0], id=1), pool={"devices": [1]})
    made.append(later)
    later.fakes.records.known = world.fakes.records.known
    later.fakes.gpus.bindings.restore()
    b = await later.begin("a")
    assert b.launch.assignment is not None and [d.uuid for d in b.launch.assignment.devices] == ["GPU-00000001"]


async def test_mig_on_and_off_never_misplaces_a_pool(made: list[GpuWorld]) -> None:
    parent = gpu(0, 80, mig_enabled=True)
    world = GpuWorld(parent, mig(parent, 1), mig(parent, 2), gib=5, pool={"devices": ["MIG-0-2"]})
    made.append(world)
    a = await world.begin("a")
    assert a.launch.prepared is not None and a.launch.prepared.env["CUDA_VISIBLE_DEVICES"] == "MIG-0-2"
    await world.see(gpu(0, 80))
    await world.fakes.clock.advance(60)
    assert a.instance.quarantined and not view(a.instance).ready


async def test_mig_turned_on_under_a_pool_takes_its_gpu_away_from_it(made: list[GpuWorld]) -> None:
    whole, parent = gpu(0, 80), gpu(0, 80, mig_enabled=True)
    world = GpuWorld(whole, gib=5, pool={"devices": [0]})
    made.append(world)
    a = await world.begin("a")
    await world.see(parent, mig(parent, 1))
    await world.fakes.clock.advance(1)
    assert world.phase("a") is Phase.DOWN and a.instance.owed
    assert "GPU 0 is in MIG mode now" in str(a.instance.last_error)
    await world.see(whole)
    await settle(60)
    assert view(a.instance).ready


async def test_what_befalls_a_gpu_in_mig_mode_befalls_its_instances(made: list[GpuWorld]) -> None:
    parent = gpu(0, 80, mig_enabled=True)
    devices = (parent, mig(parent, 1), mig(parent, 2))
    world = GpuWorld(*devices, gib=5, pool={"devices": ["MIG-0-1"]})
    made.append(world)
    await world.see(*devices)
    await world.fakes.watch.cordon("0")
    a = await world.begin("a")
    assert "GPU 0 is cordoned" in str(a.instance.last_error)
    await world.fakes.watch.uncordon("0")
    await world.fakes.clock.advance(5)
    assert view(a.instance).ready
    world.fakes.watch.on_incident(DeviceIncident(79, "nvml", uuid=parent.uuid))
    await settle(60)
    assert not view(a.instance).ready and "Xid 79" in str(a.instance.last_error)
    rows = devices_view(world.fakes.gpus, world.fakes.clock, (1, 2), simulated=False)["devices"]
    assert [row["state"] for row in rows] == ["quarantined"] * 3


async def test_a_pool_that_may_run_anywhere_leaves_a_named_gpu_to_the_pool_that_must_have_it(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24), gpu(1, 20), gib=16)
    made.append(world)
    named = world.config.pools[1].model_copy(update={"devices": (0,)})
    world.pools.add("b", named)
    await world.begin("a")
    await world.begin("b")
    assert (world.runs_on("a"), world.runs_on("b")) == ([1], [0])


async def test_a_forgotten_pool_leaves_no_promise_and_no_binding(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    driver = world.pools.add("x")
    engine = PreparedEngine("x", "/engine", port=9000, device_mask="0", verbatim=True)
    await world.pools.change(driver, "preload", ev.Start(retry=False), "up", desired="up", engine=engine)
    await settle()
    assert world.fakes.records.facts("device_binding").keys() == {"x"}
    world.fakes.monitor.show(gpu(0, 24, processes=(process(4000, 9),)))
    await world.pools.change(driver, "stop", ev.Stop(), "down", desired="down")
    await world.fakes.clock.advance(40)
    assert driver.instance.phase is Phase.FAILED
    await world.pools.remove(driver)
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
    error = str(world.pools.get("a").instance.last_error)
    assert error.endswith("is free: the GPUs cannot be looked at: the driver does not answer")


# --- where pids cannot be matched ---


def blind(gib: float) -> tuple[DeviceSnapshot, ...]:
    return (gpu(0, 24, processes=(process(77, gib, certain=False),)),)


async def test_where_pids_cannot_be_matched_a_neighbours_start_does_not_keep_a_pool_from_recovering(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    a = await world.begin("a")
    await world.see(*blind(9))
    await world.begin("b")
    await world.see(*blind(18))
    world.fakes.launcher.processes[0].end(ExitRecord(signal=11))
    world.fakes.monitor.show(*blind(9))
    await world.fakes.clock.advance(5)
    assert view(a.instance).ready and a.instance.restart_count == 1
    notices = [e.human for e in world.fakes.told if e.fields.get("confidence") == "low"]
    assert len(notices) == 1 and "pids cannot be matched (its use fell)" in notices[0]


async def test_where_pids_cannot_be_matched_death_has_to_do_at_the_deadline(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    a = await world.begin("a")
    world.fakes.monitor.show(*blind(20))
    await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    await world.fakes.clock.advance(29)
    assert world.phase("a") is Phase.STOPPING
    await world.fakes.clock.advance(3)
    assert world.phase("a") is Phase.DOWN


async def test_a_guess_is_not_learnt_from(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    await world.begin("a")
    await world.see(*blind(3))
    assert world.fakes.gpus.memory.used() == {} and world.fakes.records.facts("footprint") == {}


# --- the watch itself ---


async def test_a_listener_that_fails_does_not_end_the_looking(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)

    def broken() -> None:
        raise RuntimeError("broken listener")

    world.fakes.watch.listen(broken)
    a = await world.begin("a")
    assert view(a.instance).ready
    await world.see(replace(TWO[0], error="GPU_IS_LOST (15)"), TWO[1])
    assert a.instance.quarantined or view(a.instance).ready is False
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
    trust = world.fakes.watch.trust_in("GPU-00000000")
    assert (trust.state.value, trust.good_looks) == ("probation", 1)


async def test_a_cordoned_instance_shares_its_gpus_fate_all_the_same(made: list[GpuWorld]) -> None:
    parent = gpu(0, 80, mig_enabled=True)
    world = GpuWorld(parent, mig(parent, 1), gib=5, pool={"devices": ["MIG-0-1"]})
    made.append(world)
    a = await world.begin("a")
    await world.fakes.watch.cordon("MIG-0-1")
    world.fakes.watch.on_incident(DeviceIncident(79, "nvml", uuid=parent.uuid))
    await settle(60)
    assert not view(a.instance).ready


async def test_what_is_gone_for_good_can_be_forgotten_and_a_partition_taken_down_is_no_fault(made: list[GpuWorld]) -> None:
    parent = gpu(0, 80, mig_enabled=True)
    world = GpuWorld()
    made.append(world)
    await world.see(parent, mig(parent, 1), gpu(1))
    await world.see(parent)
    rows = {t.uuid: t.state.value for t in world.fakes.watch.known()}
    assert rows == {"GPU-00000000": "ok", "GPU-00000001": "quarantined"}
    await world.fakes.watch.uncordon("GPU-00000001")
    await world.see(parent)
    assert [t.uuid for t in world.fakes.watch.known()] == ["GPU-00000000"]


async def test_a_pool_that_was_drained_while_its_gpu_was_lost_stays_down(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [0]})
    made.append(world)
    a = await world.begin("a")
    await world.see(replace(TWO[0], error="lost"), TWO[1])
    await world.fakes.clock.advance(20)
    assert a.instance.owed
    await world.pools.change(a, "drain", ev.Drain(1000, 0), "drained", desired="down")
    for _ in range(4):
        await world.see(*TWO)
    assert world.phase("a") is Phase.DOWN and not a.instance.owed


async def test_a_stopped_engine_that_will_not_die_is_not_brought_back_by_its_gpu(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [0]})
    made.append(world)
    a = await world.begin("a")
    stuck = world.fakes.launcher.processes[0]
    stuck.stop = lambda grace_ms: None  # type: ignore[method-assign]
    stuck.kill = lambda: None  # type: ignore[method-assign]
    await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    await world.fakes.clock.advance(60)
    assert a.instance.reason == "stop_failed"
    for _ in range(3):
        await world.see(replace(TWO[0], error="lost"), TWO[1])
    assert sum(e.type == "quarantine" for e in world.fakes.told) == 1
    stuck.end(ExitRecord(signal=9))
    for _ in range(5):
        await world.see(*TWO)
        await world.fakes.clock.advance(5)
    assert not view(a.instance).ready and a.instance.phase in (Phase.FAILED, Phase.DOWN)


# --- what is learnt and shown ---


async def test_a_submitted_engine_sees_the_gpus_that_it_was_given(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    driver = world.pools.add("x")
    engine = PreparedEngine("x", "/engine", port=9000, device_mask="GPU1", env={"A": "b"}, verbatim=True)
    await world.pools.change(driver, "preload", ev.Start(retry=False), "up", desired="up", engine=engine)
    await settle()
    assert driver.launch.prepared is not None and driver.launch.prepared.env == {
        "A": "b", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-00000001",
    }  # fmt: skip


async def test_without_gpus_a_cpu_is_used_only_where_that_is_allowed(made: list[GpuWorld]) -> None:
    world = GpuWorld()
    made.append(world)
    world.fakes.monitor.show(problem=ScanProblem("nvml_unavailable", "there is no NVML library"))
    a = await world.begin("a")
    assert view(a.instance).ready and a.launch.assignment is None
    strict = GpuWorld()
    made.append(strict)
    fakes = strict.fakes
    fakes.monitor.show()
    fakes.admission = Admission(fakes.gpus, fakes.size, lambda: 1 << 40, fakes.records, AdmissionRules())
    strict.pools._s = replace(strict.pools._s, admission=fakes.admission)
    b = await strict.begin("b")
    assert (strict.phase("b"), b.instance.reason) == (Phase.FAILED, "gpu_required")
    assert "GPU-only enforcement: no NVIDIA GPU was found" in str(b.instance.last_error)


async def test_too_little_main_memory_fails_before_anything_is_spawned(made: list[GpuWorld]) -> None:
    world = GpuWorld()
    made.append(world)
    world.fakes.monitor.show(problem=ScanProblem("nvml_unavailable", "none"))
    world.fakes.needs["a"] = LaunchFacts("fake-1", "a", EngineSettings(), weights_bytes=100 * GIB)
    a = await world.begin("a")
    assert a.instance.reason is None and world.phase("a") is Phase.BACKOFF
    assert "needs 100 GiB of main memory and 64 GiB are available" in str(a.instance.last_error)


async def test_placement_and_people_see_the_same_figures(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    await world.begin("a")
    await world.see(gpu(0, 24, processes=(process(4000, 9, start_ticks=5), process(88, 2))), TWO[1])
    entry = world.fakes.registry.get("a")
    assert entry is not None and (entry.vram_total_bytes, entry.vram_free_bytes) == (24 * GIB, 13 * GIB)
    assert entry.vram_available_bytes == 12 * GIB and entry.compute_capability == "8.6"
    row = devices_view(world.fakes.gpus, world.fakes.clock, (1, 2), simulated=False)["devices"][0]
    assert row["reservations"] == [
        {"pool_id": "a", "reserved_bytes": 10 * GIB, "used_bytes": 9 * GIB, "exclusive": False, "pids": [4000]}
    ]
    assert [p["pid"] for p in row["foreign"]] == [88] and row["vram_available_bytes"] == 12 * GIB


async def test_what_an_engine_held_is_promised_to_the_next_of_its_kind(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24))
    made.append(world)
    a = await world.begin("a")
    await world.see(gpu(0, 24, processes=(process(4000, 3, start_ticks=5),)))
    world.fakes.monitor.show(gpu(0, 24))
    await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    await world.fakes.clock.advance(1)
    await world.begin("a")
    reserved = world.fakes.gpus.memory.ledger.get("a")
    assert reserved is not None and 3 * GIB <= reserved.bytes_by_device["GPU-00000000"] < 4 * GIB


async def test_a_masked_gpu_that_is_late_at_the_daemons_start_brings_its_pool_up_when_it_comes(made: list[GpuWorld]) -> None:
    before = GpuWorld(*TWO, pool={"devices": [1]})
    made.append(before)
    await before.begin("a")
    assert before.runs_on("a") == [1]

    world = GpuWorld(TWO[0], pool={"devices": [1]})
    made.append(world)
    world.fakes.records.known.update(before.fakes.records.known)
    world.fakes.gpus.bindings.restore()
    a, b = await world.begin("a"), await world.begin("b")
    assert a.instance.phase is Phase.BACKOFF and "which is gone" in str(a.instance.last_error), "it was bound to that GPU"
    assert b.instance.phase is Phase.FAILED and "there is no device 1" in str(b.instance.last_error), "it never ran"
    await world.see(TWO[0], gpu(1, 24))
    await world.fakes.clock.advance(5)
    assert view(a.instance).ready and view(b.instance).ready and world.runs_on("b") == [1]


async def test_pools_that_failed_while_the_driver_library_was_away_start_when_it_is_back(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    world.fakes.admission._rules = AdmissionRules(cpu_allowed=False)
    await world.see(*TWO)
    await world.see(problem=ScanProblem("nvml_unavailable", "the library is gone"))
    a = await world.begin("a")
    assert (a.instance.phase, a.instance.reason) in ((Phase.FAILED, "gpu_required"), (Phase.BACKOFF, None))
    await world.see(*TWO)
    assert view(a.instance).ready


@pytest.mark.parametrize(
    ("gpus", "mask", "used"), [(2, None, [12, 12]), (1, "0,1", [12, 0]), (2, "0,1", [12, 12]), (1, None, [12])]
)
async def test_a_submitted_engine_that_takes_fractions_is_promised_what_it_was_told_to_use(
    made: list[GpuWorld], gpus: int, mask: str | None, used: list[int]
) -> None:
    world = GpuWorld(gpu(0, 24), gpu(1, 24), gpu(2, 24))
    made.append(world)
    world.fakes.needs["x"] = LaunchFacts("vllm-1", "m", DeviceFraction(0.5, gpus=gpus))
    driver = world.pools.add("x")
    engine = PreparedEngine("x", "/bin/vllm", port=9000, engine="vllm", device_mask=mask, verbatim=True)
    await world.pools.change(driver, "preload", ev.Start(retry=False), "up", desired="up", engine=engine)
    await settle()
    assert view(driver.instance).ready, driver.instance.last_error
    (promise,) = world.fakes.gpus.memory.ledger.all()
    assert list(promise.bytes_by_device.values()) == [gib * GIB for gib in used]


async def test_a_gpu_replaced_in_its_slot_is_used_by_the_running_daemon(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [1]})
    made.append(world)
    a = await world.begin("a")
    new = replace(TWO[1], uuid="GPU-new")
    for _ in range(2):
        await world.see(TWO[0], new)
        await world.fakes.clock.advance(5)
    assert view(a.instance).ready and a.launch.assignment is not None
    assert [d.uuid for d in a.launch.assignment.devices] == ["GPU-new"]


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
    assert a.instance.phase is Phase.READY and not view(a.instance).ready
    assert "waits for a reset" in str(a.instance.last_error)
    assert operation.status == "failed" and operation.error is not None and operation.error.error_code == "POOL_UNAVAILABLE"
    assert not [event for event in world.fakes.told if event.type == "preload_succeeded"]
    for _ in range(4):
        await world.see(*TWO)
    assert view(a.instance).ready and a.instance.last_error is None


async def test_a_look_that_began_before_the_engine_was_ready_teaches_nothing(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24), gib=9)
    made.append(world)
    a = await world.begin("a")
    half = DeviceScan((gpu(0, 24, processes=(process(4000, 2, start_ticks=5),)),), taken_at=(a.instance.ready_since or 0) - 1)
    world.fakes.watch.scan = half
    world.fakes.admission.learn()
    assert a.launch.held is None
    await world.see(gpu(0, 24, processes=(process(4000, 9, start_ticks=5),)))
    assert a.launch.held == {"GPU-00000000": 9 * GIB}


@pytest.mark.parametrize("neighbour_gib", [8.3, 8.0], ids=["over-its-promise", "as-promised"])
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


async def test_where_pids_cannot_be_matched_a_neighbours_promise_does_not_hide_what_is_still_held(made: list[GpuWorld]) -> None:
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


async def test_a_pool_that_is_registered_again_has_figures_at_once(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    await world.see(*TWO)
    a = world.pools.add("a", world.config.pools[0])
    world.fakes.gpus.refresh()
    await world.pools.remove(a)
    world.pools.add("a", world.config.pools[0])
    world.fakes.gpus.refresh()
    entry = world.fakes.registry.get("a")
    assert entry is not None and len(entry.devices) == 2


async def test_an_unknown_device_cannot_be_cordoned(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    await world.see(*TWO)
    with pytest.raises(PoolError, match="device 7 not found") as refused:
        await world.fakes.watch.cordon("7")
    assert refused.value.http_status == 404 and refused.value.hint == "there are: 0, 1"
