"""What the workers of a gateway have in common. A gateway of one process has it for itself."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field

from pool_managerd.gateway.beats import Beats
from pool_managerd.gateway.known_sessions import KnownSessions
from pool_managerd.gateway.siblings import Siblings
from pool_managerd.gateway.tally import Tally

WORKER = "worker"


def holders(gateway: int, worker: int = 0) -> str:
    """How the names begin that leases are held by: of each worker of that number of the gateway with that pid."""
    return f"gateway/{gateway}-{worker}-"


@dataclass(frozen=True, slots=True)
class Common:
    """``tally`` of what is limited, ``sessions`` and the pools that served them, ``siblings``: the other ``of`` - 1 workers.

    ``holders`` is how the name begins that this worker's leases are held by, and those of whoever had its number before.
    """

    tally: Tally = field(default_factory=Tally)
    sessions: KnownSessions = field(default_factory=KnownSessions)
    siblings: Siblings = field(default_factory=Siblings)
    holders: str = field(default_factory=lambda: holders(os.getpid()))
    worker: int = 0
    of: int = 1
    beats: Beats | None = None

    token: str = field(default_factory=lambda: secrets.token_hex(3))

    @property
    def holder(self) -> str:
        """What the node knows this worker by."""
        return self.holders + self.token

    def labels(self) -> dict[str, str]:
        """On the series of a worker that is not alone."""
        return {WORKER: str(self.worker)} if self.of > 1 else {}
