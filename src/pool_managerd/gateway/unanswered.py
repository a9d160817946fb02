"""What the node may have given to a question whose answer was lost with the connection: nobody here has heard of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pool_managerd.core.demand.kept_leases import HeldLease
from pool_managerd.errors import PoolError
from pool_managerd.gateway.link import Link, UnansweredError

_BEHIND = "~"


def asked_for(name: str) -> str:
    """For whom it was asked under ``name``."""
    return name.partition(_BEHIND)[0]


class Unanswered:
    """Questions for a slot that were asked and not answered. What was given for one is of no use to anybody, and would keep its
    slot until it runs out; it is known by the name that the question was asked under, which no other one has at that time.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._asking: set[str] = set()
        self._lost: set[str] = set()
        self._news = asyncio.Event()

    @contextmanager
    def asking(self, holder: str) -> Iterator[str]:
        """Around one question for ``holder``: the name that it goes by."""
        name, tries = holder, 1
        while name in self._asking or name in self._lost:
            tries += 1
            name = f"{holder}{_BEHIND}{tries}"
        self._asking.add(name)
        try:
            yield name
        except UnansweredError:
            self._lost.add(name)
            self._news.set()
            raise
        finally:
            self._asking.remove(name)

    async def found(self) -> list[HeldLease]:
        """What was given for them and may be of no use; the next ones are waited for. None while the node is away."""
        await self._news.wait()
        self._news.clear()
        names = frozenset(self._lost)
        with suppress(PoolError):
            leases = await self._link.held_by(names.__contains__)
            self._lost -= names
            return leases
        return []

    def node_is_back(self) -> None:
        """It can be asked again."""
        if self._lost:
            self._news.set()
