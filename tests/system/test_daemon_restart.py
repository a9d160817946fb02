"""What survives the daemon: every acknowledged change, and nothing else."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port, wait_until
from tests.small_disk import fill, mounted_small
from tests.system.daemons import Daemon, engine, in_time
from tests.system.nodes import alive, mentioning

Make = Callable[..., Daemon]


def told(daemon: Daemon, after: int) -> list[dict[str, Any]]:
    """The events behind an id, as a client that resumes gets them."""
    text = daemon.get(f"/v1/events?follow=false&after={after}")[1]
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


@pytest.fixture
def make(open_dir: Path) -> Iterator[Make]:
    """Daemons that end with the test."""
    made: list[Daemon] = []

    def daemon(name: str = "d", *given: str, **env: str) -> Daemon:
        made.append(Daemon(open_dir / name, *given, **env))
        return made[-1]

    yield daemon
    for one in made:
        one.end()


def test_sigterm_is_a_clean_end_with_nothing_left(make: Make) -> None:
    daemon = make().start()
    port = free_port()
    pid = daemon.preload("p", "--fork-grandchildren", "2", "--setsid", port=port)["pid"]
    assert daemon.terminate() == 0
    assert not alive(pid) and mentioning(daemon.folder) == []
    left = [path.name for path in daemon.run.rglob("*") if path.is_file()]
    assert sorted(left) == ["daemon.lock", "engine-p.log"]
    for number in (port, daemon.port):
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", number))
    assert daemon.lines()[-1]["action"] == "stopped"


def test_a_second_sigterm_stops_hard_what_ignores_the_first_and_cuts_drains(make: Make) -> None:
    daemon = make()
    daemon.config.write_text(daemon.config.read_text().replace("stop_grace_ms: 1000", "stop_grace_ms: 60000"))
    daemon.start()
    stubborn = daemon.preload("p", "--ignore-term")["pid"]
    leased = daemon.preload("q")["pid"]
    daemon.post("/v1/pools/q/leases")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "q" in [line["pool_id"] for line in daemon.lines("drain_started")], "the drain to begin", 5)
    refused = daemon.post("/v1/pools/q/leases")
    assert (refused[0], refused[1]["code"]) == (409, "POOL_DRAINING")
    assert daemon.post("/v1/pools/p/start")[0] == 503
    assert in_time(12, daemon.terminate) == 0
    assert not alive(stubborn) and not alive(leased) and mentioning(daemon.folder) == []


def test_after_sigkill_the_next_daemon_takes_its_engines_over(make: Make) -> None:
    daemon = make().start()
    pids = {pool: daemon.preload(pool)["pid"] for pool in ("up", "down", "held", "dying")}
    assert daemon.post("/v1/pools/down/drain?wait=true")[0] == 200
    assert daemon.post("/v1/pools/held/hold")[0] == 202
    os.kill(pids["up"], signal.SIGKILL)
    daemon.until(lambda s: s["restart_count"] == 1 and s["ready"], "the crash to be counted", "up")
    before = {pool: daemon.status(pool) for pool in pids}
    daemon.kill()
    os.kill(pids["dying"], signal.SIGSEGV)
    daemon.start()
    for pool in ("up", "held"):
        daemon.until(lambda s: s["ready"], "the engine to be ready again", pool)
        after = daemon.status(pool)
        same = ("pid", "url", "crash_count", "restart_count", "engine_version", "model_id", "slots_total", "held")
        assert {key: after[key] for key in same} == {key: before[pool][key] for key in same} and alive(after["pid"])
    daemon.until(lambda s: s["restart_count"] == 1 and s["ready"], "the one that died meanwhile to be started again", "dying")
    assert daemon.status("dying")["crash_count"] == 1 and "SIGSEGV" in daemon.lines("crash")[-1]["human"]
    assert daemon.status("down")["state"] in ("offline", "uninitialized") and daemon.status("down")["drained"]
    assert {line["pool_id"] for line in daemon.lines("adopt")} == {"up", "held", "dying"}
    assert (daemon.run / "up.pid").read_text() == str(before["up"]["pid"])
    assert daemon.post("/v1/pools/up/restart?wait=true")[0] == 200 and not alive(before["up"]["pid"])
    assert daemon.post("/v1/pools/down/start?wait=true")[0] == 200 and daemon.status("down")["ready"]
    assert daemon.terminate() == 0 and mentioning(daemon.folder) == []


@pytest.mark.parametrize(
    "whole", [pytest.param(False, id="its content", marks=pytest.mark.slow), pytest.param(True, id="the directory itself")]
)
def test_an_engine_whose_runtime_files_were_cleared_away_is_taken_over_all_the_same(make: Make, whole: bool) -> None:
    """A cleaner of temporary files removed them: the next daemon would start a second engine beside it."""
    daemon = make().start()
    pid = daemon.preload("p")["pid"]
    if whole:
        shutil.rmtree(daemon.run)
    else:
        for path in daemon.run.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    wait_until(lambda: any(daemon.run.glob("shims/p-*.json")), "the shim to write its record again", 20)
    wait_until(lambda: (daemon.run / "p.pid").exists() and (daemon.run / "engines/p-r0.json").exists(), "pid and handoff files")
    words = "removed from the runtime directory"
    notices = [event for event in told(daemon, 0) if event["type"] == "notice" and words in event["human"]]
    assert len(notices) == 1 and "systemd-tmpfiles" in notices[0]["hint"]
    daemon.kill()
    daemon.start()
    wait_until(lambda: daemon.status("p")["ready"], "the engine to be taken over")
    assert daemon.status("p")["pid"] == pid
    assert daemon.terminate() == 0
    assert not alive(pid) and mentioning(daemon.folder) == []


def test_engines_of_an_earlier_runtime_directory_are_ended_and_that_is_said(make: Make) -> None:
    daemon = make().start()
    pid = daemon.preload("p")["pid"]
    daemon.kill()
    before, daemon.run = daemon.run, daemon.folder / "elsewhere"
    daemon.config.write_text(daemon.config.read_text().replace(f"runtime_dir: {before}", f"runtime_dir: {daemon.run}"))
    daemon.start()
    daemon.until(lambda s: s["ready"], "the pool to be ready anew")
    assert daemon.status()["pid"] != pid and not alive(pid)
    assert any(
        f"The runtime directory was {before}" in line["human"] and "'p'" in line["human"] for line in daemon.lines("notice")
    )
    assert daemon.terminate() == 0
    assert mentioning(daemon.folder) == []


def test_leases_and_the_deadline_of_a_drain_go_on_under_the_next_daemon(make: Make) -> None:
    daemon = make().start()
    pid = daemon.preload("p", slots_total=4)["pid"]
    given = [daemon.post("/v1/pools/p/leases", {"holder": f"h{n}", "idempotency_key": f"k{n}"})[1]["lease_id"] for n in range(3)]
    short = daemon.post("/v1/pools/p/leases", {"ttl_ms": 8000})[1]["lease_id"]
    assert daemon.delete(f"/v1/pools/p/leases/{given[2]}") == (200, {"active_leases": 3})
    before = daemon.get("/v1/pools/p/leases")[1]
    daemon.kill()
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine to be ready again")
    after = daemon.get("/v1/pools/p/leases")[1]
    same = ("lease_id", "holder", "given_at_ms")
    assert [[row[key] for key in same] for row in after] == [[row[key] for key in same] for row in before]
    assert [row["expires_at_ms"] is None for row in after] == [True, True, False]
    assert daemon.post("/v1/pools/p/leases", {"idempotency_key": "k1"})[1]["lease_id"] == given[1]
    assert daemon.delete(f"/v1/pools/p/leases/{given[2]}")[0] == 200, "it was given once"
    assert daemon.delete("/v1/pools/p/leases/000000000000-1")[0] == 404
    daemon.until(lambda s: s["active_leases"] == 2, "the lease with an end to end")
    assert daemon.delete(f"/v1/pools/p/leases/{short}")[0] == 200
    began = time.monotonic()
    drain = daemon.post("/v1/pools/p/drain", {"deadline_ms": 6000})[1]["operation_id"]
    daemon.kill()
    daemon.start()
    daemon.until(lambda s: s["draining"], "the drain to go on")
    assert daemon.post("/v1/pools/p/leases")[1]["code"] == "POOL_DRAINING" and alive(pid)
    assert daemon.delete(f"/v1/pools/p/leases/{given[0]}")[1]["active_leases"] == 1
    daemon.until(lambda s: not s["live"], "the deadline")
    assert 5.5 < time.monotonic() - began < 8 and not alive(pid)
    daemon.until(lambda s: s["state"] == "offline", "the drain to be over")
    wait_until(lambda: daemon.lines("drain_finished") != [], "that to be told", 5)
    assert daemon.lines("drain_finished")[-1]["force_stopped"] and daemon.status()["active_leases"] == 0
    done = daemon.get(f"/v1/operations/{drain}")[1]
    assert done["status"] == "succeeded" and done["outcome"]["final_lease_count"] == 1, "whoever waited for it is told its end"


def test_a_clean_end_that_leaves_engines_and_the_next_daemon(make: Make) -> None:
    daemon = make()
    daemon.config.write_text(daemon.config.read_text().replace("state_dir:", "on_exit: leave, state_dir:"))
    daemon.start()
    pid = daemon.preload("p")["pid"]
    loading = daemon.post("/v1/pools/loading/preload?wait=false", engine("--ready-after", "2"))
    assert loading[0] == 202
    daemon.until(lambda s: s["live"], "the slow engine to run", "loading")
    assert daemon.terminate() == 0 and alive(pid)
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine to be ready again")
    daemon.until(lambda s: s["ready"], "the one that was loading to be ready", "loading")
    assert daemon.get(f"/v1/operations/{loading[1]['operation_id']}")[1]["status"] == "succeeded"
    assert daemon.status()["pid"] == pid and daemon.status()["restart_count"] == 0
    daemon.config.write_text(daemon.config.read_text().replace("on_exit: leave, ", ""))
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.terminate() == 0 and alive(pid), "asked twice, it leaves them all the same"
    assert daemon.lines("signal")[-1]["human"] == "SIGTERM: ending; the engines go on"
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine to be ready again")
    assert daemon.terminate() == 0 and not alive(pid) and mentioning(daemon.folder) == []


def test_an_engine_goes_on_when_the_configuration_has_changed_and_that_is_said(make: Make, tiny_model: Path) -> None:
    pool = {"id": "c", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 256, "slots": 1}
    daemon = make("d", f"pools: [{json.dumps(pool)}]\n").start()

    def told() -> list[dict[str, Any]]:
        return [line for line in daemon.lines("notice") if "earlier configuration" in line["human"]]

    daemon.until(lambda s: s["ready"], "the pool to be ready", "c")
    pid = daemon.status("c")["pid"]
    daemon.kill()
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine to be ready again", "c")
    assert daemon.status("c")["pid"] == pid and not told()
    daemon.kill()
    daemon.config.write_text(daemon.config.read_text().replace('"slots": 1', '"slots": 2'))
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine to be ready again", "c")
    assert (daemon.status("c")["pid"], daemon.status("c")["slots_total"]) == (pid, 1)
    assert [line["pool_id"] for line in told()] == ["c"] and "restart it" in told()[0]["human"]
    assert daemon.status("c")["outdated"] == [told()[0]["human"]]
    assert daemon.post("/v1/pools/c/restart?wait=true")[0] == 200
    assert daemon.status("c")["pid"] != pid and daemon.status("c")["slots_total"] == 2 and daemon.status("c")["outdated"] == []
    daemon.kill()
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine to be ready again", "c")
    assert len(told()) == 1


def test_a_stop_that_the_daemon_did_not_live_to_see_is_finished(make: Make) -> None:
    daemon = make()
    daemon.config.write_text(daemon.config.read_text().replace("stop_grace_ms: 1000", "stop_grace_ms: 3000"))
    daemon.start()
    pid = daemon.preload("p", "--ignore-term")["pid"]
    assert daemon.post("/v1/pools/p/stop")[0] == 202
    daemon.kill()
    assert alive(pid)
    daemon.start()
    daemon.until(lambda s: s["state"] == "offline", "the stop to be finished")
    assert not alive(pid) and daemon.status()["crash_count"] == 0


def test_events_and_operations_can_be_asked_for_after_sigkill(make: Make) -> None:
    daemon = make().start()
    done = daemon.post("/v1/pools/p/preload?wait=false", engine())[1]["operation_id"]
    wait_until(lambda: daemon.get(f"/v1/operations/{done}")[1]["status"] == "succeeded", "the preload", 15)
    running = daemon.post("/v1/pools/slow/preload?wait=false", engine("--ready-after", "60"))[1]["operation_id"]
    daemon.until(lambda s: s["live"], "the slow engine to be there", "slow")
    before, finished = told(daemon, 0), daemon.get(f"/v1/operations/{done}")[1]
    daemon.kill()
    daemon.start()
    since = told(daemon, before[-5]["id"])
    assert since[:4] == before[-4:] and since[4]["id"] > before[-1]["id"]
    assert told(daemon, 0)[: len(before)] == before
    assert told(daemon, 10**9)[0]["type"] == "gap"
    assert daemon.get(f"/v1/operations/{done}") == (200, finished)
    assert daemon.get(f"/v1/operations/{running}")[1]["status"] == "running", "its engine goes on loading"
    assert daemon.delete("/v1/pools/slow/preload?wait=true")[0] == 200
    code, ended = daemon.get(f"/v1/operations/{running}")
    assert (code, ended["status"], ended["error"]["code"]) == (200, "failed", "OPERATION_CANCELLED")
    assert [o["operation_id"] for o in daemon.get("/v1/operations")[1]][:2] == [done, running]
    last = told(daemon, 0)[-1]["id"]
    assert daemon.terminate() == 0
    daemon.start()
    ids = [event["id"] for event in told(daemon, last)]
    assert ids == list(range(last + 1, last + 1 + len(ids))), "a clean end leaves no gap in the ids"


def test_a_preload_that_worked_at_its_second_try_comes_back_after_sigkill(make: Make) -> None:
    daemon = make().start()
    body = engine()
    with socket.socket() as other:
        other.bind(("127.0.0.1", body["port"]))
        other.listen()
        assert daemon.post("/v1/pools/p/preload", body)[0] == 500
    assert daemon.post("/v1/pools/p/preload", body)[0] == 200
    daemon.kill()
    daemon.start()
    daemon.until(lambda s: s["ready"], "the acknowledged preload to come back")


def test_a_failed_preload_and_a_cancelled_one_do_not_come_back_and_a_registered_pool_does(make: Make) -> None:
    daemon = make().start()
    assert daemon.post("/v1/pools/failed/preload", engine("--exit-after", "0"))[0] == 500
    assert daemon.post("/v1/pools/cut/preload?wait=false", engine("--ready-after", "60"))[0] == 202
    assert daemon.delete("/v1/pools/cut/preload?wait=true")[0] == 200
    assert daemon.post("/v1/pools/known")[0] == 200
    assert daemon.post("/v1/pools/gone")[0] == 200 and daemon.delete("/v1/pools/gone")[0] == 200
    wait_until(lambda: stored(daemon).get("failed") == "down", "the failure to be stored", 15)
    daemon.kill()
    daemon.start()
    assert [pool["pool_id"] for pool in daemon.get("/v1/pools")[1]] == ["cut", "failed", "known"]
    assert not [pool["pool_id"] for pool in daemon.get("/v1/pools")[1] if pool["live"] or pool["phase"] != "down"]


def stored(daemon: Daemon) -> dict[str, str]:
    db = sqlite3.connect(f"file:{daemon.state}/state.db?mode=ro", uri=True)
    try:
        return dict(db.execute("SELECT pool_id, desired FROM pools").fetchall())
    finally:
        db.close()


def test_changes_at_the_same_moment_are_all_remembered(make: Make) -> None:
    """Hold and drain touch different facts of one pool: neither may undo the other."""
    daemon = make().start()
    pools = [f"p{number}" for number in range(8)]
    for pool in pools:
        daemon.preload(pool)
    with ThreadPoolExecutor(16) as clients:
        asked = [clients.submit(daemon.post, f"/v1/pools/{pool}/{what}") for pool in pools for what in ("hold", "drain")]
        assert {call.result()[0] for call in asked} == {202}
    daemon.kill()
    daemon.start()
    for status in daemon.get("/v1/pools")[1]:
        assert status["held"] and status["drained"] and not status["live"], status["pool_id"]


@pytest.mark.parametrize("round_", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 5))])
def test_every_acknowledged_change_is_there_after_sigkill_at_any_moment(make: Make, round_: int) -> None:
    daemon = make().start()
    chance = random.Random(round_)
    truth: dict[str, dict[str, bool]] = {}
    daemon.preload("a")
    truth["a"] = {"held": False, "down": False}
    ends = time.monotonic() + chance.uniform(0.05, 0.6)
    unsure: set[str] = set()
    with ThreadPoolExecutor(1) as killer:
        killer.submit(kill_at, daemon, ends)
        number = 0
        while True:
            number += 1
            kind = chance.choice(["hold", "release", "drain", "start", "register"])
            pool = f"n{number}" if kind == "register" else "a"
            path = f"/v1/pools/{pool}" if kind == "register" else f"/v1/pools/{pool}/{kind}"
            try:
                code, answer = daemon.post(path)
            except (OSError, ValueError, http.client.HTTPException):  # the daemon is gone: this one was never acknowledged
                unsure.add(kind)
                break
            if code in (200, 202):
                change(truth, pool, kind)
            else:
                assert code == 409, (kind, answer)
    daemon.start()
    for pool, expected in truth.items():
        status = daemon.status(pool)
        if pool == "a" and not unsure & {"hold", "release"}:
            assert status["held"] == expected["held"], (pool, expected, status)
        if pool == "a" and not unsure & {"drain", "start"} and not status["held"]:
            down = status["phase"] == "down"
            assert down == expected["down"], (pool, expected, status)


def kill_at(daemon: Daemon, moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
    daemon.kill()


def change(truth: dict[str, dict[str, bool]], pool: str, kind: str) -> None:
    facts = truth.setdefault(pool, {"held": False, "down": True})
    if kind in ("hold", "release"):
        facts["held"] = kind == "hold"
    elif kind in ("drain", "start"):
        facts["down"] = kind == "drain"


def test_a_second_daemon_on_the_same_state_is_told_who_has_it(make: Make) -> None:
    daemon = make().start()
    assert daemon.process is not None
    other = make("other")
    other.config.write_text(other.config.read_text().replace(str(other.state), str(daemon.state)))
    assert other.launch().wait(30) != 0
    assert f"pid {daemon.process.pid}" in other.text() and "Traceback" not in other.text()
    same_run = make("third")
    same_run.config.write_text(same_run.config.read_text().replace(str(same_run.run), str(daemon.run)))
    assert same_run.launch().wait(30) != 0 and f"pid {daemon.process.pid}" in same_run.text()
    assert daemon.get("/health")[0] == 200


def test_state_of_a_newer_version_is_refused_and_damaged_state_is_set_aside(make: Make) -> None:
    daemon = make().start()
    daemon.preload()
    daemon.terminate()
    place = daemon.state / "state.db"
    with closing(sqlite3.connect(place)) as db, db:
        db.execute("PRAGMA user_version=99")
    db.close()
    before = place.read_bytes()
    assert daemon.launch().wait(30) == 1
    assert "a newer version wrote it" in daemon.text() and place.read_bytes() == before
    place.write_bytes(b"garbage" * 1000)
    daemon.start()
    assert daemon.get("/v1/pools")[1] == []
    wait_until(lambda: any("set aside" in line["human"] for line in daemon.lines("notice")), "the log to tell of it")
    assert (daemon.state / "state.db.corrupt").read_bytes() == b"garbage" * 1000


@pytest.fixture
def small_disk(open_dir: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 400 kB as the state directory of daemon ``d``, or as another folder that the test names."""
    with mounted_small(open_dir / "d" / getattr(request, "param", "state")) as place:
        yield place


