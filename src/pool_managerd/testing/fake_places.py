"""A fake of what pools have on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from pool_managerd.core.purge import Freed


class FakePlaces:
    """``stored`` is how many bytes are in which directory of a pool; what was purged is in ``purged``, in order.

    ``seen`` is called before anything is.
    """

    def __init__(self) -> None:
        self.forgotten: list[str] = []
        self.stored: dict[tuple[str, str], int] = {}
        self.purged: list[tuple[str, str]] = []
        self.seen: Callable[[], None] = lambda: None

    async def forget(self, pool_id: str) -> None:
        self.forgotten.append(pool_id)

    async def forget_others(self, pool_ids: Iterable[str]) -> None:
        """There is nothing of anybody else's."""

    async def measure(self, pool_id: str, places: Collection[str]) -> list[Freed]:
        return [Freed(f"/run/{place}/{pool_id}", size) for (owner, place), size in self.stored.items()
                if owner == pool_id and place in places]  # fmt: skip

    async def purge(self, pool_id: str, places: Collection[str]) -> list[Freed]:
        self.seen()
        found = await self.measure(pool_id, places)
        for place in places:
            if self.stored.pop((pool_id, place), None) is not None:
                self.purged.append((pool_id, place))
        return found
