"""Secrets of submitted engines are never on disk; what was submitted comes back only as far as that allows."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FAKE_ENGINE, free_port
from tests.system.daemons import Daemon

CANARY = "canary-51b2"


@pytest.fixture
def daemon(open_dir: Path) -> Iterator[Daemon]:
    started = Daemon(open_dir / "d").start()
    yield started
    started.end()


def engine(*flags: str, **env: str) -> dict[str, Any]:
    port = free_port()
    flags = ("-I", str(FAKE_ENGINE), "--port", str(port), *flags)
    return {"binary_path": sys.executable, "port": port, "flags": list(flags), "env": env}


def on_disk(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


def test_a_secret_of_a_submitted_engine_is_not_on_disk_and_after_a_restart_the_pool_says_what_it_lacks(daemon: Daemon) -> None:
    body = engine("--api-key", f"{CANARY}-key", f"--hf-token={CANARY}-hf", DB_PASS=f"{CANARY}-pass", OMP_NUM_THREADS="1")
    assert daemon.post("/v1/pools/p/preload", body)[0] == 200
    assert on_disk(daemon.folder) == []
    daemon.kill()
    assert on_disk(daemon.folder) == []
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine, which still has its secrets, to be taken over")
    os.kill(daemon.status()["pid"], signal.SIGSEGV)
    daemon.until(lambda s: not s["live"] and s["state"] == "failed", "the pool to say that it cannot be started again")
    found = daemon.status("p")
    assert "secrets (DB_PASS, --api-key, --hf-token) are not written to disk" in found["last_error"]
    code, answer = daemon.post("/v1/pools/p/start?wait=true")
    assert (code, answer["code"]) == (409, "SECRETS_NOT_KEPT")
    assert "preload" in answer["hint"]
    assert daemon.post("/v1/pools/p/hold?wait=true")[0] == 200
    assert daemon.post("/v1/pools/p/release?wait=true")[0] == 200
    daemon.kill()
    daemon.start()
    assert "DB_PASS" in daemon.status("p")["last_error"], "it is said until it is given again"
    assert daemon.post("/v1/pools/p/preload", body)[0] == 200
    assert daemon.status("p")["ready"]


def test_the_secrets_of_an_engine_that_was_taken_over_are_masked_and_not_quoted_when_nobody_knows_them(daemon: Daemon) -> None:
    """It prints a secret and dies: under the next daemon, and while none was there."""
    for dies_alone in (False, True):
        body = engine(f"--token={CANARY}-flag", DB_PASS=f"{CANARY}-pass")
        flags: list[str] = body["flags"]
        script = 'trap "echo error: $DB_PASS is wrong; exit 1" USR1; "$@" & while :; do wait; done'
        shell = {**body, "binary_path": "/bin/sh", "flags": ["-c", script, "sh", sys.executable, *flags]}
        assert daemon.post("/v1/pools/p/preload", shell)[0] == 200
        pid = daemon.status("p")["pid"]
        daemon.kill()
        if dies_alone:
            os.kill(pid, signal.SIGUSR1)
        daemon.start()
        if not dies_alone:
            daemon.until(lambda s: s["ready"], "the engine to be taken over")
            os.kill(pid, signal.SIGUSR1)
        daemon.until(lambda s: s["state"] == "failed", "its end to be told")
        told = [daemon.get(path)[1] for path in ("/v1/crashes", "/v1/pools/p/status", "/v1/events?follow=false&after=0")]
        assert CANARY not in json.dumps(told) and CANARY not in daemon.text()


def test_an_engine_without_secrets_comes_back_as_it_was_submitted(daemon: Daemon) -> None:
    assert daemon.post("/v1/pools/p/preload", engine(OMP_NUM_THREADS="1"))[0] == 200
    daemon.kill()
    daemon.start()
    daemon.until(lambda status: status["ready"], "the pool to be ready again")


def test_policy_is_asked_again_when_a_stored_engine_would_start(open_dir: Path) -> None:
    listed = f'policy: {{engine_allowlist: ["{sys.executable}"]}}\n'
    token = "a-token-of-more-than-thirty-two-characters"
    daemon = Daemon(open_dir / "d", listed, profile="dev", AUTH_TOKEN=token)
    daemon.token = token
    try:
        daemon.start()
        assert daemon.post("/v1/pools/p/preload", engine())[0] == 200
        daemon.terminate()
        daemon.config.write_text(daemon.config.read_text().replace("profile: dev", "profile: cloud").replace(listed, ""))
        daemon.start()
        found = daemon.status("p")
        assert not found["live"]
        assert "cannot run a submitted engine" in found["last_error"]
        code, answer = daemon.post("/v1/pools/p/start?wait=true")
        assert (code, answer["code"]) == (403, "POLICY_DENIED")
    finally:
        daemon.end()


def test_a_start_of_a_pool_with_nothing_to_run_is_a_conflict(daemon: Daemon) -> None:
    assert daemon.post("/v1/pools/empty")[0] == 200
    for change in ("start", "restart", "start?wait=true", "preload"):
        code, answer = daemon.post(f"/v1/pools/empty/{change}")
        assert (code, answer["code"]) == (409, "POOL_NOT_CONFIGURED"), change
