"""What must be so after every fault, whatever the fault was: one sentence for each thing that is not.

Each clause is a function of what it looks at, so that it can be shown to fail. ``watched.py`` applies them to a daemon.
"""

from __future__ import annotations

import math
import re
import shutil
import socket
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import descriptors
from tests.system.nodes import alive, mentioning

HEALTH_P99_S = 1.0
END_S = 30.0
"""How long after the end of the daemon something of it may still be there."""

SHARE = 1.05
SLACK = {"rss_bytes": 24 << 20, "fds": 6, "threads": 12}
"""What the daemon may hold beyond 5 % more than at its start: modules that are imported when first needed, connections that wait
for their next request, and the threads of asyncio's pool, which it keeps."""

ENGINES = (b"fake_engine", b"llama-server", b"hostile_engine")
_HOME = re.compile(rb"HOME=(/[^\0]*)/work/([^/\0]+)\0")


@dataclass
class Promise:
    """What was acknowledged of one pool; None is what nobody knows, as a request had no answer.

    ``leases``: the ids that were given without an end and not given back, and the launch that each is on.
    """

    exists: bool = True
    desired: str | None = None
    held: bool | None = None
    leases: dict[str, int] = field(default_factory=dict)


def promises_broken(
    promises: Mapping[str, Promise], statuses: Mapping[str, Mapping[str, Any]], leases: Mapping[str, Collection[str]]
) -> list[str]:
    """Acknowledged changes that the registry does not know. ``leases``: the ids of each pool that are active."""
    broken = []
    for pool_id, promise in promises.items():
        status = statuses.get(pool_id)
        if status is None or not promise.exists:
            if promise.exists is not (status is not None):
                broken.append(f"pool {pool_id} {'is gone' if promise.exists else 'is there, and was taken away'}")
            continue
        if promise.desired not in (None, status["desired"]):
            broken.append(f"pool {pool_id} was to be {promise.desired} and is {status['desired']}")
        if promise.held not in (None, status["held"]):
            broken.append(f"pool {pool_id}: held is {status['held']}, and was acknowledged as {promise.held}")
        same_launch = status["live"] and status["state"] in ("ready", "draining")
        for lease_id, epoch in promise.leases.items():
            if same_launch and epoch == status["epoch"] and lease_id not in leases.get(pool_id, ()):
                broken.append(f"lease {lease_id} of {pool_id} was acknowledged and is lost")
    return broken


def slots_broken(statuses: Mapping[str, Mapping[str, Any]], leases: Mapping[str, Collection[str]]) -> list[str]:
    """Leases below none, or beyond the slots."""
    counts = {pool_id: (status["active_leases"], status["slots_total"] or 0) for pool_id, status in statuses.items()}
    broken = [f"{count} leases on {slots} slots of {pool}" for pool, (count, slots) in counts.items() if not 0 <= count <= slots]
    return broken + [f"{len(ids)} leases are listed of {pool}" for pool, ids in leases.items() if len(ids) > counts[pool][1]]


def engines_of(folder: Path) -> list[tuple[str, int]]:
    """Live engines of the node in ``folder``: pool and pid, by what they run and the home that their pool has."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or not alive(int(entry.name)):
            continue
        try:
            line, environ = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes() + b"\0"
        except OSError:
            continue
        home = _HOME.search(environ)
        if home is not None and home[1].startswith(str(folder).encode()) and any(name in line for name in ENGINES):
            found.append((home[2].decode(), int(entry.name)))
    return found


def engines_broken(engines: Sequence[tuple[str, int]]) -> list[str]:
    """More than one engine for a pool."""
    return [
        f"{count} engines run for pool {pool}: {[pid for name, pid in engines if name == pool]}"
        for pool, count in Counter(name for name, _ in engines).items()
        if count > 1
    ]


def devices_broken(devices: Sequence[Mapping[str, Any]]) -> list[str]:
    """More reserved on a GPU than it has, or one pool on it twice, or an exclusive one beside others."""
    broken = []
    for device in devices:
        held = device["reservations"]
        if sum(row["reserved_bytes"] for row in held) > device["vram_total_bytes"]:
            broken.append(f"more is reserved on GPU {device['device']} than it has")
        pools = Counter(row["pool_id"] for row in held)
        broken += [f"pool {pool} has GPU {device['device']} {count} times" for pool, count in pools.items() if count > 1]
    return broken


def left_over(folder: Path, ports: Collection[int], patience_s: float = END_S) -> list[str]:
    """Processes, temporary files and ports that have no owner any more, once they had ``patience_s`` to go."""
    deadline = time.monotonic() + patience_s
    while (found := _left_over(folder, ports)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _left_over(folder: Path, ports: Collection[int]) -> list[str]:
    temporary = [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".removed")) or path.name.startswith("tmp.")]
    found = [f"a process is left: {process}" for process in mentioning(folder)]
    found += [f"a temporary file is left: {path.relative_to(folder)}" for path in temporary]
    found += [f"a pid file is left: {path.name}" for path in (folder / "run").glob("*.pid")]
    found += [f"a record is left: {path.name}" for path in (folder / "run").glob("shims/*.json")]
    return found + [f"port {port} is still taken" for port in ports if _taken(port)]


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def databases_broken(state: Path) -> list[str]:
    """Databases that do not open, or fail their quick check."""
    broken = []
    with tempfile.TemporaryDirectory() as elsewhere:  # the disk may be full or read-only
        for path in state.glob("*.db*"):
            if path.is_file() and not path.is_symlink():
                shutil.copy(path, elsewhere)
        for path in sorted(Path(elsewhere).glob("*.db")):
            try:
                with closing(sqlite3.connect(path, timeout=5)) as db:
                    told = db.execute("PRAGMA quick_check").fetchone()[0]
            except sqlite3.Error as problem:
                told = str(problem)
            if told != "ok":
                broken.append(f"{path.name} is damaged: {told}")
    return broken


def health_broken(samples: Sequence[float]) -> list[str]:
    """``samples``: how long each answer took in seconds; infinite for none."""
    if not samples:
        return []
    p99 = sorted(samples)[min(len(samples), math.ceil(len(samples) * 0.99)) - 1]
    return [f"/health took {p99:.2f} s at the 99th percentile of {len(samples)}"] if p99 >= HEALTH_P99_S else []


def secrets_broken(secrets: Collection[str], texts: Mapping[str, bytes]) -> list[str]:
    """Where a secret shows. ``texts`` by what they are of."""
    return [f"{place} shows a secret" for place, text in texts.items() if any(secret.encode() in text for secret in secrets)]


def resources_of(pid: int) -> dict[str, int]:
    """Memory, descriptors and threads of a process."""
    proc = Path(f"/proc/{pid}")
    rss = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("VmRSS:"))
    return {
        "rss_bytes": int(rss.split()[1]) * 1024,
        "fds": descriptors(pid),
        "threads": len(list((proc / "task").iterdir())),
    }


def growth_broken(before: Mapping[str, int], after: Mapping[str, int], slack: Mapping[str, int] = SLACK) -> list[str]:
    """What is more than 5 % and the slack beyond what it was."""
    return [
        f"{name} grew from {before[name]} to {after[name]}" for name in before if after[name] > before[name] * SHARE + slack[name]
    ]


def log_broken(log: str, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Nothing may fail in a way that nobody foresaw. ``lines``: those of ``log``."""
    broken = ["the log has a traceback"] if "Traceback" in log else []
    unforeseen = ("internal_error", "request_failed")
    return broken + [f"the log tells of {line['action']}: {line['human']}" for line in lines if line["action"] in unforeseen]
