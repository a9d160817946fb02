"""A machine that outlives its daemons: engine processes under their shims, GPUs, ports and files, all of it in memory.

Faults are set here before they strike (``Troubles``), or done to it as they happen. What it draws by chance are short times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random

from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.core.gpu.devices import DeviceProcess, DeviceScan, DeviceSnapshot, ScanProblem
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import LaunchRecord
from pool_managerd.testing.timeline import Timeline

PORT_TAKEN = "E srv  start: couldn't bind HTTP server socket, hostname: 127.0.0.1: Address already in use"


@dataclass
class Troubles:
    """What goes wrong with the next launches of one pool, and with engines of it that end. Numbers are of launches.

    ``crash_s``: they end by themselves so long after they began, with ``crash_code``. ``load_s``: they take so long to load.
    ``vram_late_s``: how long an ended engine's memory stays. ``unkillable_s``: how long SIGKILL takes.
    """

    spawns_fail: int = 0
    stagings_fail: int = 0
    staging_retriable: bool = True
    staging_s: float = 0.0
    crashes: int = 0
    crash_s: float = 1.0
    crash_code: int = 1
    load_s: float = 0.0
    never_ready: int = 0
    port_taken: int = 0
    ignores_term: bool = False
    vram_late_s: float = 0.0
    unkillable_s: float = 0.0
    pid_unwritable: int = 0


@dataclass(eq=False)
class SimulatedEngine:
    """One engine process, with its shim. ``exit`` is what the shim has written down; ``stopping``: it was told to end it.

    ``hung``: it stands still; ``busy``: it works, and answers nothing else; ``asleep``: it serves nobody.
    """

    launch: LaunchRecord
    pid: int
    started_at: float
    ready_at: float
    vram: Mapping[str, int]
    forked_by: int
    alive: bool = True
    shim_alive: bool = True
    hung: bool = False
    busy: bool = False
    asleep: bool = False
    stopping: bool = False
    exit: ExitRecord | None = None
    on_dead: list[Callable[[], object]] = field(default_factory=list)
    on_exit: list[Callable[[ExitRecord], object]] = field(default_factory=list)

    @property
    def pool_id(self) -> str:
        return self.launch.instance.pool_id

    @property
    def shim_pid(self) -> int:
        return self.pid + 1

    @property
    def nonce(self) -> str:
        return f"nonce-{self.pid}"


@dataclass
class SimulatedGpu:
    """``held`` is memory by pid, that of ended processes included. ``missing``: it has fallen off the bus."""

    index: int
    total_bytes: int
    foreign_bytes: int = 0
    error: str | None = None
    missing: bool = False
    held: dict[int, int] = field(default_factory=dict)

    @property
    def uuid(self) -> str:
        return f"GPU-{self.index:08d}"

    @property
    def used_bytes(self) -> int:
        return self.foreign_bytes + sum(self.held.values())


_LINE_BREAKS = 0.02


@dataclass
class Downloads:
    """How long it takes to fetch what was not there, in seconds by pool, and what is there by now: that outlives a daemon, and is
    not fetched again. ``moved_at`` is when something came last.
    """

    total_s: Mapping[str, float]
    seed: int
    done_s: dict[str, float] = field(default_factory=dict)
    moved_at: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._chance, self._breaks = Random(f"fetch {self.seed}"), _LINE_BREAKS

    def hurry(self) -> None:
        """What is left comes soon, and the line holds."""
        self._breaks = 0.0
        self.done_s = {pool_id: max(self.done_s.get(pool_id, 0.0), total_s - 15.0) for pool_id, total_s in self.total_s.items()}

    def left_s(self, pool_id: str) -> float:
        return self.total_s.get(pool_id, 0.0) - self.done_s.get(pool_id, 0.0)

    def brought(self, pool_id: str, seconds: float, now: float) -> bool:
        """So much more is there; False: the line breaks."""
        self.moved_at[pool_id] = now
        self.done_s[pool_id] = min(self.total_s[pool_id], self.done_s.get(pool_id, 0.0) + seconds)
        return self._chance.random() >= self._breaks


class SimulatedMachine:
    """``engines`` are those that run, and ended ones whose record is still there, by pid."""

    def __init__(self, timeline: Timeline, chance: Random, gpus: int = 0, gpu_bytes: int = 0) -> None:
        self.timeline, self.chance = timeline, chance
        self.engines: dict[int, SimulatedEngine] = {}
        self.gpus = [SimulatedGpu(index, gpu_bytes) for index in range(gpus)]
        self.scan_problem: ScanProblem | None = None
        self.slow_scan_s = 0.0
        self.attributable = True
        self.sleepers: frozenset[str] = frozenset()
        self.downloads = Downloads({}, 0)
        self._last_scan = DeviceScan()
        self.on_launch: Callable[[SimulatedEngine], None] = lambda engine: None
        self.daemon = 0
        """Which daemon runs now, by its number; 0 for none."""
        self.answered: dict[tuple[str, int], float] = {}
        """When an engine last answered a probe well, by pool and epoch: the truth that readiness is held against."""
        self.strangers: set[int] = set()
        self.saved_slots: set[str] = set()
        """Pools of whose slots there are files."""
        self.pids: dict[InstanceId, int] = {}
        self.handoffs: dict[InstanceId, int] = {}
        self.logs: dict[InstanceId, list[str]] = {}
        self._troubles: dict[str, Troubles] = {}
        self._next_pid = 4_000

    def troubles(self, pool_id: str) -> Troubles:
        return self._troubles.setdefault(pool_id, Troubles())

    def heal(self) -> None:
        """No fault is left to strike."""
        self._troubles.clear()
        self.strangers.clear()
        self.downloads.hurry()
        self.scan_problem, self.slow_scan_s = None, 0.0
        for gpu in self.gpus:
            gpu.error, gpu.missing, gpu.foreign_bytes = None, False, 0
        for engine in self.engines.values():
            engine.hung = engine.busy = False

    def soon(self, low_s: float, high_s: float) -> float:
        """A drawn time."""
        return low_s + (high_s - low_s) * self.chance.random()

    # --- processes ---

    def running(self, pool_id: str | None = None) -> list[SimulatedEngine]:
        """The engines that are alive, of one pool or of all."""
        return [e for e in self.engines.values() if e.alive and pool_id in (None, e.pool_id)]

    def launch(self, launch: LaunchRecord) -> SimulatedEngine:
        """A shim has its order: the engine runs from now on."""
        self._next_pid += 2
        trouble, now = self.troubles(launch.instance.pool_id), self.timeline.now
        load_s = trouble.load_s or self.soon(0.2, 5.0)
        engine = SimulatedEngine(launch, self._next_pid, now, now + load_s, dict(launch.reserved_bytes), self.daemon)
        self.engines[engine.pid] = engine
        self.on_launch(engine)
        for gpu in self.gpus:
            if gpu.uuid in engine.vram:
                gpu.held[engine.pid] = engine.vram[gpu.uuid] * 4 // 5
        if trouble.port_taken > 0 or launch.port in self.strangers:
            trouble.port_taken -= 1
            self.log(engine, PORT_TAKEN)
            self.timeline.after(self.soon(0.01, 0.2), self.end, engine, 1, None)
        elif trouble.crashes > 0:
            trouble.crashes -= 1
            self.log(engine, "E the simulated engine fails")
            self.timeline.after(trouble.crash_s, self.end, engine, trouble.crash_code, None)
        elif trouble.never_ready > 0:
            trouble.never_ready -= 1
            engine.ready_at = float("inf")
        return engine

    def log(self, engine: SimulatedEngine, line: str) -> None:
        self.logs.setdefault(engine.launch.instance, []).append(line)

    def end(self, engine: SimulatedEngine, code: int | None, signal: int | None) -> None:
        """The process ends now; its memory and its record follow."""
        if not engine.alive:
            return
        engine.alive = False
        trouble = self.troubles(engine.pool_id)
        self.timeline.after(trouble.vram_late_s or self.soon(0.0, 0.3), self._give_memory_back, engine)
        record = ExitRecord(code=code, signal=signal, stopped_by_us=engine.stopping)
        self.timeline.after(self.soon(0.0, 0.02), self._tell_end, engine, record)
        for told in engine.on_dead:
            told()

    def _give_memory_back(self, engine: SimulatedEngine) -> None:
        for gpu in self.gpus:
            gpu.held.pop(engine.pid, None)

    def _tell_end(self, engine: SimulatedEngine, record: ExitRecord) -> None:
        """The shim writes down how it ended; without one nobody knows."""
        if engine.shim_alive:
            engine.exit = record
        for told in engine.on_exit:
            told(record if engine.shim_alive else ExitRecord())

    def stop(self, engine: SimulatedEngine, grace_ms: int) -> None:
        """The stop ladder, which the shim carries out."""
        if not engine.shim_alive:
            return
        engine.stopping = True
        if not self.troubles(engine.pool_id).ignores_term:
            self.timeline.after(self.soon(0.005, 0.3), self.end, engine, 0, None)
        self.timeline.after(grace_ms / 1000, self.kill, engine)

    def kill(self, engine: SimulatedEngine) -> None:
        """SIGKILL, by the shim or by the daemon."""
        engine.stopping = True
        self.timeline.after(self.troubles(engine.pool_id).unkillable_s or self.soon(0.001, 0.01), self.end, engine, None, 9)

    def lose_shim(self, engine: SimulatedEngine) -> None:
        """It is killed. The fork server that has forked it kills the engine then; without one the engine goes on alone."""
        engine.shim_alive = False
        if engine.forked_by == self.daemon:
            self.kill(engine)

    def forget(self, engine: SimulatedEngine) -> None:
        """Its end was read."""
        self.engines.pop(engine.pid, None)

    def listening(self, port: int) -> SimulatedEngine | None:
        """Whose socket has the port: that of the engine which came first."""
        return next((e for e in self.engines.values() if e.alive and e.launch.port == port), None)

    # --- sleep ---

    def put_to_sleep(self, engine: SimulatedEngine, *, frees: bool) -> None:
        """It says that it sleeps, and ``frees`` its memory if all is well."""
        engine.asleep = True
        for gpu in self.gpus:
            if frees and engine.pid in gpu.held:
                gpu.held[engine.pid] //= 16

    def wake(self, engine: SimulatedEngine) -> None:
        """Whether there is room for it or not."""
        engine.asleep = False
        for gpu in self.gpus:
            if engine.pid in gpu.held:
                gpu.held[engine.pid] = engine.vram[gpu.uuid] * 4 // 5

    # --- GPUs ---

    def scan(self) -> DeviceScan:
        """What the driver tells now."""
        devices = tuple(self._seen(gpu) for gpu in self.gpus if not gpu.missing)
        scan = DeviceScan(devices, self.timeline.now, "570.86.15", "12.8")
        if not self.gpus:
            return replace(scan, problem=ScanProblem("nvml_unavailable", "there is no NVML library"))
        if self.scan_problem is not None:
            return replace(self._last_scan, taken_at=self.timeline.now, problem=self.scan_problem)
        self._last_scan = scan
        return scan

    def _seen(self, gpu: SimulatedGpu) -> DeviceSnapshot:
        return DeviceSnapshot(
            gpu.index, gpu.uuid, gpu.total_bytes, max(0, gpu.total_bytes - gpu.used_bytes), name="simulated",
            processes=tuple(self._listed(pid, held) for pid, held in gpu.held.items()) if self.attributable else (),
            error=gpu.error, pci_bus_id=f"00000000:{gpu.index + 1:02x}:00.0",
        )  # fmt: skip

    def _listed(self, pid: int, held: int) -> DeviceProcess:
        engine = self.engines.get(pid)
        if engine is None or not engine.alive:
            return DeviceProcess(pid, vram_bytes=held, ended=True)
        return DeviceProcess(pid, "engine", held, start_ticks=round(engine.started_at * 100), nonce=engine.nonce)
