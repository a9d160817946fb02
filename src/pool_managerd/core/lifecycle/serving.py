"""While an engine serves: probes, drain, sleep, flags, the breaker."""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core import narration
from pool_managerd.core.health import next_probe_at
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.ending import Step, begin_stop, launch, to, with_effects
from pool_managerd.core.lifecycle.instance import RISING, After, Instance, Phase, Policy
from pool_managerd.core.lifecycle.starting import become_ready, cancel_staging, refuse, refusing_request, send_due_probe

SILENT_PROBES_PER_S = 50
KEEP_THEIR_ERROR = (Phase.FAILED, Phase.BACKOFF, Phase.OPEN)
"""Where the last error says why nothing runs: a quarantine has its own place to be told."""

# --- probes ---------------------------------------------------------------------------------------------------------


def probe_ok(i: Instance, e: ev.ProbeSucceeded, now: float, p: Policy) -> Step:
    healthy = replace(i, last_good_at=now, probe_failures=0, probe_reason="", hung=False, probe_sent_at=None,
                      next_probe_at=next_probe_at(now, p.probe_interval_s))  # fmt: skip
    if i.hung:
        return replace(healthy, last_error=i.last_error if i.quarantined else None), (
            do.Say("recovered", f"Engine of pool '{i.pool_id}' answers its health probes again"),
        )
    return healthy, ()


def probe_missed(i: Instance, e: ev.ProbeMissed, now: float, p: Policy) -> Step:
    """``failure_threshold`` misses in a row make it unhealthy. A gap in our own time discards the history (A9)."""
    asleep = i.probe_sent_at is not None and now - i.probe_sent_at > 2 * (p.probe_interval_s + p.probe_timeout_s)
    misses = 1 if asleep else i.probe_failures + 1
    missed = replace(i, probe_failures=misses, probe_reason=e.reason, probe_sent_at=None, next_probe_at=now + p.probe_interval_s)
    if (misses < p.failure_threshold and not e.conclusive) or (i.hung and p.fail_open):
        return missed, ()
    error = f"health check failed: {narration.count(misses, 'probe')} in a row failed; the last one {e.reason}"
    if e.conclusive:
        error = f"health check failed: the probe {e.reason}"
    fields = {"last_error": error, "probe_failures": misses}
    if p.fail_open:
        human = f"Engine of pool '{i.pool_id}' stopped answering; it is left running and may come back"
        return replace(missed, hung=True, last_error=error), (do.Say("unhealthy", human, level="warn", fields=fields),)
    human = f"Engine of pool '{i.pool_id}' stopped answering its health probes; replacing it"
    failed = replace(missed, hung=True, last_error=error, crash_count=i.crash_count + 1)
    say = do.Say("unhealthy", human, level="error", fields={**fields, "crash_count": failed.crash_count})
    return with_effects((say,), begin_stop(failed, now, p, After.RECOVER, error=error))


def draining_miss(i: Instance, e: ev.ProbeMissed, now: float, p: Policy) -> Step:
    """A draining engine is on its way out: misses are remembered, nothing more."""
    return replace(i, probe_failures=i.probe_failures + 1, probe_sent_at=None, next_probe_at=now + p.probe_interval_s), ()


def attached_ok(i: Instance, e: ev.ProbeSucceeded, now: float, p: Policy) -> Step:
    healthy, said = probe_ok(i, e, now, p)
    if i.last_good_at is not None:
        return healthy, said
    took = round((now - i.launched_at) * 1000) if i.launched_at is not None else 0
    ready = replace(healthy, ready_since=now, last_error=None, reason=None)
    say = do.Say("preload_succeeded", f"Pool '{i.pool_id}' is ready; its engine is somebody else's", fields={"duration_ms": took})
    return ready, (*said, do.Announce(i.epoch), say)


def attached_miss(i: Instance, e: ev.ProbeMissed, now: float, p: Policy) -> Step:
    """Never signalled, never restarted: the pool is un-ready until the engine answers again."""
    misses = i.probe_failures + 1
    # Those that do not answer are asked so many times a second all together: there may be a thousand of them.
    gap_s = p.probe_interval_s if i.last_good_at is not None else max(p.probe_gap_ms / 1000, e.silent / SILENT_PROBES_PER_S)
    missed = replace(i, probe_failures=misses, probe_reason=e.reason, probe_sent_at=None, next_probe_at=now + gap_s)
    if i.last_good_at is None:
        waited = now - (i.launched_at or now)
        if i.reason is None and waited >= p.startup_timeout_s:
            return _nobody_there(missed, waited, p)
        if i.reason is not None or i.quarantined:
            return missed, ()
        return replace(missed, last_error=f"health check failed: nothing healthy answers; the last probe {e.reason}"), ()
    if misses < p.failure_threshold:
        return missed, ()
    error = f"health check failed: {narration.count(misses, 'probe')} in a row failed; the last one {e.reason}"
    human = f"The attached engine of pool '{i.pool_id}' stopped answering"
    gone = replace(missed, last_good_at=None, ready_since=None, reason="engine_failed", last_error=error)
    return gone, (do.Say("unhealthy", human, level="warn", fields={"last_error": error}),)


