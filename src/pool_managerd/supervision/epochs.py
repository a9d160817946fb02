"""The epochs of launches, kept in the state so that they never go back (core/epochs.py has the rule)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pool_managerd.core.epochs import EpochLimits
from pool_managerd.supervision.protocols import Facts

KIND = "epoch"
FLOOR = "*"
"""The key of the node's floor; no pool can have it as its id."""


class Epochs:
    """``first`` when a pool's record is made, ``reserve`` before each launch, ``forget`` when the pool is gone."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._known = EpochLimits()

    def restore(self) -> None:
        """What earlier daemons reserved, once the state is open."""
        limits = {key: _limit(value) for key, value in self._facts.facts(KIND).items()}
        self._known = EpochLimits(limits, limits.pop(FLOOR, 0))

    def first(self, pool_id: str) -> int:
        """Where a new record of the pool begins: above it no epoch of the pool was used."""
        return self._known.first(pool_id)

    async def reserve(self, pool_id: str, epoch: int) -> None:
        """Durable when this returns, which most calls do without a write. Raises NodeError when the state cannot be written."""
        if (limit := self._known.wanted(pool_id, epoch)) is not None:
            await self._facts.put_fact(KIND, pool_id, {"limit": limit})
            self._known = self._known.reserved(pool_id, limit)

    async def forget(self, pool_id: str) -> None:
        """The pool is gone; made again, it goes on above its epochs. Raises NodeError; the pool is remembered then."""
        if pool_id not in self._known.limits:
            return
        after = self._known.forgotten(pool_id)
        if after.floor > self._known.floor:  # before the pool's own: in between it must not be lost
            await self._facts.put_fact(KIND, FLOOR, {"limit": after.floor})
        await self._facts.put_fact(KIND, pool_id, None)
        self._known = self._known.forgotten(pool_id)


def _limit(value: Mapping[str, Any]) -> int:
    limit = value.get("limit")
    return limit if isinstance(limit, int) and limit >= 0 else 0
