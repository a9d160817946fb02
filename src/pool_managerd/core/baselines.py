"""What engines were measured to do, per (engine_version, model_id, device_mask), and what they were measured with.

Warm-ups are smoothed, and compared with warm-ups alone: a few tokens of a short prompt tell little of how fast an engine is.
What a bench has measured stands beside them: nothing is folded into it, and the newest one counts, unless its requests were
shorter than those of the one before: a few tokens of a short prompt tell little in a bench, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

ALPHA = 0.3
LIMIT = 256
AS_LONG = 0.9
"""So much of another's length is as long: engines count prompts in tokens of their own, and may end an answer early."""
WARMUP = "warm-up"
"""What earlier versions measured with, as far as they wrote it down."""

Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Baseline:
    """``samples`` says how much it rests on: warm-ups, exponentially weighted, or the runs of one bench.

    ``measured_with`` says what was asked, ``measured_at_ms`` (unix) when the newest of it was, None where that was not written
    down. ``figures`` are all that a bench has found, None of a warm-up.
    """

    first_token_ms: float
    tokens_per_s: float
    samples: int = 1
    measured_with: str = WARMUP
    measured_at_ms: int | None = None
    figures: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        """``bench`` or ``warm-up``."""
        return WARMUP if self.figures is None else "bench"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data; a bench with its ``figures``."""
        shown = {
            "first_token_ms": round(self.first_token_ms, 1), "tokens_per_s": round(self.tokens_per_s, 2), "kind": self.kind,
            "measured_with": self.measured_with, "measured_at_ms": self.measured_at_ms, "samples": self.samples,
        }  # fmt: skip
        return shown if self.figures is None else {**shown, "figures": dict(self.figures)}


class Baselines:
    """The newest ``limit`` keys of each kind; the one longest unused goes first."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._known: OrderedDict[Key, Baseline] = OrderedDict()
        self._benches: OrderedDict[Key, Baseline] = OrderedDict()

    def observe(
        self, key: Key, first_token_ms: float, tokens_per_s: float, measured_with: str = WARMUP, at_ms: int | None = None
    ) -> Baseline:
        """Fold one warm-up in; the first one counts in full, and so does the first that asks for something else."""
        old = self._known.pop(key, None)
        new = Baseline(first_token_ms, tokens_per_s, 1, measured_with, at_ms)
        if old is not None and old.measured_with in (measured_with, WARMUP):
            new = Baseline(
                old.first_token_ms + ALPHA * (first_token_ms - old.first_token_ms),
                old.tokens_per_s + ALPHA * (tokens_per_s - old.tokens_per_s),
                old.samples + 1, measured_with, at_ms,
            )  # fmt: skip
        self._put(self._known, key, new)
        return new

    def note_bench(self, key: Key, bench: Baseline) -> Baseline:
        """What was measured on purpose, with its ``figures``. It takes the place of an earlier one with no longer requests; the
        one that counts then.
        """
        before = self._benches.pop(key, None)
        counts = bench if before is None or _as_long(bench, before) else before
        self._put(self._benches, key, counts)
        return counts

    def _put(self, kept: OrderedDict[Key, Baseline], key: Key, new: Baseline) -> None:
        kept[key] = new
        while len(kept) > self._limit:
            kept.popitem(last=False)

    def copy(self) -> Baselines:
        """As they are now."""
        copied = Baselines(self._limit)
        copied._known, copied._benches = OrderedDict(self._known), OrderedDict(self._benches)
        return copied

    def relax(self, key: Key, first_token_ms: float, tokens_per_s: float) -> None:
        """It is this slow at the moment: a machine that does other things as well is not held against who is measured next."""
        if (known := self._known.get(key)) is not None:
            slow = replace(
                known, first_token_ms=max(known.first_token_ms, first_token_ms),
                tokens_per_s=min(known.tokens_per_s, tokens_per_s),
            )  # fmt: skip
            self._known[key] = slow

    def get(self, key: Key) -> Baseline | None:
        """Its warm-ups, which the next warm-up is compared with; None where there was none."""
        return self._known.get(key)

    def all_of(self, key: Key) -> tuple[Baseline, ...]:
        """What tells most first: its bench, then its warm-ups."""
        return tuple(found for kept in (self._benches, self._known) if (found := kept.get(key)) is not None)

    def to_rows(self) -> list[list[Any]]:
        """JSON-able, of each kind the one longest unused first; ``restore`` reads them back."""
        pairs = [*self._known.items(), *self._benches.items()]
        return [
            [*key, b.first_token_ms, b.tokens_per_s, b.samples, b.measured_with, b.measured_at_ms,
             *(() if b.figures is None else (dict(b.figures),))]
            for key, b in pairs
        ]  # fmt: skip

    def restore(self, rows: Iterable[Any]) -> None:
        """What an earlier daemon measured; a row that is none is left out; one of six is an earlier version's warm-ups."""
        for row in rows:
            if (read := _read(row)) is not None:
                key, found = read
                (self._known if found.figures is None else self._benches)[key] = found


def _as_long(bench: Baseline, other: Baseline) -> bool:
    """In tokens that are made and in those of the prompt; runs do not count: a slow engine is asked less often."""
    new, old = bench.figures or {}, other.figures or {}
    return all((new.get(key) or 0) >= AS_LONG * (old.get(key) or 0) for key in ("tokens", "prompt_tokens"))


def _read(row: Any) -> tuple[Key, Baseline] | None:
    """The inverse of a row of ``to_rows``; None for what is none."""
    if not (isinstance(row, list) and len(row) in (6, 8, 9) and all(isinstance(name, str) for name in row[:3])):
        return None
    numbers, more = row[3:6], [*row[6:], None, None, None]
    if not all(type(number) in (int, float) and number >= 0 for number in numbers):
        return None
    measured_with, at_ms, figures = more[:3] if len(row) > 6 else (WARMUP, None, None)
    fits = isinstance(measured_with, str) and (at_ms is None or type(at_ms) is int) and isinstance(figures, dict | None)
    if not fits or (len(row) == 9 and figures is None):
        return None
    found = Baseline(float(numbers[0]), float(numbers[1]), int(numbers[2]), measured_with, at_ms, figures)
    return (row[0], row[1], row[2]), found
