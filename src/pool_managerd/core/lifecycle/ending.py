"""The way down: stops, deaths, crashes, backoff."""

from __future__ import annotations

import signal as signals
from dataclasses import replace

from pool_managerd.core import narration
from pool_managerd.core.backoff import delay_ms
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.effects import Effect
from pool_managerd.core.lifecycle.instance import After, Instance, Phase, Policy

Step = tuple[Instance, tuple[Effect, ...]]
HELPER_LATE_S = 5.0
"""The helper that watches the memory names the holder at the deadline; this much later the deadline speaks for itself."""


def signal_name(number: int | None) -> str | None:
    """``SIGSEGV`` for 11; ``signal 34`` where the system has no name; None for None."""
    if number is None:
        return None
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def to(i: Instance, phase: Phase, now: float, *, deadline: float | None = None, **changes: object) -> Instance:
    """``i`` in ``phase`` since ``now``; alarms of the old phase are dropped."""
    fresh: dict[str, object] = {"phase": phase, "since": now, "deadline": deadline, "next_probe_at": None, "probe_sent_at": None}
    return replace(i, **{**fresh, **changes})  # type: ignore[arg-type]


def begin_stop(
    i: Instance, now: float, p: Policy, after: After, *, error: str | None = None, grace_ms: int | None = None
) -> Step:
    """Start the stop ladder; what follows it is ``after``. Without a process only held memory is waited for."""
    if i.vram_pending:
        waiting = to(
            i, Phase.STOPPING, now, deadline=now + p.vram_wait_s + HELPER_LATE_S, after=after, asked=True, pending_error=error
        )
        say = do.Say("stop", f"Waiting for the GPU memory of pool '{i.pool_id}' to be seen free")
        return waiting, (do.AwaitVram(i.epoch), say)
    grace = p.stop_grace_ms if grace_ms is None else grace_ms
    stopping = to(
        i, Phase.STOPPING, now, deadline=now + grace / 1000 + p.kill_wait_s,
        after=after, fell_from=i.phase, asked=True, reaped=False, killed=False, pending_error=error, hung=False,
    )  # fmt: skip
    say = do.Say("stop", f"Stopping the engine of pool '{i.pool_id}'", fields={"grace_ms": grace})
    if (
        i.phase is Phase.STARTING and not i.has_process
    ):  # it may run any moment, so it is waited for: down means that nothing runs
        return replace(stopping, deadline=now + p.kill_wait_s), (say,)
    if not i.has_process:
        return _finish_without_process(stopping, now, p)
    return stopping, (do.StopEngine(i.epoch, grace), say)


def _finish_without_process(i: Instance, now: float, p: Policy) -> Step:
    return finish_stop(i, now, p, before=(do.CancelStaging(i.epoch), do.Withdraw(i.epoch), do.EndLeases(i.epoch)))


def _awaits_spawn(i: Instance) -> bool:
    """Whether a stop was asked for while the engine was being launched."""
    return not (i.has_process or i.reaped or i.vram_pending)


def finish_stop(i: Instance, now: float, p: Policy, *, before: tuple[Effect, ...] = ()) -> Step:
    """The process is gone and its memory is free: go where ``after`` says."""
    done: tuple[Effect, ...] = (*before, do.ReleaseVram(i.epoch))
    if i.drain_since is not None:
        done = (*done, drain_finished(i, now))
    clean = replace(
        i, has_process=False, reaped=False, vram_pending=False, killed=False, last_good_at=None, probe_failures=0, hung=False,
        ready_since=None, fell_from=None, warmed=False, external=False,
    )  # fmt: skip
    if i.reason in ("vram_held", "stop_failed"):  # it is held no more, and it did end
        clean = replace(clean, reason=None, last_error=None)
    if i.after is After.NEW_START:
        return with_effects(done, launch(clean, now, p, origin="request"))
    if i.after is After.START:
        return with_effects(done, launch(clean, now, p, origin="another port" if i.port_conflicts else "restart"))
    if i.after is After.RECOVER:
        return with_effects(
            done, recover(replace(clean, ready_since=i.ready_since), now, p, i.pending_error or "stopped", multiplier=1.0)
        )
    if i.owed and not (i.held or i.quarantined or i.drained):  # what it waited for ended meanwhile
        return with_effects(done, launch(clean, now, p, origin="restart"))
    down = to(clean, Phase.DOWN, now, pending_error=None)
    if i.drain_since is not None:
        down = replace(down, drain_since=None, drained=True)
    return down, (*done, do.Say("stopped", f"Pool '{i.pool_id}' is down and holds nothing"))


