"""The way down: stops that were asked for, and processes that ended by themselves.

An engine is *down* when three things have happened, in this order: its process is dead (``Died``), its exit record was
read (``Exited``: ``reaped``), and its GPU memory was seen free (``VramFree``; until then ``vram_pending``). Only then
does ``finish_stop`` go where ``after`` says. What is still missing at a deadline is named: a process that survives
SIGKILL is ``stop_failed``, memory that stays is ``vram_held``, and the reservation is kept, so that nobody else is
given memory that is not free.

A stop may be decided while the engine is being launched. There is no process to signal then, but one may come up any
moment: it is waited for, and killed at once when it does.
"""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core import narration
from pool_managerd.core.crash import CrashClass, signal_name
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.effects import Effect
from pool_managerd.core.lifecycle.instance import After, Instance
from pool_managerd.core.lifecycle.phase import BEFORE_READY, WAITING, Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import Desired, PoolState, Step, on, then, to
from pool_managerd.core.lifecycle.relaunch import launch, recover

HELPER_LATE_S = 5.0
"""The helper that watches the memory names the holder at the deadline; this much later the deadline speaks for itself."""


# --- stops ----------------------------------------------------------------------------------------------------------


def begin_stop(
    pool: PoolState, now: float, p: Policy, after: After, *, error: str | None = None, crash: CrashClass = CrashClass.UNKNOWN
) -> Step:
    """Start the stop ladder; what follows it is ``after``, and ``error`` and ``crash`` say why where that is to recover.

    Without a process only held memory is waited for.
    """
    i = pool.active
    if i.vram_pending:
        deadline = now + p.vram_wait_s + HELPER_LATE_S
        waiting = to(
            pool, Phase.STOPPING, now, deadline=deadline, after=after, asked=True, pending_error=error, pending_crash=crash
        )
        say = do.Say("stop", f"Waiting for the GPU memory of pool '{pool.pool_id}' to be seen free")
        return waiting, (do.AwaitVram(i.epoch), say)
    stopping = to(
        pool, Phase.STOPPING, now, deadline=now + p.stop_grace_ms / 1000 + p.kill_wait_s,
        after=after, fell_from=i.phase, asked=True, reaped=False, killed=False, pending_error=error, pending_crash=crash,
        hung=False, busy=False,
    )  # fmt: skip
    say = do.Say("stop", f"Stopping the engine of pool '{pool.pool_id}'", fields={"grace_ms": p.stop_grace_ms})
    if i.has_process and after is not After.RECOVER and _worth_saving(pool):
        return on(stopping, saving=True, deadline=now + p.save_timeout_s + HELPER_LATE_S), (do.SaveCache(i.epoch), say)
    if i.has_process:
        told: tuple[Effect, ...] = ()
        if after is After.RECOVER and error:  # that it is ended by us makes it no less of a crash
            stopping, told = replace(stopping, crash_count=pool.crash_count + 1), (do.ReportCrash(i.epoch, crash, error),)
        return stopping, (do.StopEngine(i.epoch, p.stop_grace_ms), say, *told)
    if i.phase in (Phase.STARTING, Phase.ADOPTING):  # it may run any moment, so it is waited for: down means that nothing runs
        return on(stopping, deadline=now + p.kill_wait_s), (say,)
    return _finish_without_process(stopping, now, p)


def _worth_saving(pool: PoolState) -> bool:
    """A planned stop of an engine that answers, and that nobody is cut off from: there is no time to lose in any other."""
    i = pool.active
    serves = i.phase in (Phase.READY, Phase.DRAINING) and i.last_good_at is not None and not (i.hung or i.busy)
    return i.keeps_slots and serves and not (i.force_stopped or pool.quarantined)


def terminate(pool: PoolState, now: float, p: Policy) -> Step:
    """Its slots are saved, or are given up: the stop ladder begins."""
    epoch = pool.active.epoch
    told = on(pool, saving=False, deadline=now + p.stop_grace_ms / 1000 + p.kill_wait_s)
    return told, (do.StopEngine(epoch, p.stop_grace_ms),)


def cache_saved(pool: PoolState, e: ev.CacheSaved, now: float, p: Policy) -> Step:
    return terminate(pool, now, p) if pool.active.saving else (pool, ())


def helper_died_stopping(pool: PoolState, e: ev.HelperDied, now: float, p: Policy) -> Step:
    if not pool.active.saving:
        return not_spawned_stopping(pool, e, now, p)
    return then((_not_saved(pool, e.what),), terminate(pool, now, p))


