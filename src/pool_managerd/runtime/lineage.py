"""What an engine has started, looked at now and then by its shim, so that it can be told when the shim is lost.

Stdlib only: it runs in the shim. What descends from it comes back to it whatever session, title or environment that
has; once the shim is dead nothing ties them together any more but what it wrote down.
"""

from __future__ import annotations

import time

from pool_managerd.runtime import procfs

MAX_KEPT = 512
_FIRST_SECONDS, _OFTEN_SECONDS, _SELDOM_SECONDS = 0.02, 0.25, 2.0
_YOUNG_SECONDS = 30.0
_SHARE = 50  # a look may cost a fiftieth of the time


class Lineage:
    """The descendants of the shim, its engine left out. The younger the engine, the more often they are looked at."""

    def __init__(self, shim: int, engine: int) -> None:
        self._shim, self._engine = shim, engine
        self._began = self._last = time.monotonic()
        self._gap = _FIRST_SECONDS
        self._seen: dict[int, int] = {}

    def milliseconds_to_look(self) -> float:
        """When the next look is due."""
        return max(0.0, (self._last + self._gap - time.monotonic()) * 1000 + 1)

    def look_again_soon(self) -> None:
        """Things are about to change: the daemon is gone."""
        self._began = time.monotonic()
        self._gap = 0.0

    def look(self) -> list[list[int]] | None:
        """Pid and start ticks of each when there are others than at the last look; None when not, or when none is due."""
        began = time.monotonic()
        if began < self._last + self._gap:
            return None
        found = procfs.descendants(self._shim)
        found.pop(self._engine, None)
        self._last = time.monotonic()
        age = self._last - self._began
        calm = min(_OFTEN_SECONDS, max(_FIRST_SECONDS, age / 4)) if age < _YOUNG_SECONDS else _SELDOM_SECONDS
        self._gap = max(calm, (self._last - began) * _SHARE)
        if found == self._seen:
            return None
        self._seen = found
        return [[pid, ticks] for pid, ticks in list(found.items())[-MAX_KEPT:]]
