"""A node under mixed traffic and faults for long: what it holds at the end against what it held at the start.

``python -m tests.faults.soak --minutes 30 --seed 1``. Clients lease, preload, stop, drain and crash engines; one engine hangs now
and then, one writes 100 MB of log each second, the configuration is read again, connections are left half open. Before the first
figure is taken everything has run once, so that what is only imported or made once does not count. The last one is taken when all
is down again. Between them nothing may have grown: memory, descriptors, threads, the files of state, journal and logs, and what
the directory of the node holds.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import oracle
from tests.faults.watched import Watched
from tests.system.daemons import engine
from tests.system.nodes import mentioning

CLIENTS = 3
SLOTS = 4
SLACK = {
    "rss_bytes": 16 << 20, "fds": 6, "threads": 4, "files": 20, "processes": 0,
}  # fmt: skip
"""What may be more than at the start, beside 5 %. Write-ahead logs, the journal and the logs of engines have bounds instead."""

MOST = {"state_bytes": 16 << 20, "journal_bytes": 64 << 20, "one_log_bytes": 64 << 20}
_GONE = (OSError, http.client.HTTPException, ValueError)


@dataclass
class Report:
    """What a soak has seen."""

    requests: int = 0
    failed: list[str] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"  {name}: {self.before[name]} -> {self.after.get(name, 0)}" for name in self.before]
        return "\n".join(
            [f"{self.requests} requests", *rows, f"broken: {len(self.broken)}", *(f"  {one}" for one in self.broken)]
        )


def figures(daemon: Watched) -> dict[str, int]:
    """What the daemon and its directory hold now."""
    leader = daemon.leader()
    if leader is None:
        raise RuntimeError("the daemon is gone")
    sizes = {path: path.stat().st_size for path in daemon.folder.rglob("*") if path.is_file() and path != daemon.log}
    logs = [size for path, size in sizes.items() if ".log" in path.name]
    return {
        **oracle.resources_of(leader),
        "state_bytes": sum(size for path, size in sizes.items() if path.name.startswith(("state", "leases"))),
        "journal_bytes": sum(size for path, size in sizes.items() if path.name.startswith("journal")),
        "one_log_bytes": max(logs, default=0),
        "files": len(sizes),
        "processes": len(mentioning(daemon.folder)),
    }


class Soak:
    """One node, its pools and those who trouble it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.daemon = Watched(folder)
        self.report = Report()
        self._chance = random.Random(seed)
        self._ending = threading.Event()
        low = 20_000 + self._chance.randrange(10_000)
        self._bodies: dict[str, dict[str, Any]] = {
            f"p{n}": engine("--fork-grandchildren", str(n % 2), "--setsid", port=low + n, slots_total=SLOTS) for n in range(6)
        }
        self._bodies["storm"] = engine("--spam-mb-s", "100", port=low + 20, slots_total=SLOTS)
        self._bodies["dies"] = engine("--exit-after", "1.5", port=low + 21, slots_total=SLOTS)

    def run(self, seconds: float) -> Report:
        """Warm up, measure, trouble it for ``seconds``, calm down, measure."""
        self.daemon.foreseen += ["/health took"] if seconds < 5 else []
        self.daemon.start()
        try:
            self._trouble(min(30.0, max(5.0, seconds / 4)))
            self.report.before = self._calm()
            self._trouble(seconds)
            self.report.after = self._calm()
            before, after = ({name: held[name] for name in SLACK} for held in (self.report.before, self.report.after))
            self.report.broken += oracle.growth_broken(before, after, SLACK)
            self.report.broken += [
                f"{name} is {self.report.after[name]}" for name, most in MOST.items() if self.report.after[name] > most
            ]
            self.report.broken += [f"a request failed: {one}" for one in self.report.failed[:10]]
            self.report.broken += self.daemon.judge()
        finally:
            self.daemon.watch.end()
            self.daemon.end()
        return self.report

    def _trouble(self, seconds: float) -> None:
        self._ending.clear()
        work: list[Callable[[random.Random], None]] = [*[self._client] * CLIENTS, self._saboteur]
        threads = [threading.Thread(target=self._turn, args=(one, self._chance.random()), daemon=True) for one in work]
        for thread in threads:
            thread.start()
        self._ending.wait(seconds)
        self._ending.set()
        for thread in threads:
            thread.join(60)

    def _turn(self, work: Callable[[random.Random], None], seed: float) -> None:
        chance = random.Random(seed)
        while not self._ending.is_set():
            work(chance)

    def _ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        self.report.requests += 1
        try:
            code, answer = self.daemon.call(method, path, body)
        except _GONE as problem:
            self.report.failed.append(f"{method} {path}: {problem!r}")
            self._ending.wait(0.2)
            return 0, None
        expected = ("PRELOAD_FAILED", "POOL_UNREADY", "NODE_UNAVAILABLE", "CIRCUIT_OPEN")
        if code >= 500 and not (isinstance(answer, dict) and answer.get("code") in expected):
            self.report.failed.append(f"{method} {path}: {code} {answer}")
        return code, answer

    def _client(self, chance: random.Random) -> None:
        pool = chance.choice(list(self._bodies))
        path = f"/v1/pools/{pool}"
        what = chance.choice(["lease"] * 8 + ["read"] * 4 + ["preload"] * 3 + ["stop", "drain", "restart", "undrain", "reset"])
        if what == "lease":
            code, answer = self._ask("POST", f"{path}/leases", {"holder": "soak", "ttl_ms": 20_000})
            self._ending.wait(chance.uniform(0, 0.05))
            if code == 201 and chance.random() < 0.9:
                self._ask("DELETE", f"{path}/leases/{answer['lease_id']}")
        elif what == "read":
            self._ask(
                "GET", chance.choice([f"{path}/status", "/v1/pools", "/metrics", "/v1/snapshots", f"{path}/logs", "/v1/crashes"])
            )
        elif what == "preload":
            self._ask("POST", f"{path}/preload?wait={chance.choice(['true', 'false'])}", self._bodies[pool])
        elif what == "drain":
            self._ask("POST", f"{path}/drain", {"deadline_ms": chance.choice([0, 200, 2000])})
        elif what == "reset":
            self._ask("POST", f"{path}/circuit/reset")
        else:
            self._ask("POST", f"{path}/{what}?wait={chance.choice(['true', 'false'])}")
        self._ending.wait(chance.uniform(0, 0.03))

    def _saboteur(self, chance: random.Random) -> None:
        engines = oracle.engines_of(self.daemon.folder)
        what = chance.choice(["crash"] * 4 + ["hang", "half", "reread", "flood"])
        if what == "crash" and engines:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(engines)[1], chance.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]))
        elif what == "hang" and engines:
            pid = chance.choice(engines)[1]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self._ending.wait(3)
                os.kill(pid, signal.SIGCONT)
        elif what == "half":
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.daemon.port), timeout=2) as client:
                client.sendall(b"GET /v1/pools HTTP/1.1\r\nHost: 127")
        elif what == "reread" and (leader := self.daemon.leader()) is not None:
            os.kill(leader, signal.SIGHUP)
        elif what == "flood":
            with contextlib.suppress(*_GONE):
                self.daemon.call("POST", "/v1/pools/p0/leases", b"[" * 100_000)
        self._ending.wait(chance.uniform(0.1, 1.0))

    def _calm(self) -> dict[str, int]:
        """Everything down; the figures, once they are as low as they get in some seconds."""
        for pool in self._bodies:
            with contextlib.suppress(*_GONE):
                self.daemon.call("POST", f"/v1/pools/{pool}/stop?wait=true")
        best = figures(self.daemon)
        for _ in range(25):
            time.sleep(0.2)
            best = {name: min(value, best[name]) for name, value in figures(self.daemon).items()}
        return best


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    asked.add_argument("--minutes", type=float, default=30)
    asked.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    given = asked.parse_args()
    sys.stdout.write(f"seed {given.seed}\n")
    with tempfile.TemporaryDirectory(prefix="pool-managerd-soak-") as temporary:
        Path(temporary).chmod(0o755)
        report = Soak(Path(temporary) / "d", given.seed).run(given.minutes * 60)
    sys.stdout.write(f"{report}\n")
    return bool(report.broken)


if __name__ == "__main__":
    sys.exit(main())