def _not_saved(pool: PoolState, why: str) -> do.Say:
    human = f"Cache lost: what pool '{pool.pool_id}' has read was not saved: {why}"
    return do.Say("cache_lost", human, level="warn", fields={"reason": "error"})


def finish_stop(pool: PoolState, now: float, p: Policy, *, before: tuple[Effect, ...] = ()) -> Step:
    """The process is gone and its memory is free: go where ``after`` says."""
    i = pool.active
    done: tuple[Effect, ...] = (*before, do.ReleaseVram(i.epoch))
    if i.drain_since is not None:
        done = (*done, _drain_finished(pool, now))
    clean = on(
        pool, has_process=False, reaped=False, vram_pending=False, killed=False, last_good_at=None, probe_failures=0,
        hung=False, busy=False, ready_since=None, fell_from=None, warmed=False, external=False,
    )  # fmt: skip
    if pool.reason in ("vram_held", "stop_failed"):  # it is held no more, and it did end
        clean = replace(clean, reason=None, last_error=clean.history.error)
    if i.drain_since is not None and i.force_stopped:
        clean = _escalated(clean, i.drain_leases)
    if i.after is After.NEW_START:
        return then(done, launch(clean, now, p, origin="request", by_hand=True))
    if i.after is After.START:
        return then(done, launch(clean, now, p, origin="another port" if pool.port_conflicts else "restart"))
    if i.after is After.RECOVER:
        return then(done, recover(on(clean, ready_since=i.ready_since), now, p, i.pending_error or "stopped", i.pending_crash))
    if pool.pending_start and not (pool.held or pool.quarantined or pool.desired.stays_down):
        return then(done, launch(clean, now, p, origin="restart"))  # what it waited for ended meanwhile
    down = to(clean, Phase.DOWN, now, pending_error=None, drain_since=None)
    return down, (*done, do.Say("stopped", f"Pool '{pool.pool_id}' is down and holds nothing"))


def _escalated(pool: PoolState, leases: int) -> PoolState:
    """A drain that had to cut leases off is an error until the next good start; what a quarantine says goes before it."""
    error = narration.cut_off(leases, _why_cut_off(pool))
    shown = pool.last_error if pool.quarantined else error
    return replace(pool, last_error=shown, history=replace(pool.history, error=error))


def _why_cut_off(pool: PoolState) -> str:
    if pool.quarantined:
        return "GPU lost while draining"
    return "stopped while draining" if pool.desired is Desired.STOPPED else "drain deadline reached"


def _drain_finished(pool: PoolState, now: float) -> do.Say:
    i = pool.active
    spent = round((now - (i.drain_since or now)) * 1000)
    cut = i.drain_leases if i.force_stopped else 0
    human = f"Pool '{pool.pool_id}' has drained"
    if i.force_stopped:
        human += f"; {narration.cut_off(cut, _why_cut_off(pool))}"
    fields = {"force_stopped": i.force_stopped, "duration_ms": spent, "final_lease_count": cut}
    return do.Say("drain_finished", human, level="warn" if i.force_stopped else "info", fields=fields)


def _finish_without_process(pool: PoolState, now: float, p: Policy) -> Step:
    epoch = pool.active.epoch
    return finish_stop(pool, now, p, before=(do.CancelStaging(epoch), do.Withdraw(epoch), do.EndLeases(epoch)))


def _awaits_spawn(i: Instance) -> bool:
    """Whether a stop was asked for while the engine was being launched."""
    return not (i.has_process or i.reaped or i.vram_pending)


def spawned_stopping(pool: PoolState, e: ev.Spawned, now: float, p: Policy) -> Step:
    """It began to run while its stop was decided: it is ended at once."""
    if not _awaits_spawn(pool.active):
        return pool, ()
    return on(replace(pool, has_run=True), has_process=True, killed=True, deadline=now + p.kill_wait_s), (do.KillEngine(e.epoch),)


