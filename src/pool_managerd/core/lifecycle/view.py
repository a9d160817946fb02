"""What a pool looks like from outside, and what must always hold of it."""

from __future__ import annotations

from dataclasses import dataclass

from pool_managerd.core.lifecycle.instance import Instance
from pool_managerd.core.lifecycle.phase import LOADING, TRANSITIONAL, Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import Desired, PoolState

_STATE = {
    Phase.STAGING: "provisioning",
    Phase.WARMING: "starting",
    Phase.WAKING: "starting",
    Phase.ADOPTING: "starting",
    Phase.OPEN: "failed",
}
_WITH_PROCESS = (Phase.WARMING, Phase.READY, Phase.SLEEPING, Phase.WAKING)
_WITHOUT_PROCESS = (Phase.DOWN, Phase.BACKOFF, Phase.OPEN, Phase.STAGING)


@dataclass(frozen=True, slots=True)
class View:
    """The public state and the three booleans (DESIGN §3, SPEC §2.3)."""

    state: str
    live: bool
    ready: bool
    draining: bool


def view(pool: PoolState) -> View:
    i = pool.active
    state = _STATE.get(i.phase, i.phase.value)
    if i.phase is Phase.DOWN:
        state = "uninitialized" if i.launched_at is None else "offline"
    live = i.has_process
    ready = i.phase is Phase.READY and not pool.quarantined and not (i.hung or i.busy)
    if i.external and i.phase in (Phase.ATTACHED, Phase.DRAINING):
        live = i.last_good_at is not None
    if i.phase is Phase.ATTACHED:
        ready = live and not pool.quarantined and not i.hung
        state = "ready" if live else "starting"
    draining = i.phase is Phase.DRAINING or (i.phase is Phase.STOPPING and i.drain_since is not None)
    return View(state, live, ready, draining)


def _asleep(i: Instance) -> bool:
    """It has said so; until then it is on its way there."""
    return i.phase is Phase.SLEEPING and i.deadline is None


def sleeps_evicted(pool: PoolState) -> bool:
    """Its engine sleeps to make room, until somebody needs it."""
    return _asleep(pool.active) and pool.desired is Desired.EVICTED


def outline(pool: PoolState) -> tuple[object, ...]:
    """What anybody but the lifecycle itself goes by. While two states have the same outline, only timers have moved."""
    i = pool.active
    return (
        i.phase, i.epoch, i.has_process, i.external, i.last_good_at, i.hung, i.busy, i.drain_since, _asleep(i),
        pool.desired, pool.held, pool.quarantined, pool.pending_start, pool.crash_count, pool.restart_count, pool.reason,
        pool.last_error, pool.history.circuit,
    )  # fmt: skip


def validate(pool: PoolState, now: float, p: Policy) -> None:
    """The invariants of one pool; raises AssertionError. Run after every step in tests (DESIGN §8)."""
    i, seen = pool.active, view(pool)
    rules = {
        "a transitional phase has a deadline": i.phase not in TRANSITIONAL or i.deadline is not None,
        "a running phase has a process": i.phase not in _WITH_PROCESS or i.has_process or i.external,
        "down means reaped": i.phase not in _WITHOUT_PROCESS or not i.has_process,
        "ready means live and not draining": not seen.ready or (seen.live and not seen.draining),
        "ready means a good probe of this epoch": not seen.ready or i.last_good_at is not None,
        "ready means fewer failed probes than the threshold": not seen.ready or i.probe_failures < p.failure_threshold,
        "staging began before it was held": i.phase is not Phase.STAGING or not (pool.held or pool.quarantined) or i.since <= now,
        "counts are not negative": min(i.epoch, pool.crash_count, pool.restart_count, i.drain_leases, i.probe_failures) >= 0,
        "an open breaker is what open means": i.phase is not Phase.OPEN or pool.history.open_until is not None,
        "nothing is under way while a breaker is open": pool.history.open_until is None or i.phase not in LOADING | {Phase.READY},
        "restarts are in order": list(pool.history.restarts) == sorted(pool.history.restarts),
        "no start is due of a pool that is to stay down": not (pool.pending_start and pool.desired.stays_down),
        "no start is due while one is under way": not pool.pending_start
        or i.phase not in (Phase.STAGING, Phase.STARTING, Phase.READY),
        "memory is waited for after a stop alone": not i.vram_pending or i.phase in (Phase.STOPPING, Phase.FAILED),
        "at most one probe is under way": i.next_probe_at is None or i.probe_sent_at is None,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise AssertionError(f"broken: {'; '.join(broken)}: {pool}")
