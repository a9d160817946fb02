"""What engines were measured to do: kept for the next daemon, and found again by what is comparable."""

from __future__ import annotations

from pool_managerd.core.artifacts import AnyEngine
from pool_managerd.core.baselines import Baseline, Key
from pool_managerd.supervision.prober import WARMUP_TOKENS
from pool_managerd.supervision.services import Services

_BASELINES = "baseline"
"""The kind of the one fact that has all baselines."""


def baseline_key(engine: AnyEngine) -> Key:
    """What its measurements are comparable with."""
    return (engine.engine_version, engine.model_id or "", engine.device_mask or "")


def warmed_with(engine: AnyEngine) -> str:
    """What a warm-up of it asks for, in words."""
    return f"warm-up of {WARMUP_TOKENS} tokens" if engine.warmup == "completion" else f"warm-up of one {engine.warmup}"


def warmed_up(services: Services, engine: AnyEngine, first_token_ms: float, tokens_per_s: float) -> tuple[Baseline, ...]:
    """Fold a warm-up of ``engine`` in; all that is known of it then, what tells most first."""
    key = baseline_key(engine)
    services.baselines.observe(key, first_token_ms, tokens_per_s, warmed_with(engine), services.clock.wall_ms())
    _keep(services)
    return services.baselines.all_of(key)


def benched(services: Services, engine: AnyEngine, bench: Baseline) -> tuple[Baseline, ...]:
    """As ``warmed_up``, of what a bench has measured."""
    key = baseline_key(engine)
    services.baselines.note_bench(key, bench)
    _keep(services)
    return services.baselines.all_of(key)


def restore(services: Services) -> None:
    """What earlier daemons measured, once the state is open."""
    services.baselines.restore(services.records.facts(_BASELINES).get("all", {}).get("rows", []))


def _keep(services: Services) -> None:
    services.records.note_fact(_BASELINES, "all", {"rows": services.baselines.to_rows()})
