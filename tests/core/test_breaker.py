"""Breakers, the limit on restarts, and the history that holds them: values and times."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core import breaker, restart_limit
from pool_managerd.core.backoff import BackoffRules
from pool_managerd.core.breaker import CLOSED, Breaker, BreakerRules, Circuit, Trial
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.lifecycle import Policy
from pool_managerd.core.lifecycle.history import NOTHING_FAILED, FailureHistory, from_stored, to_stored
from pool_managerd.core.restart_limit import RestartRules

RULES = BreakerRules(threshold=3, open_ms=10_000)
P = Policy()


def failing(b: Breaker, *times: float) -> Breaker:
    for now in times:
        b = breaker.failed(b, now, RULES, counts=True)
    return b


# --- one breaker ------------------------------------------------------------------------------------------------------


def test_it_opens_with_the_threshold_and_not_before() -> None:
    assert failing(CLOSED, 1, 2).circuit is Circuit.CLOSED
    assert failing(CLOSED, 1, 2, 3) == Breaker(failures=3, opened=1, open_until=13.0)


def test_a_failure_while_it_is_open_is_counted_and_changes_nothing_else() -> None:
    assert failing(CLOSED, 1, 2, 3, 4) == Breaker(failures=4, opened=1, open_until=13.0)


def test_a_trial_that_fails_opens_it_for_twice_as_long_and_that_is_bounded() -> None:
    b, lengths = failing(CLOSED, 1, 2, 3), []
    for _ in range(7):
        assert b.open_until is not None
        now = b.open_until
        b = breaker.tried(b, now)
        assert b.circuit is Circuit.HALF_OPEN
        b = failing(b, now)
        assert b.open_until is not None and b.circuit is Circuit.OPEN
        lengths.append(b.open_until - now)
    assert lengths == [20, 40, 80, 160, 160, 160, 160]


def test_a_trial_by_hand_that_fails_leaves_it_open_as_it_was() -> None:
    opened = failing(CLOSED, 1, 2, 3)
    tried = breaker.tried(opened, 5.0)
    assert tried.trial is Trial.MANUAL and tried.circuit is Circuit.HALF_OPEN
    assert failing(tried, 6.0) == replace(opened, failures=4)


def test_another_start_within_a_trial_is_the_same_trial() -> None:
    tried = breaker.tried(failing(CLOSED, 1, 2, 3), 13.0)
    assert breaker.tried(tried, 14.0) == tried and tried.trial is Trial.DUE


def test_a_failure_of_the_other_kind_is_not_counted_and_fails_a_trial_all_the_same() -> None:
    assert breaker.failed(failing(CLOSED, 1, 2), 3, RULES, counts=False) == Breaker(failures=2)
    tried = breaker.tried(failing(CLOSED, 1, 2, 3), 13.0)
    assert breaker.failed(tried, 14.0, RULES, counts=False) == Breaker(failures=3, opened=2, open_until=34.0)


# --- restarts in a window -----------------------------------------------------------------------------------------------


def times(*seconds: float, rules: RestartRules | None = None) -> restart_limit.Times:
    found: restart_limit.Times = ()
    for t in seconds:
        found = restart_limit.added(found, t, rules or RestartRules())
    return found


def test_eight_in_the_window_and_two_more_are_allowed_and_an_eleventh_waits_for_the_oldest() -> None:
    rules = RestartRules()
    eight = times(*range(8))
    assert restart_limit.allowed_at(eight, rules) is None
    assert restart_limit.allowed_at(times(*range(9)), rules) is None
    assert restart_limit.allowed_at(times(*range(10)), rules) == 60.0


@given(st.lists(st.floats(0, 50), max_size=60), st.integers(1, 6), st.integers(1, 30))
def test_who_waits_until_it_is_allowed_never_exceeds_the_limit_in_any_window(gaps: list[float], most: int, window_s: int) -> None:
    rules = RestartRules(max_restarts=most, window_ms=window_s * 1000, storm_window_ms=1)
    now, done = 0.0, []
    known: restart_limit.Times = ()
    for gap in gaps:
        now += gap
        now = max(now, restart_limit.allowed_at(known, rules) or now)
        known = restart_limit.added(known, now, rules)
        done.append(now)
    for start in done:
        assert sum(start <= t < start + window_s for t in done) <= most


def test_a_storm_is_more_than_so_many_in_the_window_and_ten_in_half_a_minute_open_the_breaker() -> None:
    rules = RestartRules()
    assert not restart_limit.storms(times(*range(0, 50, 10)), rules) and restart_limit.storms(times(*range(0, 60, 10)), rules)
    assert not restart_limit.storms(times(*range(0, 120, 12)), rules)
    assert restart_limit.opens(times(*(3.0 * n for n in range(10))), rules)
    assert not restart_limit.opens(times(*(3.4 * n for n in range(10))), rules)
    assert not restart_limit.opens((), rules)


def test_as_many_restarts_are_remembered_as_the_rule_that_counts_most_needs() -> None:
    rules = RestartRules(max_restarts=1, storm_open=1, storm_warn=3)
    assert [restart_limit.storms(times(*range(n), rules=rules), rules) for n in (3, 4)] == [False, True]
    assert not restart_limit.storms((), rules)
    assert restart_limit.within((0.0, 1.0, 2.0), 61.0, 60_000) == (2.0,), "what is as old as the window has left it"


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200).map(sorted))
def test_what_is_remembered_of_restarts_is_bounded(seconds: list[float]) -> None:
    assert len(times(*seconds)) <= 11


# --- the history ------------------------------------------------------------------------------------------------------


def test_cuda_errors_open_their_own_breaker_and_leave_the_other_closed() -> None:
    h = NOTHING_FAILED
    for n in range(5):
        h = h.failed(float(n), P, CrashClass.CUDA, "CUDA error")
    assert h.cuda.circuit is Circuit.OPEN and h.general == CLOSED and h.circuit is Circuit.OPEN
    for n in range(4):
        h = h.failed(10.0 + n, P, CrashClass.PROCESS_EXIT, "exit_code=1")
    assert h.general == Breaker(failures=4)


def test_a_start_that_never_came_to_a_process_is_counted_by_no_breaker() -> None:
    h = NOTHING_FAILED
    for n in range(20):
        h = h.failed(float(n), P, None, "no room")
    assert h.failures == 20 and h.circuit is Circuit.CLOSED


def test_the_three_kinds_of_memory_are_forgotten_after_their_own_times() -> None:
    h = FailureHistory(failures=3, general=Breaker(failures=3), restarts=(1.0,), ooms=(1.0,))
    assert h.next_forgotten_at(100.0, P) == 160.0
    assert h.stable(100.0, 159.999, P) == h
    after = h.stable(100.0, 160.0, P)
    assert after == replace(h, general=CLOSED) and after.next_forgotten_at(100.0, P) == 400.0
    assert after.stable(100.0, 400.0, P) == replace(after, failures=0)
    assert after.stable(100.0, 700.0, P) == NOTHING_FAILED and NOTHING_FAILED.next_forgotten_at(0.0, P) is None


def test_five_times_out_of_memory_within_a_minute_is_a_class_of_its_own() -> None:
    h, kinds = NOTHING_FAILED, []
    for now in (0, 10, 20, 30, 61, 62, 200):
        h, kind = h.classified(CrashClass.OUT_OF_MEMORY if now % 20 else CrashClass.VRAM_OOM, float(now))
        kinds.append(kind)
    storm = CrashClass.OOM_STORM
    assert [kind is storm for kind in kinds] == [False, False, False, False, False, True, False]
    assert h.classified(CrashClass.PROCESS_EXIT, 201.0) == (h, CrashClass.PROCESS_EXIT)


def test_delays_differ_by_class_and_the_maximum_holds_after_that() -> None:
    rules = BackoffRules(multipliers={CrashClass.VRAM_OOM: 3.0, CrashClass.ECC: 4.0})
    assert rules.multiplier(CrashClass.VRAM_OOM) == 3.0 and rules.multiplier(CrashClass.ECC) == 4.0
    assert rules.multiplier(CrashClass.CUDA) == 2.0 and rules.multiplier(CrashClass.SIGNAL) == 1.0


moments = st.floats(0, 1e7).map(lambda t: round(t, 3))
breakers = st.one_of(
    st.builds(Breaker, failures=st.integers(0, 99)),
    st.builds(Breaker, failures=st.integers(0, 99), opened=st.integers(1, 9), open_until=moments),
)
histories = st.builds(
    FailureHistory, failures=st.integers(0, 99), general=breakers, cuda=breakers, error=st.none() | st.text(max_size=50),
    restarts=st.lists(moments, max_size=11).map(lambda ts: tuple(sorted(ts))),
    ooms=st.lists(moments, max_size=5).map(lambda ts: tuple(sorted(ts))),
)  # fmt: skip


@given(histories)
def test_a_history_outlives_the_daemon_within_a_boot(h: FailureHistory) -> None:
    stored = to_stored(h, "boot")
    assert (stored is None) is (h == NOTHING_FAILED)
    assert stored is None or from_stored(json.loads(json.dumps(stored)), "boot") == h


@given(histories)
def test_of_another_boot_only_the_sentence_is_left(h: FailureHistory) -> None:
    stored = to_stored(h, "boot")
    assert stored is None or from_stored(stored, "another") == FailureHistory(error=h.error)


def test_a_trial_ends_with_its_daemon_and_the_breaker_is_open_as_before() -> None:
    opened = Breaker(failures=5, opened=1, open_until=400.0)
    stored = to_stored(FailureHistory(general=breaker.tried(opened, 100.0)), "boot")
    assert stored is not None and from_stored(stored, "boot").general == opened


junk = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3))


@given(st.dictionaries(st.sampled_from(["failures", "restarts", "ooms", "error", "general", "cuda"]), junk))
def test_what_is_no_history_is_left_out(raw: dict[str, object]) -> None:
    h = from_stored({**raw, "boot_id": "boot"}, "boot")
    assert h.circuit is Circuit.CLOSED and h.failures == 0


@pytest.mark.parametrize(
    "general",
    [5, {"open_until": "soon"}, {"open_until": 10**400}, {"open_until": float("inf"), "failures": -3}, {"opened": True}],
)
def test_a_mistyped_breaker_is_closed(general: object) -> None:
    assert from_stored({"boot_id": "boot", "general": general}, "boot") == NOTHING_FAILED
