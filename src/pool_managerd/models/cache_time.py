"""How long the cache has been there, by a time of its own: what it says of the age of a model no clock that jumps can change.

Within a boot it is the kernel's time since then, suspension included. Over a boot it grows by what the wall clock says, a day at
most. What cannot be read begins again where nothing is older than it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from pool_managerd.models.note_file import write_note
from pool_managerd.models.part import boot_id

LONGEST_GAP_S = 86_400.0
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Clocks:
    """Where time is read; a test has others. Seconds."""

    since_boot: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    wall: Callable[[], float] = time.time
    boot: Callable[[], str] = boot_id


class CacheTime:
    """Kept in ``path``. ``floor`` is what it begins with where that cannot be read. Everything blocks."""

    def __init__(self, path: Path, floor: Callable[[], float], clocks: Clocks | None = None) -> None:
        self._path, self._floor, self._clocks = path, floor, clocks or Clocks()

    def now(self) -> float:
        """Seconds; nothing is written."""
        kept, clocks = self._kept(), self._clocks
        if kept is None:
            return self._floor()
        seconds, boot, since_boot, wall = kept
        if boot == clocks.boot():
            return seconds + max(0.0, clocks.since_boot() - since_boot)
        return seconds + min(LONGEST_GAP_S, max(0.0, clocks.wall() - wall))

    def keep(self) -> float:
        """As ``now``, and later boots go on from it. The caller has the catalog's lock. Raises OSError."""
        now, clocks = self.now(), self._clocks
        told = {"seconds": now, "boot": clocks.boot(), "since_boot": clocks.since_boot(), "wall": clocks.wall()}
        write_note(self._path, json.dumps(told))
        return now

    def _kept(self) -> tuple[float, str, float, float] | None:
        try:
            with self._path.open("rb") as file:
                told: dict[str, Any] = json.loads(file.read(_MAX_BYTES))
            seconds, since_boot, wall = (float(told[key]) for key in ("seconds", "since_boot", "wall"))
            return (seconds, str(told["boot"]), since_boot, wall) if isfinite(seconds + since_boot + wall) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None
