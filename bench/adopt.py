"""A hundred engines, a daemon that is killed, and the next one: how long until it has all of them ready again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from bench.daemon import Daemon, answers, serve_argv
from bench.fleet import AT_ONCE, COUNT, Settings, our_fleet
from bench.processes import running, wait_until
from bench.result import Row, quantile
from bench.stub import free_ports

GOAL_S = 2.0


def measure(settings: Settings) -> Iterator[Row]:
    engine = settings.engine()
    names = [f"pool-{number:03}" for number in range(COUNT)]
    programs = [[str(engine), "--port", str(port)] for port in free_ports(COUNT)]
    where = settings.directory / "adopt"
    with our_fleet(where, names, programs, **AT_ONCE) as first:
        before = {name: row["pid"] for name, row in first.states().items()}
        os.kill(first.pid, signal.SIGKILL)  # the block's end finds a daemon that has ended already
        took: list[tuple[float, float]] = []
        for number in range(1 if settings.quick else 5):
            took.append(_one(where, first.port, before, last=number == (0 if settings.quick else 4)))
    ready, answered = (quantile([round(pair[at] * 1000) for pair in took], 0.5) / 1000 for at in (1, 0))
    yield Row(
        f"start of a daemon → {COUNT} engines of the one before ready again", "s", ready, goal=f"≤ {GOAL_S:g} s",
        reached=ready <= GOAL_S, note=f"p50 of {len(took)}; its API answers after {answered:.2f} s; same pids",
    )  # fmt: skip


def _one(where: Path, port: int, before: dict[str, int], *, last: bool) -> tuple[float, float]:
    """Seconds until the API answered, and until all were ready. It is killed again, or ended where it is the ``last``."""
    began = time.monotonic()
    with running(serve_argv(where / "pool-managerd.yaml"), where / "daemon.log", cwd=where) as child:
        node = Daemon(where, port, child.pid)
        wait_until(lambda: answers(port), "the next daemon to answer", 30.0, every_s=0.005)
        answered = time.monotonic() - began
        wait_until(lambda: all(row["ready"] for row in node.states().values()), "all to be ready again", 60.0, every_s=0.02)
        ready = time.monotonic() - began
        found = {name: row["pid"] for name, row in node.states().items()}
        if found != before:
            raise RuntimeError(f"{sum(found.get(name) != pid for name, pid in before.items())} engines were not adopted")
        if not last:
            os.kill(child.pid, signal.SIGKILL)
            child.wait(10)
        return answered, ready