def _nobody_there(i: Instance, waited_s: float, p: Policy) -> Step:
    """An external engine that never answered: whoever waits is told, and the probing goes on."""
    limit = narration.duration(p.startup_timeout_s)
    error = f"health check failed: nothing healthy answered within {limit}; the last probe {i.probe_reason}"
    fields = {"reason": "preload_failed", "last_error": error, "duration_ms": round(waited_s * 1000)}
    say = do.Say("preload_failed", f"Pool '{i.pool_id}' is not ready: {error}", level="error", fields=fields)
    return replace(i, reason="preload_failed", last_error=error), (say,)


def serving_tick(i: Instance, e: ev.Tick, now: float, p: Policy) -> Step:
    """A probe whose answer never came back (its helper is gone) counts as a miss."""
    if i.probe_sent_at is not None and now - i.probe_sent_at > p.probe_timeout_s * 2 + p.probe_interval_s:
        missed = attached_miss if i.phase is Phase.ATTACHED else probe_missed
        return missed(i, ev.ProbeMissed(i.epoch, "was never answered"), now, p)
    return send_due_probe(i, now)


# --- drain ----------------------------------------------------------------------------------------------------------


def drain_serving(i: Instance, e: ev.Drain, now: float, p: Policy) -> Step:
    """Refuse leases from this step on; stop as soon as nothing is in flight, at the latest at the deadline."""
    draining = to(
        i, Phase.DRAINING, now, deadline=now + e.deadline_ms / 1000, next_probe_at=now + p.probe_interval_s,
        drain_since=now, drain_leases=e.active_leases, force_stopped=False,
    )  # fmt: skip
    say = drain_started(i, e.active_leases, e.deadline_ms)
    if e.active_leases == 0:
        return with_effects((say,), begin_stop(draining, now, p, After.STAY))
    if e.deadline_ms == 0:
        return with_effects((say,), _force(draining, now, p))
    return draining, (say,)


def drain_not_serving(i: Instance, e: ev.Drain, now: float, p: Policy) -> Step:
    """Nothing is in flight on an engine that is not ready: stop it now and stay down."""
    draining = replace(i, drain_since=now, drain_leases=0, force_stopped=False, owed=False)
    say = drain_started(i, 0, e.deadline_ms)
    if i.phase is Phase.STAGING:
        return with_effects((say, do.CancelStaging(i.epoch)), begin_stop(draining, now, p, After.STAY))
    return with_effects((say,), begin_stop(draining, now, p, After.STAY))


def drain_started(i: Instance, leases: int, deadline_ms: int) -> do.Say:
    human = narration.draining(i.pool_id, leases, deadline_ms)
    fields = {"active_leases": leases, "deadline_ms": deadline_ms}
    return do.Say("drain_started", human, level="warn" if leases else "info", fields=fields)


def leases_changed(i: Instance, e: ev.LeasesChanged, now: float, p: Policy) -> Step:
    still = replace(i, drain_leases=e.active)
    return (still, ()) if e.active else begin_stop(still, now, p, After.STAY)


def drain_draining(i: Instance, e: ev.Drain, now: float, p: Policy) -> Step:
    """Another caller wants the same: both wait for one end, and the earlier deadline holds."""
    deadline = now + e.deadline_ms / 1000
    sooner = replace(i, deadline=deadline if i.deadline is None else min(i.deadline, deadline))
    return _force(sooner, now, p) if e.deadline_ms == 0 else (sooner, ())


def drain_stopping(i: Instance, e: ev.Drain, now: float, p: Policy) -> Step:
    """It is ending already: it stays down, and whoever asked waits for that."""
    since = now if i.drain_since is None else i.drain_since
    return replace(i, after=After.STAY, drain_since=since, drained=True, owed=False), ()


def draining_tick(i: Instance, e: ev.Tick, now: float, p: Policy) -> Step:
    if i.deadline is not None and now >= i.deadline:
        return _force(i, now, p)
    return send_due_probe(i, now)


