"""What comes to the gateway in a simulated run: drawn apart from all else, in some runs."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from pool_managerd.gateway.leasing import LeaseTimes

ASK, UNLOAD, GATEWAY_KILL, GATEWAY_END, GATEWAY_PAUSE = "ask", "unload", "gateway_kill", "gateway_end", "gateway_pause"
SHARED = "shared"
"""The name that several pools may be served under."""
THROUGH_GATEWAY = (ASK, UNLOAD, GATEWAY_KILL, GATEWAY_END, GATEWAY_PAUSE)
_WEIGHTS = {
    ASK: 40, UNLOAD: 2, GATEWAY_KILL: 1, GATEWAY_END: 1, GATEWAY_PAUSE: 2,
    "exit": 2, "drain": 1, "start": 1, "kill": 1, "pause": 1,
}  # fmt: skip
"""Beside requests what bears on their leases most."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """``times`` of the gateway's leases; ``asked``: when what happens, as second and kind."""

    times: LeaseTimes
    asked: tuple[tuple[float, str], ...]


def traffic(seed: int, times: list[float]) -> Traffic | None:
    """Bursts at any time, and around moments at which other things happen, too; None in half of the runs."""
    chance = Random(f"traffic {seed}")
    if not times or chance.random() < 0.5:
        return None
    weights = {kind: weight * chance.choice((0, 1, 3)) for kind, weight in _WEIGHTS.items()} | {ASK: _WEIGHTS[ASK]}
    asked: list[tuple[float, str]] = []
    for _ in range(chance.randint(2, 8)):
        at = chance.choice((chance.choice(times), chance.uniform(60.0, max(times))))
        at -= chance.expovariate(1 / chance.choice((0.05, 1.0, 10.0)))
        gap = chance.choice((0.01, 0.3, 3.0))
        for _ in range(chance.randint(2, 16)):
            at += chance.expovariate(1 / gap)
            asked.append((round(max(0.0, at), 4), chance.choices(list(weights), list(weights.values()))[0]))
    leases = LeaseTimes(
        linger_s=chance.choice((0.0, 0.5, 2.0, 2.0, 10.0, 20.0)), ttl_s=chance.choice((4.0, 10.0, 30.0)),
        wait_s=chance.choice((2.0, 30.0, 300.0)), away_s=chance.choice((1.0, 15.0, 15.0)),
    )  # fmt: skip
    return Traffic(leases, tuple(sorted(asked)))


def named(seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """Each pool has an alias, and most of them a name that they share."""
    chance = Random(f"names {seed}")
    pools = [
        {**pool, "aliases": [f"alias-{pool['id']}"], **({"served_name": SHARED} if chance.random() < 0.7 else {})}
        for pool in config["pools"]
    ]
    return {**config, "pools": pools}
