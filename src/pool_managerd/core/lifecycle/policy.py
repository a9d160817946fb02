"""The rules that steps decide by, built from the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from pool_managerd.core.backoff import BackoffRules
from pool_managerd.core.breaker import BreakerRules
from pool_managerd.core.restart_limit import RestartRules


@dataclass(frozen=True, slots=True)
class Policy:
    """Durations in seconds unless their name says otherwise. ``seed`` makes the jitter this pool's own."""

    startup_timeout_s: float = 120.0
    staging_stall_s: float = 600.0
    warmup_timeout_s: float = 30.0
    probe_gap_ms: int = 500
    probe_interval_s: float = 5.0
    probe_timeout_s: float = 2.0
    failure_threshold: int = 3
    drain_deadline_s: float = 30.0
    stop_grace_ms: int = 5_000
    kill_wait_s: float = 10.0
    vram_wait_s: float = 30.0
    adopt_timeout_s: float = 10.0
    sleep_timeout_s: float = 60.0
    restart: str = "on-failure"
    warmup: str = "before_ready"
    fail_open: bool = False
    port_retries: int = 3
    backoff: BackoffRules = field(default_factory=BackoffRules)
    breaker: BreakerRules = field(default_factory=BreakerRules)
    restart_limit: RestartRules = field(default_factory=RestartRules)
    seed: str = ""

    @property
    def fresh_s(self) -> float:
        """How old a good probe may be for ``ready`` to be believed."""
        return self.failure_threshold * (self.probe_interval_s + self.probe_timeout_s) + self.probe_interval_s