def stop_draining(i: Instance, e: ev.Stop, now: float, p: Policy) -> Step:
    """Whoever asks to stop does not want to wait for leases any longer."""
    return _force(i, now, p)


def _force(i: Instance, now: float, p: Policy) -> Step:
    return begin_stop(replace(i, force_stopped=i.drain_leases > 0), now, p, After.STAY)


def undrain(i: Instance, e: ev.Undrain, now: float, p: Policy) -> Step:
    """Back to serving; ready again at once only when a probe of this launch was good just now."""
    back = replace(i, drain_since=None, drain_leases=0, force_stopped=False, probe_sent_at=None)
    say = do.Say("undrain", f"Drain of pool '{i.pool_id}' was taken back")
    if i.external:
        return to(back, Phase.ATTACHED, now, next_probe_at=now), (say,)
    fresh = i.last_good_at is not None and now - i.last_good_at <= p.fresh_s and i.probe_failures == 0
    if fresh:
        return to(back, Phase.READY, now, next_probe_at=now + p.probe_interval_s), (say,)
    return to(back, Phase.STARTING, now, deadline=now + p.startup_timeout_s, next_probe_at=now, warmed=True), (say,)


def undrain_ended(i: Instance, e: ev.Undrain, now: float, p: Policy) -> Step:
    """Too late: the drain has stopped the engine, or will in a moment."""
    over = i.drained or i.drain_since is not None
    why = "its engine is down; start it instead" if over else "it is not draining"
    return refuse(i, "INVALID_PARAMS", f"cannot undrain pool '{i.pool_id}': {why}")


# --- stop, hold, quarantine, breaker --------------------------------------------------------------------------------


def stop_idle(i: Instance, e: ev.Stop, now: float, p: Policy) -> Step:
    """Nothing runs, so a start that was due is forgotten; but a process or memory that would not go is asked again."""
    if i.has_process or i.vram_pending:
        return stop_running(i, e, now, p)
    down = to(i, Phase.DOWN, now, owed=False, reason=None, drained=True)
    if i.phase is Phase.DOWN:
        return down, ()
    return down, (do.Say("stopped", f"Pool '{i.pool_id}' stays down; nothing of it was running"),)


def stop_staging(i: Instance, e: ev.Event, now: float, p: Policy) -> Step:
    step = cancel_staging(i, now)
    return replace(step[0], drained=True, owed=False), step[1]


def stop_running(i: Instance, e: ev.Event, now: float, p: Policy) -> Step:
    return begin_stop(replace(i, drained=True, owed=False), now, p, After.STAY)


def cancel_stopping(i: Instance, e: ev.CancelStart, now: float, p: Policy) -> Step:
    """Another caller has cancelled it, or a start was to follow: nothing follows now."""
    if i.fell_from in RISING or i.after is not After.STAY:
        return replace(i, after=After.STAY, drained=True, owed=False), ()
    return not_starting(i, e, now, p)


not_starting = refusing_request("INVALID_PARAMS", "cannot cancel: pool {pool} is not preloading")


def stop_stopping(i: Instance, e: ev.Stop, now: float, p: Policy) -> Step:
    """Whatever was to follow, nothing follows now."""
    return replace(i, after=After.STAY, drained=True, owed=False), ()


def hold(i: Instance, e: ev.Hold, now: float, p: Policy) -> Step:
    say = do.Say("hold", f"Pool '{i.pool_id}' is held: nothing starts by itself")
    return replace(i, held=True), (say,)


def release(i: Instance, e: ev.Release, now: float, p: Policy) -> Step:
    say = do.Say("release", f"Pool '{i.pool_id}' is no longer held")
    return _resume(replace(i, held=False), now, p, say)


def quarantine(i: Instance, e: ev.Quarantine, now: float, p: Policy) -> Step:
    """Not ready from this step on, and no start. An engine on a lost GPU is ended: it cannot come back with it."""
    if i.quarantined and not (e.lost and i.has_process and i.phase not in (Phase.STOPPING, Phase.FAILED)):
        return replace(i, last_error=i.last_error if i.phase in KEEP_THEIR_ERROR else e.reason), ()
    say = do.Say("quarantine", f"Pool '{i.pool_id}' is quarantined: {e.reason}", level="error", fields={"lost": e.lost})
    barred = replace(i, quarantined=True, last_error=i.last_error if i.phase in KEEP_THEIR_ERROR else e.reason)
    if i.phase is Phase.STAGING:
        step = cancel_staging(barred, now)
        return replace(step[0], owed=i.retry), (say, *step[1])
    if i.phase is Phase.STARTING and not i.has_process:  # the start is owed, once that is known to have come to nothing
        return with_effects((say,), begin_stop(barred, now, p, After.START if i.retry else After.STAY))
    if not (e.lost and i.has_process) or i.phase in (Phase.STOPPING, Phase.FAILED):
        return barred, (say,)
    after = After.STAY if i.phase is Phase.DRAINING else _after_loss(i, p)
    forced = replace(barred, force_stopped=i.phase is Phase.DRAINING and i.drain_leases > 0)
    return with_effects((say,), begin_stop(forced, now, p, after, error=e.reason))


