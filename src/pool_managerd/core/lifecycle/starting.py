"""The way up: requests to start, staging, the process, the first good probe, the warm-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pool_managerd.core import narration
from pool_managerd.core.health import start_gap_ms
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.effects import Effect
from pool_managerd.core.lifecycle.ending import Step, begin_stop, fail_start, launch, to
from pool_managerd.core.lifecycle.instance import RISING, After, Instance, Phase, Policy
from pool_managerd.core.lifecycle.view import view


def start(i: Instance, e: ev.Start, now: float, p: Policy) -> Step:
    """A start by request, at boot or on demand. Hold and quarantine stand in its way and say so."""
    if (barred := _barred(i, "start")) is not None:
        return barred
    if i.has_process:
        return refuse(i, "OPERATION_IN_PROGRESS", f"cannot start pool '{i.pool_id}': its last engine process is still there")
    return launch(replace(i, retry=e.retry, port_conflicts=0), now, p, origin=e.origin)


def join_start(i: Instance, e: ev.Start, now: float, p: Policy) -> Step:
    """It is under way, or done: whoever asks waits for the same end, unless a start of their own was asked for."""
    if e.join:
        return i, ()
    if view(i).ready:
        return refuse(i, "ALREADY_READY", f"cannot start pool '{i.pool_id}': it is already ready")
    if i.phase in RISING:
        return refuse(i, "OPERATION_IN_PROGRESS", f"cannot start pool '{i.pool_id}': it is being started already")
    why = f": {i.last_error}" if i.last_error else ""
    return refuse(i, "OPERATION_IN_PROGRESS", f"cannot start pool '{i.pool_id}': it has an engine that is not ready{why}")


def start_when_due(i: Instance, e: ev.Start, now: float, p: Policy) -> Step:
    """Demand does not hasten the restart of an engine that keeps failing; a person's request does."""
    return join_start(i, e, now, p) if e.origin == "demand" else start(i, e, now, p)


def start_after_stop(i: Instance, e: ev.Start, now: float, p: Policy) -> Step:
    """The engine is ending: the start follows as soon as it holds nothing any more. The last request wins."""
    if not e.join:
        return refuse(i, "OPERATION_IN_PROGRESS", f"cannot start pool '{i.pool_id}': its engine is being stopped")
    if (barred := _barred(i, "start")) is not None:
        return barred
    if e.origin == "demand" and i.after is After.RECOVER:
        return i, ()
    after = i.after if i.after is After.START else After.NEW_START
    return replace(i, after=after, retry=e.retry, port_conflicts=0, drained=False, owed=False), ()


def restart_after_stop(i: Instance, e: ev.Restart, now: float, p: Policy) -> Step:
    if (barred := _barred(i, "restart")) is not None:
        return barred
    return replace(i, after=After.START, port_conflicts=0, drained=False, owed=False), ()


def restart_down(i: Instance, e: ev.Restart, now: float, p: Policy) -> Step:
    return start(i, ev.Start(retry=i.retry, origin="restart"), now, p)


def restart_up(i: Instance, e: ev.Restart, now: float, p: Policy) -> Step:
    if (barred := _barred(i, "restart")) is not None:
        return barred
    return begin_stop(replace(i, port_conflicts=0), now, p, After.START)


def _barred(i: Instance, what: str) -> Step | None:
    """The refusal by a flag beside the phase, None when neither stands in the way."""
    if i.held:
        return refuse(i, "POOL_HELD", f"cannot {what} pool '{i.pool_id}': it is held; release it first")
    if i.quarantined:
        why = f": {i.last_error}" if i.last_error else ""
        return refuse(i, "POOL_UNAVAILABLE", f"cannot {what} pool '{i.pool_id}': one of its GPUs is quarantined{why}")
    return None


def refuse(i: Instance, code: str, message: str) -> Step:
    """Nothing changes; whoever asked is told why."""
    return i, (do.Refuse(code, message),)


def refusing_request(code: str, why: str) -> Callable[[Instance, ev.Event, float, Policy], Step]:
    """A handler that refuses with ``why``; ``{pool}`` and ``{state}`` in it are filled in."""

    def handler(i: Instance, e: ev.Event, now: float, p: Policy) -> Step:
        return refuse(i, code, why.format(pool=i.pool_id, state=view(i).state))

    return handler


def stage_progress(i: Instance, e: ev.StagingProgress, now: float, p: Policy) -> Step:
    return replace(i, deadline=now + p.staging_stall_s), ()


def staged(i: Instance, e: ev.Staged, now: float, p: Policy) -> Step:
    """Model and engine are there. An external engine is attached to: there is no process to own."""
    known = replace(i, uses_gpus=e.uses_gpus, warmable=e.warmable and p.warmup != "off", external=e.external)
    if not e.external:
        starting = to(known, Phase.STARTING, now, deadline=now + p.startup_timeout_s)
        say = do.Say("staged", f"Model and engine of pool '{i.pool_id}' are in place; launching the engine")
        return starting, (do.SpawnEngine(i.epoch), say)
    attached = to(known, Phase.ATTACHED, now, probe_sent_at=now)
    say = do.Say("attach", f"Attaching pool '{i.pool_id}' to an engine that somebody else runs")
    return attached, (do.SendProbe(i.epoch), say)


