"""Xid and ECC events: through NVML's event sets, through the kernel's log, and each told once."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pool_managerd.core.gpu.devices import DeviceIncident
from pool_managerd.host.kernel_log import follow, xid_of
from pool_managerd.host.monitor import NvmlMonitor
from pool_managerd.host.nvml_worker import EventWatch, Output, watch_kernel_log
from pool_managerd.host.scan_reply import IncidentFilter
from pool_managerd.host.worker_process import Workers
from tests.host.conftest import QUICK, Bench
from tests.host.simulated import MIG, MIG_UUIDS, NONE, ONE_24, TWO_24_12, eight_80, gpu_uuid

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
    assert next(lines) == (None, "one")
    os.write(fd, b"o\n")
    assert next(lines) == (None, "two")
    lines.close()
    os.close(fd)


@pytest.mark.parametrize("log", ["/dev/null", __file__])
def test_a_log_that_nobody_writes_ends_instead_of_being_read_for_ever(log: str) -> None:
    assert list(follow(Path(log))) == []


def record(number: int, words: str) -> str:
    return f"4,{number},9{number},-;{words}\n SUBSYSTEM=pci\n"


def test_a_log_is_followed_from_its_end_or_from_behind_what_was_read_before(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(record(number, f"words {number}") for number in range(7, 2000)))
    assert list(follow(log)) == [(1999, "")]
    assert [number for number, line in follow(log, after=1997) if "words" in line] == [1998, 1999]
    assert list(follow(log, after=1999)) == []


def test_the_kernels_own_log_can_be_followed_from_an_earlier_record() -> None:
    try:
        last, _ = next(follow(Path("/dev/kmsg")))
    except (OSError, StopIteration):
        pytest.skip("the kernel's log cannot be read here")
    assert last is not None
    earlier = follow(Path("/dev/kmsg"), after=last - 1)
    number, line = next(earlier)
    earlier.close()
    assert number == last and line.split(",")[1] == str(last)


async def log_read(bench: Bench, workers: Workers, number: int) -> None:
    """A worker scans the GPUs, and has read the log up to ``number``."""
    deadline = time.monotonic() + 5
    await bench.monitor.scan()
    while workers.log_read != number:
        assert time.monotonic() < deadline, f"waited in vain for record {number}, not {workers.log_read}"
        await bench.monitor.scan()


async def test_what_was_logged_between_two_workers_is_told_by_the_next_and_once(make_bench: Make, tmp_path: Path) -> None:
    log = tmp_path / "log"  # a plain file keeps its records as the kernel's log does
    log.write_text(record(5, FELL_OFF))
    bench = make_bench(ONE_24, kmsg=log)
    workers = Workers(bench.options)
    bench.monitor = NvmlMonitor(on_incident=bench.incidents.append, workers=workers, limits=QUICK)
    await log_read(bench, workers, 5)
    with log.open("a") as more:
        more.write(record(6, "usb 1-1: new device") + record(7, FELL_OFF.replace("79", "119")))
    for _ in range(3):
        await bench.monitor.release()
        await bench.monitor.resume()
        await log_read(bench, workers, 7)
    assert [incident.xid for incident in bench.incidents] == [119]


def test_how_far_the_log_was_read_is_told_at_once_and_with_every_incident(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(record(5, FELL_OFF) + record(6, FELL_OFF) + record(7, "usb 1-1: new device"))
    reading, writing = os.pipe()
    first, next_one = Output(writing), Output(writing)
    watch_kernel_log(str(log), None, first)
    watch_kernel_log(str(log), 5, next_one)
    os.close(writing)
    with os.fdopen(reading) as lines:
        told = [json.loads(line) for line in lines]
    assert told[0] == {"log": 7} and (told[1]["incident"]["xid"], told[1]["log"]) == (79, 6) and len(told) == 2
    assert (first.log, next_one.log) == (7, 7)


class Silent:
    """A binding whose GPUs cannot be registered for events, for a while."""

    class NVMLError(Exception):
        value = 999

    def __init__(self, failures: int) -> None:
        self.failures, self.asked = failures, 0

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlEventSetWait_v2(self, _set: object, _timeout_ms: int) -> object:
        threading.Event().wait()  # in a thread that ends with the tests
        raise AssertionError

    def nvmlDeviceRegisterEvents(self, *_args: object) -> None:
        self.asked += 1
        if self.asked <= self.failures:
            raise self.NVMLError("Unknown Error")


def test_a_gpu_that_could_not_be_registered_for_events_is_asked_again_and_noted_once() -> None:
    binding, output = Silent(failures=3), Output(2)
    watch = EventWatch(binding, output)
    for _ in range(6):
        watch.register(ctypes.c_void_p(7), "GPU-x", "0000:01:00")
    assert binding.asked == 4
    assert output.take_notes() == ["the driver tells of no events of GPU GPU-x: Unknown Error"]


async def test_a_gpu_without_ecc_memory_tells_of_its_xids_all_the_same(make_bench: Make, kmsg: Path) -> None:
    card = f'{NONE}gpu 0 uuid={gpu_uuid(0)} name="NVIDIA GeForce RTX 3090" cc=8.6 vram=24GiB ecc=off\n'
    bench = make_bench(card, kmsg=kmsg)  # the machine's own may be closed to this user, which is noted
    await bench.monitor.scan()
    bench.becomes(card, "xid gpu=0 code=79 serial=1")
    await heard(bench, 1)
    assert (bench.incidents[0].xid, bench.incidents[0].source) == (79, "nvml") and not bench.monitor.notes


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
