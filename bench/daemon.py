"""The daemon under measurement: its own process, driven over its API."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.processes import running, wait_until
from bench.stub import free_ports


class Daemon:
    """A running daemon in ``directory``."""

    def __init__(self, directory: Path, port: int, pid: int) -> None:
        self.directory = directory
        self.port = port
        self.pid = pid

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 120.0) -> Any:
        """The JSON answer. Raises RuntimeError for a status of 400 or more."""
        status, answer = request(self.port, method, path, body, timeout_s)
        if status >= 400:
            raise RuntimeError(f"{method} {path} answered {status}: {answer}")
        return answer

    def submit(self, pool_id: str, argv: Sequence[str], port: int, slots: int = 1) -> None:
        """Start ``argv`` as an engine that was prepared elsewhere."""
        body = {"binary_path": argv[0], "flags": list(argv[1:]), "port": port, "slots_total": slots}
        self.call("POST", f"/v1/pools/{pool_id}/preload?wait=false", body)

    def states(self) -> dict[str, dict[str, Any]]:
        answer = self.call("GET", "/v1/pools")
        rows = answer if isinstance(answer, list) else next(v for v in answer.values() if isinstance(v, list))
        return {row["pool_id"]: row for row in rows}

    def wait_ready(self, pool_ids: Sequence[str], timeout_s: float = 120.0) -> None:
        def all_ready() -> bool:
            states = self.states()
            return all(states.get(pool_id, {}).get("ready") for pool_id in pool_ids)

        wait_until(all_ready, f"{len(pool_ids)} pools to be ready", timeout_s, every_s=0.2)


def request(port: int, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 5.0) -> tuple[int, Any]:
    """Status and JSON of one request. Raises OSError when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        raw = answer.read()
        return answer.status, json.loads(raw) if raw else None
    finally:
        connection.close()


def answers(port: int, path: str = "/health") -> bool:
    """True when ``path`` answers now, and well."""
    try:
        return request(port, "GET", path)[0] < 300
    except (OSError, http.client.HTTPException, ValueError):
        return False


def write_config(directory: Path, port: int, pools: Sequence[Mapping[str, Any]] = (), **sections: Any) -> Path:
    """A configuration file for profile dev with everything in ``directory``; JSON is YAML, too."""
    sections = {"lifecycle": {"drain_deadline_ms": 500}, **sections}  # leases of a client that left are not waited for
    daemon = {"bind": f"127.0.0.1:{port}", "runtime_dir": str(directory / "run"), "state_dir": str(directory / "state")}
    path = directory / "pool-managerd.yaml"
    path.write_text(json.dumps({"profile": "dev", "daemon": daemon, "pools": list(pools), **sections}))
    return path


def serve_argv(config: Path) -> list[str]:
    return [sys.executable, "-m", "pool_managerd.cli", "serve", "--config", str(config)]


@contextlib.contextmanager
def daemon(directory: Path, pools: Sequence[Mapping[str, Any]] = (), **sections: Any) -> Iterator[Daemon]:
    """A daemon that answers, until the block ends; then it stops its engines and itself."""
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    (port,) = free_ports(1, 19_200)
    config = write_config(directory, port, pools, **sections)
    with running(serve_argv(config), directory / "daemon.log", cwd=directory) as child:
        wait_until(lambda: child.poll() is not None or answers(port), "the daemon to answer", 30.0)
        if child.poll() is not None:
            raise RuntimeError(f"the daemon ended with {child.returncode}: {(directory / 'daemon.log').read_text()[-2000:]}")
        yield Daemon(directory, port, child.pid)


class ReadyWatch:
    """Notes when each pool turns ready, from the event stream; for the time of the block."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._changed = threading.Condition()
        self._seen: dict[str, int] = {}
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> ReadyWatch:
        self._connection.request("GET", "/v1/events?follow=true")
        self._stream = self._connection.getresponse()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection.sock is not None:
            self._connection.sock.shutdown(2)
        self._thread.join(5)
        self._connection.close()

    def clear(self) -> None:
        with self._changed:
            self._seen.clear()

    def wait_for(self, pool_ids: Sequence[str], timeout_s: float = 60.0) -> dict[str, int]:
        """When each turned ready (CLOCK_MONOTONIC, ns). Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not all(pool_id in self._seen for pool_id in pool_ids):
                if not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"pools were not ready again within {timeout_s:g} s")
            return dict(self._seen)

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError, http.client.HTTPException):
            while line := self._stream.readline():
                at = time.monotonic_ns()
                if line.startswith(b"data:") and b'"to_state":"ready"' in line:
                    with self._changed:
                        self._seen.setdefault(json.loads(line[5:])["pool_id"], at)
                        self._changed.notify_all()
