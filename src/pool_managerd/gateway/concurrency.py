"""How many requests each pool has at the gateway, those that wait counted, and which may have one more."""

from __future__ import annotations

import math
from collections.abc import Collection

from pool_managerd.errors import RequestError
from pool_managerd.gateway.directory import Directory
from pool_managerd.gateway.tally import Tally

_PREFIX = "\0pool/"
"""No key's name begins so."""


class Counted:
    """Of one request, which is counted until it is ``over``: by the pool that serves it, or while it waits by one that may."""

    def __init__(self, concurrency: Concurrency, model: str, pool_id: str) -> None:
        self._concurrency, self._model, self.pool_id = concurrency, model, pool_id

    def pools(self) -> tuple[str, ...]:
        """Those of its model that may serve it now."""
        pools = self._concurrency.directory.pools(self._model)
        return tuple(one for one in pools if one == self.pool_id or self._concurrency.room(one) > 0) or pools

    def one_only(self) -> bool:
        """It is to wait for the pool that it is counted by: another one has slots for more requests than it may have."""
        directory = self._concurrency.directory
        places = [directory.place(pool_id) for pool_id in directory.pools(self._model)]
        return any(place is not None and place.slots > directory.limits.get(place.pool_id, math.inf) for place in places)

    def goes_to(self, pool_id: str) -> None:
        """It has a slot there, or asks for one."""
        if pool_id != self.pool_id:
            self._concurrency.begin(pool_id, math.inf)
            self.over()
            self.pool_id = pool_id

    def over(self) -> None:
        self._concurrency.end(self.pool_id)


class Concurrency:
    """``pools[].requests.concurrency``: the pool's limit, under whichever of its names it is asked for. A name that several pools
    have is refused where all of them are full.
    """

    def __init__(self, directory: Directory, tally: Tally) -> None:
        self.directory, self._tally = directory, tally

    def here(self, pool_id: str) -> int:
        """How many it has now, at all workers."""
        return self._tally.at_work(_PREFIX + pool_id)

    def begin(self, pool_id: str, most: float) -> bool:
        """One more; False where it has so many already."""
        return self._tally.begin(_PREFIX + pool_id, most)

    def end(self, pool_id: str) -> None:
        self._tally.end(_PREFIX + pool_id)

    def room(self, pool_id: str) -> float:
        """For how many more requests."""
        return self._most(pool_id) - self.here(pool_id)

    def _most(self, pool_id: str) -> float:
        return self.directory.limits.get(pool_id, math.inf)

    def counted(self, model: str, sound: Collection[str]) -> Counted:
        """At the pool that can serve it first, of those that are ``sound`` where it can be. Raises RequestError MODEL_NOT_FOUND,
        CONCURRENCY_LIMIT (429).
        """
        pools = self.directory.pools(model)
        if len(pools) > 1:
            pools = tuple(sorted(pools, key=lambda pool_id: (pool_id in sound, *self._readiness(pool_id)), reverse=True))
        for pool_id in pools:
            if self.begin(pool_id, self._most(pool_id)):
                return Counted(self, model, pool_id)
        most = sum(self.directory.limits[pool_id] for pool_id in pools)
        raise RequestError(
            f"cannot take more than {most} requests for {model[:80]!r} at once, those that wait counted",
            code="CONCURRENCY_LIMIT", status=429, retriable=True, retry_after_ms=1000,
        )  # fmt: skip

    def _readiness(self, pool_id: str) -> tuple[bool, float]:
        """Whether it is there, and how many slots it has left, as far as is known here."""
        place = self.directory.place(pool_id)
        if place is None:
            return False, 0
        return place.open, min(place.slots, self._most(pool_id)) - self.here(pool_id)
