"""What becomes of an engine when its daemon died and another one comes: stories of one pool, told as events and effects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.lifecycle import Desired, Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.adopting import LAST_LOOK_S, OWN_GAP_S
from tests.core.test_lifecycle_stories import POLICY, Story

EPOCH = 7


def restarted(desired: Desired = Desired.WANTED, *, highest_epoch: int = 100) -> Story:
    """The next daemon's record of the pool: above ``highest_epoch`` no launch of it was."""
    story = Story()
    story.i = replace(
        story.i, desired=desired, crash_count=2, restart_count=1, active=replace(story.i.active, epoch=highest_epoch)
    )
    return story


def test_an_adopted_engine_is_ready_after_a_probe_of_this_daemons_own_and_that_is_no_start() -> None:
    story = restarted()
    story.tell(ev.Adopt(EPOCH))
    assert story.kinds() == ["AdoptEngine"] and not view(story.i).live
    story.tell(ev.Adopted(EPOCH, 400.0, was_ready=True, warmable=True))
    assert story.kinds() == ["SendProbe"] and view(story.i).live and not view(story.i).ready
    story.tell(ev.ProbeSucceeded(EPOCH))
    assert view(story.i).ready and story.kinds() == ["Announce"]
    assert "again" in story.said("ready_again").human
    assert (story.i.crash_count, story.i.restart_count, story.i.active.ready_since) == (2, 1, 400.0)


def test_one_that_was_still_loading_is_warmed_up_and_announced_as_a_start() -> None:
    story = restarted()
    story.tell(ev.Adopt(EPOCH), ev.Adopted(EPOCH, 999.0, warmable=True), ev.ProbeFailed(EPOCH, "answered 503"))
    assert story.phase() is Phase.STARTING
    story.tell(ev.ProbeSucceeded(EPOCH))
    assert story.kinds() == ["SendWarmup"]
    story.tell(ev.WarmedUp(EPOCH))
    assert view(story.i).ready and story.said("preload_succeeded").fields["duration_ms"] == 1000


def test_the_next_launch_has_an_epoch_above_all_that_were() -> None:
    story = restarted(highest_epoch=100)
    story.tell(ev.Adopt(EPOCH), ev.Adopted(EPOCH, 0.0, was_ready=True), ev.ProbeSucceeded(EPOCH))
    story.tell(ev.Restart(), ev.Died(EPOCH), ev.Exited(EPOCH, signal=15))
    assert story.phase() is Phase.STAGING and story.i.active.epoch == 101


def test_one_that_ended_meanwhile_is_the_crash_that_it_was_and_is_started_again() -> None:
    story = restarted()
    story.tell(ev.Adopt(EPOCH), ev.Adopted(EPOCH, 0.0, was_ready=True), ev.Died(EPOCH))
    story.tell(ev.Exited(EPOCH, code=3, summary="exit_code=3", crash=CrashClass.PROCESS_EXIT))
    assert story.phase() is Phase.BACKOFF
    assert story.i.crash_count == 3 and story.i.last_error == "exit_code=3"
    assert story.said("crash").fields["exit_code"] == 3
    story.tell(ev.Tick(), after_s=5)
    assert story.phase() is Phase.STAGING and story.i.restart_count == 2


@pytest.mark.parametrize(("desired", "phase"), [(Desired.WANTED, Phase.STAGING), (Desired.STOPPED, Phase.DOWN)])
def test_one_that_its_shim_was_told_to_stop_has_not_crashed(desired: Desired, phase: Phase) -> None:
    """The daemon before had begun a stop, or a restart, that is finished now."""
    story = restarted(desired)
    story.tell(ev.Adopt(EPOCH), ev.Adopted(EPOCH, 0.0, was_ready=True), ev.Died(EPOCH), ev.Exited(EPOCH, code=0, stopped=True))
    assert story.phase() is phase and story.i.crash_count == 2


def test_a_drain_goes_on_to_the_deadline_that_it_had() -> None:
    story = restarted(Desired.DRAINED)
    story.tell(ev.Adopt(EPOCH))
    story.tell(ev.Adopted(EPOCH, 0.0, was_ready=True, drain_since=990.0, drain_deadline=1003.0, active_leases=2))
    assert view(story.i).draining and not view(story.i).ready and story.i.active.drain_leases == 2
    story.tell(ev.Tick(), after_s=2)
    assert story.phase() is Phase.DRAINING
    story.tell(ev.Tick(), after_s=1.5)
    assert story.phase() is Phase.STOPPING and story.i.active.force_stopped
    story.tell(ev.Died(EPOCH), ev.Exited(EPOCH, signal=15))
    assert story.said("drain_finished").fields["final_lease_count"] == 2 and story.i.desired is Desired.DRAINED


@pytest.mark.parametrize("desired", [Desired.STOPPED, Desired.DRAINED])
def test_a_stop_or_a_drain_with_nothing_in_flight_is_finished(desired: Desired) -> None:
    story = restarted(desired)
    story.tell(ev.Adopt(EPOCH), ev.Adopted(EPOCH, 0.0, was_ready=True))
    assert story.phase() is Phase.STOPPING and "StopEngine" in story.kinds()


@pytest.mark.parametrize("desired", [Desired.ON_DEMAND, Desired.EVICTED])
def test_what_runs_is_wanted(desired: Desired) -> None:
    story = restarted(desired)
    story.tell(ev.Adopt(EPOCH), ev.Adopted(EPOCH, 0.0, was_ready=True), ev.ProbeSucceeded(EPOCH))
    assert view(story.i).ready and story.i.desired is Desired.WANTED


