"""The daemon as a process: it serves, says so, stops on a signal, and refuses what it must not do."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SOURCE = str(Path(__file__).resolve().parents[2] / "src")


class Run:
    """One ``pool-managerd serve`` in its own directory."""

    def __init__(self, folder: Path, config: str, *flags: str, **env: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "pool-managerd.yaml").write_text(config)
        self.log = folder / "stderr"
        keep = {
            k: v for k, v in os.environ.items() if not k.startswith(("POOL_MANAGERD", "AUTH_", "LLORCH", "NOTIFY", "WATCHDOG"))
        }
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pool_managerd.cli", "serve", *flags],
                cwd=folder,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                env=keep | {"PYTHONPATH": SOURCE} | env,
            )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def url(self) -> str:
        """Where it serves, once it does."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self.lines():
                if line["action"] == "serving":
                    return str(line["url"]).removeprefix("http://")
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.url(), timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            raw = response.read()
            return response.status, json.loads(raw) if raw.startswith((b"{", b"[")) else raw
        finally:
            connection.close()

    def end(self, *signals: signal.Signals) -> int:
        for number in signals:
            self.process.send_signal(number)
        try:
            return self.process.wait(20)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


DEV = 'profile: dev\ndaemon: {bind: "127.0.0.1:0"}\n'


def test_it_serves_tells_systemd_and_stops_cleanly_on_sigterm(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(folder / "notify"))
        systemd.settimeout(10)
        run = Run(folder / "a", DEV, NOTIFY_SOCKET=str(folder / "notify"))
        assert run.get("/health") == (200, {"status": "ok", "version": "0.1.0"})
        assert systemd.recv(1000).startswith(b"READY=1")
        assert run.get("/ready")[0] == 200
        port = int(run.url().rpartition(":")[2])
        assert run.get("/v1/pools") == (200, [])
        assert b"http_requests_total" in run.get("/metrics")[1]
        assert run.end(signal.SIGTERM) == 0
        assert systemd.recv(1000) == b"STOPPING=1"
    actions = [line["action"] for line in run.lines()]
    assert actions[0] == "profile"
    assert "CPU" in run.lines()[0]["human"]
    assert actions[-2:] == ["signal", "stopped"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_a_second_signal_is_a_clean_end_too(folder: Path) -> None:
    run = Run(folder / "a", DEV)
    run.url()
    assert run.end(signal.SIGINT, signal.SIGTERM) == 0


def test_flags_and_the_metrics_address_are_used(folder: Path) -> None:
    run = Run(
        folder / "a",
        'profile: dev\ndaemon: {metrics_bind: "127.0.0.1:0"}\n',
        "--bind",
        "127.0.0.1:0",
        "--runtime-dir",
        "elsewhere",
    )
    try:
        assert run.get("/health")[0] == 200
        assert (folder / "a" / "elsewhere").is_dir()
        assert not run.url().endswith(":9200")
    finally:
        assert run.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("config", "env", "code", "text"),
    [
        ('daemon: {bind: "0.0.0.0:0"}\n', {}, 2, "without a token"),
        (DEV, {"AUTH_TOKEN": "a" * 40, "LLORCH_API_TOKEN": "b" * 40}, 2, "differ"),
        ("pools: [{id: '../x', engine: llamacpp, model: m}]\n", {}, 2, "pools[0].id"),
    ],
)
def test_it_refuses_to_start_with_the_reason(folder: Path, config: str, env: dict[str, str], code: int, text: str) -> None:
    run = Run(folder / "a", config, **env)
    assert run.end() == code
    assert text in run.log.read_text()
    if "without a token" in text:
        assert [line["action"] for line in run.lines()] == ["startup_bind_refused"]
    for secret in env.values():
        assert secret not in run.log.read_text()


def test_a_port_that_is_taken_is_a_clear_refusal_and_leaves_no_engine(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        run = Run(folder / "a", f'profile: dev\ndaemon: {{bind: "{address}"}}\n')
        assert run.end() == 1
    assert f"cannot listen on {address}: Address already in use" in run.log.read_text()
    assert "hint: another program has this port" in run.log.read_text()


def test_the_token_is_demanded_and_never_logged(folder: Path) -> None:
    secret = "canary" * 8
    run = Run(folder / "a", DEV, AUTH_TOKEN=secret)
    try:
        status, body = run.get("/v1/pools")
        assert (status, body["code"]) == (401, "MISSING_TOKEN")
        assert run.get("/health")[0] == 200
        assert secret.encode() not in Path(f"/proc/{run.process.pid}/cmdline").read_bytes()
    finally:
        run.end(signal.SIGTERM)
    assert secret not in run.log.read_text()
    assert [line for line in run.lines() if line["action"] == "auth_failed"]
