"""What follows failures: waits, breakers, limits and storms, told as events and effects (SPEC §8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.backoff import BackoffRules
from pool_managerd.core.breaker import BreakerRules, Circuit
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.lifecycle import Desired, Phase, Policy, PoolState, next_timer, step, validate, view
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.history import NOTHING_FAILED
from pool_managerd.core.restart_limit import RestartRules
from tests.core.test_lifecycle_stories import Story

QUICK = BackoffRules(initial_ms=100, max_ms=100, jitter=0.0, min_delay_ms=0)
PLAIN = Policy(backoff=QUICK, warmup="off")


class Failing(Story):
    """A pool whose engines fail when told to."""

    def __init__(self, policy: Policy = PLAIN) -> None:
        super().__init__(policy)

    @property
    def epoch(self) -> int:
        return self.i.active.epoch

    @property
    def circuit(self) -> str:
        return self.i.history.circuit.value

    def up(self) -> None:
        """The launch that is under way becomes ready."""
        n = self.epoch
        self.tell(ev.Staged(n), ev.Spawned(n, 42), ev.ProbeSucceeded(n))
        assert self.phase() is Phase.READY

    def crash(self, crash: CrashClass = CrashClass.PROCESS_EXIT, after_s: float = 0.0, **how: Any) -> None:
        n = self.epoch
        self.tell(ev.Died(n), ev.Exited(n, **{"code": 1, "summary": "exit_code=1", "crash": crash, **how}), after_s=after_s)

    def wait(self) -> None:
        """Until the timer, and what follows it."""
        due = next_timer(self.i, self.policy)
        assert due is not None
        self.tell(ev.Tick(), after_s=max(0.0, due - self.now))

    def crash_loop(self, times: int, crash: CrashClass = CrashClass.PROCESS_EXIT) -> None:
        """That many crashes, each of an engine that was ready, and the waits between them."""
        if self.phase() is Phase.DOWN:
            self.tell(ev.Start())
        for n in range(times):
            if n:
                self.wait()
            self.up()
            self.crash(crash)

    def opened(self) -> Failing:
        self.crash_loop(5)
        assert self.phase() is Phase.OPEN
        return self


# --- the breaker ------------------------------------------------------------------------------------------------------


def test_five_failures_in_a_row_open_the_breaker_and_four_do_not() -> None:
    story = Failing()
    story.crash_loop(4)
    assert story.phase() is Phase.BACKOFF and story.circuit == "closed"
    story.wait()
    story.up()
    story.crash()
    assert story.phase() is Phase.OPEN and view(story.i).state == "failed" and story.i.reason == "circuit_open"
    assert story.i.last_error == "exit_code=1"
    said = story.said("breaker")
    assert said.level == "error" and said.fields == {
        "class": "general", "old_state": "closed", "new_state": "open", "failure_count": 5, "open_ms": 300_000,
        "restart_in_s": 300.0,
    }  # fmt: skip
    assert not any(isinstance(e, do.Say) and e.action == "backoff" for e in story.effects), "no restart is scheduled"


def test_a_first_good_probe_forgets_no_failure_and_a_minute_of_being_ready_does() -> None:
    story = Failing()
    story.crash_loop(4)
    story.wait()
    story.up()
    story.tell(ev.Tick(), after_s=59.9)
    assert story.i.history.general.failures == 4
    story.tell(ev.Tick(), after_s=0.1)
    assert story.i.history.general.failures == 0 and story.i.history.failures == 4, "backoff remembers for longer"
    story.crash()
    assert story.phase() is Phase.BACKOFF and story.i.history.general.failures == 1


def test_the_timer_fires_when_something_is_to_be_forgotten_and_not_for_ever() -> None:
    story = Failing()
    story.crash_loop(1)
    story.wait()
    story.up()
    ready_at, fired = story.now, []
    for _ in range(400):
        due = next_timer(story.i, story.policy)
        assert due is not None
        before = story.i.history
        story.tell(ev.Tick(), after_s=due - story.now)
        if story.i.history != before:
            fired.append(story.now - ready_at)
        if story.i.active.probe_sent_at is not None:
            story.tell(ev.ProbeSucceeded(story.epoch))
    assert fired == pytest.approx([60, 300, 600]) and story.i.history == NOTHING_FAILED


def test_an_open_breaker_lets_exactly_one_start_through_and_its_failure_opens_it_for_twice_as_long() -> None:
    story = Failing().opened()
    story.tell(ev.Tick(), after_s=299.9)
    assert story.phase() is Phase.OPEN
    story.tell(ev.Tick(), after_s=0.1)
    assert story.phase() is Phase.STAGING and story.circuit == "half_open" and story.kinds() == ["StageArtifacts"]
    assert story.said("breaker").fields["new_state"] == "half_open"
    story.up()
    assert view(story.i).ready and story.circuit == "half_open"
    story.crash(after_s=59.9)
    assert story.phase() is Phase.OPEN and story.i.active.deadline == pytest.approx(story.now + 600)
    story.tell(ev.Tick(), after_s=599.9)
    assert story.phase() is Phase.OPEN


def test_a_minute_of_being_ready_closes_a_half_open_breaker() -> None:
    story = Failing().opened()
    story.wait()
    story.up()
    story.tell(ev.Tick(), after_s=60)
    assert story.circuit == "closed" and story.said("breaker").fields["new_state"] == "closed"
    story.crash()
    assert story.phase() is Phase.BACKOFF


def test_a_trial_that_cannot_even_be_staged_has_failed() -> None:
    story = Failing().opened()
    story.wait()
    story.tell(ev.StagingFailed(story.epoch, "no room"))
    assert story.phase() is Phase.OPEN and story.i.active.deadline == pytest.approx(story.now + 600)


def test_a_start_that_comes_to_nothing_waits_longer_each_time_and_never_opens_the_breaker() -> None:
    story = Failing(replace(PLAIN, backoff=replace(QUICK, max_ms=100_000)))
    story.tell(ev.Start())
    waits: list[Any] = []
    for _ in range(8):
        story.tell(ev.StagingFailed(story.epoch, "no room"))
        waits.append(story.said("backoff").fields["backoff_ms"])
        assert story.i.active.deadline == pytest.approx(story.now + waits[-1] / 1000, abs=1e-6)
        story.wait()
    assert waits == [100 * 2**n for n in range(8)] and story.circuit == "closed"


def test_cuda_errors_open_their_own_breaker_alone() -> None:
    story = Failing()
    story.crash_loop(5, CrashClass.CUDA)
    assert story.phase() is Phase.OPEN and story.said("breaker").fields["class"] == "cuda"
    assert story.i.history.general.circuit is Circuit.CLOSED
    story.tell(ev.ResetBreaker())
    assert story.i.history.cuda.circuit is Circuit.CLOSED and story.phase() is Phase.STAGING


def test_a_reset_forgets_all_failures_and_starts_what_was_wanted() -> None:
    story = Failing().opened()
    story.tell(ev.ResetBreaker())
    assert story.phase() is Phase.STAGING and story.circuit == "closed"
    assert story.i.history == replace(NOTHING_FAILED, error="exit_code=1", restarts=(story.now,))
    story.up()
    assert story.i.history.error is None


def test_a_reset_starts_nothing_that_was_stopped() -> None:
    story = Failing().opened()
    story.tell(ev.Stop(), ev.ResetBreaker())
    assert story.phase() is Phase.DOWN and story.circuit == "closed"


# --- a person, and demand -----------------------------------------------------------------------------------------------


def test_demand_is_refused_while_it_is_open_and_told_for_how_long() -> None:
    story = Failing().opened()
    (refused,) = story.tell(ev.Start(origin="demand"), after_s=100)
    assert isinstance(refused, do.Refuse) and refused.code == "CIRCUIT_OPEN"
    assert refused.retry_after_s == pytest.approx(200) and "3.33 min" in refused.message
    story.tell(ev.Evict())
    assert story.phase() is Phase.DOWN and story.i.desired is Desired.EVICTED
    (refused,) = story.tell(ev.Start(origin="demand"))
    assert isinstance(refused, do.Refuse) and refused.code == "CIRCUIT_OPEN"
    story.tell(ev.Start(origin="demand"), after_s=200)
    assert story.phase() is Phase.STAGING and story.circuit == "half_open", "the one that is let through"


@pytest.mark.parametrize("event", [ev.Start(), ev.Restart(), ev.Start(join=False)])
def test_a_person_has_one_start_while_it_is_open_which_forgives_nothing(event: ev.Event) -> None:
    story = Failing().opened()
    before, until = story.i.history, story.i.active.deadline
    story.tell(event, after_s=20)
    assert story.phase() is Phase.STAGING and story.circuit == "half_open"
    assert story.i.history.restarts == (*before.restarts, story.now), "it is counted among the restarts"
    story.up()
    story.crash()
    assert story.phase() is Phase.OPEN and story.i.active.deadline == until, "open again as it was"
    assert story.i.history.general.failures == 6


def test_a_persons_start_that_outlasts_the_open_time_is_followed_by_a_wait_and_then_the_trial() -> None:
    story = Failing().opened()
    story.tell(ev.Start(), after_s=290)
    story.up()
    story.crash(after_s=30)
    assert story.phase() is Phase.OPEN and story.i.active.deadline == pytest.approx(story.now + 0.1)
    story.wait()
    assert story.circuit == "half_open"
    story.up()
    story.crash()
    assert story.i.active.deadline == pytest.approx(story.now + 600)


def test_a_held_pool_whose_hold_ends_waits_for_its_breaker() -> None:
    story = Failing().opened()
    story.tell(ev.Hold(), ev.Tick(), after_s=300)
    assert story.phase() is Phase.DOWN and story.i.pending_start and "is held" in story.said("start_owed").human
    story = Failing().opened()
    story.tell(ev.Stop(), ev.Hold())
    story.i = replace(story.i, desired=Desired.WANTED, pending_start=True)
    story.tell(ev.Release(), after_s=10)
    assert story.phase() is Phase.OPEN and story.i.active.deadline == pytest.approx(story.now + 290)
    assert not story.i.pending_start and "waits 4.83 min" in story.said("start_owed").human


def test_a_process_that_comes_up_late_leaves_the_breaker_open() -> None:
    story = Failing().opened()
    story.wait()
    story.tell(ev.Staged(story.epoch))
    story.tell(ev.Tick(), after_s=story.policy.startup_timeout_s)
    story.tell(ev.Tick(), after_s=story.policy.kill_wait_s)
    assert story.phase() is Phase.OPEN
    until = story.i.active.deadline
    story.tell(ev.Spawned(story.epoch, 42))
    story.tell(ev.Exited(story.epoch, signal=9), after_s=1)
    assert story.phase() is Phase.OPEN and story.i.active.deadline == until


# --- restarts: the limit, and storms --------------------------------------------------------------------------------------

MANY = BreakerRules(threshold=1_000)


def test_the_eleventh_restart_within_a_minute_waits_until_the_first_has_left_the_window() -> None:
    story = Failing(replace(PLAIN, breaker=MANY, restart_limit=RestartRules(storm_open=1_000)))
    story.crash_loop(11)
    first = story.i.history.restarts[0]
    assert story.i.restart_count == 10
    story.wait()
    assert story.phase() is Phase.BACKOFF and story.i.active.deadline == pytest.approx(first + 60)
    said = story.said("restart_delayed")
    assert said.level == "warn" and said.fields["restart_count"] == 10 and said.fields["time_window"] == 60_000
    assert "10 times within 60 s" in said.human and said.fields["restart_in_s"] == pytest.approx(first + 60 - story.now)
    story.wait()
    assert story.phase() is Phase.STAGING and story.now == pytest.approx(first + 60)


def test_a_restart_that_waits_for_the_limit_does_not_wait_for_memory_that_was_held_as_well() -> None:
    """The simulator found this one: held memory, a restart by hand, and the limit in its way."""
    story = Failing(replace(PLAIN, breaker=MANY, restart_limit=RestartRules(max_restarts=1, storm_open=1_000)))
    story.crash_loop(1)
    story.wait()
    n = story.epoch
    story.tell(ev.Staged(n, uses_gpus=True), ev.Spawned(n, 42), ev.ProbeSucceeded(n))
    story.crash()
    story.tell(ev.VramHeld(n, "pid 77"), ev.Restart())
    assert story.phase() is Phase.BACKOFF and story.i.active.epoch == n and not story.i.active.vram_pending
    assert story.kinds() == ["ReleaseVram"]
    story.wait()
    assert story.phase() is Phase.STAGING and story.i.active.epoch == n + 1


def test_more_than_five_restarts_within_a_minute_are_told_once_as_a_storm() -> None:
    story = Failing(replace(PLAIN, breaker=MANY))
    told = []
    story.tell(ev.Start())
    for _ in range(9):
        story.up()
        story.crash()
        story.wait()
        told += [(e.level, e.human, e.fields) for e in story.effects if isinstance(e, do.Say) and e.action == "storm"]
    human = "Pool 'p' is restarted again and again: 6 times within 60 s"
    assert told == [("critical", human, {"restart_count": 6, "time_window": 60_000})]


def test_ten_restarts_within_half_a_minute_open_the_breaker() -> None:
    story = Failing(replace(PLAIN, breaker=MANY))
    story.crash_loop(10)
    assert story.phase() is Phase.BACKOFF and story.i.restart_count == 9
    story.wait()
    story.up()
    story.crash()
    assert story.phase() is Phase.OPEN and story.i.restart_count == 10


def test_a_storm_is_over_with_an_engine_that_was_ready_for_long() -> None:
    story = Failing(replace(PLAIN, breaker=MANY))
    story.crash_loop(10)
    story.wait()
    story.up()
    story.crash(after_s=61)
    assert story.phase() is Phase.BACKOFF


def test_running_out_of_memory_again_and_again_is_critical_and_says_what_to_do() -> None:
    story = Failing(
        replace(PLAIN, breaker=MANY, backoff=replace(QUICK, multipliers={CrashClass.OUT_OF_MEMORY: 7.0}, max_ms=9_000))
    )
    story.crash_loop(4, CrashClass.OUT_OF_MEMORY)
    assert story.said("crash").level == "critical" and story.said("backoff").fields["crash_reason"] == "out_of_memory"
    story.wait()
    story.up()
    story.crash(CrashClass.OUT_OF_MEMORY)
    said = story.said("oom_storm")
    assert (
        said.level == "critical"
        and "within 60 s" in said.human
        and "smaller model" in said.human
        and said.fields["crash_class"] == "oom_storm"
    )
    assert story.said("backoff").fields["crash_reason"] == "oom_storm"
    assert story.said("backoff").fields["backoff_ms"] == 9_000, "the factor is that of the class it would have had alone"


# --- what is not tried again ----------------------------------------------------------------------------------------------


def test_an_engine_that_can_never_run_is_not_tried_again() -> None:
    story = Failing()
    story.tell(ev.Start(), ev.Staged(1), ev.Spawned(1, 42))
    story.crash(CrashClass.BAD_FLAGS)
    assert story.phase() is Phase.FAILED and story.i.reason == "preload_failed"
    assert "another start would end the same way" in story.said("gave_up").human


def test_what_was_ready_once_is_tried_again_until_it_is_to_run_something_else() -> None:
    story = Failing()
    story.tell(ev.Start())
    story.up()
    story.crash()
    story.wait()
    story.tell(ev.Staged(2), ev.Spawned(2, 42))
    story.crash(CrashClass.ILLEGAL_INSTRUCTION)
    assert story.phase() is Phase.BACKOFF
    story.tell(ev.Stop(), ev.Start(anew=True), ev.Staged(3), ev.Spawned(3, 42))
    story.crash(CrashClass.ILLEGAL_INSTRUCTION)
    assert story.phase() is Phase.FAILED


# --- a drain that cut leases off --------------------------------------------------------------------------------------------


def test_a_drain_that_cut_leases_off_is_an_error_until_the_next_good_start() -> None:
    story = Failing()
    story.tell(ev.Start())
    story.up()
    story.tell(ev.Drain(1000, 2), ev.LeasesChanged(2))
    story.tell(ev.Tick(), after_s=1)
    story.tell(ev.Died(1), ev.Exited(1, code=0))
    error = "drain deadline reached: 2 requests were cut off"
    assert story.phase() is Phase.DOWN and story.i.last_error == error and story.i.history.error == error
    story.tell(ev.Stop())
    assert story.i.last_error == error
    story.tell(ev.Quarantine("Xid 79"), ev.EndQuarantine())
    assert story.i.last_error == error
    story.tell(ev.Start())
    assert story.i.last_error == error
    assert story.i.history.error == error
    story.up()
    assert not story.i.last_error and not story.i.history.error


def test_a_stop_that_cut_a_drain_short_says_so() -> None:
    story = Failing()
    story.tell(ev.Start())
    story.up()
    story.tell(ev.Drain(9000, 1), ev.LeasesChanged(1), ev.Stop(), ev.Died(1), ev.Exited(1, code=0))
    assert story.i.last_error == "stopped while draining: one request was cut off"
    assert story.said("drain_finished").human == f"Pool 'p' has drained; {story.i.last_error}"


def test_a_drain_that_cut_nothing_off_is_no_error() -> None:
    story = Failing()
    story.tell(ev.Start())
    story.up()
    story.tell(ev.Drain(9000, 1), ev.LeasesChanged(0), ev.Died(1), ev.Exited(1, code=0))
    assert (story.phase(), story.i.last_error) == (Phase.DOWN, None)


def test_an_engine_whose_shim_was_told_to_stop_it_by_somebody_starts_again_and_that_is_said() -> None:
    story = Failing()
    story.tell(ev.Start())
    story.up()
    story.tell(ev.Died(1), ev.Exited(1, code=0, stopped=True))
    assert story.phase() is Phase.STAGING and story.i.crash_count == 0
    assert "somebody sent a signal" in str(story.i.last_error)
    assert [say.level for say in story.effects if isinstance(say, do.Say) and say.action == "stopped_outside"] == ["warn"]
    story.up()
    assert story.i.last_error is None


# --- after a restart of the daemon ------------------------------------------------------------------------------------------


def restarted(old: Failing, after_s: float, **kept: Any) -> Failing:
    """The pool under the next daemon, which has the history alone."""
    story = Failing()
    story.now = old.now + after_s
    story.i = replace(PoolState.new("p", epoch=40), history=old.i.history, **kept)
    return story


def test_an_open_breaker_stays_open_for_what_is_left_of_its_time() -> None:
    story = restarted(Failing().opened(), 100, desired=Desired.WANTED)
    story.tell(ev.Start(origin="boot"))
    assert story.phase() is Phase.OPEN and story.i.active.deadline == pytest.approx(story.now + 200)
    assert story.i.reason == "circuit_open" and story.kinds() == []
    story.wait()
    assert story.phase() is Phase.STAGING and story.circuit == "half_open"


def test_a_crash_loop_goes_on_to_be_one_under_the_next_daemon() -> None:
    old = Failing()
    old.crash_loop(4)
    story = restarted(old, 1, desired=Desired.WANTED)
    story.crash_loop(1)
    assert story.phase() is Phase.OPEN


def test_the_next_daemon_waits_for_what_is_left_of_a_backoff_and_counts_the_restart() -> None:
    old = Failing()
    old.crash_loop(2)
    story = restarted(old, 0.03, desired=Desired.WANTED, has_run=True, restart_count=1)
    story.tell(ev.Start(origin="boot"))
    assert story.phase() is Phase.BACKOFF and story.i.active.deadline == pytest.approx(story.now + 0.07)
    story.wait()
    assert story.phase() is Phase.STAGING and story.i.restart_count == 2 and story.i.history.due is None
    late = restarted(old, 5, desired=Desired.WANTED, has_run=True, restart_count=1)
    late.tell(ev.Start(origin="boot"))
    assert late.phase() is Phase.STAGING and late.i.restart_count == 2 and len(late.i.history.restarts) == 2


@pytest.mark.parametrize("request_", [ev.Start(), ev.Start(origin="restart")])
def test_who_asks_for_a_start_does_not_wait_for_an_earlier_daemons_backoff(request_: ev.Event) -> None:
    old = Failing()
    old.crash_loop(2)
    story = restarted(old, 0.03, desired=Desired.WANTED)
    story.tell(request_)
    assert story.phase() is Phase.STAGING


def test_a_stop_ends_the_wait_for_the_next_daemon_too() -> None:
    old = Failing()
    old.crash_loop(2)
    old.tell(ev.Stop())
    story = restarted(old, 0.03, desired=Desired.WANTED)
    story.tell(ev.Start(origin="boot"))
    assert story.phase() is Phase.STAGING


def test_the_limit_on_restarts_holds_over_daemons() -> None:
    old = Failing(replace(PLAIN, restart_limit=RestartRules(max_restarts=1), breaker=BreakerRules(threshold=9)))
    old.crash_loop(2)
    story = restarted(old, 5, desired=Desired.WANTED, has_run=True)
    story.policy = old.policy
    story.tell(ev.Start(origin="boot"))
    assert story.phase() is Phase.BACKOFF and story.i.active.deadline == pytest.approx(old.i.history.restarts[0] + 60)


def test_an_engine_that_is_found_running_is_the_one_start_that_was_let_through() -> None:
    story = restarted(Failing().opened(), 1, desired=Desired.WANTED)
    story.tell(ev.Adopt(7), ev.Adopted(7, story.now - 5), ev.ProbeSucceeded(7))
    assert view(story.i).ready and story.circuit == "half_open"
    story.crash()
    assert story.phase() is Phase.OPEN


def test_an_engine_that_cannot_be_taken_over_does_not_lead_past_the_breaker() -> None:
    story = restarted(Failing().opened(), 1, desired=Desired.WANTED)
    story.tell(ev.Adopt(7), ev.NotAdopted(7, "it is gone"))
    assert story.phase() is Phase.OPEN and "StageArtifacts" not in story.kinds()


# --- invariant 9 over random histories --------------------------------------------------------------------------------------

rules = st.builds(
    Policy,
    warmup=st.just("off"),
    backoff=st.builds(
        BackoffRules, initial_ms=st.integers(0, 3_000), max_ms=st.integers(0, 20_000), min_delay_ms=st.integers(0, 800),
        jitter=st.sampled_from([0.0, 0.1, 1.0]), cuda_multiplier=st.sampled_from([1.0, 2.0, 9.0]),
        reset_after_ms=st.integers(0, 300_000),
    ),
    breaker=st.builds(
        BreakerRules, threshold=st.integers(1, 6), open_ms=st.integers(1, 60_000), close_after_ms=st.integers(0, 60_000)
    ),
    restart_limit=st.builds(
        RestartRules, max_restarts=st.integers(1, 8), window_ms=st.integers(1, 60_000), storm_warn=st.integers(1, 9),
        storm_open=st.integers(1, 12), storm_window_ms=st.integers(1, 60_000), reset_after_ms=st.just(10**9),
    ),
)  # fmt: skip
FAILURES = [CrashClass.PROCESS_EXIT, CrashClass.CUDA, CrashClass.OUT_OF_MEMORY, CrashClass.BAD_MODEL]


class Watched(Failing):
    """A pool that fails by itself, and what invariant 9 says of each of its steps."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.restarts: list[float] = []
        self.by_hand = False
        self.not_before = 0.0

    def tell(self, *events: ev.Event, after_s: float = 0.0) -> list[do.Effect]:
        self.now += after_s
        told: list[do.Effect] = []
        for event in events:
            before = self.i
            self.i, effects = step(before, event, self.now, self.policy)
            validate(self.i, self.now, self.policy)
            self.check(before, effects)
            told += effects
        self.effects = told
        return told

    def check(self, before: PoolState, effects: tuple[do.Effect, ...]) -> None:
        limit, backoff = self.policy.restart_limit, self.policy.backoff
        for said in (effect for effect in effects if isinstance(effect, do.Say)):
            if said.action == "restart":
                self.restarts.append(self.now)
                recent = [t for t in self.restarts if t + limit.window_ms / 1000 > self.now]
                if self.by_hand:
                    continue
                assert len(recent) <= limit.max_restarts, "restarts in any window are within the limit"
                assert self.now >= self.not_before, "an open breaker lets nothing through before its time"
            if said.action == "backoff":
                wait_ms = said.fields["backoff_ms"]
                assert isinstance(wait_ms, int) and wait_ms >= backoff.min_delay_ms
                assert wait_ms <= max(backoff.max_ms, backoff.min_delay_ms)
                least = min(backoff.initial_ms * 2.0 ** min(self.i.history.failures - 1, 10), backoff.max_ms)
                assert wait_ms >= least * (1 - backoff.jitter) - 1
            if said.action == "breaker" and said.fields["new_state"] == "open":
                left_s = said.fields["restart_in_s"]
                assert isinstance(left_s, float)
                self.not_before = self.now + left_s
        was, is_now = before.history.circuit, self.i.history.circuit
        if was is Circuit.OPEN and is_now is Circuit.HALF_OPEN:
            assert sum(isinstance(effect, do.StageArtifacts) for effect in effects) == 1, "exactly one is let through"
        if was is Circuit.OPEN and is_now is Circuit.OPEN:
            assert not any(isinstance(effect, do.StageArtifacts) for effect in effects)


