"""What somebody wants of a pool, as it survives the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StoredPool:
    """``desired`` is up, down, or auto: as configured. ``submitted`` is the engine of a pool that a request created."""

    pool_id: str
    desired: str = "auto"
    held: bool = False
    submitted: Mapping[str, Any] | None = None
    crash_count: int = 0
    restart_count: int = 0
