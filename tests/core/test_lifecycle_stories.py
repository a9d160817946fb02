"""Whole stories of one engine, told as events and effects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pool_managerd.core.backoff import BackoffRules
from pool_managerd.core.lifecycle import (
    After,
    Desired,
    Phase,
    Policy,
    PoolState,
    next_timer,
    sleeps_evicted,
    step,
    validate,
    view,
)
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.serving import SILENT_PROBES_PER_S

POLICY = Policy(backoff=BackoffRules(initial_ms=1000, jitter=0.0))


class Story:
    """Feeds events to one instance at a time that only moves when told to."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.policy, self.now, self.i = policy, 1000.0, PoolState.new("p")
        self.effects: list[do.Effect] = []

    def tell(self, *events: ev.Event, after_s: float = 0.0) -> list[do.Effect]:
        self.now += after_s
        self.effects = []
        for event in events:
            self.i, effects = step(self.i, event, self.now, self.policy)
            validate(self.i, self.now, self.policy)
            self.effects += effects
        return self.effects

    def until_ready(self) -> Story:
        n = self.i.active.epoch + 1
        self.tell(ev.Start(), ev.Staged(n), ev.Spawned(n, 42), ev.ProbeSucceeded(n), ev.WarmedUp(n))
        assert self.phase() is Phase.READY
        return self

    def phase(self) -> Phase:
        return self.i.active.phase

    def kinds(self) -> list[str]:
        return [type(effect).__name__ for effect in self.effects if not isinstance(effect, do.Say)]

    def said(self, action: str) -> do.Say:
        return next(effect for effect in self.effects if isinstance(effect, do.Say) and effect.action == action)


def test_a_start_reserves_before_it_stages_and_writes_the_pid_before_it_probes() -> None:
    story = Story()
    story.tell(ev.Start())
    assert story.kinds() == ["StageArtifacts"]
    story.tell(ev.Staged(1))
    assert story.kinds() == ["SpawnEngine"]
    story.tell(ev.Spawned(1, 42))
    assert story.kinds() == ["WritePid", "SendProbe"]
    assert view(story.i).live and not view(story.i).ready


def test_start_up_probes_come_fast_at_first_and_never_slower_than_the_interval() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1), ev.Spawned(1, 42))
    gaps = []
    for _ in range(20):
        story.tell(ev.ProbeFailed(1, "answered 503"))
        assert story.i.active.next_probe_at is not None
        gaps.append(story.i.active.next_probe_at - story.now)
        story.tell(ev.Tick(), after_s=gaps[-1])
    assert gaps[0] < 0.01
    assert gaps == sorted(gaps)
    story.tell(ev.ProbeFailed(1, "answered 503"), after_s=60)
    assert story.i.active.next_probe_at is not None
    assert story.i.active.next_probe_at - story.now == pytest.approx(POLICY.probe_gap_ms / 1000)


def test_the_first_good_probe_leads_to_the_warm_up_and_then_to_ready() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1), ev.Spawned(1, 42), ev.ProbeSucceeded(1))
    assert story.phase() is Phase.WARMING and not view(story.i).ready
    story.tell(ev.WarmedUp(1), after_s=0.5)
    assert view(story.i).ready
    assert story.kinds() == ["Announce"]
    assert story.said("preload_succeeded").fields["duration_ms"] == 500


def test_a_failed_warm_up_only_warns() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.WarmupFailed(1, "no token"))
    assert view(story.i).ready
    assert story.said("warmup_failed").level == "warn"


def test_an_engine_that_is_not_warmable_is_ready_with_its_first_good_probe() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, warmable=False), ev.Spawned(1, 42), ev.ProbeSucceeded(1))
    assert view(story.i).ready


def test_an_engine_that_exits_while_starting_fails_at_once_with_its_exit_code() -> None:
    story = Story()
    story.tell(ev.Start(retry=False), ev.Staged(1), ev.Spawned(1, 42), ev.Died(1))
    assert not view(story.i).live
    story.tell(ev.Exited(1, code=3, summary="exit_code=3"))
    assert story.phase() is Phase.FAILED and story.i.reason == "preload_failed"
    assert "health check failed" in str(story.i.last_error) and "code 3" in str(story.i.last_error)


def test_a_submitted_engine_that_was_ready_once_is_supervised_like_any_other() -> None:
    story = Story()
    story.tell(ev.Start(retry=False), ev.Staged(1, warmable=False), ev.Spawned(1, 42), ev.ProbeSucceeded(1))
    for n in (1, 2):
        story.tell(ev.Died(n), ev.Exited(n, code=1, summary="exit_code=1"))
        assert story.phase() is Phase.BACKOFF, "also when a restart fails before it is ready"
        story.tell(ev.Tick(), after_s=10)
        story.tell(ev.Staged(n + 1, warmable=False), ev.Spawned(n + 1, 42))


def test_a_configured_pool_tries_again_after_a_failed_start() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1), ev.Spawned(1, 42), ev.Died(1), ev.Exited(1, code=3, summary="exit_code=3"))
    assert story.phase() is Phase.BACKOFF
    story.tell(ev.Tick(), after_s=1.1)
    assert story.phase() is Phase.STAGING and story.i.active.epoch == 2