def drain_finished(i: Instance, now: float) -> do.Say:
    spent = round((now - (i.drain_since or now)) * 1000)
    cut = i.drain_leases if i.force_stopped else 0
    human = f"Pool '{i.pool_id}' has drained"
    if i.force_stopped:
        human = (
            f"Pool '{i.pool_id}' reached its drain deadline; {narration.count(cut, 'lease')} was cut off"
            if cut == 1
            else (f"Pool '{i.pool_id}' reached its drain deadline; {narration.count(cut, 'lease')} were cut off")
        )
    return do.Say(
        "drain_finished", human, level="warn" if i.force_stopped else "info",
        fields={"force_stopped": i.force_stopped, "duration_ms": spent, "final_lease_count": cut},
    )  # fmt: skip


def with_effects(first: tuple[Effect, ...], step: Step) -> Step:
    return step[0], (*first, *step[1])


def launch(i: Instance, now: float, p: Policy, *, origin: str) -> Step:
    """Begin a start: a new epoch. A promise of an older launch, kept while its memory was held, ends with it."""
    if i.held or i.quarantined:
        waiting = to(i, Phase.DOWN, now, owed=True, drained=False)
        flag = "held" if i.held else "quarantined"
        return waiting, (do.Say("start_owed", f"Pool '{i.pool_id}' is {flag}; its start waits for that to end"),)
    again = i.started_at is not None and origin == "restart"
    started = to(
        i, Phase.STAGING, now, deadline=now + p.staging_stall_s,
        epoch=i.epoch + 1, launched_at=now, owed=False, drained=False, reason=None, pending_error=None,
        after=After.STAY, warmed=False, vram_pending=False, reaped=False,
        last_good_at=None, probe_failures=0, probe_reason="", hung=False, has_process=False, external=False,
        drain_since=None, drain_leases=0, force_stopped=False, restart_count=i.restart_count + again,
    )  # fmt: skip
    says: tuple[Effect, ...] = (do.Say("start", narration.starting(i.pool_id, origin), fields={"origin": origin}),)
    if again:
        human = f"Restarting the engine of pool '{i.pool_id}' (restart {started.restart_count})"
        says = (do.Say("restart", human, fields={"restart_count": started.restart_count}),)
    freed = (do.ReleaseVram(i.epoch),) if i.vram_pending else ()
    return started, (*freed, do.StageArtifacts(started.epoch), *says)


def fail_start(i: Instance, now: float, p: Policy, error: str, *, retriable: bool, reason: str) -> Step:
    """A start that never got as far as a process. Counted for backoff, but it is no crash."""
    told = do.Say("preload_failed", f"Pool '{i.pool_id}' could not start: {error}", level="error",
                  fields={"reason": reason, "last_error": error, "duration_ms": _since_start_ms(i, now)})  # fmt: skip
    down = replace(i, failures=i.failures + 1, last_error=error)
    freed: tuple[Effect, ...] = (do.Withdraw(i.epoch), do.ReleaseVram(i.epoch), told)
    if i.retry and retriable:
        return with_effects(freed, back_off(down, now, p, "could not start", reason, 1.0))
    return to(down, Phase.FAILED, now, reason=reason), freed


def recover(i: Instance, now: float, p: Policy, error: str, *, multiplier: float) -> Step:
    """After a failure of a running engine: back off and start again, unless the policy or a request says no."""
    stable = i.ready_since is not None and now - i.ready_since >= p.backoff.reset_after_ms / 1000
    never_ready = i.ready_since is None
    base = replace(i, failures=1 if stable else i.failures + 1, last_error=error, ready_since=None, pending_error=None)
    told: tuple[Effect, ...] = ()
    if never_ready:
        fields = {"reason": "preload_failed", "last_error": error, "duration_ms": _since_start_ms(i, now)}
        told = (do.Say("preload_failed", f"Pool '{i.pool_id}' did not become ready: {error}", level="error", fields=fields),)
    what = "did not become ready" if never_ready else "failed"
    if p.restart == "never" or (never_ready and not i.retry):
        why = "its restart policy is never" if p.restart == "never" else "a submitted preload is not retried"
        say = do.Say("gave_up", narration.giving_up(i.pool_id, what, why), level="error", fields={"last_error": error})
        return to(base, Phase.FAILED, now, reason="preload_failed" if never_ready else "engine_failed"), (*told, say)
    return with_effects(told, back_off(base, now, p, what, _crash_reason(error), multiplier))


