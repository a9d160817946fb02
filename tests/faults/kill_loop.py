"""The daemon is killed again and again under traffic; afterwards its journal of promises is held against what is so.

``python -m tests.faults.kill_loop --kills 500 --seed 1`` prints what it saw. Clients lease, release, preload, stop, drain, hold
and crash engines of pools of their own, and write down each answer. The daemon gets SIGKILL at random instants, those of its
start included, and is started again. What was acknowledged must be so ever after; what was asked for without an answer may be
so or not. Nothing may run twice, and in the end nothing may be left.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.system.daemons import Answer, Daemon, engine
from tests.system.nodes import alive, mentioning

CLIENTS = 3
POOLS_EACH = 2
SLOTS = 4
_GONE = (OSError, http.client.HTTPException, ValueError)


@dataclass
class Promise:
    """What one pool was promised. ``leases``: ids that were given and not given back, by the epoch that they were given on.

    ``desired`` is what was acknowledged last, None while the last request had no answer. ``refused_twice`` counts ids that came
    back with another request's key, which must not be.
    """

    pool_id: str
    port: int
    desired: str | None = "none"
    held: bool | None = False
    leases: dict[str, int] = field(default_factory=dict)
    maybe_released: set[str] = field(default_factory=set)
    seen_leases: set[str] = field(default_factory=set)
    crashes_seen: int = 0


@dataclass
class Report:
    """What a run has seen. ``broken`` are the promises that were not kept, a sentence each."""

    kills: int = 0
    acknowledged: int = 0
    unanswered: int = 0
    adoptions: int = 0
    slowest_start_s: float = 0.0
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.acknowledged} acknowledged changes, {self.unanswered} without an answer,"
            f" {self.adoptions} engines adopted, slowest start {self.slowest_start_s:.2f} s; broken promises: {len(self.broken)}"
        )


class Client(threading.Thread):
    """Works on pools of its own, so that it knows the order of what it asked for."""

    def __init__(self, daemon: Daemon, promises: list[Promise], seed: int, report: Report) -> None:
        super().__init__(daemon=True)
        self._daemon, self._promises, self._report = daemon, promises, report
        self._random = random.Random(seed)
        self._keys = 0
        self.ending = threading.Event()
        self.pause = threading.Lock()
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.ending.is_set():
                with self.pause:
                    self._one(self._random.choice(self._promises))
                self.ending.wait(self._random.uniform(0, 0.02))
        except BaseException as problem:  # noqa: BLE001 - the run ends with it
            self.problem = problem

    def _one(self, pool: Promise) -> None:
        actions = [self._lease] * 6 + [self._release] * 5 + [self._preload] * 3
        self._random.choice([*actions, self._stop_pool, self._drain, self._hold, self._crash])(pool)

    def _ask(self, method: str, path: str, body: Any = None) -> Answer | None:
        """None without an answer."""
        try:
            answer = self._daemon.call(method, path, body)
        except _GONE:
            self._report.unanswered += 1
            self.ending.wait(0.02)
            return None
        if answer[0] >= 500 and answer[1].get("code") not in (
            "PRELOAD_FAILED",
            "POOL_UNREADY",
            "NODE_UNAVAILABLE",
            "CIRCUIT_OPEN",
        ):
            self._report.broken.append(f"{method} {path} was answered {answer}")
        self._report.acknowledged += answer[0] in (200, 201, 202)
        return answer

    def _lease(self, pool: Promise) -> None:
        self._keys += 1
        body = {"idempotency_key": f"{self._keys}-{pool.pool_id}", "holder": "kill loop"}
        for _ in range(2):  # the same request again is the same lease
            answer = self._ask("POST", f"/v1/pools/{pool.pool_id}/leases", body)
            if answer is not None and answer[0] == 201:
                lease_id = answer[1]["lease_id"]
                if lease_id in pool.seen_leases and lease_id not in pool.leases:
                    self._report.broken.append(f"lease id {lease_id} was given again")
                status = self._ask("GET", f"/v1/pools/{pool.pool_id}/status")
                if answer[1]["active_leases"] > SLOTS:
                    self._report.broken.append(f"{answer[1]['active_leases']} leases on {SLOTS} slots of {pool.pool_id}")
                pool.seen_leases.add(lease_id)
                # Of an epoch that is not known (no answer) nothing can be said later: it is given back like any other.
                pool.leases[lease_id] = status[1]["epoch"] if status is not None and status[0] == 200 else -1
            if answer is not None:
                return

    def _release(self, pool: Promise) -> None:
        if not pool.leases:
            return
        lease_id = self._random.choice(sorted(pool.leases))
        answer = self._ask("DELETE", f"/v1/pools/{pool.pool_id}/leases/{lease_id}")
        if answer is None:
            pool.maybe_released.add(lease_id)
            return
        if answer[0] != 200:
            self._report.broken.append(f"lease {lease_id} of {pool.pool_id} was given and then not known: {answer}")
        pool.leases.pop(lease_id)

    def _preload(self, pool: Promise) -> None:
        if pool.desired == "up":
            return
        wait = self._random.choice(["true", "false"])
        pool.desired = None
        flags = self._random.choice([(), ("--ready-after", "0.2"), ("--fork-grandchildren", "1", "--setsid")])
        body = engine(*flags, port=pool.port, slots_total=SLOTS)
        answer = self._ask("POST", f"/v1/pools/{pool.pool_id}/preload?wait={wait}", body)
        if answer is not None and answer[0] in (200, 202):
            pool.desired = "up"

    def _stop_pool(self, pool: Promise) -> None:
        pool.desired = None
        answer = self._ask("POST", f"/v1/pools/{pool.pool_id}/stop")
        if answer is not None and answer[0] in (200, 202):
            pool.desired = "stopped"

    def _drain(self, pool: Promise) -> None:
        pool.desired = None
        answer = self._ask("POST", f"/v1/pools/{pool.pool_id}/drain", {"deadline_ms": self._random.choice([0, 100, 1000])})
        if answer is not None and answer[0] in (200, 202):
            pool.desired = "drained"

    def _hold(self, pool: Promise) -> None:
        if pool.held:
            pool.held = None
            answer = self._ask("POST", f"/v1/pools/{pool.pool_id}/release")
            pool.held = False if answer is not None and answer[0] in (200, 202) else None
            return
        pool.held = None
        answer = self._ask("POST", f"/v1/pools/{pool.pool_id}/hold")
        if answer is not None:
            pool.held = True if answer[0] in (200, 202) else False if answer[0] == 404 else None

    def _crash(self, pool: Promise) -> None:
        status = self._ask("GET", f"/v1/pools/{pool.pool_id}/status")
        if status is None or status[0] != 200 or not status[1]["pid"]:
            return
        pid = status[1]["pid"]
        if str(pool.port).encode() in _command_line(pid):  # an engine of ours, by its own command line
            number = self._random.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
            os.kill(pid, number)
            # A preload that fails is not tried again, an engine that ends with code 0 has done its work, and the next daemon
            # knows both.
            if number == signal.SIGTERM or not status[1]["ready"]:
                pool.desired = None


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def engines_on(port: int) -> list[int]:
    """Live engine processes that were started for this port; grandchildren, which have another command line, left out."""
    wanted = f"--port\0{port}\0".encode()
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if wanted in _command_line(pid) and b"fake_engine" in _command_line(pid) and alive(pid)]


def check(daemon: Daemon, promises: list[Promise], report: Report) -> None:
    """Hold every promise against what the daemon says now, while no client asks for anything."""
    for pool in promises:
        owners = engines_on(pool.port)
        if len(owners) > 1:
            report.broken.append(f"{len(owners)} engines for pool {pool.pool_id}: {owners}")
        code, status = daemon.get(f"/v1/pools/{pool.pool_id}/status")
        if code == 404:
            if pool.desired not in ("none", None):
                report.broken.append(f"pool {pool.pool_id} is gone, and was to be {pool.desired}")
            continue
        wanted = {"up": ("wanted",), "stopped": ("stopped",), "drained": ("drained",)}.get(pool.desired or "")
        if wanted is not None and status["desired"] not in wanted:
            report.broken.append(f"pool {pool.pool_id} was to be {pool.desired} and is {status['desired']}")
        if pool.held is not None and status["held"] is not pool.held:
            report.broken.append(f"pool {pool.pool_id} was {'' if pool.held else 'not '}held and is otherwise")
        if status["crash_count"] < pool.crashes_seen:
            report.broken.append(f"pool {pool.pool_id} has forgotten crashes: {status['crash_count']} < {pool.crashes_seen}")
        pool.crashes_seen = status["crash_count"]
        _check_leases(daemon, pool, report)


def _check_leases(daemon: Daemon, pool: Promise, report: Report) -> None:
    before = daemon.status(pool.pool_id)["epoch"]
    active = {row["lease_id"] for row in daemon.get(f"/v1/pools/{pool.pool_id}/leases")[1]}
    status = daemon.status(pool.pool_id)
    if len(active) > SLOTS:
        report.broken.append(f"{len(active)} leases on {SLOTS} slots of {pool.pool_id}")
    stays = status["live"] and status["epoch"] == before and status["state"] in ("ready", "draining", "starting")
    for lease_id, epoch in list(pool.leases.items()):
        if lease_id in pool.maybe_released or not stays or epoch != before:
            if lease_id not in active:  # given back after all, or ended with its launch
                pool.leases.pop(lease_id)
                pool.maybe_released.discard(lease_id)
            continue
        if lease_id not in active:
            report.broken.append(f"lease {lease_id} of {pool.pool_id} (launch {epoch}) was acknowledged and is lost")
            pool.leases.pop(lease_id)


def run(folder: Path, kills: int, seed: int) -> Report:
    """Kill the daemon ``kills`` times."""
    chance, report = random.Random(seed), Report()
    there_before = set(mentioning(folder))
    daemon = Daemon(folder, profile="dev")
    low = 20_000 + chance.randrange(10_000)
    all_promises = [Promise(f"p{n}", low + n) for n in range(CLIENTS * POOLS_EACH)]
    shares = [all_promises[n * POOLS_EACH : (n + 1) * POOLS_EACH] for n in range(CLIENTS)]
    daemon.start()
    clients = [Client(daemon, share, seed * 1000 + n, report) for n, share in enumerate(shares)]
    for client in clients:
        client.start()
    try:
        while report.kills < kills and not any(client.problem for client in clients):
            _kill_and_start(daemon, chance, report)
            for client in clients:
                client.pause.acquire()
            try:
                check(daemon, all_promises, report)
            finally:
                for client in clients:
                    client.pause.release()
    finally:
        for client in clients:
            client.ending.set()
            client.join(30)
    report.broken += [f"a client failed: {client.problem!r}" for client in clients if client.problem is not None]
    report.adoptions = len(daemon.lines("adopt"))
    _end(daemon, all_promises, report, there_before)
    return report


def _kill_and_start(daemon: Daemon, chance: random.Random, report: Report) -> None:
    time.sleep(chance.uniform(0, 1.2))  # how long it lives is drawn: nothing is waited for
    daemon.kill()
    report.kills += 1
    while chance.random() < 0.25:  # in the middle of its start, too
        process = daemon.launch()
        time.sleep(chance.uniform(0.05, 0.5))
        process.kill()
        process.wait(10)
        report.kills += 1
    began = time.monotonic()
    daemon.start()
    report.slowest_start_s = max(report.slowest_start_s, time.monotonic() - began)


def _end(daemon: Daemon, promises: list[Promise], report: Report, there_before: set[str]) -> None:
    """Stop everything; nothing may be left of it."""
    if daemon.terminate(60) != 0:
        report.broken.append("the last daemon did not end cleanly")
    for pool in promises:
        if engines_on(pool.port):
            report.broken.append(f"engines of {pool.pool_id} are left: {engines_on(pool.port)}")
    deadline = time.monotonic() + 30
    while (left := set(mentioning(daemon.folder)) - there_before) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        report.broken.append(f"processes are left: {sorted(left)}")
    for name in ("state.db", "leases.db", "journal.db"):
        with closing(sqlite3.connect(daemon.state / name)) as db:
            if db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                report.broken.append(f"{name} is damaged")
    for action in ("internal_error", "state_degraded", "state_renewed"):
        report.broken += [f"{action}: {line['human']}" for line in daemon.lines(action)]
    if "Traceback" in daemon.text():
        report.broken.append("the log has a traceback")


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    asked.add_argument("--kills", type=int, default=500)
    asked.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    asked.add_argument("--folder", type=Path, default=None, help="kept afterwards; a temporary one otherwise")
    given = asked.parse_args()
    write = sys.stdout.write
    write(f"seed {given.seed}\n")
    with tempfile.TemporaryDirectory(prefix="pool-managerd-kill-") as temporary:
        Path(temporary).chmod(0o755)
        report = run(given.folder or Path(temporary) / "d", given.kills, given.seed)
    write("\n  ".join([str(report), *report.broken]) + "\n")
    return bool(report.broken)


if __name__ == "__main__":
    sys.exit(main())
