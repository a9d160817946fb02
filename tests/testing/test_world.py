"""Simulated runs of a whole node: seeds that have found something, some new ones, and whether anything would be found at all."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from pool_managerd.config.plan import Step
from pool_managerd.core.gpu.ledger import Ledger
from pool_managerd.core.lifecycle import relaunch
from pool_managerd.core.registry import KeptLeases, Registry
from pool_managerd.core.registry.entry import PoolEntry
from pool_managerd.supervision.apply_steps import ApplySteps
from pool_managerd.supervision.intents import Intents
from pool_managerd.testing.scenario import Action, Scenario, draw
from pool_managerd.testing.shrink import shrink
from pool_managerd.testing.simulate import main
from pool_managerd.testing.world import run
from tests.conftest import REPOSITORY

SCAN_S = 18.0
LIMIT_SEED, LEDGER_SEED, APPLY_SEED = 3, 5, 11
FOUND: dict[str, tuple[int, ...]] = {
    "an evict never ended under the next daemon, which had started its pool anew": (2445,),
    "an evict that was still saving slots was waited for by the next daemon, whose engine went on": (1278795531,),
    "a reload that was given up before its first step was never over, and whoever stopped the pool asked for ever": (497813686,),
    "a candidate that ended while its commit was written left a handoff file": (336268496,),
    "a sleeper had what it had lent back while the borrower still had it": (888059443,),
    "an evict of a pool that comes up on demand never ended under the next daemon, whose engine went on": (63645953,),
    "a slot that was given as the daemon died was kept from all until its lease ran out": (3648177586,),
    "a pool that was stopped while an apply was at another one was reloaded, and so started": (525955043,),
    "a candidate that had to look for another port used the epoch of the pool's next launch": (30166,),
}
"""What seeds have found; each has a test of its own beside what was wrong, too."""
STEADY = range(6)
NEW = 6


@pytest.mark.parametrize("seed", sorted(seed for seeds in FOUND.values() for seed in seeds))
def test_what_a_seed_has_found_stays_mended(seed: int) -> None:
    """As it was drawn then: without what is fetched."""
    assert run(replace(draw(seed), downloads={})).broken is None, f"seed {seed}, without downloads"


def test_no_rule_is_broken_in_runs_that_are_the_same_each_time() -> None:
    broken = {seed: outcome.broken for seed in STEADY if (outcome := run(draw(seed))).broken is not None}
    assert not broken, f"make simulate SEED={min(broken)} tells what happened"


def test_no_rule_is_broken_in_runs_that_are_new_with_each_change() -> None:
    """The code itself draws them: what passes passes again, until something is changed."""
    sources = hashlib.sha256()
    for path in sorted((REPOSITORY / "src").rglob("*.py")):
        sources.update(path.read_bytes())
    first = int.from_bytes(sources.digest()[:4])
    broken = {seed: outcome.broken for seed in range(first, first + NEW) if (outcome := run(draw(seed))).broken is not None}
    assert not broken, f"make simulate SEED={min(broken)} tells what happened"


def with_gpus() -> Scenario:
    """One where there is room for all on GPUs."""
    return next(found for seed in range(50) if (found := draw(seed)).gpus and not found.tight)


def test_a_driver_that_answers_late_costs_no_engine_its_next_daemon() -> None:
    """It was not taken over but killed, when the scan took longer than an adoption may."""
    slow = Action(0, 100.0, "slow_scan", 0, 0, SCAN_S / 20)
    outcome = run(replace(with_gpus(), hours=0.5, actions=(slow, Action(1, 101.0, "kill", 0, 0, 0.1))))
    assert outcome.broken is None and outcome.lives == 2
    assert any("Took over the running engine" in line for line in outcome.lines())


@pytest.mark.parametrize("after_ms", [28, 30, 32, 34, 36])
def test_a_daemon_that_is_stopped_while_it_launches_says_that_nothing_is_left_only_when_that_is_so(after_ms: int) -> None:
    """Seed 42 of an earlier way to draw: the word of the spawn waited, its deadline came first, and memory was given back."""
    actions = (("stop", 100.0), ("start", 110.0), ("pause", 110.0 + after_ms / 1000))
    drawn = tuple(Action(n, at, kind, 0, 1, 0.98) for n, (kind, at) in enumerate(actions))
    assert run(replace(with_gpus(), hours=0.5, actions=drawn)).broken is None


def test_a_seed_is_the_same_run_whatever_the_process_is_like() -> None:
    """The same trace byte for byte, though texts hash to other numbers and objects lie elsewhere."""
    traces = [
        subprocess.run(
            [sys.executable, "-m", "pool_managerd.testing.simulate", "--seed", "7", "--trace"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, timeout=60, check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]  # fmt: skip
    assert traces[0] == traces[1]
    assert b"daemon: number 2 begins" in traces[0] and traces[0].count(b"\n") > 100


def test_a_rule_that_the_code_forgets_is_found_and_the_run_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    async def keep(self: Intents, *_: object) -> None:
        """What is wanted is acknowledged and not written."""

    monkeypatch.setattr(Intents, "keep", keep)
    outcome = run(draw(6))
    assert outcome.broken is not None and outcome.broken.rule == "acknowledged changes last"
    small, left_out = shrink(outcome)
    assert small.broken is not None and small.broken.rule == outcome.broken.rule
    kept = [action for action in small.scenario.actions if action.index not in left_out]
    assert len(kept) <= 4, "a request and the death of the daemon are enough"
    assert any("acknowledged" in line for line in small.lines())


def admit(self: Registry, entry: PoolEntry) -> None:
    """More leases than slots, and leases on a pool that drains."""


def end_leases(self: Registry, pool_id: str, epoch: int) -> int:
    """They outlive their engine."""
    return 0


def restore_leases(self: Registry, kept: KeptLeases, epochs: Collection[int]) -> None:
    """The next daemon forgets them."""


FORGETFUL = {"_admit": (admit, 10), "end_leases": (end_leases, 45), "restore_leases": (restore_leases, 5)}


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_registry_that_forgets_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful, seed = FORGETFUL[name]
    assert run(draw(seed)).broken is None
    monkeypatch.setattr(Registry, name, forgetful)
    assert run(draw(seed)).broken is not None, "are scenarios drawn in another way now? take a seed that finds it"


def test_an_apply_that_is_not_carried_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def do(self: ApplySteps, step: Step) -> dict[str, Any]:
        """It says so, and that is all."""
        return {}

    assert run(draw(APPLY_SEED)).broken is None
    monkeypatch.setattr(ApplySteps, "do", do)
    outcome = run(draw(APPLY_SEED))
    assert outcome.broken is not None and outcome.broken.rule == "a reload is committed or undone"


def test_restarts_without_a_limit_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(draw(LIMIT_SEED)).broken is None
    monkeypatch.setattr(relaunch, "allowed_at", lambda *_: None)
    outcome = run(draw(LIMIT_SEED))
    assert outcome.broken is not None and outcome.broken.rule == "restarts in any window are limited"


def test_a_ledger_that_forgets_what_was_left_running_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(draw(LEDGER_SEED)).broken is None
    monkeypatch.setattr(Ledger, "restore", lambda *_: None)
    outcome = run(draw(LEDGER_SEED))
    assert outcome.broken is not None and outcome.broken.rule == "the memory of an engine that runs is promised to it"


def test_the_command_plays_a_seed_and_tells_how_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3"]) == 0
    assert "no rule is broken" in capsys.readouterr().out


def test_the_command_shows_what_a_broken_rule_took(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Registry, "_admit", admit)
    assert main(["--seed", "10"]) == 1
    said = capsys.readouterr().out
    assert "broken: leases are at most slots" in said and "make simulate SEED=10" in said
