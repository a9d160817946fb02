"""An engine that has given its GPU memory back and kept its process: into that, out of it, and when it will do neither.

Asleep it is not probed, and serves nobody. It ends as any other engine does, and one that ends by itself has failed.
"""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.ending import begin_stop
from pool_managerd.core.lifecycle.instance import After
from pool_managerd.core.lifecycle.phase import Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import Desired, PoolState, Step, on, to
from pool_managerd.core.lifecycle.starting import become_ready, send_due_probe


def fall_asleep(pool: PoolState, now: float, p: Policy) -> Step:
    """Nothing is in flight any more."""
    asleep = to(
        pool, Phase.SLEEPING, now, deadline=now + p.sleep_cap_s, drain_since=None, drain_recall=False, drain_sleeps=False,
        last_good_at=None,
    )  # fmt: skip
    return asleep, (do.SleepEngine(pool.active.epoch), do.Say("sleep", f"Putting the engine of pool '{pool.pool_id}' to sleep"))


def slept(pool: PoolState, e: ev.Slept, now: float, p: Policy) -> Step:
    if pool.active.deadline is None:
        return pool, ()
    took_ms = round((now - pool.active.since) * 1000)
    say = do.Say("asleep", f"The engine of pool '{pool.pool_id}' sleeps", fields={"duration_ms": took_ms})
    return on(pool, deadline=None), (say,)


def not_asleep(pool: PoolState, e: ev.SleepFailed, now: float, p: Policy) -> Step:
    """Whether it sleeps is not known: it is woken, so that it serves again."""
    error = f"cannot put the engine of pool '{pool.pool_id}' to sleep: {e.error}"
    desired = Desired.WANTED if pool.desired is Desired.EVICTED else pool.desired
    waking, effects = wake(replace(pool, last_error=error, desired=desired), ev.Wake(), now, p)
    say = do.Say("sleep_failed", f"The engine of pool '{pool.pool_id}' does not sleep: {e.error}", level="warn")
    return waking, (say, *effects)


def wake(pool: PoolState, e: ev.Wake | ev.Start, now: float, p: Policy) -> Step:
    waking = to(pool, Phase.WAKING, now, deadline=now + p.sleep_cap_s, last_good_at=None)
    return waking, (do.WakeEngine(pool.active.epoch), do.Say("wake", f"Waking the engine of pool '{pool.pool_id}'"))


def woke(pool: PoolState, e: ev.Woke, now: float, p: Policy) -> Step:
    """It has still to show that it is healthy."""
    return on(pool, probe_sent_at=now), (do.SendProbe(e.epoch),)


def waking_ok(pool: PoolState, e: ev.ProbeSucceeded, now: float, p: Policy) -> Step:
    return become_ready(on(pool, last_good_at=now, probe_failures=0), now, p)


def stuck_asleep(pool: PoolState, e: ev.HelperDied, now: float, p: Policy) -> Step:
    """An engine that neither sleeps nor wakes is replaced."""
    what = "put to sleep" if pool.active.phase is Phase.SLEEPING else "woken"
    error = f"the engine could not be {what}: {e.what}"
    return begin_stop(pool, now, p, After.RECOVER, error=error, crash=CrashClass.HUNG)


def no_room(pool: PoolState, e: ev.NoRoomToWake, now: float, p: Policy) -> Step:
    """It sleeps on. Whoever asked for it is told, or looks again at what could make room."""
    error = f"cannot wake the engine of pool '{pool.pool_id}': {e.what}"
    asleep = to(replace(pool, desired=Desired.EVICTED, last_error=error), Phase.SLEEPING, now, deadline=None)
    human = f"The engine of pool '{pool.pool_id}' sleeps on, as it cannot wake: {e.what}"
    return asleep, (do.Say("no_room_to_wake", human, level="warn"),)


def sleeping_tick(pool: PoolState, e: ev.Tick, now: float, p: Policy) -> Step:
    i = pool.active
    if i.deadline is not None and now >= i.deadline:
        return stuck_asleep(pool, ev.HelperDied(i.epoch, "it took too long"), now, p)
    return send_due_probe(pool, now, p)
