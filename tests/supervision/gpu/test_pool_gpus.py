"""Which pool gets which GPUs, what is refused and why, what is shown of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.gpu.devices import ScanProblem
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.memory.estimate import DeviceFraction, EngineSettings
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.errors import NodeError
from pool_managerd.supervision.gpu.admission import Admission, AdmissionRules
from pool_managerd.supervision.gpu.view import devices_view
from pool_managerd.testing.manual_clock import settle
from tests.core.gpus import GIB, gpu, mig, process
from tests.supervision.gpu_world import TWO, GpuWorld


async def test_a_pool_without_a_mask_gets_the_gpu_with_most_room_and_sees_it_alone(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    a, b = await world.begin("a"), await world.begin("b")
    assert (world.runs_on("a"), world.runs_on("b")) == ([0], [0])
    await world.begin("c")
    assert world.runs_on("c") == [1]
    assert isinstance(a.launch.prepared, PreparedEngine) and a.launch.prepared.env == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-00000000",
    }  # fmt: skip
    assert view(b.state).ready


async def test_a_start_that_does_not_fit_fails_with_needed_free_and_holders_and_is_retried(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24, processes=(process(77, 6, name="blender"),)))
    made.append(world)
    await world.begin("a")
    b = await world.begin("b")
    assert world.phase("b") is Phase.BACKOFF and world.fakes.launcher.processes[1:] == []
    error = str(b.state.last_error)
    assert "needs 10 GiB" in error and "8 GiB of 24 GiB" in error
    assert "pool a 10 GiB" in error and "pid 77 (blender) 6 GiB" in error
    await world.see(gpu(0, 24))
    await world.fakes.clock.advance(5)
    assert view(b.state).ready


async def test_two_starts_at_once_cannot_both_take_the_memory(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24), gib=14)
    made.append(world)
    for pool in world.config.pools[:2]:
        world.pools.add(pool.id, pool)
        world.pools.post(pool.id, ev.Start())
    await settle(60)
    phases = sorted(world.pools.get(p).instance.phase.value for p in "ab")
    assert phases == ["backoff", "ready"]
    assert [r.instance_id.pool_id for r in world.fakes.gpus.memory.ledger.all()] == ["a"]


async def test_an_unknown_device_in_a_mask_is_a_configuration_error(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [5]})
    made.append(world)
    a = await world.begin("a")
    assert (world.phase("a"), a.state.reason) == (Phase.FAILED, "config_error")
    assert "there is no device 5; there are 0 (NVIDIA Test), 1 (NVIDIA Test)" in str(a.state.last_error)


async def test_a_pool_stays_on_its_gpu_when_the_numbering_changes(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO, pool={"devices": [1]})
    made.append(world)
    a = await world.begin("a")
    await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")
    await settle()
    later = GpuWorld(replace(TWO[1], id=0), replace(TWO[0], id=1), pool={"devices": [1]})
    made.append(later)
    later.fakes.records.known = world.fakes.records.known
    later.fakes.gpus.mask_gpus.restore()
    b = await later.begin("a")
    assert b.launch.allocation is not None and [d.uuid for d in b.launch.allocation.devices] == ["GPU-00000001"]


async def test_mig_on_and_off_never_misplaces_a_pool(made: list[GpuWorld]) -> None:
    parent = gpu(0, 80, mig_enabled=True)
    world = GpuWorld(parent, mig(parent, 1), mig(parent, 2), gib=5, pool={"devices": ["MIG-0-2"]})
    made.append(world)
    a = await world.begin("a")
    assert isinstance(a.launch.prepared, PreparedEngine) and a.launch.prepared.env["CUDA_VISIBLE_DEVICES"] == "MIG-0-2"
    await world.see(gpu(0, 80))
    await world.fakes.clock.advance(60)
    assert a.state.quarantined and not view(a.state).ready


async def test_a_pool_that_may_run_anywhere_leaves_a_named_gpu_to_the_pool_that_must_have_it(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24), gpu(1, 20), gib=16)
    made.append(world)
    named = world.config.pools[1].model_copy(update={"devices": (0,)})
    world.pools.add("b", named)
    await world.begin("a")
    await world.begin("b")
    assert (world.runs_on("a"), world.runs_on("b")) == ([1], [0])


async def test_a_submitted_engine_sees_the_gpus_that_it_was_given(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    pool = world.pools.add("x")
    engine = PreparedEngine("x", "/engine", port=9000, device_mask="GPU1", env={"A": "b"}, verbatim=True)
    await world.pools.change(pool, "preload", ev.Start(retry=False), "up", desired="up", engine=engine)
    await settle()
    assert isinstance(pool.launch.prepared, PreparedEngine) and pool.launch.prepared.env == {
        "A": "b", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-00000001",
    }  # fmt: skip


async def test_without_gpus_a_cpu_is_used_only_where_that_is_allowed(made: list[GpuWorld]) -> None:
    world = GpuWorld()
    made.append(world)
    world.fakes.monitor.show(problem=ScanProblem("nvml_unavailable", "there is no NVML library"))
    a = await world.begin("a")
    assert view(a.state).ready and a.launch.allocation is None
    strict = GpuWorld()
    made.append(strict)
    fakes = strict.fakes
    fakes.monitor.show()
    fakes.admission = Admission(fakes.gpus, fakes.size, lambda: 1 << 40, fakes.records, AdmissionRules())
    strict.pools._s = replace(strict.pools._s, admission=fakes.admission)
    b = await strict.begin("b")
    assert (strict.phase("b"), b.state.reason) == (Phase.FAILED, "gpu_required")
    assert "GPU-only enforcement: no NVIDIA GPU was found" in str(b.state.last_error)


async def test_too_little_main_memory_fails_before_anything_is_spawned(made: list[GpuWorld]) -> None:
    world = GpuWorld()
    made.append(world)
    world.fakes.monitor.show(problem=ScanProblem("nvml_unavailable", "none"))
    world.fakes.needs["a"] = LaunchInputs("fake-1", "a", EngineSettings(), weights_bytes=100 * GIB)
    a = await world.begin("a")
    assert a.state.reason == "insufficient_ram" and world.phase("a") is Phase.BACKOFF
    assert "needs 100 GiB of RAM and 64 GiB are available" in str(a.state.last_error)


async def test_placement_and_readers_see_the_same_numbers(made: list[GpuWorld]) -> None:
    world = GpuWorld(*TWO)
    made.append(world)
    await world.begin("a")
    await world.see(gpu(0, 24, processes=(process(4000, 9, start_ticks=5), process(88, 2))), TWO[1])
    entry = world.fakes.registry.get("a")
    assert entry is not None and (entry.vram_total_bytes, entry.vram_free_bytes) == (24 * GIB, 13 * GIB)
    assert entry.vram_available_bytes == 12 * GIB and entry.compute_capability == "8.6"
    row = devices_view(world.fakes.gpus, world.fakes.clock, (1, 2), simulated=False)["devices"][0]
    assert row["reservations"] == [
        {
            "pool_id": "a",
            "replica_id": "r0",
            "reserved_bytes": 10 * GIB,
            "used_bytes": 9 * GIB,
            "estimated_bytes": None,
            "exclusive": False,
            "pids": [4000],
        }
    ]
    assert [p["pid"] for p in row["foreign"]] == [88] and row["vram_available_bytes"] == 12 * GIB


@pytest.mark.parametrize(
    ("gpus", "mask", "used"), [(2, None, [12, 12]), (1, "0,1", [12, 0]), (2, "0,1", [12, 12]), (1, None, [12])]
)
async def test_a_submitted_engine_that_takes_fractions_is_reserved_what_it_was_told_to_use(
    made: list[GpuWorld], gpus: int, mask: str | None, used: list[int]
) -> None:
    world = GpuWorld(gpu(0, 24), gpu(1, 24), gpu(2, 24))
    made.append(world)
    world.fakes.needs["x"] = LaunchInputs("vllm-1", "m", DeviceFraction(0.5, gpus=gpus))
    pool = world.pools.add("x")
    engine = PreparedEngine("x", "/bin/vllm", port=9000, engine="vllm", device_mask=mask, verbatim=True)
    await world.pools.change(pool, "preload", ev.Start(retry=False), "up", desired="up", engine=engine)
    await settle()
    assert view(pool.state).ready, pool.state.last_error
    (reservation,) = world.fakes.gpus.memory.ledger.all()
    assert list(reservation.bytes_by_device.values()) == [gib * GIB for gib in used]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [(EngineSettings(shares=(3, 1)), [9, 3]), (EngineSettings(only_device=1), [0, 12]), (EngineSettings(), [6, 6])],
)
async def test_a_submitted_llama_server_is_reserved_what_its_command_line_takes_of_each_gpu(
    made: list[GpuWorld], settings: EngineSettings, parts: list[int]
) -> None:
    world = GpuWorld(gpu(0, 24), gpu(1, 24))
    made.append(world)
    world.fakes.needs["x"] = LaunchInputs("llamacpp-b9", "m", settings, weights_bytes=12 * GIB, overhead_bytes=0)
    pool = world.pools.add("x")
    engine = PreparedEngine("x", "/bin/llama-server", port=9000, device_mask="1,0", verbatim=True)
    await world.pools.change(pool, "preload", ev.Start(retry=False), "up", desired="up", engine=engine)
    await settle()
    (reservation,) = world.fakes.gpus.memory.ledger.all()
    assert [round(reservation.bytes_by_device[uuid] / GIB) for uuid in sorted(reservation.bytes_by_device)] == parts


async def test_a_pool_that_is_registered_again_has_its_gpu_fields_at_once(made: list[GpuWorld]) -> None:
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


async def test_what_never_fits_is_tried_again_only_while_a_gpu_is_out_of_use(made: list[GpuWorld]) -> None:
    world = GpuWorld(gpu(0, 24), gpu(1, 48), gib=30)
    made.append(world)
    pool = world.pools.add("a", world.config.pools[0])
    await world.see(gpu(0, 24), gpu(1, 48))
    await world.fakes.watch.cordon("1")
    for needed, again in ((30, True), (60, False)):
        world.needs("a", needed)
        with pytest.raises(NodeError, match="when it is empty") as refused:
            await world.services.admission.forecast(pool)
        assert refused.value.retriable is again
        await world.fakes.watch.uncordon("1")
