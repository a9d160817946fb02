"""What goes by: one happening is one line, the past is short unless asked for, and machines get JSON Lines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.core.event import Event
from tests.cli.test_commands import Invoke, Server
from tests.cli.test_printing import COMMAND


@pytest.fixture
def happened(server: Server) -> Any:
    """Put events into the node's log."""

    def publish(
        type: str, human: str, *, level: str = "info", pool_id: str | None = "demo", age_s: float = 0, **fields: Any
    ) -> None:
        at = round((time.time() - age_s) * 1000)  # the whole suite may have run since this file was read
        server.node.events.log.append(Event(len(server.node.events.log) + 1, at, type, level, pool_id, human, fields))

    return publish


def sentences(invoke: Invoke, *arguments: str) -> list[str]:
    code, out, err = invoke("events", *arguments)
    assert (code, err) == (0, "")
    return [re.split(r"(?:info|warn|error|debug|critical) +", line, maxsplit=1)[1] for line in out.splitlines()]


def test_one_happening_is_one_line(invoke: Invoke, happened: Any) -> None:
    error = 'health check failed: the engine exited with code 1; its log says "unknown model architecture"'
    happened("died", "Engine of pool 'demo' is gone; reading how it ended", level="warn")
    happened("crash", "Engine of pool 'demo' exited with code 1 after 1 s", level="error", last_error=error, exit_code=1)
    happened("preload_failed", f"Pool 'demo' did not become ready: {error}", level="error", last_error=error)
    happened("backoff", "Engine of pool 'demo' did not become ready; starting it again in 1 s", level="warn")
    happened("transition", "Pool 'demo' is backoff now (was starting)", level="debug")
    happened("operation", "Start of pool 'demo' failed", level="debug")
    assert sentences(invoke) == [
        f"Engine of pool 'demo' exited with code 1 after 1 s: {error}",
        "Engine of pool 'demo' did not become ready; starting it again in 1 s",
    ]
    assert len(sentences(invoke, "--level", "debug")) == 5, "every step; what the crash said is not said again"


def test_what_a_pool_could_not_start_for_is_not_said_again_by_the_preflight(invoke: Invoke, happened: Any) -> None:
    happened("preload_failed", "Pool 'demo' could not start: cannot use m.gguf (convert it)", level="error")
    happened("preflight", "cannot use m.gguf", level="error", pool_id=None)
    happened("preflight", "there is no GPU", level="error", pool_id=None)
    assert len(sentences(invoke)) == 2


def test_a_drain_ends_once(invoke: Invoke, happened: Any) -> None:
    happened("stop", "Stopping the engine of pool 'demo'", grace_ms=5000)
    happened("drain_finished", "Pool 'demo' has drained")
    happened("stopped", "Pool 'demo' is down and holds nothing")
    happened("stopped", "Pool 'demo' is down and holds nothing", pool_id="demo")
    assert sentences(invoke)[0] == "Pool 'demo' has drained" and len(sentences(invoke)) == 2


def test_the_past_is_the_last_few_unless_more_is_asked_for(invoke: Invoke, happened: Any) -> None:
    for number in range(50):
        happened("start", f"Number {number} of pool 'demo'", age_s=3600 - number * 60)
    assert sentences(invoke) == [f"Number {number} of pool 'demo'" for number in range(30, 50)]
    assert sentences(invoke, "-n", "2") == ["Number 48 of pool 'demo'", "Number 49 of pool 'demo'"]
    assert sentences(invoke, "-n", "0") == []
    assert len(sentences(invoke, "-n", "9999")) == 50
    assert len(sentences(invoke, "--since", "2h")) == 50, "--since alone is not cut to a few"
    assert len(sentences(invoke, "--since", "30m")) == 19
    assert len(sentences(invoke, "--since", "30m", "-n", "3")) == 3


def test_events_are_of_the_pools_and_as_bad_as_asked_for(invoke: Invoke, happened: Any) -> None:
    happened("start", "Starting pool 'demo'")
    happened("notice", "No checksum", level="warn", pool_id="other")
    happened("crash", "Engine of pool 'other' exited with code 3", level="error", pool_id="other")
    happened("device_quarantined", "GPU 0 is quarantined", level="error", pool_id=None)
    assert sentences(invoke, "--pool", "demo") == ["Starting pool 'demo'"]
    assert len(sentences(invoke, "--pool", "demo", "--pool", "other")) == 3
    assert sentences(invoke, "--level", "error") == ["Engine of pool 'other' exited with code 3", "GPU 0 is quarantined"]
    assert "other: No checksum" in sentences(invoke, "--level", "warn"), "a sentence that names no pool is told whose it is"


