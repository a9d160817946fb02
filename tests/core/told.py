"""Stories of one pool as they are told: each event, what it changes, what is to be done about it, and what is said of it.

``python -m tests.core.told`` writes lifecycle_told/ anew; read what has changed before it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

from pool_managerd.core.activity import Activity, Verdict
from pool_managerd.core.backoff import BackoffRules
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.lifecycle import Desired, Policy, PoolState
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from tests.core.test_lifecycle_stories import Story

FOLDER = Path(__file__).parent / "lifecycle_told"
POLICY = Policy(backoff=BackoffRules(initial_ms=1000, jitter=0.0), restart="on-failure")
IDLE = Activity(Verdict.IDLE, "nothing of it moves", worked_at=1.0)
WORKS = Activity(Verdict.BUSY, "is at work (2.0 CPUs)", worked_at=1.0)
STANDS = Activity(Verdict.HUNG, "2 requests have stood still for 60 s: no token, no CPU time")


class Told(Story):
    """A story that is written down."""

    def __init__(self, policy: Policy = POLICY, **pool: object) -> None:
        super().__init__(policy)
        self.i = replace(self.i, **pool)  # type: ignore[arg-type]
        self.lines: list[str] = []

    def tell(self, *events: ev.Event, after_s: float = 0.0) -> list[do.Effect]:
        for number, event in enumerate(events):
            before = self.i
            super().tell(event, after_s=0.0 if number else after_s)
            self.lines.append(f"{self.now:g} {_event(event)}")
            changes = ", ".join(_changes(before, self.i))
            self.lines += [f"    {changes}"] if changes else []
            self.lines += [f"    {_effect(effect)}" for effect in self.effects]
        return self.effects

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def _event(event: ev.Event) -> str:
    """Its name and what is not as usual of it; the epoch is that of the launch that is under way."""
    told = [f for f in fields(event) if f.name != "epoch" and getattr(event, f.name) != f.default]
    return " ".join([type(event).__name__, *(f"{f.name}={_shown(getattr(event, f.name))}" for f in told)])


def _shown(value: object) -> str:
    return f"({value.verdict}: {value.why})" if isinstance(value, Activity) else str(value)


def _changes(before: PoolState, after: PoolState) -> Iterator[str]:
    for old, new in ((before, after), (before.active, after.active), (before.history, after.history)):
        for field in fields(old):
            if field.name not in ("active", "history") and getattr(old, field.name) != getattr(new, field.name):
                yield f"{field.name}={getattr(new, field.name)}"


def _effect(effect: do.Effect) -> str:
    if isinstance(effect, do.Say):
        shown = f" {dict(effect.fields)}" if effect.fields else ""
        return f"{effect.level} {effect.action}: {effect.human}{shown}"
    return str(effect)


def a_crash_loop(s: Told) -> None:
    """Ready, dead, a port lost to another program, a start that comes to nothing, and a breaker that opens."""
    s.tell(ev.Start(origin="boot"))
    s.tell(ev.StagingProgress(1), after_s=1)
    s.tell(ev.Staged(1, uses_gpus=True), ev.Spawned(1, 42), ev.ProbeFailed(1, "answered 503"), ev.Tick(), after_s=2)
    s.tell(ev.Tick(), after_s=0.01)
    s.tell(ev.ProbeSucceeded(1), ev.WarmedUp(1), after_s=3)
    s.tell(ev.Died(1), ev.Exited(1, code=1, summary="exit_code=1", crash=CrashClass.PROCESS_EXIT), ev.VramFree(1), after_s=10)
    s.tell(ev.Tick(), ev.Staged(2), ev.Spawned(2, 43), ev.Died(2), after_s=1)
    s.tell(ev.Exited(2, code=1, summary="exit_code=1", port_conflict=True))
    s.tell(ev.StagingFailed(3, "no disk"), after_s=2)
    s.tell(ev.Tick(), ev.Staged(4), ev.SpawnFailed(4, "no such file", retriable=True), after_s=4)
    for n in (5, 6):
        s.tell(ev.Tick(), ev.Staged(n), ev.Spawned(n, n), after_s=60)
        s.tell(ev.Exited(n, signal=9, evidence="out of memory", summary="out_of_memory", crash=CrashClass.OUT_OF_MEMORY))
    s.tell(ev.Tick(), ev.Staged(7), ev.Spawned(7, 7), ev.ProbeSucceeded(7), ev.WarmupFailed(7, "no token"), after_s=900)
    s.tell(ev.Tick(), after_s=60)
    s.tell(ev.Exited(7, signal=11, summary="signal SIGSEGV", crash=CrashClass.CUDA))


def a_breaker_that_opened(s: Told) -> None:
    """Open, refused on demand, started by hand, open again, due, reset."""
    s.tell(ev.Start())
    for n in (1, 2):
        s.tell(ev.Tick(), ev.Staged(n, warmable=False), ev.Spawned(n, n), ev.ProbeSucceeded(n), after_s=120 * (n - 1))
        s.tell(ev.Exited(n, code=1, summary="exit_code=1", crash=CrashClass.PROCESS_EXIT))
    s.tell(ev.Start(origin="demand"), ev.Start(), ev.StagingFailed(3, "no model"), after_s=20)
    s.tell(ev.Hold(), ev.Restart(), ev.Release(), ev.Evict())
    s.tell(ev.Start(origin="boot"), ev.Tick(), after_s=1)
    s.tell(ev.Tick(), ev.Staged(4), ev.StagingProgress(4), ev.HelperDied(4, "the launch ended"), after_s=900)
    s.tell(ev.ResetBreaker(), ev.ResetBreaker())


def a_drain(s: Told) -> None:
    """Taken back, taken back too late for its probes, finished, cut off."""
    s.tell(ev.Undrain())
    s.until_ready()
    s.tell(ev.Undrain(), ev.Evict(1), ev.Drain(30_000, 2), ev.Start(), ev.Evict(), ev.Undrain())
    s.tell(ev.Tick(), after_s=5)
    s.tell(ev.ProbeFailed(1, "was refused"), ev.Drain(30_000, 2), ev.Tick(), after_s=1)
    s.tell(ev.Tick(), after_s=5)
    s.tell(ev.Drain(60_000, 2), ev.Drain(1_000, 2), ev.Undrain(), ev.ProbeSucceeded(1))
    s.tell(ev.Drain(7_000, 2), ev.LeasesChanged(1), ev.Tick(), after_s=1)
    s.tell(ev.Tick(), ev.ProbeFailed(1, "was refused"), after_s=5)
    s.tell(ev.Tick(), ev.Undrain(), ev.Drain(0, 0), ev.Tick(), after_s=6)
    s.tell(ev.Tick(), after_s=15)
    s.tell(ev.Exited(1, signal=9))
    s.tell(ev.Start(), ev.Drain(0, 0), ev.Undrain())
    s.tell(ev.Start(), ev.Staged(3, warmable=False), ev.Spawned(3, 3), ev.ProbeSucceeded(3), ev.Drain(0, 3), ev.Died(3))
    s.tell(ev.Exited(3, signal=15), after_s=2)
    s.tell(ev.Start(), ev.Staged(4, warmable=False), ev.Spawned(4, 4), ev.ProbeSucceeded(4), ev.Drain(9_000, 1), ev.Stop())
    s.tell(ev.Died(4), ev.Exited(4, signal=15), after_s=1)


def a_stop(s: Told) -> None:
    """Of everything that can be stopped: a staging, a launch, an engine that will not die, memory that is not given back."""
    s.tell(ev.Stop(), ev.Start(), ev.Stop(), ev.Start(), ev.Staged(2), ev.Stop(), ev.Tick(), after_s=1)
    s.tell(ev.Tick(), ev.Spawned(2, 7), ev.Exited(2, signal=9), after_s=10)
    s.tell(ev.Start(), ev.Staged(3, uses_gpus=True, warmable=False), ev.Spawned(3, 8), ev.ProbeSucceeded(3), ev.Stop())
    s.tell(
        ev.CancelStart(),
        ev.VramFree(3),
        ev.Start(),
        ev.Start(origin="demand"),
        ev.Start(join=False),
        ev.Stop(),
        ev.Restart(),
        ev.Stop(),
    )
    s.tell(ev.Tick(), after_s=15)
    s.tell(ev.Tick(stuck="pid 8 (x) is in uninterruptible sleep"), ev.Start(), after_s=10)
    s.tell(ev.Died(3), ev.VramHeld(3, "pid 9 holds 3 GiB"), ev.Evict(), after_s=5)
    s.tell(ev.Tick(), after_s=35)
    s.tell(ev.VramFree(3), after_s=100)
    s.tell(ev.Start(), ev.CancelStart(), ev.CancelStart(), ev.Start(), ev.Staged(5), ev.CancelStart(), ev.SpawnFailed(5, "no"))
    s.tell(ev.Start(), ev.Staged(6), ev.Stop(), ev.Spawned(6, 9), ev.Tick())
    s.tell(ev.Tick(), ev.Exited(6, signal=9), after_s=10)


def a_health_check_that_fails(s: Told) -> None:
    """Busy, recovered, standing still, replaced; then a start that is never healthy."""
    s.until_ready()
    for _ in range(4):
        s.tell(ev.Tick(), after_s=5)
        s.tell(ev.ProbeFailed(1, "had no answer within 2 s", timed_out=True, activity=WORKS), after_s=2)
    s.tell(ev.ProbeSucceeded(1, WORKS), ev.ProbeSucceeded(1, STANDS))
    s.tell(ev.Tick(), after_s=15)
    s.tell(ev.Exited(1, signal=9), ev.ProbeSucceeded(1), after_s=1)
    s.tell(ev.Tick(), ev.Staged(2), ev.Spawned(2, 9), ev.ProbeFailed(2, "answered 503"), after_s=1)
    s.tell(ev.ProbeDiscarded(2), ev.HelperDied(2, "the launch ended unexpectedly"), ev.Exited(2, signal=15), after_s=1)
    s.tell(ev.Tick(), ev.Staged(3), ev.Spawned(3, 9), ev.ProbeFailed(3, "was refused"), after_s=2)
    s.tell(ev.Tick(), ev.Exited(3, signal=15), after_s=120)
    s.tell(ev.Tick(), ev.Staged(4), after_s=4)
    s.tell(ev.Tick(), ev.Tick(), after_s=120)
    s.tell(ev.Tick(), after_s=10)
    s.tell(ev.Tick(), after_s=60)
    s.tell(ev.Tick(), after_s=600)


def a_probe_that_gets_lost(s: Told) -> None:
    """Never answered, not sent, conclusive, and an engine that is silent and does nothing."""
    s.until_ready()
    s.tell(ev.Tick(), after_s=5)
    s.tell(ev.Tick(), after_s=9)
    s.tell(ev.Tick(), after_s=0.1)
    s.tell(ev.Tick(), ev.ProbeDiscarded(1), after_s=5)
    s.tell(ev.Tick(), ev.ProbeDiscarded(1), after_s=26)
    for _ in range(6):
        s.tell(ev.Tick(), ev.ProbeDiscarded(1), after_s=5)
    s.tell(ev.ProbeSucceeded(1))
    for _ in range(3):
        s.tell(ev.ProbeFailed(1, "had no answer within 2 s", timed_out=True, activity=IDLE), after_s=5)
    s.tell(ev.Exited(1, signal=15))
    s.tell(ev.Tick(), ev.Staged(2, warmable=False), ev.Spawned(2, 2), ev.ProbeSucceeded(2), after_s=1)
    s.tell(ev.ProbeFailed(2, "was answered by pid 9 (nginx)", conclusive=True), ev.Died(2))
    s.tell(ev.Tick(), after_s=10)


def an_engine_of_somebody_elses(s: Told) -> None:
    """Silent, ready, gone, back, hung; drained and undrained."""
    s.tell(ev.Start(), ev.Staged(1, external=True), ev.ProbeFailed(1, "was refused", silent=100), ev.Tick(), after_s=1)
    s.tell(ev.Tick(), ev.ProbeFailed(1, "was refused"), after_s=119)
    s.tell(ev.Tick(), ev.ProbeFailed(1, "was refused"), after_s=2)
    s.tell(ev.ProbeSucceeded(1), after_s=2)
    for _ in range(3):
        s.tell(ev.Tick(), ev.ProbeFailed(1, "answered 500"), after_s=5)
    s.tell(ev.Tick(), ev.ProbeSucceeded(1), ev.ProbeSucceeded(1, STANDS), ev.ProbeSucceeded(1), after_s=2)
    s.tell(ev.Tick(), after_s=5)
    s.tell(ev.ProbeDiscarded(1), after_s=1)
    s.tell(ev.Tick(), ev.ProbeDiscarded(1), after_s=100)
    for _ in range(4):
        s.tell(ev.Tick(), ev.ProbeDiscarded(1), after_s=5)
    s.tell(ev.ProbeSucceeded(1), ev.Drain(9_000, 1), ev.Undrain(), ev.ProbeSucceeded(1), ev.Stop())


def a_quarantine(s: Told) -> None:
    """While it serves, stages, launches and drains; of a GPU that is lost and of one that is not; beside a hold."""
    s.until_ready()
    s.tell(ev.Quarantine("GPU 0 is cordoned"), ev.Quarantine("GPU 0 is on probation"), ev.Restart(), ev.ProbeSucceeded(1))
    s.tell(ev.EndQuarantine(), ev.Quarantine("GPU 0 is lost", lost=True), ev.Died(1), ev.Exited(1, signal=9))
    s.tell(ev.Start(), ev.Hold(), ev.EndQuarantine(), ev.Release(), ev.Quarantine("GPU 0 is lost", lost=True), ev.EndQuarantine())
    s.tell(ev.Staged(3), ev.Quarantine("GPU 0 is lost", lost=True), ev.SpawnFailed(3, "no"), ev.EndQuarantine())
    s.tell(ev.Staged(4, warmable=False), ev.Spawned(4, 4), ev.Quarantine("GPU 0 asks for a reset"), ev.ProbeSucceeded(4))
    s.tell(ev.Drain(9_000, 1), ev.Quarantine("GPU 0 is lost", lost=True), ev.Exited(4, signal=9), ev.EndQuarantine())


def a_daemon_that_died(s: Told) -> None:
    """Found, not ours, looked at for too long; ours and draining; stopped before it was known."""
    s.tell(ev.Adopt(7), ev.NotAdopted(7, "it is gone"), ev.Evict(), after_s=1)
    s.tell(ev.Adopt(8), ev.Restart(), ev.Drain(9_000, 1), ev.Tick(), after_s=9)
    s.tell(ev.Tick(), after_s=12)
    s.tell(ev.Tick(), ev.Evict(), after_s=10)
    s.tell(ev.Adopt(9), ev.Adopted(9, 990.0, was_ready=True, uses_gpus=True, warmable=True, active_leases=2, drain_since=1000.0))
    s.tell(ev.Tick(), ev.Exited(9, code=0, stopped=True), ev.VramFree(9), after_s=31)
    s.tell(ev.Adopt(10), ev.Stop(), ev.Adopted(10, 5.0, uses_gpus=True), ev.Adopted(10, 5.0), ev.Tick(), after_s=1)
    s.tell(ev.Exited(10, signal=15), ev.VramFree(10), after_s=1)


def a_first_prompt(s: Told) -> None:
    """Answered, not answered in time, lost with who had sent it; of an engine that is not asked any."""
    s.tell(ev.Start(), ev.Staged(1), ev.Spawned(1, 1), ev.ProbeSucceeded(1), ev.Tick(), after_s=1)
    s.tell(ev.Tick(), ev.WarmedUp(1), after_s=30)
    s.tell(ev.Restart(), ev.Exited(1, signal=15), ev.Staged(2), ev.Spawned(2, 2), ev.ProbeSucceeded(2), after_s=1)
    s.tell(ev.HelperDied(2, "the warm-up ended unexpectedly"), ev.Restart(), ev.Exited(2, signal=15), after_s=1)
    s.tell(ev.Staged(3), ev.Spawned(3, 3), ev.ProbeSucceeded(3), ev.WarmedUp(3), ev.Restart(), ev.Exited(3, signal=15))
    s.tell(ev.Staged(4, warmable=False), ev.Spawned(4, 4), ev.ProbeSucceeded(4), after_s=1)


def asleep_and_awake(s: Told) -> None:
    """There and back, and one that never comes back."""
    s.tell(ev.Sleep(0), ev.Wake())
    s.until_ready()
    s.tell(ev.Sleep(9_000), ev.Slept(1), ev.Tick(), ev.Start(), ev.Woke(1), ev.ProbeFailed(1, "answered 503"), after_s=1)
    s.tell(ev.Tick(), ev.ProbeSucceeded(1), ev.Sleep(9_000), ev.Slept(1), ev.Wake(), after_s=1)
    s.tell(ev.Tick(), ev.Exited(1, signal=15), after_s=600)


def put_to_sleep_with_requests_in_flight(s: Told) -> None:
    """They end in time, they do not, somebody drains or stops it instead; and it does not fall asleep."""
    s.until_ready()
    s.tell(
        ev.Sleep(9_000, active_leases=2), ev.LeasesChanged(1), ev.LeasesChanged(0), ev.Slept(1), ev.Wake(), ev.Woke(1), after_s=1
    )
    s.tell(ev.ProbeSucceeded(1), ev.Sleep(2_000, active_leases=1), ev.Tick(), ev.ProbeSucceeded(1), after_s=2)
    s.tell(ev.Tick(), ev.ProbeSucceeded(1), ev.Sleep(9_000, active_leases=1), ev.LeasesChanged(0), after_s=1)
    s.tell(ev.SleepFailed(1, "it answered 404"), ev.Woke(1), ev.ProbeSucceeded(1), ev.Sleep(9_000, active_leases=1), after_s=1)
    s.tell(ev.Drain(60_000, 1), ev.LeasesChanged(0), ev.Exited(1, signal=15), ev.VramFree(1), after_s=1)


def an_engine_that_slept_when_its_daemon_died(s: Told) -> None:
    """An engine that the daemon before had put to sleep is woken, and one whose pool is to stay down is stopped."""
    s.tell(
        ev.Adopt(7), ev.Adopted(7, 5.0, was_ready=True, uses_gpus=True, asleep=True), ev.Woke(7), ev.ProbeSucceeded(7), after_s=1
    )
    s.tell(ev.Sleep(0), ev.Slept(7), ev.Died(7), ev.Exited(7, code=1), ev.VramFree(7), ev.Stop(), after_s=1)
    s.tell(ev.Adopt(8), ev.Adopted(8, 5.0, was_ready=True, uses_gpus=True, asleep=True), ev.Exited(8, signal=15), after_s=1)


STORIES: dict[str, tuple[Callable[[Told], None], Callable[[], Told]]] = {
    "a_first_prompt": (a_first_prompt, Told),
    "a_first_prompt_after_ready": (a_first_prompt, lambda: Told(replace(POLICY, warmup="after_ready"))),
    "a_first_prompt_that_is_off": (a_first_prompt, lambda: Told(replace(POLICY, warmup="off"))),
    "a_crash_loop": (a_crash_loop, lambda: Told(replace(POLICY, breaker=replace(POLICY.breaker, threshold=3)))),
    "a_breaker_that_opened": (
        a_breaker_that_opened, lambda: Told(replace(POLICY, breaker=replace(POLICY.breaker, threshold=2), seed="x")),
    ),
    "a_drain": (a_drain, Told),
    "a_stop": (a_stop, Told),
    "put_to_sleep_with_requests_in_flight": (put_to_sleep_with_requests_in_flight, Told),
    "an_engine_that_slept_when_its_daemon_died": (an_engine_that_slept_when_its_daemon_died, Told),
    "a_health_check_that_fails": (a_health_check_that_fails, Told),
    "a_health_check_that_fails_in_dev": (a_health_check_that_fails, lambda: Told(replace(POLICY, fail_open=True))),
    "a_probe_that_gets_lost": (a_probe_that_gets_lost, Told),
    "an_engine_of_somebody_elses": (an_engine_of_somebody_elses, Told),
    "a_quarantine": (a_quarantine, Told),
    "a_daemon_that_died": (a_daemon_that_died, lambda: Told(desired=Desired.DRAINED, last_epoch=20)),
    "a_daemon_that_died_of_a_pool_that_is_wanted": (a_daemon_that_died, lambda: Told(desired=Desired.WANTED, last_epoch=20)),
    "asleep_and_awake": (asleep_and_awake, Told),
}  # fmt: skip


def told(name: str) -> str:
    story, told_by = STORIES[name]
    teller = told_by()
    story(teller)
    return teller.text()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in STORIES:
        (FOLDER / f"{name}.txt").write_text(told(name))
