"""Everything that a pool's actor works with, in one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pool_managerd.core.baselines import Baselines
from pool_managerd.core.registry import Registry
from pool_managerd.supervision.boot_gate import BootGate
from pool_managerd.supervision.epochs import Epochs
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.gpu.admission import Admission
from pool_managerd.supervision.gpu.pool_gpus import Gpus
from pool_managerd.supervision.protocols import (
    Clock,
    Engines,
    Files,
    Launcher,
    ListenerLookup,
    Models,
    Preflight,
    Prober,
    Records,
)  # fmt: skip


@dataclass(frozen=True)
class Services:
    """Adapters and shared state. ``gate`` bounds how many pools load at boot; ``on_fatal`` ends the daemon.

    ``silent`` are the pools whose engine is external and did not answer its last probe.
    """

    clock: Clock
    registry: Registry
    events: EventLog
    epochs: Epochs
    baselines: Baselines
    launcher: Launcher
    models: Models
    engines: Engines
    files: Files
    prober: Prober
    listener: ListenerLookup
    records: Records
    gate: BootGate
    preflight: Preflight
    gpus: Gpus
    admission: Admission
    node_id: str
    on_fatal: Callable[[BaseException], None]
    silent: set[str] = field(default_factory=set)