def _after_loss(i: Instance, p: Policy) -> After:
    """The engine did not fail: where it would be restarted, it is when its GPU is back."""
    given_up = p.restart == "never" or (i.ready_since is None and not i.retry)
    return After.RECOVER if given_up else After.START


def end_quarantine(i: Instance, e: ev.EndQuarantine, now: float, p: Policy) -> Step:
    say = do.Say("quarantine_over", f"Pool '{i.pool_id}' is out of quarantine")
    error = i.last_error if i.phase in KEEP_THEIR_ERROR else None
    return _resume(replace(i, quarantined=False, last_error=error), now, p, say)


def _resume(i: Instance, now: float, p: Policy, say: do.Say) -> Step:
    if i.phase is Phase.DOWN and i.owed and not i.held and not i.quarantined:
        return with_effects((say,), launch(i, now, p, origin="restart"))
    return i, (say,)


def open_breaker(i: Instance, e: ev.OpenBreaker, now: float, p: Policy) -> Step:
    if i.has_process or i.vram_pending or i.drained:
        return i, ()
    error = f"pool '{i.pool_id}' failed too often; its circuit breaker is open for {narration.duration(e.open_s)}"
    opened = to(i, Phase.OPEN, now, deadline=now + e.open_s, reason="circuit_open")
    return opened, (do.Say("breaker", error, level="error", fields={"failure_count": i.failures}),)


def reset_breaker(i: Instance, e: ev.ResetBreaker, now: float, p: Policy) -> Step:
    """Failures are forgiven; a start that only the breaker held back happens now."""
    forgiven = replace(i, failures=0)
    if i.phase in (Phase.OPEN, Phase.BACKOFF):
        return launch(forgiven, now, p, origin="restart")
    return forgiven, ()


def due_start(i: Instance, e: ev.Tick, now: float, p: Policy) -> Step:
    """The wait is over: the next start, or the one half-open test of an open breaker."""
    if i.deadline is None or now < i.deadline:
        return i, ()
    return launch(i, now, p, origin="restart")


# --- sleep ----------------------------------------------------------------------------------------------------------


def sleep(i: Instance, e: ev.Sleep, now: float, p: Policy) -> Step:
    asleep = to(i, Phase.SLEEPING, now, deadline=now + p.sleep_timeout_s)
    return asleep, (do.SleepEngine(i.epoch), do.Say("sleep", f"Pool '{i.pool_id}' goes to sleep"))


def slept(i: Instance, e: ev.Slept, now: float, p: Policy) -> Step:
    return replace(i, deadline=None), ()


def wake(i: Instance, e: ev.Wake | ev.Start, now: float, p: Policy) -> Step:
    waking = to(i, Phase.WAKING, now, deadline=now + p.sleep_timeout_s, last_good_at=None)
    return waking, (do.WakeEngine(i.epoch), do.Say("wake", f"Pool '{i.pool_id}' wakes up"))


def woke(i: Instance, e: ev.Woke, now: float, p: Policy) -> Step:
    return replace(i, probe_sent_at=now), (do.SendProbe(i.epoch),)


def waking_ok(i: Instance, e: ev.ProbeSucceeded, now: float, p: Policy) -> Step:
    return become_ready(replace(i, last_good_at=now, probe_failures=0), now, p)


def stuck_asleep(i: Instance, e: ev.HelperDied, now: float, p: Policy) -> Step:
    """An engine that neither sleeps nor wakes is replaced."""
    return begin_stop(i, now, p, After.RECOVER, error=f"cannot put the engine to sleep or wake it: {e.what}")


def sleeping_tick(i: Instance, e: ev.Tick, now: float, p: Policy) -> Step:
    if i.deadline is not None and now >= i.deadline:
        return stuck_asleep(i, ev.HelperDied(i.epoch, "it took too long"), now, p)
    return send_due_probe(i, now)
