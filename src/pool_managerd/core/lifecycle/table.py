"""Rule 1: this table is the lifecycle. Every (phase, event) pair has a row entry; nothing falls through.

``step`` is the only way an instance changes. An event that does not apply either changes nothing (stale or
irrelevant news) or is refused with a reason (a request). The state diagram and table in docs/ are generated from
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pool_managerd.core.lifecycle import ending, serving, starting
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.ending import Step
from pool_managerd.core.lifecycle.instance import RISING, Instance, Phase, Policy

Handler = Callable[[Instance, Any, float, Policy], Step]


def ignore(i: Instance, e: ev.Event, now: float, p: Policy) -> Step:
    """The event does not apply in this phase: it is late, or it asks for what is already so."""
    return i, ()


_BUSY = starting.refusing_request("OPERATION_IN_PROGRESS", "cannot do that now: pool '{pool}' is {state}")
_DRAINING = starting.refusing_request("POOL_DRAINING", "cannot start pool '{pool}': it is draining; undrain it, or wait")
_OPEN = starting.refusing_request("CIRCUIT_OPEN", "cannot start pool '{pool}': its circuit breaker is open; reset it first")
_NOT_READY = starting.refusing_request("POOL_UNREADY", "cannot do that: pool '{pool}' is not ready")
_NOT_ASLEEP = starting.refusing_request("INVALID_PARAMS", "cannot wake pool '{pool}': it is not asleep")
_IN_USE = starting.refusing_request("OPERATION_IN_PROGRESS", "cannot adopt an engine for pool '{pool}': it has one")

P = Phase
ALL = frozenset(Phase)
IDLE = frozenset({P.DOWN, P.FAILED, P.BACKOFF, P.OPEN})
RUNNING = frozenset({P.STARTING, P.WARMING, P.READY, P.SLEEPING, P.WAKING, P.DRAINING})
PROBED_AT_START = frozenset({P.STARTING, P.WAKING})


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
        ({P.DOWN, P.FAILED}, starting.start), (P.BACKOFF, starting.start_when_due), (P.OPEN, _OPEN),
        (P.SLEEPING, serving.wake), (P.DRAINING, _DRAINING), (P.STOPPING, starting.start_after_stop), rest=starting.join_start,
    ),
    ev.CancelStart: _row(
        (P.STAGING, serving.stop_staging), (RISING - {P.STAGING}, serving.stop_running), (P.STOPPING, serving.cancel_stopping),
        rest=serving.not_starting,
    ),
    ev.Restart: _row(
        ({P.DOWN, P.FAILED, P.BACKOFF, P.OPEN}, starting.restart_down), (P.STAGING, ignore),
        (P.STOPPING, starting.restart_after_stop), ({P.DRAINING, P.ADOPTING}, _BUSY), rest=starting.restart_up,
    ),
    ev.Stop: _row(
        (IDLE, serving.stop_idle), (P.STAGING, serving.stop_staging), (P.DRAINING, serving.stop_draining),
        (P.STOPPING, serving.stop_stopping), rest=serving.stop_running,
    ),
    ev.Drain: _row(
        ({P.READY, P.ATTACHED}, serving.drain_serving), (P.DRAINING, serving.drain_draining),
        (P.STOPPING, serving.drain_stopping), rest=serving.drain_not_serving,
    ),
    ev.Undrain: _row((P.DRAINING, serving.undrain), (RISING | {P.READY, P.ATTACHED}, ignore), rest=serving.undrain_ended),
    ev.Hold: _row(rest=serving.hold),
    ev.Release: _row(rest=serving.release),
    ev.ResetBreaker: _row(rest=serving.reset_breaker),
    ev.Sleep: _row((P.READY, serving.sleep), rest=_NOT_READY),
    ev.Wake: _row((P.SLEEPING, serving.wake), rest=_NOT_ASLEEP),
    ev.Adopt: _row((P.DOWN, starting.adopt), rest=_IN_USE),
    # decisions made elsewhere
    ev.Quarantine: _row(rest=serving.quarantine),
    ev.EndQuarantine: _row(rest=serving.end_quarantine),
    ev.OpenBreaker: _row((IDLE, serving.open_breaker), rest=ignore),
    ev.LeasesChanged: _row((P.DRAINING, serving.leases_changed), rest=ignore),
    # the alarm
    ev.Tick: _row(
        (P.STAGING, starting.staging_tick), (P.STARTING, starting.starting_tick), (P.WARMING, starting.warming_tick),
        ({P.READY, P.ATTACHED}, serving.serving_tick), ({P.SLEEPING, P.WAKING}, serving.sleeping_tick),
        (P.DRAINING, serving.draining_tick), (P.STOPPING, ending.stopping_tick), ({P.BACKOFF, P.OPEN}, serving.due_start),
        (P.ADOPTING, starting.adopting_tick), rest=ignore,
    ),
    # news of one launch
    ev.StagingProgress: _row((P.STAGING, starting.stage_progress), rest=ignore),
    ev.Staged: _row((P.STAGING, starting.staged), rest=ignore),
    ev.StagingFailed: _row((P.STAGING, starting.staging_failed), rest=ignore),
    ev.Spawned: _row(
        (P.STARTING, starting.spawned), (P.STOPPING, ending.spawned_stopping), (IDLE, starting.spawned_late), rest=ignore,
    ),
    ev.SpawnFailed: _row((P.STARTING, starting.spawn_failed), (P.STOPPING, ending.not_spawned_stopping), rest=ignore),
    ev.ProbeSucceeded: _row(
        (P.STARTING, starting.starting_ok), (P.WAKING, serving.waking_ok), (P.ATTACHED, serving.attached_ok),
        ({P.READY, P.DRAINING}, serving.probe_ok), rest=ignore,
    ),
    ev.ProbeMissed: _row(
        (PROBED_AT_START, starting.starting_miss), (P.READY, serving.probe_missed), (P.ATTACHED, serving.attached_miss),
        (P.DRAINING, serving.draining_miss), rest=ignore,
    ),
    ev.ProbeDiscarded: _row((PROBED_AT_START | {P.READY, P.ATTACHED, P.DRAINING}, starting.probe_discarded), rest=ignore),
    ev.WarmedUp: _row((P.WARMING, starting.warmed_up), rest=ignore),
    ev.WarmupFailed: _row((P.WARMING, starting.warmup_failed), rest=ignore),
    ev.Died: _row((RUNNING, ending.died), (P.STOPPING, ending.died_stopping), (P.FAILED, ending.died_failed), rest=ignore),
    ev.Exited: _row((RUNNING, ending.exited_running), (P.STOPPING, ending.exited), (P.FAILED, ending.exited_failed), rest=ignore),
    ev.VramFree: _row(({P.STOPPING, P.FAILED}, ending.vram_free), rest=ignore),
    ev.VramHeld: _row(({P.STOPPING, P.FAILED}, ending.vram_held), rest=ignore),
    ev.HelperDied: _row(
        (P.STAGING, starting.staging_helper_died), (P.STARTING, starting.starting_helper_died),
        (P.WARMING, starting.warming_helper_died), (P.ADOPTING, starting.adopting_helper_died),
        ({P.SLEEPING, P.WAKING}, serving.stuck_asleep), (P.STOPPING, ending.not_spawned_stopping), rest=ignore,
    ),
    ev.Adopted: _row((P.ADOPTING, starting.adopted), rest=ignore),
    ev.NotAdopted: _row((P.ADOPTING, starting.not_adopted), rest=ignore),
    ev.Slept: _row((P.SLEEPING, serving.slept), rest=ignore),
    ev.Woke: _row((P.WAKING, serving.woke), rest=ignore),
}  # fmt: skip


def step(instance: Instance, event: ev.Event, now: float, policy: Policy) -> Step:
    """What ``event`` makes of ``instance`` at monotonic second ``now``, and what is to be done about it.

    News of another launch than the present one changes nothing.
    """
    if isinstance(event, ev.EpochEvent) and event.epoch != instance.epoch:
        return instance, ()
    return TABLE[type(event)][instance.phase](instance, event, now, policy)


def next_alarm(instance: Instance, policy: Policy) -> float | None:
    """The monotonic second of the next Tick that matters, None when only news can change anything."""
    lost_probe = None
    if instance.probe_sent_at is not None and instance.phase in (P.READY, P.ATTACHED):
        lost_probe = instance.probe_sent_at + policy.probe_timeout_s * 2 + policy.probe_interval_s + 0.001
    times = [t for t in (instance.deadline, instance.next_probe_at, lost_probe) if t is not None]
    return min(times, default=None)