@given(policy=rules, data=st.data())
def test_no_history_of_failures_breaks_the_limits(policy: Policy, data: st.DataObject) -> None:
    story = Watched(policy)
    story.tell(ev.Start())
    for _ in range(data.draw(st.integers(1, 40))):
        story.by_hand = story.phase() is Phase.OPEN and data.draw(st.booleans())
        if story.by_hand:
            story.tell(ev.Start(), after_s=0.5)
        elif story.phase() in (Phase.BACKOFF, Phase.OPEN):
            story.wait()
        story.by_hand = False
        if story.phase() is Phase.STAGING:
            if data.draw(st.integers(0, 5)) == 0:
                story.tell(ev.StagingFailed(story.epoch, "no room"))
                continue
            story.up()
        if story.phase() is Phase.READY:
            for _ in range(3):
                story.tell(ev.Tick(), after_s=data.draw(st.sampled_from([0.0, 0.2, 5.0, 61.0, 301.0])))
                if story.i.active.probe_sent_at is not None:
                    story.tell(ev.ProbeSucceeded(story.epoch))
            story.crash(data.draw(st.sampled_from(FAILURES)))
    assert story.i.history.circuit in Circuit


eighths = st.integers(0, 400).map(lambda n: n * 125)  # of a second: sums of them are exact
exact = st.builds(
    Policy,
    warmup=st.just("off"),
    backoff=st.builds(BackoffRules, initial_ms=eighths, max_ms=eighths, min_delay_ms=st.just(0), jitter=st.just(0.0)),
    breaker=st.builds(BreakerRules, threshold=st.integers(1, 6), open_ms=eighths.map(lambda n: n + 125)),
    restart_limit=st.builds(RestartRules, max_restarts=st.integers(1, 8), window_ms=eighths.map(lambda n: n + 125)),
)


@given(policy=exact, crashes=st.lists(st.sampled_from(FAILURES), min_size=1, max_size=12), shift=st.integers(-900, 10**6))
def test_nothing_depends_on_when_it_is(policy: Policy, crashes: list[CrashClass], shift: int) -> None:
    """The same story at another time of the clock is the same story."""
    told = []
    for start in (1000.0, 1000.0 + shift):
        story = Failing(policy)
        story.now = start
        story.tell(ev.Start())
        said = []
        for crash in crashes:
            while story.phase() in (Phase.BACKOFF, Phase.OPEN):
                story.wait()
            story.up()
            story.crash(crash)
            said += [(e.action, e.fields.get("backoff_ms")) for e in story.effects if isinstance(e, do.Say)]
        told.append(said)
    assert told[0] == told[1]
