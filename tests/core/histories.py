"""Hypothesis strategies for lifecycles: events that fit the present launch, late ones, duplicates, wrong ones."""

from __future__ import annotations

from hypothesis import strategies as st

from pool_managerd.core.activity import Activity, Verdict
from pool_managerd.core.backoff import BackoffRules
from pool_managerd.core.lifecycle import Policy
from pool_managerd.core.lifecycle import events as ev

BUSY = Activity(Verdict.BUSY, "is at work", loaded_at=3.0, worked_at=3.0)

REQUESTS = [
    ev.Start(), ev.Start(retry=False), ev.Start(origin="boot"), ev.Start(origin="demand"),
    ev.Start(retry=False, join=False), ev.CancelStart(), ev.Stop(), ev.Evict(), ev.Evict(2), ev.Restart(),
    ev.Hold(), ev.Release(), ev.Undrain(), ev.ResetBreaker(), ev.Purge(), ev.Sleep(1_000), ev.Sleep(5_000, 1), ev.Wake(),
    ev.Quarantine("Xid 79"),
    ev.Quarantine("GPU 0 is lost", lost=True), ev.EndQuarantine(),
]  # fmt: skip

drains = st.builds(ev.Drain, deadline_ms=st.sampled_from([0, 1, 1000]), active_leases=st.integers(0, 3))
leases = st.builds(ev.LeasesChanged, active=st.integers(0, 3))


def news(epoch: int) -> list[ev.Event]:
    """Everything that can be heard of launch ``epoch``."""
    staging = [
        ev.StagingProgress(epoch), ev.Staged(epoch), ev.Staged(epoch, external=True), ev.Staged(epoch, uses_gpus=True),
        ev.Staged(epoch, warmable=False), ev.Staged(epoch, keeps_slots=True),
        ev.StagingFailed(epoch, "no model", retriable=False), ev.StagingFailed(epoch, "no disk"),
    ]  # fmt: skip
    running = [
        ev.Spawned(epoch, 4711), ev.SpawnFailed(epoch, "no binary"), ev.ProbeSucceeded(epoch),
        ev.ProbeFailed(epoch, "answered 503"), ev.ProbeFailed(epoch, "had no answer", timed_out=True, activity=BUSY),
        ev.ProbeFailed(epoch, "had no answer", timed_out=True, activity=Activity(Verdict.IDLE, "nothing moves", worked_at=5.0)),
        ev.ProbeSucceeded(epoch, Activity(Verdict.HUNG, "it stands still")), ev.ProbeDiscarded(epoch), ev.WarmedUp(epoch),
        ev.WarmupFailed(epoch, "no token"), ev.HelperDied(epoch, "gone"),
        ev.Adopted(epoch, 0.0), ev.Adopted(epoch, 0.0, was_ready=True, uses_gpus=True, active_leases=1, drain_deadline=5.0),
        ev.CacheRestored(epoch), ev.CacheRestored(epoch, 2), ev.CacheSaved(epoch),
        ev.NotAdopted(epoch, "not ours"), ev.Slept(epoch), ev.SleepFailed(epoch, "it answered 404"),
        ev.NoRoomToWake(epoch, "pool q has it"), ev.Woke(epoch),
    ]  # fmt: skip
    ending = [
        ev.Died(epoch), ev.Exited(epoch, code=0), ev.Exited(epoch, code=0, graceful=True),
        ev.Exited(epoch, code=0, stopped=True),
        ev.Exited(epoch, code=1, summary="exit_code=1"),
        ev.Exited(epoch, signal=9), ev.Exited(epoch, code=1, summary="exit_code=1", port_conflict=True), ev.Exited(epoch),
        ev.VramFree(epoch), ev.VramHeld(epoch, "pid 7"),
    ]  # fmt: skip
    return [*staging, *running, *ending]


SAMPLES = [*REQUESTS, ev.Drain(1000, 1), ev.LeasesChanged(0), ev.Adopt(7), ev.Tick(), *news(1)]

policies = st.builds(
    Policy,
    restart=st.sampled_from(["on-failure", "always", "never"]),
    warmup=st.sampled_from(["before_ready", "after_ready", "off"]),
    primes=st.booleans(),
    fail_open=st.booleans(),
    failure_threshold=st.integers(1, 4),
    backoff=st.builds(
        BackoffRules, initial_ms=st.integers(0, 2000), max_ms=st.integers(0, 60_000), min_delay_ms=st.integers(0, 800)
    ),
)
