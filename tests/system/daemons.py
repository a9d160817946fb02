"""A real daemon as a subprocess, spoken to over HTTP like a stranger would."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.conftest import FAKE_ENGINE, REPOSITORY, free_port, wait_until
from tests.system.nodes import mentioning

FAST = """
health: {startup_timeout_ms: 15000, interval_ms: 50, probe_interval_ms: 200, probe_timeout_ms: 500}
supervision: {stop_grace_ms: 1000, backoff: {initial_ms: 50, max_ms: 1000, min_delay_ms: 0, jitter: 0}}
lifecycle: {drain_deadline_ms: 3000}
"""
_OURS = ("POOL_MANAGERD", "AUTH_", "LLORCH", "NOTIFY", "WATCHDOG")
Answer = tuple[int, Any]


class Daemon:
    """One directory and the daemons that run in it, one after the other."""

    def __init__(self, folder: Path, extra: str = "", profile: str = "dev", *, bind: str = "127.0.0.1", **env: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.run, self.state = folder, folder / "run", folder / "state"
        self.port = free_port()
        self.token: str | None = None
        self.env = env
        self.log = folder / "stderr"
        self.config = folder / "pm.yaml"
        places = f"runtime_dir: {self.run}, state_dir: {self.state}"
        self.config.write_text(f'profile: {profile}\ndaemon: {{bind: "{bind}:{self.port}", {places}}}\n{FAST}{extra}')
        self.process: subprocess.Popen[bytes] | None = None

    # --- the process ---

    def launch(self, *, wrap: tuple[str, ...] = (), more: tuple[str, ...] = (), **how: Any) -> subprocess.Popen[bytes]:
        """Start without waiting for anything; ``more`` are words for ``serve``."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        argv = [*wrap, sys.executable, "-m", "pool_managerd.cli", "serve", "--config", str(self.config), *more]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**kept, "PYTHONPATH": str(REPOSITORY / "src"), **self.env}, **how,
            )  # fmt: skip
        return self.process

    def start(self, **how: Any) -> Daemon:
        """Start, and return once it answers."""
        process = self.launch(**how)

        def answers() -> bool:
            assert process.poll() is None, f"the daemon ended with {process.returncode}: {self.text()}"
            try:
                return self.get("/health")[0] == 200
            except OSError:
                return False

        wait_until(answers, "the daemon to answer", 20)
        return self

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def terminate(self, timeout_s: float = 20) -> int:
        """SIGTERM, and its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """At the end of a test: gently, then not, then whatever engine has its place in this directory."""
        if self.process is not None and self.process.poll() is None:
            try:
                self.terminate(10)
            except subprocess.TimeoutExpired:
                self.kill()
        wait_until(self._nothing_left, "what it has left to end", 10)

    def _nothing_left(self) -> bool:
        """Engines outlive a daemon that was killed, and so does its gateway; their shims end with them."""
        left = [int(found.split()[0]) for found in (*mentioning(self.run), *mentioning(self.config))]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    # --- HTTP ---

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """Status and decoded body."""
        given = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        raw = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        if raw is not None:
            given["Content-Type"] = "application/json"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        try:
            connection.request(method, path, raw, {**given, **(headers or {})})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.call("GET", path)

    def post(self, path: str, body: Any = None) -> Answer:
        return self.call("POST", path, body)

    def delete(self, path: str) -> Answer:
        return self.call("DELETE", path)

    def status(self, pool: str = "p") -> dict[str, Any]:
        code, found = self.get(f"/v1/pools/{pool}/status")
        assert code == 200, found
        return dict(found)

    def until(self, condition: Callable[[dict[str, Any]], bool], what: str, pool: str = "p", timeout_s: float = 30) -> None:
        wait_until(lambda: condition(self.status(pool)), what, timeout_s)

    def preload(self, pool: str = "p", *flags: str, **fields: Any) -> dict[str, Any]:
        """Bring the scripted engine up; what the preload answers."""
        code, answer = self.post(f"/v1/pools/{pool}/preload", engine(*flags, **fields))
        assert code == 200, answer
        return dict(answer)

    # --- what it wrote ---

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self, action: str | None = None) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]
        return [line for line in found if action is None or line["action"] == action]


def engine(*flags: str, port: int | None = None, **fields: Any) -> dict[str, Any]:
    """The scripted engine as a PreparedEngine's JSON."""
    port = port or free_port()
    return {"binary_path": sys.executable, "flags": ["-I", str(FAKE_ENGINE), "--port", str(port), *flags], "port": port, **fields}


def in_time(seconds: float, call: Callable[[], Any]) -> Any:
    """What ``call`` gives; it must not take longer than ``seconds``."""
    started = time.monotonic()
    result = call()
    took = time.monotonic() - started
    assert took < seconds, f"took {took:.2f} s, more than {seconds} s"
    return result
