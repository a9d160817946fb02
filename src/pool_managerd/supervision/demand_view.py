"""Who waits for a slot, and what asking for one would lead to, for people and machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from pool_managerd.core.demand.queue import Ticket
from pool_managerd.core.demand.turns import Condition, Seen
from pool_managerd.core.lifecycle import sleeps_evicted, view
from pool_managerd.core.lifecycle.phase import RISING
from pool_managerd.core.narration import count, duration
from pool_managerd.core.registry import Registry
from pool_managerd.errors import RequestError
from pool_managerd.supervision.making_room import Room, why_it_waits
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.times import Times

_HOLDERS = 3


def waits_for(pool: Pool, seen: Seen, registry: Registry, *, reloaded: bool, kept_for: str | None) -> str:
    """What stands between a request and a slot of a pool that is up, or on its way. ``kept_for`` is the pool that this one must
    go for: no slot of it is given until then.
    """
    match seen.condition:
        case Condition.LOADING:
            return "it to be ready"
        case Condition.ENDING if reloaded:
            return "its reload to end"
        case Condition.ENDING:
            return f"it to be ready again: it is {view(pool.state).state}"
        case Condition.READY if kept_for is not None and kept_for != pool.pool_id:
            return f"pool '{kept_for}' to have its turn, which it is kept free for"
        case Condition.READY if kept_for is not None:
            return "it to be started again: it is being stopped"
    return "a slot" if seen.free else f"a slot: {_held(pool, registry)}"


def _held(pool: Pool, registry: Registry) -> str:
    """``all 4 are leased, by gateway (3) and bench (1)``."""
    total = registry.get_active_leases(pool.pool_id)
    named = Counter(lease.holder for lease in registry.leases(pool.pool_id) if lease.holder)
    told = [f"{holder[:40]} ({number})" for holder, number in named.most_common(_HOLDERS)]
    if rest := total - sum(number for _, number in named.most_common(_HOLDERS)):
        told.append(f"others ({rest})" if told else "callers that gave no name")
    return f"{count(total, 'lease')} {'is' if total == 1 else 'are'} held, by {', '.join(told)}"


def row(
    ticket: Ticket, place: int, pool: Pool | None, blocked: Room | None, otherwise: str, times: Times, now: float
) -> dict[str, Any]:
    """``place`` 1 is next at its pool; ``estimate_ms`` is what is left of its loading, as far as that was measured before.
    ``otherwise`` is what it waits for where nothing is ``blocked``.
    """
    loading = pool is not None and pool.instance.phase in RISING
    return {
        "ticket_id": ticket.ticket_id, "pool_id": ticket.pool_id, "holder": ticket.holder, "priority": ticket.priority,
        "place": place, "waited_ms": round((now - ticket.since) * 1000), "left_ms": max(0, round((ticket.until - now) * 1000)),
        "estimate_ms": _left_ms(pool, times, now), "state": "gone" if pool is None else view(pool.state).state,
        "step": pool.launch.step if pool is not None and loading else None,
        "waits_for": (blocked and why_it_waits(blocked)) or otherwise,
    }  # fmt: skip


def too_late(ticket: Ticket, told: Mapping[str, Any]) -> RequestError:
    """``told`` is its row: for a request that has waited for as long as it would."""
    return RequestError(
        f"no slot of pool '{ticket.pool_id}' within {duration(ticket.until - ticket.since)}: it was number {told['place']} of"
        f" those who wait, for {told['waits_for']}", code="QUEUE_TIMEOUT", status=503, pool_id=ticket.pool_id, retriable=True,
        retry_after_ms=told["estimate_ms"] or 1000, hint="wait longer (wait_ms), or try again later",
    )  # fmt: skip


def _left_ms(pool: Pool | None, times: Times, now: float) -> int | None:
    """Of a pool that is down its whole load; of one that is ready nobody knows when a lease will end."""
    known = [] if pool is None else times.of(pool.pool_id, "load")
    if pool is None or view(pool.state).ready or not known:
        return None
    began = pool.instance.launched_at if pool.instance.phase in RISING else None
    return max(0, round(median(known) - (0 if began is None else (now - began) * 1000)))


def planned(
    pool: Pool, seen: Seen, room: Room, stops: Sequence[dict[str, Any]], otherwise: str, waiting: int, times: Times
) -> dict[str, Any]:  # fmt: skip
    """``stops`` is what would go or be waited for, ``otherwise`` what a request waits for where it is not down, if anything."""
    refusal, load = seen.refusal or room.in_vain, times.of(pool.pool_id, "load")
    loads = seen.condition is Condition.DOWN and not sleeps_evicted(pool.state)
    load_ms = round(median(load)) if load and loads else None
    return {
        "pool_id": pool.pool_id, "state": view(pool.state).state, "would": _would(pool, seen, room, stops, load_ms, otherwise),
        "stops": list(stops), "load_ms": load_ms, "waiting": waiting,
        "refused": None if refusal is None else refusal.message, "hint": None if refusal is None else refusal.hint,
    }  # fmt: skip


def _would(pool: Pool, seen: Seen, room: Room, stops: Sequence[dict[str, Any]], load_ms: int | None, otherwise: str) -> str:
    name = f"pool '{pool.pool_id}'"
    if (refusal := seen.refusal or room.in_vain) is not None:
        return f"a request for {name} would be refused: {refusal.message}"
    match seen.condition:
        case Condition.READY if not otherwise:
            return f"a request for {name} would have a slot at once"
        case Condition.READY | Condition.ENDING:
            return f"a request for {name} would wait for {otherwise}"
        case Condition.LOADING:
            return f"a request for {name} would wait until it is ready: it loads already"
    takes = "" if load_ms is None else f", which takes about {duration(load_ms / 1000)}"
    begin = f"a request for {name} would {'wake' if sleeps_evicted(pool.state) else 'start'} it{takes}"
    if room.ends:
        return f"{begin}, once {why_it_waits(room)}"
    first = ", ".join(f"{one['action']} ({one['pool_id']})" for one in stops)
    return begin + (f"; before that: {first}" if first else "")
