"""SIGHUP reads the configuration again; SIGTERM ends; as process 1 the daemon's parent collects what nobody else does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import FAKE_ENGINE, REPOSITORY, wait_until
from tests.system.daemons import Daemon, engine


@pytest.fixture
def daemon(open_dir: Path) -> Iterator[Daemon]:
    made = Daemon(open_dir / "d")
    yield made
    made.end()


def hang_up(daemon: Daemon) -> dict[str, object]:
    """SIGHUP, and what the daemon said of it."""
    assert daemon.process is not None
    before = len(daemon.lines("config_reread"))
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(daemon.lines("config_reread")) > before, "the configuration to be read again", 10)
    return daemon.lines("config_reread")[-1]


def test_a_new_token_holds_at_once_and_the_former_one_for_a_while(daemon: Daemon) -> None:
    token = daemon.folder / "token"
    token.write_text("first-token-" + "x" * 32)
    token.chmod(0o600)
    daemon.config.write_text(daemon.config.read_text() + f"auth: {{token_file: {token}}}\n")
    daemon.token = token.read_text()
    daemon.start()
    assert daemon.get("/v1/pools")[0] == 200
    token.write_text("second-token-" + "y" * 32)
    assert hang_up(daemon)["outcome"] == "success"
    assert daemon.get("/v1/pools")[0] == 200, "the former token holds for some minutes more"
    daemon.token = token.read_text()
    assert daemon.get("/v1/pools")[0] == 200
    daemon.token = "another-" + "z" * 32
    assert daemon.get("/v1/pools")[0] == 401
    assert "second-token" not in daemon.text() and "first-token" not in daemon.text()


def test_level_and_policy_hold_at_once_and_the_rest_is_named(daemon: Daemon) -> None:
    daemon.start()
    pid = daemon.preload("p")["pid"]
    text = daemon.config.read_text()
    daemon.config.write_text(
        text.replace("interval_ms: 50", "interval_ms: 60").replace("runtime_dir:", "preload_parallelism: 2, runtime_dir:")
        + "telemetry: {log_level: debug}\npolicy: {allow_schemes: [file, hf]}\n"
    )
    said = hang_up(daemon)
    assert said["waiting"] == ["daemon.preload_parallelism"] and "daemon.preload_parallelism" in str(said["human"])
    assert "take over health, policy, telemetry" in str(said["human"])
    assert daemon.status()["pid"] == pid and daemon.status()["ready"], "no pool is touched"
    daemon.post("/v1/pools/p/restart?wait=true")
    wait_until(lambda: daemon.lines("transition") != [], "a line of the level debug", 10)
    metric = 'config_reread_total{outcome="success"} 1.0'
    assert metric in daemon.get("/metrics")[1]


@pytest.mark.parametrize(
    "broken", ["pools: [", "helth: {}\n", "daemon: {bind: 0.0.0.0:9}\n"], ids=["no YAML", "unknown key", "unsafe"]
)
def test_a_file_that_cannot_be_used_changes_nothing_and_says_so(daemon: Daemon, broken: str) -> None:
    daemon.start()
    daemon.config.write_text("profile: dev\n" + broken)
    said = hang_up(daemon)
    assert (said["outcome"], said["level"]) == ("error", "error") and "stays as it was" in str(said["human"])
    assert daemon.get("/health")[0] == 200
    assert 'config_reread_total{outcome="error"} 1.0' in daemon.get("/metrics")[1]


def test_a_terminal_that_goes_away_ends_the_daemon(daemon: Daemon) -> None:
    script = shutil.which("script")
    if script is None:
        pytest.skip("there is no script(1) to run it on a terminal")
    argv = f"exec {sys.executable} -m pool_managerd.cli serve --config {daemon.config}"
    kept = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    terminal = subprocess.Popen([script, "-qec", argv, "/dev/null"], cwd=daemon.folder, env=kept, stdout=subprocess.DEVNULL,
                                stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip

    def answers() -> bool:
        try:
            return daemon.get("/health")[0] == 200
        except OSError:
            return False

    wait_until(answers, "the daemon on the terminal to answer", 20)
    terminal.kill()
    terminal.wait(10)
    wait_until(lambda: not answers(), "the daemon to have ended with its terminal", 20)


def test_as_process_1_orphans_are_collected_and_the_exit_code_is_the_daemons(daemon: Daemon) -> None:
    """In a pid namespace of its own: an engine's orphans come to process 1, which is no longer the daemon itself."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a pid namespace needs root and unshare")
    wrap = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run([*wrap, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no pid namespace can be made here")
    daemon.start(wrap=wrap)
    body = engine()
    script = f"for i in 1 2 3 4 5; do (sleep 0.2 &) ; done; exec {sys.executable} -I {FAKE_ENGINE} --port {body['port']}"
    answer = daemon.post("/v1/pools/p/preload", {**body, "binary_path": "/bin/sh", "flags": ["-c", script]})
    assert answer[0] == 200, answer
    assert daemon.process is not None
    (init,) = [pid for pid in children(daemon.process.pid) if pid]
    (served,) = children(init)
    wait_until(lambda: not [pid for pid in children(init) if state(pid) == "Z"], "no zombie of process 1", 10)
    assert children(init) == [served]
    os.kill(init, signal.SIGTERM)
    assert daemon.process.wait(20) == 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_what_sighup_says_is_an_event_like_any_other(daemon: Daemon) -> None:
    daemon.start()
    hang_up(daemon)
    text = daemon.get("/v1/events?follow=false&after=0")[1]
    kinds = [json.loads(line[6:])["type"] for line in text.splitlines() if line.startswith("data: ")]
    assert "config_reread" in kinds