def spawned_late(pool: PoolState, e: ev.Spawned, now: float, p: Policy) -> Step:
    """Nobody wants this process any more: it began to run while its stop was decided."""
    after = After.RECOVER if pool.active.phase in WAITING else After.STAY
    stopping = to(
        replace(pool, has_run=True), Phase.STOPPING, now, deadline=now + p.kill_wait_s, has_process=True, started_at=now,
        fell_from=Phase.STARTING, asked=True, reaped=False, killed=True, pending_error=pool.last_error, after=after,
        pending_crash=CrashClass.NOT_STARTED,
    )  # fmt: skip
    say = do.Say("stop", f"Engine of pool '{pool.pool_id}' came up when nobody wanted it any more; ending it")
    return stopping, (do.KillEngine(e.epoch), say)


def not_spawned_stopping(pool: PoolState, e: ev.EpochEvent, now: float, p: Policy) -> Step:
    return _finish_without_process(pool, now, p) if _awaits_spawn(pool.active) else (pool, ())


# --- ends -----------------------------------------------------------------------------------------------------------


def died(pool: PoolState, e: ev.Died, now: float, p: Policy) -> Step:
    """The process is dead, its exit record is still to come: not ready and not live from this moment. One that was asleep is
    started again by whoever would have woken it: another engine may have its memory.
    """
    i = pool.active
    stays = i.phase in (Phase.DRAINING, Phase.SLEEPING) or pool.desired.stays_down
    fallen = to(
        pool, Phase.STOPPING, now, deadline=now + p.kill_wait_s, fell_from=i.phase, asked=False, reaped=True,
        after=After.STAY if stays else After.RECOVER, vram_pending=False, has_process=False,
    )  # fmt: skip
    say = do.Say("died", f"Engine of pool '{pool.pool_id}' is gone; reading how it ended", level="warn")
    return fallen, (do.Withdraw(i.epoch), do.EndLeases(i.epoch), say)


def died_stopping(pool: PoolState, e: ev.Died, now: float, p: Policy) -> Step:
    if pool.active.reaped:
        return pool, ()
    gone = on(pool, has_process=False, reaped=True, saving=False, deadline=now + p.kill_wait_s)
    return gone, (do.Withdraw(e.epoch), do.EndLeases(e.epoch))


def exited_running(pool: PoolState, e: ev.Exited, now: float, p: Policy) -> Step:
    """The exit record came without word of the death before: both at once."""
    fallen, effects = died(pool, ev.Died(e.epoch), now, p)
    return then(effects, exited(fallen, e, now, p))


def exited(pool: PoolState, e: ev.Exited, now: float, p: Policy) -> Step:
    """The process is reaped. There are four cases:

    1. The stop was asked for, of this daemon, or of its shim: it is complete. A pool that is wanted starts again after that.
    2. It lost its port to another program before it was ready: it starts again on another one, and that is no crash.
    3. It may end by itself, was ready, and did so with code 0: the pool is offline.
    4. Anything else is a crash.
    """
    gone, effects = died_stopping(pool, ev.Died(e.epoch), now, p)
    i = pool.active
    never_ready = i.fell_from in BEFORE_READY and i.ready_since is None
    if i.asked or e.stopped:  # 1
        if i.asked or i.after is After.STAY:
            return then(effects, _after_reaping(gone, now, p))
        error = "its shim was told to stop it, and not by this daemon: somebody sent a signal"
        say = do.Say(
            "stopped_outside", f"Engine of pool '{pool.pool_id}' was stopped: {error}; starting it again", level="warn",
            fields={"last_error": error},
        )  # fmt: skip
        stopped = on(replace(gone, last_error=error), after=After.START)
        return then((*effects, say), _after_reaping(stopped, now, p))
    if i.after is After.RECOVER and never_ready and e.port_conflict and pool.port_conflicts < p.port_retries:  # 2
        gone = on(replace(gone, port_conflicts=pool.port_conflicts + 1), after=After.START)
        human = f"Another program took the port of pool '{pool.pool_id}'; starting on another one"
        return then((*effects, do.Say("port_conflict", human, level="warn")), _after_reaping(gone, now, p))
    if e.graceful and not never_ready and p.restart != "always":  # 3
        human = f"Engine of pool '{pool.pool_id}' ended by itself with code 0; the pool is offline"
        say = do.Say("exit", human, fields={"exit_code": 0})
        return then((*effects, say), _after_reaping(on(gone, after=After.STAY), now, p))
    gone, said = _crash(gone, e, never_ready=never_ready)  # 4
    return then((*effects, said), _after_reaping(gone, now, p))