def back_off(i: Instance, now: float, p: Policy, what: str, crash_reason: str, multiplier: float) -> Step:
    """Wait before the next start; the delay grows with failures in a row."""
    wait_ms = delay_ms(p.backoff, i.failures, seed=p.seed, multiplier=multiplier)
    fields = {"backoff_ms": wait_ms, "crash_count": i.crash_count, "crash_reason": crash_reason, "restart_in_s": wait_ms / 1000}
    say = do.Say("backoff", narration.backing_off(i.pool_id, what, wait_ms), level="warn", fields=fields)
    return to(i, Phase.BACKOFF, now, deadline=now + wait_ms / 1000), (say,)


def _crash_reason(error: str) -> str:
    """A bounded label for metrics and logs from a last_error text."""
    if error.startswith("exit_code="):
        return "process_exit"
    if error == "out_of_memory":
        return "out_of_memory"
    if "SIG" in error or error.startswith("signal"):
        return "signal"
    return "health_failure" if "health check failed" in error else "other"


def _since_start_ms(i: Instance, now: float) -> int:
    return round((now - i.launched_at) * 1000) if i.launched_at is not None else 0


# --- events that end a process --------------------------------------------------------------------------------------


def died(i: Instance, e: ev.Died, now: float, p: Policy) -> Step:
    """The process is dead, its exit record is still to come: not ready and not live from this moment."""
    fallen = to(
        i, Phase.STOPPING, now, deadline=now + p.kill_wait_s, after=After.RECOVER, fell_from=i.phase, asked=False, reaped=True,
        vram_pending=False,
    )  # fmt: skip
    if i.phase is Phase.DRAINING:
        fallen = replace(fallen, after=After.STAY)
    say = do.Say("died", f"Engine of pool '{i.pool_id}' is gone; reading how it ended", level="warn")
    return replace(fallen, has_process=False), (do.Withdraw(i.epoch), do.EndLeases(i.epoch), say)


def spawned_stopping(i: Instance, e: ev.Spawned, now: float, p: Policy) -> Step:
    """It began to run while its stop was decided: it is ended at once."""
    if not _awaits_spawn(i):
        return i, ()
    return replace(i, has_process=True, killed=True, deadline=now + p.kill_wait_s), (do.KillEngine(i.epoch),)


def not_spawned_stopping(i: Instance, e: ev.EpochEvent, now: float, p: Policy) -> Step:
    return _finish_without_process(i, now, p) if _awaits_spawn(i) else (i, ())


def died_stopping(i: Instance, e: ev.Died, now: float, p: Policy) -> Step:
    if i.reaped:
        return i, ()
    return replace(i, has_process=False, reaped=True, deadline=now + p.kill_wait_s), (do.Withdraw(i.epoch), do.EndLeases(i.epoch))


def exited_running(i: Instance, e: ev.Exited, now: float, p: Policy) -> Step:
    """The exit record came without word of the death before: both at once."""
    fallen, effects = died(i, ev.Died(e.epoch), now, p)
    return with_effects(effects, exited(fallen, e, now, p))


def exited(i: Instance, e: ev.Exited, now: float, p: Policy) -> Step:
    """The process is reaped. Asked for: the stop is complete. Not asked for: a crash, or a graceful end."""
    gone, effects = died_stopping(i, ev.Died(e.epoch), now, p)
    if i.asked:
        return with_effects(effects, _after_reaping(gone, now, p))
    if i.after is After.RECOVER and i.fell_from in _NOT_YET_READY and e.port_conflict and i.port_conflicts < p.port_retries:
        gone = replace(gone, after=After.START, port_conflicts=i.port_conflicts + 1)
        human = f"Another program took the port of pool '{i.pool_id}'; starting on another one"
        return with_effects((*effects, do.Say("port_conflict", human, level="warn")), _after_reaping(gone, now, p))
    if e.graceful and i.fell_from not in _NOT_YET_READY and p.restart != "always":
        human = f"Engine of pool '{i.pool_id}' ended by itself with code 0; the pool is offline"
        gone = replace(gone, after=After.STAY)
        return with_effects((*effects, do.Say("exit", human, fields={"exit_code": 0})), _after_reaping(gone, now, p))
    gone, said = _crash(gone, e, now)
    return with_effects((*effects, said), _after_reaping(gone, now, p))


