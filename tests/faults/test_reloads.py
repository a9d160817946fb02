"""Rows of families A and J that are about replacing what a pool runs, one engine after the other and side by side."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.failpoints import FLAG, WANTED
from tests.faults.conftest import Make
from tests.faults.watched import Watched
from tests.system.daemons import engine
from tests.system.nodes import alive
from tests.system.test_reload import weighed

STRATEGIES = ("stop_start", "blue_green")


def armed(make: Make, place: str) -> Watched:
    return make("reload: {bake_ms: 300}\n", **{FLAG: "1", WANTED: f"{place}=1*panic"}).start()


def dies_in_a_reload(daemon: Watched, body: dict[str, Any]) -> None:
    """Asked for, and killed by itself on the way; the next daemon has no failpoints."""
    assert daemon.process is not None
    daemon.watch.expect(False)
    with suppress(OSError):  # it may die before it can answer
        daemon.post("/v1/pools/p/reload", body)
    assert daemon.process.wait(20) == -signal.SIGKILL
    daemon.env.pop(WANTED)
    daemon.start()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_A3_killed_in_a_reload_before_the_switch_the_old_engine_serves_and_the_new_one_is_gone(
    make: Make, open_dir: Path, strategy: str
) -> None:
    size = weighed(open_dir)
    daemon = armed(make, "reload.proven" if strategy == "blue_green" else "reload.begun")
    before = daemon.preload("p", **size)["pid"]
    dies_in_a_reload(daemon, {"engine": engine("--model", "new", **size), "strategy": strategy})
    daemon.until(lambda status: bool(status["ready"]), "the old engine to serve")
    assert daemon.status()["pid"] == before and daemon.status()["beside"] is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_A5_killed_in_a_rollback_the_next_daemon_completes_it(make: Make, open_dir: Path, strategy: str) -> None:
    size = weighed(open_dir)
    daemon = armed(make, "reload.undoing")
    before = daemon.preload("p", "--model", "old", **size)["pid"]
    dies_in_a_reload(daemon, {"engine": engine("--exit-after", "0", **size), "strategy": strategy})
    daemon.until(lambda status: bool(status["ready"]), "what ran before to run again")
    status = daemon.status()
    assert (status["pid"] == before) is (strategy == "blue_green") and status["beside"] is None
    argv = Path(f"/proc/{status['pid']}/cmdline").read_bytes().split(b"\0")
    assert argv[argv.index(b"--model") + 1] == b"old"


def test_J9_a_rollback_that_fails_too_is_told_in_full_and_goes_to_and_fro_no_more(make: Make, open_dir: Path) -> None:
    """What ran before cannot be started again: its program is gone. It is tried again as after any failure, and nothing else."""
    program = open_dir / "engine.sh"
    given = engine("--model", "old")
    program.write_text('#!/bin/sh\nexec "$@"\n')
    program.chmod(0o755)
    old = {**given, "binary_path": str(program), "flags": [given["binary_path"], *given["flags"]]}
    daemon = make("reload: {bake_ms: 300}\n").start()
    assert daemon.post("/v1/pools/p/preload", old)[0] == 200
    before = daemon.status()["pid"]
    program.unlink()
    code, told = daemon.post("/v1/pools/p/reload?wait=true", {"engine": engine("--exit-after", "0"), "strategy": "stop_start"})
    assert code == 500 and told["details"]["rolled_back"] is False, told
    assert (
        "exit_code=1" in told["message"] and "did not start again either" in told["message"] and str(program) in told["message"]
    )
    status = daemon.status()
    assert not status["live"] and status["state"] in ("backoff", "failed", "offline") and not alive(before)
    assert len(daemon.lines("reload_failed")) == 1 and daemon.lines("reload_failed")[0]["reason"] == "rollback_failed"
    assert daemon.post("/v1/pools/p/stop?wait=true")[0] == 200