def test_with_a_full_state_disk_reads_work_and_nothing_is_acknowledged_or_begun(small_disk: Path, make: Make) -> None:
    daemon = make().start()
    daemon.preload("before")
    filler = small_disk / "filler"
    fill(filler)
    big = engine(*["x" * 8000] * 4)
    codes = []
    for number in range(20):
        code, answer = daemon.post(f"/v1/pools/n{number}/preload?wait=false", big)
        codes.append(code)
        if code != 202:
            assert (code, answer["code"]) in ((507, "STATE_UNWRITABLE"), (503, "STATE_UNWRITABLE")), answer
            assert "hint" in answer
            assert daemon.get(f"/v1/pools/n{number}/status")[0] == 404, "what was refused has not begun"
            break
    assert codes[-1] != 202
    acknowledged = [f"n{number}" for number, code in enumerate(codes) if code == 202]
    assert daemon.status("before")["ready"] and daemon.get("/v1/snapshots")[0] == 200
    assert daemon.post("/v1/pools/before/leases")[0] == 507 and daemon.status("before")["active_leases"] == 0
    filler.unlink()
    assert daemon.post("/v1/pools/after")[0] == 200
    daemon.kill()
    daemon.start()
    assert set(acknowledged) | {"before", "after"} == {pool["pool_id"] for pool in daemon.get("/v1/pools")[1]}


