"""What the gateway asks of the node, whether that is in this process or behind its control API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Protocol

from pool_managerd.core.demand.kept_leases import HeldLease
from pool_managerd.errors import NodeError


class UnansweredError(NodeError):
    """The node was asked, and the connection broke before the answer: what it has done is not known."""


def held(pool_id: str, rows: Iterable[Mapping[str, Any]], holds: Callable[[str], bool]) -> list[HeldLease]:
    """As ``Link.held_by``, of a pool's leases as the node shows them."""
    return [HeldLease(row["lease_id"], pool_id, "", 0) for row in rows if holds(row["holder"] or "")]


class Link(Protocol):
    """Everything raises PoolError; NodeError NODE_UNAVAILABLE while the node is away."""

    async def __aenter__(self) -> Any: ...
    async def __aexit__(self, *_: object) -> None: ...

    async def acquire(self, model: str, holder: str, ttl_ms: int, wait_ms: int | None = None) -> HeldLease:
        """A slot, waited for. Who goes away while waiting has no lease, and its place in the queue is free. Raises
        UnansweredError, too.
        """
        ...

    async def give_back(self, lease: HeldLease) -> None:
        """That the node knows the lease no more is no error."""
        ...

    async def renew(self, lease: HeldLease, ttl_ms: int) -> bool:
        """False: it is over."""
        ...

    async def held_by(self, holds: Callable[[str], bool]) -> list[HeldLease]:
        """Leases of the holders whose names ``holds`` says are theirs."""
        ...

    async def evict(self, pool_id: str) -> None:
        """It ends where nothing is in flight on it, and starts again on demand."""
        ...

    async def queue(self) -> list[dict[str, Any]]:
        """Those who wait, in their order."""
        ...

    def log(self, pool_id: str, lines: int) -> AsyncIterator[bytes]:
        """The last ``lines`` lines that its engine has written, then what it writes, until the node is away. The first piece
        comes at once, and may be empty.
        """
        ...

    def routes(self) -> AsyncIterator[dict[str, Any]]:
        """All pools, then each change, until the node is away."""
        ...
