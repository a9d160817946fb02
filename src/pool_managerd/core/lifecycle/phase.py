"""Where an instance is, and the sets of phases that anything is ever decided by. Said here once."""

from __future__ import annotations

from enum import StrEnum


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


P = Phase
IDLE = frozenset({P.DOWN, P.FAILED, P.BACKOFF, P.OPEN})
"""Nothing runs and nothing is under way; of ``failed`` a process or memory may be left that would not go."""
AFTER_FAILURE = frozenset({P.FAILED, P.BACKOFF, P.OPEN})
"""Where the last error says why nothing runs: a quarantine has its own place to be told."""
WAITING = frozenset({P.BACKOFF, P.OPEN})
"""A start is due at the deadline."""
LOADING = frozenset({P.STAGING, P.STARTING, P.WARMING})
"""A start is under way; it has its turn among those that load at boot."""
RISING = LOADING | {P.WAKING, P.ADOPTING}
"""On the way to ready."""
BEFORE_READY = LOADING | {P.ADOPTING}
"""An engine that ends here was never ready in this launch."""
SERVING = frozenset({P.READY, P.ATTACHED})
"""Requests may be in flight, and new leases are given while its probes are good."""
RUNNING = frozenset({P.STARTING, P.WARMING, P.READY, P.SLEEPING, P.WAKING, P.DRAINING})
"""A process of ours may end here without having been asked to."""
PROBED_AT_START = frozenset({P.STARTING, P.WAKING})
"""Probed often, and a probe that fails means: not yet."""
ENDING = frozenset({P.STOPPING, P.FAILED})
"""The process was told to end, or would not: there is nothing more to end."""
TRANSITIONAL = frozenset(Phase) - {P.DOWN, P.READY, P.SLEEPING, P.FAILED, P.ATTACHED}
"""Never for ever: each has a deadline."""
