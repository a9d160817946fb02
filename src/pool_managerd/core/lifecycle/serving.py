"""While an engine serves: probes, of an engine of ours and of one that somebody else runs."""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core import narration
from pool_managerd.core.activity import Activity, Verdict
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.health import next_probe_at
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.ending import begin_stop
from pool_managerd.core.lifecycle.instance import After
from pool_managerd.core.lifecycle.phase import SERVING, Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import PoolState, Step, on, then
from pool_managerd.core.lifecycle.relaunch import remember
from pool_managerd.core.lifecycle.starting import not_believed, send_due_probe

SILENT_PROBES_PER_S = 50

# --- an engine of ours ----------------------------------------------------------------------------------------------


def probe_ok(pool: PoolState, e: ev.ProbeSucceeded, now: float, p: Policy) -> Step:
    """A good answer, unless it is the answer of an engine whose work stands still."""
    i = pool.active
    healthy = on(
        pool, last_good_at=now, probe_failures=0, probe_reason="", hung=False, busy=False, probe_sent_at=None,
        next_probe_at=next_probe_at(now, p.probe_interval_s),
    )  # fmt: skip
    if e.activity.verdict.stands_still and i.phase in SERVING:
        error = f"health check failed: it answers its health probes, but {e.activity.why}"
        return _unhealthy(on(healthy, hung=i.hung), error, CrashClass.HUNG, now, p)
    if not (i.hung or i.busy):
        return healthy, ()
    say = do.Say("recovered", f"Engine of pool '{pool.pool_id}' {'works' if i.hung else 'answers its health probes'} again")
    return replace(healthy, last_error=pool.last_error if pool.quarantined else None), (say,)


def probe_failed(pool: PoolState, e: ev.ProbeFailed, now: float, p: Policy) -> Step:
    """``failure_threshold`` in a row make it unhealthy, unless it is busy. A gap in our own time discards the history (A9)."""
    i = pool.active
    asleep = i.probe_sent_at is not None and now - i.probe_sent_at > p.longest_probe_s
    failures = 1 if asleep else i.probe_failures + 1
    failed = on(
        pool, probe_failures=failures, probe_reason=e.reason, probe_sent_at=None, next_probe_at=now + p.probe_interval_s
    )  # fmt: skip
    if failures < p.failure_threshold and not e.conclusive:  # beside those that failed others may not have been sent
        return (failed, ()) if asleep else not_believed(failed, f"no good probe, the last one {e.reason},", now, p)
    if e.timed_out and e.activity.verdict is Verdict.BUSY:
        return _busy(failed, e.activity)
    error = f"health check failed: {narration.count(failures, 'probe')} in a row failed; the last one {e.reason}"
    if e.conclusive:
        error = f"health check failed: the probe {e.reason}"
    still = e.timed_out and e.activity.verdict is not Verdict.UNKNOWN
    error += f"; {e.activity.why}" if still else ""
    return _unhealthy(failed, error, CrashClass.HUNG if still else CrashClass.HEALTH_FAILURE, now, p)


def _busy(pool: PoolState, seen: Activity) -> Step:
    """Silence alone never ends an engine that works: it takes no new leases until it answers, and keeps those it has."""
    if pool.active.busy or pool.active.hung:
        return pool, ()
    error = f"health check failed: it {seen.why} and answers no health probes"
    human = f"Engine of pool '{pool.pool_id}' {seen.why} and answers no probes: it takes no new leases until it does"
    return on(replace(pool, last_error=error), busy=True), (do.Say("busy", human, level="warn", fields={"last_error": error}),)


def _unhealthy(pool: PoolState, error: str, crash: CrashClass, now: float, p: Policy) -> Step:
    """It is replaced; an engine of somebody else's, or of profile dev, is left running and not shown as ready, said once."""
    i = pool.active
    left_running = p.fail_open or i.phase is Phase.ATTACHED
    if i.hung and left_running:
        return pool, ()
    what = "stands still" if crash is CrashClass.HUNG else "stopped answering"
    fields = {"last_error": error, "probe_failures": i.probe_failures}
    hung = on(replace(pool, last_error=error), hung=True, busy=False)
    if left_running:
        human = f"Engine of pool '{pool.pool_id}' {what}; it is left running and may come back"
        return hung, (do.Say("unhealthy", human, level="warn", fields=fields),)
    human = f"Engine of pool '{pool.pool_id}' {what}{'' if crash is CrashClass.HUNG else ' its health probes'}; replacing it"
    say = do.Say("unhealthy", human, level="error", fields={**fields, "crash_count": pool.crash_count + 1})
    return then((say,), begin_stop(hung, now, p, After.RECOVER, error=error, crash=crash))


