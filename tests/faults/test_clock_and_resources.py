"""Family J: the clock jumps, the CPU is taken away, the configuration turns bad, nobody reads the log."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.faults.conftest import Make, MakeNode, MakePool
from tests.faults.inject import build, cgroup, leader_of
from tests.faults.watched import Watched
from tests.gpu.nodes import cards

SHIFTED = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long shift(void) {
    char *place = getenv("CLOCK_SHIFT"), text[32] = {0};
    FILE *file = place ? fopen(place, "re") : NULL;
    if (!file) return 0;
    if (!fgets(text, sizeof text, file)) text[0] = 0;
    fclose(file);
    return atol(text);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int done = real(clock, now);
    if (!done && clock == CLOCK_REALTIME) now->tv_sec += shift();
    return done;
}
"""
YEAR = 366 * 86400


@pytest.mark.parametrize("seconds", [YEAR, -YEAR, 3600, 1])
def test_J1_a_clock_that_jumps_changes_no_lease_no_wait_and_no_limit(make: Make, open_dir: Path, seconds: int) -> None:
    shift = open_dir / "shift"
    env = {"POOL_MANAGERD__SUPERVISION__BACKOFF__INITIAL_MS": "1000", "POOL_MANAGERD__SUPERVISION__BACKOFF__MAX_MS": "1000"}
    daemon = make(LD_PRELOAD=str(build(SHIFTED, open_dir, "shifted")), CLOCK_SHIFT=str(shift), **env).start()
    pid = daemon.preload("p", slots_total=3)["pid"]
    daemon.preload("q")
    kept = daemon.post("/v1/pools/p/leases")[1]["lease_id"]
    short = daemon.post("/v1/pools/p/leases", {"ttl_ms": 4000})[1]["lease_id"]
    began = time.monotonic()
    shift.write_text(str(seconds))
    daemon.get("/v1/pools")
    assert {row["lease_id"] for row in daemon.get("/v1/pools/p/leases")[1]} == {kept, short}
    os.kill(daemon.status("q")["pid"], signal.SIGKILL)
    daemon.until(lambda s: s["crash_count"] == 1, "the crash", "q")
    killed = time.monotonic()
    daemon.until(lambda s: s["ready"], "the restart", "q")
    assert 0.5 < time.monotonic() - killed < 5, "it waited as long as it should"
    daemon.until(lambda s: s["active_leases"] == 1, "the lease with an end to end")
    assert 3.5 < time.monotonic() - began < 8
    assert daemon.status()["pid"] == pid and daemon.lines("unhealthy") == []
    daemon.kill()
    daemon.start()
    daemon.until(lambda s: s["ready"] and s["pid"] == pid, "the engine to be adopted, whatever the clock says")
    assert [row["lease_id"] for row in daemon.get("/v1/pools/p/leases")[1]] == [kept]


def test_J3_a_daemon_that_gets_hardly_any_cpu_kills_nobody(daemon: Watched) -> None:
    pids = {name: daemon.preload(name)["pid"] for name in ("a", "b", "c")}
    with cgroup("cpu", cfs_quota_us=3000) as group, daemon.victim():
        (group / "cgroup.procs").write_text(str(leader_of(daemon)))
        time.sleep(6)
    wait_until(lambda: daemon.get("/health")[0] == 200, "the daemon to have its CPU back", 15)
    for name, pid in pids.items():
        daemon.until(lambda s: s["ready"], "the engine", name)
        status = daemon.status(name)
        assert (status["pid"], status["crash_count"]) == (pid, 0)
    assert daemon.lines("unhealthy") == []


def test_J7_a_configuration_that_gives_a_gpu_away_twice_costs_nobody_their_engine(make_node: MakeNode, fake: MakePool) -> None:
    """Pool a has GPU 0 to itself; the file moves b there. That cannot be, so b goes on where it was, and says so."""
    pools = [fake("a", devices=[0], gib=2, exclusive=True), fake("b", devices=[1], gib=2)]
    node = make_node(cards(24, 24), "engines vram=1GiB", pools=pools).start()
    node.until_ready("a", "b")
    pids = [node.status(name)["pid"] for name in ("a", "b")]
    node.config.write_text(node.config.read_text().replace(json.dumps(pools[1]), json.dumps({**pools[1], "devices": [0]})))
    hang_up(node)
    wait_until(lambda: node.lines("apply_finished") != [], "the apply to end", 20)
    assert node.lines("apply_finished")[-1]["failed"] == ["b"]
    assert [node.status(name)["pid"] for name in ("a", "b")] == pids and node.status("b")["ready"]
    assert "exclusive" in node.status("b")["unapplied"] and node.status("a")["unapplied"] is None


def hang_up(daemon: Watched) -> dict[str, object]:
    """SIGHUP, and what the daemon said of it."""
    before = len(daemon.lines("config_reread"))
    os.kill(leader_of(daemon), signal.SIGHUP)
    wait_until(lambda: len(daemon.lines("config_reread")) > before, "the configuration to be read again", 15)
    return daemon.lines("config_reread")[-1]


@pytest.mark.parametrize(
    "bad", ["", "profile: [", "profile: dev\nnonsense: 1\n", "profile: nowhere\n", "\x00", "gone", "unreadable"]
)
def test_J5_a_configuration_that_cannot_be_used_changes_nothing_and_is_told(daemon: Watched, bad: str) -> None:
    pid = daemon.preload("p")["pid"]
    good = daemon.config.read_text()
    if bad == "gone":
        daemon.config.unlink()
    elif bad == "unreadable":
        daemon.config.unlink()
        daemon.config.mkdir()
    else:
        daemon.config.write_text(bad)
    told = hang_up(daemon)
    if bad:  # an empty file is a valid one: all defaults, of which most wait for a restart
        assert told["outcome"] == "error" and told["level"] == "error", told
    status = daemon.status()
    assert status["ready"] and status["pid"] == pid
    if bad == "unreadable":
        daemon.config.rmdir()
    daemon.config.write_text(good)
    assert hang_up(daemon)["outcome"] == "success"


@pytest.mark.parametrize("stays", [True, False])
def test_J11_a_log_that_nobody_reads_blocks_nothing(make: Make, stays: bool) -> None:
    daemon = make()
    pipe = daemon.folder / "log-pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    daemon.start(wrap=("bash", "-c", f'exec "$@" > "{pipe}" 2>&1', "bash"))
    if not stays:
        os.close(reader)
    pid = daemon.preload("p")["pid"]
    for number in range(400):  # far more than a pipe holds
        daemon.post(f"/v1/pools/n{number}")
        daemon.delete(f"/v1/pools/n{number}")
    began = time.monotonic()
    assert daemon.get("/health")[0] == 200 and time.monotonic() - began < 1
    assert daemon.status()["pid"] == pid and daemon.status()["ready"]
    os.kill(pid, signal.SIGKILL)
    daemon.until(lambda s: s["ready"] and s["pid"] != pid, "the restart")
    if stays:
        assert len(os.read(reader, 1 << 20)) > 1000, "it was written to"
        os.close(reader)


def test_J_an_environment_with_a_wrong_value_is_told_with_its_name(make: Make) -> None:
    daemon = make(POOL_MANAGERD__HEALTH__INTERVAL_MS="soon")
    assert daemon.launch().wait(30) == 2
    assert "POOL_MANAGERD__HEALTH__INTERVAL_MS" in daemon.text()
