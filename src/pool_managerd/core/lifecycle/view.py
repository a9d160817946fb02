"""What an instance looks like from outside, and what must always hold of it."""

from __future__ import annotations

from dataclasses import dataclass

from pool_managerd.core.lifecycle.instance import Instance, Phase, Policy

_STATE = {
    Phase.STAGING: "provisioning",
    Phase.WARMING: "starting",
    Phase.WAKING: "starting",
    Phase.ADOPTING: "starting",
    Phase.OPEN: "failed",
}
_TRANSITIONAL = (Phase.STAGING, Phase.STARTING, Phase.WARMING, Phase.WAKING, Phase.DRAINING, Phase.STOPPING, Phase.BACKOFF,
                 Phase.OPEN, Phase.ADOPTING)  # fmt: skip
_WITH_PROCESS = (Phase.WARMING, Phase.READY, Phase.SLEEPING, Phase.WAKING)


@dataclass(frozen=True, slots=True)
class View:
    """The public state and the three booleans (DESIGN §3, SPEC §2.3)."""

    state: str
    live: bool
    ready: bool
    draining: bool


def view(i: Instance) -> View:
    state = _STATE.get(i.phase, i.phase.value)
    if i.phase is Phase.DOWN:
        state = "offline" if i.epoch else "uninitialized"
    live = i.has_process
    ready = i.phase is Phase.READY and not i.quarantined and not i.hung
    if i.external and i.phase in (Phase.ATTACHED, Phase.DRAINING):
        live = i.last_good_at is not None
    if i.phase is Phase.ATTACHED:
        ready = live and not i.quarantined
        state = "ready" if live else "starting"
    draining = i.phase is Phase.DRAINING or (i.phase is Phase.STOPPING and i.drain_since is not None)
    return View(state, live, ready, draining)


def validate(i: Instance, now: float, p: Policy) -> None:
    """The invariants of one instance; raises AssertionError. Run after every step in tests (DESIGN §8)."""
    seen = view(i)
    _hold(i.phase not in _TRANSITIONAL or i.deadline is not None, "a transitional phase has a deadline", i)
    _hold(i.phase not in _WITH_PROCESS or i.has_process or i.external, "a running phase has a process", i)
    _hold(i.phase not in (Phase.DOWN, Phase.BACKOFF, Phase.OPEN, Phase.STAGING) or not i.has_process, "down means reaped", i)
    _hold(not seen.ready or (seen.live and not seen.draining), "ready means live and not draining", i)
    _hold(not seen.ready or i.last_good_at is not None, "ready means a good probe of this epoch", i)
    _hold(not seen.ready or i.probe_failures < p.failure_threshold, "ready means fewer misses than the threshold", i)
    _hold(i.phase is not Phase.STAGING or not (i.held or i.quarantined) or i.since <= now, "staging began before it was held", i)
    _hold(
        min(i.epoch, i.crash_count, i.restart_count, i.failures, i.drain_leases, i.probe_failures) >= 0,
        "counts are not negative",
        i,
    )
    _hold(not (i.owed and i.drained), "nothing is owed to who asked for a stop", i)
    _hold(not i.vram_pending or i.phase in (Phase.STOPPING, Phase.FAILED), "memory is waited for after a stop alone", i)
    _hold(i.next_probe_at is None or i.probe_sent_at is None, "at most one probe is under way", i)
    _hold(not i.owed or i.phase not in (Phase.STAGING, Phase.STARTING, Phase.READY), "nothing is owed while it runs", i)


def _hold(truth: bool, rule: str, i: Instance) -> None:
    if not truth:
        raise AssertionError(f"broken rule: {rule}: {i}")
