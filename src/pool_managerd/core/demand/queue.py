"""Who waits for a slot of a pool: bounded, in order of priority and arrival, each for a limited time."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import Context
from dataclasses import dataclass, replace

from pool_managerd.core.narration import count
from pool_managerd.errors import RequestError

MAX_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class QueueRules:
    """``max_waiting`` on the node and per pool. ``patience_s``: how long somebody waits who does not say.

    After ``starving_s`` a request whose model is not loaded keeps new ones from those models that must go for it; a model that
    was just loaded stays for ``residency_s``, unless somebody starves.
    """

    max_waiting: int = 2048
    max_waiting_per_pool: int = 512
    patience_s: float = 300.0
    starving_s: float = 30.0
    residency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """One who waits, since and until a monotonic second. A higher ``priority`` comes first; ``ttl_ms`` is of its lease. Without
    ``slot`` it only waits for the pool to be ready. ``others`` are pools of the same name, which would do as well. ``context`` is
    that of whoever asked: what is begun for it goes on in that.
    """

    ticket_id: str
    pool_id: str
    since: float
    until: float
    priority: int = 0
    holder: str | None = None
    ttl_ms: int | None = None
    slot: bool = True
    others: tuple[str, ...] = ()
    context: Context | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """Pools that would do, the one it waits at first."""
        return self.pool_id, *self.others

    def starves(self, now: float, rules: QueueRules) -> bool:
        return now - self.since >= rules.starving_s


class Queue:
    """Those who wait on one node, in their order."""

    def __init__(self) -> None:
        self._tickets: dict[str, Ticket] = {}

    def add(self, ticket: Ticket, rules: QueueRules) -> None:
        """Raises RequestError QUEUE_FULL (429)."""
        here = sum(other.pool_id == ticket.pool_id for other in self._tickets.values())
        limit = where = key = None
        if here >= rules.max_waiting_per_pool:
            limit, where, key = rules.max_waiting_per_pool, f"pool '{ticket.pool_id}'", "queue.max_waiting_per_pool"
        elif len(self._tickets) >= rules.max_waiting:
            limit, where, key = rules.max_waiting, "this node", "queue.max_waiting"
        if limit is not None:
            raise RequestError(
                f"cannot wait for pool '{ticket.pool_id}': {count(limit, 'request')} wait for {where} already",
                code="QUEUE_FULL", status=429, pool_id=ticket.pool_id, retriable=True, retry_after_ms=1000,
                hint=f"try again later, or raise {key}",
            )  # fmt: skip
        self._tickets[ticket.ticket_id] = ticket

    def remove(self, ticket_id: str) -> Ticket | None:
        """It does not wait any more; None when it did not."""
        return self._tickets.pop(ticket_id, None)

    def move(self, ticket: Ticket, pool_id: str) -> None:
        """It waits at another one of its choices from now on, as long as before."""
        if ticket.ticket_id in self._tickets:
            others = tuple(one for one in ticket.choices if one != pool_id)
            self._tickets[ticket.ticket_id] = replace(ticket, pool_id=pool_id, others=others)

    def choices(self) -> list[str]:
        """Pools that would do for somebody who waits."""
        return list(dict.fromkeys(pool_id for ticket in self._tickets.values() for pool_id in ticket.choices))

    def has_choices(self) -> bool:
        """Somebody may be served by more than one pool."""
        return any(ticket.others for ticket in self._tickets.values())

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        """All, in their order: by priority, then by arrival."""
        return iter(sorted(self._tickets.values(), key=lambda ticket: -ticket.priority))

    def of(self, pool_id: str) -> list[Ticket]:
        """Those of one pool, in their order."""
        return [ticket for ticket in self if ticket.pool_id == pool_id]

    def pools(self) -> list[str]:
        """Pools that somebody waits for, in the order of whoever is first at each."""
        return list(dict.fromkeys(ticket.pool_id for ticket in self))

    def place(self, ticket: Ticket) -> int:
        """How many come before it at its pool, and itself: 1 is next."""
        return self.of(ticket.pool_id).index(ticket) + 1

    def next_deadline(self) -> float | None:
        return min((ticket.until for ticket in self._tickets.values()), default=None)