def test_an_engine_that_never_becomes_healthy_is_stopped_at_the_deadline() -> None:
    story = Story()
    story.tell(ev.Start(retry=False), ev.Staged(1), ev.Spawned(1, 42), ev.ProbeFailed(1, "answered 503"))
    story.tell(ev.Tick(), after_s=POLICY.startup_timeout_s)
    assert story.kinds() == ["StopEngine", "ReportCrash"]
    story.tell(ev.Died(1), ev.Exited(1, signal=15))
    assert story.phase() is Phase.FAILED
    assert "health check failed" in str(story.i.last_error) and "answered 503" in str(story.i.last_error)
    assert story.i.crash_count == 1, "it has a crash report: the count says the same"


def test_a_crash_is_noticed_before_its_cause_is_known_and_comes_back_with_backoff() -> None:
    story = Story().until_ready()
    story.tell(ev.Died(1), after_s=10)
    assert story.kinds() == ["Withdraw", "EndLeases"] and "is gone" in story.said("died").human
    assert not view(story.i).live and not view(story.i).ready
    story.tell(ev.Exited(1, signal=9, summary="signal SIGKILL"))
    assert story.phase() is Phase.BACKOFF and story.i.crash_count == 1 and story.i.last_error == "signal SIGKILL"
    crash, wait = story.said("crash"), story.said("backoff")
    assert crash.fields["exit_code"] is None and crash.fields["uptime_seconds"] == 10
    assert wait.fields["backoff_ms"] == 1000 and wait.fields["crash_count"] == 1
    story.tell(ev.Tick(), after_s=1.0)
    assert story.phase() is Phase.STAGING and story.i.restart_count == 1


def test_backoff_grows_with_crashes_in_a_row_and_starts_over_after_a_stable_run() -> None:
    story = Story()
    delays = []
    story.until_ready()
    for run_s in (1, 1, 1, POLICY.backoff.reset_after_ms / 1000):
        n = story.i.active.epoch
        story.tell(ev.Died(n), ev.Exited(n, signal=11, summary="signal SIGSEGV"), after_s=run_s)
        delays.append(story.said("backoff").fields["backoff_ms"])
        n += 1
        story.tell(ev.Tick(), after_s=100)
        story.tell(ev.Staged(n), ev.Spawned(n, 42), ev.ProbeSucceeded(n), ev.WarmedUp(n))
    assert delays == [1000, 2000, 4000, 1000]


def test_exit_code_0_of_an_engine_that_may_end_is_graceful_and_not_restarted() -> None:
    story = Story().until_ready()
    story.tell(ev.Died(1), ev.Exited(1, code=0, graceful=True))
    assert story.phase() is Phase.DOWN and story.i.crash_count == 0 and story.i.last_error is None
    assert view(story.i).state == "offline"


@pytest.mark.parametrize(
    ("restart", "code", "phase"), [("always", 0, Phase.BACKOFF), ("never", 1, Phase.FAILED), ("never", 0, Phase.DOWN)]
)
def test_the_restart_policy_decides_what_follows_an_exit(restart: str, code: int, phase: Phase) -> None:
    story = Story(replace(POLICY, restart=restart)).until_ready()
    story.tell(ev.Died(1), ev.Exited(1, code=code, summary=f"exit_code={code}", graceful=code == 0))
    assert story.phase() is phase


def test_a_lost_race_for_the_port_is_started_again_at_once_but_not_forever() -> None:
    story = Story()
    story.tell(ev.Start())
    for n in range(1, POLICY.port_retries + 1):
        story.tell(ev.Staged(n), ev.Spawned(n, 42), ev.Died(n), ev.Exited(n, code=1, summary="exit_code=1", port_conflict=True))
        assert story.phase() is Phase.STAGING and story.i.active.epoch == n + 1 and story.i.crash_count == 0
    n = story.i.active.epoch
    story.tell(ev.Staged(n), ev.Spawned(n, 42), ev.Died(n), ev.Exited(n, code=1, summary="exit_code=1", port_conflict=True))
    assert story.phase() is Phase.BACKOFF and story.i.crash_count == 1


def test_a_hung_engine_is_replaced_after_the_threshold_of_missed_probes() -> None:
    story = Story().until_ready()
    for _ in range(POLICY.failure_threshold - 1):
        story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
        story.tell(ev.ProbeFailed(1, "had no answer within 2 s"), after_s=2)
        assert view(story.i).ready, "one miss is not a failure"
    story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
    story.tell(ev.ProbeFailed(1, "had no answer within 2 s"), after_s=2)
    assert not view(story.i).ready and story.kinds() == ["StopEngine", "ReportCrash"]
    story.tell(ev.Died(1), ev.Exited(1, signal=9))
    assert story.phase() is Phase.BACKOFF and "health check failed" in str(story.i.last_error) and story.i.crash_count == 1


