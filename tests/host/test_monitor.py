"""What a scan says of simulated GPUs, through the real binding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.host.monitor import NvmlMonitor
from pool_managerd.host.worker_process import WorkerOptions, Workers
from tests.host.conftest import Bench
from tests.host.simulated import A100, MIG, MIG_UUIDS, NONE, ONE_24, TWO_24_12, eight_80, gpu_uuid

Make = Callable[..., Bench]
MIB, GIB = 1 << 20, 1 << 30


async def test_without_a_driver_library_there_are_no_gpus_and_the_scan_says_why(tmp_path: Path) -> None:
    monitor = NvmlMonitor(on_incident=lambda _: None, workers=Workers(WorkerOptions()))
    scan = await monitor.scan()
    await monitor.close()
    if scan.problem is None or scan.problem.code != "nvml_unavailable":
        assert scan.devices or scan.problem  # this machine has a driver: nothing to show here
        return
    assert scan.no_gpus and scan.stale and "libnvidia-ml.so.1" in scan.problem.message and scan.problem.hint


async def test_a_driver_without_gpus_is_no_problem(make_bench: Make) -> None:
    scan = await make_bench(NONE).monitor.scan()
    assert scan.problem is None and scan.no_gpus and scan.driver_version == "570.86.15" and scan.cuda_version == "12.8"


async def test_a_gpu_is_described_whole(make_bench: Make) -> None:
    bench = make_bench(ONE_24, "ecc gpu=0 uncorrected=3", "pending gpu=0", "usage gpu=0 vram=1GiB")
    scan = await bench.monitor.scan()
    assert scan.devices == (
        DeviceSnapshot(
            0, gpu_uuid(0), 24 * GIB, 23 * GIB - 400 * MIB, "8.6", "NVIDIA GeForce RTX 3090",
            "00000000:01:00.0", 400 * MIB, numa_node=0, temperature_c=41, power_watts=30.0, utilization_percent=0,
            ecc_uncorrected=3, reset_pending=True, persistence_mode=True,
        ),
    )  # fmt: skip
    assert scan.devices[0].vram_used_bytes == GIB


async def test_facts_that_a_gpu_does_not_have_are_none_and_not_zero(make_bench: Make) -> None:
    line = "gpu 0 vram=8GiB cc=7.5 ecc=off persistence=off"
    device = (await make_bench(NONE, line).monitor.scan()).devices[0]
    assert (device.ecc_uncorrected, device.numa_node, device.persistence_mode) == (None, None, False)
    assert not device.mig_enabled and not device.reset_pending and device.error is None


async def test_a_pending_page_retirement_of_an_older_gpu_waits_for_a_reset_too(make_bench: Make) -> None:
    scan = await make_bench(NONE, "gpu 0 vram=8GiB cc=7.5", "pending gpu=0").monitor.scan()
    assert scan.devices[0].reset_pending


async def test_used_memory_beyond_what_is_there_leaves_nothing_and_never_less(make_bench: Make) -> None:
    scan = await make_bench(ONE_24, "usage gpu=0 vram=900GiB").monitor.scan()
    assert scan.devices[0].vram_free_bytes == 0


async def test_a_gpu_without_memory_of_its_own_shows_the_machines(make_bench: Make) -> None:
    device = (await make_bench(ONE_24, "memory gpu=0 info=unsupported").monitor.scan()).devices[0]
    text = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert device.error is None and device.vram_total_bytes == int(text["MemTotal"].split()[0]) * 1024
    assert 0 < device.vram_free_bytes < device.vram_total_bytes


async def test_mixed_gpus_are_listed_in_their_order(make_bench: Make) -> None:
    scan = await make_bench(TWO_24_12).monitor.scan()
    assert [(d.id, d.vram_total_bytes // GIB) for d in scan.devices] == [(0, 24), (1, 12)]


async def test_nvlink_pairs_and_numa_nodes_are_seen(make_bench: Make) -> None:
    scan = await make_bench(eight_80()).monitor.scan()
    assert [d.numa_node for d in scan.devices] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [d.nvlink_peers for d in scan.devices] == [(gpu_uuid(n ^ 1),) for n in range(8)]


async def test_gpus_behind_one_switch_are_all_peers(make_bench: Make) -> None:
    def named(number: int) -> str:
        return f"GPU-00000000-0000-0000-0000-{number:012}"  # when the file gives none

    lines = [f"gpu {n} vram=80GiB cc=9.0" for n in range(3)]
    bench = make_bench(NONE, *lines, "nvlink 0 switch", "nvlink 0 switch", "nvlink 2 switch")
    assert [d.nvlink_peers for d in (await bench.monitor.scan()).devices] == [(named(2),), (), (named(0),)]


async def test_mig_instances_are_devices_of_their_own_that_name_their_parent(make_bench: Make) -> None:
    bench = make_bench(MIG, f"process mig={MIG_UUIDS[0]} pid=999999 vram=4GiB")
    parent, first, second = (await bench.monitor.scan()).devices
    assert parent.mig_enabled and not parent.usable and parent.processes == ()
    assert (first.uuid, first.parent_uuid, first.id, first.usable) == (MIG_UUIDS[0], parent.uuid, 0, True)
    assert (first.vram_total_bytes, first.vram_free_bytes) == (10 * GIB, 6 * GIB)
    assert [p.pid for p in first.processes] == [999999] and second.processes == ()
    assert second.vram_free_bytes == 20 * GIB and second.compute_capability == "8.0" and second.numa_node == 0


async def test_mig_is_turned_on_and_off_while_running(make_bench: Make) -> None:
    bench = make_bench(A100)
    seen = [(await bench.monitor.scan()).devices]
    for text in (MIG, A100):
        bench.becomes(text)
        seen.append((await bench.monitor.scan()).devices)
    assert [len(devices) for devices in seen] == [1, 3, 1]
    assert [devices[0].mig_enabled for devices in seen] == [False, True, False]


async def test_a_gpu_goes_and_the_others_keep_their_uuids(make_bench: Make) -> None:
    bench = make_bench(eight_80())
    await bench.monitor.scan()
    bench.becomes(eight_80(), "fault gpu=3 gone")
    scan = await bench.monitor.scan()
    assert [d.uuid for d in scan.devices] == [gpu_uuid(n) for n in (0, 1, 2, 4, 5, 6, 7)]
    assert [d.id for d in scan.devices] == list(range(7)) and scan.devices[2].nvlink_peers == ()


async def test_another_order_moves_indices_and_nothing_else(make_bench: Make) -> None:
    bench = make_bench(eight_80())
    before = {d.uuid: d.pci_bus_id for d in (await bench.monitor.scan()).devices}
    bench.becomes(eight_80((7, 6, 5, 4, 3, 2, 1, 0)))
    scan = await bench.monitor.scan()
    assert [d.uuid for d in scan.devices] == [gpu_uuid(n) for n in range(7, -1, -1)]
    assert {d.uuid: d.pci_bus_id for d in scan.devices} == before


async def test_a_half_written_or_wrong_file_changes_nothing_until_it_is_whole(make_bench: Make) -> None:
    bench = make_bench(ONE_24)
    first = (await bench.monitor.scan()).devices
    for bad in (TWO_24_12[:-1], ONE_24 + "gpu 1 vram=lots\n", TWO_24_12[:-20]):
        bench.becomes(bad)
        assert (await bench.monitor.scan()).devices == first
    bench.becomes(TWO_24_12)
    assert len((await bench.monitor.scan()).devices) == 2
    bench.file.unlink()
    assert len((await bench.monitor.scan()).devices) == 2


async def test_callers_of_one_moment_share_one_look_and_later_ones_get_a_later_one(make_bench: Make) -> None:
    monitor = make_bench().monitor
    await monitor.scan()
    together = await asyncio.gather(*(monitor.scan() for _ in range(20)))
    assert len({id(scan) for scan in together}) == 1
    running = asyncio.create_task(monitor.scan())
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # its question is asked now
    later = await asyncio.gather(monitor.scan(), monitor.scan())
    assert later[0] is later[1] and later[0].taken_at > (await running).taken_at


async def test_a_caller_that_gives_up_takes_nobody_elses_answer_away(make_bench: Make) -> None:
    monitor = make_bench().monitor
    impatient, patient = asyncio.create_task(monitor.scan()), asyncio.create_task(monitor.scan())
    await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).problem is None
