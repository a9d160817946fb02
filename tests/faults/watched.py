"""A daemon that is watched while a fault befalls it, and judged by the oracle afterwards."""

from __future__ import annotations

import http.client
import json
import math
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.faults import oracle
from tests.faults.oracle import Promise
from tests.gpu.nodes import GpuNode
from tests.system.daemons import Answer, Daemon

_POOL = re.compile(r"/v1/pools/(?P<pool>[^/?]+)(?:/(?P<what>[a-z]+))?(?:/(?P<lease>[^/?]+))?(?:\?.*)?")
_LEADS_TO = {"stop": "stopped", "drain": "drained", "start": "wanted", "restart": "wanted", "undrain": "wanted"}
_READS = ("/v1/pools", "/v1/crashes", "/v1/operations", "/v1/events?follow=false&after=0", "/v1/snapshots", "/metrics")
_ASK_S = 0.05


class HealthWatch(threading.Thread):
    """Asks /health every 50 ms, and keeps how long each answer took: for ever, where none came."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._turn = 0  # odd while the daemon owes answers
        self._ending = threading.Event()
        self.samples: list[float] = []

    def expect(self, answers: bool) -> None:
        """Whether the daemon owes answers from now on."""
        if bool(self._turn % 2) is not answers:
            self._turn += 1

    def run(self) -> None:
        while not self._ending.wait(_ASK_S):
            turn, began = self._turn, time.monotonic()
            answered = turn % 2 == 1 and self._ask()
            if turn % 2 == 1 and self._turn == turn:
                self.samples.append(time.monotonic() - began if answered else math.inf)

    def end(self) -> None:
        self._ending.set()
        self.join(15)

    def _ask(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class Watched(Daemon):
    """Writes down what it acknowledges; ``judge`` says what the oracle finds broken. Its token is a canary.

    ``foreseen`` are sentences, or their beginnings, that a row means to bring about.
    """

    def __init__(self, *given: Any, **env: Any) -> None:
        self.secrets = [f"canary-{secrets.token_hex(24)}"]
        super().__init__(*given, **env)
        self.env.setdefault("AUTH_TOKEN", self.secrets[0])
        self.token = self.env["AUTH_TOKEN"]
        self.foreseen: list[str] = []
        self.promises: dict[str, Promise] = {}
        self.judged = False
        self._lock = threading.Lock()
        self._ports = {self.port}
        self._before: dict[str, int] | None = None
        self.watch = HealthWatch(self.port)
        self.watch.start()

    # --- the process ---

    def start(self, **how: Any) -> Watched:
        super().start(**how)
        leader = self.leader()
        self._before = None if leader is None else oracle.resources_of(leader)
        self.watch.expect(True)
        return self

    def kill(self) -> None:
        self.watch.expect(False)
        super().kill()

    def terminate(self, timeout_s: float = 30) -> int:
        self.watch.expect(False)
        return super().terminate(timeout_s)

    @contextmanager
    def victim(self) -> Iterator[None]:
        """Inside the block the daemon itself is the victim, and owes nobody an answer."""
        self.watch.expect(False)
        try:
            yield
        finally:
            self.watch.expect(True)

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def leader(self) -> int | None:
        """The daemon's own pid, whatever was wrapped around it; None where that is not known."""
        with suppress(OSError, ValueError):
            pid = int((self.state / "daemon.lock").read_text())
            if str(self.config).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    # --- what it acknowledges ---

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        found = None if method == "GET" else _POOL.fullmatch(path)
        try:
            answer = super().call(method, path, body, headers)
        except (OSError, http.client.HTTPException, ValueError):
            if found is not None:
                self._unsure(found["pool"], found["what"] or "", found["lease"] or "")
            raise
        if found is not None:
            self._learn(method, found["pool"], found["what"] or "", found["lease"] or "", body, answer)
        return answer

    def _unsure(self, pool_id: str, what: str, lease_id: str) -> None:
        with self._lock:
            promise = self.promises.get(pool_id, Promise())
            if not what:
                self.promises.pop(pool_id, None)
            elif what == "leases":
                promise.leases.pop(lease_id, None)
            else:
                promise.desired = promise.held = None

    def _learn(self, method: str, pool_id: str, what: str, lease_id: str, body: Any, answer: Answer) -> None:
        code, content = answer
        epoch = -1
        if code == 201 and what == "leases":
            told = super().call("GET", f"/v1/pools/{pool_id}/status")
            epoch = told[1]["epoch"] if told[0] == 200 else -1
        with self._lock:
            if code not in (200, 201, 202):
                if what in ("preload", *_LEADS_TO) and pool_id in self.promises:
                    self.promises[pool_id].desired = None
                return
            promise = self.promises.setdefault(pool_id, Promise())
            if not what:
                self.promises[pool_id] = Promise(exists=method == "POST")
            elif what == "leases" and method == "DELETE":
                promise.leases.pop(lease_id, None)
            elif what == "leases" and not lease_id and not (isinstance(body, dict) and body.get("ttl_ms")):
                promise.leases[content["lease_id"]] = epoch
            elif what == "preload":
                promise.exists = True
                promise.desired = "wanted" if code == 200 and method == "POST" else None
                if isinstance(body, dict) and isinstance(body.get("port"), int):
                    self._ports.add(body["port"])
            elif what in _LEADS_TO:
                promise.desired = _LEADS_TO[what]
            elif what in ("hold", "release"):
                promise.held = what == "hold"

    # --- the verdict ---

    def judge(self, patience_s: float = oracle.END_S) -> list[str]:
        """Hold everything against the oracle, stop everything, and look at what is left. Ends the daemon."""
        self.judged = True
        broken = self._judge_alive() if self.runs else []
        self.watch.end()
        if self.runs and (code := self.terminate(40)) != 0:
            broken.append(f"the daemon ended with {code}")
        broken += oracle.left_over(self.folder, self._ports, patience_s)
        broken += oracle.databases_broken(self.state)
        broken += oracle.health_broken(self.watch.samples)
        broken += oracle.secrets_broken(self.secrets, self._files())
        broken += oracle.log_broken(self.text(), self.lines())
        return [sentence for sentence in broken if not sentence.startswith(tuple(self.foreseen))]

    def _judge_alive(self) -> list[str]:
        statuses = {status["pool_id"]: status for status in super().call("GET", "/v1/pools")[1]}
        leases = {
            pool: [row["lease_id"] for row in super(Watched, self).call("GET", f"/v1/pools/{pool}/leases")[1]]
            for pool in statuses
        }
        broken = oracle.promises_broken(self.promises, statuses, leases)
        broken += oracle.slots_broken(statuses, leases)
        broken += oracle.engines_broken(oracle.engines_of(self.folder))
        broken += oracle.devices_broken(super().call("GET", "/v1/devices")[1]["devices"])
        broken += oracle.secrets_broken(self.secrets, self._told(list(statuses)))
        for pool in statuses:
            super().call("POST", f"/v1/pools/{pool}/stop?wait=true")
        return broken + self._growth()

    def _growth(self, patience_s: float = 10) -> list[str]:
        leader, deadline = self.leader(), time.monotonic() + patience_s
        if leader is None or self._before is None:
            return []
        while found := oracle.growth_broken(self._before, oracle.resources_of(leader)):
            if time.monotonic() > deadline:
                return found
            time.sleep(0.2)
        return []

    def _told(self, pools: list[str]) -> dict[str, bytes]:
        paths = [*_READS, *(f"/v1/pools/{pool}/{what}" for pool in pools for what in ("status", "command", "logs", "crashes"))]
        texts = {path: json.dumps(super(Watched, self).call("GET", path)[1]).encode() for path in paths}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    texts[f"the command line of pid {entry.name}"] = (entry / "cmdline").read_bytes()
        return texts

    def _files(self) -> dict[str, bytes]:
        files = [self.log, *(path for path in self.run.rglob("*") if path.is_file() and not path.is_symlink())]
        return {str(path): path.read_bytes() for path in files if path.is_file() and path.stat().st_size < 64 << 20}


class WatchedGpuNode(Watched, GpuNode):
    """The same on simulated GPUs."""

    def start(self, **how: Any) -> WatchedGpuNode:
        super().start(**how)
        return self


def speak(daemon: Daemon, data: bytes, timeout_s: float = 10) -> bytes:
    """What the daemon says to these bytes, until it closes. Half a request is answered when its time is over."""
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=timeout_s) as client:
        said = b""
        with suppress(OSError):
            client.sendall(data)
            while more := client.recv(65536):
                said += more
        return said