def draining_probe_failed(pool: PoolState, e: ev.ProbeFailed, now: float, p: Policy) -> Step:
    """A draining engine is on its way out: it is remembered, nothing more."""
    failures = pool.active.probe_failures + 1
    return on(pool, probe_failures=failures, probe_sent_at=None, next_probe_at=now + p.probe_interval_s), ()


def serving_tick(pool: PoolState, e: ev.Tick, now: float, p: Policy) -> Step:
    """A probe whose answer never came back (its helper is gone) counts as a failed one."""
    i = pool.active
    if i.probe_sent_at is not None and now - i.probe_sent_at > p.probe_timeout_s * 2 + p.probe_interval_s:
        failed = attached_probe_failed if i.phase is Phase.ATTACHED else probe_failed
        return failed(pool, ev.ProbeFailed(i.epoch, "was never answered"), now, p)
    forgets = forgets_at(pool, p)
    if forgets is None or now < forgets or i.ready_since is None:
        return send_due_probe(pool, now, p)
    stable, told = remember(pool, pool.history.stable(i.ready_since, now, p), now)
    return then(told, send_due_probe(stable, now, p))


def forgets_at(pool: PoolState, p: Policy) -> float | None:
    """When it will have been ready for so long that some of its failures are forgotten; None when there is nothing to forget."""
    i = pool.active
    if i.phase is not Phase.READY or i.hung or i.ready_since is None:
        return None
    return pool.history.next_forgotten_at(i.ready_since, p)


# --- an engine that somebody else runs: never signalled, never restarted --------------------------------------------


def attached_ok(pool: PoolState, e: ev.ProbeSucceeded, now: float, p: Policy) -> Step:
    healthy, said = probe_ok(pool, e, now, p)
    i = pool.active
    if i.last_good_at is not None:
        return healthy, said
    took = round((now - i.launched_at) * 1000) if i.launched_at is not None else 0
    ready = on(replace(healthy, last_error=None, reason=None), ready_since=now)
    human = f"Pool '{pool.pool_id}' is ready; its engine is external"
    return ready, (*said, do.Announce(i.epoch), do.Say("preload_succeeded", human, fields={"duration_ms": took}))


def attached_probe_failed(pool: PoolState, e: ev.ProbeFailed, now: float, p: Policy) -> Step:
    """The pool is un-ready until the engine answers again."""
    i = pool.active
    failures, silent = i.probe_failures + 1, i.last_good_at is None
    # Those that do not answer are asked so many times a second all together: there may be a thousand of them.
    gap_s = max(p.probe_gap_ms / 1000, e.silent / SILENT_PROBES_PER_S) if silent else p.probe_interval_s
    failed = on(pool, probe_failures=failures, probe_reason=e.reason, probe_sent_at=None, next_probe_at=now + gap_s)
    if silent:
        return _still_silent(failed, e, now, p)
    if failures < p.failure_threshold:
        return failed, ()
    error = f"health check failed: {narration.count(failures, 'probe')} in a row failed; the last one {e.reason}"
    human = f"The attached engine of pool '{pool.pool_id}' stopped answering"
    gone = on(replace(failed, reason="engine_failed", last_error=error), last_good_at=None, ready_since=None)
    return gone, (do.Say("unhealthy", human, level="warn", fields={"last_error": error}),)


def _still_silent(pool: PoolState, e: ev.ProbeFailed, now: float, p: Policy) -> Step:
    """It never answered. Once it has had its time, whoever waits is told, and the probing goes on."""
    waited_s = now - (pool.active.launched_at or now)
    if pool.reason is None and waited_s >= p.startup_timeout_s:
        limit = narration.duration(p.startup_timeout_s)
        error = f"health check failed: nothing healthy answered within {limit}; the last probe {e.reason}"
        fields = {"reason": "preload_failed", "last_error": error, "duration_ms": round(waited_s * 1000)}
        say = do.Say("preload_failed", f"Pool '{pool.pool_id}' is not ready: {error}", level="error", fields=fields)
        return replace(pool, reason="preload_failed", last_error=error), (say,)
    if pool.reason is not None or pool.quarantined:
        return pool, ()
    return replace(pool, last_error=f"health check failed: nothing healthy answers; the last probe {e.reason}"), ()
