"""What a pool has failed at, in one value: backoff, breakers and limits decide by it, and it survives the daemon.

What was stable for long is forgotten: the failures that breakers count after ``breaker.close_after_ms``, those that
backoff counts after ``backoff.reset_after_ms``, restarts after ``restart_limit.reset_after_ms``. A first good probe
forgets nothing (SPEC §20 no. 47 and 48).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pool_managerd.core import breaker, restart_limit
from pool_managerd.core.breaker import CLOSED, Breaker, Circuit
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.restart_limit import Times

OOM_STORM = 5
OOM_STORM_WINDOW_MS = 60_000
MAX_ERROR_CHARS = 400
MAX_TIMES = 1_000
MAX_S = 1e12


@dataclass(frozen=True, slots=True)
class FailureHistory:
    """All times are monotonic seconds, the newest last.

    ``failures`` in a row are what backoff counts; ``general`` and ``cuda`` are the breakers. ``restarts`` and ``ooms`` are
    those of the last minute or so. ``error`` is the sentence of the last failure, or of the drain that cut leases off,
    until the next good start. ``due`` is when the start is due that a failure is waited after; the next daemon waits for it, too.
    """

    failures: int = 0
    general: Breaker = CLOSED
    cuda: Breaker = CLOSED
    restarts: Times = ()
    ooms: Times = ()
    error: str | None = None
    due: float | None = None

    @property
    def breakers(self) -> dict[str, Breaker]:
        return {"general": self.general, "cuda": self.cuda}

    @property
    def circuit(self) -> Circuit:
        """Of both breakers together: open when one of them is."""
        found = {b.circuit for b in self.breakers.values()}
        return next((circuit for circuit in (Circuit.OPEN, Circuit.HALF_OPEN) if circuit in found), Circuit.CLOSED)

    @property
    def open_until(self) -> float | None:
        """Before that nothing starts by itself; None while no breaker is open."""
        times = [b.open_until for b in self.breakers.values() if b.circuit is Circuit.OPEN and b.open_until is not None]
        return max(times, default=None)

    # --- what happens ---

    def classified(self, crash: CrashClass, now: float) -> tuple[FailureHistory, CrashClass]:
        """With this crash among those that ran out of memory, if it did; OOM_STORM is what too many of them are."""
        if not crash.memory:
            return self, crash
        ooms = restart_limit.within((*self.ooms, now), now, OOM_STORM_WINDOW_MS)[-OOM_STORM:]
        return replace(self, ooms=ooms), CrashClass.OOM_STORM if len(ooms) == OOM_STORM else crash

    def failed(self, now: float, p: Policy, crash: CrashClass | None, error: str, *, storm: bool = False) -> FailureHistory:
        """After one more failure. ``crash`` None: the start never came as far as a process. That no breaker counts, but a trial
        has failed by it. ``storm``: it opens the breaker, however many failures there were.
        """
        general = breaker.failed(self.general, now, p.breaker, counts=crash is not None and not crash.cuda)
        cuda = breaker.failed(self.cuda, now, p.breaker, counts=crash is not None and crash.cuda)
        if storm and general.circuit is Circuit.CLOSED:
            general = breaker.opened(general, now, p.breaker)
        failures = min(self.failures + 1, breaker.MAX_FAILURES)
        return replace(self, failures=failures, general=general, cuda=cuda, error=error[:MAX_ERROR_CHARS])

    def started(self, now: float, p: Policy, *, again: bool) -> FailureHistory:
        """A launch begins; ``again``: it is a restart. What was open is half-open from now on."""
        restarts = restart_limit.added(self.restarts, now, p.restart_limit) if again else self.restarts
        general, cuda = breaker.tried(self.general, now), breaker.tried(self.cuda, now)
        return replace(self, general=general, cuda=cuda, restarts=restarts, due=None)

    # --- what is forgotten ---

    def _memories(self, p: Policy) -> tuple[tuple[bool, int, dict[str, Any]], ...]:
        """For each of the three knobs: is there anything to forget, after how long a stable run, and what then holds."""
        return (
            ((self.general, self.cuda) != (CLOSED, CLOSED), p.breaker.close_after_ms, {"general": CLOSED, "cuda": CLOSED}),
            (self.failures > 0, p.backoff.reset_after_ms, {"failures": 0}),
            (bool(self.restarts or self.ooms), p.restart_limit.reset_after_ms, {"restarts": (), "ooms": ()}),
        )

    def stable(self, ready_since: float, now: float, p: Policy) -> FailureHistory:
        """What is left of it after the engine was ready for so long."""
        changes: dict[str, Any] = {}
        for known, after_ms, forgotten in self._memories(p):
            if known and now >= ready_since + after_ms / 1000:
                changes |= forgotten
        return replace(self, **changes) if changes else self

    def next_forgotten_at(self, ready_since: float, p: Policy) -> float | None:
        """When ``stable`` will change something."""
        return min((ready_since + after_ms / 1000 for known, after_ms, _ in self._memories(p) if known), default=None)


NOTHING_FAILED = FailureHistory()

# --- as it is stored ------------------------------------------------------------------------------------------------


def to_stored(h: FailureHistory, boot_id: str) -> dict[str, Any] | None:
    """As JSON-able data; None when there is nothing to remember."""
    if h == NOTHING_FAILED:
        return None
    breakers = {
        name: {"failures": b.failures, "opened": b.opened, "open_until": b.open_until, "trial": b.trial}
        for name, b in h.breakers.items() if b != CLOSED
    }  # fmt: skip
    return {
        "boot_id": boot_id, "failures": h.failures, "restarts": [round(t, 3) for t in h.restarts],
        "ooms": [round(t, 3) for t in h.ooms], "error": h.error, "due": h.due, **breakers,
    }  # fmt: skip


def from_stored(raw: Mapping[str, Any], boot_id: str) -> FailureHistory:
    """Of another ``boot_id`` only the sentence is left.

    The monotonic clock begins anew with each boot, so its times mean nothing any more; and a reboot cures much of what
    makes engines fail. Within a boot it goes on while no daemon runs, and remaining times are right. What is unknown or
    mistyped is left out. A start that was let through ended with its daemon: the breaker is open as it was before.
    """
    text = raw.get("error")
    error = text[:MAX_ERROR_CHARS] if isinstance(text, str) else None
    if raw.get("boot_id") != boot_id:
        return FailureHistory(error=error)
    return FailureHistory(
        failures=_count(raw.get("failures")), general=_breaker(raw.get("general")), cuda=_breaker(raw.get("cuda")),
        restarts=_times(raw.get("restarts")), ooms=_times(raw.get("ooms")), error=error, due=_time(raw.get("due")),
    )  # fmt: skip


def _breaker(raw: object) -> Breaker:
    if not isinstance(raw, Mapping):
        return CLOSED
    until = _time(raw.get("open_until"))
    opened = 0 if until is None else max(_count(raw.get("opened")), 1)
    return Breaker(_count(raw.get("failures")), opened, until)


def _times(raw: object) -> Times:
    return tuple(sorted(t for t in map(_time, raw[-MAX_TIMES:]) if t is not None)) if isinstance(raw, list) else ()


def _time(raw: object) -> float | None:
    return float(raw) if isinstance(raw, int | float) and not isinstance(raw, bool) and 0 <= raw < MAX_S else None


def _count(raw: object) -> int:
    return min(raw, breaker.MAX_FAILURES) if isinstance(raw, int) and not isinstance(raw, bool) and raw > 0 else 0
