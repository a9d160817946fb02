"""Fakes of what supervision needs, named by how they behave; each does what its Protocol says, in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import AnyEngine, AttachedEngine, ExitRecord, PreparedEngine, ResolvedModel
from pool_managerd.core.baselines import Baselines
from pool_managerd.core.crash_diagnosis import LaunchLog
from pool_managerd.core.engines import DEFAULT_ENGINE
from pool_managerd.core.event import Event
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.gpu.kept_free import FreeRules
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import LaunchRecord, LeftEngine
from pool_managerd.core.memory.estimate import EngineSettings
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.core.preflight import Report
from pool_managerd.core.registry import Registry
from pool_managerd.core.slot_cache import SlotSaving
from pool_managerd.core.slot_dialect import SlotDialect
from pool_managerd.errors import EngineError, PoolError
from pool_managerd.supervision.boot_gate import BootGate
from pool_managerd.supervision.crash_log import CrashLog
from pool_managerd.supervision.epochs import Epochs
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.gpu.admission import Admission, AdmissionRules
from pool_managerd.supervision.gpu.mask_gpus import MaskGpus
from pool_managerd.supervision.gpu.pool_gpus import Gpus
from pool_managerd.supervision.gpu.watch import GpuWatch, WatchSettings
from pool_managerd.supervision.gpu.yields import Yields
from pool_managerd.supervision.histories import Histories
from pool_managerd.supervision.protocols import Ended
from pool_managerd.supervision.services import Services
from pool_managerd.testing.fake_monitor import FakeMonitor
from pool_managerd.testing.fake_places import FakePlaces
from pool_managerd.testing.fake_slots import FakeSlots
from pool_managerd.testing.fake_watch import FakeListeners, FakeProber, FakeUsages
from pool_managerd.testing.manual_clock import ManualClock


class FakeProcess:
    """Runs until it is told to end. ``ignores_term`` makes only ``kill`` work; ``epoch`` is its launch's number."""

    epoch = 0
    isolation = "none"
    notice: str | None = None
    shim_pid = 0

    def __init__(self, pid: int, *, ignores_term: bool = False) -> None:
        self.pid = pid
        self.nonce = f"nonce-{pid}"
        self.signals: list[str] = []
        self.environment: dict[str, str] = {}
        self._ignores_term = ignores_term
        self._record: asyncio.Future[ExitRecord] = asyncio.get_running_loop().create_future()

    def given(self) -> tuple[dict[str, str], list[str]]:
        return self.environment, []

    async def wait_dead(self) -> None:
        await asyncio.shield(self._record)

    async def wait(self) -> ExitRecord:
        return await asyncio.shield(self._record)

    def stop(self, grace_ms: int) -> None:
        self.signals.append("term")
        if not self._ignores_term:
            self.end(ExitRecord(code=0, stopped_by_us=True))

    def kill(self) -> None:
        if self._record.done():
            return
        self.signals.append("kill")
        self.end(ExitRecord(signal=9, stopped_by_us=True))

    def end(self, record: ExitRecord) -> None:
        """The process ends by itself, or by somebody else's hand."""
        if not self._record.done():
            self._record.set_result(record)