def _crash(pool: PoolState, e: ev.Exited, *, never_ready: bool) -> tuple[PoolState, do.Say]:
    name, started_at = signal_name(e.signal), pool.active.started_at
    uptime = 0.0 if started_at is None else pool.active.since - started_at  # to its death: the record may have come late
    summary = e.summary or (f"signal {name}" if name else f"exit_code={e.code}")
    error = summary
    if never_ready:
        quoted = f'; its log says "{e.evidence}"' if e.evidence else ""
        error = f"health check failed: the engine {narration.exit_phrase(e.code, name)} before it was healthy ({summary}){quoted}"
    crashed = on(replace(pool, crash_count=pool.crash_count + 1, last_error=error), pending_error=error, pending_crash=e.crash)
    human = f"Engine of pool '{pool.pool_id}' {narration.exit_phrase(e.code, name)} after {narration.duration(uptime)}"
    fields = {
        "uptime_seconds": round(uptime, 3), "exit_code": e.code, "signal": name,
        "crash_count": crashed.crash_count, "crash_class": e.crash.value, "last_error": error,
    }  # fmt: skip
    level = "critical" if e.crash is CrashClass.OUT_OF_MEMORY else "error"
    return crashed, do.Say("crash", human, level=level, fields=fields)


def _after_reaping(pool: PoolState, now: float, p: Policy) -> Step:
    """Down means that the memory was seen free too; pools without GPUs are done at once."""
    if not pool.active.uses_gpus:
        return finish_stop(pool, now, p)
    held = on(pool, deadline=now + p.vram_wait_s + HELPER_LATE_S, reaped=True, vram_pending=True)
    return held, (do.AwaitVram(pool.active.epoch),)


def vram_free(pool: PoolState, e: ev.VramFree, now: float, p: Policy) -> Step:
    """In time, or after the pool had failed for it: what was to follow the stop follows now."""
    return finish_stop(pool, now, p) if pool.active.vram_pending else (pool, ())


def vram_held(pool: PoolState, e: ev.VramHeld, now: float, p: Policy) -> Step:
    """The reservation is kept. A late VramFree ends this."""
    if not pool.active.vram_pending:
        return pool, ()
    error = f"cannot confirm that the GPU memory of pool '{pool.pool_id}' is free: {e.holder}"
    stuck = to(replace(pool, reason="vram_held", last_error=error), Phase.FAILED, now, has_process=False)
    return stuck, (do.Say("vram_held", error, level="error", fields={"holder": e.holder}),)


def stopping_tick(pool: PoolState, e: ev.Tick, now: float, p: Policy) -> Step:
    """Grace is over: kill. Killed and still there: say so, and hold on to the truth."""
    i = pool.active
    if i.deadline is None or now < i.deadline:
        return pool, ()
    if i.vram_pending:
        return vram_held(pool, ev.VramHeld(i.epoch, "nothing was heard of it"), now, p)
    if _awaits_spawn(i):
        return _finish_without_process(pool, now, p)
    if i.saving:
        why = f"it took longer than {narration.duration(p.save_timeout_s)}"
        return then((_not_saved(pool, why),), terminate(pool, now, p))
    if not i.killed:
        return on(pool, killed=True, deadline=now + p.kill_wait_s), (do.KillEngine(i.epoch),)
    if i.reaped:
        return exited(pool, ev.Exited(i.epoch, summary="the exit record was lost"), now, p)
    error = f"cannot end the engine of pool '{pool.pool_id}': it survived SIGKILL for {narration.duration(p.kill_wait_s)}"
    error += f"; {e.stuck}" if e.stuck else ""
    stuck = to(replace(pool, reason="stop_failed", last_error=error), Phase.FAILED, now)
    return stuck, (do.Say("stop_failed", error, level="critical"),)


def died_failed(pool: PoolState, e: ev.Died, now: float, p: Policy) -> Step:
    return exited_failed(pool, ev.Exited(e.epoch), now, p)


def exited_failed(pool: PoolState, e: ev.Exited, now: float, p: Policy) -> Step:
    """The process that would not die is gone after all; its pool stays failed until somebody starts it."""
    if not pool.active.has_process:
        return pool, ()
    gone = on(pool, has_process=False, reaped=True)
    withdrawn: tuple[Effect, ...] = (do.Withdraw(e.epoch), do.EndLeases(e.epoch))
    if not pool.active.uses_gpus:
        return gone, (*withdrawn, do.ReleaseVram(e.epoch))
    return on(gone, vram_pending=True, after=After.STAY), (*withdrawn, do.AwaitVram(e.epoch))
