"""Draining: no new lease from this step on, wait for those in flight, stop at the latest at the deadline (ORCH-3505)."""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core import narration
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.ending import begin_stop
from pool_managerd.core.lifecycle.instance import After
from pool_managerd.core.lifecycle.phase import Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import Desired, PoolState, Step, on, refuse, then, to
from pool_managerd.core.lifecycle.sleeping import fall_asleep
from pool_managerd.core.lifecycle.starting import send_due_probe


def drain_serving(pool: PoolState, e: ev.Drain, now: float, p: Policy) -> Step:
    """Stop as soon as nothing is in flight."""
    unwanted = replace(pool, desired=Desired.DRAINED, pending_start=False)
    draining, said = _begun(on(unwanted, drain_recall=e.recall), e, now, p)
    if e.active_leases == 0:
        return then(said, _emptied(draining, now, p))
    if e.deadline_ms == 0 and not e.recall:
        return then(said, _force(draining, now, p))
    return draining, said


def sleep_serving(pool: PoolState, e: ev.Sleep, now: float, p: Policy) -> Step:
    """Nobody's request is cut off for it: when the deadline passes it stays awake. It is wanted as it was."""
    draining, said = _begun(on(pool, drain_recall=True, drain_sleeps=True), e, now, p)
    return (draining, said) if e.active_leases else then(said, _emptied(draining, now, p))


def _begun(pool: PoolState, e: ev.Drain | ev.Sleep, now: float, p: Policy) -> Step:
    draining = to(
        pool, Phase.DRAINING, now, deadline=now + e.deadline_ms / 1000, next_probe_at=now + p.probe_interval_s, drain_since=now,
        drain_leases=e.active_leases, force_stopped=False,
    )  # fmt: skip
    return draining, (_started(pool, e.active_leases, e.deadline_ms),)


def _emptied(pool: PoolState, now: float, p: Policy) -> Step:
    """Nothing is in flight any more."""
    return fall_asleep(pool, now, p) if pool.active.drain_sleeps else begin_stop(pool, now, p, After.STAY)


def drain_not_serving(pool: PoolState, e: ev.Drain, now: float, p: Policy) -> Step:
    """Nothing is in flight on an engine that is not ready: stop it now and stay down."""
    drained = replace(pool, desired=Desired.DRAINED, pending_start=False)
    draining = on(drained, drain_since=now, drain_leases=0, force_stopped=False)
    return then((_started(pool, 0, e.deadline_ms),), begin_stop(draining, now, p, After.STAY))


def drain_draining(pool: PoolState, e: ev.Drain, now: float, p: Policy) -> Step:
    """Another caller wants the same: both wait for one end, and the earlier deadline holds."""
    deadline, before = now + e.deadline_ms / 1000, pool.active.deadline
    unwanted = replace(pool, desired=Desired.DRAINED, pending_start=False)
    sooner = on(unwanted, deadline=deadline if before is None else min(before, deadline), drain_recall=False, drain_sleeps=False)
    return _force(sooner, now, p) if e.deadline_ms == 0 else (sooner, ())


def drain_stopping(pool: PoolState, e: ev.Drain, now: float, p: Policy) -> Step:
    """It is ending already: it stays down, and whoever asked waits for that."""
    since = now if pool.active.drain_since is None else pool.active.drain_since
    return on(replace(pool, desired=Desired.DRAINED, pending_start=False), after=After.STAY, drain_since=since), ()


def leases_changed(pool: PoolState, e: ev.LeasesChanged, now: float, p: Policy) -> Step:
    still = on(pool, drain_leases=e.active)
    return (still, ()) if e.active else _emptied(still, now, p)


def draining_tick(pool: PoolState, e: ev.Tick, now: float, p: Policy) -> Step:
    deadline = pool.active.deadline
    if deadline is not None and now >= deadline:
        return undrain(pool, ev.Undrain(), now, p) if pool.active.drain_recall else _force(pool, now, p)
    return send_due_probe(pool, now, p)


def stop_draining(pool: PoolState, e: ev.Stop, now: float, p: Policy) -> Step:
    """Whoever asks to stop does not want to wait for leases any longer."""
    return _force(on(replace(pool, desired=Desired.STOPPED), drain_sleeps=False), now, p)


def undrain(pool: PoolState, e: ev.Undrain, now: float, p: Policy) -> Step:
    """Back to serving; ready again at once only when a probe of this launch was good just now."""
    i = pool.active
    back = on(
        replace(pool, desired=Desired.WANTED), drain_since=None, drain_leases=0, drain_recall=False, drain_sleeps=False,
        force_stopped=False, probe_sent_at=None,
    )  # fmt: skip
    say = do.Say("undrain", f"Drain of pool '{pool.pool_id}' was taken back")
    if i.external:
        return to(back, Phase.ATTACHED, now, next_probe_at=now), (say,)
    fresh = i.last_good_at is not None and now - i.last_good_at <= p.fresh_s and i.probe_failures == 0
    if fresh:
        return to(back, Phase.READY, now, next_probe_at=now + p.probe_interval_s), (say,)
    return to(back, Phase.STARTING, now, deadline=now + p.startup_timeout_s, next_probe_at=now, warmed=True), (say,)


def undrain_ended(pool: PoolState, e: ev.Undrain, now: float, p: Policy) -> Step:
    """Too late: the drain has stopped the engine, or will in a moment."""
    over = pool.desired.stays_down or pool.active.drain_since is not None
    why = "its engine is down; start it instead" if over else "it is not draining"
    return refuse(pool, "INVALID_PARAMS", f"cannot undrain pool '{pool.pool_id}': {why}")


def _force(pool: PoolState, now: float, p: Policy) -> Step:
    return begin_stop(on(pool, force_stopped=pool.active.drain_leases > 0), now, p, After.STAY)


def _started(pool: PoolState, leases: int, deadline_ms: int) -> do.Say:
    human = narration.draining(pool.pool_id, leases, deadline_ms)
    fields = {"active_leases": leases, "deadline_ms": deadline_ms}
    return do.Say("drain_started", human, level="warn" if leases else "info", fields=fields)
