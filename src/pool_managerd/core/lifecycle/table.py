"""Rule 1: this table is the lifecycle. Every (phase, event) pair has a row entry; nothing falls through.

**Two records.** A pool is what outlives its launches: what is wanted of it (``desired``), what keeps it from starting
(``held``, ``quarantined``), its counters and failures. Its ``active`` instance is one launch: a phase, timers, a process.
``step`` is the only way either of them changes, both in one step, and both are frozen: what somebody read stays true of
the moment at which it was read.

**Phases** are exclusive and say where the launch is; flags (held, quarantined, hung) stand beside the phase, because each
of them can begin and end in any phase. A phase that cannot last has a deadline, and an exit for "the helper died", so
that no task that gets lost can leave a pool hanging.

**Events** are requests, news of one launch, and the timer. News carries the launch's epoch; that of another launch than
the present one changes nothing: it is late. An event that does not apply changes nothing either, or, when it is a
request, is refused with a reason.

**Effects run before the new state is published.** The pid file is there before the first probe can make the pool live,
and is gone before anybody sees it not live (``Withdraw`` comes with the step that takes the process away); the lease of
an ended launch is gone before the pool can be ready again. Whoever reads the state can rely on its files.

The state diagram and the table in docs/ are generated from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pool_managerd.core.lifecycle import adopting, draining, ending, relaunch, requests, serving, sleeping, starting
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.phase import IDLE, PROBED_AT_START, RISING, RUNNING, SERVING, WAITING, Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import PoolState, Step

Handler = Callable[[PoolState, Any, float, Policy], Step]


def ignore(pool: PoolState, e: ev.Event, now: float, p: Policy) -> Step:
    """The event does not apply in this phase: it is late, or it asks for what is already so."""
    return pool, ()


_BUSY = requests.refusing("OPERATION_IN_PROGRESS", "cannot do that now: pool '{pool}' is {state}")
_DRAINING = requests.refusing("POOL_DRAINING", "cannot start pool '{pool}': it is draining; undrain it, or wait")
_NOT_READY = requests.refusing("POOL_UNREADY", "cannot do that: pool '{pool}' is not ready")
_NOT_ASLEEP = requests.refusing("INVALID_PARAMS", "cannot wake pool '{pool}': it is not asleep")
_IN_USE = requests.refusing("OPERATION_IN_PROGRESS", "cannot adopt an engine for pool '{pool}': it has one")

P = Phase


def _row(*cells: tuple[Phase | Iterable[Phase], Handler], rest: Handler) -> dict[Phase, Handler]:
    """One event's decisions: ``cells`` name phases, ``rest`` is the decision everywhere else. No phase twice."""
    row: dict[Phase, Handler] = {}
    for phases, handler in cells:
        for phase in (phases,) if isinstance(phases, Phase) else phases:
            if phase in row:
                raise ValueError(f"phase {phase} is decided twice in one row")
            row[phase] = handler
    return {phase: row.get(phase, rest) for phase in Phase}


