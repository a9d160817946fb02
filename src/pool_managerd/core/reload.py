"""Replacing what a pool runs, or leaving it as it was (OC-CTRL-2003, ORCH-3031): the rules, without doing any of it.

A reload goes through these stages, and what it has done by then is undone in each of them:

1. ``staging``: the new model is there and verified, nothing stands in the way of a start. The engine before it serves.
2. Where there is room for both, ``loading``: the new one comes up beside the one before it, which serves. Else
   ``draining``: no new leases; those in flight end, or the reload is given up and the engine serves on; and then
   ``switching``: the engine before it has ended, the new one loads, or ``loading`` where it sleeps meanwhile.
3. ``gating``: the new one is ready and shows what it must.
4. ``committing``: that it stays is written down; what cannot be written does not stay.
5. ``undoing``: it did not; the one before it is started again, or has never stopped.

Where both ran, leases are given on the new one alone from the commit on, and the one before it ends with its last lease.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.baselines import Baseline
from pool_managerd.core.drain import MAX_DEADLINE_MS
from pool_managerd.core.narration import duration
from pool_managerd.errors import SpecError

SAMPLES = 8
TRIES = 3
"""A measurement on a machine that does other things as well says how slow an engine can be: the best of so many counts."""
UNNOTICED_MS = 50


class Strategy(StrEnum):
    """How one engine takes another's place."""

    BLUE_GREEN = "blue_green"
    """The new one loads and is tried beside the old one; nobody is refused and no request fails."""
    SLEEP_OLD = "sleep_old"
    """The old one gives its GPU memory back and keeps its process while the new one loads: it wakes sooner than it starts."""
    STOP_START = "stop_start"
    """The old one ends before the new one loads: for want of room for both, and where nothing else is known to work."""


class Stage(StrEnum):
    """How far a reload is, as the status shows it."""

    STAGING = "staging"
    LOADING = "loading"
    DRAINING = "draining"
    SWITCHING = "switching"
    GATING = "gating"
    COMMITTING = "committing"
    UNDOING = "undoing"


@dataclass(frozen=True, slots=True)
class ReloadRequest:
    """What ``pool_id`` is to run: another model, other keys of its configuration, or an ``engine`` in a submitted one's place.

    ``drain_deadline_ms`` is how long leases may take to end; when it passes the reload is given up, and the engine serves on.
    ``key`` is the caller's own name for the request: sent again, it is the same reload. ``reset``: what earlier reloads have
    changed does not hold any more. Raises SpecError for what asks for nothing, or for two things at once.
    """

    pool_id: str
    new_model_ref: str | None = None
    changes: Mapping[str, Any] | None = None
    engine: PreparedEngine | None = None
    drain_deadline_ms: int | None = None
    strategy: str | None = None
    key: str | None = None
    reset: bool = False

    def __post_init__(self) -> None:
        changes = self.new_model_ref is not None or self.changes is not None or self.reset
        if not changes and self.engine is None:
            raise self._wrong("it asks for nothing", "give new_model_ref, changes, reset or engine")
        if self.engine is not None and changes:
            raise self._wrong("an engine runs as it is", "leave new_model_ref, changes and reset out, or engine")
        deadline_ms = self.drain_deadline_ms
        if deadline_ms is not None and not 0 <= deadline_ms <= MAX_DEADLINE_MS:
            raise self._wrong(f"drain_deadline_ms is {deadline_ms}", f"it must be from 0 to {MAX_DEADLINE_MS} (24 h)")
        if self.strategy is not None and self.strategy not in list(Strategy):
            raise self._wrong(f"there is no strategy {self.strategy[:40]!r}", f"leave it out, or write {', '.join(Strategy)}")

    def _wrong(self, why: str, hint: str) -> SpecError:
        return SpecError(f"cannot reload pool {self.pool_id}: {why}", pool_id=self.pool_id, hint=hint)

    def named(self) -> str | None:
        """``key`` behind a digest of all else that is asked for; None without a key."""
        if self.key is None:
            return None
        engine = None if self.engine is None else repr(self.engine)
        asked = [self.new_model_ref, self.changes, engine, self.drain_deadline_ms, self.strategy, self.reset]
        return f"{hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]}:{self.key}"

    def all_changes(self) -> dict[str, Any]:
        """``changes``, the new model among them."""
        model = {} if self.new_model_ref is None else {"model": self.new_model_ref}
        return {**(self.changes or {}), **model}


@dataclass(frozen=True, slots=True)
class Forecast:
    """A time in ms as it was measured before, and how far apart the measurements were; None: never measured."""

    ms: int | None
    spread_ms: int | None

    @classmethod
    def of(cls, *parts: Sequence[float]) -> Forecast:
        """The sum of what each part took, in the middle."""
        if not all(parts):
            return cls(None, None)
        spread = sum((max(part) - min(part)) / 2 for part in parts)
        return cls(round(sum(median(part) for part in parts)), round(spread))


def slower(before: Baseline | None, first_token_ms: float, tokens_per_s: float, share: float) -> str | None:
    """What is wrong with a measurement, beside those for the same engine version, model and GPUs; None when nothing is."""
    if before is None:
        return None
    if tokens_per_s < before.tokens_per_s * share:
        return f"it makes {tokens_per_s:.1f} tokens/s where {before.tokens_per_s:.1f} were measured before"
    if first_token_ms * share > before.first_token_ms + UNNOTICED_MS:
        return f"its first token takes {first_token_ms:.0f} ms where {before.first_token_ms:.0f} were measured before"
    return None


def unexpected(answer: str, expected: str | None) -> str | None:
    """What is wrong with an answer to the smoke prompt; None when nothing is."""
    if not answer.strip():
        return "its answer to the smoke prompt is empty"
    if expected is not None and expected.casefold() not in answer.casefold():
        return f"its answer to the smoke prompt lacks {expected!r}: {answer.strip()[:200]!r}"
    return None


def steps(
    pool_id: str, strategy: Strategy, model: str, deadline_ms: int, bake_ms: int, *, serves: bool, vram_wait_s: float = 30.0
) -> tuple[str, ...]:
    """What a reload would do, in order. ``vram_wait_s``: how long memory is waited for that a sleep does not show free."""
    staged = f"make sure of the model {model}, and that nothing stands in the way of a start"
    patience = duration(deadline_ms / 1000)
    tried = f"measure it, and see it stay ready for {duration(bake_ms / 1000)}"
    if strategy is Strategy.BLUE_GREEN:
        return (
            staged,
            "start the new engine beside the old one, which goes on serving, and wait until it is ready",
            f"{tried}; else end it, and nobody has noticed",
            "give new leases on the new one alone, at its own URL",
            f"wait up to {patience} for leases on the old one to end, then stop it",
        )
    drain = f"wait up to {patience} for leases of pool '{pool_id}' to end, none are given meanwhile"
    if strategy is Strategy.SLEEP_OLD:
        return (
            staged, drain,
            "put the engine to sleep, and see on the GPUs that its memory is free: where it is not, the pool is down for up to"
            f" {duration(vram_wait_s)} more (gpu.vram_wait_ms), then the engine wakes and the reload has failed",
            "start the new engine, and wait until it is ready", f"{tried}; else end it, and wake the one before it",
            "stop the engine that sleeps",
        )  # fmt: skip
    return (
        staged,
        *((drain, "stop the engine, and wait until it holds nothing") if serves else ()),
        "start the new engine, and wait until it is ready",
        f"{tried}; else start the one before it again",
    )
