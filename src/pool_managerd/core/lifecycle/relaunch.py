"""The next start: begun now, after a backoff, or not at all.

Every start goes through ``launch`` and is a launch of its own, with the next epoch. Every failure goes through
``fail_start`` (it never got as far as a process) or ``recover`` (it did), and from there to a backoff or to ``failed``.
"""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core import narration
from pool_managerd.core.backoff import delay_ms
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle.effects import Effect
from pool_managerd.core.lifecycle.instance import Instance
from pool_managerd.core.lifecycle.phase import Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import Desired, PoolState, Step, on, then, to


def launch(pool: PoolState, now: float, p: Policy, *, origin: str) -> Step:
    """Begin a start: a new instance with the next epoch. What an older launch still had reserved is released.

    Held or quarantined, the pool only remembers that a start is due.
    """
    wanted, old = replace(pool, desired=Desired.WANTED), pool.active
    if pool.held or pool.quarantined:
        flag = "held" if pool.held else "quarantined"
        say = do.Say("start_owed", f"Pool '{pool.pool_id}' is {flag}; its start waits for that to end")
        return to(replace(wanted, pending_start=True), Phase.DOWN, now), (say,)
    again = pool.has_run and origin == "restart"
    epoch = max(old.epoch, pool.last_epoch) + 1
    new = Instance(old.id, epoch, Phase.STAGING, now, deadline=now + p.staging_stall_s, launched_at=now)
    started = replace(wanted, active=new, pending_start=False, reason=None, restart_count=pool.restart_count + again)
    say = do.Say("start", narration.starting(pool.pool_id, origin), fields={"origin": origin})
    if again:
        human = f"Restarting the engine of pool '{pool.pool_id}' (restart {started.restart_count})"
        say = do.Say("restart", human, fields={"restart_count": started.restart_count})
    freed = (do.ReleaseVram(old.epoch),) if old.vram_pending else ()
    return started, (*freed, do.StageArtifacts(new.epoch), say)


def fail_start(pool: PoolState, now: float, p: Policy, error: str, *, retriable: bool, reason: str) -> Step:
    """A start that never got as far as a process. Counted for backoff, but it is no crash."""
    epoch = pool.active.epoch
    human = f"Pool '{pool.pool_id}' could not start: {error}"
    fields = {"reason": reason, "last_error": error, "duration_ms": _since_start_ms(pool, now)}
    freed: tuple[Effect, ...] = (
        do.Withdraw(epoch), do.ReleaseVram(epoch), do.Say("preload_failed", human, level="error", fields=fields),
    )  # fmt: skip
    down = replace(pool.failed(now), last_error=error)
    if pool.retry and retriable:
        return then(freed, _back_off(down, now, p, "could not start", reason))
    return to(replace(down, reason=reason), Phase.FAILED, now), freed


def recover(pool: PoolState, now: float, p: Policy, error: str, crash: CrashClass) -> Step:
    """After a failure of a running engine: back off and start again, unless the policy or a request says no."""
    ready_since = pool.active.ready_since
    stable = ready_since is not None and now - ready_since >= p.backoff.reset_after_ms / 1000
    base = on(replace(pool.failed(now, anew=stable), last_error=error), ready_since=None, pending_error=None)
    told: tuple[Effect, ...] = ()
    if ready_since is None:
        fields = {"reason": "preload_failed", "last_error": error, "duration_ms": _since_start_ms(pool, now)}
        told = (do.Say("preload_failed", f"Pool '{pool.pool_id}' did not become ready: {error}", level="error", fields=fields),)
    what = "did not become ready" if ready_since is None else "failed"
    if p.restart == "never" or (ready_since is None and not pool.retry):
        why = "its restart policy is never" if p.restart == "never" else "a submitted preload is not retried"
        say = do.Say("gave_up", narration.giving_up(pool.pool_id, what, why), level="error", fields={"last_error": error})
        reason = "preload_failed" if ready_since is None else "engine_failed"
        return to(replace(base, reason=reason), Phase.FAILED, now), (*told, say)
    return then(told, _back_off(base, now, p, what, crash.value, p.backoff.cuda_multiplier if crash.cuda else 1.0))


def _back_off(pool: PoolState, now: float, p: Policy, what: str, crash_reason: str, multiplier: float = 1.0) -> Step:
    """Wait before the next start; the delay grows with failures in a row."""
    wait_ms = delay_ms(p.backoff, len(pool.failures), seed=p.seed, multiplier=multiplier)
    fields = {
        "backoff_ms": wait_ms, "crash_count": pool.crash_count, "crash_reason": crash_reason, "restart_in_s": wait_ms / 1000,
    }  # fmt: skip
    say = do.Say("backoff", narration.backing_off(pool.pool_id, what, wait_ms), level="warn", fields=fields)
    return to(pool, Phase.BACKOFF, now, deadline=now + wait_ms / 1000), (say,)


def due_start(pool: PoolState, e: object, now: float, p: Policy) -> Step:
    """The wait is over: the next start, or the one half-open test of an open breaker."""
    deadline = pool.active.deadline
    if deadline is None or now < deadline:
        return pool, ()
    return launch(pool, now, p, origin="restart")


def _since_start_ms(pool: PoolState, now: float) -> int:
    launched_at = pool.active.launched_at
    return 0 if launched_at is None else round((now - launched_at) * 1000)
