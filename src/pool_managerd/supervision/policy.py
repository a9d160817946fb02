"""From the configuration to the rules that ``step`` decides by."""

from __future__ import annotations

from pool_managerd.config import Config, HealthConfig, PoolConfig
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.backoff import BackoffRules
from pool_managerd.core.engines import startup_ms as startup_ms_of
from pool_managerd.core.lifecycle import Policy


def policy_for(
    config: Config, pool_id: str, pool: PoolConfig | None, node_id: str, submitted: PreparedEngine | None = None
) -> Policy:
    """The policy of one pool; ``pool`` is None for a ``submitted`` one, which follows the defaults and is not warmed up."""
    health, supervision, backoff = config.health, config.supervision, config.supervision.backoff
    engine = pool.engine if pool is not None else submitted.engine if submitted is not None else ""
    startup_ms = (pool.startup_timeout_ms if pool else None) or _startup_ms(health, engine)
    return Policy(
        startup_timeout_s=startup_ms / 1000,
        probe_gap_ms=health.interval_ms,
        probe_interval_s=health.probe_interval_ms / 1000,
        probe_timeout_s=health.probe_timeout_ms / 1000,
        failure_threshold=health.failure_threshold,
        stop_grace_ms=supervision.stop_grace_ms,
        vram_wait_s=config.gpu.vram_wait_ms / 1000,
        restart=(pool.restart if pool else None) or supervision.restart,
        warmup=config.lifecycle.warmup,
        fail_open=config.profile == "dev",
        backoff=BackoffRules(**backoff.model_dump()),
        seed=f"{node_id}:{pool_id}",
    )


def _startup_ms(health: HealthConfig, engine: str) -> int:
    """What was written; where nothing was, what engines of this kind need."""
    written = "startup_timeout_ms" in health.model_fields_set
    return health.startup_timeout_ms if written else startup_ms_of(engine, health.startup_timeout_ms)
