"""The way up: staging, the process, the first good probe, the warm-up.

Ready comes last, and only this way: model on disk, engine prepared, process running, its pid file written, a good probe
of *this* launch, and the warm-up unless it is off (ORCH-3504).
"""

from __future__ import annotations

import math
from dataclasses import replace

from pool_managerd.core import narration
from pool_managerd.core.activity import Activity
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.health import start_gap_ms
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.ending import HELPER_LATE_S, begin_stop
from pool_managerd.core.lifecycle.instance import After, Instance
from pool_managerd.core.lifecycle.phase import PROBED_AT_START, SERVING, Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import PoolState, Step, on, then, to
from pool_managerd.core.lifecycle.relaunch import fail_start

CPU_ALONE = 5
"""Times the start-up timeout: so long may a load use the CPU without a byte that moves."""

# --- staging --------------------------------------------------------------------------------------------------------


def stage_progress(pool: PoolState, e: ev.StagingProgress, now: float, p: Policy) -> Step:
    return on(pool, deadline=now + p.staging_stall_s), ()


def staged(pool: PoolState, e: ev.Staged, now: float, p: Policy) -> Step:
    """Model and engine are there. An external engine is attached to: there is no process to own."""
    warmable = e.warmable and p.warmup != "off"
    known = on(pool, uses_gpus=e.uses_gpus, warmable=warmable, keeps_slots=e.keeps_slots, external=e.external)
    if not e.external:
        starting = to(known, Phase.STARTING, now, deadline=now + p.startup_timeout_s)
        say = do.Say("staged", f"Model and engine of pool '{pool.pool_id}' are in place; launching the engine")
        return starting, (do.SpawnEngine(e.epoch), say)
    attached = to(known, Phase.ATTACHED, now, probe_sent_at=now)
    say = do.Say("attach", f"Attaching pool '{pool.pool_id}' to an engine that somebody else runs")
    return attached, (do.SendProbe(e.epoch), say)


def staging_failed(pool: PoolState, e: ev.StagingFailed, now: float, p: Policy) -> Step:
    return fail_start(pool, now, p, e.error, retriable=e.retriable, reason=e.reason)


def staging_tick(pool: PoolState, e: ev.Tick, now: float, p: Policy) -> Step:
    if pool.active.deadline is None or now < pool.active.deadline:
        return pool, ()
    error = f"cannot prepare pool '{pool.pool_id}': no progress for {narration.duration(p.staging_stall_s)}"
    step = fail_start(pool, now, p, error, retriable=True, reason="preload_failed")
    return step[0], (do.CancelStaging(pool.active.epoch), *step[1])


def staging_helper_died(pool: PoolState, e: ev.HelperDied, now: float, p: Policy) -> Step:
    return fail_start(pool, now, p, f"cannot prepare pool '{pool.pool_id}': {e.what}", retriable=True, reason="preload_failed")


def cancel_staging(pool: PoolState, now: float) -> Step:
    epoch = pool.active.epoch
    say = do.Say("stopped", f"Start of pool '{pool.pool_id}' was cancelled before its engine ran")
    return to(pool, Phase.DOWN, now), (do.CancelStaging(epoch), do.Withdraw(epoch), do.ReleaseVram(epoch), say)


# --- the process ----------------------------------------------------------------------------------------------------


def spawned(pool: PoolState, e: ev.Spawned, now: float, p: Policy) -> Step:
    """The pid file is written before the first probe (SPEC §6.1)."""
    running = on(replace(pool, has_run=True), has_process=True, started_at=now, probe_sent_at=now, next_probe_at=None)
    say = do.Say("spawn", f"Engine of pool '{pool.pool_id}' runs and is loading its model", fields={"pid": e.pid})
    return running, (do.WritePid(e.epoch, e.pid), do.SendProbe(e.epoch), say)


def spawn_failed(pool: PoolState, e: ev.SpawnFailed, now: float, p: Policy) -> Step:
    if pool.active.has_process:  # it was adopted, or is there all the same
        return pool, ()
    return fail_start(pool, now, p, e.error, retriable=e.retriable, reason="preload_failed")


def starting_helper_died(pool: PoolState, e: ev.HelperDied, now: float, p: Policy) -> Step:
    error = f"preload failed: {e.what}"
    if pool.active.has_process:
        return begin_stop(pool, now, p, After.RECOVER, error=error, crash=CrashClass.NOT_STARTED)
    return fail_start(pool, now, p, error, retriable=True, reason="preload_failed")


def starting_tick(pool: PoolState, e: ev.Tick, now: float, p: Policy) -> Step:
    i = pool.active
    if i.deadline is None or now < i.deadline:
        return send_due_probe(pool, now, p)
    limit = narration.duration(p.startup_timeout_s)
    if not i.has_process:  # it may run all the same, where this daemon itself stood: it is waited for, and ended
        error = f"cannot launch the engine: nothing was heard of its launch for {limit}"
        return begin_stop(pool, now, p, After.RECOVER, error=error, crash=CrashClass.NOT_STARTED)
    last = f"; the last probe {i.probe_reason}" if i.probe_reason else ""
    error = f"health check failed: the engine was not healthy within {_spent(i, now, p)}{last}"
    failed = replace(pool, last_error=error)
    return begin_stop(failed, now, p, After.RECOVER, error=error, crash=CrashClass.HEALTH_FAILURE)


