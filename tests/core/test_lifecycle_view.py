"""What a pool looks like from outside, and that each rule about it can be broken and is then named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pool_managerd.core.breaker import Breaker
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import Desired, Instance, Phase, Policy, PoolState, outline, validate, view
from pool_managerd.core.lifecycle.history import FailureHistory
from pool_managerd.core.lifecycle.pool import on

P = Policy()
PLAIN = PoolState(Instance(InstanceId("p"), epoch=3, since=5.0))
READY = on(PLAIN, phase=Phase.READY, has_process=True, last_good_at=5.0, launched_at=1.0)
ATTACHED = on(PLAIN, phase=Phase.ATTACHED, external=True, launched_at=1.0)
OPEN = FailureHistory(general=Breaker(5, 1, 99.0))


@pytest.mark.parametrize(
    ("pool", "seen"),
    [
        (PLAIN, ("uninitialized", False, False, False)), (on(PLAIN, launched_at=1.0), ("offline", False, False, False)),
        (on(PLAIN, phase=Phase.STAGING), ("provisioning", False, False, False)),
        (on(PLAIN, phase=Phase.STARTING, has_process=True), ("starting", True, False, False)),
        (on(READY, phase=Phase.WARMING), ("starting", True, False, False)),
        (on(READY, phase=Phase.WAKING), ("starting", True, False, False)),
        (on(PLAIN, phase=Phase.ADOPTING), ("starting", False, False, False)),
        (on(PLAIN, phase=Phase.OPEN), ("failed", False, False, False)),
        (on(PLAIN, phase=Phase.BACKOFF), ("backoff", False, False, False)), (READY, ("ready", True, True, False)),
        (replace(READY, quarantined=True), ("ready", True, False, False)), (on(READY, hung=True), ("ready", True, False, False)),
        (on(READY, busy=True), ("ready", True, False, False)),
        (on(READY, phase=Phase.DRAINING), ("draining", True, False, True)),
        (on(READY, phase=Phase.STOPPING), ("stopping", True, False, False)),
        (on(READY, phase=Phase.STOPPING, drain_since=0.0), ("stopping", True, False, True)),
        (ATTACHED, ("starting", False, False, False)), (on(ATTACHED, last_good_at=0.0), ("ready", True, True, False)),
        (on(ATTACHED, last_good_at=1.0, hung=True), ("ready", True, False, False)),
        (replace(on(ATTACHED, last_good_at=1.0), quarantined=True), ("ready", True, False, False)),
        (on(ATTACHED, phase=Phase.DRAINING, last_good_at=1.0), ("draining", True, False, True)),
        (on(ATTACHED, phase=Phase.DRAINING), ("draining", False, False, True)),
    ],
)  # fmt: skip
def test_what_is_seen_of_a_pool(pool: PoolState, seen: tuple[str, bool, bool, bool]) -> None:
    found = view(pool)
    assert (found.state, found.live, found.ready, found.draining) == seen


def test_an_outline_changes_with_what_others_go_by_and_not_with_timers() -> None:
    assert outline(on(READY, next_probe_at=9.0, probe_sent_at=8.0, deadline=7.0, probe_failures=1)) == outline(READY)
    changes: list[PoolState] = [
        on(READY, last_good_at=6.0), on(READY, hung=True), on(READY, busy=True), on(READY, drain_since=1.0), on(READY, epoch=4),
        on(READY, has_process=False), on(READY, external=True), on(READY, phase=Phase.DRAINING), replace(READY, held=True),
        replace(READY, desired=Desired.STOPPED), replace(READY, quarantined=True), replace(READY, pending_start=True),
        replace(READY, crash_count=1), replace(READY, restart_count=1), replace(READY, reason="x"), replace(READY, history=OPEN),
        replace(READY, last_error="x"),
    ]  # fmt: skip
    assert len({outline(READY), *map(outline, changes)}) == len(changes) + 1


GOOD: list[PoolState] = [
    PLAIN, READY, ATTACHED, on(PLAIN, phase=Phase.STAGING, deadline=9.0), on(READY, phase=Phase.SLEEPING),
    replace(on(READY, since=9.0), held=True), replace(on(PLAIN, phase=Phase.OPEN, deadline=9.0), history=OPEN),
    replace(PLAIN, history=OPEN), on(READY, phase=Phase.STOPPING, deadline=9.0, vram_pending=True),
    on(PLAIN, phase=Phase.FAILED, vram_pending=True, has_process=True), on(READY, probe_failures=2, next_probe_at=9.0),
    replace(PLAIN, pending_start=True), replace(PLAIN, history=FailureHistory(restarts=(1.0, 1.0, 2.0))),
    replace(on(PLAIN, phase=Phase.STAGING, deadline=9.0), held=True), on(READY, phase=Phase.DRAINING, deadline=9.0),
]  # fmt: skip


@pytest.mark.parametrize("pool", GOOD)
def test_a_pool_as_it_should_be_breaks_no_rule(pool: PoolState) -> None:
    validate(pool, 5.0, P)


@pytest.mark.parametrize(
    ("pool", "rule"),
    [
        *((on(READY, phase=phase), "a transitional phase has a deadline") for phase in (Phase.STARTING, Phase.DRAINING)),
        *((on(READY, phase=phase, has_process=False, deadline=9.0), "a running phase has a process")
          for phase in (Phase.WARMING, Phase.SLEEPING, Phase.WAKING)),
        *((on(PLAIN, phase=phase, has_process=True, deadline=9.0), "down means reaped")
          for phase in (Phase.DOWN, Phase.BACKOFF, Phase.STAGING)),
        (on(READY, external=True, has_process=False), "ready means live and not draining"),
        (on(READY, last_good_at=None), "ready means a good probe of this epoch"),
        (on(READY, probe_failures=3), "ready means fewer failed probes than the threshold"),
        (replace(on(PLAIN, phase=Phase.STAGING, deadline=9.0, since=6.0), held=True), "staging began before it was held"),
        (replace(on(PLAIN, phase=Phase.STAGING, deadline=9.0, since=6.0), quarantined=True), "staging began before it was held"),
        *((bad, "counts are not negative") for bad in (
            replace(PLAIN, crash_count=-1), replace(PLAIN, restart_count=-1), on(PLAIN, drain_leases=-1),
            on(PLAIN, probe_failures=-1), on(PLAIN, epoch=-1),
        )),
        (on(PLAIN, phase=Phase.OPEN, deadline=9.0), "an open breaker is what open means"),
        (replace(READY, history=OPEN), "nothing is under way while a breaker is open"),
        (replace(on(READY, phase=Phase.WARMING, deadline=9.0), history=OPEN), "nothing is under way while a breaker is open"),
        (replace(PLAIN, history=FailureHistory(restarts=(2.0, 1.0))), "restarts are in order"),
        (replace(PLAIN, pending_start=True, desired=Desired.STOPPED), "no start is due of a pool that is to stay down"),
        (replace(READY, pending_start=True), "no start is due while one is under way"),
        (on(READY, vram_pending=True), "memory is waited for after a stop alone"),
        (on(READY, next_probe_at=9.0, probe_sent_at=1.0), "at most one probe is under way"),
    ],
)  # fmt: skip
def test_each_rule_can_be_broken_and_is_named_alone(pool: PoolState, rule: str) -> None:
    with pytest.raises(AssertionError) as broken:
        validate(pool, 5.0, P)
    assert str(broken.value).startswith(f"broken: {rule}: PoolState(")


def test_all_rules_that_are_broken_are_named() -> None:
    bad: Any = replace(on(READY, last_good_at=None), crash_count=-1)
    with pytest.raises(AssertionError, match="ready means a good probe of this epoch; counts are not negative"):
        validate(bad, 5.0, P)
