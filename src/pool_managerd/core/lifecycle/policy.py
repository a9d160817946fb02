"""The rules that steps decide by, built from the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from pool_managerd.core.activity import ActivityRules
from pool_managerd.core.backoff import BackoffRules
from pool_managerd.core.breaker import BreakerRules
from pool_managerd.core.restart_limit import RestartRules

SHORTEST_GAP_S = 3.0
"""However fast the probes: a loading engine is looked at once a second."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Durations in seconds unless their name says otherwise. ``seed`` makes the jitter this pool's own.

    ``startup_timeout_s`` is how long a load may stand still, ``startup_cap_s`` how long it may take at all (0: any time).
    ``sleep_timeout_s`` is how long an engine may take to fall asleep or to wake, ``sleep_cap_s`` how long that and its wait for
    others on its GPUs may.
    ``primes``: there is a prompt that the engine is to read before it is ready.
    """

    startup_timeout_s: float = 120.0
    staging_stall_s: float = 600.0
    warmup_timeout_s: float = 30.0
    save_timeout_s: float = 20.0
    restore_timeout_s: float = 60.0
    probe_gap_ms: int = 500
    probe_interval_s: float = 5.0
    probe_timeout_s: float = 2.0
    failure_threshold: int = 3
    drain_deadline_s: float = 30.0
    startup_cap_s: float = 3_600.0
    stall_s: float = 60.0
    busy_limit_s: float = 600.0
    stop_grace_ms: int = 5_000
    kill_wait_s: float = 10.0
    vram_wait_s: float = 30.0
    adopt_timeout_s: float = 10.0
    sleep_timeout_s: float = 60.0
    sleep_cap_s: float = 600.0
    restart: str = "on-failure"
    warmup: str = "before_ready"
    primes: bool = False
    fail_open: bool = False
    port_retries: int = 3
    backoff: BackoffRules = field(default_factory=BackoffRules)
    breaker: BreakerRules = field(default_factory=BreakerRules)
    restart_limit: RestartRules = field(default_factory=RestartRules)
    seed: str = ""

    @property
    def longest_probe_s(self) -> float:
        """A probe whose outcome comes later was held up by ourselves: we slept, or starved."""
        return 2 * (self.probe_interval_s + self.probe_timeout_s)

    @property
    def activity(self) -> ActivityRules:
        """How it is told whether the engine works."""
        between_s = max(self.probe_interval_s, self.probe_gap_ms / 1000) + self.probe_timeout_s
        return ActivityRules(self.stall_s, self.busy_limit_s, gap_s=max(SHORTEST_GAP_S, 2 * between_s))

    @property
    def fresh_s(self) -> float:
        """How old a good probe may be for ``ready`` to be believed."""
        return self.failure_threshold * (self.probe_interval_s + self.probe_timeout_s) + self.probe_interval_s