# --- the first good probe -------------------------------------------------------------------------------------------


def send_due_probe(pool: PoolState, now: float, p: Policy) -> Step:
    """At most one probe is under way."""
    i = pool.active
    if i.next_probe_at is None or now < i.next_probe_at or i.probe_sent_at is not None:
        return pool, ()
    seen = _not_aged(i, now - i.next_probe_at, now, p)
    return on(pool, next_probe_at=None, probe_sent_at=now, last_good_at=seen), (do.SendProbe(i.epoch),)


def _not_aged(i: Instance, gap_s: float, now: float, p: Policy) -> float | None:
    """When the last good probe was. In a gap of our own time nobody could look, so what was seen does not age in it (A9)."""
    if i.last_good_at is None or gap_s <= p.longest_probe_s:
        return i.last_good_at
    return min(now, i.last_good_at + gap_s)


def starting_failed(pool: PoolState, e: ev.ProbeFailed, now: float, p: Policy) -> Step:
    """Not yet. Ask again soon; the gap grows with each one up to health.interval_ms."""
    gap_ms = start_gap_ms(round((now - pool.active.since) * 1000), p.probe_gap_ms)
    deadline = _load_deadline(pool.active, e.activity, p)
    return on(pool, probe_reason=e.reason, probe_sent_at=None, next_probe_at=now + gap_ms / 1000, deadline=deadline), ()


def _load_deadline(i: Instance, seen: Activity, p: Policy) -> float | None:
    """A load that moves is not ended by a timer: it may stand still for ``startup_timeout_s``.

    Of bytes that move it is believed up to the cap; of CPU time, which an endless loop uses, too, only so long.
    """
    if i.phase is not Phase.STARTING or i.deadline is None:
        return i.deadline
    by_bytes = (seen.loaded_at or i.since) + p.startup_timeout_s
    by_cpu = min((seen.worked_at or i.since) + p.startup_timeout_s, i.since + CPU_ALONE * p.startup_timeout_s)
    return max(i.deadline, min(max(by_bytes, by_cpu), _load_cap(i, p)))


def _load_cap(i: Instance, p: Policy) -> float:
    return i.since + (max(p.startup_cap_s, p.startup_timeout_s) if p.startup_cap_s else math.inf)


def _spent(i: Instance, now: float, p: Policy) -> str:
    """How long a load took that was ended, and which limit ended it."""
    spent_s, limit = now - i.since, narration.duration(p.startup_timeout_s)
    if spent_s < p.startup_timeout_s * 1.25:
        return limit
    if now >= _load_cap(i, p):
        return f"{narration.duration(spent_s)}, the most a load may take (health.startup_cap_ms)"
    return f"{narration.duration(spent_s)}, and its load has stood still for {limit} or more: no log line, no bytes, no memory"


def probe_discarded(pool: PoolState, e: ev.ProbeDiscarded, now: float, p: Policy) -> Step:
    """The prober failed, not the engine: try again, hold nothing against anybody. After a gap in our own time: at once."""
    i = pool.active
    if i.probe_sent_at is not None and now - i.probe_sent_at > p.longest_probe_s:
        seen = _not_aged(i, now - i.probe_sent_at, now, p)
        return on(pool, probe_sent_at=None, next_probe_at=now, last_good_at=seen), ()
    gap_s = p.probe_gap_ms / 1000 if i.phase in PROBED_AT_START else p.probe_interval_s
    again = on(pool, probe_sent_at=None, next_probe_at=now + gap_s)
    return not_believed(again, "no probe could be sent", now, p)


def not_believed(pool: PoolState, why: str, now: float, p: Policy) -> Step:
    """Not shown as ready any more, where the last good probe is too old for that; nothing is done to it."""
    i = pool.active
    if i.phase not in SERVING or i.hung or i.last_good_at is None or now - i.last_good_at <= p.fresh_s:
        return pool, ()
    error = f"health check failed: {why} for {narration.duration(now - i.last_good_at)}"
    say = do.Say(
        "unhealthy", f"Pool '{pool.pool_id}' is not shown as ready: {error}", level="error", fields={"last_error": error}
    )
    unknown = {"last_good_at": None, "ready_since": None} if i.phase is Phase.ATTACHED else {"hung": True}
    return on(replace(pool, last_error=error), **unknown), (say,)


def starting_ok(pool: PoolState, e: ev.ProbeSucceeded, now: float, p: Policy) -> Step:
    """The first good probe of this launch. Before there is a process of ours, somebody else answered."""
    i = pool.active
    if not i.has_process:
        return pool, ()
    good = on(pool, last_good_at=now, probe_failures=0, probe_reason="")
    if i.warmable and not i.warmed and p.warmup == "before_ready":
        warming = to(good, Phase.WARMING, now, deadline=now + p.warmup_timeout_s)
        say = do.Say("warming", f"Engine of pool '{pool.pool_id}' is healthy; sending it a first prompt")
        return warming, (do.SendWarmup(i.epoch), say)
    return _restore_first(good, now, p)


