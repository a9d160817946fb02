"""``python -m pool_managerd.testing.simulate``: plays one seed after the other, and tells of the first that breaks a rule."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass

from pool_managerd.testing.scenario import draw
from pool_managerd.testing.shrink import shrink
from pool_managerd.testing.world import Outcome, run

AT_ONCE = 4


@dataclass
class Tally:
    """What all runs came to together."""

    seeds: int = 0
    node_hours: float = 0.0
    acknowledged: int = 0
    daemons: int = 0

    def add(self, other: Tally) -> None:
        self.seeds += other.seeds
        self.node_hours += other.node_hours
        self.acknowledged += other.acknowledged
        self.daemons += other.daemons

    def over(self, seconds: float) -> str:
        """In a sentence."""
        return (
            f"{self.seeds} seeds, {self.node_hours:.0f} node-hours in {seconds:.0f} s:"
            f" {self.seeds / seconds * 3600:,.0f} seeds/hour,"
            f" {self.node_hours / seconds * 60:,.0f} simulated node-hours per minute;"
            f" {self.daemons} daemons, {self.acknowledged} acknowledged changes"
        )


def _play(seed: int) -> tuple[int, Tally, str | None]:
    outcome = run(draw(seed))
    broken = None if outcome.broken is None else outcome.broken.rule
    return seed, Tally(1, outcome.node_hours, outcome.acknowledged, outcome.lives), broken


def explore(first: int, seconds: float, jobs: int) -> tuple[Tally, list[tuple[int, str]]]:
    """Seeds from ``first`` on, for so long; stops early at the first that breaks a rule."""
    tally, broken = Tally(), list[tuple[int, str]]()
    ends, seeds = time.monotonic() + seconds, iter(range(first, sys.maxsize))
    with ProcessPoolExecutor(jobs) as workers:
        playing = {workers.submit(_play, seed) for seed in _some(seeds, jobs * AT_ONCE)}
        while playing:
            done, playing = wait(playing, return_when=FIRST_COMPLETED)
            for seed, one, rule in sorted(future.result() for future in done):
                tally.add(one)
                if rule is not None:
                    broken.append((seed, rule))
            if broken or time.monotonic() > ends:
                playing = _without(playing)
            else:
                playing |= {workers.submit(_play, seed) for seed in _some(seeds, len(done))}
    return tally, sorted(broken)


def _some(seeds: Iterator[int], count: int) -> list[int]:
    return [next(seeds) for _ in range(count)]


def _without(playing: set[Future[tuple[int, Tally, str | None]]]) -> set[Future[tuple[int, Tally, str | None]]]:
    """Those that have not begun need not."""
    return {future for future in playing if not future.cancel()}


def report(seed: int, *, whole: bool) -> tuple[Outcome, list[str]]:
    """Play a seed; its trace where it breaks a rule, or where the ``whole`` of it is wanted."""
    outcome = run(draw(seed))
    if outcome.broken is None:
        hours = f"seed {seed}: {outcome.node_hours:.1f} node-hours, {outcome.lives} daemons; no rule is broken"
        return outcome, [*(outcome.lines() if whole else ()), hours]
    if whole:
        return outcome, [*outcome.lines(), *_verdict(outcome)]
    small, left_out = shrink(outcome)
    kept = len(outcome.scenario.actions) - len(left_out)
    told = f"seed {seed}: {kept} of its {len(outcome.scenario.actions)} actions are enough"
    return outcome, [told, *small.lines(), *_verdict(small), f"replay it: make simulate SEED={seed}"]


def _verdict(outcome: Outcome) -> list[str]:
    broken = outcome.broken
    return [] if broken is None else [f"broken: {broken.rule}", f"  {broken.what}"]


def main(argv: list[str] | None = None) -> int:
    """0 when no rule was broken, 1 otherwise."""
    asked = argparse.ArgumentParser(prog="simulate", description=(__doc__ or "").splitlines()[0])
    asked.add_argument("--seconds", type=float, default=60.0, help="how long to explore")
    asked.add_argument("--seed", type=int, help="play this one alone")
    asked.add_argument("--first", type=int, help="the first seed; drawn by default")
    asked.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    asked.add_argument("--trace", action="store_true", help="with --seed: the whole trace, not shrunk")
    given = asked.parse_args(argv)
    write = sys.stdout.write
    if given.seed is not None:
        outcome, lines = report(given.seed, whole=given.trace)
        write("\n".join(lines) + "\n")
        return int(outcome.broken is not None)
    first = random.SystemRandom().randrange(1 << 30) if given.first is None else given.first
    began = time.monotonic()
    tally, broken = explore(first, given.seconds, given.jobs)
    write(f"seeds from {first} on: {tally.over(time.monotonic() - began)}\n")
    for seed, rule in broken:
        write(f"seed {seed} breaks a rule: {rule}\n")
    if broken:
        write("\n".join(report(broken[0][0], whole=False)[1]) + "\n")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
