"""Xid and ECC events: through NVML's event sets, through the kernel's log, and each told once."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pool_managerd.core.devices import DeviceIncident
from pool_managerd.host.incidents import IncidentFilter
from pool_managerd.host.kernel_log import follow, xid_of
from tests.host.conftest import Bench
from tests.host.simulated import MIG, MIG_UUIDS, ONE_24, TWO_24_12, eight_80, gpu_uuid

Make = Callable[..., Bench]
UUID = gpu_uuid(0)
FELL_OFF = "NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."


async def heard(bench: Bench, count: int) -> list[DeviceIncident]:
    deadline = time.monotonic() + 5
    while len(bench.incidents) < count:
        assert time.monotonic() < deadline, f"{count} incidents were expected, there were {bench.incidents}"
        await asyncio.sleep(0.005)
    return bench.incidents


async def test_an_xid_is_told_once_with_the_gpu_it_is_about(make_bench: Make) -> None:
    bench = make_bench(ONE_24)
    await bench.monitor.scan()
    bench.becomes(ONE_24, "xid gpu=0 code=79 serial=1")
    await heard(bench, 1)
    bench.becomes(ONE_24, "xid gpu=0 code=79 serial=1", "xid gpu=0 code=31 serial=2")
    await heard(bench, 2)
    assert bench.incidents == [
        DeviceIncident(79, "nvml", UUID, "00000000:01:00.0"), DeviceIncident(31, "nvml", UUID, "00000000:01:00.0")
    ]  # fmt: skip


async def test_what_happened_before_the_worker_looked_is_history(make_bench: Make) -> None:
    bench = make_bench(ONE_24, "xid gpu=0 code=79 serial=1", "ecc gpu=0 uncorrected=4")
    await bench.monitor.scan()
    bench.becomes(ONE_24, "xid gpu=0 code=79 serial=1", "xid gpu=0 code=48 serial=2", "ecc gpu=0 uncorrected=4")
    assert [i.xid for i in await heard(bench, 1)] == [48]


async def test_an_uncorrectable_memory_error_is_an_incident_without_an_xid(make_bench: Make) -> None:
    bench = make_bench(ONE_24)
    await bench.monitor.scan()
    bench.becomes(ONE_24, "ecc gpu=0 uncorrected=1")
    (incident,) = await heard(bench, 1)
    assert (incident.xid, incident.uuid) == (None, UUID) and "double bit" in incident.text


async def test_a_gpu_that_came_later_is_listened_to_as_well(make_bench: Make) -> None:
    bench = make_bench(ONE_24)
    await bench.monitor.scan()
    bench.becomes(TWO_24_12)
    await bench.monitor.scan()
    bench.becomes(TWO_24_12, "xid gpu=1 code=48 serial=1")
    assert (await heard(bench, 1))[0].pci_bus_id == "00000000:02:00.0"


async def test_events_are_heard_again_after_the_worker_was_replaced(make_bench: Make) -> None:
    bench = make_bench(eight_80())
    await bench.monitor.scan()
    await bench.monitor.release()
    await bench.monitor.resume()
    await bench.monitor.scan()
    bench.becomes(eight_80(), "xid gpu=5 code=63 serial=9")
    assert (await heard(bench, 1))[0].uuid == gpu_uuid(5)


async def test_an_event_of_a_mig_instance_is_its_gpus(make_bench: Make) -> None:
    bench = make_bench(MIG)
    await bench.monitor.scan()
    bench.becomes(MIG, f"xid mig={MIG_UUIDS[0]} code=94 serial=1")
    assert (await heard(bench, 1))[0].uuid == gpu_uuid(0)


@pytest.fixture
def kmsg(tmp_path: Path) -> Path:
    path = tmp_path / "kmsg"
    os.mkfifo(path)
    return path


async def test_the_kernels_log_tells_of_xids_too(make_bench: Make, kmsg: Path) -> None:
    bench = make_bench(ONE_24, kmsg=kmsg)
    await bench.monitor.scan()
    with kmsg.open("w") as log:
        log.write(f"usb 1-1: new device\n{FELL_OFF}\nNVRM: Xid (PCI:0000:99:00): 154, GPU reset Required\n")
    await heard(bench, 2)
    assert bench.incidents[0] == DeviceIncident(
        79, "kernel_log", None, "0000:01:00", "pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
    )
    assert bench.incidents[1].xid == 154 and "Required" in bench.incidents[1].text
    assert bench.monitor.notes == ()


async def test_the_same_event_from_both_sources_is_one(make_bench: Make, kmsg: Path) -> None:
    bench = make_bench(ONE_24, kmsg=kmsg)
    await bench.monitor.scan()
    with kmsg.open("w") as log:
        log.write(f"{FELL_OFF}\n")
    await heard(bench, 1)
    bench.becomes(ONE_24, "xid gpu=0 code=79 serial=1", "xid gpu=0 code=13 serial=2")
    assert [i.xid for i in await heard(bench, 2)] == [79, 13]


async def test_a_flood_of_xids_is_limited_and_counted_and_hides_no_other_kind(make_bench: Make, kmsg: Path) -> None:
    bench = make_bench(ONE_24, kmsg=kmsg)
    await bench.monitor.scan()
    with kmsg.open("w") as log:
        log.write("NVRM: Xid (PCI:0000:01:00): 31, pid=1, name=x, Ch 1\n" * 500 + f"{FELL_OFF}\n")
    await heard(bench, 11)
    deadline = time.monotonic() + 5
    while not bench.monitor.notes:
        assert time.monotonic() < deadline
        await bench.monitor.scan()
    assert 11 <= len(bench.incidents) < 40 and "came too fast" in bench.monitor.notes[0]
    assert any(incident.xid == 79 for incident in bench.incidents)


async def test_a_log_that_cannot_be_read_is_noted_once_and_no_failure(make_bench: Make, tmp_path: Path) -> None:
    bench = make_bench(ONE_24, kmsg=tmp_path / "nowhere")
    deadline = time.monotonic() + 5
    while not bench.monitor.notes:
        assert time.monotonic() < deadline
        assert (await bench.monitor.scan()).problem is None
    await bench.monitor.scan()
    assert len(bench.monitor.notes) == 1 and "nowhere: No such file or directory" in bench.monitor.notes[0]


def test_only_the_kernel_can_claim_an_xid() -> None:
    assert xid_of(f"3,1234,987654,-;{FELL_OFF}") == {
        "xid": 79, "source": "kernel_log", "pci_bus_id": "0000:01:00",
        "text": "pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    }  # fmt: skip
    assert xid_of(f"12,1234,987654,-;{FELL_OFF}") is None  # facility 1: a program wrote into the log


@pytest.mark.parametrize(
    "line",
    ["", "6,1,2,-;", "NVRM: loading NVIDIA UNIX x86_64", "NVRM: Xid (PCI:zz): 1", "NVRM: Xid (PCI:0000:01:00): x", ";" * 9000],
)
def test_other_lines_are_no_incidents(line: str) -> None:
    assert xid_of(line) is None


def test_older_and_newer_drivers_lines_are_understood() -> None:
    for line in ("NVRM: Xid (0000:02:00): 31, Ch 7", "NVRM: Xid (PCI:0000:02:00 GPU-I:05): 31, pid=2"):
        assert (found := xid_of(line)) is not None and (found["pci_bus_id"], found["xid"]) == ("0000:02:00", 31)


def test_lines_that_arrive_in_pieces_are_put_together(kmsg: Path) -> None:
    fd = os.open(kmsg, os.O_RDWR)  # what is written before the reader opens it waits in the FIFO
    lines = follow(kmsg)
    os.write(fd, b"one\ntw")
    assert next(lines) == "one"
    os.write(fd, b"o\n")
    assert next(lines) == "two"
    lines.close()
    os.close(fd)


@pytest.mark.parametrize("log", ["/dev/null", __file__])
def test_a_log_that_nobody_writes_ends_instead_of_being_read_for_ever(log: str) -> None:
    assert list(follow(Path(log))) == []


def test_a_source_may_repeat_itself_and_another_one_only_later() -> None:
    told = IncidentFilter()
    nvml, log = (DeviceIncident(31, "nvml", "u", "00000000:01:00.0"), DeviceIncident(31, "kernel_log", None, "0000:01:00", "x"))
    assert [told.is_news(i, now) for i, now in ((nvml, 0), (log, 0.1), (nvml, 0.2), (log, 0.3), (log, 9))] == [
        True, False, True, False, True,
    ]  # fmt: skip
    assert told.is_news(DeviceIncident(31, "kernel_log", None, "0000:02:00", "x"), 0.1)
    assert told.is_news(DeviceIncident(None, "nvml", "u", "00000000:01:00.0"), 0.1)


def test_a_recovery_action_is_told_for_the_sake_of_its_text() -> None:
    told = IncidentFilter()
    assert told.is_news(DeviceIncident(154, "nvml", "u", "00000000:01:00.0"), 0)
    assert told.is_news(DeviceIncident(154, "kernel_log", None, "0000:01:00", "GPU Reset Required"), 0.1)
