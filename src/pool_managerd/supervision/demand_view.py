"""Who waits for a slot, and what asking for one would lead to, for people and machines."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from pool_managerd.core.demand.queue import Ticket
from pool_managerd.core.demand.turns import Condition, Seen
from pool_managerd.core.lifecycle import view
from pool_managerd.core.lifecycle.phase import RISING
from pool_managerd.core.narration import duration
from pool_managerd.supervision.making_room import Room, why_it_waits
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.times import Times


def row(ticket: Ticket, place: int, pool: Pool | None, blocked: Room | None, times: Times, now: float) -> dict[str, Any]:
    """``place`` 1 is next at its pool; ``estimate_ms`` is what is left of its loading, as far as that was measured before."""
    loading = pool is not None and pool.instance.phase in RISING
    return {
        "ticket_id": ticket.ticket_id, "pool_id": ticket.pool_id, "holder": ticket.holder, "priority": ticket.priority,
        "place": place, "waited_ms": round((now - ticket.since) * 1000), "left_ms": max(0, round((ticket.until - now) * 1000)),
        "estimate_ms": _left_ms(pool, times, now), "state": "gone" if pool is None else view(pool.state).state,
        "step": pool.launch.step if pool is not None and loading else None,
        "waits_for": (blocked and why_it_waits(blocked)) or ("it to be ready" if loading else "a slot"),
    }  # fmt: skip


def _left_ms(pool: Pool | None, times: Times, now: float) -> int | None:
    """Of a pool that is down its whole load; of one that is ready nobody knows when a lease will end."""
    known = [] if pool is None else times.of(pool.pool_id, "load")
    if pool is None or view(pool.state).ready or not known:
        return None
    began = pool.instance.launched_at if pool.instance.phase in RISING else None
    return max(0, round(median(known) - (0 if began is None else (now - began) * 1000)))


def planned(
    pool: Pool, seen: Seen, room: Room, stops: Sequence[dict[str, Any]], waiting: int, times: Times
) -> dict[str, Any]:  # fmt: skip
    """``stops`` is what would go or be waited for."""
    refusal, load = seen.refusal or room.in_vain, times.of(pool.pool_id, "load")
    load_ms = round(median(load)) if load and seen.condition is Condition.DOWN else None
    return {
        "pool_id": pool.pool_id, "state": view(pool.state).state, "would": _would(pool, seen, room, stops, load_ms),
        "stops": list(stops), "load_ms": load_ms, "waiting": waiting,
        "refused": None if refusal is None else refusal.message, "hint": None if refusal is None else refusal.hint,
    }  # fmt: skip


def _would(pool: Pool, seen: Seen, room: Room, stops: Sequence[dict[str, Any]], load_ms: int | None) -> str:
    name = f"pool '{pool.pool_id}'"
    if (refusal := seen.refusal or room.in_vain) is not None:
        return f"a request for {name} would be refused: {refusal.message}"
    match seen.condition:
        case Condition.READY if seen.free:
            return f"a request for {name} would have a slot at once"
        case Condition.READY:
            return f"a request for {name} would wait for a slot"
        case Condition.LOADING:
            return f"a request for {name} would wait until it is ready: it loads already"
        case Condition.ENDING:
            return f"a request for {name} would wait: it is {view(pool.state).state}"
    takes = "" if load_ms is None else f", which takes about {duration(load_ms / 1000)}"
    if room.ends:
        return f"a request for {name} would start it{takes}, once {why_it_waits(room)}"
    first = ", ".join(f"{one['action']} ({one['pool_id']})" for one in stops)
    return f"a request for {name} would start it{takes}" + (f"; before that: {first}" if first else "")
