"""Family A: the daemon dies, is stopped or is told nothing any more."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pool_managerd.failpoints import FLAG, WANTED
from tests.conftest import wait_until
from tests.faults.conftest import Make
from tests.faults.inject import leader_of
from tests.faults.watched import Watched
from tests.system.daemons import engine
from tests.system.nodes import alive


def armed(make: Make, points: str, extra: str = "") -> Watched:
    return make(extra, **{FLAG: "1", WANTED: points})


def dies(daemon: Watched, timeout_s: float = 15) -> None:
    """It kills itself; the next daemon has no failpoints."""
    assert daemon.process is not None
    daemon.watch.expect(False)
    assert daemon.process.wait(timeout_s) == -signal.SIGKILL
    daemon.env.pop(WANTED)


def unanswered(daemon: Watched, method: str, path: str, body: object = None) -> None:
    with pytest.raises((OSError, http.client.HTTPException)):
        daemon.call(method, path, body)
    dies(daemon)


def test_A7_killed_between_commit_and_reply_the_same_key_is_the_same_lease(make: Make) -> None:
    daemon = make().start()
    daemon.preload("p", slots_total=4)
    daemon.kill()
    daemon.env |= {FLAG: "1", WANTED: "api.before_reply=1*panic"}
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine to be adopted")
    body = {"idempotency_key": "once", "holder": "h"}
    daemon.watch.expect(False)
    unanswered(daemon, "POST", "/v1/pools/p/leases", body)
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine to be adopted")
    (kept,) = daemon.get("/v1/pools/p/leases")[1]
    for _ in range(2):
        assert daemon.post("/v1/pools/p/leases", body)[1]["lease_id"] == kept["lease_id"]
    assert daemon.delete(f"/v1/pools/p/leases/{kept['lease_id']}") == (200, {"active_leases": 0})


@pytest.mark.parametrize("place", ["state.commit", "state.committed", "api.before_reply"])
def test_A7_killed_around_the_commit_of_a_change_it_is_whole_or_not_there(make: Make, place: str) -> None:
    daemon = make().start()
    daemon.post("/v1/pools/before")
    daemon.kill()
    daemon.env |= {FLAG: "1", WANTED: f"{place}=1*panic"}
    daemon.start()
    daemon.watch.expect(False)
    unanswered(daemon, "POST", "/v1/pools/asked")
    daemon.start()
    there = {pool["pool_id"] for pool in daemon.get("/v1/pools")[1]}
    assert there == ({"before"} if place == "state.commit" else {"before", "asked"})
    assert daemon.post("/v1/pools/asked")[0] == 200


@pytest.mark.parametrize("place", ["leases.commit", "leases.committed"])
def test_A7_killed_around_the_commit_of_a_lease_none_is_given_twice(make: Make, place: str) -> None:
    daemon = armed(make, f"{place}=1+1*panic").start()
    daemon.preload("p", slots_total=2)
    first = daemon.post("/v1/pools/p/leases", {"idempotency_key": "a"})[1]["lease_id"]
    daemon.watch.expect(False)
    unanswered(daemon, "POST", "/v1/pools/p/leases", {"idempotency_key": "b"})
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine to be adopted")
    assert daemon.post("/v1/pools/p/leases", {"idempotency_key": "b"})[1]["active_leases"] == 2
    assert daemon.post("/v1/pools/p/leases", {"idempotency_key": "a"})[1]["lease_id"] == first
    assert daemon.post("/v1/pools/p/leases")[0] == 409


@pytest.mark.parametrize("place", ["engine.spawned", "engine.kept", "pid.write", "handoff.write", "leases.commit"])
def test_A_killed_in_the_middle_of_a_start_one_engine_comes_of_it_or_none(make: Make, place: str) -> None:
    daemon = armed(make, f"{place}=1*panic").start()
    daemon.watch.expect(False)
    if place == "leases.commit":
        daemon.preload("p")
        unanswered(daemon, "POST", "/v1/pools/p/leases")
    else:
        unanswered(daemon, "POST", "/v1/pools/p/preload", engine("--ready-after", "0.2"))
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine to be there after all")


@pytest.mark.parametrize(
    "place", ["boot.restored", "boot.leases", "boot.adopting", "1+boot.adopting", "boot.cleared", "boot.started"]
)
def test_A_killed_between_two_steps_of_the_adoption_the_next_one_adopts(make: Make, place: str) -> None:
    daemon = make().start()
    pids = {pool: daemon.preload(pool, slots_total=2)["pid"] for pool in ("a", "b")}
    lease = daemon.post("/v1/pools/a/leases")[1]["lease_id"]
    daemon.kill()
    skip, _, name = place.rpartition("+")
    daemon.env |= {FLAG: "1", WANTED: f"{name}={skip + '+' if skip else ''}1*panic"}
    assert daemon.launch().wait(20) == -signal.SIGKILL
    daemon.env.pop(WANTED)
    daemon.start()
    for pool, pid in pids.items():
        daemon.until(lambda s: s["ready"], "the engine to be adopted", pool)
        assert daemon.status(pool)["pid"] == pid and daemon.status(pool)["crash_count"] == 0
    assert [row["lease_id"] for row in daemon.get("/v1/pools/a/leases")[1]] == [lease]


def frozen(daemon: Watched, seconds: float) -> None:
    pids = {pool: daemon.preload(pool)["pid"] for pool in ("a", "b", "c")}
    pid = leader_of(daemon)
    with daemon.victim():
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: daemon.get("/health")[0] == 200, "the daemon to answer again", 10)
    probes = daemon.lines("unhealthy")
    for pool, engine_pid in pids.items():
        daemon.until(lambda s: s["ready"], "the engine", pool)
        assert daemon.status(pool)["pid"] == engine_pid and daemon.status(pool)["crash_count"] == 0
    assert probes == daemon.lines("unhealthy") == [], "nobody was called unhealthy for it"


def test_A9_frozen_and_thawed_it_calls_nobody_unhealthy(daemon: Watched) -> None:
    frozen(daemon, 4)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_A9_frozen_for_a_minute_it_calls_nobody_unhealthy(daemon: Watched) -> None:
    frozen(daemon, 60)


def test_A11_a_task_that_fails_once_is_begun_again_and_told(make: Make) -> None:
    daemon = armed(make, "loop.task=1*error;loop.pool=1*error;loop.health=15+1*error").start()
    daemon.foreseen.append("the log tells of internal_error")
    body = engine()
    code, answer = daemon.post("/v1/pools/p/preload", body)
    assert code == 500 and "Internal error" in answer["message"], "who asked is told, and nobody waits for ever"
    assert daemon.post("/v1/pools/p/preload", body)[0] == 200
    wait_until(lambda: len(daemon.lines("internal_error")) == 2, "both failures to be told", 10)
    daemon.until(lambda s: s["last_probe_age_ms"] is not None and s["ready"], "the pool to work")
    time.sleep(3)  # the probe that fails, and some more
    daemon.until(lambda s: s["ready"] and s["last_probe_age_ms"] < 1000, "the probes to go on")


@pytest.mark.slow
def test_A11_a_task_that_fails_again_and_again_ends_the_daemon_with_an_error(make: Make) -> None:
    daemon = armed(make, "loop.task=error").start()
    daemon.foreseen.append("the log tells of internal_error")
    daemon.preload("p")
    assert daemon.process is not None
    wait_until(lambda: daemon.lines("internal_error") != [], "the first failure to be told", 5)
    daemon.watch.expect(False)
    assert daemon.process.wait(40) == 1, "it does not go on without a word"


def test_A13_as_process_1_it_leaves_no_zombie_and_ends_as_it_should(make: Make) -> None:
    wrap = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if os.geteuid() != 0 or shutil.which("nsenter") is None or subprocess.run([*wrap, "true"], check=False).returncode != 0:
        pytest.skip("a pid namespace needs root, unshare and nsenter")
    daemon = make().start(wrap=wrap)
    daemon.preload("p", "--exit-after", "60", "--exit-code", "3")
    assert daemon.process is not None
    (init,) = children(daemon.process.pid)
    for _ in range(5):  # orphans of nobody: process 1 gets them
        subprocess.run(["nsenter", "-t", str(init), "-p", "-m", "sh", "-c", "sh -c 'sleep 0.1' & exit 0"], check=True)
    crashed = engine("--exit-after", "0", "--exit-code", "7")
    code, answer = daemon.post("/v1/pools/coded/preload", crashed)
    assert code == 500 and "exit_code=7" in str(answer), "the exit codes are right there, too"
    wait_until(lambda: not [pid for pid in children(init) if state(pid) == "Z"], "no zombie of process 1", 10)
    wait_until(lambda: len(children(init)) == 1, "nothing but the daemon itself to be left", 5)
    daemon.watch.expect(False)
    os.kill(init, signal.SIGTERM)
    assert daemon.process.wait(30) == 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("closed", [">&- 2>&-", "2>&1 | head -n 1 >/dev/null"])
def test_A15_without_anybody_who_reads_its_output_it_goes_on(make: Make, closed: str) -> None:
    daemon = make()
    daemon.start(wrap=("bash", "-c", f'exec "$@" {closed}' if "|" not in closed else f'"$@" {closed}', "bash"))
    pid = daemon.preload("p")["pid"]
    os.kill(pid, signal.SIGKILL)
    daemon.until(lambda s: s["ready"] and s["pid"] != pid, "the restart, with its lines of log")
    for _ in range(30):
        assert daemon.call("GET", "/v1/nonsense", b"\xff")[0] in (400, 404)
    leader = leader_of(daemon)
    daemon.watch.expect(False)
    os.kill(leader, signal.SIGTERM)
    wait_until(lambda: not alive(leader), "the daemon to end", 20)
    assert daemon.process is not None
    daemon.process.wait(10)
