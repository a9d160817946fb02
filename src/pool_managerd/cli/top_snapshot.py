"""What is known of a node at one moment, and the rows that are shown of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pool_managerd.cli.output import Json, span
from pool_managerd.cli.picture import DRIVER, FREE, parts_of
from pool_managerd.cli.top_rates import WINDOW_S, Rate
from pool_managerd.core.narration import count

_RECENT_MS = 600_000
_MOVING = frozenset({"provisioning", "starting", "draining", "stopping"})
_DOWN = frozenset({"uninitialized", "offline"})


@dataclass(frozen=True, slots=True)
class NodeAnswers:
    """What the daemon said. Of what it tells nobody but its own user None: ``queue``, ``yields``, ``last_error``."""

    version: str | None = None
    status: str = "ok"
    pools: tuple[Json, ...] = ()
    devices: Json = field(default_factory=dict)
    queue: tuple[Json, ...] | None = None
    yields: tuple[Json, ...] | None = None
    last_error: Json | None = None


@dataclass(frozen=True, slots=True)
class GatewayAnswers:
    """``in_flight`` and ``rates`` None: it was not reached, for that ``problem``; ``rates`` None: asked for the first time."""

    url: str = ""
    in_flight: int | None = None
    rates: Mapping[str, Rate] | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``away``: why there is no news of the daemon, and since when (unix ms)."""

    at_ms: int
    url: str
    node: NodeAnswers
    gateway: GatewayAnswers
    away: tuple[int, str] | None = None


@dataclass(frozen=True, slots=True)
class PoolRow:
    """``busy`` pools are shown first, those that are ``down`` last."""

    pool_id: str
    state: str
    detail: str | None
    slots_used: int
    slots_total: int | None
    waiting: int
    requests_per_s: float | None
    tokens_per_s: float | None
    first_token_ms: float | None
    vram_bytes: int | None
    idle_ms: int | None
    busy: bool
    down: bool


@dataclass(frozen=True, slots=True)
class GpuRow:
    """The sizes add up to the whole memory, where that can be read; ``kept`` is reserved, or not for pools."""

    device: str
    state: str
    total_bytes: int
    pools_bytes: int
    kept_bytes: int
    others_bytes: int
    driver_bytes: int
    free_bytes: int
    unknown_bytes: int
    utilization_percent: int | None
    temperature_c: int | None
    cordoned: bool
    yielded: bool
    yielded_until_ms: int | None


def pool_rows(shot: Snapshot) -> list[PoolRow]:
    """Busy pools, the others, those that are down: each by id, so that none moves without a reason."""
    held, estimates = _held(shot.node.devices), _estimates(shot.node.queue or ())
    rows = [_pool_row(pool, shot, held, estimates) for pool in shot.node.pools]
    return sorted(rows, key=lambda row: (not row.busy, row.down, row.pool_id))


def gpu_rows(shot: Snapshot) -> list[GpuRow]:
    """In the daemon's order."""
    yields = {one.get("uuid"): one.get("until_ms") for one in shot.node.yields or ()}
    return [_gpu_row(device, yields) for device in shot.node.devices.get("devices") or ()]


def waiting_rows(shot: Snapshot) -> list[Json]:
    """Who waits for a slot, the longest first."""
    return sorted(shot.node.queue or (), key=lambda ticket: (-_whole(ticket.get("waited_ms")), str(ticket.get("ticket_id"))))


def recent_error(shot: Snapshot) -> Json | None:
    """The last event that is an error, unless it is long ago."""
    event = shot.node.last_error
    return event if event is not None and shot.at_ms - _whole(event.get("ts_ms")) < _RECENT_MS else None


def totals(shot: Snapshot) -> dict[str, Any]:
    """Of the node. Requests in flight are slots in use where the gateway does not tell."""
    pools, gateway = shot.node.pools, shot.gateway
    leased = sum(_whole(pool.get("active_leases")) for pool in pools)
    queued = sum(_whole(pool.get("waiting")) for pool in pools) if shot.node.queue is None else len(shot.node.queue)
    return {
        "pools_ready": sum(1 for pool in pools if pool.get("ready")), "pools": len(pools),
        "in_flight": leased if gateway.in_flight is None else gateway.in_flight, "waiting": queued,
        "tokens_per_s": None if gateway.rates is None else sum(rate.tokens_per_s for rate in gateway.rates.values()),
    }  # fmt: skip


def as_json(shot: Snapshot) -> Json:
    """The same for machines."""
    node, gateway, devices = shot.node, shot.gateway, shot.node.devices
    away_ms, why = shot.away or (None, None)
    return {
        "ts_ms": shot.at_ms,
        "daemon": {"url": shot.url, "version": node.version, "status": node.status, "away_since_ms": away_ms, "away": why},
        "gateway": {"url": gateway.url, "problem": gateway.problem},
        "totals": totals(shot),
        "pools": [asdict(row) for row in pool_rows(shot)],
        "devices": [asdict(row) for row in gpu_rows(shot)],
        "devices_stale": bool(devices.get("stale")),
        "ram": {"total_bytes": devices.get("ram_total_bytes"), "available_bytes": devices.get("ram_available_bytes")},
        "queue": None if node.queue is None else waiting_rows(shot),
        "last_error": recent_error(shot),
    }