def test_what_happens_next_follows_the_past_without_a_gap_or_a_repetition(server: Server, happened: Any) -> None:
    for number in range(30):
        happened("start", f"Number {number}")
    with subprocess.Popen(
        [sys.executable, "-m", "pool_managerd.cli", "events", "-f", "-n", "2", "-o", "json", "--url", server.served.url],
        stdout=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        past = [json.loads(running.stdout.readline())["human"] for _ in range(2)]
        server.soon(lambda: server.node.events.publish("start", "demo", human="Number 30"))
        assert [*past, json.loads(running.stdout.readline())["human"]] == ["Number 28", "Number 29", "Number 30"]
        running.kill()


def test_followed_logs_are_a_json_object_a_line(server: Server, tmp_path: Path) -> None:
    server.node.log_file = tmp_path / "engine.log"
    server.node.log_file.write_text("first line\nsecond line\n")
    done = subprocess.run(
        ["/bin/bash", "-c", f"set -o pipefail; {COMMAND} logs demo -f -o json --url {server.served.url} | head -2"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 141, "it ends with its reader, although there is nothing more to print"
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"pool_id": "demo", "line": "first line"}, {"pool_id": "demo", "line": "second line"},
    ]  # fmt: skip


@pytest.mark.parametrize("option", ["--tail", "--lines", "-n"])
def test_the_end_of_a_log_is_as_long_as_asked_for(invoke: Invoke, server: Server, tmp_path: Path, option: str) -> None:
    server.node.log_file = tmp_path / "engine.log"
    server.node.log_file.write_text("first line\nsecond line\n")
    assert invoke("logs", "demo", option, "1")[1] == "second line\n"


def test_a_log_is_of_so_long_ago_or_of_the_launch_before(invoke: Invoke, server: Server, tmp_path: Path) -> None:
    log = server.node.log_file = tmp_path / "engine.log"
    log.write_text("first launch\nsecond launch\nits end\n")
    file, now = log.stat().st_ino, round(time.time() * 1000)
    code, _, err = invoke("logs", "demo", "--previous")
    assert (code, "at most one" in err) == (4, True)
    server.node.places.launched(now - 3_600_000, (file, 0))
    server.node.places.launched(now - 1_200_000, (file, 13))
    server.node.places.seen(now - 300_000, (file, 27))
    assert invoke("logs", "demo", "--previous")[1] == "first launch\n"
    assert json.loads(invoke("logs", "demo", "--previous", "-o", "json")[1])["lines"] == ["first launch"]
    assert invoke("logs", "demo", "--since", "2m")[1] == "its end\n"
    assert invoke("logs", "demo", "--since", "10m")[1] == "second launch\nits end\n", "a little more than asked for"
    assert invoke("logs", "demo", "--since", "10m", "--tail", "1")[1] == "its end\n"
    assert invoke("logs", "demo", "--since", "3h")[1].count("\n") == 3
    assert invoke("logs", "demo", "--previous", "-f")[0] == 2


def test_events_behind_an_id_are_all_shown_and_a_gap_is_told(invoke: Invoke, happened: Any) -> None:
    for number in range(30):
        happened("notice", f"Thing {number}")
    assert sentences(invoke, "--since-id", "3") == [f"demo: Thing {number}" for number in range(3, 30)]
    assert sentences(invoke, "--since-id", "3", "-n", "1") == ["demo: Thing 29"]
    assert sentences(invoke, "--since-id", "99", "--pool", "other") == ["Not all is kept"]
    code, out, _ = invoke("events", "--since-id", "99", "-o", "json")
    assert (code, json.loads(out.splitlines()[0])["oldest_id"]) == (0, 1)
    assert invoke("events", "--since-id", "-1")[0] == 2


def test_an_engine_that_was_ended_is_told_once(invoke: Invoke, happened: Any) -> None:
    error, late = "health check failed: 3 probes in a row failed", "health check failed: it was not healthy within 2 min"
    human = "Engine of pool 'demo' stopped answering its health probes; replacing it"
    happened("unhealthy", human, level="error", last_error=error)
    happened("crash", f"Engine of pool 'demo' is ended: {error}", level="error", last_error=error, exit_code=None, signal=None)
    happened("crash", f"Engine of pool 'demo' is ended: {late}", level="error", last_error=late, exit_code=None, signal=None)
    happened("crash", "Engine of pool 'demo' exited with code 3 after 1 s", level="error", last_error="exit_code=3", exit_code=3)
    happened("crash", "Engine of pool 'demo' exited with code 3 after 2 s", level="error", last_error="exit_code=3", exit_code=3)
    assert sentences(invoke) == [
        human, f"Engine of pool 'demo' is ended: {late}", "Engine of pool 'demo' exited with code 3 after 1 s",
        "Engine of pool 'demo' exited with code 3 after 2 s",
    ]  # fmt: skip


def test_a_log_of_the_other_replica_is_shown(invoke: Invoke, server: Server, tmp_path: Path) -> None:
    server.node.log_file = tmp_path / "engine.log"
    server.node.log_file.write_text("the engine that serves\n")
    (tmp_path / "engine.r1").write_text("the one that was tried\n")
    assert invoke("logs", "demo", "--replica", "r1")[1] == "the one that was tried\n"
    code, _, err = invoke("logs", "demo", "--replica", "r0")
    assert code == 4 and "replica r0 of pool demo: there is none" in err
    code, _, err = invoke("logs", "demo", "--replica", "../r1")
    assert code == 4 and "it must be r0 or r1" in err
    assert invoke("logs", "demo", "--replica", "r1", "--previous")[0] == 4
