"""Every crash of a pool becomes a report: with its class, evidence and remedy, and what was done about it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_diagnosis import LaunchLog
from pool_managerd.core.crash_report import UNDECIDED, CrashReport, Source
from pool_managerd.core.health import ProbeOutcome, ProbeResult
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle import view
from pool_managerd.core.listeners import NOBODY, Listener
from pool_managerd.supervision.crash_log import MAX_OF_A_POOL, MAX_REPORTS, CrashLog
from pool_managerd.supervision.launch_work import LONG_LOG_BYTES
from pool_managerd.testing.fake_watch import FakeListeners
from pool_managerd.testing.manual_clock import settle
from tests.supervision.test_pools import World

STOP = (ev.Stop(), "down")
SILENT = ProbeResult(ProbeOutcome.TIMEOUT, "had no answer within 2 s")


class Kept:
    """A journal of crash reports alone."""

    def __init__(self) -> None:
        self.bodies: dict[str, Any] = {}

    def put_crash(self, crash_id: str, body: Any) -> None:
        self.bodies.pop(crash_id, None)
        if body is not None:
            self.bodies[crash_id] = body

    def recall_crashes(self) -> list[Any]:
        return list(self.bodies.values())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.pools.close()


async def test_an_engine_that_dies_is_reported_with_what_is_known_and_what_is_done(world: World) -> None:
    await world.up()
    world.fakes.files.log = ["loading", "CUDA error: an illegal memory access was encountered", "[New LWP 7]"]
    await world.fakes.clock.advance(2)
    world.fakes.launcher.processes[0].end(ExitRecord(signal=6))
    await settle()
    (report,) = world.fakes.crashes.recent("p")
    assert (report.crash, report.summary, report.signal, report.exit_code) == (CrashClass.CUDA, "signal SIGABRT", "SIGABRT", None)
    assert report.action.startswith("starting it again in ") and report.remedy.code == "check_gpu"
    assert [e.source for e in report.evidence] == [Source.EXIT_RECORD, Source.LOG]
    assert report.evidence[1].offset == 1 and report.log_tail[-1] == "[New LWP 7]"
    assert (report.epoch, report.engine_version) == (1, "fake-1") and (report.uptime_seconds or 0) >= 2
    (crash,) = (event for event in world.fakes.told if event.type == "crash")
    assert crash.level == "error" and crash.fields["crash_class"] == "cuda"
    for key in ("evidence", "remediation", "action", "summary", "last_error", "uptime_seconds", "log_tail"):
        assert crash.fields[key] == report.to_json()[key], key


@pytest.mark.parametrize(("lines", "beside_the_loop"), [(3, False), (LONG_LOG_BYTES + 1, True)])
async def test_a_long_log_is_read_beside_the_loop_and_a_short_one_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch, lines: int, *, beside_the_loop: bool
) -> None:
    await world.up()
    threads: list[int] = []
    read = world.fakes.files.launch_log

    def noted(instance: InstanceId, mark: Mapping[int, int]) -> LaunchLog:
        threads.append(threading.get_ident())
        return read(instance, mark)

    monkeypatch.setattr(world.fakes.files, "launch_log", noted)
    world.fakes.files.log = ["x"] * lines  # a fake file has a byte for each
    world.fakes.launcher.processes[0].end(ExitRecord(code=1))
    async with asyncio.timeout(10):
        while not world.fakes.crashes.recent("p"):
            await asyncio.sleep(0)
    assert [ident != threading.get_ident() for ident in threads] == [beside_the_loop]


async def test_the_kernel_killing_for_want_of_memory_is_an_alert(world: World) -> None:
    pool = await world.up()
    world.fakes.launcher.processes[0].end(ExitRecord(signal=9, oom_kills=1, oom_scope="engine"))
    await settle()
    assert pool.state.last_error == "out_of_memory"
    (crash,) = (event for event in world.fakes.told if event.type == "crash")
    assert crash.level == "critical" and crash.fields["remediation"]["code"] == "add_ram"
    (report,) = world.fakes.crashes.recent()
    assert report.crash is CrashClass.OUT_OF_MEMORY and report.evidence[-1].source is Source.CGROUP


async def test_an_engine_that_stops_answering_is_reported_when_it_is_ended_and_once(world: World) -> None:
    pool = await world.up()
    world.fakes.prober.result = SILENT
    world.fakes.files.log = ["slot 0 is processing"]
    await world.fakes.clock.advance(60)
    reports = [report for report in world.fakes.crashes.recent("p") if report.epoch == 1]
    assert [report.crash for report in reports] == [CrashClass.HEALTH_FAILURE]
    (report,) = reports
    assert [(e.source, "had no answer within 2 s" in e.text) for e in report.evidence] == [(Source.PROBE, True)]
    assert report.action.startswith("starting it again in ") and report.remedy.code == "look_at_load"
    assert report.last_error.startswith("health check failed") and (report.uptime_seconds or 0) > 1
    first = next(event for event in world.fakes.told if event.type == "crash")
    assert pool.state.crash_count >= 1 and first.fields["crash_class"] == "health_failure" and first.fields["crash_count"] == 1
    for key in ("evidence", "remediation", "summary", "last_error", "uptime_seconds", "log_tail"):
        assert first.fields[key] == report.to_json()[key], key


async def test_an_engine_that_never_answers_is_told_apart_from_one_that_stopped(world: World) -> None:
    world.fakes.prober.result = SILENT
    pool = world.pools.add("p", world.config.pools[0])
    await world.start()
    await world.fakes.clock.advance(pool.definition.policy.startup_timeout_s + 10)
    report = world.fakes.crashes.recent("p")[0]
    assert (report.crash, report.remedy.code) == (CrashClass.HEALTH_FAILURE, "startup_too_slow")
    told = [event for event in world.fakes.told if event.type == "crash"]
    assert pool.state.crash_count == len(told) == len(world.fakes.crashes.recent("p")) == 1
    assert world.fakes.records.counters["p"][0] == 1, "the next daemon counts on"


async def test_who_holds_its_port_is_evidence(world: World) -> None:
    world.services = world.fakes.services(listener=FakeListeners(Listener("other", "nginx (pid 7)")))
    world.pools = type(world.pools)(world.config, world.services, world.store, world.store, world.new_id)
    world.fakes.prober.result = SILENT
    pool = world.pools.add("p", world.config.pools[0])
    await world.start()
    await settle()
    for _ in range(pool.definition.policy.port_retries + 1):
        world.fakes.launcher.processes[-1].end(ExitRecord(code=1))
        await world.fakes.clock.advance(0.01)
    (report,) = world.fakes.crashes.recent("p")
    assert (report.crash, report.remedy.code) == (CrashClass.PORT_CONFLICT, "free_port")
    assert report.evidence[-1].source is Source.PROBE and "nginx (pid 7)" in report.evidence[-1].text


@pytest.mark.parametrize(("lines", "crash"), [
    (["metrics: Address already in use", "error: tokenizer is corrupt"], "process_exit"),
    (["couldn't bind HTTP server socket: Address already in use"], "port_conflict"),
])  # fmt: skip
async def test_a_port_that_nobody_holds_was_not_taken_where_its_log_names_another_cause(
    world: World, lines: list[str], crash: str
) -> None:
    world.services = world.fakes.services(listener=FakeListeners(NOBODY))
    world.pools = type(world.pools)(world.config, world.services, world.store, world.store, world.new_id)
    world.fakes.prober.result = ProbeResult(ProbeOutcome.ERROR, "was refused: nothing listens on the port", refused=True)
    world.pools.add("p", world.config.pools[0])
    await world.start()
    await settle()
    world.fakes.files.log = lines
    world.fakes.launcher.processes[0].end(ExitRecord(code=1))
    await settle()
    seen = world.p.launch.diagnosis
    told = [event.type for event in world.fakes.told if event.type in ("port_conflict", "crash")]
    assert told[0] == ("crash" if crash == "process_exit" else "port_conflict"), (seen, told)


async def test_what_it_said_before_it_was_ready_does_not_explain_its_end(world: World) -> None:
    good, world.fakes.prober.result = world.fakes.prober.result, SILENT
    world.pools.add("p", world.config.pools[0])
    await world.start()
    await settle()
    world.fakes.files.log.append("E ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected")
    world.fakes.prober.result = good
    await world.fakes.clock.advance(3)
    assert view(world.p.state).ready
    world.fakes.files.log.append("a request was answered")
    world.fakes.launcher.processes[0].end(ExitRecord(code=1))
    await settle()
    (report,) = world.fakes.crashes.recent("p")
    assert report.crash is CrashClass.PROCESS_EXIT and "a request was answered" not in report.summary


async def test_an_engine_that_listens_elsewhere_is_told_so_when_it_is_given_up(world: World) -> None:
    listeners = FakeListeners(NOBODY, ["127.0.0.1:9999", "[::1]:8080"])
    world.services = world.fakes.services(listener=listeners)
    world.pools = type(world.pools)(world.config, world.services, world.store, world.store, world.new_id)
    world.fakes.prober.result = ProbeResult(ProbeOutcome.ERROR, "was refused: nothing listens on the port", refused=True)
    pool = world.pools.add("p", world.config.pools[0])
    await world.start()
    await world.fakes.clock.advance(4)
    assert listeners.looks == 0, "it is loading"
    await world.fakes.clock.advance(pool.definition.policy.startup_timeout_s + 10)
    report = world.fakes.crashes.recent("p")[0]
    assert "this engine listens on 127.0.0.1:9999 and [::1]:8080 instead" in report.last_error
    assert "where it listens" in report.remedy.sentence and listeners.looks < 80


async def test_a_stop_that_was_asked_for_is_no_crash(world: World) -> None:
    await world.up()
    await world.pools.change(world.p, "stop", *STOP)
    await settle()
    assert world.fakes.crashes.recent() == [] and view(world.p.state).state == "offline"


async def test_secrets_of_the_log_are_in_no_report(world: World) -> None:
    world.fakes.events.redactor.know("p", {"hunter2hunter2"})
    await world.up()
    world.fakes.files.log = ["error: token hunter2hunter2 was refused"]
    world.fakes.launcher.processes[0].end(ExitRecord(code=1))
    await settle()
    (report,) = world.fakes.crashes.recent("p")
    assert "hunter2" not in str(report.to_json()) and "was refused" in report.last_error + report.log_tail[0]


def one(pool_id: str, epoch: int, **fields: Any) -> CrashReport:
    return CrashReport(pool_id, epoch, 1_795_000_000_000 + epoch, CrashClass.SIGNAL, **fields)


def test_what_is_kept_is_bounded_per_pool_and_in_all_and_on_disk_too() -> None:
    journal = Kept()
    log = CrashLog(journal)  # type: ignore[arg-type]
    for epoch in range(MAX_OF_A_POOL + 5):
        log.put(one("p", epoch))
    assert [report.epoch for report in log.recent("p")] == list(range(5, MAX_OF_A_POOL + 5))
    for number in range(MAX_REPORTS):
        log.put(one(f"q{number}", number))
    assert len(log.recent()) == len(journal.bodies) == MAX_REPORTS and log.recent("p") == []
    assert log.recent()[-1].pool_id == f"q{MAX_REPORTS - 1}"


def test_a_report_that_is_completed_keeps_its_place_and_what_is_stored_comes_back() -> None:
    journal = Kept()
    log = CrashLog(journal)  # type: ignore[arg-type]
    first = log.put(one("p", 1))
    log.put(one("p", 2))
    assert first.action == UNDECIDED
    log.put(one("p", 1, action="starting it again in 1 s"))
    assert [(report.epoch, report.action != UNDECIDED) for report in log.recent("p")] == [(1, True), (2, False)]
    journal.bodies["broken"] = {"schema_version": 99}
    later = CrashLog(journal)  # type: ignore[arg-type]
    later.restore()
    assert {report.epoch for report in later.recent("p")} == {1, 2}
    later.put(one("q", 1))
    later.forget_others({"q"})
    assert later.recent("p") == [] and later.last("p") is None and later.last("q") is not None
    later.forget("q")
    assert later.recent() == [] and journal.bodies.keys() == {"broken"}


async def test_an_open_breaker_is_what_is_done(world: World) -> None:
    pool = await world.up()
    for _ in range(20):
        if view(pool.state).state == "failed" or pool.state.reason == "circuit_open":
            break
        world.fakes.launcher.processes[-1].end(ExitRecord(code=3))
        await world.fakes.clock.advance(65)
    reports = world.fakes.crashes.recent("p")
    assert pool.state.reason == "circuit_open" and len(reports) > 2
    assert reports[0].action.startswith("starting it again in ") and reports[-1].action.startswith("Breaker of pool 'p' is open")


async def test_what_can_never_run_is_reported_as_given_up(world: World) -> None:
    pool = world.pools.add("p", world.config.pools[0])
    world.fakes.prober.result = SILENT
    await world.start()
    await settle()
    world.fakes.files.log = ["error: invalid argument: --ctx-siz"]
    world.fakes.launcher.processes[0].end(ExitRecord(code=1))
    await settle()
    (report,) = world.fakes.crashes.recent("p")
    assert view(pool.state).state == "failed" and report.crash is CrashClass.BAD_FLAGS
    assert report.action == "it stays down because another start would end the same way"