def test_in_dev_a_hung_engine_is_left_running_and_may_come_back() -> None:
    story = Story(replace(POLICY, fail_open=True)).until_ready()
    for _ in range(POLICY.failure_threshold):
        story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
        story.tell(ev.ProbeFailed(1, "was refused"))
    assert story.phase() is Phase.READY and not view(story.i).ready and view(story.i).live
    story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
    story.tell(ev.ProbeSucceeded(1))
    assert view(story.i).ready


def test_misses_around_a_pause_of_our_own_process_are_not_held_against_the_engine() -> None:
    story = Story().until_ready()
    for _ in range(POLICY.failure_threshold + 2):
        story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
        story.tell(ev.ProbeFailed(1, "was reset"), after_s=60)
    assert view(story.i).ready


def test_drain_waits_for_leases_and_stops_when_the_last_one_ends() -> None:
    story = Story().until_ready()
    story.tell(ev.Drain(30_000, 2))
    assert view(story.i).draining and view(story.i).live and not view(story.i).ready
    story.tell(ev.LeasesChanged(1), after_s=1)
    assert story.phase() is Phase.DRAINING
    story.tell(ev.LeasesChanged(0), after_s=1)
    assert story.kinds() == ["StopEngine"]
    story.tell(ev.Died(1), ev.Exited(1, code=0))
    assert story.said("drain_finished").fields == {"force_stopped": False, "duration_ms": 2000, "final_lease_count": 0}
    assert story.phase() is Phase.DOWN and story.i.desired.stays_down and not view(story.i).draining


def test_drain_stops_by_force_at_its_deadline() -> None:
    story = Story().until_ready()
    story.tell(ev.Drain(1_000, 2))
    story.tell(ev.Tick(), after_s=1.0)
    story.tell(ev.Died(1), ev.Exited(1, signal=15))
    assert story.said("drain_finished").fields == {"force_stopped": True, "duration_ms": 1000, "final_lease_count": 2}
    assert story.i.crash_count == 0


def test_a_drain_without_leases_completes_at_once() -> None:
    story = Story().until_ready()
    story.tell(ev.Drain(30_000, 0))
    assert "StopEngine" in story.kinds()


def test_a_drain_of_a_pool_that_is_being_staged_cancels_that_once() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Drain(30_000, 0))
    assert story.kinds() == ["StageArtifacts", "CancelStaging", "Withdraw", "EndLeases", "ReleaseVram"]
    assert story.phase() is Phase.DOWN and story.i.desired is Desired.DRAINED


def test_a_crash_during_a_drain_ends_it_and_nothing_restarts() -> None:
    story = Story().until_ready()
    story.tell(ev.Drain(30_000, 1), ev.Died(1), ev.Exited(1, signal=11, summary="signal SIGSEGV"))
    assert story.phase() is Phase.DOWN and story.i.crash_count == 1 and story.i.desired.stays_down
    assert story.said("drain_finished").fields["force_stopped"] is False


def test_undrain_brings_a_healthy_engine_back_at_once() -> None:
    story = Story().until_ready()
    story.tell(ev.Drain(30_000, 1), ev.Undrain())
    assert view(story.i).ready and not view(story.i).draining


def spawning() -> Story:
    """Its engine is being launched: whether it runs is not known yet."""
    story = Story()
    story.tell(ev.Start(), ev.Staged(1))
    return story


@pytest.mark.parametrize("asked", [ev.Stop(), ev.CancelStart(), ev.Drain(0, 0)], ids=lambda event: type(event).__name__)
def test_a_stop_during_the_launch_is_done_when_the_engine_that_came_up_has_ended(asked: ev.Event) -> None:
    story = spawning()
    story.tell(asked)
    assert story.phase() is Phase.STOPPING and "ReleaseVram" not in story.kinds()
    story.tell(ev.Spawned(1, 42))
    assert story.kinds() == ["KillEngine"] and story.phase() is Phase.STOPPING
    story.tell(ev.Exited(1, signal=9))
    assert story.phase() is Phase.DOWN and story.i.desired.stays_down and story.i.crash_count == 0


@pytest.mark.parametrize("news", [ev.SpawnFailed(1, "no such file"), ev.HelperDied(1, "the launch ended unexpectedly")])
def test_a_stop_during_a_launch_that_comes_to_nothing_is_done_then(news: ev.Event) -> None:
    story = spawning()
    story.tell(ev.Stop(), news)
    assert story.phase() is Phase.DOWN and "ReleaseVram" in story.kinds() and story.i.history.failures == 0


def test_a_launch_of_which_nothing_is_heard_does_not_hold_up_its_stop_for_ever() -> None:
    story = spawning()
    story.tell(ev.Stop())
    story.tell(ev.Tick(), after_s=POLICY.kill_wait_s)
    assert story.phase() is Phase.DOWN and "CancelStaging" in story.kinds()
    story.tell(ev.Spawned(1, 42))
    assert story.kinds() == ["KillEngine"] and story.phase() is Phase.STOPPING


