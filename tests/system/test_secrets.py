"""A secret that the daemon was told is in nothing that it tells, not even when the engine that has it prints it and dies."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port, wait_until
from tests.system.daemons import Daemon

CANARY = "canary-7f3a9c"
PRINTS = (
    "import os, sys; print('error: 401 for', os.environ['DB_PASS'], os.environ['DATABASE_URL'], sys.argv[2], flush=True);"
    "sys.exit(3)"
)


@pytest.fixture
def daemon(open_dir: Path) -> Iterator[Daemon]:
    started = Daemon(open_dir / "d").start()
    yield started
    started.end()


def engine(**fields: Any) -> dict[str, Any]:
    return {
        "binary_path": sys.executable,
        "port": free_port(),
        "flags": ["-I", "-c", PRINTS, "--api-key", f"{CANARY}-key"],
        "env": {"DB_PASS": f"{CANARY}-pass", "DATABASE_URL": f"postgres://u:{CANARY}-url@h/x"},
        **fields,
    }


def everything_told(daemon: Daemon) -> dict[str, str]:
    paths = [
        "/v1/pools", "/v1/pools/p", "/v1/pools/p/status", "/v1/pools/p/health", "/v1/pools/p/command", "/v1/pools/p/explain",
        "/v1/pools/p/logs", "/v1/pools/p/crashes", "/v1/crashes", "/v1/operations", "/v1/events?follow=false&after=0",
        "/v1/snapshots", "/v1/capabilities", "/v1/devices", "/ready", "/health", "/metrics",
    ]  # fmt: skip
    told = {path: json.dumps(daemon.get(path)[1]) for path in paths}
    told |= {str(path): path.read_text() for path in (daemon.run / "engines").glob("*.json")}
    return told | {"the log": daemon.text()}


def test_a_secret_that_a_crashing_engine_prints_is_in_nothing_that_is_told(daemon: Daemon) -> None:
    code, answer = daemon.post("/v1/pools/p/preload", engine())
    assert code == 500
    log = (daemon.run / "engine-p.log").read_text()
    assert CANARY in log, "the engine did print it, and its own log is raw"
    wait_until(lambda: "401 for" in daemon.text(), "the crash in the log", 10)
    told = everything_told(daemon) | {"the answer": json.dumps(answer)}
    assert [place for place, text in told.items() if CANARY in text] == []
    assert "401 for ***" in told["/v1/pools/p/logs"]
    assert "401 for ***" in told["/v1/pools/p/crashes"]


def test_a_secret_that_a_refused_request_holds_is_not_echoed(daemon: Daemon) -> None:
    for wrong in ({"replica_id": "%"}, {"port": "x"}, {"host": "example.com"}, {"device_mask": "nothing"}, {"binary_path": "/x"}):
        code, answer = daemon.post("/v1/pools/p/preload", engine(**wrong))
        assert code >= 400
        assert CANARY not in json.dumps(answer)
    told = everything_told(daemon)
    assert [place for place, text in told.items() if CANARY in text] == []


def test_a_running_engine_shows_no_secret_in_its_command_and_its_handoff_file_is_the_daemons_alone(daemon: Daemon) -> None:
    port = free_port()
    script = (
        "import http.server, sys\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.send_header('Content-Length', '2'); self.end_headers(); self.wfile.write(b'ok')\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()\n"
    )
    flags = ["-I", "-c", script, str(port), f"--api-key={CANARY}-key"]
    code, answer = daemon.post("/v1/pools/p/preload", engine(port=port, flags=flags))
    assert code == 200, answer
    told = everything_told(daemon)
    assert [place for place, text in told.items() if CANARY in text] == []
    command = daemon.get("/v1/pools/p/command")[1]
    assert command["argv"][-1] == "--api-key=***"
    assert command["env"]["DB_PASS"] == "***"
    (handoff,) = (daemon.run / "engines").glob("p-*.json")
    assert handoff.stat().st_mode & 0o777 == 0o600


def test_a_secret_that_was_changed_is_still_masked_in_the_log_that_has_it(daemon: Daemon) -> None:
    daemon.post("/v1/pools/p/preload", engine())
    daemon.post("/v1/pools/p/preload", engine(env={"DB_PASS": "another-one", "DATABASE_URL": "x"}))
    assert CANARY in (daemon.run / "engine-p.log").read_text()
    told = everything_told(daemon)
    assert [place for place, text in told.items() if CANARY in text] == []
