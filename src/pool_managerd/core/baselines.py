"""Smoothed measurements per (engine_version, model_id, device_mask), bounded in number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ALPHA = 0.3
LIMIT = 256

Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Baseline:
    """Exponentially weighted averages; ``samples`` says how much they rest on."""

    first_token_ms: float
    tokens_per_s: float
    samples: int = 1


class Baselines:
    """The newest ``limit`` keys; the one longest unused goes first."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._known: OrderedDict[Key, Baseline] = OrderedDict()

    def observe(self, key: Key, first_token_ms: float, tokens_per_s: float) -> Baseline:
        """Fold one measurement in; the first one counts in full."""
        old = self._known.pop(key, None)
        new = Baseline(first_token_ms, tokens_per_s)
        if old is not None:
            new = Baseline(
                old.first_token_ms + ALPHA * (first_token_ms - old.first_token_ms),
                old.tokens_per_s + ALPHA * (tokens_per_s - old.tokens_per_s),
                old.samples + 1,
            )
        self._known[key] = new
        while len(self._known) > self._limit:
            self._known.popitem(last=False)
        return new

    def copy(self) -> Baselines:
        """As they are now."""
        copied = Baselines(self._limit)
        copied._known = OrderedDict(self._known)
        return copied

    def relax(self, key: Key, first_token_ms: float, tokens_per_s: float) -> None:
        """It is this slow at the moment: a machine that does other things as well is not held against who is measured next."""
        if (known := self._known.get(key)) is not None:
            slow = Baseline(max(known.first_token_ms, first_token_ms), min(known.tokens_per_s, tokens_per_s), known.samples)
            self._known[key] = slow

    def get(self, key: Key) -> Baseline | None:
        return self._known.get(key)

    def to_rows(self) -> list[list[Any]]:
        """JSON-able, the one longest unused first; ``restore`` reads them back."""
        return [[*key, found.first_token_ms, found.tokens_per_s, found.samples] for key, found in self._known.items()]

    def restore(self, rows: Iterable[Any]) -> None:
        """What an earlier daemon measured; a row that is none is left out."""
        for row in rows:
            if not (isinstance(row, list) and len(row) == 6 and all(isinstance(name, str) for name in row[:3])):
                continue
            if all(type(number) in (int, float) and number >= 0 for number in row[3:]):
                self._known[row[0], row[1], row[2]] = Baseline(float(row[3]), float(row[4]), int(row[5]))
