"""Crashes, drains, leases, events and handoffs, seen from outside one real daemon."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port, wait_until
from tests.system.daemons import Daemon, engine, in_time
from tests.system.nodes import alive


@pytest.fixture(scope="module")
def daemon(session_dir: Path, closed_to_engines: str | None) -> Iterator[Daemon]:
    if closed_to_engines is not None:
        pytest.skip(closed_to_engines)
    served = Daemon(session_dir / "lifecycle").start()
    yield served
    served.end()


def events(daemon: Daemon, query: str = "after=0&follow=false", headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    code, text = daemon.call("GET", f"/v1/events?{query}", headers=headers)
    assert code == 200
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def test_a_killed_engine_is_told_counted_and_ready_again(daemon: Daemon) -> None:
    pid = daemon.preload("crash", engine_version="v3")["pid"]
    daemon.post("/v1/pools/crash/leases")
    assert daemon.get("/v1/pools/crash/status")[1]["active_leases"] == 1
    os.kill(pid, signal.SIGKILL)
    daemon.until(lambda s: s["ready"] and s["pid"] != pid, "the engine to be back", "crash")
    status = daemon.status("crash")
    assert (status["crash_count"], status["restart_count"], status["active_leases"]) == (1, 1, 0)
    assert (daemon.run / "crash.pid").read_text() == str(status["pid"])

    wait_until(lambda: len([x for x in daemon.lines("restart") if x["pool_id"] == "crash"]) == 1, "the log to tell of it", 15)
    crash = next(line for line in daemon.lines("crash") if line["pool_id"] == "crash")
    assert crash.keys() >= {"pool_id", "engine_version", "uptime_seconds", "exit_code", "crash_count", "human"}
    assert (crash["engine_version"], crash["exit_code"], crash["signal"], crash["crash_count"]) == ("v3", None, "SIGKILL", 1)
    assert crash["uptime_seconds"] > 0 and crash["level"] == "error"
    backoff = next(line for line in daemon.lines("backoff") if line["pool_id"] == "crash")
    assert backoff["backoff_ms"] > 0 and backoff["crash_count"] == 1 and backoff["crash_reason"] == "signal"
    assert abs(backoff["next_restart_at"] - time.time() * 1000) < 60_000
    for line in daemon.lines():
        assert line.keys() >= {"ts", "level", "action", "human", "service", "version"}, line
    assert [report["crash_class"] for report in daemon.get("/v1/pools/crash/crashes")[1]] == ["signal"]

    metrics = daemon.get("/metrics")[1].splitlines()
    assert any(x.startswith("restart_total{") and 'pool_id="crash"' in x and x.endswith(" 1.0") for x in metrics)
    assert any(x.startswith("restart_scheduled_total{") and 'crash_reason="signal"' in x for x in metrics)


def test_an_engine_that_dies_again_and_again_backs_off_longer_each_time_and_is_counted(daemon: Daemon) -> None:
    daemon.preload("loop", "--exit-after", "0.15", "--exit-code", "3")
    daemon.until(lambda s: s["crash_count"] >= 4, "four crashes", "loop")
    daemon.post("/v1/pools/loop/stop?wait=true")
    waits = [line["backoff_ms"] for line in daemon.lines("backoff") if line["pool_id"] == "loop"]
    assert waits[:4] == [50, 100, 200, 400]
    assert {line["exit_code"] for line in daemon.lines("crash") if line["pool_id"] == "loop"} == {3}
    status = daemon.status("loop")
    assert status["state"] == "offline" and not (daemon.run / "loop.pid").exists()


def test_a_drain_without_leases_stops_at_once_and_says_how_it_went(daemon: Daemon) -> None:
    pid = daemon.preload("empty")["pid"]
    code, operation = in_time(10, lambda: daemon.post("/v1/pools/empty/drain?wait=true", {"deadline_ms": 60_000}))
    assert code == 200 and operation["status"] == "succeeded"
    outcome = operation["outcome"]
    assert outcome.keys() == {"pool_id", "force_stopped", "duration_ms", "final_lease_count"}
    assert (outcome["pool_id"], outcome["force_stopped"], outcome["final_lease_count"]) == ("empty", False, 0)
    assert not alive(pid) and daemon.status("empty")["state"] == "offline"
    assert daemon.post("/v1/pools/empty/leases")[1]["code"] == "POOL_UNREADY"
    assert daemon.post("/v1/pools/empty/start?wait=true")[0] == 200 and daemon.status("empty")["ready"]


def test_a_drain_waits_for_its_leases_refuses_new_ones_and_cuts_at_the_deadline(daemon: Daemon) -> None:
    daemon.preload("busy", slots_total=3)
    given = [daemon.post("/v1/pools/busy/leases")[1]["lease_id"] for _ in range(2)]
    code, operation = daemon.post("/v1/pools/busy/drain", {"deadline_ms": 700})
    assert code == 202 and operation["operation_id"]
    status = daemon.status("busy")
    assert (status["draining"], status["ready"], status["live"], status["active_leases"]) == (True, False, True, 2)
    refused = daemon.post("/v1/pools/busy/leases")
    assert (refused[0], refused[1]["code"]) == (409, "POOL_DRAINING")
    assert daemon.delete(f"/v1/pools/busy/leases/{given[0]}") == (200, {"active_leases": 1})
    path = f"/v1/operations/{operation['operation_id']}"
    wait_until(lambda: daemon.get(path)[1]["status"] == "succeeded", "the drain to end", 5)
    outcome = daemon.get(path)[1]["outcome"]
    assert (outcome["force_stopped"], outcome["final_lease_count"]) == (True, 1) and 650 <= outcome["duration_ms"] < 3_000
    assert daemon.status("busy")["active_leases"] == 0
    assert daemon.delete(f"/v1/pools/busy/leases/{given[1]}") == (200, {"active_leases": 0})
    assert next(line for line in daemon.lines("drain_started") if line["pool_id"] == "busy")["active_leases"] == 2


def test_a_drain_ends_with_the_last_lease_and_can_be_called_off(daemon: Daemon) -> None:
    daemon.preload("undo")
    lease = daemon.post("/v1/pools/undo/leases")[1]["lease_id"]
    assert daemon.post("/v1/pools/undo/drain", {"deadline_ms": 60_000})[0] == 202
    assert daemon.post("/v1/pools/undo/undrain")[0] == 202
    daemon.until(lambda s: s["ready"] and not s["draining"], "the drain to be called off", "undo")
    operation = daemon.post("/v1/pools/undo/drain", {"deadline_ms": 60_000})[1]
    assert daemon.delete(f"/v1/pools/undo/leases/{lease}")[0] == 200
    daemon.until(lambda s: s["state"] == "offline", "the drain to end with its last lease", "undo")
    assert daemon.get(f"/v1/operations/{operation['operation_id']}")[1]["outcome"]["force_stopped"] is False
    running = [o for o in daemon.get("/v1/operations")[1] if o["pool_id"] == "undo" and o["status"] == "running"]
    assert running == [], "the drain that was called off has ended, too"


@pytest.mark.parametrize("deadline", [-1, 86_400_001, 1.5, "1", True, [], 10**18])
def test_a_deadline_out_of_bounds_is_refused_and_drains_nothing(daemon: Daemon, deadline: Any) -> None:
    if daemon.get("/v1/pools/bounds/status")[0] == 404:
        daemon.preload("bounds")
    assert daemon.post("/v1/pools/bounds/drain", {"deadline_ms": deadline})[0] == 400
    assert daemon.status("bounds")["ready"]


def test_leases_are_given_once_released_once_and_run_out(daemon: Daemon) -> None:
    daemon.preload("lease", slots_total=2)
    code, first = daemon.post("/v1/pools/lease/leases", {"holder": "me"})
    assert code == 201 and first["active_leases"] == 1
    assert daemon.post("/v1/pools/lease/leases", {"ttl_ms": 300})[1]["active_leases"] == 2
    full = daemon.post("/v1/pools/lease/leases")
    assert (full[0], full[1]["code"]) == (409, "NO_FREE_SLOTS")
    assert [row["holder"] for row in daemon.get("/v1/pools/lease/leases")[1]] == ["me", None]
    daemon.until(lambda s: s["active_leases"] == 1, "the lease with a ttl to run out", "lease", 15)
    renewed = daemon.call("PUT", f"/v1/pools/lease/leases/{first['lease_id']}", {"ttl_ms": 60_000})
    assert renewed[0] == 200
    for _ in range(3):
        assert daemon.delete(f"/v1/pools/lease/leases/{first['lease_id']}") == (200, {"active_leases": 0})
    for never in ("never-given", "..", "%00", "x" * 500):
        assert daemon.delete(f"/v1/pools/lease/leases/{never}")[0] in (404, 405), never
    refused: tuple[Any, ...] = ({"ttl_ms": 0}, {"ttl_ms": -5}, {"ttl_ms": 10**12}, {"ttl_ms": "1"}, {"holder": 3}, {"x": 1}, [])
    for bad in refused:
        assert daemon.post("/v1/pools/lease/leases", bad)[0] == 400, bad
    assert daemon.status("lease")["active_leases"] == 0


def test_of_a_hundred_at_once_exactly_one_gets_the_only_slot(daemon: Daemon) -> None:
    daemon.preload("race")
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda _: daemon.post("/v1/pools/race/leases"), range(100)))
    codes = sorted(code for code, _ in answers)
    assert codes == [201] + [409] * 99
    lease = next(answer["lease_id"] for code, answer in answers if code == 201)
    with ThreadPoolExecutor(8) as clients:
        ends = list(clients.map(lambda _: daemon.delete(f"/v1/pools/race/leases/{lease}"), range(20)))
    assert set(map(str, ends)) == {str((200, {"active_leases": 0}))}
    assert daemon.status("race")["slots_free"] == 1


def test_hold_stops_restarts_until_released(daemon: Daemon) -> None:
    pid = daemon.preload("held")["pid"]
    assert daemon.post("/v1/pools/held/hold?wait=true")[0] == 200
    os.kill(pid, signal.SIGKILL)
    daemon.until(lambda s: not s["live"] and s["state"] == "offline", "the held pool to stay down", "held")
    assert daemon.post("/v1/pools/held/start")[1]["code"] == "POOL_HELD"
    assert daemon.post("/v1/pools/held/release?wait=true")[0] == 200
    daemon.until(lambda s: s["ready"], "the start that was owed", "held")


def test_the_event_stream_resumes_behind_the_last_id_and_follows(daemon: Daemon) -> None:
    seen = events(daemon)
    ids = [event["id"] for event in seen]
    assert ids == sorted(set(ids)) and {"transition", "operation"} <= {event["type"] for event in seen}
    middle = ids[len(ids) // 2]
    rest = events(daemon, "follow=false", {"Last-Event-ID": str(middle)})
    assert [event["id"] for event in rest][: len(ids) - len(ids) // 2 - 1] == ids[len(ids) // 2 + 1 :]
    for bad in ("x", "-1", "1" * 30, "1.5"):
        assert daemon.call("GET", "/v1/events?follow=false", headers={"Last-Event-ID": bad})[0] == 400

    stream = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=5)
    stream.request("GET", "/v1/events")
    answer = stream.getresponse()
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert daemon.post("/v1/pools/watched")[0] == 200
    daemon.preload("watched")
    text = b""
    while b'"pool_id":"watched"' not in text:
        line = answer.readline()
        assert line
        text += line
    stream.close()


def test_a_pool_is_registered_and_forgotten(daemon: Daemon) -> None:
    assert daemon.post("/v1/pools/new")[0] == 200 and daemon.status("new")["state"] == "uninitialized"
    assert daemon.post("/v1/pools/new")[0] == 200
    daemon.preload("new")
    assert daemon.delete("/v1/pools/new")[0] == 409
    daemon.post("/v1/pools/new/stop?wait=true")
    assert daemon.delete("/v1/pools/new")[0] == 200
    assert daemon.get("/v1/pools/new/status")[0] == 404 and daemon.delete("/v1/pools/new")[0] == 404
    assert 'pool_id="new"' not in daemon.get("/metrics")[1], "its series have gone with it"


def test_a_handoff_file_registers_an_engine_of_somebody_else_that_is_never_signalled(daemon: Daemon) -> None:
    body = engine(port=free_port())
    theirs = subprocess.Popen([body["binary_path"], *body["flags"]], stdout=subprocess.DEVNULL)
    try:
        assert daemon.get("/v1/pools/theirs/status")[0] == 404
        drop = daemon.run / "engines/theirs-r7.json"
        handoff = {"pool_id": "theirs", "replica_id": "r7", "endpoint": f"http://127.0.0.1:{body['port']}", "pid": theirs.pid}
        drop.write_text(json.dumps(handoff | {"gpu_device": 1, "slots": 2}))
        wait_until(lambda: daemon.get("/v1/pools/theirs/status")[0] == 200, "the handoff to be taken up", 15)
        daemon.until(lambda s: s["ready"], "a first good probe", "theirs")
        status = daemon.status("theirs")
        assert (status["device_mask"], status["slots_total"], status["pid"]) == ("1", 2, None)
        assert daemon.post("/v1/pools/theirs/leases")[0] == 201
        assert daemon.post("/v1/pools/theirs/drain?wait=true", {"deadline_ms": 0})[0] == 200
        assert daemon.post("/v1/pools/theirs/stop?wait=true")[0] == 200
        assert theirs.poll() is None, "an engine of somebody else is never signalled"
        assert drop.exists(), "nor is its file ours to remove"
        drop.write_text(json.dumps(handoff | {"slots": 5}))
        wait_until(lambda: len([x for x in daemon.lines("handoff") if x["pool_id"] == "theirs"]) == 2, "the second reading", 15)
        assert not daemon.status("theirs")["ready"], "a drained pool stays down until it is started"
        assert daemon.post("/v1/pools/theirs/start?wait=true")[0] == 200 and daemon.status("theirs")["slots_total"] == 5
    finally:
        theirs.kill()
        theirs.wait(10)


def test_the_daemon_itself_is_no_engine(daemon: Daemon) -> None:
    """Under its own address it is not even registered; under another name it never becomes ready."""
    drop = daemon.run / "engines" / "itself.json"
    drop.write_text(json.dumps({"pool_id": "itself", "url": f"http://localhost:{daemon.port}"}))
    try:
        wait_until(lambda: any("is this daemon itself" in line["human"] for line in daemon.lines("handoff")), "the refusal", 15)
        assert daemon.get("/v1/pools/itself/status")[0] == 404
    finally:
        drop.unlink()