def test_an_engine_that_was_never_launched_is_not_called_unhealthy() -> None:
    story = spawning()
    story.tell(ev.Tick(), after_s=POLICY.startup_timeout_s)
    story.tell(ev.Tick(), after_s=POLICY.kill_wait_s)
    assert story.phase() is Phase.BACKOFF and story.i.last_error is not None
    assert "ReportCrash" not in story.kinds()
    assert story.i.last_error.startswith("cannot launch the engine: nothing was heard of its launch for 2 min")


def test_a_restart_during_the_launch_starts_again_only_when_the_first_engine_has_ended() -> None:
    story = spawning()
    story.tell(ev.Restart(), ev.Spawned(1, 42))
    assert story.i.active.epoch == 1 and "KillEngine" in story.kinds()
    story.tell(ev.Died(1), ev.Exited(1, signal=9))
    assert story.phase() is Phase.STAGING and story.i.active.epoch == 2


def test_an_engine_that_ignores_sigterm_is_killed_and_one_that_survives_that_is_reported() -> None:
    story = Story().until_ready()
    story.tell(ev.Stop())
    story.tell(ev.Tick(), after_s=POLICY.stop_grace_ms / 1000 + POLICY.kill_wait_s)
    assert story.kinds() == ["KillEngine"]
    story.tell(ev.Tick(), after_s=POLICY.kill_wait_s)
    assert story.phase() is Phase.FAILED and story.i.reason == "stop_failed" and story.i.active.has_process
    story.tell(ev.Start())
    assert isinstance(story.effects[0], do.Refuse)
    story.tell(ev.Exited(1, signal=9))
    assert not story.i.active.has_process


def test_down_waits_until_the_memory_is_seen_free() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, uses_gpus=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.WarmedUp(1))
    story.tell(ev.Stop(), ev.Died(1), ev.Exited(1, code=0))
    assert story.phase() is Phase.STOPPING and "AwaitVram" in story.kinds()
    story.tell(ev.VramFree(1))
    assert story.phase() is Phase.DOWN and "ReleaseVram" in story.kinds()


def gpu_story_stopping() -> Story:
    """A GPU pool whose process has just been reaped on request."""
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, uses_gpus=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.WarmedUp(1))
    story.tell(ev.Stop(), ev.Exited(1, code=0))
    return story


def test_memory_that_is_not_given_back_fails_the_pool_and_keeps_its_promise() -> None:
    story = gpu_story_stopping()
    story.tell(ev.VramHeld(1, "it is held by pid 77 (leftover)"))
    assert story.phase() is Phase.FAILED and story.i.reason == "vram_held"
    assert "pid 77 (leftover)" in str(story.i.last_error) and "ReleaseVram" not in story.kinds()


def test_memory_that_is_seen_free_late_completes_the_stop() -> None:
    story = gpu_story_stopping()
    story.tell(ev.VramHeld(1, "pid 77"), ev.VramFree(1))
    assert story.phase() is Phase.DOWN and "ReleaseVram" in story.kinds()


def test_held_memory_that_is_free_again_is_no_reason_any_more_whatever_follows() -> None:
    story = gpu_story_stopping_unasked()
    story.tell(ev.Exited(1, signal=9), ev.VramHeld(1, "pid 77"), ev.VramFree(1))
    assert story.phase() is Phase.BACKOFF and story.i.reason is None and "SIGKILL" in str(story.i.last_error)


def test_a_process_that_survived_its_kill_and_ended_later_leaves_no_reason_behind() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, uses_gpus=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.WarmedUp(1), ev.Stop())
    story.tell(ev.Tick(), after_s=60)
    story.tell(ev.Tick(), after_s=60)
    assert story.i.reason == "stop_failed"
    story.tell(ev.Exited(1, signal=9), ev.VramFree(1))
    assert story.phase() is Phase.DOWN and not story.i.reason and not story.i.last_error


def test_a_start_that_is_owed_happens_when_the_quarantine_ended_while_the_late_process_was_stopped() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, uses_gpus=True), ev.Quarantine("GPU 0 is lost", True), ev.Spawned(1, 77))
    assert story.phase() is Phase.STOPPING
    story.tell(ev.EndQuarantine(), ev.Exited(1, signal=15), ev.VramFree(1))
    assert story.phase() is Phase.STAGING and story.i.active.epoch == 2


def test_a_start_that_is_owed_happens_when_the_hold_ended_while_an_engine_that_came_up_late_was_ended() -> None:
    story = spawning()
    story.tell(ev.SpawnFailed(1, "no answer"), ev.Hold())
    story.tell(ev.Tick(), ev.Spawned(1, 77), after_s=1)
    assert story.phase() is Phase.STOPPING and story.i.pending_start
    story.tell(ev.Release(), ev.Exited(1, signal=9))
    assert story.phase() is Phase.STAGING and story.i.active.epoch == 2