def staging_failed(i: Instance, e: ev.StagingFailed, now: float, p: Policy) -> Step:
    return fail_start(i, now, p, e.error, retriable=e.retriable, reason=e.reason)


def staging_tick(i: Instance, e: ev.Tick, now: float, p: Policy) -> Step:
    if i.deadline is None or now < i.deadline:
        return i, ()
    error = f"cannot prepare pool '{i.pool_id}': no progress for {narration.duration(p.staging_stall_s)}"
    step = fail_start(i, now, p, error, retriable=True, reason="preload_failed")
    return step[0], (do.CancelStaging(i.epoch), *step[1])


def staging_helper_died(i: Instance, e: ev.HelperDied, now: float, p: Policy) -> Step:
    return fail_start(i, now, p, f"cannot prepare pool '{i.pool_id}': {e.what}", retriable=True, reason="preload_failed")


def cancel_staging(i: Instance, now: float) -> Step:
    say = do.Say("stopped", f"Start of pool '{i.pool_id}' was cancelled before its engine ran")
    return to(i, Phase.DOWN, now), (do.CancelStaging(i.epoch), do.Withdraw(i.epoch), do.ReleaseVram(i.epoch), say)


def spawned(i: Instance, e: ev.Spawned, now: float, p: Policy) -> Step:
    """The pid file is written before the first probe (SPEC §6.1)."""
    running = replace(i, has_process=True, started_at=now, probe_sent_at=now, next_probe_at=None)
    say = do.Say("spawn", f"Engine of pool '{i.pool_id}' runs and is loading its model", fields={"pid": e.pid})
    return running, (do.WritePid(i.epoch, e.pid), do.SendProbe(i.epoch), say)


def spawned_late(i: Instance, e: ev.Spawned, now: float, p: Policy) -> Step:
    """Nobody wants this process any more: it began to run while its stop was decided."""
    stopping = to(
        i, Phase.STOPPING, now, deadline=now + p.kill_wait_s, has_process=True, started_at=now,
        fell_from=Phase.STARTING, asked=True, reaped=False, killed=True, pending_error=i.last_error,
        after=After.RECOVER if i.phase is Phase.BACKOFF else After.STAY,
    )  # fmt: skip
    say = do.Say("stop", f"Engine of pool '{i.pool_id}' came up when nobody wanted it any more; ending it")
    return stopping, (do.KillEngine(i.epoch), say)


def spawn_failed(i: Instance, e: ev.SpawnFailed, now: float, p: Policy) -> Step:
    if i.has_process:  # it was adopted, or is there all the same
        return i, ()
    return fail_start(i, now, p, e.error, retriable=e.retriable, reason="preload_failed")


def starting_helper_died(i: Instance, e: ev.HelperDied, now: float, p: Policy) -> Step:
    error = f"preload failed: {e.what}"
    if i.has_process:
        return begin_stop(i, now, p, After.RECOVER, error=error)
    return fail_start(i, now, p, error, retriable=True, reason="preload_failed")


def starting_miss(i: Instance, e: ev.ProbeMissed, now: float, p: Policy) -> Step:
    """Not yet. Ask again soon; the gap grows with each miss up to health.interval_ms."""
    gap_ms = start_gap_ms(round((now - i.since) * 1000), p.probe_gap_ms)
    return replace(i, probe_reason=e.reason, probe_sent_at=None, next_probe_at=now + gap_ms / 1000), ()


def probe_discarded(i: Instance, e: ev.ProbeDiscarded, now: float, p: Policy) -> Step:
    """The prober failed, not the engine: try again, hold nothing against anybody."""
    gap_s = p.probe_gap_ms / 1000 if i.phase in (Phase.STARTING, Phase.WAKING) else p.probe_interval_s
    again = replace(i, probe_sent_at=None, next_probe_at=now + gap_s)
    if i.phase not in (Phase.READY, Phase.ATTACHED) or i.hung or i.last_good_at is None or now - i.last_good_at <= p.fresh_s:
        return again, ()
    error = f"health check failed: no probe could be sent for {narration.duration(now - i.last_good_at)}"
    say = do.Say("unhealthy", f"Pool '{i.pool_id}' is not shown as ready: {error}", level="error", fields={"last_error": error})
    unknown = {"last_good_at": None, "ready_since": None} if i.phase is Phase.ATTACHED else {"hung": True}
    return replace(again, last_error=error, **unknown), (say,)


def starting_ok(i: Instance, e: ev.ProbeSucceeded, now: float, p: Policy) -> Step:
    """The first good probe of this launch. Before there is a process of ours, somebody else answered."""
    if not i.has_process:
        return i, ()
    good = replace(i, last_good_at=now, probe_failures=0, probe_reason="", probe_sent_at=None)
    if i.warmable and not i.warmed and p.warmup == "before_ready":
        warming = to(good, Phase.WARMING, now, deadline=now + p.warmup_timeout_s)
        say = do.Say("warming", f"Engine of pool '{i.pool_id}' is healthy; sending it a first prompt")
        return warming, (do.SendWarmup(i.epoch), say)
    late = (do.SendWarmup(i.epoch),) if i.warmable and not i.warmed and p.warmup == "after_ready" else ()
    ready, effects = become_ready(good, now, p)
    return ready, (*effects, *late)


