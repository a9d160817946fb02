"""docs/reference/lifecycle.md, made from the table: ``python -m tests.core.chart > docs/reference/lifecycle.md``."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import replace

from pool_managerd.core.breaker import Breaker
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import TABLE, After, Instance, Phase, Policy, PoolState, step
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.history import FailureHistory
from pool_managerd.core.lifecycle.pool import on
from pool_managerd.core.lifecycle.table import ignore
from pool_managerd.core.lifecycle.view import view
from tests.core.histories import SAMPLES

NOW = 1_000.0
_POLICIES = (Policy(), Policy(failure_threshold=1), Policy(warmup="off"), Policy(restart="never"))
_ANOTHER_DAEMONS = (ev.Adopt,)
"""What begins under one daemon and goes on under the next is not in the picture, which tells of one."""
_LATE = (ev.Spawned, ev.Adopted, ev.NotAdopted)
"""News that changes the state of a pool in a race alone."""
_NO_PROCESS = (Phase.DOWN, Phase.STAGING, Phase.BACKOFF, Phase.OPEN, Phase.ADOPTING, Phase.ATTACHED)


def specimens(phase: Phase) -> list[PoolState]:
    """A pool in ``phase`` with its deadline ahead, one whose deadline has passed, and what else makes a difference."""
    running = phase not in _NO_PROCESS and phase is not Phase.FAILED
    instance = Instance(
        InstanceId("p"), epoch=1, phase=phase, has_process=running, launched_at=0.0, started_at=1.0, last_good_at=NOW,
        ready_since=2.0, since=2.0, deadline=NOW + 9, external=phase is Phase.ATTACHED,
    )  # fmt: skip
    made = PoolState(instance)
    variants = [made, on(made, deadline=NOW - 1)]
    if phase is Phase.OPEN:
        variants = [replace(v, history=FailureHistory(general=Breaker(5, 1, v.active.deadline))) for v in variants]
    if phase is Phase.STARTING:
        variants.append(on(made, has_process=False))
    if phase is Phase.DOWN:
        variants.append(replace(made, pending_start=True))
    if phase is Phase.STOPPING:
        variants += [
            on(made, reaped=True, vram_pending=True, has_process=False, uses_gpus=True, after=after, asked=True)
            for after in After
        ]
    if phase is Phase.DRAINING:
        variants.append(on(made, drain_sleeps=True))
    if phase is Phase.FAILED:
        variants.append(on(made, vram_pending=True, uses_gpus=True))
    return variants


def targets() -> dict[tuple[Phase, type[ev.Event]], set[Phase]]:
    """Every phase that a (phase, event) pair can lead to, over all specimens and samples."""
    found: dict[tuple[Phase, type[ev.Event]], set[Phase]] = defaultdict(set)
    for phase in Phase:
        for i in specimens(phase):
            for policy in _POLICIES:
                for event in SAMPLES:
                    found[phase, type(event)].add(step(i, event, NOW, policy)[0].active.phase)
    return found


def seen_edges() -> set[tuple[str, str]]:
    """Which public state can follow which, of an engine of ours that today's events reach."""
    found: set[tuple[str, str]] = set()
    for phase in Phase:
        if phase in (Phase.ADOPTING, Phase.ATTACHED):
            continue
        for i in [*specimens(phase), *([PoolState.new("p")] if phase is Phase.DOWN else [])]:
            for policy in _POLICIES:
                after = [step(i, e, NOW, policy)[0] for e in SAMPLES if not isinstance(e, (*_ANOTHER_DAEMONS, *_LATE))]
                found |= {(view(i).state, view(new).state) for new in after if not new.active.external}
    return {(start, end) for start, end in found if start != end}


def _cell(phase: Phase, event: type[ev.Event], reached: set[Phase]) -> str:
    if TABLE[event][phase] is ignore:
        return "·"
    sample = next(s for s in SAMPLES if type(s) is event)
    effects = step(specimens(phase)[0], sample, NOW, Policy())[1]
    if any(isinstance(effect, do.Refuse) for effect in effects):
        return "refused"
    changed = sorted(p.value for p in reached - {phase})
    return ", ".join(changed) if changed else "stays"


def markdown() -> str:
    """The page: a diagram of what can follow what, and the whole table."""
    found = targets()
    edges = sorted({(a.value, b.value) for (a, _), reached in found.items() for b in reached if a is not b})
    lines = [
        "# The lifecycle of an engine", "",
        "Made from `pool_managerd.core.lifecycle` by `python -m tests.core.chart`; a test holds it to the code.", "",
        "What users see, where it can lead:", "",
        "![The states of a pool: which can follow which](../pictures/states.svg)", "",
        "Inside there are more phases; this table is the whole of it.", "",
        "```mermaid", "stateDiagram-v2", "    [*] --> down", *(f"    {a} --> {b}" for a, b in edges), "```", "",
        "Every (phase, event) pair is decided. `·`: the event does not apply and changes nothing. `stays`: noted, same phase.",
        "`refused`: the caller is told why. Otherwise: the phases it can lead to.", "",
    ]  # fmt: skip
    for title, events in (("Requests and decisions", _plain()), ("News of one launch", _news())):
        lines += [f"## {title}", "", "| event | " + " | ".join(p.value for p in Phase) + " |", "|---" * (len(Phase) + 1) + "|"]
        lines += [f"| {e.__name__} | " + " | ".join(_cell(p, e, found[p, e]) for p in Phase) + " |" for e in events]
        lines.append("")
    return "\n".join(lines)


def _plain() -> list[type[ev.Event]]:
    return [event for event in TABLE if not issubclass(event, ev.EpochEvent)]


def _news() -> list[type[ev.Event]]:
    return [event for event in TABLE if issubclass(event, ev.EpochEvent)]


if __name__ == "__main__":
    sys.stdout.write(markdown())
