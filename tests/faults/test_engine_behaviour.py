"""Family B: engines that end, hang on, take ports, flood and vanish."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.runtime import procfs
from tests.conftest import FAKE_ENGINE, free_port, wait_until
from tests.faults.conftest import Make
from tests.faults.inject import cgroup, cpu_seconds, grandchildren, leader_of, of_its_own
from tests.faults.watched import Watched
from tests.gpu.nodes import pool, scripted
from tests.small_disk import mounted_small
from tests.system.daemons import engine, in_time
from tests.system.nodes import alive

PROBE_S = 0.7  # interval and timeout of one probe in these tests


def until_ready(daemon: Watched, pool_id: str = "p") -> dict[str, Any]:
    daemon.until(lambda s: s["ready"], "the engine to be ready", pool_id)
    return daemon.status(pool_id)


def test_B1_a_crash_loop_is_left_alone_and_costs_nothing(make: Make) -> None:
    env = {"BREAKER__THRESHOLD": "4", "BREAKER__OPEN_MS": "600000", "BACKOFF__JITTER": "0.1"}
    daemon = make(**{f"POOL_MANAGERD__SUPERVISION__{key}": value for key, value in env.items()}).start()
    daemon.preload("p", "--exit-after", "0.2")
    daemon.until(lambda s: s["circuit_state"] == "open", "the breaker to open")
    waits = [line["backoff_ms"] for line in daemon.lines("backoff")]
    assert all(later > 1.4 * earlier for earlier, later in pairwise(waits)), waits
    status = daemon.status()
    assert (status["state"], status["crash_count"], status["pid"]) == ("failed", 4, None) and status["last_error"]
    before, began = cpu_seconds(leader_of(daemon)), time.monotonic()
    time.sleep(2)
    assert (cpu_seconds(leader_of(daemon)) - before) / (time.monotonic() - began) < 0.15, "with /health asked 20 times a second"
    assert daemon.status()["crash_count"] == 4


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGBUS])
def test_B3_a_signal_from_outside_is_recorded_counted_and_survived(daemon: Watched, number: signal.Signals) -> None:
    pid = daemon.preload("p")["pid"]
    os.kill(pid, number)
    daemon.until(lambda s: s["ready"] and s["pid"] != pid, "the restart")
    status = daemon.status()
    assert (status["crash_count"], status["restart_count"]) == (1, 1)
    assert daemon.get("/v1/pools/p/crashes")[1][-1]["signal"] == number.name


@pytest.mark.parametrize("flags", [("--fork-grandchildren", "5", "--setsid"), ("--orphans", "3"), ("--core",)])
def test_B5_what_an_engine_forked_is_gone_before_the_next_one_starts(daemon: Watched, flags: tuple[str, ...]) -> None:
    pid = daemon.preload("p", *flags)["pid"]
    wait_until(lambda: len(grandchildren(daemon)) > 0 or "--core" in flags, "its grandchildren", 5)
    forked = [*procfs.descendants(pid), *grandchildren(daemon)]
    assert forked
    os.kill(pid, signal.SIGKILL)
    daemon.until(lambda s: s["pid"] not in (pid, None), "the next launch")
    assert [child for child in forked if alive(child)] == []
    until_ready(daemon)


def test_B7_one_that_ignores_sigterm_is_killed_at_the_deadline(daemon: Watched) -> None:
    pid = daemon.preload("p", "--ignore-term", "--fork-grandchildren", "2")["pid"]
    answer = in_time(1.0 + 2, lambda: daemon.post("/v1/pools/p/stop?wait=true"))
    assert answer[0] == 200 and not alive(pid)


def test_B9_a_stopped_engine_is_unready_soon_and_gives_no_leases(daemon: Watched) -> None:
    pid = daemon.preload("p", slots_total=2)["pid"]
    lease = daemon.post("/v1/pools/p/leases")[1]["lease_id"]
    os.kill(pid, signal.SIGSTOP)
    in_time(3 * PROBE_S + 2, lambda: daemon.until(lambda s: not s["ready"], "it to be unready"))
    code, answer = daemon.post("/v1/pools/p/leases")
    assert code in (409, 503) and answer["code"] == "POOL_UNREADY", answer
    assert daemon.status()["active_leases"] == 1 and daemon.status()["last_error"]
    os.kill(pid, signal.SIGCONT)
    until_ready(daemon)
    assert [row["lease_id"] for row in daemon.get("/v1/pools/p/leases")[1]] == [lease]


def test_B11_an_engine_whose_port_is_closed_is_unready_and_says_why(daemon: Watched) -> None:
    """Profile dev leaves it running; what replaces it in the others is tested beside the lifecycle."""
    daemon.preload("p", "--close-port-after", "1")
    daemon.until(lambda s: not s["ready"], "it to be unready", timeout_s=3 * PROBE_S + 5)
    status = daemon.status()
    assert status["live"] and "refused" in status["last_error"], status["last_error"]


def test_B13_a_port_that_is_lost_between_choice_and_bind_is_replaced_a_bounded_number_of_times(
    make: Make, open_dir: Path, tiny_model: Path
) -> None:
    port, binary = free_port(), scripted(open_dir, name="llama-server")
    # It tries the taken port at its first start, as if somebody else had been quicker.
    binary.write_text(
        '#!/bin/sh\ncase "$1" in --help|--version) exit 1;; esac\n'
        f'if [ ! -e "$HOME/lost" ]; then touch "$HOME/lost"; set -- "$@" --port {port}; fi\n'
        f'exec "{sys.executable}" -I "{FAKE_ENGINE}" "$@"\n'
    )
    with socket.socket() as quicker:
        quicker.bind(("127.0.0.1", port))
        quicker.listen()
        daemon = make(f"pools: {json.dumps([pool('p', tiny_model, binary)])}\n").start()
        status = until_ready(daemon)
        assert str(port) not in status["url"] and "cannot bind" in "".join(daemon.get("/v1/pools/p/logs")[1])
        assert daemon.status()["crash_count"] <= 1


@pytest.mark.slow
def test_B15_a_load_that_moves_is_left_alone_and_one_that_does_not_is_ended(make: Make) -> None:
    limits = {"STARTUP_TIMEOUT_MS": "2000", "STARTUP_CAP_MS": "12000", "STALL_MS": "2500"}
    daemon = make(**{f"POOL_MANAGERD__HEALTH__{key}": value for key, value in limits.items()}).start()
    assert daemon.post("/v1/pools/moves/preload", engine("--ready-after", "6", "--progress-log", "0.3"))[0] == 200
    code, answer = daemon.post("/v1/pools/stands/preload", engine("--ready-after", "600"))
    assert code == 500 and "health check failed" in answer["message"]
    began = time.monotonic()
    endless = daemon.post("/v1/pools/endless/preload?wait=false", engine("--ready-after", "600", "--progress-log", "0.3"))
    assert endless[0] == 202
    daemon.until(lambda s: s["state"] == "failed", "the hard cap", "endless")
    assert 11 < time.monotonic() - began < 16


FLOOD = r"""
sys.stdout.buffer.write(b"x" * MEGABYTES * (1 << 20))
sys.stdout.buffer.write(b"\n\x00\x00 nul \xff\xfe\xc3 bad utf-8 \x1b[31m\x1b]0;title\x07 ansi\r\n")
sys.stdout.buffer.write(b"forged 2026 CRITICAL\x85\xe2\x80\xa8line\n")
sys.stdout.flush()
"""


@pytest.mark.parametrize("megabytes", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_B17_a_line_without_end_and_bytes_that_are_no_text_harm_nobody(daemon: Watched, megabytes: int) -> None:
    flooding = of_its_own(FLOOD.replace("MEGABYTES", str(megabytes)))
    assert daemon.post("/v1/pools/p/preload", flooding)[0] == 200
    os.kill(daemon.status()["pid"], signal.SIGKILL)
    daemon.until(lambda s: s["crash_count"] == 1, "the crash")
    log = b"".join(path.read_bytes() for path in sorted(daemon.run.glob("engine-p.log*")))
    assert len(log) < (64 << 20) and b"\xff\xfe\xc3" in log and b"\x1b[31m" in log, "the log has the bytes as they came"
    shown = str(daemon.get("/v1/pools/p/logs")[1]) + str(daemon.get("/v1/pools/p/crashes")[1]) + daemon.text()
    assert not {"\x1b", "\x00", "\x85", "\u2028", "\x07"} & set(shown), "whoever is shown it, sees it escaped"
    until_ready(daemon)


def test_B19_an_end_is_noticed_although_a_grandchild_holds_the_output(daemon: Watched) -> None:
    pid = daemon.preload("p", "--leave-pipe")["pid"]
    os.kill(pid, signal.SIGKILL)
    in_time(1, lambda: daemon.until(lambda s: not s["ready"], "the end to be noticed"))
    daemon.until(lambda s: s["crash_count"] == 1, "its exit to be recorded", timeout_s=5)
    until_ready(daemon)


EATER = """
def eat():
    with open("GROUP/cgroup.procs", "w") as group: group.write(str(os.getpid()))
    held = []
    while True: held.append(bytearray(os.urandom(1 << 20) * 4))