@pytest.mark.parametrize(("bar", "lift"), [(ev.Hold(), ev.Release()), (ev.Quarantine("Xid 48"), ev.EndQuarantine())])
def test_a_hold_or_a_quarantine_that_ends_soon_does_not_cut_the_backoff_short_nor_forget_the_crash(
    bar: ev.Event, lift: ev.Event
) -> None:
    for crash_first in (True, False):
        story = Story().until_ready()
        crash = (ev.Died(1), ev.Exited(1, signal=9))
        story.tell(*(*crash, bar) if crash_first else (bar, *crash))
        story.tell(lift)
        assert story.phase() is Phase.BACKOFF and "SIGKILL" in str(story.i.last_error)
        story.tell(ev.Tick(), after_s=60)
        assert story.phase() is Phase.STAGING


def test_an_engine_whose_gpu_was_lost_has_not_failed_and_starts_when_the_gpu_is_back() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, uses_gpus=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.WarmedUp(1))
    story.tell(ev.Quarantine("GPU 0 is lost", lost=True), ev.Exited(1, signal=15), ev.VramFree(1))
    assert story.phase() is Phase.DOWN and story.i.pending_start and story.i.history.failures == 0
    assert story.i.last_error == "GPU 0 is lost"
    story.tell(ev.EndQuarantine())
    assert story.phase() is Phase.STAGING and story.i.last_error is None


def test_a_stop_of_a_pool_with_held_memory_waits_for_it_again() -> None:
    story = gpu_story_stopping()
    story.tell(ev.VramHeld(1, "pid 77"), ev.Stop())
    assert story.phase() is Phase.STOPPING and story.kinds() == ["AwaitVram"]
    story.tell(ev.Drain(1000, 0))
    assert story.phase() is Phase.STOPPING


def test_a_stop_of_a_pool_whose_memory_was_held_after_a_crash_keeps_it_down() -> None:
    story = gpu_story_stopping_unasked()
    story.tell(ev.Exited(1, code=1, summary="exit_code=1"), ev.VramHeld(1, "pid 7"), ev.Stop(), ev.VramFree(1))
    assert story.phase() is Phase.DOWN and story.i.desired is Desired.STOPPED


def test_an_engine_that_came_up_although_its_launch_had_failed_is_ended_and_the_wait_goes_on() -> None:
    story = spawning()
    story.tell(ev.SpawnFailed(1, "no answer"), ev.Spawned(1, 42))
    assert story.phase() is Phase.STOPPING and story.kinds()[-1] == "KillEngine"
    story.tell(ev.Exited(1, signal=9))
    assert story.phase() is Phase.BACKOFF and story.i.last_error == "no answer" and story.i.crash_count == 0


def test_a_submitted_engine_that_is_asked_for_during_a_stop_is_not_tried_twice() -> None:
    story = Story().until_ready()
    story.tell(ev.Stop(), ev.Start(retry=False), ev.Exited(1, signal=15), ev.StagingFailed(2, "no disk"))
    assert story.phase() is Phase.FAILED


def test_a_submitted_engine_whose_gpu_is_lost_during_its_launch_is_not_started_again() -> None:
    story = Story()
    story.tell(ev.Start(retry=False), ev.Staged(1), ev.Quarantine("GPU 0 is lost", lost=True), ev.SpawnFailed(1, "no"))
    assert story.phase() is Phase.DOWN and not story.i.pending_start
    story.tell(ev.EndQuarantine())
    assert story.phase() is Phase.DOWN


def test_a_death_whose_record_is_still_to_come_does_not_count_as_held_memory() -> None:
    story = gpu_story_stopping_unasked()
    story.tell(ev.Tick(), after_s=story.policy.kill_wait_s + 0.1)
    assert story.phase() is Phase.STOPPING and not story.i.active.vram_pending


def gpu_story_stopping_unasked() -> Story:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, uses_gpus=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.WarmedUp(1), ev.Died(1))
    return story


def test_an_engine_on_a_lost_gpu_is_ended_and_its_start_waits_for_the_gpu() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, uses_gpus=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.WarmedUp(1))
    story.tell(ev.Quarantine("GPU 0 is lost", lost=True))
    assert story.phase() is Phase.STOPPING and not view(story.i).ready
    story.tell(ev.Exited(1, signal=9), ev.VramFree(1))
    assert story.phase() is Phase.DOWN and story.i.pending_start
    story.tell(ev.EndQuarantine())
    assert story.phase() is Phase.STAGING and story.i.active.epoch == 2


def test_a_quarantine_without_loss_only_takes_readiness_away() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, uses_gpus=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.WarmedUp(1))
    story.tell(ev.Quarantine("a row remap waits for a reset"))
    assert story.phase() is Phase.READY and not view(story.i).ready
    story.tell(ev.EndQuarantine())
    assert view(story.i).ready and story.i.last_error is None


def test_a_quarantine_cancels_a_start_that_has_no_process_yet() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, uses_gpus=True), ev.Quarantine("GPU 0 is lost", lost=True))
    story.tell(ev.Spawned(1, 42))
    assert story.phase() is Phase.STOPPING and "KillEngine" in story.kinds()
    story.tell(ev.Exited(1, signal=9), ev.VramFree(1))
    assert story.phase() is Phase.DOWN and story.i.pending_start
    story.tell(ev.EndQuarantine())
    assert story.phase() is Phase.STAGING