class FakeLauncher(FakePlaces):
    """Starts fake processes; ``refuse`` makes every launch fail, ``refusals`` as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[FakeProcess] = []
        self.refuse: PoolError | None = None
        self.refusals: list[PoolError] = []
        self.ignores_term = False

    async def launch(
        self, engine: PreparedEngine, *, epoch: int, grace_ms: int, reserved_bytes: Mapping[str, int] | None = None,
        exclusive: bool = False, decided_at_ms: int | None = None,
    ) -> FakeProcess:  # fmt: skip
        if (refused := self.refuse or (self.refusals.pop(0) if self.refusals else None)) is not None:
            raise refused
        process = FakeProcess(4000 + len(self.processes), ignores_term=self.ignores_term)
        process.epoch = epoch
        self.processes.append(process)
        return process

    def check(self, engine: AnyEngine | None) -> None:
        """Anything can be run."""


class FakeAdoption:
    """Has what a test has left: engines, and the processes that go with them; without one, the adoption fails."""

    def __init__(self) -> None:
        self.engines: dict[InstanceId, LeftEngine] = {}
        self.processes: dict[InstanceId, FakeProcess] = {}
        self.changed_files: list[str] = []
        self.cleared: list[InstanceId] = []

    def left(self) -> Mapping[InstanceId, LeftEngine]:
        return self.engines

    def adopt(self, instance: InstanceId) -> FakeProcess:
        self.engines.pop(instance)
        if instance not in self.processes:
            raise EngineError(f"cannot adopt an engine of {instance}: none was left")
        return self.processes[instance]

    def changed(self, launch: LaunchRecord) -> Sequence[str]:
        return self.changed_files

    async def clear(self, kept: Collection[InstanceId]) -> Sequence[Ended]:
        self.cleared = sorted(self.engines.keys() - set(kept))
        return ()


class FakeModels:
    """Has every model at once; ``refuse`` makes it fail, ``stuck`` makes it never answer."""

    def __init__(self) -> None:
        self.refuse: PoolError | None = None
        self.stuck = False

    def id_of(self, ref: str) -> str:
        return ref

    async def foresee(self, ref: str, digests: Sequence[str] = (), *, fresh: bool = False) -> None:
        """No model has to be fetched."""

    async def fetch(
        self, ref: str, expected_digest: str | Sequence[str] | None = None, *,
        progress: Callable[[int, int], None] | None = None, checking: Callable[[int, int], None] | None = None,
        unpacking: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Every model is there."""

    async def ensure_present(
        self, ref: str, expected_digest: str | Sequence[str] | None = None, *, progress: Callable[[int, int], None] | None = None
    ) -> ResolvedModel:
        if self.stuck:
            await asyncio.get_running_loop().create_future()
        if self.refuse is not None:
            raise self.refuse
        return ResolvedModel(ref, "/models/model.gguf", 1, None)


class FakeEngines:
    """Prepares an engine for any pool that ``found`` says nothing of, with ``slots``: of ``kind``, with ``flags``."""

    def __init__(self) -> None:
        self.kind, self.flags = DEFAULT_ENGINE, tuple[str, ...]()
        self.slots: SlotSaving | None = None
        self.found: tuple[PoolError, ...] = ()

    async def prepare(
        self, pool: PoolConfig, model: ResolvedModel | None, allocation: Allocation | None = None, replica_id: str = "r0"
    ) -> PreparedEngine:
        return PreparedEngine(
            pool.id, "/engine", replica_id=replica_id, port=8080 + (replica_id != "r0"), slots_total=pool.slots,
            engine_version="fake-1", model_id=model.id if model else None, env=allocation.environment() if allocation else {},
            slots=self.slots, engine=self.kind, flags=self.flags,
            device_uuids=() if allocation is None else tuple(device.uuid for device in allocation.devices),
        )  # fmt: skip

    def dialect(self, engine: PreparedEngine) -> SlotDialect | None:
        return None

    def attach(self, pool: PoolConfig) -> AttachedEngine:
        return AttachedEngine(pool.id, pool.provisioning.url or "", slots_total=pool.slots)

    async def obstacles(self, pool: PoolConfig, model_path: str | None) -> tuple[PoolError, ...]:
        return self.found

    def claim(self, instance: InstanceId, port: int) -> None:
        """Nobody else asks for ports."""

    def release(self, pool_id: str) -> None:
        """There are none."""

    def release_port(self, instance: InstanceId) -> None:
        """There are none."""


class FakeFiles:
    """Remembers which files there would be, and in which order they came and went."""

    def __init__(self) -> None:
        self.pids: dict[InstanceId, int] = {}
        self.handoffs: set[InstanceId] = set()
        self.history: list[str] = []
        self.log: list[str] = []

    def write_pid(self, instance: InstanceId, pid: int) -> None:
        self.pids[instance] = pid
        self.history.append(f"pid {pid}")

    def remove_pid(self, instance: InstanceId) -> None:
        if self.pids.pop(instance, None) is not None:
            self.history.append("no pid")

    def are_there(self, instance: InstanceId) -> bool:
        return instance in self.pids and instance in self.handoffs

    def write_handoff(self, engine: AnyEngine, pid: int, *, written_at_ms: int) -> Path:
        self.handoffs.add(engine.instance_id)
        self.history.append("handoff")
        return Path("/run/engines/engine.json")

    def remove_handoff(self, instance: InstanceId) -> None:
        self.handoffs.discard(instance)

    def tail_log(self, instance: InstanceId, max_bytes: int = 8192, max_lines: int = 20) -> list[str]:
        return self.log[-max_lines:]

    def log_mark(self, instance: InstanceId) -> dict[int, int]:
        return {0: len(self.log)}

    def launch_log(self, instance: InstanceId, mark: Mapping[int, int]) -> LaunchLog:
        lines = self.log[mark.get(0, 0) :]
        return LaunchLog(tuple(lines), tuple(range(len(lines))))