if not os.path.exists(os.environ["HOME"] + "/ate"):
    open(os.environ["HOME"] + "/ate", "w").close()
    threading.Timer(1.0, eat).start()
"""


def test_B21_an_engine_that_the_kernel_kills_for_memory_comes_back_and_the_daemon_is_spared(daemon: Watched) -> None:
    with cgroup("memory", limit_in_bytes=96 << 20) as group:
        (group / "cgroup.procs").chmod(0o666)
        assert daemon.post("/v1/pools/p/preload", of_its_own(EATER.replace("GROUP", str(group))))[0] == 200
        pid = daemon.status()["pid"]
        daemon.until(lambda s: s["crash_count"] == 1 and s["ready"] and s["pid"] != pid, "the restart", timeout_s=40)
        report = daemon.get("/v1/pools/p/crashes")[1][-1]
        if "Permission" in str(report) or "not permitted" in str(report):
            pytest.skip("the engine may not enter the group")
        assert report["crash_class"] == "out_of_memory", report
    engine_score, own = (
        int(Path(f"/proc/{one}/oom_score_adj").read_text()) for one in (daemon.status()["pid"], leader_of(daemon))
    )
    assert engine_score > own, "the kernel takes an engine before the daemon"


FILLS = """
def fill():
    with open(os.environ["HOME"] + "/flood", "wb", buffering=0) as file:
        try:
            while True: file.write(bytes(1 << 20))
        except OSError as problem:
            print("the engine's disk:", problem, flush=True)
            os._exit(9)