def _pool_row(pool: Json, shot: Snapshot, held: Mapping[str, int], estimates: Mapping[str, int]) -> PoolRow:
    pool_id, state, idle_ms = str(pool["pool_id"]), str(pool.get("state")), pool.get("idle_ms")
    used, waiting = _whole(pool.get("active_leases")), _whole(pool.get("waiting"))
    rate = None if shot.gateway.rates is None else shot.gateway.rates.get(pool_id, Rate(0.0, 0.0, None))
    busy = bool(used or waiting or (rate and (rate.requests_per_s or rate.tokens_per_s)) or state in _MOVING)
    return PoolRow(
        pool_id, state, _detail(pool, estimates.get(pool_id), shot.at_ms), used, pool.get("slots_total"), waiting,
        None if rate is None else rate.requests_per_s, None if rate is None else rate.tokens_per_s,
        None if rate is None else rate.first_token_ms, held.get(pool_id), idle_ms,
        busy=busy or (idle_ms is not None and idle_ms < WINDOW_S * 1000), down=state in _DOWN,
    )  # fmt: skip


def _detail(pool: Json, left_ms: int | None, at_ms: int) -> str | None:
    """What there is to say beside the state: how far it is, or why."""
    step, drain = pool.get("preload") or {}, pool.get("drain")
    if step:
        return ", ".join(_progress(step, left_ms))
    if drain:
        return f"{count(_whole(drain.get('left')), 'request')} left, {span(_whole(drain.get('remaining_ms')))}"
    if pool.get("reload"):
        return f"reload {pool['reload']}"
    if pool.get("held"):
        return "held"
    return None if pool.get("ready") or pool.get("state") in _DOWN else _why(pool, at_ms)


def _why(pool: Json, at_ms: int) -> str | None:
    """Why it does not serve, and when it is tried again."""
    again, why = pool.get("next_restart_at_ms"), pool.get("last_error") or pool.get("reason")
    when = None if again is None else f"for {span(max(0, again - at_ms))}"
    return ": ".join(str(part) for part in (when, why) if part) or None


def _progress(step: Json, left_ms: int | None) -> Iterator[str]:
    done, total = step.get("bytes_done"), step.get("bytes_total")
    if done and total:
        yield f"{100 * done // total} %"
    if left_ms is not None:
        yield f"{span(left_ms)} left"
    else:
        yield span(_whole(step.get("elapsed_ms")))
    if step.get("human"):
        yield str(step["human"])


def _estimates(queue: tuple[Json, ...]) -> dict[str, int]:
    """What is left of the loads that somebody waits for."""
    return {str(ticket.get("pool_id")): ticket["estimate_ms"] for ticket in queue if ticket.get("estimate_ms") is not None}


def _held(devices: Json) -> dict[str, int]:
    """VRAM by pool, on all GPUs: as measured, else as estimated."""
    held: dict[str, int] = {}
    for device in devices.get("devices") or ():
        for one in device.get("reservations") or ():
            size = one.get("used_bytes")
            size = one.get("estimated_bytes") if size is None else size
            if size is not None:
                held[str(one.get("pool_id"))] = held.get(str(one.get("pool_id")), 0) + int(size)
    return held


def _gpu_row(device: Json, yields: Mapping[Any, int | None]) -> GpuRow:
    sizes = dict.fromkeys(("pools", "kept", "others", "driver", "free", "unknown"), 0)
    for part in parts_of(device):
        sizes[_kind(part.symbol, device.get("readable", True))] += part.size_bytes
    free = min(sizes["free"], _whole(device.get("vram_available_bytes")))
    return GpuRow(
        str(device.get("device")), str(device.get("state")), _whole(device.get("vram_total_bytes")), sizes["pools"],
        sizes["kept"] + sizes["free"] - free, sizes["others"], sizes["driver"], free, sizes["unknown"],
        device.get("utilization_percent"), device.get("temperature_c"), bool(device.get("cordoned")),
        device.get("uuid") in yields, yields.get(device.get("uuid")),
    )  # fmt: skip


def _kind(symbol: str, readable: bool) -> str:
    """What a part of the picture of ``devices`` is, when all pools and all others are put together."""
    if symbol in (DRIVER, FREE):
        return "driver" if symbol == DRIVER else "free"
    if symbol.isalpha():
        return "pools" if symbol.isupper() else "kept"
    return "others" if readable else "unknown"


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) else 0