def test_restart_stops_and_starts_and_counts() -> None:
    story = Story().until_ready()
    story.tell(ev.Restart(), ev.Died(1), ev.Exited(1, code=0))
    assert story.phase() is Phase.STAGING and story.i.active.epoch == 2 and story.i.restart_count == 1


def test_a_held_pool_does_not_restart_until_it_is_released() -> None:
    story = Story().until_ready()
    story.tell(ev.Hold(), ev.Died(1), ev.Exited(1, signal=9))
    assert story.phase() is Phase.BACKOFF
    story.tell(ev.Tick(), after_s=60)
    assert story.phase() is Phase.DOWN and story.i.pending_start
    story.tell(ev.Start())
    assert story.effects == [do.Refuse("POOL_HELD", "cannot start pool 'p': it is held; release it first")]
    story.tell(ev.Release())
    assert story.phase() is Phase.STAGING


def test_an_external_engine_is_probed_and_never_signalled() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, external=True))
    assert story.kinds()[-1:] == ["SendProbe"] and "SpawnEngine" not in story.kinds()
    assert view(story.i).state == "starting" and not view(story.i).live
    story.tell(ev.ProbeSucceeded(1))
    assert view(story.i).ready and view(story.i).live
    for _ in range(POLICY.failure_threshold):
        story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
        story.tell(ev.ProbeFailed(1, "was refused"))
    assert not view(story.i).ready and story.phase() is Phase.ATTACHED
    story.tell(ev.Stop())
    assert "StopEngine" not in story.kinds() and story.phase() is Phase.DOWN


def test_a_quarantined_gpu_makes_its_pool_unready_and_forbids_new_starts() -> None:
    story = Story().until_ready()
    story.tell(ev.Quarantine("Xid 79"))
    assert not view(story.i).ready and view(story.i).live
    story.tell(ev.Stop(), ev.Died(1), ev.Exited(1, code=0), ev.Start())
    assert isinstance(story.effects[-1], do.Refuse)


def test_the_next_timer_is_data() -> None:
    story = Story()
    assert next_timer(story.i, POLICY) is None
    story.tell(ev.Start())
    assert next_timer(story.i, POLICY) == story.now + POLICY.staging_stall_s


def test_a_stop_is_not_undone_by_a_lost_race_for_the_port() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1), ev.Spawned(1, 42), ev.Died(1), ev.Stop())
    story.tell(ev.Exited(1, code=1, summary="exit_code=1", port_conflict=True))
    assert story.phase() is Phase.DOWN


def test_a_process_that_comes_after_its_start_up_deadline_does_not_end_the_retries() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1))
    story.tell(ev.Tick(), after_s=POLICY.startup_timeout_s)
    story.tell(ev.Tick(), after_s=POLICY.kill_wait_s)
    assert story.phase() is Phase.BACKOFF
    story.tell(ev.Spawned(1, 42))
    assert story.kinds() == ["KillEngine"]
    story.tell(ev.Exited(1, signal=9))
    assert story.phase() is Phase.BACKOFF


def test_ready_is_not_shown_on_the_word_of_an_old_probe() -> None:
    """The prober has no descriptors left: after a while nothing is known of the engine any more."""
    story = Story().until_ready()
    for _ in range(int(POLICY.fresh_s / POLICY.probe_interval_s) + 2):
        story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
        story.tell(ev.ProbeDiscarded(1))
    assert not view(story.i).ready and "no probe could be sent" in str(story.i.last_error)
    story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
    story.tell(ev.ProbeSucceeded(1))
    assert view(story.i).ready and story.i.last_error is None


def test_ready_is_not_shown_where_some_probes_failed_and_the_others_were_never_sent() -> None:
    """None of both alone is enough to say so, and what was good is long ago."""
    story = Story().until_ready()
    for _ in range(int(POLICY.fresh_s / POLICY.probe_interval_s)):
        story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
        story.tell(ev.ProbeDiscarded(1))
    assert view(story.i).ready
    story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
    story.tell(ev.ProbeFailed(1, "had no answer within 2 s"))
    assert story.i.active.probe_failures == 1 and story.phase() is Phase.READY
    assert not view(story.i).ready and "no good probe, the last one had no answer within 2 s" in str(story.i.last_error)
    story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
    story.tell(ev.ProbeSucceeded(1))
    assert view(story.i).ready and story.i.last_error is None


@pytest.mark.parametrize("under_way", [True, False])
def test_after_a_gap_in_our_own_time_a_probe_that_cannot_be_sent_makes_nobody_unready(under_way: bool) -> None:
    """The daemon was frozen for long, with a probe under way or not, and is slow for a moment more."""
    story = Story().until_ready()
    if under_way:
        story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
        story.tell(ev.ProbeDiscarded(1), after_s=10 * POLICY.fresh_s)
        story.tell(ev.Tick())
    else:
        story.tell(ev.Tick(), after_s=10 * POLICY.fresh_s)
    story.tell(ev.ProbeDiscarded(1), after_s=1)
    assert view(story.i).ready and story.i.last_error is None


