"""When an engine that keeps failing is left alone, and when it is tried again. Functions of frozen values and times.

closed → open at ``threshold`` failures in a row → half-open once ``open_ms`` are over: exactly one start → closed when that
was ready for ``close_after_ms``, or open again for twice as long when it failed (SPEC §8.3). A pool has two breakers: one
counts the failures of its GPUs and their driver, the other all others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

MAX_DOUBLINGS = 4
"""The longest open time is this many doublings of ``open_ms``: 80 minutes where that is 5."""
MAX_FAILURES = 10_000
"""No more are counted: they make no difference to anything."""


class Circuit(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    """No start by itself."""
    HALF_OPEN = "half_open"
    """One start was let through; what becomes of it decides."""


class Trial(StrEnum):
    """Which start was let through."""

    DUE = "due"
    """The open time was over."""
    MANUAL = "manual"
    """A person did not want to wait for that. When it fails, the breaker is open as it was before."""


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """The numbers of ``supervision.breaker``."""

    threshold: int = 5
    open_ms: int = 300_000
    close_after_ms: int = 60_000


@dataclass(frozen=True, slots=True)
class Breaker:
    """``failures`` in a row; ``opened``: how often in a row it opened. ``open_until``: a monotonic second; None while closed."""

    failures: int = 0
    opened: int = 0
    open_until: float | None = None
    trial: Trial | None = None

    @property
    def circuit(self) -> Circuit:
        if self.open_until is None:
            return Circuit.CLOSED
        return Circuit.OPEN if self.trial is None else Circuit.HALF_OPEN


CLOSED = Breaker()


def failed(b: Breaker, now: float, rules: BreakerRules, *, counts: bool) -> Breaker:
    """After one more failure; ``counts`` is false for one that is the other breaker's, which fails a trial all the same."""
    counted = replace(b, failures=min(b.failures + counts, MAX_FAILURES), trial=None)
    if b.trial is Trial.DUE or (counts and b.circuit is Circuit.CLOSED and counted.failures >= rules.threshold):
        return opened(counted, now, rules)
    return counted


def opened(b: Breaker, now: float, rules: BreakerRules) -> Breaker:
    """Open from now on, for twice as long as the time before; no trial of ``b`` is under way."""
    times = b.opened + 1
    open_s = rules.open_ms / 1000 * 2 ** min(times - 1, MAX_DOUBLINGS)
    return replace(b, opened=times, open_until=now + open_s)


def tried(b: Breaker, now: float) -> Breaker:
    """A start is let through; one that goes on within the same trial changes nothing."""
    if b.open_until is None or b.trial is not None:
        return b
    return replace(b, trial=Trial.DUE if now >= b.open_until else Trial.MANUAL)
