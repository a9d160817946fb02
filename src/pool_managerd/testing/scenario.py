"""What happens in one simulated run: drawn from its seed, before anything runs.

An action is one line of a table: at which second, what, to which pool, and two drawn numbers that its kind reads as it needs
them. A run may leave actions out (shrink.py does); the others stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from pool_managerd.config import Config
from pool_managerd.testing.traffic import Traffic, named, traffic

GPU_BYTES = 24 << 30
RELOAD, APPLY, ACQUIRE, YIELD = "reload", "apply", "acquire", "yield"
"""Drawn beside all other requests and faults, each by itself."""
SUBMITTED = "s0"
"""The pool that is not configured: requests make it and take it away."""
APART = "apart"
"""The group of pools of which one is loaded at a time."""
REQUESTS = {
    "lease": 30, "release_lease": 22, "renew_lease": 3, "start": 6, "stop": 4, "restart": 4, "drain": 5, "undrain": 4, "hold": 2,
    "release": 3, "evict": 2, "preload": 2, "cancel_preload": 2, "ensure_ready": 4, "reset_breaker": 3, "submit": 2,
    "deregister": 1, "register": 1, "cordon": 1, "uncordon": 2,
}  # fmt: skip
FAULTS = {
    "exit": 8, "signal": 4, "exit_0": 2, "hang": 3, "busy": 2, "crash_loop": 3, "slow_load": 2, "never_ready": 2, "port_taken": 2,
    "spawns_fail": 3, "stagings_fail": 2, "model_missing": 1, "slow_staging": 2, "lose_shim": 2, "vram_late": 2, "vram_held": 1,
    "ignores_term": 2, "unkillable": 1, "gpu_error": 1, "gpu_missing": 1, "scan_problem": 1, "slow_scan": 1, "pid_unwritable": 1,
    "probes_fail": 1, "disk_full": 2, "pause": 2, "kill": 8, "shut_down": 1,
}  # fmt: skip

_FAST: dict[str, Any] = {"initial_ms": 50, "min_delay_ms": 50, "max_ms": 60_000}
_RULES: tuple[dict[str, Any], ...] = (
    {},
    {"backoff": _FAST, "breaker": {"threshold": 1_000}, "restart_limit": {"max_restarts": 4, "storm_open": 1_000}},
    {"backoff": _FAST, "breaker": {"threshold": 3, "open_ms": 20_000, "close_after_ms": 20_000}},
)
"""The usual ones; restarts up to the limit; breakers that open soon and are tried soon."""


@dataclass(frozen=True, slots=True)
class Action:
    """``pool`` counts the pools; ``number`` is at least 0, ``share`` is from 0 to 1."""

    index: int
    at: float
    kind: str
    pool: int
    number: int
    share: float

    def __str__(self) -> str:
        return f"{self.kind} pool {self.pool} ({self.number}, {self.share:.3f})"


@dataclass(frozen=True, slots=True)
class Scenario:
    """``needs``: bytes of GPU memory that the engine of each pool takes. ``hours``: how long it lasts.

    ``attributable``: the driver tells whose processes hold memory. ``tight``: not all engines have room at the same time.
    ``sleepers`` are the pools whose engines can sleep. ``crowded``: pools take turns on one GPU, which has room for one of them.
    ``traffic`` comes to a gateway, where there is one. ``downloads``: how many seconds it takes to fetch the models that are not
    there at first, by pool.
    """

    seed: int
    hours: float
    config: dict[str, Any]
    gpus: int
    attributable: bool
    tight: bool
    needs: dict[str, int]
    actions: tuple[Action, ...]
    sleepers: frozenset[str] = frozenset()
    crowded: bool = False
    traffic: Traffic | None = None
    downloads: Mapping[str, float] = field(default_factory=dict)

    def node_config(self) -> Config:
        return Config.model_validate(self.config)


def draw(seed: int) -> Scenario:
    """The same seed gives the same scenario, on every machine."""
    chance = Random(f"scenario {seed}")  # a text: its digest seeds it, whatever the hash of this process is
    pools, gpus = chance.randint(1, 3), chance.choice((0, 1, 2))
    probe_s = chance.choice((5, 60, 120, 120))
    hours = chance.choice((0.5, 1.0) if probe_s == 5 else (1.0, 2.0, 4.0, 8.0, 12.0))
    rules = Random(f"rules {seed}").choice((0, 0, 1, 2))
    ids = [f"p{n}" for n in range(pools)]
    tight = chance.random() < 0.25  # not everything fits at the same time; else it does, even on one GPU
    crowded = Random(f"crowded {seed}").random() < 0.15
    if crowded:
        ids, gpus, tight = ["p0", "p1", "p2"], 1, True
    low, high = (0.52, 0.8) if crowded else (0.3, 0.6) if tight else (0.05, 0.24)
    needs = {pool_id: int(GPU_BYTES * chance.uniform(low, high)) for pool_id in (*ids, SUBMITTED)}
    shown = chance.random() < 0.8
    config = _with_group(seed, _config(chance, ids, probe_s, rules))
    actions = _with_reloads(seed, _actions(chance, hours, pools))
    actions = _with_yields(seed, _with_acquires(seed, _with_applies(seed, actions), crowded=crowded))
    asked = traffic(seed, [action.at for action in actions])
    return Scenario(
        seed, hours, config if asked is None else named(seed, config), gpus, shown, tight and gpus > 0, needs,
        actions if asked is None else _with_traffic(seed, asked, actions), _sleepers(seed, ids), crowded, asked,
        _downloads(seed, ids),
    )  # fmt: skip


def _config(chance: Random, ids: list[str], probe_s: int, rules: int) -> dict[str, Any]:
    pools = [
        {
            "id": pool_id, "engine": "llamacpp", "model": f"file:{pool_id}.gguf", "slots": chance.randint(1, 3),
            "preload": chance.random() < 0.8,
        }
        for pool_id in ids
    ]  # fmt: skip
    return {
        "pools": pools,
        "profile": chance.choice(("home", "home", "dev")),
        "daemon": {"on_exit": chance.choice(("stop", "leave")), "preload_parallelism": chance.randint(1, 2)},
        "health": {"probe_interval_ms": probe_s * 1_000, "startup_timeout_ms": 30_000},
        "gpu": {"rescan_interval_ms": 60_000, "vram_wait_ms": 10_000},
        "lifecycle": {"drain_deadline_ms": chance.choice((1_000, 30_000)), "warmup": chance.choice(("before_ready", "off"))},
        "supervision": {"stop_grace_ms": chance.choice((500, 5_000)), **_RULES[rules]},
    }


def _actions(chance: Random, hours: float, pools: int) -> tuple[Action, ...]:
    """In bursts: what meets within milliseconds finds more than what is spread over a night."""
    weights = _mixed(chance)
    kinds, share = list(weights), list(weights.values())
    times: list[float] = []
    for _ in range(chance.randint(2, 8)):
        at = chance.uniform(0, hours * 3600)
        gap = chance.choice((0.01, 0.3, 3.0, 30.0))
        for _ in range(chance.randint(3, 25)):
            at += chance.expovariate(1 / gap)
            times.append(at)
    return tuple(
        Action(
            index,
            round(at, 4),
            chance.choices(kinds, share)[0],
            chance.randrange(pools),
            chance.randrange(1_000),
            chance.random(),
        )
        for index, at in enumerate(sorted(times))
    )


def _with_reloads(seed: int, actions: tuple[Action, ...]) -> tuple[Action, ...]:
    return _with(RELOAD, Random(f"reloads {seed}"), actions)


def _with_applies(seed: int, actions: tuple[Action, ...]) -> tuple[Action, ...]:
    return _with(APPLY, Random(f"applies {seed}"), actions)


def _with_acquires(seed: int, actions: tuple[Action, ...], *, crowded: bool) -> tuple[Action, ...]:
    return _with(ACQUIRE, Random(f"acquires {seed}"), actions, (40, 80) if crowded else (0, 3, 8, 16))


def _with_yields(seed: int, actions: tuple[Action, ...]) -> tuple[Action, ...]:
    return _with(YIELD, Random(f"yields {seed}"), actions, (0, 0, 0, 1, 4))


def _with_traffic(seed: int, asked: Traffic, actions: tuple[Action, ...]) -> tuple[Action, ...]:
    chance = Random(f"asked {seed}")
    more = (
        Action(len(actions) + n, at, kind, chance.randrange(3), chance.randrange(1_000), chance.random())
        for n, (at, kind) in enumerate(asked.asked)
    )
    return tuple(sorted((*actions, *more), key=lambda action: action.at))


def _with(
    kind: str, chance: Random, actions: tuple[Action, ...], numbers: tuple[int, ...] = (0, 0, 1, 2, 5)
) -> tuple[Action, ...]:  # fmt: skip
    """In some runs, each a moment before something else happens. Drawn apart, so that the rest stays what it was."""
    times = chance.sample([action.at for action in actions], min(len(actions), chance.choice(numbers)))
    more = (
        Action(
            len(actions) + n, round(max(0.0, at - chance.expovariate(1 / chance.choice((0.01, 1.0, 10.0)))), 4), kind,
            chance.randrange(3), chance.randrange(1_000), chance.random(),
        )
        for n, at in enumerate(times)
    )  # fmt: skip
    return tuple(sorted((*actions, *more), key=lambda action: action.at))


def _with_group(seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """In some runs the first two pools are kept apart. Drawn apart, as reloads are."""
    first, second = ([*config["pools"], {}, {}])[:2]
    if second and Random(f"together {seed}").random() < 0.25:
        first["preload"] = False
        return {**config, "together": {"groups": [{"id": APART, "pools": [first["id"], second["id"]]}]}}
    return config


def _sleepers(seed: int, ids: list[str]) -> frozenset[str]:
    """Drawn apart, as reloads are."""
    chance = Random(f"sleepers {seed}")
    return frozenset(pool_id for pool_id in ids if chance.random() < 0.6)


def _downloads(seed: int, ids: list[str]) -> dict[str, float]:
    """In some runs. Drawn apart, as reloads are."""
    chance = Random(f"downloads {seed}")
    if chance.random() < 0.7:
        return {}
    return {
        pool_id: chance.expovariate(1 / chance.choice((1.0, 20.0, 200.0, 1_000.0))) for pool_id in ids if chance.random() < 0.8
    }


def _mixed(chance: Random) -> dict[str, float]:
    """Not everything in every run: with half of the kinds left out the others meet more often."""
    return {kind: weight * chance.choice((0, 1, 1, 3)) for kind, weight in (REQUESTS | FAULTS).items()} | {"lease": 20.0}
