"""What follows from silence, from an answer behind which nothing moves, and from a load that takes its time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pool_managerd.core.activity import NOT_SEEN, Activity, Verdict
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.starting import CPU_ALONE
from tests.core.test_lifecycle_stories import POLICY, Story

BUSY = Activity(Verdict.BUSY, "is at work (1.9 CPUs)")
STILL = Activity(Verdict.IDLE, "nothing of it moves")
HUNG = Activity(Verdict.HUNG, "3 requests have stood still for 60 s: no token, no CPU time")
LIMIT = POLICY.startup_timeout_s


def flags(story: Story) -> tuple[bool, bool, bool]:
    """Ready, busy, hung."""
    return view(story.i).ready, story.i.active.busy, story.i.active.hung


def silence(seen: Activity, epoch: int = 1) -> ev.ProbeFailed:
    return ev.ProbeFailed(epoch, "had no answer within 2 s", timed_out=True, activity=seen)


def test_silence_alone_never_ends_an_engine_that_works() -> None:
    story = Story().until_ready()
    story.tell(silence(BUSY), silence(BUSY))
    assert flags(story) == (True, False, False), "as long as its last good probe is fresh"
    for _ in range(100):
        story.tell(silence(BUSY), after_s=7)
        assert story.phase() is Phase.READY and flags(story) == (False, True, False) and story.kinds() == []
    assert story.i.last_error == "health check failed: it is at work (1.9 CPUs) and answers no health probes"
    story.tell(ev.ProbeSucceeded(1, BUSY))
    assert flags(story) == (True, False, False) and not story.i.last_error
    assert story.said("recovered").human == "Engine of pool 'p' answers its health probes again"
    assert story.i.crash_count == 0 and story.i.restart_count == 0


def test_it_is_said_once_that_an_engine_is_busy() -> None:
    story = Story().until_ready()
    story.tell(*[silence(BUSY)] * 3)
    assert story.said("busy").level == "warn"
    story.tell(silence(BUSY))
    assert story.effects == []


@pytest.mark.parametrize(
    ("failed", "crash"),
    [
        (silence(STILL), CrashClass.HUNG),
        (silence(HUNG), CrashClass.HUNG),
        (silence(NOT_SEEN), CrashClass.HEALTH_FAILURE),
        (ev.ProbeFailed(1, "was refused: nothing listens on the port", activity=BUSY), CrashClass.HEALTH_FAILURE),
        (ev.ProbeFailed(1, "answered 503", activity=BUSY), CrashClass.HEALTH_FAILURE),
    ],
)
def test_an_engine_that_is_silent_and_does_not_work_is_replaced_after_the_threshold(
    failed: ev.ProbeFailed, crash: CrashClass
) -> None:
    story = Story().until_ready()
    story.tell(failed, failed)
    assert story.phase() is Phase.READY
    story.tell(failed)
    assert story.phase() is Phase.STOPPING and story.i.active.pending_crash is crash and story.i.crash_count == 1
    assert failed.reason in str(story.i.last_error)
    assert failed.activity is BUSY or failed.activity.why in str(story.i.last_error)


def test_a_stranger_on_the_port_is_conclusive_however_busy_the_engine_is() -> None:
    story = Story().until_ready()
    story.tell(ev.ProbeFailed(1, "was answered by another program", conclusive=True, activity=BUSY))
    assert story.phase() is Phase.STOPPING


def test_a_busy_engine_that_stops_moving_is_replaced() -> None:
    story = Story().until_ready()
    story.tell(*[silence(BUSY)] * 4, silence(STILL))
    assert story.phase() is Phase.STOPPING and not story.i.active.busy


def test_an_engine_that_answers_while_its_work_stands_still_is_replaced() -> None:
    story = Story().until_ready()
    story.tell(ev.ProbeSucceeded(1, HUNG))
    assert story.phase() is Phase.STOPPING and story.i.active.pending_crash is CrashClass.HUNG
    assert story.i.last_error == (
        "health check failed: it answers its health probes, but 3 requests have stood still for 60 s: no token, no CPU time"
    )
    assert story.said("unhealthy").human == "Engine of pool 'p' stands still; replacing it"
    story.tell(ev.Died(1), ev.Exited(1, signal=9))
    assert story.phase() is Phase.BACKOFF


def test_in_dev_an_engine_that_stands_still_is_flagged_until_it_works_again() -> None:
    story = Story(replace(POLICY, fail_open=True)).until_ready()
    story.tell(ev.ProbeSucceeded(1, HUNG))
    assert story.phase() is Phase.READY and flags(story) == (False, False, True)
    story.tell(ev.ProbeSucceeded(1, HUNG))
    assert flags(story) == (False, False, True) and story.effects == [], "said once"
    story.tell(ev.ProbeSucceeded(1, BUSY))
    assert flags(story) == (True, False, False) and story.said("recovered").human == "Engine of pool 'p' works again"


def test_an_external_engine_that_stands_still_is_not_ready_and_never_signalled() -> None:
    story = Story()
    story.tell(ev.Start(), ev.Staged(1, external=True), ev.ProbeSucceeded(1))
    assert flags(story) == (True, False, False)
    story.tell(ev.ProbeSucceeded(1, HUNG))
    assert view(story.i).live and flags(story) == (False, False, True) and story.kinds() == []
    story.tell(ev.ProbeSucceeded(1, BUSY))
    assert flags(story) == (True, False, False)


def test_a_draining_engine_that_stands_still_waits_for_its_deadline() -> None:
    story = Story().until_ready()
    story.tell(ev.Drain(60_000, 1), ev.ProbeSucceeded(1, HUNG))
    assert story.phase() is Phase.DRAINING


def test_after_a_pause_of_our_own_the_engine_is_asked_again_before_anything_is_said() -> None:
    story = Story().until_ready()
    story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
    assert story.kinds() == ["SendProbe"]
    story.tell(ev.ProbeDiscarded(1), after_s=60)
    assert flags(story) == (True, False, False) and story.effects == []
    story.tell(ev.Tick())
    assert story.kinds() == ["SendProbe"]
    story.tell(ev.ProbeDiscarded(1), after_s=1)
    assert flags(story) == (True, False, False), "the pause counts against nobody"
    for _ in range(int(POLICY.fresh_s / POLICY.probe_interval_s) + 1):
        story.tell(ev.Tick(), after_s=POLICY.probe_interval_s)
        story.tell(ev.ProbeDiscarded(1), after_s=1)
    assert flags(story) == (False, False, True), "the last good probe is old by now"


# --- loads ----------------------------------------------------------------------------------------------------------


def load(story: Story, seconds: float, *, reads: bool = False, works: bool = False) -> None:
    """Probes that fail each second; ``reads``: bytes move meanwhile; ``works``: CPU time does."""
    for _ in range(int(seconds)):
        moved, worked = story.now + 1 if reads else None, story.now + 1 if works else None
        seen = Activity(loaded_at=moved, worked_at=worked)
        story.tell(ev.ProbeFailed(1, "answered 503", activity=seen), ev.Tick(), after_s=1)


def loading(**changes: float) -> Story:
    story = Story(replace(POLICY, **changes))  # type: ignore[arg-type]
    story.tell(ev.Start(), ev.Staged(1), ev.Spawned(1, 42))
    return story


def test_a_load_that_moves_is_not_ended_by_a_timer() -> None:
    story = loading()
    load(story, 20 * 60, reads=True)
    assert story.phase() is Phase.STARTING
    story.tell(ev.ProbeSucceeded(1), ev.WarmedUp(1))
    assert view(story.i).ready


def test_a_load_that_stands_still_is_ended_after_the_start_up_timeout_and_says_so() -> None:
    story = loading()
    load(story, 600, reads=True)
    load(story, LIMIT - 2)
    assert story.phase() is Phase.STARTING
    load(story, 3)
    assert story.phase() is Phase.STOPPING
    told = str(story.i.last_error)
    assert told.startswith("health check failed: the engine was not healthy within 12 min, and its load has stood still")
    assert told.endswith(" for 2 min or more: no log line, no bytes, no memory; the last probe answered 503")


def test_a_load_that_never_moved_is_told_as_ever() -> None:
    story = loading()
    load(story, LIMIT)
    assert story.i.last_error == "health check failed: the engine was not healthy within 2 min; the last probe answered 503"


def test_cpu_time_alone_is_believed_a_few_times_the_timeout() -> None:
    story = loading()
    load(story, CPU_ALONE * LIMIT - 1, works=True)
    assert story.phase() is Phase.STARTING
    load(story, 2, works=True)
    assert story.phase() is Phase.STOPPING


def test_the_cap_ends_a_load_however_it_moves_and_0_is_none() -> None:
    story = loading(startup_cap_s=300)
    load(story, 301, reads=True, works=True)
    assert story.phase() is Phase.STOPPING
    assert "within 5 min, the most a load may take (health.startup_cap_ms)" in str(story.i.last_error)
    endless = loading(startup_cap_s=0)
    load(endless, 2 * 3600, reads=True)
    assert endless.phase() is Phase.STARTING
    patient = loading(startup_cap_s=60)
    load(patient, LIMIT - 1)
    assert patient.phase() is Phase.STARTING, "the cap is never below the timeout"


# --- ends -----------------------------------------------------------------------------------------------------------


def test_a_process_that_survives_its_kill_is_told_with_where_it_sleeps() -> None:
    story = Story().until_ready()
    story.tell(ev.Stop())
    story.tell(ev.Tick(), after_s=POLICY.stop_grace_ms / 1000 + POLICY.kill_wait_s)
    story.tell(ev.Tick("pid 42 (python) is in uninterruptible sleep (D) in nfs_wait"), after_s=POLICY.kill_wait_s)
    assert story.i.reason == "stop_failed"
    assert str(story.i.last_error).endswith("for 10 s; pid 42 (python) is in uninterruptible sleep (D) in nfs_wait")