def test_a_held_pool_that_runs_is_not_taken_down_by_a_restart() -> None:
    story = Story().until_ready()
    story.tell(ev.Hold(), ev.Restart())
    assert isinstance(story.effects[-1], do.Refuse) and story.phase() is Phase.READY


def test_a_server_that_ends_unasked_has_failed_whatever_its_exit_code_says() -> None:
    story = Story().until_ready()
    story.tell(ev.Died(1), ev.Exited(1, code=0, summary="exit_code=0"))
    assert story.phase() is Phase.BACKOFF and story.i.crash_count == 1 and story.i.last_error == "exit_code=0"
    assert story.said("crash").fields["exit_code"] == 0


@pytest.mark.parametrize(
    ("restart", "phase"), [("never", Phase.FAILED), ("always", Phase.BACKOFF), ("on-failure", Phase.BACKOFF)]
)
def test_the_restart_policy_says_what_follows_a_servers_unasked_exit_0(restart: str, phase: Phase) -> None:
    story = Story(replace(POLICY, restart=restart)).until_ready()
    story.tell(ev.Died(1), ev.Exited(1, code=0, summary="exit_code=0"))
    assert story.phase() is phase and story.i.crash_count == 1


def test_a_start_while_the_engine_is_being_stopped_follows_the_stop_and_is_no_restart() -> None:
    story = Story().until_ready()
    story.tell(ev.Stop())
    assert story.tell(ev.Start()) == []
    story.tell(ev.Died(1), ev.Exited(1, code=0))
    assert (
        story.phase() is Phase.STAGING and story.i.active.epoch == 2 and story.i.restart_count == 0 and story.i.crash_count == 0
    )


def test_the_last_request_wins_while_an_engine_is_being_stopped() -> None:
    story = Story().until_ready()
    story.tell(ev.Stop(), ev.Start(), ev.Stop(), ev.Died(1), ev.Exited(1, code=0))
    assert story.phase() is Phase.DOWN and story.i.desired.stays_down


def test_demand_does_not_hasten_the_restart_of_an_engine_that_keeps_failing() -> None:
    story = Story().until_ready()
    story.tell(ev.Died(1))
    assert story.tell(ev.Start(origin="demand")) == []
    story.tell(ev.Exited(1, signal=11))
    assert story.i.active.deadline is not None
    assert story.tell(ev.Start(origin="demand")) == [], "it waits"
    story.tell(ev.Start())
    assert story.phase() is Phase.STAGING, "a person's request does not wait"


def test_a_second_drain_waits_for_the_same_end_and_the_earlier_deadline_holds() -> None:
    story = Story().until_ready()
    story.tell(ev.Drain(60_000, 1))
    story.tell(ev.Drain(10_000, 1))
    assert story.i.active.deadline == story.now + 10
    story.tell(ev.Drain(90_000, 1))
    assert story.i.active.deadline == story.now + 10
    story.tell(ev.Drain(0, 1))
    assert story.phase() is Phase.STOPPING and story.i.active.force_stopped


def test_a_drain_while_the_engine_is_restarting_keeps_it_down() -> None:
    story = Story().until_ready()
    story.tell(ev.Restart(), ev.Drain(1_000, 0), ev.Died(1), ev.Exited(1, code=0))
    assert story.phase() is Phase.DOWN and story.i.desired.stays_down
    assert story.said("drain_finished").fields["final_lease_count"] == 0


def test_two_callers_may_cancel_one_start() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1), ev.Spawned(1, 42))
    story.tell(ev.CancelStart())
    assert story.tell(ev.CancelStart()) == []
    story.tell(ev.Died(1), ev.Exited(1, signal=15))
    assert story.phase() is Phase.DOWN
    assert [type(e) for e in story.tell(ev.CancelStart())] == [do.Refuse]


def test_an_attached_engine_that_nobody_answers_for_says_so_at_the_first_probe() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, external=True), ev.ProbeFailed(1, "was refused: connection refused"))
    assert story.i.last_error == "health check failed: nothing healthy answers; the last probe was refused: connection refused"
    [refused] = story.tell(ev.Start(join=False))
    assert isinstance(refused, do.Refuse)
    assert "not ready: health check failed" in refused.message
    story.tell(ev.ProbeSucceeded(1))
    assert view(story.i).ready, story.i.last_error


@pytest.mark.parametrize(("silent", "gap_s"), [(1, POLICY.probe_gap_ms / 1000), (1_000, 1_000 / SILENT_PROBES_PER_S)])
def test_external_engines_that_do_not_answer_are_asked_so_often_all_together(silent: int, gap_s: float) -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, external=True))
    for _ in range(3):
        story.tell(ev.ProbeFailed(1, "was refused", silent=silent))
        assert story.i.active.next_probe_at == pytest.approx(story.now + gap_s)
        story.tell(ev.Tick(), after_s=gap_s)
    story.tell(ev.ProbeSucceeded(1))
    assert view(story.i).ready


# --- what is wanted -------------------------------------------------------------------------------------------------


