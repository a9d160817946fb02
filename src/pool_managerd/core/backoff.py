"""How long to wait before an engine is started again. Functions of numbers; no clock, no random numbers.

Jitter comes from a hash of (seed, attempt), so the same pool on the same node always waits the same time, while a
thousand pools that fall together do not come back together (ORCH-3038, SPEC §8.2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from pool_managerd.core.crash import CrashClass

MAX_EXPONENT = 10
"""Beyond this many doublings the delay stops growing whatever ``max_ms`` says."""


@dataclass(frozen=True, slots=True)
class BackoffRules:
    """The numbers of ``supervision.backoff``; all delays in milliseconds. ``multipliers`` are by the class of the crash."""

    initial_ms: int = 1_000
    max_ms: int = 60_000
    factor: float = 2.0
    jitter: float = 0.1
    min_delay_ms: int = 500
    cuda_multiplier: float = 2.0
    reset_after_ms: int = 300_000
    multipliers: Mapping[CrashClass, float] = field(default_factory=dict)

    def multiplier(self, crash: CrashClass) -> float:
        """How much longer than others the delay after such a crash is."""
        return self.multipliers.get(crash, self.cuda_multiplier if crash.cuda else 1.0)


def delay_ms(rules: BackoffRules, attempt: int, *, seed: str, multiplier: float = 1.0) -> int:
    """Milliseconds to wait before start number ``attempt`` after a failure (1 is the first).

    ``max_ms`` bounds the result after jitter and ``multiplier``; ``min_delay_ms`` is its floor.
    """
    exponent = min(max(attempt, 1) - 1, MAX_EXPONENT)
    base = min(rules.initial_ms * rules.factor**exponent * multiplier, rules.max_ms)
    jittered = base * (1 + rules.jitter * _spread(f"{seed}:{attempt}"))
    return int(max(min(jittered, rules.max_ms), rules.min_delay_ms))


def _spread(text: str) -> float:
    """A number in [-1, 1] that depends on ``text`` alone."""
    word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return word / (2**64 - 1) * 2 - 1


class BackoffPolicy:
    """The seeds' stateful form: ``next_delay()`` grows, ``reset()`` starts over.

    >>> policy = BackoffPolicy(1_000, 60_000, jitter_factor=0.0)
    >>> [policy.next_delay() for _ in range(3)]
    [1000, 2000, 4000]
    """

    def __init__(self, initial_ms: int, max_ms: int, jitter_factor: float = 0.1, *, seed: str = "") -> None:
        if initial_ms < 0 or max_ms < 0 or not 0 <= jitter_factor <= 1:
            raise ValueError("cannot use a negative delay or a jitter factor outside 0..1")
        self._rules = BackoffRules(initial_ms=initial_ms, max_ms=max_ms, jitter=jitter_factor, min_delay_ms=0)
        self._seed = seed
        self._attempt = 0

    def next_delay(self) -> int:
        """The next delay in milliseconds."""
        self._attempt += 1
        return delay_ms(self._rules, self._attempt, seed=self._seed)

    def reset(self) -> None:
        """Forget past failures: the next delay is the first one again."""
        self._attempt = 0
