"""The next start: begun now, after a wait, or not at all.

Every start goes through ``launch`` and is a launch of its own, with the next epoch. Every failure goes through
``fail_start`` (it never got as far as a process) or ``recover`` (it did), and from there to a backoff, to an open breaker
or to ``failed``.
"""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core import narration
from pool_managerd.core.backoff import delay_ms
from pool_managerd.core.breaker import Circuit
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle.effects import Effect
from pool_managerd.core.lifecycle.history import OOM_STORM, OOM_STORM_WINDOW_MS, FailureHistory
from pool_managerd.core.lifecycle.instance import Instance
from pool_managerd.core.lifecycle.phase import Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import Desired, PoolState, Step, on, then, to
from pool_managerd.core.restart_limit import allowed_at, opens, storms, within


def launch(pool: PoolState, now: float, p: Policy, *, origin: str, by_hand: bool = False) -> Step:
    """Begin a start: a new instance with the next epoch. What an older launch still had reserved is released.

    Unless something stands in its way. ``by_hand``: a person wants it now, so that an open breaker lets it through, once.
    """
    again = pool.has_run and (origin in ("restart", "boot") or pool.history.circuit is Circuit.OPEN)
    old = pool.active
    freed: tuple[Effect, ...] = (do.ReleaseVram(old.epoch),) if old.vram_pending else ()
    if (waiting := _waits(pool, now, p, again=again, by_hand=by_hand, boot=origin == "boot")) is not None:
        return then(freed, (on(waiting[0], vram_pending=False), waiting[1])) if freed else waiting
    epoch = max(old.epoch, pool.last_epoch) + 1
    new = Instance(old.id, epoch, Phase.STAGING, now, deadline=now + p.staging_stall_s, launched_at=now)
    tried, told = remember(pool, pool.history.started(now, p, again=again), now)
    started = replace(
        tried, active=new, desired=Desired.WANTED, pending_start=False, reason=None, restart_count=pool.restart_count + again
    )  # fmt: skip
    say = do.Say("start", narration.starting(pool.pool_id, origin), fields={"origin": origin})
    if again:
        human = f"Restarting the engine of pool '{pool.pool_id}' (restart {started.restart_count})"
        say = do.Say("restart", human, fields={"restart_count": started.restart_count})
    return started, (*freed, do.StageArtifacts(new.epoch), *told, say, *_storm(pool, started, now, p))


def _waits(pool: PoolState, now: float, p: Policy, *, again: bool, by_hand: bool, boot: bool) -> Step | None:
    """What stands in the way of a start, in this order; None when nothing does:

    1. It is held or quarantined: the pool only remembers that a start is due.
    2. Its breaker is open.
    3. A failure under an earlier daemon is still waited after.
    4. It was restarted too often within the window: the next one waits until the first of them has left it.
    """
    wanted, until = replace(pool, desired=Desired.WANTED), pool.history.open_until
    if pool.held or pool.quarantined:  # 1
        flag = "held" if pool.held else "quarantined"
        say = do.Say("start_owed", f"Pool '{pool.pool_id}' is {flag}; its start waits for that to end")
        return to(replace(wanted, pending_start=True), Phase.DOWN, now), (say,)
    wanted = replace(wanted, pending_start=False)
    if until is not None and by_hand:
        return None
    if until is not None and now < until:  # 2
        human = f"Breaker of pool '{pool.pool_id}' is open; its start waits {narration.duration(until - now)}"
        return to(replace(wanted, reason="circuit_open"), Phase.OPEN, now, deadline=until), (do.Say("start_owed", human),)
    if boot and (due := pool.history.due) is not None and now < due:  # 3
        human = f"Pool '{pool.pool_id}' failed under an earlier daemon; its start waits {narration.duration(due - now)}"
        return to(wanted, Phase.BACKOFF, now, deadline=due), (do.Say("start_owed", human),)
    free_at = allowed_at(pool.history.restarts, p.restart_limit) if again else None
    if free_at is None or now >= free_at:
        return None
    window = narration.duration(p.restart_limit.window_ms / 1000)  # 4
    human = (
        f"Pool '{pool.pool_id}' was restarted {p.restart_limit.max_restarts} times within {window};"
        f" the next restart waits {narration.duration(free_at - now)}"
    )
    fields = {
        "restart_count": len(within(pool.history.restarts, now, p.restart_limit.window_ms)),
        "time_window": p.restart_limit.window_ms, "restart_in_s": free_at - now,
    }  # fmt: skip
    return to(wanted, Phase.BACKOFF, now, deadline=free_at), (do.Say("restart_delayed", human, level="warn", fields=fields),)


