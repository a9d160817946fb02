"""Who is served now: one look at the queue and the pools, and what follows from it.

Requests for a model that is loaded go before those for one that is not, so that the same model's go together; but not for ever:
a pool that must go for somebody who starves (``closing``) is given to nobody any more. What must go for a model is decided
elsewhere (room.py); here only whose turn it is to ask for that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pool_managerd.core.demand.queue import Queue, Ticket
from pool_managerd.errors import PoolError


class Condition(StrEnum):
    """What a pool is to somebody who wants a slot of it."""

    READY = "ready"
    LOADING = "loading"
    """A start is under way."""
    DOWN = "down"
    """It can be started."""
    ENDING = "ending"
    """It can be once it is down, or is being reloaded."""
    REFUSED = "refused"
    """A person does not want it, or it cannot be started: nobody is to wait for it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One pool as it is now. ``free`` slots; ``refusal`` is told to whoever waits for a pool that is refused."""

    condition: Condition
    free: int = 0
    refusal: PoolError | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """``granted`` are to have a slot, ``expired`` have waited too long, ``refused`` are told why; ``starts`` are pools to be
    started, in their order.
    """

    granted: tuple[Ticket, ...] = ()
    expired: tuple[Ticket, ...] = ()
    refused: tuple[tuple[Ticket, PoolError], ...] = ()
    starts: tuple[str, ...] = ()


def turn(queue: Queue, seen: Mapping[str, Seen], now: float, closing: Collection[str] = ()) -> Turn:
    """Pure: the caller carries it out and looks again."""
    free = {pool_id: one.free for pool_id, one in seen.items() if one.condition is Condition.READY and pool_id not in closing}
    granted: list[Ticket] = []
    expired: list[Ticket] = []
    refused: list[tuple[Ticket, PoolError]] = []
    starts: dict[str, None] = {}
    for ticket in queue:
        one = seen[ticket.pool_id]
        if one.condition is Condition.REFUSED and one.refusal is not None:
            refused.append((ticket, one.refusal))
        elif one.condition is Condition.READY and not ticket.slot:
            granted.append(ticket)
        elif free.get(ticket.pool_id, 0) > 0:
            free[ticket.pool_id] -= 1
            granted.append(ticket)
        elif now >= ticket.until:
            expired.append(ticket)
        elif one.condition is Condition.DOWN:
            starts[ticket.pool_id] = None
    return Turn(tuple(granted), tuple(expired), tuple(refused), tuple(starts))
