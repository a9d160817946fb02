"""Where a pool's engine log stood when: at its launches, and at moments in between. Bounded, and coarser the older it gets.

The log itself is what the engine wrote, without times; this is how ``logs --since`` and ``--previous`` know where to begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

Place = tuple[int, int]
"""A file by its inode, and an offset in it: a rotation renames the file and leaves the place true."""

_NOWHERE: Place = (0, 0)
_KEPT = 64
_GAP_MS = 5_000


def place_of(mark: Mapping[int, int]) -> Place:
    """The end of the log, of the mark that lists its parts, the present one first."""
    return next(iter(mark.items()), _NOWHERE)


class LogPlaces:
    """The places of one pool, oldest first."""

    def __init__(self) -> None:
        self._launches: deque[Place] = deque(maxlen=2)
        self._seen: list[tuple[int, Place]] = []

    def launched(self, wall_ms: int, place: Place) -> None:
        """An engine is about to write behind ``place``."""
        self._launches.append(place)
        self._note(wall_ms, place)

    def seen(self, wall_ms: int, place: Place) -> None:
        """The log ends at ``place`` now; noted when it has grown, and not more often than every few seconds."""
        if not self._seen or (wall_ms - self._seen[-1][0] >= _GAP_MS and place != self._seen[-1][1]):
            self._note(wall_ms, place)

    def since(self, wall_ms: int) -> Place | None:
        """Behind which everything is that was written since then; a little more may be. None: no place is known so early."""
        return next((place for at, place in reversed(self._seen) if at <= wall_ms), None)

    def previous(self) -> tuple[Place, Place] | None:
        """Where the log of the launch before the last one begins and ends."""
        return (self._launches[0], self._launches[1]) if len(self._launches) == 2 else None

    def _note(self, wall_ms: int, place: Place) -> None:
        self._seen.append((wall_ms, place))
        if len(self._seen) > _KEPT:
            del self._seen[1 : _KEPT // 2 : 2]
