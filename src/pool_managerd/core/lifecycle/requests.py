"""What people, demand and the GPUs ask of a pool: start, stop, evict, restart, cancel, hold, quarantine, breaker.

The last one to ask decides what is wanted (``desired``). Hold and quarantine stand beside it: they keep a start from
happening without making anybody want it less, and the start that they kept from happening is due when both are over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pool_managerd.core import narration
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.ending import begin_stop, terminate
from pool_managerd.core.lifecycle.history import FailureHistory
from pool_managerd.core.lifecycle.instance import After, Instance
from pool_managerd.core.lifecycle.phase import AFTER_FAILURE, ENDING, RISING, WAITING, Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import Desired, PoolState, Step, on, refuse, then, to
from pool_managerd.core.lifecycle.relaunch import launch, remember
from pool_managerd.core.lifecycle.sleeping import fall_asleep, wake
from pool_managerd.core.lifecycle.starting import cancel_staging
from pool_managerd.core.lifecycle.view import view

Handler = Callable[[PoolState, ev.Event, float, Policy], Step]
_BY_ITSELF = ("boot", "demand")
"""Starts that no person asked for."""


def refusing(code: str, why: str) -> Handler:
    """A handler that refuses with ``why``; ``{pool}`` and ``{state}`` in it are filled in."""

    def handler(pool: PoolState, e: ev.Event, now: float, p: Policy) -> Step:
        return refuse(pool, code, why.format(pool=pool.pool_id, state=view(pool).state))

    return handler


# --- start, restart -------------------------------------------------------------------------------------------------


def start(pool: PoolState, e: ev.Start, now: float, p: Policy) -> Step:
    """A start by request, at boot or on demand. What stands in its way says so."""
    if (barred := _barred(pool, "start", e.origin)) is not None:
        return barred
    if pool.active.has_process:
        return refuse(
            pool, "OPERATION_IN_PROGRESS", f"cannot start pool '{pool.pool_id}': its last engine process is still there"
        )
    until = pool.history.open_until
    if until is not None and now < until and e.origin == "demand":
        left = narration.duration(until - now)
        why = f"cannot start pool '{pool.pool_id}': its circuit breaker is open for {left} more; start or reset it by hand"
        return refuse(pool, "CIRCUIT_OPEN", why, retry_after_s=until - now)
    wanted = replace(pool, retry=e.retry, port_conflicts=0, proven=pool.proven and not e.anew)
    return launch(wanted, now, p, origin=e.origin, by_hand=e.origin not in _BY_ITSELF)


def join_start(pool: PoolState, e: ev.Start, now: float, p: Policy) -> Step:
    """It is under way, or done: whoever asks waits for the same end, unless a start of their own was asked for."""
    if e.join:
        return pool, ()
    if view(pool).ready:
        return refuse(pool, "ALREADY_READY", f"cannot start pool '{pool.pool_id}': it is already ready")
    if pool.active.phase in RISING:
        return refuse(pool, "OPERATION_IN_PROGRESS", f"cannot start pool '{pool.pool_id}': it is being started already")
    why = f": {pool.last_error}" if pool.last_error else ""
    return refuse(pool, "OPERATION_IN_PROGRESS", f"cannot start pool '{pool.pool_id}': it has an engine that is not ready{why}")


def start_adopting(pool: PoolState, e: ev.Start, now: float, p: Policy) -> Step:
    """Whether its engine can be taken over is not known yet; that it is wanted is, so that a start follows where it cannot."""
    wanted = e.join and _barred(pool, "start", e.origin) is None
    return (replace(pool, desired=Desired.WANTED), ()) if wanted else join_start(pool, e, now, p)


def start_when_due(pool: PoolState, e: ev.Start, now: float, p: Policy) -> Step:
    """Demand does not hasten the restart of an engine that keeps failing; a person's request does, and so does room for one that
    lacked nothing else.
    """
    return join_start(pool, e, now, p) if e.origin == "demand" and not pool.lacks_room else start(pool, e, now, p)


def start_after_stop(pool: PoolState, e: ev.Start, now: float, p: Policy) -> Step:
    """The engine is ending: the start follows as soon as it holds nothing any more. The last request wins."""
    if not e.join:
        return refuse(pool, "OPERATION_IN_PROGRESS", f"cannot start pool '{pool.pool_id}': its engine is being stopped")
    if (barred := _barred(pool, "start", e.origin)) is not None:
        return barred
    after = pool.active.after
    if e.origin == "demand" and after is After.RECOVER:
        return pool, ()
    wanted = replace(
        pool, desired=Desired.WANTED, pending_start=False, retry=e.retry, port_conflicts=0, proven=pool.proven and not e.anew
    )  # fmt: skip
    return on(wanted, after=after if after is After.START else After.NEW_START), ()


def restart_after_stop(pool: PoolState, e: ev.Restart, now: float, p: Policy) -> Step:
    if (barred := _barred(pool, "restart")) is not None:
        return barred
    return on(replace(pool, desired=Desired.WANTED, pending_start=False, port_conflicts=0), after=After.START), ()


def restart_down(pool: PoolState, e: ev.Restart, now: float, p: Policy) -> Step:
    return start(pool, ev.Start(retry=pool.retry, origin="restart"), now, p)


def restart_up(pool: PoolState, e: ev.Restart, now: float, p: Policy) -> Step:
    if (barred := _barred(pool, "restart")) is not None:
        return barred
    return begin_stop(replace(pool, port_conflicts=0), now, p, After.START)


def _barred(pool: PoolState, what: str, origin: str = "request") -> Step | None:
    """The refusal of a start that something stands in the way of; None when nothing does."""
    cannot = f"cannot {what} pool '{pool.pool_id}'"
    if pool.held:
        return refuse(pool, "POOL_HELD", f"{cannot}: it is held; release it first")
    if origin == "demand" and pool.desired.stays_down:
        return refuse(pool, "POOL_STOPPED", f"{cannot} on demand: it was {pool.desired.value} by request; start it first")
    if pool.quarantined:
        why = f": {pool.last_error}" if pool.last_error else ""
        return refuse(pool, "POOL_UNAVAILABLE", f"{cannot}: one of its GPUs is quarantined{why}")
    return None


# --- stop, evict, cancel --------------------------------------------------------------------------------------------

Down = ev.Stop | ev.Evict | ev.CancelStart


def _unwanted(pool: PoolState, e: Down) -> PoolState:
    """Nothing is to follow. An eviction does not change what a person has said."""
    if not isinstance(e, ev.Evict):
        return replace(pool, desired=Desired.STOPPED, pending_start=False, history=replace(pool.history, due=None))
    desired = pool.desired if pool.desired.stays_down else Desired.EVICTED
    return replace(pool, desired=desired, pending_start=False)


def stop_idle(pool: PoolState, e: Down, now: float, p: Policy) -> Step:
    """Nothing runs, so a start that was due is forgotten; but a process or memory that would not go is asked again."""
    if pool.active.has_process or pool.active.vram_pending:
        return stop_running(pool, e, now, p)
    down = to(replace(_unwanted(pool, e), reason=None), Phase.DOWN, now)
    if pool.active.phase is Phase.DOWN:
        return down, ()
    return down, (do.Say("stopped", f"Pool '{pool.pool_id}' stays down; nothing of it was running"),)


def stop_staging(pool: PoolState, e: Down, now: float, p: Policy) -> Step:
    return cancel_staging(_unwanted(pool, e), now)


def stop_running(pool: PoolState, e: Down, now: float, p: Policy) -> Step:
    return begin_stop(_unwanted(pool, e), now, p, After.STAY)


def stop_stopping(pool: PoolState, e: Down, now: float, p: Policy) -> Step:
    """Whatever was to follow, nothing follows now."""
    return on(_unwanted(pool, e), after=After.STAY), ()


def evict_idle(pool: PoolState, e: ev.Evict, now: float, p: Policy) -> Step:
    """A restart that is due would take the room again, and what would not go still has it. Anything else holds none."""
    held = pool.active.has_process or pool.active.vram_pending
    return stop_idle(pool, e, now, p) if held or pool.active.phase in WAITING else (pool, ())


def evict_running(pool: PoolState, e: ev.Evict, now: float, p: Policy) -> Step:
    """What is in flight is never cut off to make room, on an engine that was taken over and is probed anew either. Letting go of
    somebody else's engine makes none.
    """
    if pool.active.external:
        why = f"cannot evict pool '{pool.pool_id}': somebody else runs its engine, so that would free nothing; stop lets go of it"
        return refuse(pool, "EXTERNAL_ENGINE", why)
    if e.active_leases:
        leases = narration.count(e.active_leases, "lease")
        instead = "wait for them to end, or drain it (then it stays down until it is started)"
        return refuse(pool, "POOL_IN_USE", f"cannot evict pool '{pool.pool_id}': {leases} in flight; {instead}")
    if e.asleep and pool.active.phase is Phase.READY:
        return fall_asleep(_unwanted(pool, e), now, p)
    return stop_running(pool, e, now, p)


def wake_or_refuse(pool: PoolState, e: ev.Start, now: float, p: Policy) -> Step:
    """Its engine sleeps. Where that is to make room, it is woken as it would be started."""
    if pool.desired is not Desired.EVICTED:
        return wake(pool, e, now, p)
    if (barred := _barred(pool, "start", e.origin)) is not None:
        return barred
    return wake(replace(pool, desired=Desired.WANTED, pending_start=False), e, now, p)


_NOT_PRELOADING = "cannot cancel: pool {pool} is not preloading"
not_starting = refusing("INVALID_PARAMS", _NOT_PRELOADING)


def cancel_stopping(pool: PoolState, e: ev.CancelStart, now: float, p: Policy) -> Step:
    """Another caller has cancelled it, or a start was to follow: nothing follows now."""
    if pool.active.fell_from in RISING or pool.active.after is not After.STAY:
        return stop_stopping(pool, e, now, p)
    return not_starting(pool, e, now, p)


# --- hold, quarantine -----------------------------------------------------------------------------------------------


def hold(pool: PoolState, e: ev.Hold, now: float, p: Policy) -> Step:
    return replace(pool, held=True), (do.Say("hold", f"Pool '{pool.pool_id}' is held: nothing starts by itself"),)


def release(pool: PoolState, e: ev.Release, now: float, p: Policy) -> Step:
    return _resume(replace(pool, held=False), now, p, do.Say("release", f"Pool '{pool.pool_id}' is no longer held"))


def quarantine(pool: PoolState, e: ev.Quarantine, now: float, p: Policy) -> Step:
    """Not ready from this step on, and no start. An engine on a lost GPU is ended: it cannot come back with it."""
    i = pool.active
    lost = e.lost and i.has_process and i.phase not in ENDING
    barred = replace(pool, quarantined=True, last_error=pool.last_error if i.phase in AFTER_FAILURE else e.reason)
    if pool.quarantined and not lost:
        return barred, ()
    say = do.Say("quarantine", f"Pool '{pool.pool_id}' is quarantined: {e.reason}", level="error", fields={"lost": e.lost})
    if i.saving:  # of an engine on such a GPU nothing is waited for
        return then((say,), terminate(barred, now, p))
    if i.phase is Phase.STAGING:
        return then((say,), cancel_staging(replace(barred, pending_start=pool.retry), now))
    if i.phase is Phase.STARTING and not i.has_process:  # the start is due again, once this one is known to have come to nothing
        return then((say,), begin_stop(barred, now, p, After.START if pool.retry else After.STAY))
    if not lost:
        return barred, (say,)
    after = After.STAY if i.phase is Phase.DRAINING else _after_loss(pool, p)
    forced = on(barred, force_stopped=i.phase is Phase.DRAINING and i.drain_leases > 0)
    return then((say,), begin_stop(forced, now, p, after, error=e.reason, crash=CrashClass.CUDA))


def _after_loss(pool: PoolState, p: Policy) -> After:
    """The engine did not fail: where it would be restarted, it is when its GPU is back."""
    given_up = p.restart == "never" or (pool.active.ready_since is None and not pool.retry)
    return After.RECOVER if given_up else After.START


def end_quarantine(pool: PoolState, e: ev.EndQuarantine, now: float, p: Policy) -> Step:
    error = pool.last_error if pool.active.phase in AFTER_FAILURE else pool.history.error
    say = do.Say("quarantine_over", f"Pool '{pool.pool_id}' is out of quarantine")
    return _resume(replace(pool, quarantined=False, last_error=error), now, p, say)


def _resume(pool: PoolState, now: float, p: Policy, say: do.Say) -> Step:
    due = pool.active.phase is Phase.DOWN and pool.pending_start and not (pool.held or pool.quarantined)
    return then((say,), launch(pool, now, p, origin="restart")) if due else (pool, (say,))


# --- purge ----------------------------------------------------------------------------------------------------------


def purge(pool: PoolState, e: ev.Purge, now: float, p: Policy) -> Step:
    """Nothing is left of any launch; that no epoch is used twice holds all the same."""
    return replace(pool, active=Instance(pool.active.id, pool.active.epoch), proven=False, reason=None), ()


# --- breaker --------------------------------------------------------------------------------------------------------


def reset_breaker(pool: PoolState, e: ev.ResetBreaker, now: float, p: Policy) -> Step:
    """Everything it has failed at is forgotten; a start that only the breaker or a backoff held back happens now."""
    forgiven, told = remember(pool, FailureHistory(error=pool.history.error), now)
    if pool.active.phase in WAITING:
        return then(told, launch(forgiven, now, p, origin="restart"))
    return forgiven, told
