"""What the workers of a gateway have in common. A gateway of one process has it for itself."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field

from pool_managerd.gateway.known_sessions import KnownSessions
from pool_managerd.gateway.siblings import Siblings
from pool_managerd.gateway.tally import Tally

WORKER = "worker"


def _own_holder() -> str:
    return holder(os.getpid(), 0)


def holder(gateway: int, worker: int) -> str:
    """What the leases of a worker are held by: names of the gateway with that pid begin alike."""
    return f"gateway/{gateway}-{worker}-{secrets.token_hex(3)}"


@dataclass(frozen=True, slots=True)
class Common:
    """``tally`` of what is limited, ``sessions`` and the pools that served them, ``siblings``: the other ``of`` - 1 workers."""

    tally: Tally = field(default_factory=Tally)
    sessions: KnownSessions = field(default_factory=KnownSessions)
    siblings: Siblings = field(default_factory=Siblings)
    holder: str = field(default_factory=_own_holder)
    worker: int = 0
    of: int = 1

    def labels(self) -> dict[str, str]:
        """On the series of a worker that is not alone."""
        return {WORKER: str(self.worker)} if self.of > 1 else {}