def _restore_first(pool: PoolState, now: float, p: Policy) -> Step:
    """Ready, once the engine has what can be given back to it: after the warm-up, whose prompt takes a slot, too."""
    i = pool.active
    if i.warmed or not (i.keeps_slots or p.primes):
        return _ready_and_warm(pool, now, p)
    restoring = to(pool, Phase.WARMING, now, deadline=now + p.restore_timeout_s + HELPER_LATE_S, restoring=True)
    say = do.Say("warming", f"Engine of pool '{pool.pool_id}' is healthy; it gets back what it had read before", level="debug")
    return restoring, (do.RestoreCache(i.epoch), say)


def _ready_and_warm(pool: PoolState, now: float, p: Policy) -> Step:
    """A warm-up after it is ready must not take the slot of a conversation that was just given back.

    An engine that was not heard of since all that began, as when it never answered its warm-up, is asked again first.
    """
    i = pool.active
    if i.last_good_at is None or now - i.last_good_at > p.fresh_s:
        asked = to(pool, Phase.STARTING, now, deadline=now + p.startup_timeout_s, next_probe_at=now, warmed=True, restoring=False)
        say = do.Say("warming", f"Engine of pool '{pool.pool_id}' was not heard of for a while; it is asked again", level="debug")
        return asked, (say,)
    warms = i.warmable and not i.warmed and p.warmup == "after_ready" and not i.restored_slots
    ready, effects = become_ready(on(pool, restoring=False), now, p)
    return ready, (*effects, do.SendWarmup(i.epoch)) if warms else effects


def become_ready(pool: PoolState, now: float, p: Policy) -> Step:
    """All gates are passed."""
    i, error = pool.active, pool.last_error if pool.quarantined else None
    first = i.ready_since is None
    ready = to(
        replace(
            pool, reason=None, last_error=error, port_conflicts=0, retry=True, proven=True,
            history=replace(pool.history, error=None),
        ), Phase.READY, now,
        next_probe_at=now + p.probe_interval_s, ready_since=now if first else i.ready_since, warmed=True,
    )  # fmt: skip
    if pool.quarantined:
        human = f"Engine of pool '{pool.pool_id}' answers, but the pool is quarantined: {error}"
        return ready, (do.Announce(i.epoch), do.Say("quarantine", human, level="warn"))
    if not first:
        return ready, (do.Announce(i.epoch), do.Say("ready_again", f"Pool '{pool.pool_id}' is ready again"))
    took = round((now - i.launched_at) * 1000) if i.launched_at is not None else 0
    human = f"Pool '{pool.pool_id}' is ready after {narration.duration(took / 1000)}"
    return ready, (do.Announce(i.epoch), do.Say("preload_succeeded", human, fields={"duration_ms": took}))


# --- the warm-up ----------------------------------------------------------------------------------------------------


def warmed_up(pool: PoolState, e: ev.WarmedUp, now: float, p: Policy) -> Step:
    return (pool, ()) if pool.active.restoring else _restore_first(on(pool, last_good_at=now), now, p)


def warmup_failed(pool: PoolState, e: ev.WarmupFailed, now: float, p: Policy) -> Step:
    """A failed warm-up only warns (DESIGN §7)."""
    if pool.active.restoring:
        return pool, ()
    say = do.Say("warmup_failed", f"Warm-up of pool '{pool.pool_id}' failed: {e.error}", level="warn")
    return then((say,), _restore_first(pool, now, p))


def cache_restored(pool: PoolState, e: ev.CacheRestored, now: float, p: Policy) -> Step:
    if not pool.active.restoring:
        return pool, ()
    proved = on(pool, last_good_at=now, restored_slots=e.slots) if e.slots else pool
    return _ready_and_warm(proved, now, p)


def _not_restored(pool: PoolState, why: str, now: float, p: Policy) -> Step:
    """What was not given back is read again; nobody is kept waiting for it."""
    human = f"Cache lost: what pool '{pool.pool_id}' had read before is not there: {why}"
    say = do.Say("cache_lost", human, level="warn", fields={"reason": "error"})
    return then((say,), _ready_and_warm(pool, now, p))


def warming_tick(pool: PoolState, e: ev.Tick, now: float, p: Policy) -> Step:
    if pool.active.deadline is None or now < pool.active.deadline:
        return pool, ()
    if pool.active.restoring:
        return _not_restored(pool, f"it was not given back within {narration.duration(p.restore_timeout_s)}", now, p)
    limit = narration.duration(p.warmup_timeout_s)
    return warmup_failed(pool, ev.WarmupFailed(pool.active.epoch, f"no answer within {limit}"), now, p)


def warming_helper_died(pool: PoolState, e: ev.HelperDied, now: float, p: Policy) -> Step:
    if pool.active.restoring:
        return _not_restored(pool, e.what, now, p)
    return warmup_failed(pool, ev.WarmupFailed(e.epoch, e.what), now, p)
