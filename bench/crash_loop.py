"""A hundred engines that come up and crash a second later, all at once, with the default backoff and breaker: what that costs."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.fleet import COUNT, Settings, our_fleet
from bench.processes import cpu_seconds, cpu_seconds_with_children, tree
from bench.result import Row
from bench.stub import free_ports

GOAL_PERCENT = 10.0
_LIVES_MS = 1000
_DEFAULTS = {"backoff": {}, "breaker": {}, "restart_limit": {}}


def measure(settings: Settings) -> Iterator[Row]:
    seconds = 20.0 if settings.quick else 90.0
    engine = [str(settings.engine()), "--end-after-ms", str(_LIVES_MS)]
    names = [f"loop-{number:03}" for number in range(COUNT)]
    programs = [[*engine, "--port", str(port)] for port in free_ports(COUNT)]
    with our_fleet(settings.directory / "crashes", names, programs, await_ready=False, supervision=_DEFAULTS) as daemon:
        before, began = _spent(daemon.pid), time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - began
        share = (_spent(daemon.pid) - before) / took * 100
        crashes = sum(row["crash_count"] for row in daemon.states().values())
    yield Row(
        f"CPU of {COUNT} pools in a crash loop, default backoff and breaker", "% of a core", share, goal=f"≤ {GOAL_PERCENT:g} %",
        reached=share <= GOAL_PERCENT,
        note=f"over {took:.0f} s from the first launches on; {crashes} crashes, {share / 100 * took / max(1, crashes) * 1000:.1f} ms each",
    )  # fmt: skip


def _spent(daemon: int) -> float:
    """By the daemon, its fork server, and all shims and engines, ended or not."""
    mine, *others = tree(daemon)
    (fork_server,) = (pid for pid in others if _name(pid) == "pm-forkserver")
    return cpu_seconds([mine]) + cpu_seconds_with_children(fork_server) + cpu_seconds(tree(fork_server)[1:])


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""
