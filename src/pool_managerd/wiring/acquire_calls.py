"""Starts on demand: a part of the façade."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pool_managerd.config import Config
from pool_managerd.core.demand.request import AcquireRequest
from pool_managerd.supervision.demand import Demand
from pool_managerd.supervision.leases import Leases
from pool_managerd.supervision.pools import Pools

if TYPE_CHECKING:
    from pool_managerd.telemetry.node_spans import NodeSpans


@dataclass(frozen=True, slots=True)
class AcquiredLease:
    """A slot of pool ``pool_id``: requests under it go to ``url``. ``queued_ms`` it was waited for; ``started``: a start was.
    ``epoch`` is the launch of the engine that it is on.
    """

    lease_id: str
    pool_id: str
    url: str | None
    epoch: int | None
    queued_ms: int
    started: bool


class Acquisition:
    """To be awaited, or entered: ``async with node.acquire("chat") as lease:`` gives the lease back at the end."""

    def __init__(self, take: Callable[[], Any], give_back: Callable[[str, str], Any]) -> None:
        self._take, self._give_back = take, give_back
        self._lease: AcquiredLease | None = None
        self._entered = False

    def __await__(self) -> Generator[Any, None, AcquiredLease]:
        return self._taken().__await__()

    async def _taken(self) -> AcquiredLease:
        return AcquiredLease(**await self._take())

    async def __aenter__(self) -> AcquiredLease:
        if self._entered:
            raise RuntimeError("an acquisition can be entered once: ask for another one with node.acquire(…)")
        self._entered = True
        self._lease = await self._taken()
        return self._lease

    async def __aexit__(self, *_: object) -> None:
        if self._lease is not None:
            self._give_back(self._lease.pool_id, self._lease.lease_id)


class AcquireCalls:
    """Mixed into ``PoolManager``, whose parts these are."""

    config: Config
    _pools: Pools
    _leases: Leases
    _demand: Demand
    _spans: NodeSpans | None

    def acquire(
        self, model: str, *, wait_ms: int | None = None, ttl_ms: int | None = None, priority: int = 0, holder: str | None = None
    ) -> Acquisition:
        """A slot of ``model`` (a pool's id, served name or alias), which is started if need be, and for which idle pools make
        room: ``async with node.acquire("chat") as lease:`` and ``lease.url``.

        Whoever goes away while waiting does not wait any more, and a load that nobody waits for is given up. Raises RequestError
        MODEL_NOT_FOUND, QUEUE_FULL, QUEUE_TIMEOUT, POOL_STOPPED and what else keeps the pool from starting; the PoolError of a
        start that failed; SpecError.
        """
        asked = AcquireRequest(model, wait_ms, ttl_ms, priority, holder)
        return Acquisition(lambda: self.take_slot(asked), self._released)

    def _released(self, pool_id: str, lease_id: str) -> None:
        self._leases.release(self._pools.get(pool_id), lease_id)

    def new_ticket_id(self) -> str:
        """A name by which a request is found in the queue."""
        return self._demand.new_ticket_id()

    async def take_slot(self, asked: AcquireRequest, ticket_id: str | None = None) -> dict[str, Any]:
        """As ``acquire``, under a ticket of that id."""
        taking = self._demand.acquire(asked, ticket_id)
        return await (taking if self._spans is None else self._spans.acquired(asked.model, taking))

    async def plan_acquire(self, model: str) -> dict[str, Any]:
        """What ``acquire`` would lead to now: what would be stopped or waited for, and how long that takes. Nothing happens."""
        return await self._demand.plan(model)

    def queue(self) -> list[dict[str, Any]]:
        """Those who wait for a slot, in their order."""
        return self._demand.rows()

    def ticket(self, ticket_id: str) -> dict[str, Any] | None:
        """One who waits; None when it does not."""
        return self._demand.find(ticket_id)

    def routes(self) -> dict[str, Any]:
        """What a router has to know: ``pools`` with their names, where each answers and whether it may be asked, and ``waiting``:
        whether anybody waits for a slot or for room.
        """
        return self._demand.routes.now()

    def watch_routes(self) -> AsyncIterator[dict[str, Any]]:
        """As ``routes`` at first, then what has changed since: rows that are new or different, and in ``gone`` pools that are no
        more.
        """
        return self._demand.routes.watch()

    def gateway_is_gone(self, pid: int) -> None:
        """The gateway of that pid has ended, and its connections with it: its leases are over, and need not run out."""
        for pool in self._pools.all():
            for lease in self._leases.held_by(pool, f"gateway/{pid}-"):
                self._leases.release(pool, lease)

    def cancel_ticket(self, ticket_id: str) -> None:
        """Whoever waits with it is told so. Raises RequestError TICKET_NOT_FOUND."""
        self._demand.cancel(ticket_id)