def test_a_held_pool_keeps_the_engine_that_runs() -> None:
    story = restarted()
    story.i = replace(story.i, held=True, pending_start=True)
    story.tell(ev.Adopt(EPOCH), ev.Adopted(EPOCH, 0.0, was_ready=True), ev.ProbeSucceeded(EPOCH))
    assert view(story.i).ready and story.i.held


@pytest.mark.parametrize("news", [ev.NotAdopted(EPOCH, "it is gone"), ev.HelperDied(EPOCH, "gone")])
def test_what_cannot_be_adopted_gives_back_all_that_was_its_before_it_starts_anew(news: ev.Event) -> None:
    story = restarted()
    story.tell(ev.Adopt(EPOCH), news)
    assert story.kinds() == ["AdoptEngine", "Withdraw", "EndLeases", "ReleaseVram", "StageArtifacts"]
    assert story.phase() is Phase.STAGING and story.i.active.epoch == 101
    story = restarted(Desired.STOPPED)
    story.tell(ev.Adopt(EPOCH), news)
    assert story.phase() is Phase.DOWN


@pytest.mark.parametrize("desired", [Desired.STOPPED, Desired.EVICTED])
def test_a_start_in_the_middle_is_not_forgotten_whatever_becomes_of_the_adoption(desired: Desired) -> None:
    story = restarted(desired)
    story.tell(ev.Adopt(EPOCH), ev.Start(), ev.NotAdopted(EPOCH, "it is gone"))
    assert story.phase() is Phase.STAGING
    story = restarted(desired)
    story.tell(ev.Adopt(EPOCH), ev.Start(), ev.Adopted(EPOCH, 0.0, was_ready=True), ev.ProbeSucceeded(EPOCH))
    assert view(story.i).ready and story.i.desired is Desired.WANTED


def test_in_the_middle_of_an_adoption_demand_does_not_start_what_a_person_stopped() -> None:
    story = restarted(Desired.STOPPED)
    story.tell(ev.Adopt(EPOCH), ev.Start(origin="demand"), ev.NotAdopted(EPOCH, "it is gone"))
    assert story.phase() is Phase.DOWN and story.i.desired is Desired.STOPPED


def test_looking_takes_no_longer_than_its_time() -> None:
    story = restarted()
    story.tell(ev.Adopt(EPOCH))
    story.tell(ev.Tick(), after_s=story.policy.adopt_timeout_s)
    story.tell(ev.Tick(), after_s=LAST_LOOK_S)
    assert story.phase() is Phase.STAGING and "too long" in story.said("not_adopted").human


def test_a_daemon_that_is_back_just_in_time_has_a_last_look() -> None:
    """It stood until a moment before the end of the adoption's time, which says nothing of the engine."""
    story = restarted()
    story.tell(ev.Adopt(EPOCH))
    story.tell(ev.Tick(), after_s=POLICY.adopt_timeout_s + OWN_GAP_S / 2)
    assert story.phase() is Phase.ADOPTING
    story.tell(ev.Adopted(EPOCH, 400.0, was_ready=True), ev.ProbeSucceeded(EPOCH))
    assert view(story.i).ready


def test_a_stop_in_the_middle_waits_until_the_engine_is_known_and_stops_it_then() -> None:
    story = restarted()
    story.tell(ev.Adopt(EPOCH), ev.Stop())
    assert story.phase() is Phase.STOPPING and "StopEngine" not in story.kinds(), "there is nothing to signal yet"
    story.tell(ev.Adopted(EPOCH, 0.0, was_ready=True))
    assert story.kinds() == ["StopEngine"] and view(story.i).live
    story.tell(ev.Died(EPOCH), ev.Exited(EPOCH, signal=15))
    assert story.phase() is Phase.DOWN and story.i.desired is Desired.STOPPED and story.i.crash_count == 2


@pytest.mark.parametrize("news", [ev.NotAdopted(EPOCH, "it is gone"), ev.HelperDied(EPOCH, "gone")])
def test_a_stop_in_the_middle_of_an_adoption_that_comes_to_nothing_is_done_then(news: ev.Event) -> None:
    story = restarted()
    story.tell(ev.Adopt(EPOCH), ev.Stop(), news)
    assert story.phase() is Phase.DOWN


def test_a_drain_or_an_eviction_in_the_middle_cuts_nothing_off() -> None:
    for event in (ev.Drain(1000, 2), ev.Evict(2)):
        story = restarted()
        story.tell(ev.Adopt(EPOCH), event)
        assert story.phase() is Phase.ADOPTING and "Refuse" in story.kinds()


def test_a_daemon_that_stood_gives_whoever_looks_the_time_again() -> None:
    """Stopped with SIGSTOP, say, in the middle of an adoption: the engine is well, and nobody had time to look."""
    story = restarted()
    story.tell(ev.Adopt(EPOCH))
    story.tell(ev.Tick(), after_s=POLICY.adopt_timeout_s + 60)
    assert story.phase() is Phase.ADOPTING
    story.tell(ev.Adopted(EPOCH, 400.0, was_ready=True), ev.ProbeSucceeded(EPOCH))
    assert view(story.i).ready


def test_an_adoption_that_takes_too_long_is_given_up() -> None:
    story = restarted()
    story.tell(ev.Adopt(EPOCH))
    story.tell(ev.Tick(), after_s=POLICY.adopt_timeout_s)
    story.tell(ev.Tick(), after_s=LAST_LOOK_S)
    assert story.phase() is Phase.STAGING and "took too long" in story.said("not_adopted").human
