"""What supervision needs of the layers below: small Protocols, implemented by adapters that only the node wires."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import AnyEngine, AttachedEngine, ExitRecord, PreparedEngine, ResolvedModel
from pool_managerd.core.event import Event
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.health import ProbeResult
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import LaunchRecord, LeftEngine
from pool_managerd.core.listeners import Listener
from pool_managerd.core.preflight import Report


class Timer(Protocol):
    """A call that is due later and can be taken back."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Time as an argument: ``monotonic`` decides, ``wall_ms`` is only shown, ``call_at`` calls at a monotonic second."""

    def monotonic(self) -> float: ...
    def wall_ms(self) -> int: ...
    def call_at(self, when: float, call: Callable[[], None]) -> Timer: ...


class Process(Protocol):
    """One running engine process. ``nonce`` is in the environment of what descends from it, as long as that leaves it there.

    Descendants whose parent has ended become children of ``shim_pid``.
    """

    pid: int
    shim_pid: int
    nonce: str
    isolation: str

    @property
    def notice(self) -> str | None: ...

    async def wait_dead(self) -> None: ...
    async def wait(self) -> ExitRecord: ...
    def stop(self, grace_ms: int) -> None: ...
    def kill(self) -> None: ...


class Emit(Protocol):
    """Tell something that happened to the pool."""

    def __call__(self, type_: str, human: str, *, level: str = "info", **fields: Any) -> None: ...


class Launcher(Protocol):
    async def launch(
        self, engine: PreparedEngine, *, epoch: int, grace_ms: int, reserved_bytes: Mapping[str, int] = ...,
        exclusive: bool = False, decided_at_ms: int | None = None,
    ) -> Process: ...  # fmt: skip
    async def forget(self, pool_id: str) -> None: ...
    async def forget_others(self, pool_ids: Iterable[str]) -> None: ...


class Adoption(Protocol):
    """The engines that an earlier daemon has left. ``adopt`` raises EngineError when the pool has left none."""

    def left(self) -> Mapping[str, LeftEngine]: ...
    def adopt(self, pool_id: str) -> Process: ...
    def changed(self, launch: LaunchRecord) -> Sequence[str]: ...
    async def clear(self, kept: Collection[str]) -> Sequence[Ended]: ...


class Ended(Protocol):
    """What became of an engine that was left and that nobody adopts; ``human`` says it in a sentence."""

    @property
    def pool_id(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def outcome(self) -> str: ...
    @property
    def human(self) -> str: ...


class Models(Protocol):
    def id_of(self, ref: str) -> str: ...
    async def ensure_present(
        self, ref: str, expected_digest: str | Sequence[str] | None = None, *, progress: Callable[[int, int], None] | None = None
    ) -> ResolvedModel: ...


class Engines(Protocol):
    async def prepare(
        self, pool: PoolConfig, model: ResolvedModel | None, allocation: Allocation | None = None
    ) -> PreparedEngine: ...
    def attach(self, pool: PoolConfig) -> AttachedEngine: ...
    def claim(self, instance: InstanceId, port: int) -> None: ...
    def release(self, pool_id: str) -> None: ...


class Files(Protocol):
    """Pid, handoff and log files (SPEC §12)."""

    def write_pid(self, instance: InstanceId, pid: int) -> None: ...
    def remove_pid(self, instance: InstanceId) -> None: ...
    def write_handoff(self, engine: AnyEngine, pid: int, *, written_at_ms: int) -> Path: ...
    def remove_handoff(self, instance: InstanceId) -> None: ...
    def tail_log(self, instance: InstanceId, max_bytes: int = ..., max_lines: int = ...) -> list[str]: ...
    def log_mark(self, instance: InstanceId) -> dict[int, int]: ...
    def launch_log(self, instance: InstanceId, mark: Mapping[int, int]) -> list[str]: ...


class Prober(Protocol):
    async def probe(self, url: str, timeout_s: float) -> ProbeResult: ...
    async def warm_up(self, engine: AnyEngine, timeout_s: float) -> tuple[float, float]: ...


class ListenerLookup(Protocol):
    """Whose socket listens where the engine ``pid`` should: its own or a descendant's, or another's."""

    async def __call__(self, pid: int, host: str, port: int) -> Listener: ...


class DeviceMonitor(Protocol):
    """Sees the GPUs. ``scan`` never raises: what goes wrong is in the scan."""

    async def scan(self) -> DeviceScan: ...
    async def release(self) -> None: ...
    async def resume(self) -> None: ...


class Preflight(Protocol):
    """Whether this machine can run a pool at all. Raises NodeError GPU_REQUIRED or PREFLIGHT_FAILED."""

    async def __call__(self, pool_id: str) -> Report: ...


class Facts(Protocol):
    """Facts learnt about this machine, by kind and key; ``note_fact`` does not wait for the disk. None forgets."""

    def facts(self, kind: str) -> dict[str, dict[str, Any]]: ...
    async def put_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None: ...
    def note_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None: ...


class LeaseKeeper(Protocol):
    """Keeps leases for the next daemon of this boot. ``kept`` returns when all changes so far are; raises NodeError."""

    async def kept(self) -> None: ...


class Journal(Protocol):
    """Keeps events and operations for the next daemon. Writes are queued, never waited for; nothing raises."""

    last_id: int

    def open(self, tell: Callable[[str, str], None]) -> None: ...
    def recall_events(self) -> list[Event]: ...
    def recall_operations(self) -> list[dict[str, Any]]: ...
    def put_event(self, event: Event) -> None: ...
    def drop_events(self, up_to_id: int) -> None: ...
    def put_operation(self, operation_id: str, body: Mapping[str, Any] | None) -> None: ...


class Records(Protocol):
    """Durable counters and facts; writes are queued, never waited for."""

    def facts(self, kind: str) -> dict[str, dict[str, Any]]: ...
    def note_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None: ...
    def note_counters(self, pool_id: str, crash_count: int, restart_count: int) -> None: ...