def _storm(before: PoolState, started: PoolState, now: float, p: Policy) -> tuple[Effect, ...]:
    """Said when it begins, and not again while it lasts."""
    restarts, window_ms = started.history.restarts, p.restart_limit.window_ms
    if not storms(restarts, p.restart_limit) or storms(before.history.restarts, p.restart_limit):
        return ()
    times = len(within(restarts, now, window_ms))
    human = f"Pool '{before.pool_id}' is restarted again and again: {times} times within {narration.duration(window_ms / 1000)}"
    return (do.Say("storm", human, level="critical", fields={"restart_count": times, "time_window": window_ms}),)


def remember(pool: PoolState, history: FailureHistory, now: float) -> Step:
    """``pool`` with this history, and what its breakers have become by it."""
    old, said = pool.history.breakers, []
    for name, b in history.breakers.items():
        was, is_now = old[name].circuit, b.circuit
        if was is is_now:
            continue
        fields: dict[str, object] = {
            "class": name,
            "old_state": was.value,
            "new_state": is_now.value,
            "failure_count": b.failures,
        }
        left_s = None
        if is_now is Circuit.OPEN and b.open_until is not None:
            left_s = max(b.open_until - now, 0.0)
            fields |= {"open_ms": round(left_s * 1000), "restart_in_s": left_s}
        level = {Circuit.OPEN: "error", Circuit.HALF_OPEN: "warn", Circuit.CLOSED: "info"}[is_now]
        human = narration.breaker(pool.pool_id, name, is_now.value, b.failures, left_s)
        said.append(do.Say("breaker", human, level=level, fields=fields))
    return replace(pool, history=history), tuple(said)


def fail_start(pool: PoolState, now: float, p: Policy, error: str, *, retriable: bool, reason: str) -> Step:
    """A start that never got as far as a process. Counted for backoff, but it is no crash, and no breaker counts it."""
    epoch = pool.active.epoch
    human = f"Pool '{pool.pool_id}' could not start: {error}"
    fields = {"reason": reason, "last_error": error, "duration_ms": _since_start_ms(pool, now)}
    counted, told = remember(pool, pool.history.failed(now, p, None, error), now)
    freed: tuple[Effect, ...] = (
        do.Withdraw(epoch), do.ReleaseVram(epoch), do.Say("preload_failed", human, level="error", fields=fields), *told,
    )  # fmt: skip
    down = replace(counted, last_error=error)
    if pool.retry and retriable:
        return then(freed, _back_off(replace(down, reason=reason), now, p, "could not start", reason))
    return to(replace(down, reason=reason), Phase.FAILED, now), freed


def recover(pool: PoolState, now: float, p: Policy, error: str, crash: CrashClass) -> Step:
    """After a failure of a running engine: wait and start again, unless the policy, a request or the failure says no."""
    ready_since = pool.active.ready_since
    counted, kind, told = _counted(pool, now, p, error, crash)
    base = on(replace(counted, last_error=error), ready_since=None, pending_error=None)
    if ready_since is None:
        fields = {"reason": "preload_failed", "last_error": error, "duration_ms": _since_start_ms(pool, now)}
        failed = do.Say("preload_failed", f"Pool '{pool.pool_id}' did not become ready: {error}", level="error", fields=fields)
        told = (failed, *told)
    what = "did not become ready" if ready_since is None else "failed"
    if (why := _final(pool, p, crash)) is not None:
        fields = {"last_error": error, "crash_reason": kind.value}
        say = do.Say("gave_up", narration.giving_up(pool.pool_id, what, why), level="error", fields=fields)
        reason = "preload_failed" if ready_since is None else "engine_failed"
        return to(replace(base, reason=reason), Phase.FAILED, now), (*told, say)
    return then(told, _back_off(base, now, p, what, kind.value, p.backoff.multiplier(crash)))


