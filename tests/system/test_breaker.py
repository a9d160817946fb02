"""A real engine that ends again and again: left alone, told, remembered by the next daemon, tried again when a person says so."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import wait_until
from tests.system.daemons import Daemon

KNOBS = {
    "POOL_MANAGERD__SUPERVISION__BREAKER__THRESHOLD": "3",
    "POOL_MANAGERD__SUPERVISION__BREAKER__OPEN_MS": "600000",
    "POOL_MANAGERD__SUPERVISION__RESTART_LIMIT__STORM_WARN": "1",
}
ENDS_SOON = ("--exit-after", "0.3")


@pytest.fixture
def daemon(open_dir: Path) -> Iterator[Daemon]:
    made = Daemon(open_dir / "d", **KNOBS).start()
    yield made
    made.end()


def sample(daemon: Daemon, name: str, **labels: str) -> float | None:
    text = daemon.get("/metrics")[1]
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name == name and labels.items() <= one.labels.items():
                return one.value
    return None


def reset(daemon: Daemon) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pool_managerd.cli", "breaker", "reset", "p", "--url", f"http://127.0.0.1:{daemon.port}"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


def until_open(daemon: Daemon) -> None:
    daemon.until(lambda status: status["circuit_state"] == "open", "the breaker to open")


def test_a_crash_loop_is_ended_told_and_known_to_the_next_daemons(daemon: Daemon) -> None:
    daemon.preload("p", *ENDS_SOON)
    until_open(daemon)
    status = daemon.status()
    assert (status["state"], status["reason"], status["last_error"]) == ("failed", "circuit_open", "exit_code=1")
    assert (status["crash_count"], status["restart_count"], status["restart_rate"]) == (3, 2, 2)
    left_ms = status["next_restart_at_ms"] - time.time() * 1000
    assert 590_000 < left_ms <= 600_000
    assert sample(daemon, "circuit_breaker_state", pool_id="p", **{"class": "general"}) == 1
    assert sample(daemon, "circuit_breaker_state", pool_id="p", **{"class": "cuda"}) == 0
    assert sample(daemon, "circuit_breaker_open_total", pool_id="p", **{"class": "general"}) == 1
    assert sample(daemon, "restart_storm_total", pool_id="p") == 1 and sample(daemon, "restart_rate", pool_id="p") == 2
    assert sample(daemon, "restart_scheduled_total", pool_id="p", crash_reason="process_exit") == 2

    (line,) = daemon.lines("breaker")
    assert {k: line[k] for k in ("pool_id", "old_state", "new_state", "failure_count", "level")} == {
        "pool_id": "p", "old_state": "closed", "new_state": "open", "failure_count": 3, "level": "error",
    }  # fmt: skip
    (storm,) = daemon.lines("storm")
    assert (storm["level"], storm["restart_count"], storm["time_window"]) == ("critical", 2, 60_000)
    waits = daemon.lines("backoff")
    assert [w["crash_reason"] for w in waits] == ["process_exit"] * 2 and all(w["backoff_ms"] > 0 for w in waits)
    assert all(w["next_restart_at"] > 1_600_000_000_000 for w in waits) and [w["crash_count"] for w in waits] == [1, 2]

    for end in (daemon.kill, daemon.terminate):  # without a goodbye, and with one
        end()
        daemon.start()
        until_open(daemon)
        status = daemon.status()
        assert (status["phase"], status["crash_count"], status["last_error"]) == ("open", 3, "exit_code=1")
        assert status["next_restart_at_ms"] - time.time() * 1000 < left_ms
        assert status["pid"] is None and status["restart_count"] == 2

    done = reset(daemon)
    assert done.returncode == 0, done.stderr
    daemon.until(lambda status: status["crash_count"] >= 4, "the engine to be started again")
    until_open(daemon)
    assert daemon.status()["crash_count"] == 6, "three more failures open it again"


def test_a_person_has_exactly_one_start_while_the_breaker_is_open(daemon: Daemon) -> None:
    daemon.preload("p", *ENDS_SOON)
    until_open(daemon)
    before = daemon.status()
    code, answer = daemon.post("/v1/pools/p/restart?wait=true")
    assert code == 200, answer
    daemon.until(lambda status: status["crash_count"] == 4 and status["circuit_state"] == "open", "its one start to fail")
    after = daemon.status()
    assert abs(after["next_restart_at_ms"] - before["next_restart_at_ms"]) < 2_000, "it is open as it was"
    assert after["restart_rate"] == 3, "nothing was forgotten"


def test_what_a_drain_cut_off_is_said_and_outlives_the_daemon(daemon: Daemon) -> None:
    daemon.preload("p")
    assert daemon.post("/v1/pools/p/leases", {})[0] == 201
    assert daemon.post("/v1/pools/p/drain?wait=true", {"deadline_ms": 100})[1]["outcome"]["force_stopped"] is True
    error = "drain deadline reached: one request was cut off"
    assert daemon.status()["last_error"] == error
    daemon.post("/v1/pools/p/stop?wait=true")
    assert daemon.status()["last_error"] == error
    daemon.kill()
    daemon.start()
    assert daemon.status()["last_error"] == error and daemon.status()["state"] in ("uninitialized", "offline")
    assert daemon.post("/v1/pools/p/start?wait=true")[0] == 200
    wait_until(lambda: daemon.status()["last_error"] is None, "a good start")
