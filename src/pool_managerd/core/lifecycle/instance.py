"""One engine process of a pool through all its starts, and the rules that its steps follow.

Times are monotonic seconds (``now`` is always an argument); durations carry their unit in the name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pool_managerd.core.backoff import BackoffRules


class Phase(StrEnum):
    """Where an instance is. ``down`` means: process reaped and its VRAM seen free."""

    DOWN = "down"
    STAGING = "staging"
    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    SLEEPING = "sleeping"
    WAKING = "waking"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    OPEN = "open"
    FAILED = "failed"
    ADOPTING = "adopting"
    ATTACHED = "attached"


RISING = frozenset({Phase.STAGING, Phase.STARTING, Phase.WARMING, Phase.WAKING, Phase.ADOPTING})
"""On the way to ready."""


class After(StrEnum):
    """What follows once a stop is complete."""

    STAY = "stay"
    START = "start"  # of the same launch again: a restart, or another port
    NEW_START = "new_start"  # somebody asked for a start while the stop was under way
    RECOVER = "recover"


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules that ``step`` decides by; built from the configuration."""

    startup_timeout_s: float = 120.0
    staging_stall_s: float = 600.0
    warmup_timeout_s: float = 30.0
    probe_gap_ms: int = 500
    probe_interval_s: float = 5.0
    probe_timeout_s: float = 2.0
    failure_threshold: int = 3
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
    seed: str = ""

    @property
    def fresh_s(self) -> float:
        """How old a good probe may be for ``ready`` to be believed."""
        return self.failure_threshold * (self.probe_interval_s + self.probe_timeout_s) + self.probe_interval_s


@dataclass(frozen=True, slots=True)
class Instance:
    """One engine process of a pool, through all its starts. Every launch bumps ``epoch``.

    ``deadline`` and ``next_probe_at`` are the only alarms. ``failures`` counts failures in a row (for backoff),
    ``crash_count`` all crashes. ``launched_at`` is when the start was decided, ``started_at`` when the latest process
    began to run. ``asked``: the stop was our wish. ``held``, ``quarantined`` and ``hung`` stand beside the phase;
    ``owed`` remembers that a start was due when one of them stood in its way. While stopping, ``reaped`` means that the
    process is dead, ``vram_pending`` that its exit is recorded and its GPU memory not yet seen free.
    """

    pool_id: str
    replica_id: str = "r0"
    epoch: int = 0
    phase: Phase = Phase.DOWN
    since: float = 0.0
    deadline: float | None = None
    # probing
    next_probe_at: float | None = None
    probe_sent_at: float | None = None
    probe_failures: int = 0
    probe_reason: str = ""
    last_good_at: float | None = None
    # the process
    has_process: bool = False
    external: bool = False
    uses_gpus: bool = False
    warmed: bool = False
    warmable: bool = True
    # flags beside the phase
    held: bool = False
    quarantined: bool = False
    hung: bool = False
    owed: bool = False
    drained: bool = False
    # history
    retry: bool = True
    failures: int = 0
    crash_count: int = 0
    restart_count: int = 0
    port_conflicts: int = 0
    launched_at: float | None = None
    started_at: float | None = None
    ready_since: float | None = None
    reason: str | None = None
    last_error: str | None = None
    # stopping
    after: After = After.STAY
    fell_from: Phase | None = None
    asked: bool = False
    reaped: bool = False
    vram_pending: bool = False
    killed: bool = False
    pending_error: str | None = None
    # draining
    drain_since: float | None = None
    drain_leases: int = 0
    force_stopped: bool = False
