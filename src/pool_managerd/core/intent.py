"""What somebody wants of a pool, as it survives the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StoredPool:
    """``desired`` is up, down, auto: as configured, or known: registered by a request, with no engine to run.

    ``submitted`` is the engine of a pool that a request created.
    """

    pool_id: str
    desired: str = "auto"
    held: bool = False
    submitted: Mapping[str, Any] | None = None
    crash_count: int = 0
    restart_count: int = 0
