"""An engine is killed: how long until the next one executes, with no backoff due."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.fleet import COUNT, Fleet, Settings, fleets
from bench.processes import kill_checked
from bench.result import Row, not_measured, quantile
from bench.stub import Stamps, stamps

WHAT = f"engine killed → next one executing, p50 at {COUNT} programs"
GOAL_MS, GOAL_RATIO = 15.0, 2.5
_MUST_HAVE_LIVED_NS = 1_200_000_000  # runsv waits a second for what lived less than one


def measure(settings: Settings) -> Iterator[Row]:
    kills = 12 if settings.quick else 60
    with stamps(settings.directory / "restart.pipe") as pipe, fleets(settings, "restart", pipe) as found:
        took: dict[str, list[float]] = {title: [] for title in found.all()}
        for number in range(kills):
            time.sleep(number * 0.618 % 1.0)  # not in step with a supervisor that looks once a second
            for title, fleet in found.all().items():
                took[title].append(_kill(fleet, number, pipe))
                time.sleep(0.03)  # what the restart left to do is not charged to the next one
    ours = quantile(took["ours"], 0.5)
    yield Row(
        WHAT, "ms", ours, goal=f"≤ {GOAL_MS:g} ms", reached=ours <= GOAL_MS,
        note=f"{kills} kills; p90 {quantile(took['ours'], 0.9):.1f}, p99 {quantile(took['ours'], 0.99):.1f} ms",
    )  # fmt: skip
    for title, reason in found.missing.items():
        yield not_measured(f"the same beside {title}", reason)
    for title in found.others:
        theirs = quantile(took[title], 0.5)
        runit = title == "runit"
        yield Row(
            f"the same beside {title}", "ms", ours, title, theirs,
            f"≤ {GOAL_RATIO:g}× runit" if runit else "", ours <= GOAL_RATIO * theirs if runit else None,
            f"{title} p90 {quantile(took[title], 0.9):.1f} ms",
        )  # fmt: skip


def _kill(fleet: Fleet, number: int, pipe: Stamps) -> float:
    name = fleet.names[number % COUNT]
    old = pipe.latest[name]
    time.sleep(max(0.0, (old.at_ns + _MUST_HAVE_LIVED_NS - time.monotonic_ns()) / 1e9))
    killed_ns = kill_checked(old.pid, fleet.engine)
    return (pipe.next_after(name, old).at_ns - killed_ns) / 1e6
