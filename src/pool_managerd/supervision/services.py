"""Everything that a pool's actor works with, in one value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.baselines import Baselines
from pool_managerd.core.crash_diagnosis import Incident
from pool_managerd.core.demand.together import Together
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.gpu.kept_free import KeptFree
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import LaunchRecord
from pool_managerd.core.lifecycle.events import Event
from pool_managerd.core.memory.estimator import LaunchEstimator, LaunchInputs
from pool_managerd.core.registry import Registry
from pool_managerd.core.slot_cache import Restored
from pool_managerd.errors import PoolError
from pool_managerd.supervision.boot_gate import BootGate
from pool_managerd.supervision.crash_log import CrashLog
from pool_managerd.supervision.epochs import Epochs
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.histories import Histories
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import (
    Adoption,
    Clock,
    Emit,
    Engines,
    Files,
    Launcher,
    ListenerLookup,
    Models,
    Preflight,
    Prober,
    Records,
    UsageSource,
)  # fmt: skip


class Gpus(Protocol):
    """The GPUs, as pools need them."""

    def attach(self, pools: Callable[[], Iterable[Pool]], post: Callable[[Pool, Event], None]) -> None: ...
    def wake(self) -> None: ...
    def refresh(self) -> None: ...
    def incidents(self, uuids: Collection[str]) -> list[Incident]: ...
    def release(self, instance_id: InstanceId, epoch: int) -> None: ...
    def forget(self, pool_id: str) -> None: ...
    def load_of(self, uuids: Collection[str]) -> tuple[int | None, int]: ...
    def turn(self, uuids: Collection[str]) -> AbstractAsyncContextManager[object]: ...
    def shortfalls(self, gone: Collection[InstanceId] = ()) -> dict[str, KeptFree]: ...
    def on_kept_free(self, call: Callable[[], None]) -> None: ...
    async def wait_until_free(self, pool: Pool, epoch: int, deadline_s: float, emit: Emit) -> None: ...


class Sleepers(Protocol):
    """Engines that sleep to make room: the memory that they have left, and having it again."""

    async def leave(self, pool: Pool, epoch: int) -> bool: ...
    async def retake(self, pool: Pool) -> str | None: ...
    def has_left(self, pool: Pool) -> bool: ...
    def is_awake(self, pool: Pool) -> None: ...


class Admission(Protocol):
    """May a start go ahead, and on which GPUs. Raises PoolError where it may not."""

    together: Together

    @property
    def sleepers(self) -> Sleepers: ...
    async def admit(self, pool: Pool, epoch: int) -> tuple[Allocation | None, LaunchEstimator]: ...
    def restore_launch(self, launch: LaunchRecord) -> None: ...
    async def adopt(self, launch: LaunchRecord) -> Allocation | None: ...
    async def forecast(self, pool: Pool, inputs: LaunchInputs | None = None) -> tuple[str, tuple[str, ...]]: ...
    async def room_for(self, pool: Pool) -> None: ...
    async def trial(self, pool: Pool) -> Callable[[Collection[InstanceId]], PoolError | None]: ...
    def restore(self) -> None: ...
    def forget(self, pool_id: str) -> None: ...


class Sizer(Protocol):
    """Reads what a launch will need. Raises PoolError for what its configuration must change."""

    async def __call__(self, pool: PoolConfig | None, submitted: PreparedEngine | None) -> LaunchInputs: ...


class SlotKeeper(Protocol):
    """Keeps what engines have read over their stops. Neither raises for what goes wrong: that is told; nor takes longer than it
    may.
    """

    def launching(self, pool: Pool, emit: Emit) -> None: ...
    def unwanted(self, pool_id: str) -> AbstractContextManager[None]: ...
    async def save(self, pool: Pool, emit: Emit) -> None: ...
    async def restore(self, pool: Pool, emit: Emit) -> Restored: ...


@dataclass(frozen=True)
class Services:
    """Adapters and shared state. ``gate`` bounds how many pools load at boot; ``on_fatal`` ends the daemon.

    ``silent`` are the pools whose engine is external and did not answer its last probe.
    """

    clock: Clock
    registry: Registry
    events: EventLog
    crashes: CrashLog
    epochs: Epochs
    histories: Histories
    baselines: Baselines
    launcher: Launcher
    adoption: Adoption
    models: Models
    engines: Engines
    files: Files
    prober: Prober
    listener: ListenerLookup
    usages: UsageSource
    records: Records
    gate: BootGate
    preflight: Preflight
    gpus: Gpus
    admission: Admission
    sizer: Sizer
    slots: SlotKeeper
    node_id: str
    on_fatal: Callable[[BaseException], None]
    silent: set[str] = field(default_factory=set)
