"""What a daemon and a gateway might say."""

from __future__ import annotations

from typing import Any

from pool_managerd.cli.top_rates import Rate
from pool_managerd.cli.top_snapshot import GatewayAnswers, NodeAnswers, Snapshot
from tests.api.fake_devices import device

Json = dict[str, Any]
NOW_MS = 1_795_000_000_000
NO_GPUS: Json = {
    "devices": [], "stale": True, "problem": {"code": "nvml_unavailable", "message": "no driver"},
    "ram_total_bytes": 64 << 30, "ram_available_bytes": 48 << 30,
}  # fmt: skip


def pool(pool_id: str, **changes: Any) -> Json:
    """One that is ready and has been idle for a minute."""
    return {
        "pool_id": pool_id, "state": "ready", "ready": True, "active_leases": 0, "slots_total": 4, "waiting": 0,
        "idle_ms": 60_000, "preload": None, "drain": None, "reload": None, "held": False, "reason": None, "last_error": None,
        "next_restart_at_ms": None,
    } | changes  # fmt: skip


def ticket(number: int, **changes: Any) -> Json:
    return {
        "ticket_id": f"t{number}", "pool_id": "chat", "place": number, "waited_ms": 1000 * number, "left_ms": 1, "priority": 0,
        "estimate_ms": None, "waits_for": "a slot: 4 leases are held, by gateway (4)",
    } | changes  # fmt: skip


def shot(
    *pools: Json, devices: Json | None = None, rates: dict[str, Rate] | None = None, gateway: GatewayAnswers | None = None,
    away: tuple[int, str] | None = None, **node: Any,
) -> Snapshot:  # fmt: skip
    """A moment of a node whose gateway counts ``rates``."""
    found = gateway or GatewayAnswers("http://127.0.0.1:8088", 0, rates)
    rows = {"devices": [device()]} if devices is None else devices
    answers = NodeAnswers("1.2.3", pools=pools, devices=rows, **({"queue": (), "yields": ()} | node))
    return Snapshot(NOW_MS, "http://127.0.0.1:9200", answers, found, away)
