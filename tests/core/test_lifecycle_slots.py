"""Slots in the lifecycle: saved before a planned stop and no other, restored before ready, never waited for too long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from tests.core.test_lifecycle_stories import POLICY, Story


def ready(story: Story | None = None) -> Story:
    story = story or Story()
    n = story.i.active.epoch + 1
    story.tell(ev.Start(), ev.Staged(n, keeps_slots=True), ev.Spawned(n, 42), ev.ProbeSucceeded(n), ev.WarmedUp(n))
    story.tell(ev.CacheRestored(n))
    assert view(story.i).ready
    return story


def test_slots_are_restored_after_the_warm_up_whose_prompt_takes_one_and_before_ready() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, keeps_slots=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1))
    assert story.kinds() == ["StageArtifacts", "SpawnEngine", "WritePid", "SendProbe", "SendWarmup"]
    story.tell(ev.WarmedUp(1))
    assert story.kinds() == ["RestoreCache"] and story.phase() is Phase.WARMING and not view(story.i).ready
    story.tell(ev.CacheRestored(1, 2), after_s=1)
    assert view(story.i).ready and story.kinds() == ["Announce"]


@pytest.mark.parametrize("warmup", ["off", "after_ready"])
def test_slots_are_restored_before_ready_without_a_warm_up_too(warmup: str) -> None:
    story = Story(replace(POLICY, warmup=warmup))
    story.tell(ev.Start(), ev.Staged(1, keeps_slots=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1))
    assert story.kinds()[-1] == "RestoreCache" and not view(story.i).ready
    story.tell(ev.CacheRestored(1, 1))
    assert view(story.i).ready and story.kinds() == ["Announce"], "a late warm-up would take the slot"
    story.tell(ev.Undrain())


def test_a_late_warm_up_comes_where_nothing_was_restored() -> None:
    story = Story(replace(POLICY, warmup="after_ready"))
    story.tell(ev.Start(), ev.Staged(1, keeps_slots=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.CacheRestored(1))
    assert story.kinds()[-2:] == ["Announce", "SendWarmup"]


def test_a_prime_prompt_is_read_before_ready_by_engines_that_save_no_slots_too() -> None:
    story = Story(replace(POLICY, primes=True))
    story.tell(ev.Start(), ev.Staged(1), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.WarmedUp(1))
    assert story.kinds()[-1] == "RestoreCache" and not view(story.i).ready


@pytest.mark.parametrize("news", [ev.HelperDied(1, "it broke"), ev.Tick()])
def test_an_engine_whose_slots_are_not_restored_in_time_is_ready_without_them_and_that_is_said(news: ev.Event) -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, keeps_slots=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.WarmedUp(1))
    story.tell(news, after_s=story.policy.restore_timeout_s + 10)
    assert not view(story.i).ready and story.said("cache_lost").level == "warn", "it was not heard of all that time"
    story.tell(ev.ProbeSucceeded(1))
    assert view(story.i).ready
    story.tell(ev.CacheRestored(1, 1))
    assert story.effects == [], "it comes too late to change anything"


@pytest.mark.parametrize("request_", [ev.Stop(), ev.Evict(), ev.Restart(), ev.Drain(1000, 0)])
def test_a_planned_stop_saves_first_and_its_grace_begins_after_that(request_: ev.Event) -> None:
    story = ready()
    story.tell(request_)
    assert story.kinds() == ["SaveCache"] and story.phase() is Phase.STOPPING
    story.tell(ev.CacheSaved(1), after_s=15)
    assert story.effects == [do.StopEngine(1, POLICY.stop_grace_ms)]
    assert story.i.active.deadline == story.now + POLICY.stop_grace_ms / 1000 + POLICY.kill_wait_s
    story.tell(ev.CacheSaved(1))
    assert story.effects == [], "once"


def test_a_drain_saves_when_the_last_lease_is_back() -> None:
    story = ready()
    story.tell(ev.Drain(30_000, 1))
    assert story.kinds() == []
    story.tell(ev.LeasesChanged(0), after_s=3)
    assert story.kinds() == ["SaveCache"]


@pytest.mark.parametrize("news", [ev.HelperDied(1, "it broke"), ev.Tick()])
def test_a_stop_waits_for_no_save_that_breaks_or_hangs(news: ev.Event) -> None:
    story = ready()
    story.tell(ev.Stop())
    story.tell(news, after_s=story.policy.save_timeout_s + 10)
    assert story.kinds() == ["StopEngine"] and "not saved" in story.said("cache_lost").human
    story.tell(ev.Tick(), after_s=story.policy.stop_grace_ms / 1000 + story.policy.kill_wait_s)
    assert story.kinds() == ["KillEngine"]


def test_an_engine_that_dies_while_it_saves_was_asked_to_stop_and_has_not_crashed() -> None:
    story = ready()
    story.tell(ev.Stop(), ev.Died(1), ev.Exited(1, signal=11))
    assert story.phase() is Phase.DOWN and story.i.crash_count == 0
    story.tell(ev.CacheSaved(1))
    assert story.effects == []


def test_nothing_is_saved_of_an_engine_that_has_failed() -> None:
    story = ready()
    for _ in range(story.policy.failure_threshold):
        story.tell(ev.ProbeFailed(1, "was refused", conclusive=True))
    assert story.phase() is Phase.STOPPING and "SaveCache" not in story.kinds()


@pytest.mark.parametrize(
    "events",
    [
        (ev.Drain(30_000, 1), ev.Stop()), (ev.Drain(0, 1),), (ev.Quarantine("Xid 79"), ev.Stop()),
        (ev.Quarantine("GPU 0 is lost", lost=True),),
    ],
)  # fmt: skip
def test_nothing_is_saved_when_there_is_no_time_to_lose(events: tuple[ev.Event, ...]) -> None:
    story = ready()
    story.tell(*events)
    assert "StopEngine" in story.kinds() and "SaveCache" not in story.kinds()


def test_a_gpu_that_is_lost_meanwhile_ends_the_waiting() -> None:
    story = ready()
    story.tell(ev.Stop(), ev.Quarantine("GPU 0 is lost", lost=True))
    assert story.kinds()[-1] == "StopEngine"


def test_nothing_is_saved_before_it_was_ready_and_nothing_of_an_engine_that_cannot() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, keeps_slots=True), ev.Spawned(1, 42), ev.ProbeSucceeded(1), ev.Stop())
    assert "StopEngine" in story.kinds() and "SaveCache" not in story.kinds()
    plain = Story().until_ready()
    plain.tell(ev.Stop())
    assert plain.kinds() == ["StopEngine"]


def test_an_adopted_engine_is_given_nothing_back_and_is_saved_when_it_is_stopped() -> None:
    story = Story()
    story.tell(ev.Adopt(5), ev.Adopted(5, 10.0, was_ready=True, warmable=True, keeps_slots=True), ev.ProbeSucceeded(5))
    assert view(story.i).ready and "RestoreCache" not in story.kinds()
    story.tell(ev.Stop())
    assert story.kinds() == ["SaveCache"]


def test_a_crash_is_none_of_its_business() -> None:
    story = ready()
    story.tell(ev.Died(1), ev.Exited(1, code=1, summary="exit_code=1", crash=CrashClass.PROCESS_EXIT))
    assert story.i.crash_count == 1 and "SaveCache" not in story.kinds()
