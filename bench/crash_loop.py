"""A hundred engines that come up and crash a second later, all at once, with the default backoff and breaker: what that costs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from bench.daemon import Daemon, daemon
from bench.fleet import COUNT, Settings
from bench.processes import cpu_seconds, cpu_seconds_with_children, tree
from bench.result import Row
from bench.stub import free_ports

GOAL_PERCENT = 10.0
_LIVES_MS = 1000


def measure(settings: Settings) -> Iterator[Row]:
    seconds = 15.0 if settings.quick else 60.0
    engine = [str(settings.engine()), "--end-after-ms", str(_LIVES_MS)]
    with daemon(settings.directory / "crashes") as running:
        for number, port in enumerate(free_ports(COUNT)):
            running.submit(f"loop-{number:03}", [*engine, "--port", str(port)], port)
        yield _row(running, seconds, "in their first minute, until the breakers open", None)
        yield _row(running, seconds, "with their breakers open, or half open for one try", GOAL_PERCENT)


def _row(node: Daemon, seconds: float, when: str, goal: float | None) -> Row:
    before, crashed, began = _spent(node.pid), _crashes(node), time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    spent, crashes = _spent(node.pid) - before, _crashes(node) - crashed
    share = spent / took * 100
    return Row(
        f"CPU of {COUNT} pools that crash again and again, {when}", "% of a core", share,
        goal="" if goal is None else f"≤ {goal:g} %", reached=None if goal is None else share <= goal,
        note=f"over {took:.0f} s; {crashes} crashes, {spent / max(1, crashes) * 1000:.1f} ms each",
    )  # fmt: skip


def _crashes(node: Daemon) -> int:
    return sum(int(row["crash_count"]) for row in node.states().values())


def _spent(root: int) -> float:
    """By the daemon, its fork server, and all shims and engines, ended or not."""
    mine, *others = tree(root)
    (fork_server,) = (pid for pid in others if _name(pid) == "pm-forkserver")
    return cpu_seconds([mine]) + cpu_seconds_with_children(fork_server) + cpu_seconds(tree(fork_server)[1:])


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