_NOT_YET_READY = (Phase.STARTING, Phase.WARMING, Phase.STAGING, Phase.ADOPTING)


def _crash(i: Instance, e: ev.Exited, now: float) -> tuple[Instance, do.Say]:
    name = signal_name(e.signal)
    uptime = now - i.started_at if i.started_at is not None else 0.0
    summary = e.summary or (f"signal {name}" if name else f"exit_code={e.code}")
    error = summary
    if i.fell_from in _NOT_YET_READY:
        quoted = f'; its log says "{e.evidence}"' if e.evidence else ""
        error = f"health check failed: the engine {narration.exit_phrase(e.code, name)} before it was healthy ({summary}){quoted}"
    crashed = replace(i, crash_count=i.crash_count + 1, pending_error=error, last_error=error)
    human = f"Engine of pool '{i.pool_id}' {narration.exit_phrase(e.code, name)} after {narration.duration(uptime)}"
    fields = {
        "uptime_seconds": round(uptime, 3), "exit_code": e.code, "signal": name,
        "crash_count": crashed.crash_count, "last_error": error,
    }  # fmt: skip
    return crashed, do.Say("crash", human, level="error", fields=fields)


def _after_reaping(i: Instance, now: float, p: Policy) -> Step:
    """Down means that the memory was seen free too; pools without GPUs are done at once."""
    if not i.uses_gpus:
        return finish_stop(i, now, p)
    return replace(i, deadline=now + p.vram_wait_s + HELPER_LATE_S, reaped=True, vram_pending=True), (do.AwaitVram(i.epoch),)


def vram_free(i: Instance, e: ev.VramFree, now: float, p: Policy) -> Step:
    """In time, or after the pool had failed for it: what was to follow the stop follows now."""
    return finish_stop(i, now, p) if i.vram_pending else (i, ())


def vram_held(i: Instance, e: ev.VramHeld, now: float, p: Policy) -> Step:
    """The promise is kept: nobody else is given memory that is not free. A late VramFree ends this."""
    if not i.vram_pending:
        return i, ()
    error = f"cannot confirm that the GPU memory of pool '{i.pool_id}' is free: {e.holder}"
    stuck = to(i, Phase.FAILED, now, reason="vram_held", last_error=error, has_process=False)
    return stuck, (do.Say("vram_held", error, level="error", fields={"holder": e.holder}),)


def stopping_tick(i: Instance, e: ev.Tick, now: float, p: Policy) -> Step:
    """Grace is over: kill. Killed and still there: say so and hold on to the truth."""
    if i.deadline is None or now < i.deadline:
        return i, ()
    if i.vram_pending:
        return vram_held(i, ev.VramHeld(i.epoch, "nothing was heard of it"), now, p)
    if _awaits_spawn(i):
        return _finish_without_process(i, now, p)
    if not i.killed:
        return replace(i, killed=True, deadline=now + p.kill_wait_s), (do.KillEngine(i.epoch),)
    if i.reaped:
        lost = ev.Exited(i.epoch, summary="the exit record was lost")
        return exited(i, lost, now, p)
    error = f"cannot end the engine of pool '{i.pool_id}': it survived SIGKILL for {narration.duration(p.kill_wait_s)}"
    return to(i, Phase.FAILED, now, reason="stop_failed", last_error=error), (do.Say("stop_failed", error, level="critical"),)


def died_failed(i: Instance, e: ev.Died, now: float, p: Policy) -> Step:
    return exited_failed(i, ev.Exited(e.epoch), now, p)


def exited_failed(i: Instance, e: ev.Exited, now: float, p: Policy) -> Step:
    """The process that would not die is gone after all; its pool stays failed until somebody starts it."""
    if not i.has_process:
        return i, ()
    gone = replace(i, has_process=False, reaped=True)
    gone_effects: tuple[Effect, ...] = (do.Withdraw(i.epoch), do.EndLeases(i.epoch))
    if not i.uses_gpus:
        return gone, (*gone_effects, do.ReleaseVram(i.epoch))
    return replace(gone, vram_pending=True, after=After.STAY), (*gone_effects, do.AwaitVram(i.epoch))
