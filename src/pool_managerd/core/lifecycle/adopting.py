"""After a restart of the daemon: an engine that an earlier one has started is taken over with all that belongs to its launch.

It keeps its epoch, and with it its leases, its reservation and its files; the next launch has a higher one than any that may
have been used. It is not ready before a good probe of this daemon's own, however ready it was. One that was draining goes on
draining, to the deadline that it had. One that has ended meanwhile is adopted like any other: that it is dead, and how it ended,
is the first that is heard of it, so that it counts as the crash that it was.
"""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.effects import Effect
from pool_managerd.core.lifecycle.ending import begin_stop
from pool_managerd.core.lifecycle.instance import After
from pool_managerd.core.lifecycle.phase import Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import Desired, PoolState, Step, on, then, to
from pool_managerd.core.lifecycle.relaunch import launch, remember
from pool_managerd.core.lifecycle.sleeping import wake

OWN_GAP_S = 1.0
"""A timer that fires so much too late says that this daemon stood (A9)."""
LAST_LOOK_S = 2.0


def adopt(pool: PoolState, e: ev.Adopt, now: float, p: Policy) -> Step:
    """Look whether it is ours before anything else."""
    found = replace(pool, pending_start=False, last_epoch=max(pool.last_epoch, pool.active.epoch))
    adopting = to(
        found, Phase.ADOPTING, now, id=InstanceId(pool.pool_id, e.replica_id), deadline=now + p.adopt_timeout_s,
        epoch=e.epoch, launched_at=now,
    )  # fmt: skip
    say = do.Say("adopting", f"An earlier daemon left an engine of pool '{pool.pool_id}'; taking it over", level="debug")
    return adopting, (do.AdoptEngine(e.epoch), say)


def adopted(pool: PoolState, e: ev.Adopted, now: float, p: Policy) -> Step:
    """It is ours: on to its first probe, or on with its drain."""
    desired = pool.desired if pool.desired.stays_down else Desired.WANTED
    tried, told = remember(pool, pool.history.started(now, p, again=False), now)  # what an open breaker has let through
    ours = to(
        replace(tried, has_run=True, desired=desired, proven=pool.proven or e.was_ready), Phase.STARTING, now,
        deadline=now + p.startup_timeout_s, has_process=True,
        launched_at=e.started_at, started_at=e.started_at, ready_since=e.started_at if e.was_ready else None,
        uses_gpus=e.uses_gpus, warmable=e.warmable and p.warmup != "off", warmed=e.was_ready, keeps_slots=e.keeps_slots,
        probe_sent_at=now,
    )  # fmt: skip
    effects: tuple[Effect, ...] = (
        do.SendProbe(e.epoch), do.Say("adopt", f"Took over the running engine of pool '{pool.pool_id}'"), *told,
    )  # fmt: skip
    if e.gave_way and not desired.stays_down:  # others may have its memory by now
        wanted = pool.desired is Desired.WANTED
        ends = replace(ours, desired=Desired.WANTED if wanted else Desired.EVICTED)
        return then(effects[1:], begin_stop(ends, now, p, After.NEW_START if wanted else After.STAY))
    if e.asleep and not desired.stays_down:
        return then(effects[1:], wake(ours, ev.Wake(), now, p))
    if not desired.stays_down:
        return ours, effects
    draining = to(
        ours, Phase.DRAINING, now, deadline=now + p.drain_deadline_s if e.drain_deadline is None else e.drain_deadline,
        probe_sent_at=now,
        drain_since=now if e.drain_since is None else e.drain_since, drain_leases=e.active_leases,
    )  # fmt: skip
    return (draining, effects) if e.active_leases else then(effects[1:], begin_stop(draining, now, p, After.STAY))


def adopted_stopping(pool: PoolState, e: ev.Adopted, now: float, p: Policy) -> Step:
    """It was asked to stop before it was known to be there."""
    if pool.active.has_process or pool.active.reaped or pool.active.vram_pending:
        return pool, ()
    found = on(
        replace(pool, has_run=True), has_process=True, started_at=e.started_at, uses_gpus=e.uses_gpus,
        deadline=now + p.stop_grace_ms / 1000 + p.kill_wait_s,
    )  # fmt: skip
    return found, (do.StopEngine(e.epoch, p.stop_grace_ms),)


def not_adopted(pool: PoolState, e: ev.NotAdopted, now: float, p: Policy) -> Step:
    human = f"Engine of pool '{pool.pool_id}' was not taken over: {e.reason}"
    effects: tuple[Effect, ...] = (
        do.Withdraw(e.epoch), do.EndLeases(e.epoch), do.ReleaseVram(e.epoch), do.Say("not_adopted", human, level="warn"),
    )  # fmt: skip
    down = to(pool, Phase.DOWN, now)
    return then(effects, launch(down, now, p, origin="restart")) if pool.desired is Desired.WANTED else (down, effects)


def adopting_tick(pool: PoolState, e: ev.Tick, now: float, p: Policy) -> Step:
    i = pool.active
    if i.deadline is None or now < i.deadline:
        return pool, ()
    if now > i.deadline + OWN_GAP_S:  # this daemon itself stood: whoever looks had no time to
        return on(pool, deadline=now + p.adopt_timeout_s), ()
    if i.deadline - i.since < p.adopt_timeout_s + LAST_LOOK_S / 2:  # it may have stood for most of the time, and be back just now
        return on(pool, deadline=now + LAST_LOOK_S), ()
    return not_adopted(pool, ev.NotAdopted(i.epoch, "looking at it took too long"), now, p)


def adopting_helper_died(pool: PoolState, e: ev.HelperDied, now: float, p: Policy) -> Step:
    return not_adopted(pool, ev.NotAdopted(e.epoch, e.what), now, p)
