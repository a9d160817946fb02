"""How many restarts are too many in a time. Functions of times (monotonic seconds, oldest first); no clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartRules:
    """The numbers of ``supervision.restart_limit``."""

    max_restarts: int = 10
    window_ms: int = 60_000
    storm_warn: int = 5
    storm_open: int = 10
    storm_window_ms: int = 30_000
    reset_after_ms: int = 600_000


Times = tuple[float, ...]


def within(times: Times, now: float, window_ms: int) -> Times:
    """Those of the last ``window_ms``."""
    return tuple(t for t in times if t + window_ms / 1000 > now)


def added(times: Times, now: float, rules: RestartRules) -> Times:
    """With one more; what no rule asks for any more is forgotten."""
    known = within((*times, now), now, max(rules.window_ms, rules.storm_window_ms))
    return known[-1 - max(rules.max_restarts, rules.storm_open, rules.storm_warn) :]


def allowed_at(times: Times, rules: RestartRules) -> float | None:
    """When the next restart may be: once the window holds fewer than ``max_restarts``. None: at any time."""
    if len(times) < rules.max_restarts:
        return None
    return times[-rules.max_restarts] + rules.window_ms / 1000


def opens(times: Times, rules: RestartRules) -> bool:
    """Whether the last restart was one too many for the breaker: the ``storm_open``-th within ``storm_window_ms``."""
    return bool(times) and len(within(times, times[-1], rules.storm_window_ms)) >= rules.storm_open


def storms(times: Times, rules: RestartRules) -> bool:
    """Whether there was a storm at the last restart: more than ``storm_warn`` of them within ``window_ms``."""
    return bool(times) and len(within(times, times[-1], rules.window_ms)) > rules.storm_warn
