"""Which pools may be loaded at the same time, by rules that a person wrote: whatever the memory has room for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """``swap``: one of its pools at a time. ``exclusive``: what is not of it goes when one of them loads, but for the pools of
    groups that are ``persistent``.
    """

    group_id: str
    pools: frozenset[str]
    swap: bool = True
    exclusive: bool = False
    persistent: bool = False


@dataclass(frozen=True, slots=True)
class Together:
    """``groups``, or ``sets``: what is loaded is part of one of these, and a pool of none of them is loaded alone."""

    groups: tuple[Group, ...] = ()
    sets: tuple[frozenset[str], ...] = ()

    def ways(self, pool_id: str, loaded: Collection[str]) -> tuple[frozenset[str], ...]:
        """What of ``loaded`` would have to go before the pool may load: one collection for each way to do it, as the rules are
        written; an empty one where nothing has to.
        """
        others = frozenset(loaded) - {pool_id}
        if not self.sets:
            return (self._kept_apart(pool_id, others),)
        found = dict.fromkeys(others - one for one in self.sets if pool_id in one)
        return tuple(found) or (others,)

    def why_apart(self, pool_id: str, other: str) -> str:
        """The rule that keeps ``other``, which is loaded, and the pool apart, for a sentence."""
        if self.sets:
            return "no set of `together.sets` that holds both is free"
        group = self._group_of(pool_id)
        if group is None or other not in group.pools:
            return f"group '{group.group_id if group else pool_id}' is exclusive"
        return f"one pool of group '{group.group_id}' is loaded at a time"

    def _kept_apart(self, pool_id: str, others: frozenset[str]) -> frozenset[str]:
        group = self._group_of(pool_id)
        if group is None:
            return frozenset()
        siblings = others & group.pools if group.swap else frozenset()
        stay = frozenset[str]().union(group.pools, *(one.pools for one in self.groups if one.persistent))
        return siblings | (others - stay if group.exclusive else frozenset())

    def _group_of(self, pool_id: str) -> Group | None:
        return next((one for one in self.groups if pool_id in one.pools), None)

    def never(self, pool_id: str, other: str) -> bool:
        """Whether one of these two would end the other, whichever came first."""
        return all(self.ways(pool_id, [other])) or all(self.ways(other, [pool_id]))


NO_RULES = Together()
