"""The oracle can fail: every clause finds what it is there for, and finds nothing where nothing is."""

from __future__ import annotations

import math
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import oracle
from tests.faults.oracle import Promise
from tests.faults.watched import Watched

UP: dict[str, Any] = {
    "desired": "wanted", "held": False, "live": True, "state": "ready", "epoch": 3, "active_leases": 1, "slots_total": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("promise", "status", "says"),
    [
        (Promise(), None, "is gone"),
        (Promise(exists=False), UP, "was taken away"),
        (Promise(desired="stopped"), UP, "was to be stopped"),
        (Promise(held=True), UP, "held is False"),
        (Promise(leases={"b": 3}), UP, "is lost"),
    ],
)
def test_a_lost_change_is_found(promise: Promise, status: dict[str, Any] | None, says: str) -> None:
    (sentence,) = oracle.promises_broken({"p": promise}, {} if status is None else {"p": status}, {"p": ["a"]})
    assert says in sentence


@pytest.mark.parametrize(
    "promise", [Promise(), Promise(desired="wanted", held=False, leases={"a": 3}), Promise(leases={"of the launch before": 2})]
)
def test_a_kept_one_is_not(promise: Promise) -> None:
    assert oracle.promises_broken({"p": promise}, {"p": UP}, {"p": ["a"]}) == []
    assert oracle.promises_broken({"q": Promise(exists=False)}, {"p": UP}, {}) == []


def test_too_many_leases_and_fewer_than_none_are_found() -> None:
    assert oracle.slots_broken({"p": UP}, {"p": ["a"]}) == []
    assert oracle.slots_broken({"p": {**UP, "active_leases": 3}}, {})
    assert oracle.slots_broken({"p": {**UP, "active_leases": -1}}, {})
    assert oracle.slots_broken({"p": UP}, {"p": ["a", "b", "c"]})


def test_two_engines_of_one_pool_are_found() -> None:
    assert oracle.engines_broken([("p", 1), ("q", 2)]) == []
    assert "2 engines run for pool p: [1, 3]" in oracle.engines_broken([("p", 1), ("q", 2), ("p", 3)])[0]


def test_a_gpu_that_is_promised_twice_is_found() -> None:
    def device(*held: tuple[str, int]) -> list[dict[str, Any]]:
        rows = [{"pool_id": pool, "reserved_bytes": size} for pool, size in held]
        return [{"device": "0", "vram_total_bytes": 10, "reservations": rows}]

    assert oracle.devices_broken(device(("a", 5), ("b", 5))) == []
    assert oracle.devices_broken(device(("a", 5), ("b", 6)))
    assert oracle.devices_broken(device(("a", 1), ("a", 1)))


def test_what_has_no_owner_is_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "shims").mkdir(parents=True)
    assert oracle.left_over(tmp_path, [], 0) == []
    (run / "x.tmp").touch()
    (run / "p.pid").touch()
    (run / "shims/p.json").touch()
    sleeper = subprocess.Popen(["sleep", "60"], env={"PLACE": str(tmp_path)})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        found = " ".join(oracle.left_over(tmp_path, [listener.getsockname()[1]], 0.2))
    sleeper.kill()
    sleeper.wait(10)
    for what in (f"a process is left: {sleeper.pid}", "x.tmp", "p.pid", "shims", "still taken"):
        assert what.removeprefix("shims") in found, what


def test_a_damaged_database_is_found(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "good.db").execute("CREATE TABLE t (x)").connection.close()
    assert oracle.databases_broken(tmp_path) == []
    (tmp_path / "bad.db").write_bytes(b"garbage" * 1000)
    assert "bad.db is damaged" in oracle.databases_broken(tmp_path)[0]


def test_slow_and_missing_answers_are_found() -> None:
    assert oracle.health_broken([]) == oracle.health_broken([0.01] * 99 + [5.0]) == []
    assert oracle.health_broken([0.01] * 97 + [5.0] * 3)
    assert oracle.health_broken([0.01, math.inf])


def test_secrets_and_tracebacks_are_found() -> None:
    assert oracle.secrets_broken(["canary"], {"a": b"x"}) == []
    assert oracle.secrets_broken(["canary"], {"a": b"x", "b": b"a canary sings"}) == ["b shows a secret"]
    adopted, failed = {"action": "adopt", "human": "x"}, {"action": "internal_error", "human": "oops"}
    assert oracle.log_broken("all is well", [adopted]) == []
    assert len(oracle.log_broken("Traceback (most recent call last)", [adopted, failed])) == 2


def test_growth_is_found_by_what_a_process_really_holds() -> None:
    slack = {"rss_bytes": 4 << 20, "fds": 2, "threads": 1}
    before = oracle.resources_of(os.getpid())
    held = bytearray(os.urandom(1 << 20) * 64)
    opened = [Path("/dev/null").open("rb") for _ in range(before["fds"])]  # noqa: SIM115
    found = oracle.growth_broken(before, oracle.resources_of(os.getpid()), slack)
    for file in opened:
        file.close()
    assert len(held) > 0 and [sentence.split()[0] for sentence in found] == ["rss_bytes", "fds"]


def test_a_daemon_that_broke_every_promise_is_judged_so(open_dir: Path) -> None:
    daemon = Watched(open_dir / "d").start()
    daemon.preload("p")
    intruder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={"PLACE": str(daemon.folder)})
    try:
        daemon.promises["p"].desired, daemon.promises["lost"] = "drained", Promise()
        (daemon.run / "left.tmp").touch()
        with daemon.log.open("a") as log:
            log.write(f"oops {daemon.secrets[0]}\n")
        daemon.watch.samples += [math.inf] * 10
        broken = "; ".join(daemon.judge(patience_s=1))
    finally:
        intruder.kill()
        intruder.wait(10)
        daemon.end()
    for what in (
        "was to be drained",
        "pool lost is gone",
        "left.tmp",
        f"is left: {intruder.pid}",
        "shows a secret",
        "/health took",
    ):
        assert what in broken, (what, broken)


def test_a_daemon_that_kept_them_is_not(open_dir: Path) -> None:
    daemon = Watched(open_dir / "d").start()
    daemon.preload("p", slots_total=2)
    assert daemon.post("/v1/pools/p/leases")[0] == 201
    assert daemon.judge() == [] and len(daemon.watch.samples) > 3
