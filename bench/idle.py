"""CPU time of a hundred ready pools that nobody uses, probed each 5 s."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.fleet import COUNT, Settings, fleets
from bench.processes import cpu_seconds
from bench.result import Row, not_measured
from bench.stub import stamps

GOAL_PERCENT = 1.5
_SETTLE_S = 35.0  # what a start leaves to do is over: the rest of it, and that shims look often at a young engine


def measure(settings: Settings) -> Iterator[Row]:
    seconds = 10.0 if settings.quick else 30.0
    with stamps(settings.directory / "idle.pipe") as pipe, fleets(settings, "idle", pipe) as found:
        time.sleep(_SETTLE_S)
        trees = {title: fleet.pids() for title, fleet in found.all().items()}
        before = {title: cpu_seconds(pids) for title, pids in trees.items()}
        daemon_before, began = cpu_seconds(trees["ours"][:1]), time.monotonic()
        time.sleep(seconds)
        spent = time.monotonic() - began
        share = {title: (cpu_seconds(pids) - before[title]) / spent * 100 for title, pids in trees.items()}
        daemon = (cpu_seconds(trees["ours"][:1]) - daemon_before) / spent * 100
    ours = share["ours"]
    yield Row(
        f"CPU of {COUNT} ready pools, a probe each 5 s", "% of a core", ours, goal=f"≤ {GOAL_PERCENT:g} %",
        reached=ours <= GOAL_PERCENT, note=f"over {seconds:g} s; daemon {daemon:.2f}, fork server and shims {ours - daemon:.2f}",
    )  # fmt: skip
    for title, reason in found.missing.items():
        yield not_measured(f"the same beside {title}", reason)
    for title in found.others:
        yield Row(f"the same beside {title}, which probes nothing", "% of a core", ours, title, share[title])
