"""Several pools under one name: who waits at one of them goes to another one that serves it sooner."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from pool_managerd.core.demand.queue import Queue, Ticket
from pool_managerd.core.demand.turns import Condition, Seen


def to_a_free_one(queue: Queue, seen: Mapping[str, Seen], closing: Collection[str] = ()) -> list[tuple[Ticket, str]]:
    """Those whose pool has no slot for them now, and another one that has. In their order, so that nobody overtakes by it."""
    free = {pool_id: one.free for pool_id, one in seen.items() if one.condition is Condition.READY and pool_id not in closing}
    moves = []
    for ticket in queue:
        choices = [pool_id for pool_id in ticket.choices if free.get(pool_id, 0) > 0]
        if not choices:
            continue
        chosen = ticket.pool_id if ticket.pool_id in choices else max(choices, key=lambda pool_id: free[pool_id])
        free[chosen] -= 1
        if chosen != ticket.pool_id:
            moves.append((ticket, chosen))
    return moves


def to_one_that_starts(
    queue: Queue, seen: Mapping[str, Seen], load_s: Callable[[str], float], now: float
) -> Iterator[tuple[Ticket, str]]:
    """Who has waited for as long as the load of another pool takes, which is down: whether it fits has still to be seen. One for
    each such pool, and none while one of their pools loads already. Who waits at a pool that is refused need not wait so long.
    """
    begun = set[str]()
    for ticket in queue:
        conditions = {pool_id: seen[pool_id].condition for pool_id in ticket.choices}
        if Condition.LOADING in conditions.values() or conditions[ticket.pool_id] is Condition.DOWN:
            continue
        for pool_id in ticket.others:
            patience_s = 0.0 if conditions[ticket.pool_id] is Condition.REFUSED else load_s(pool_id)
            if conditions[pool_id] is Condition.DOWN and pool_id not in begun and now - ticket.since >= patience_s:
                begun.add(pool_id)
                yield ticket, pool_id
                break