TABLE: dict[type[ev.Event], dict[Phase, Handler]] = {
    # requests
    ev.Start: _row(
        ({P.DOWN, P.FAILED, P.OPEN}, requests.start), (P.BACKOFF, requests.start_when_due),
        (P.SLEEPING, requests.wake_or_refuse), (P.DRAINING, _DRAINING), (P.STOPPING, requests.start_after_stop),
        (P.ADOPTING, requests.start_adopting), rest=requests.join_start,
    ),
    ev.CancelStart: _row(
        (P.STAGING, requests.stop_staging), (RISING - {P.STAGING}, requests.stop_running), (P.STOPPING, requests.cancel_stopping),
        rest=requests.not_starting,
    ),
    ev.Restart: _row(
        (IDLE, requests.restart_down), (P.STAGING, ignore),
        (P.STOPPING, requests.restart_after_stop), ({P.DRAINING, P.ADOPTING}, _BUSY), rest=requests.restart_up,
    ),
    ev.Stop: _row(
        (IDLE, requests.stop_idle), (P.STAGING, requests.stop_staging), (P.DRAINING, draining.stop_draining),
        (P.STOPPING, requests.stop_stopping), rest=requests.stop_running,
    ),
    ev.Evict: _row(
        (IDLE, requests.evict_idle), (P.STAGING, requests.stop_staging), (P.DRAINING, ignore),
        (P.STOPPING, requests.stop_stopping), rest=requests.evict_running,
    ),
    ev.Drain: _row(
        (SERVING, draining.drain_serving), (P.DRAINING, draining.drain_draining), (P.ADOPTING, _BUSY),
        (P.STOPPING, draining.drain_stopping), rest=draining.drain_not_serving,
    ),
    ev.Undrain: _row((P.DRAINING, draining.undrain), (RISING | SERVING, ignore), rest=draining.undrain_ended),
    ev.Hold: _row(rest=requests.hold),
    ev.Release: _row(rest=requests.release),
    ev.ResetBreaker: _row(rest=requests.reset_breaker),
    ev.Purge: _row((P.DOWN, requests.purge), rest=_BUSY),
    ev.Sleep: _row((P.READY, draining.sleep_serving), rest=_NOT_READY),
    ev.Wake: _row((P.SLEEPING, sleeping.wake), rest=_NOT_ASLEEP),
    ev.Adopt: _row((P.DOWN, adopting.adopt), rest=_IN_USE),
    # decisions made elsewhere
    ev.Quarantine: _row(rest=requests.quarantine),
    ev.EndQuarantine: _row(rest=requests.end_quarantine),
    ev.LeasesChanged: _row((P.DRAINING, draining.leases_changed), rest=ignore),
    # the timer
    ev.Tick: _row(
        (P.STAGING, starting.staging_tick), (P.STARTING, starting.starting_tick), (P.WARMING, starting.warming_tick),
        (SERVING, serving.serving_tick), ({P.SLEEPING, P.WAKING}, sleeping.sleeping_tick),
        (P.DRAINING, draining.draining_tick), (P.STOPPING, ending.stopping_tick), (WAITING, relaunch.due_start),
        (P.ADOPTING, adopting.adopting_tick), rest=ignore,
    ),
    # news of one launch
    ev.StagingProgress: _row((P.STAGING, starting.stage_progress), rest=ignore),
    ev.Staged: _row((P.STAGING, starting.staged), rest=ignore),
    ev.StagingFailed: _row((P.STAGING, starting.staging_failed), rest=ignore),
    ev.Spawned: _row(
        (P.STARTING, starting.spawned), (P.STOPPING, ending.spawned_stopping), (IDLE, ending.spawned_late), rest=ignore,
    ),
    ev.SpawnFailed: _row((P.STARTING, starting.spawn_failed), (P.STOPPING, ending.not_spawned_stopping), rest=ignore),
    ev.ProbeSucceeded: _row(
        (P.STARTING, starting.starting_ok), (P.WAKING, sleeping.waking_ok), (P.ATTACHED, serving.attached_ok),
        ({P.READY, P.DRAINING}, serving.probe_ok), rest=ignore,
    ),
    ev.ProbeFailed: _row(
        (PROBED_AT_START, starting.starting_failed), (P.READY, serving.probe_failed), (P.ATTACHED, serving.attached_probe_failed),
        (P.DRAINING, serving.draining_probe_failed), rest=ignore,
    ),
    ev.ProbeDiscarded: _row((PROBED_AT_START | SERVING | {P.DRAINING}, starting.probe_discarded), rest=ignore),
    ev.WarmedUp: _row((P.WARMING, starting.warmed_up), rest=ignore),
    ev.WarmupFailed: _row((P.WARMING, starting.warmup_failed), rest=ignore),
    ev.CacheRestored: _row((P.WARMING, starting.cache_restored), rest=ignore),
    ev.CacheSaved: _row((P.STOPPING, ending.cache_saved), rest=ignore),
    ev.Died: _row((RUNNING, ending.died), (P.STOPPING, ending.died_stopping), (P.FAILED, ending.died_failed), rest=ignore),
    ev.Exited: _row((RUNNING, ending.exited_running), (P.STOPPING, ending.exited), (P.FAILED, ending.exited_failed), rest=ignore),
    ev.VramFree: _row(({P.STOPPING, P.FAILED}, ending.vram_free), rest=ignore),
    ev.VramHeld: _row(({P.STOPPING, P.FAILED}, ending.vram_held), rest=ignore),
    ev.HelperDied: _row(
        (P.STAGING, starting.staging_helper_died), (P.STARTING, starting.starting_helper_died),
        (P.WARMING, starting.warming_helper_died), (P.ADOPTING, adopting.adopting_helper_died),
        ({P.SLEEPING, P.WAKING}, sleeping.stuck_asleep), (P.STOPPING, ending.helper_died_stopping), rest=ignore,
    ),
    ev.Adopted: _row((P.ADOPTING, adopting.adopted), (P.STOPPING, adopting.adopted_stopping), rest=ignore),
    ev.NotAdopted: _row((P.ADOPTING, adopting.not_adopted), (P.STOPPING, ending.not_spawned_stopping), rest=ignore),
    ev.Slept: _row((P.SLEEPING, sleeping.slept), rest=ignore),
    ev.SleepFailed: _row((P.SLEEPING, sleeping.not_asleep), rest=ignore),
    ev.NoRoomToWake: _row((P.WAKING, sleeping.no_room), rest=ignore),
    ev.Woke: _row((P.WAKING, sleeping.woke), rest=ignore),
}  # fmt: skip


def step(pool: PoolState, event: ev.Event, now: float, policy: Policy) -> Step:
    """What ``event`` makes of ``pool`` at monotonic second ``now``, and what is to be done about it.

    News of another launch than the present one changes nothing.
    """
    if isinstance(event, ev.EpochEvent) and event.epoch != pool.active.epoch:
        return pool, ()
    return TABLE[type(event)][pool.active.phase](pool, event, now, policy)


def next_timer(pool: PoolState, policy: Policy) -> float | None:
    """The monotonic second of the next Tick that matters, None when only news can change anything."""
    i, lost_probe = pool.active, None
    if i.probe_sent_at is not None and i.phase in SERVING:
        lost_probe = i.probe_sent_at + policy.probe_timeout_s * 2 + policy.probe_interval_s + 0.001
    times = [t for t in (i.deadline, i.next_probe_at, lost_probe, serving.forgets_at(pool, policy)) if t is not None]
    return min(times, default=None)
