"""Which pools may be loaded at the same time, where a person and not the memory decides."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated

from pydantic import Field, model_validator

from pool_managerd.config.values import POOL_ID_PATTERN, Section
from pool_managerd.core.demand.together import Group, Together

PoolIds = Annotated[tuple[Annotated[str, Field(pattern=POOL_ID_PATTERN)], ...], Field(min_length=1)]
_MAX_SETS = 4096


class GroupConfig(Section):
    """Pools that share rules on what is loaded beside them."""

    id: Annotated[str, Field(min_length=1, max_length=63)] = Field(description="Its name, for messages.", examples=["large"])
    pools: PoolIds = Field(description="Its pools, each of which is in no other group.", examples=[["chat", "code"]])
    swap: bool = Field(True, description="One of them is loaded at a time.")
    exclusive: bool = Field(False, description="When one of them loads, every pool that is not of the group goes.")
    persistent: bool = Field(False, description="They do not go for the pools of exclusive groups.")


class TogetherConfig(Section):
    """Which pools may be loaded at the same time, above what fits; without rules memory alone decides. Not for external pools."""

    groups: tuple[GroupConfig, ...] = Field(
        (), description="Groups of pools; what is in no group is free.", examples=[[{"id": "large", "pools": ["chat", "code"]}]]
    )
    sets: Annotated[tuple[PoolIds, ...], Field(max_length=_MAX_SETS)] = Field(
        (),
        description="Instead of groups: pools that may be loaded together, or some of them; a pool of no set is loaded alone.",
        examples=[[["chat", "embed"], ["code", "embed"]]],
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> TogetherConfig:
        if self.groups and self.sets:
            raise ValueError("cannot have groups and sets: write what may be together as one of them")
        seen: dict[str, str] = {}
        ids: set[str] = set()
        for group in self.groups:
            if group.id in ids:
                raise ValueError(f"duplicate group id {group.id!r}: every group needs its own")
            ids.add(group.id)
            for name in group.pools:
                if (other := seen.setdefault(name, group.id)) != group.id:
                    raise ValueError(f"pool {name!r} is in the groups {other!r} and {group.id!r}: a pool is in one")
        return self

    @property
    def rules(self) -> Together:
        """As they are gone by."""
        groups = (Group(one.id, frozenset(one.pools), one.swap, one.exclusive, one.persistent) for one in self.groups)
        return Together(tuple(groups), tuple(map(frozenset, self.sets)))

    @property
    def named(self) -> list[str]:
        """Every pool that a rule names."""
        return list(dict.fromkeys(name for one in (*(group.pools for group in self.groups), *self.sets) for name in one))

    def check(self, managed: set[str], external: set[str], preloaded: list[str]) -> None:
        """Raises ValueError for pools that are not there, that somebody else runs, or that cannot all start with the daemon."""
        for name in self.named:
            if name in external:
                raise ValueError(f"together names pool {name!r}, which is external: it is loaded when somebody else says so")
            if name not in managed:
                raise ValueError(f"together names pool {name!r}, which is no pool of this file")
        rules = self.rules
        for one, other in combinations(preloaded, 2):
            if rules.never(one, other):
                raise ValueError(f"pools {one!r} and {other!r} are kept apart by together: set `preload: false` on one of them")
