"""Which epochs may have been used. An epoch must be above every earlier one of its pool, daemons before this one included.

Rule: before a launch has its epoch, a limit that is not below it is durable; a pool that is not known yet begins at the highest
limit that is. Limits are taken a block at a time, so that most launches need no write, and a restart jumps over the rest of a
block. A pool that is forgotten leaves its limit in the floor of the node: made again, it begins above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

BLOCK = 100


@dataclass(frozen=True, slots=True)
class EpochLimits:
    """``limits`` by pool id and the ``floor`` of all others: no epoch above them was used."""

    limits: Mapping[str, int] = field(default_factory=dict)
    floor: int = 0

    def first(self, pool_id: str) -> int:
        """Where a new record of the pool begins: its first launch has the next epoch."""
        return max(self.limits.get(pool_id, 0), self.floor)

    def wanted(self, pool_id: str, epoch: int) -> int | None:
        """The limit that must be durable before launch ``epoch``; None when one is."""
        return None if epoch <= self.limits.get(pool_id, 0) else epoch + BLOCK - 1

    def reserved(self, pool_id: str, limit: int) -> EpochLimits:
        """With this limit durable; a higher one stays."""
        return replace(self, limits={**self.limits, pool_id: max(limit, self.limits.get(pool_id, 0))})

    def forgotten(self, pool_id: str) -> EpochLimits:
        """Without the pool, its limit in the floor."""
        others = {other: limit for other, limit in self.limits.items() if other != pool_id}
        return EpochLimits(others, self.first(pool_id))