def _final(pool: PoolState, p: Policy, crash: CrashClass) -> str | None:
    """Why it is not started again; None when it is. What was ready once is no engine that can never run."""
    if p.restart == "never":
        return "its restart policy is never"
    if pool.active.ready_since is None and not pool.retry:
        return "a submitted preload is not retried"
    if crash.deterministic and not pool.proven:
        return "another start would end the same way"
    return None


def _counted(
    pool: PoolState, now: float, p: Policy, error: str, crash: CrashClass
) -> tuple[PoolState, CrashClass, tuple[Effect, ...]]:
    """With one more failure in its history, the class it has there, and what is said of it.

    Whatever a stable run before it made forgotten does not count; such a run is the end of a storm, too.
    """
    ready_since, history = pool.active.ready_since, pool.history
    stable = ready_since is not None and now - ready_since >= p.breaker.close_after_ms / 1000
    if ready_since is not None:
        history = history.stable(ready_since, now, p)
    calmed, closed = remember(pool, history, now)
    history, kind = history.classified(crash, now)
    storm = not stable and opens(history.restarts, p.restart_limit)
    counts = None if crash is CrashClass.NOT_STARTED else crash
    counted, told = remember(calmed, history.failed(now, p, counts, error, storm=storm), now)
    if kind is not CrashClass.OOM_STORM:
        return counted, kind, (*closed, *told)
    window = narration.duration(OOM_STORM_WINDOW_MS / 1000)
    hint = "give it less context, fewer slots or a smaller model, or more memory"
    human = f"Pool '{pool.pool_id}' ran out of memory {OOM_STORM} times within {window}: {hint}"
    fields = {"crash_class": kind.value, "hint": hint, "restart_count": OOM_STORM, "time_window": OOM_STORM_WINDOW_MS}
    return counted, kind, (*closed, do.Say("oom_storm", human, level="critical", fields=fields), *told)


def _back_off(pool: PoolState, now: float, p: Policy, what: str, crash_reason: str, multiplier: float = 1.0) -> Step:
    """Wait before the next start: until the breaker may let one through, or for a delay that grows with failures in a row."""
    wait_ms = delay_ms(p.backoff, pool.history.failures, seed=p.seed, multiplier=multiplier)
    deadline = now + wait_ms / 1000
    if (until := pool.history.open_until) is not None:
        return to(replace(pool, reason="circuit_open"), Phase.OPEN, now, deadline=max(until, deadline)), ()
    fields = {
        "backoff_ms": wait_ms, "crash_count": pool.crash_count, "crash_reason": crash_reason, "restart_in_s": wait_ms / 1000,
    }  # fmt: skip
    say = do.Say("backoff", narration.backing_off(pool.pool_id, what, wait_ms), level="warn", fields=fields)
    return to(replace(pool, history=replace(pool.history, due=deadline)), Phase.BACKOFF, now, deadline=deadline), (say,)


def due_start(pool: PoolState, e: object, now: float, p: Policy) -> Step:
    """The wait is over: the next start, or the one that an open breaker lets through."""
    deadline = pool.active.deadline
    if deadline is None or now < deadline:
        return pool, ()
    return launch(pool, now, p, origin="restart")


def _since_start_ms(pool: PoolState, now: float) -> int:
    launched_at = pool.active.launched_at
    return 0 if launched_at is None else round((now - launched_at) * 1000)