threading.Timer(0.5, fill).start()
"""


def test_B23_an_engine_that_fills_its_disk_hurts_itself_alone(make: Make, open_dir: Path) -> None:
    (open_dir / "d").mkdir()
    with mounted_small(open_dir / "d" / "run", "30m") as disk:
        daemon = make().start()
        other = daemon.preload("other")["pid"]
        assert daemon.post("/v1/pools/p/preload", of_its_own(FILLS))[0] == 200
        daemon.until(lambda s: s["crash_count"] >= 1, "the engine to have ended")
        assert daemon.post("/v1/pools/another")[0] == 200, "the state is elsewhere, and can be written"
        status = daemon.status("other")
        assert status["ready"] and status["pid"] == other and daemon.get("/health")[1]["status"] == "ok"
        assert daemon.post("/v1/pools/p/stop?wait=true")[0] == 200 and daemon.delete("/v1/pools/p")[0] == 200
        wait_until(lambda: shutil.disk_usage(disk).free > 20 << 20, "its files to be gone with the pool", 10)
        assert daemon.post("/v1/pools/p/preload", engine())[0] == 200
        assert daemon.judge() == []


def test_B25_a_binary_that_is_replaced_does_not_disturb_what_runs_and_is_told_at_adoption(make: Make, open_dir: Path) -> None:
    binary = scripted(open_dir, name="engine")
    port = free_port()
    daemon = make().start()
    body = {"binary_path": str(binary), "flags": ["--port", str(port)], "port": port}
    assert daemon.post("/v1/pools/p/preload", body)[0] == 200
    pid = daemon.status()["pid"]
    fresh = binary.with_name("fresh")
    shutil.copy(binary, fresh)
    fresh.replace(binary)
    daemon.kill()
    daemon.start()
    status = until_ready(daemon)
    assert status["pid"] == pid and status["crash_count"] == 0
    said = [line["human"] for line in daemon.lines() if str(binary) in line["human"] and line["level"] == "warn"]
    assert said, "a program that is not the one that was launched is told"
    assert daemon.post("/v1/pools/p/restart?wait=true")[0] == 200


@pytest.mark.parametrize("rounds", [12, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_B27_killed_at_any_moment_of_a_probe_it_is_started_once(make: Make, rounds: int) -> None:
    quick = {
        "HEALTH__PROBE_INTERVAL_MS": 100, "SUPERVISION__BACKOFF__INITIAL_MS": 10, "SUPERVISION__BACKOFF__MAX_MS": 20,
        "SUPERVISION__BREAKER__THRESHOLD": 1000, "SUPERVISION__RESTART_LIMIT__MAX_RESTARTS": 1000,
        "SUPERVISION__RESTART_LIMIT__STORM_OPEN": 1000,
    }  # fmt: skip
    daemon = make(**{f"POOL_MANAGERD__{key}": str(value) for key, value in quick.items()}).start()
    pid, chance = daemon.preload("p")["pid"], random.Random(rounds)
    for number in range(1, rounds + 1):
        time.sleep(chance.uniform(0, 0.12))
        os.kill(pid, signal.SIGKILL)
        daemon.until(lambda s: s["ready"] and s["crash_count"] == number, f"restart {number}", timeout_s=20)  # noqa: B023
        status = daemon.status()
        assert (status["restart_count"], status["crash_count"]) == (number, number)
        assert status["pid"] != pid
        pid = status["pid"]
        with urllib.request.urlopen(f"{status['url']}/health", timeout=5) as answer:
            assert answer.status == 200