class FakeRecords:
    """Counters and facts in memory."""

    def __init__(self) -> None:
        self.counters: dict[str, tuple[int, int]] = {}
        self.known: dict[str, dict[str, dict[str, Any]]] = {}

    def facts(self, kind: str) -> dict[str, dict[str, Any]]:
        return self.known.get(kind, {})

    async def put_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None:
        self.note_fact(kind, key, value)

    def note_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None:
        facts = self.known.setdefault(kind, {})
        facts.pop(key, None)
        if value is not None:
            facts[key] = dict(value)

    async def noted(self) -> None:
        """Memory does not wait."""

    def note_counters(self, pool_id: str, crash_count: int, restart_count: int) -> None:
        self.counters[pool_id] = (crash_count, restart_count)


class FakeNode:
    """All fakes together, and the Services made of them."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.events = EventLog(self.clock.wall_ms)
        self.crashes = CrashLog()
        self.registry = Registry(self.clock.wall_ms, salt="fake")
        self.launcher, self.models, self.engines = FakeLauncher(), FakeModels(), FakeEngines()
        self.adoption = FakeAdoption()
        self.files, self.prober, self.records = FakeFiles(), FakeProber(), FakeRecords()
        self.usages = FakeUsages()
        self.monitor = FakeMonitor(self.clock.monotonic)
        self.needs: dict[str, LaunchInputs] = {}
        self.ram_bytes = 64 << 30
        self.preflight_error: PoolError | None = None
        self.watch = GpuWatch(self.monitor, self.clock, self.events, self.records, WatchSettings(boot_id="boot"))
        self.free_rules = FreeRules()
        yields = Yields(self.watch, self.clock, self.events, self.records, lambda: self.free_rules)
        self.gpus = Gpus(self.watch, self.registry, self.clock, MaskGpus(self.records), yields)
        self.admission = Admission(self.gpus, self.size, lambda: self.ram_bytes, self.records, AdmissionRules(cpu_allowed=True))
        self.histories, self.slots = Histories(self.records, "boot"), FakeSlots()
        self.fatal: list[BaseException] = []
        self.told: list[Event] = []
        self.events.listen(self.told.append)

    def services(self, **changes: Any) -> Services:
        parts: dict[str, Any] = {
            "clock": self.clock, "registry": self.registry, "events": self.events, "crashes": self.crashes,
            "epochs": Epochs(self.records), "histories": self.histories, "baselines": Baselines(),
            "launcher": self.launcher, "adoption": self.adoption, "models": self.models, "engines": self.engines,
            "files": self.files, "prober": self.prober, "usages": self.usages, "listener": FakeListeners(),
            "records": self.records, "gate": BootGate(1), "preflight": self.preflight,
            "gpus": self.gpus, "admission": self.admission, "sizer": self.size,
            "slots": self.slots, "node_id": "node", "on_fatal": self.fatal.append,
        }  # fmt: skip
        return Services(**{**parts, **changes})

    async def preflight(self, pool_id: str) -> Report:
        """Nothing stands in the way, unless a test says so."""
        if self.preflight_error is not None:
            raise self.preflight_error
        return Report("dev", ())

    async def size(self, pool: PoolConfig | None, submitted: PreparedEngine | None) -> LaunchInputs:
        """What ``needs`` says by pool id; a pool that it does not name needs nothing."""
        pool_id = submitted.pool_id if submitted is not None else pool.id if pool is not None else ""
        return self.needs.get(pool_id, LaunchInputs("fake-1", pool_id, EngineSettings(), overhead_bytes=0))

    def types(self, *, journal: bool = True) -> list[str]:
        """The types of all events so far."""
        return [event.type for event in self.told if event.journal or not journal]


def no_binary() -> EngineError:
    """What a launcher says of a binary that is not there."""
    return EngineError("preload failed: cannot run /engine: no such file", hint="install it")
