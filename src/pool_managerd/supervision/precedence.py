"""Who goes first where several want to change a pool: what takes several steps has others wait, or refuses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import AnyEngine
from pool_managerd.core.lifecycle.events import Event
from pool_managerd.supervision.pool import Pool


@dataclass(frozen=True, slots=True)
class Wanted:
    """Something under way needs ``config`` or ``engine``, for the pool to run or to go back to; ``why`` is what the pool does."""

    pool_id: str
    why: str
    config: PoolConfig | None
    engine: AnyEngine | None = None


class Precedence(Protocol):
    """Asked before each change. ``has`` is asked again when it is its turn: something may have begun in between."""

    def has(self, pool_id: str) -> bool: ...
    def tries(self, pool_id: str) -> bool:
        """What is up in the pool's place is not known to stay."""
        ...

    def defers(self, pool_id: str, event: Event) -> bool:
        """``event`` is accepted, and has to wait for long."""
        ...

    async def wait(self, pool: Pool, event: Event) -> None:
        """Return when ``event`` may go ahead. Raises RequestError when it may not."""
        ...


class Nobody:
    """No pool is changed in several steps."""

    def has(self, pool_id: str) -> bool:
        return False

    def tries(self, pool_id: str) -> bool:
        return False

    def defers(self, pool_id: str, event: Event) -> bool:
        return False

    async def wait(self, pool: Pool, event: Event) -> None: ...