def become_ready(i: Instance, now: float, p: Policy) -> Step:
    """All gates passed: model local, engine prepared, probe good (ORCH-3504)."""
    ready = to(
        i, Phase.READY, now, next_probe_at=now + p.probe_interval_s, ready_since=now, reason=None, warmed=True,
        port_conflicts=0, retry=True, last_error=i.last_error if i.quarantined else None,
    )  # fmt: skip
    if i.quarantined:
        human = f"Engine of pool '{i.pool_id}' answers, but the pool is quarantined: {i.last_error}"
        return ready, (do.Announce(i.epoch), do.Say("quarantine", human, level="warn"))
    took = round((now - i.launched_at) * 1000) if i.launched_at is not None else 0
    human = f"Pool '{i.pool_id}' is ready after {narration.duration(took / 1000)}"
    return ready, (do.Announce(i.epoch), do.Say("preload_succeeded", human, fields={"duration_ms": took}))


def starting_tick(i: Instance, e: ev.Tick, now: float, p: Policy) -> Step:
    if i.deadline is not None and now >= i.deadline:
        if not i.has_process:
            error = f"cannot launch the engine: nothing was heard of its launch for {narration.duration(p.startup_timeout_s)}"
            return fail_start(i, now, p, error, retriable=True, reason="preload_failed")
        last = f"; the last probe {i.probe_reason}" if i.probe_reason else ""
        error = f"health check failed: the engine was not healthy within {narration.duration(p.startup_timeout_s)}{last}"
        return begin_stop(replace(i, last_error=error), now, p, After.RECOVER, error=error)
    return send_due_probe(i, now)


def send_due_probe(i: Instance, now: float) -> Step:
    """At most one probe is under way."""
    if i.next_probe_at is None or now < i.next_probe_at or i.probe_sent_at is not None:
        return i, ()
    return replace(i, next_probe_at=None, probe_sent_at=now), (do.SendProbe(i.epoch),)


def warmed_up(i: Instance, e: ev.WarmedUp, now: float, p: Policy) -> Step:
    return become_ready(replace(i, last_good_at=now), now, p)


def warmup_failed(i: Instance, e: ev.WarmupFailed, now: float, p: Policy) -> Step:
    """A failed warm-up only warns (DESIGN §7)."""
    ready, effects = become_ready(i, now, p)
    say = do.Say("warmup_failed", f"Warm-up of pool '{i.pool_id}' failed: {e.error}", level="warn")
    return ready, (say, *effects)


def warming_tick(i: Instance, e: ev.Tick, now: float, p: Policy) -> Step:
    if i.deadline is None or now < i.deadline:
        return i, ()
    return warmup_failed(i, ev.WarmupFailed(i.epoch, f"no answer within {narration.duration(p.warmup_timeout_s)}"), now, p)


def warming_helper_died(i: Instance, e: ev.HelperDied, now: float, p: Policy) -> Step:
    return warmup_failed(i, ev.WarmupFailed(i.epoch, e.what), now, p)


# --- after a restart of the daemon ----------------------------------------------------------------------------------


def adopt(i: Instance, e: ev.Adopt, now: float, p: Policy) -> Step:
    """An engine of an earlier daemon was found: look whether it is ours before anything else."""
    adopting = to(i, Phase.ADOPTING, now, deadline=now + p.adopt_timeout_s, epoch=e.epoch, launched_at=now, owed=False)
    say = do.Say("adopting", f"Found an engine of pool '{i.pool_id}' running; looking whether it is ours")
    return adopting, (do.AdoptEngine(e.epoch), say)


def adopted(i: Instance, e: ev.Adopted, now: float, p: Policy) -> Step:
    found = to(i, Phase.STARTING, now, deadline=now + p.startup_timeout_s, has_process=True, warmed=True, started_at=now,
               probe_sent_at=now)  # fmt: skip
    return found, (do.SendProbe(i.epoch), do.Say("adopt", f"Took over the running engine of pool '{i.pool_id}'"))


def not_adopted(i: Instance, e: ev.NotAdopted, now: float, p: Policy) -> Step:
    human = f"Engine of pool '{i.pool_id}' was not taken over: {e.reason}"
    effects: tuple[Effect, ...] = (do.Withdraw(i.epoch), do.EndLeases(i.epoch), do.Say("not_adopted", human, level="warn"))
    return to(i, Phase.DOWN, now), effects


def adopting_tick(i: Instance, e: ev.Tick, now: float, p: Policy) -> Step:
    if i.deadline is None or now < i.deadline:
        return i, ()
    return not_adopted(i, ev.NotAdopted(i.epoch, "looking at it took too long"), now, p)


def adopting_helper_died(i: Instance, e: ev.HelperDied, now: float, p: Policy) -> Step:
    return not_adopted(i, ev.NotAdopted(i.epoch, e.what), now, p)
