"""How much per second, from the differences of the gateway's counters. Pure: text and times in, numbers out."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise

NO_POOL = "none"
"""The ``pool_id`` of requests that got no pool."""
WINDOW_S = 10.0
_SAMPLE = re.compile(r"(\w+)\{(.*)\} ([-+.\w]+)", re.ASCII)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"', re.ASCII)
_ESCAPE = re.compile(r"\\(.)")
_FIELDS = {
    "tasks_started_total": "started", "gateway_requests_total": "answered", "tokens_out_total": "tokens_out",
    "latency_first_token_ms_sum": "first_sum_ms", "latency_first_token_ms_count": "first_count",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Counters:
    """Of one pool, since its gateway began."""

    started: float = 0.0
    answered: float = 0.0
    tokens_out: float = 0.0
    first_sum_ms: float = 0.0
    first_count: float = 0.0

    def plus(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counters)))

    def since(self, before: Counters) -> Counters:
        """What came in between. Where one is less than it was, all began again at 0."""
        came = Counters(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(Counters)))
        return self if any(getattr(came, f.name) < 0 for f in fields(Counters)) else came


Sample = Mapping[str, Counters]
_NOTHING = Counters()


@dataclass(frozen=True, slots=True)
class Rate:
    """Of one pool, over the last seconds. ``first_token_ms``: the mean of those that came meanwhile."""

    requests_per_s: float
    tokens_per_s: float
    first_token_ms: float | None


def read(text: str) -> dict[str, Counters]:
    """The counters in a page of Prometheus text, by pool. What is not understood is left out."""
    found: dict[str, Counters] = {}
    for line in text.split("\n"):
        sample = _SAMPLE.fullmatch(line)
        field = sample and _FIELDS.get(sample[1])
        if not sample or not field:
            continue
        labels = {name: _ESCAPE.sub(_unescaped, value) for name, value in _LABEL.findall(sample[2])}
        value = _number(sample[3])
        if value is not None and (pool_id := labels.get("pool_id")) is not None:
            found[pool_id] = found.get(pool_id, _NOTHING).plus(Counters(**{field: value}))
    return found


def in_flight(sample: Sample) -> int:
    """Requests that have a slot and no end yet. Of a request that changed its pool one has counted the start, one the end."""
    started, answered = sum(c.started for c in sample.values()), sum(c.answered for name, c in sample.items() if name != NO_POOL)
    return max(0, round(started - answered))


class Window:
    """The samples of the last seconds."""

    def __init__(self, length_s: float = WINDOW_S) -> None:
        self._length_s = length_s
        self._samples: deque[tuple[float, Sample]] = deque()

    def add(self, at: float, sample: Sample) -> None:
        """``at``: monotonic seconds. What is older than the window is left out, but for the newest of it."""
        self._samples.append((at, sample))
        while len(self._samples) > 2 and self._samples[1][0] <= at - self._length_s:
            self._samples.popleft()

    def rates(self) -> dict[str, Rate]:
        """By pool; nothing until there are two samples."""
        if len(self._samples) < 2 or (span := self._samples[-1][0] - self._samples[0][0]) <= 0:
            return {}
        return {pool_id: _rate(self._came(pool_id), span) for pool_id in self._samples[-1][1]}

    def _came(self, pool_id: str) -> Counters:
        came = _NOTHING
        for (_, before), (_, after) in pairwise(self._samples):
            came = came.plus(after.get(pool_id, _NOTHING).since(before.get(pool_id, _NOTHING)))
        return came


def _rate(came: Counters, span: float) -> Rate:
    first = came.first_sum_ms / came.first_count if came.first_count else None
    return Rate(came.answered / span, came.tokens_out / span, first)


def _unescaped(found: re.Match[str]) -> str:
    return "\n" if found[1] == "n" else found[1]


def _number(text: str) -> float | None:
    """A counter's value; None for what is none, or not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < 1e18 else None