def test_what_is_wanted_tells_who_wanted_it_last() -> None:
    story = Story()
    seen = [story.i.desired]
    story.until_ready()
    seen.append(story.i.desired)
    for events in (
        (ev.Evict(), ev.Died(1), ev.Exited(1, code=0)),
        (ev.Start(origin="demand"),),
        (ev.Stop(),),
        (ev.Start(),),
        (ev.Drain(0, 0),),
    ):
        story.tell(*events)
        seen.append(story.i.desired)
    assert [desired.value for desired in seen] == [
        "on_demand", "wanted", "evicted", "wanted", "stopped", "wanted", "drained",
    ]  # fmt: skip


@pytest.mark.parametrize("stop", [ev.Stop(), ev.Drain(1000, 0)], ids=["stopped", "drained"])
def test_demand_does_not_start_what_a_person_stopped(stop: ev.Event) -> None:
    story = Story().until_ready()
    story.tell(stop, ev.Died(1), ev.Exited(1, code=0))
    (refused,) = story.tell(ev.Start(origin="demand"))
    assert isinstance(refused, do.Refuse) and refused.code == "POOL_STOPPED"
    story.tell(ev.Start())
    assert story.phase() is Phase.STAGING


def test_an_evicted_pool_starts_again_on_demand_and_an_eviction_waits_for_nobody_and_cuts_nobody_off() -> None:
    story = Story().until_ready()
    (refused,) = story.tell(ev.Evict(active_leases=1))
    assert isinstance(refused, do.Refuse) and refused.code == "POOL_IN_USE" and story.phase() is Phase.READY
    story.tell(ev.Evict())
    assert story.kinds() == ["StopEngine"]
    story.tell(ev.Died(1), ev.Exited(1, code=0))
    assert story.phase() is Phase.DOWN and story.i.crash_count == 0
    story.tell(ev.Start(origin="demand"))
    assert story.phase() is Phase.STAGING and story.i.active.epoch == 2


def test_an_eviction_does_not_change_what_a_person_has_said() -> None:
    story = Story().until_ready()
    story.tell(ev.Stop(), ev.Evict(), ev.Died(1), ev.Exited(1, code=0))
    assert story.i.desired is Desired.STOPPED


def test_a_backoff_that_is_evicted_is_not_started_by_itself_any_more() -> None:
    story = Story().until_ready()
    story.tell(ev.Died(1), ev.Exited(1, code=3))
    assert story.phase() is Phase.BACKOFF
    story.tell(ev.Evict())
    assert story.phase() is Phase.DOWN and next_timer(story.i, POLICY) is None


def test_what_holds_no_room_is_not_evicted() -> None:
    story = Story()
    story.tell(ev.Start(retry=False), ev.StagingFailed(1, "no model", retriable=False))
    assert story.phase() is Phase.FAILED
    assert story.tell(ev.Evict()) == [] and story.phase() is Phase.FAILED and story.i.last_error == "no model"


def test_a_launch_that_this_daemon_slept_through_keeps_its_memory_until_its_engine_has_ended() -> None:
    """It was stopped with SIGSTOP, say: the deadline is over before the word of the spawn, which waits in the inbox, is read."""
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, uses_gpus=True))
    story.tell(ev.Tick(), after_s=POLICY.startup_timeout_s + 60)
    assert story.phase() is Phase.STOPPING and "ReleaseVram" not in story.kinds()
    story.tell(ev.Spawned(1, 42))
    assert story.kinds() == ["KillEngine"]
    story.tell(ev.Exited(1, signal=9), ev.VramFree(1))
    assert story.phase() is Phase.BACKOFF and "ReleaseVram" in story.kinds() and story.i.history.general.failures == 0


def test_an_engine_that_can_sleep_makes_room_asleep_and_wakes_in_its_turn() -> None:
    story = Story().until_ready()
    (refused,) = story.tell(ev.Evict(active_leases=1, asleep=True))
    assert isinstance(refused, do.Refuse) and refused.code == "POOL_IN_USE"
    story.tell(ev.Evict(asleep=True), ev.Slept(1))
    assert (story.phase(), story.i.desired) == (Phase.SLEEPING, Desired.EVICTED) and sleeps_evicted(story.i)
    story.tell(ev.Start(origin="demand"))
    assert (story.phase(), story.i.desired) == (Phase.WAKING, Desired.WANTED)
    story.tell(ev.NoRoomToWake(1, "its GPU memory is held by pool q"))
    assert sleeps_evicted(story.i) and story.i.crash_count == 0 and "held by pool q" in str(story.i.last_error)
    story.tell(ev.Start())
    assert (story.phase(), story.i.desired) == (Phase.WAKING, Desired.WANTED)


def test_a_sleeper_of_an_earlier_daemon_that_gave_way_ends_and_is_started_where_it_runs_with_the_daemon() -> None:
    for desired, after in ((Desired.ON_DEMAND, After.STAY), (Desired.WANTED, After.NEW_START), (Desired.STOPPED, After.STAY)):
        story = Story()
        story.i = replace(story.i, desired=desired)
        story.tell(ev.Adopt(7), ev.Adopted(7, 0.0, asleep=True, gave_way=True))
        assert story.phase() is Phase.STOPPING and story.i.active.after is after
