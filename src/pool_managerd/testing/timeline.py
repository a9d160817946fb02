"""What happens outside the daemon, in the order of its virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

_Entry = tuple[float, int, Callable[..., object], tuple[Any, ...]]
START_S = 1_000.0
WALL_MS = 1_700_000_000_000


class Timeline:
    """``now`` is a monotonic second. Things of one instant happen in the order in which they were put here."""

    def __init__(self) -> None:
        self.now = START_S
        self._due: list[_Entry] = []
        self._numbers = itertools.count()

    def at(self, when: float, call: Callable[..., object], *args: Any) -> None:
        """Call it at that second, or now if that is over."""
        heapq.heappush(self._due, (max(when, self.now), next(self._numbers), call, args))

    def after(self, seconds: float, call: Callable[..., object], *args: Any) -> None:
        self.at(self.now + seconds, call, *args)

    def next_at(self) -> float | None:
        """When the next thing happens; None for never."""
        return self._due[0][0] if self._due else None

    def happen(self) -> bool:
        """Let the next thing that is due happen; false when none is."""
        if not self._due or self._due[0][0] > self.now:
            return False
        _, _, call, args = heapq.heappop(self._due)
        call(*args)
        return True

    def wall_ms(self) -> int:
        """Unix milliseconds that go with it, from a fixed day on."""
        return WALL_MS + round((self.now - START_S) * 1000)