def test_a_daemon_on_a_read_only_state_disk_says_so_and_starts_when_it_can_write(small_disk: Path, make: Make) -> None:
    daemon = make().start()
    daemon.preload()
    assert daemon.terminate() == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert daemon.launch().wait(30) == 1
    assert "cannot write to state directory" in daemon.text() and "Traceback" not in daemon.text()
    assert [line["code"] for line in daemon.lines("refused")] == ["STATE_UNWRITABLE"]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    daemon.start()
    daemon.until(lambda s: s["ready"], "the stored pool to come back")


@pytest.mark.parametrize("small_disk", ["run"], indirect=True)
def test_with_a_full_runtime_disk_a_preload_fails_with_the_reason_and_leaves_no_engine(small_disk: Path, make: Make) -> None:
    daemon = make().start()
    pid = daemon.preload("before")["pid"]
    fill(small_disk / "filler")
    code, answer = in_time(20, lambda: daemon.post("/v1/pools/p/preload", engine()))
    assert code >= 500 and "No space left" in answer["message"] and answer["hint"], answer
    assert not daemon.status("p")["live"] and not (daemon.run / "p.pid").exists()
    assert len(mentioning_engines(daemon)) == 1, "only the one from before runs"
    assert daemon.status("before")["pid"] == pid and daemon.status("before")["ready"]
    (small_disk / "filler").unlink()
    assert daemon.post("/v1/pools/p/preload", engine())[0] == 200
    assert daemon.terminate() == 0 and mentioning(daemon.folder) == []


def mentioning_engines(daemon: Daemon) -> list[str]:
    """Scripted engines among the processes that carry this daemon's directory."""
    found = [line.split()[0] for line in mentioning(daemon.folder)]
    return [pid for pid in found if b"fake_engine" in Path(f"/proc/{pid}/cmdline").read_bytes()]
