"""The leases that a router holds: in use, or kept a moment for the next request, as a connection is kept alive.

A lease that is kept is a lease to everybody else. So it is given back as soon as somebody waits for a slot or for room, or its
pool takes no new leases: whoever drains or evicts the pool would wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A slot of a pool on launch ``epoch``, whose engine is at ``url``; ``started``: its start was waited for."""

    lease_id: str
    pool_id: str
    url: str
    epoch: int
    started: bool = False


class KeptLeases:
    """``linger_s``: for how long at most one is kept that is not in use. Times are monotonic seconds."""

    def __init__(self, linger_s: float) -> None:
        self.linger_s = linger_s
        self.in_use: dict[str, HeldLease] = {}
        self._idle: dict[str, dict[str, tuple[HeldLease, float]]] = {}
        self._open: dict[str, int] = {}
        self._waiting = True

    def see(self, open_launches: dict[str, int], *, waiting: bool) -> None:
        """What is known of the node: the launch of each pool that may be asked now, and whether ``waiting`` somebody is."""
        self._open, self._waiting = open_launches, waiting

    def add(self, lease: HeldLease) -> None:
        """It was given just now, and is in use."""
        self.in_use[lease.lease_id] = lease

    def take(self, pool_ids: Iterable[str]) -> HeldLease | None:
        """One that is kept, of one of these pools: of the one that is used least from here. None: ask for a new one."""
        choices = [pool_id for pool_id in pool_ids if any(self._usable(lease) for lease, _ in self._kept(pool_id))]
        if not choices:
            return None
        pool_id = min(choices, key=self.used) if len(choices) > 1 else choices[0]
        kept = self._idle[pool_id]
        found = next(lease for lease, _ in reversed(kept.values()) if self._usable(lease))
        del kept[found.lease_id]
        self.in_use[found.lease_id] = found
        return found

    def done(self, lease: HeldLease, now: float) -> bool:
        """Its request has ended. True: it is to be given back at once; False: it is kept, or was given up meanwhile."""
        if self.in_use.pop(lease.lease_id, None) is None:
            return False
        if self._waiting or self.linger_s <= 0 or not self._usable(lease):
            return True
        self._idle.setdefault(lease.pool_id, {})[lease.lease_id] = (lease, now)
        return False

    def forget(self, lease_id: str) -> None:
        """It is over, as its engine is: its request may go on, but there is nothing to give back."""
        self.in_use.pop(lease_id, None)
        for kept in self._idle.values():
            kept.pop(lease_id, None)

    def let_go(self, pool_id: str) -> list[HeldLease]:
        """Those of a pool that are kept, which are to be given back now."""
        return [lease for lease, _ in self._idle.pop(pool_id, {}).values()]

    def due(self, now: float) -> list[HeldLease]:
        """Those that are to be given back now; they are kept no more."""
        found = [
            lease
            for pool_id in list(self._idle)
            for lease, since in self._kept(pool_id)
            if self._waiting or now - since >= self.linger_s or not self._usable(lease)
        ]
        for lease in found:
            del self._idle[lease.pool_id][lease.lease_id]
        return found

    def next_due(self) -> float | None:
        """When one will have been kept for long enough."""
        oldest = min((since for pool_id in self._idle for _, since in self._kept(pool_id)), default=None)
        return None if oldest is None else oldest + self.linger_s

    def all(self) -> list[HeldLease]:
        """Those in use and those that are kept."""
        return [*self.in_use.values(), *(lease for pool_id in self._idle for lease, _ in self._kept(pool_id))]

    def used(self, pool_id: str) -> int:
        """How many of a pool are in use."""
        return sum(lease.pool_id == pool_id for lease in self.in_use.values())

    def _kept(self, pool_id: str) -> Iterator[tuple[HeldLease, float]]:
        return iter(self._idle.get(pool_id, {}).values())

    def _usable(self, lease: HeldLease) -> bool:
        return self._open.get(lease.pool_id) == lease.epoch
