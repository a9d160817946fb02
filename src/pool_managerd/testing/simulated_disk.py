"""A disk that outlives its daemons: what is on it is there for the next one. While it ``fails`` nothing can be written."""

from __future__ import annotations

from dataclasses import dataclass, field

from pool_managerd.core.event import Event
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.registry import Lease


@dataclass
class SimulatedDisk:
    """What is on it. ``leases`` are those of this boot."""

    pools: dict[str, StoredPool] = field(default_factory=dict)
    facts: dict[tuple[str, str], str] = field(default_factory=dict)
    leases: dict[str, tuple[str, int, Lease]] = field(default_factory=dict)
    newest_leases: dict[str, str] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    operations: dict[str, str] = field(default_factory=dict)
    crashes: dict[str, str] = field(default_factory=dict)
    reserved_id: int = 0
    fails: bool = False
