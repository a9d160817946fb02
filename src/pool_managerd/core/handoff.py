"""An engine that somebody else runs, as a handoff file announces it (SPEC §12)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Handoff:
    """What one file says about an engine that somebody else runs. Nothing in it is verified yet."""

    pool_id: str
    replica_id: str
    url: str
    engine: str
    engine_version: str | None
    device_mask: str | None
    slots_total: int | None
    slots_free: int | None
    model_path: str | None
    pid: int | None
    path: str
