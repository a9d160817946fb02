"""The adapters of one daemon's life on a simulated machine: each does what its Protocol says, and ends with that life.

A daemon that is killed is cut off from machine and disk at that instant: whatever its tasks would still do on their way out
happens to copies that nobody looks at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import AnyEngine, AttachedEngine, ExitRecord, PreparedEngine, ResolvedModel
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.health import ProbeOutcome, ProbeResult
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import LaunchRecord, LeftEngine, record_of
from pool_managerd.core.listeners import NOBODY, OURS, Listener
from pool_managerd.errors import EngineError, NodeError, SpecError
from pool_managerd.testing.simulated_disk import SimulatedDisk
from pool_managerd.testing.simulated_machine import SimulatedEngine, SimulatedMachine
from pool_managerd.testing.timeline import Timeline
from pool_managerd.testing.virtual_loop import VirtualLoop

GOOD = ProbeResult(ProbeOutcome.SUCCESS)
FIRST_PORT = 8_080


class Life:
    """One daemon, from its start to its end: its loop, and the machine and the disk that it acts on."""

    def __init__(self, number: int, machine: SimulatedMachine, disk: SimulatedDisk, order: Random) -> None:
        self.number, self.machine, self.disk = number, machine, disk
        timeline = machine.timeline
        self.loop = VirtualLoop(lambda: timeline.now, order)
        self.alive = True

    def end(self) -> None:
        """It is killed: from here on nothing of it has any effect."""
        self.alive = False
        now = self.machine.timeline.now
        self.machine, self.disk = SimulatedMachine(Timeline(), Random(0)), SimulatedDisk()
        self.machine.timeline.now = now
        self.loop.end()

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it as a thread of the daemon would: not at all once it was killed."""
        self.machine.timeline.after(seconds, lambda: call() if self.alive else None)

    async def pass_time(self, low_s: float, high_s: float) -> None:
        """Something that takes a moment, outside of the loop."""
        await asyncio.sleep(self.machine.soon(low_s, high_s))


class SimulatedProcess:
    """A daemon's hold of an engine process, of one that it has adopted, too."""

    isolation = "none"
    notice: str | None = None

    def __init__(self, life: Life, engine: SimulatedEngine) -> None:
        self._life, self.engine = life, engine
        self.pid, self.shim_pid, self.nonce = engine.pid, engine.shim_pid, engine.nonce
        self._dead: asyncio.Future[None] = life.loop.create_future()
        self._record: asyncio.Future[ExitRecord] = life.loop.create_future()
        if engine.alive:
            engine.on_dead.append(lambda: life.loop.call_soon(self._note_death))
        else:
            self._note_death()
        if engine.exit is not None or not (engine.alive or engine.shim_alive):
            self._note_exit(engine.exit or ExitRecord())
        else:
            engine.on_exit.append(lambda record: life.loop.call_soon(self._note_exit, record))

    def _note_death(self) -> None:
        if not self._dead.done():
            self._dead.set_result(None)

    def _note_exit(self, record: ExitRecord) -> None:
        if not self._record.done():
            self._record.set_result(record)

    async def wait_dead(self) -> None:
        await asyncio.shield(self._dead)

    async def wait(self) -> ExitRecord:
        await asyncio.shield(self._dead)
        record = await asyncio.shield(self._record)
        self._life.machine.forget(self.engine)
        return record

    def stop(self, grace_ms: int) -> None:
        self._life.machine.stop(self.engine, grace_ms)

    def kill(self) -> None:
        self._life.machine.kill(self.engine)


class SimulatedLauncher:
    def __init__(self, life: Life, files: SimulatedFiles) -> None:
        self._life, self._files = life, files

    async def launch(
        self, engine: PreparedEngine, *, epoch: int, grace_ms: int, reserved_bytes: Mapping[str, int] | None = None,
        exclusive: bool = False, decided_at_ms: int | None = None,
    ) -> SimulatedProcess:  # fmt: skip
        life, machine = self._life, self._life.machine
        await life.pass_time(0.001, 0.03)
        trouble = machine.troubles(engine.pool_id)
        if trouble.spawns_fail > 0:
            trouble.spawns_fail -= 1
            raise EngineError("preload failed: cannot run /engine: no such file", hint="install it")
        now_ms = machine.timeline.wall_ms()
        record = record_of(
            engine, epoch=epoch, reserved_bytes=reserved_bytes or {}, log_mark=self._files.log_mark(engine.instance_id),
            decided_at_ms=now_ms if decided_at_ms is None else decided_at_ms, order_at_ms=now_ms, exclusive=exclusive,
        )  # fmt: skip
        ordered: asyncio.Future[SimulatedEngine] = life.loop.create_future()
        # The order is with the fork server: it is carried out whether or not the daemon lives to hear of it.
        machine.timeline.after(machine.soon(0.001, 0.01), _carry_out, machine, record, ordered, life)
        try:
            started = await ordered
        except asyncio.CancelledError:
            ordered.add_done_callback(lambda _: None)
            machine.timeline.after(0.02, _end_unwanted, machine, record)
            raise
        await life.pass_time(0.0, 0.005)
        return SimulatedProcess(life, started)

    async def forget(self, pool_id: str) -> None:
        """There are no files of a pool that stay behind it."""

    async def forget_others(self, pool_ids: Iterable[str]) -> None:
        """Nor of others."""


def _carry_out(
    machine: SimulatedMachine, record: LaunchRecord, ordered: asyncio.Future[SimulatedEngine], life: Life
) -> None:
    engine = machine.launch(record)
    if not ordered.done():
        life.loop.call_soon(_answer, ordered, engine)


def _answer(ordered: asyncio.Future[SimulatedEngine], engine: SimulatedEngine) -> None:
    if not ordered.done():
        ordered.set_result(engine)


def _end_unwanted(machine: SimulatedMachine, record: LaunchRecord) -> None:
    """A launch that was cancelled leaves nothing running."""
    for engine in machine.running(record.instance.pool_id):
        if engine.launch is record:
            machine.kill(engine)
            machine.forget(engine)


@dataclass(frozen=True)
class Ended:
    """What became of an engine that nobody adopts."""

    pool_id: str
    pid: int
    outcome: str = "killed"

    @property
    def human(self) -> str:
        return f"Engine of pool '{self.pool_id}' (pid {self.pid}) was left by an earlier daemon and was ended"


class SimulatedAdoption:
    def __init__(self, life: Life) -> None:
        self._life = life
        self._left: dict[str, LeftEngine] = {}
        self._engines: dict[str, SimulatedEngine] = {}
        self._others: list[SimulatedEngine] = []

    def find(self) -> None:
        machine = self._life.machine
        for engine in sorted(machine.engines.values(), key=lambda e: e.launch.epoch):
            if engine.exit is None and not engine.shim_alive and engine.alive:
                self._others.append(engine)
                continue
            if (older := self._engines.get(engine.pool_id)) is not None:
                self._others.append(older)
            ready = machine.handoffs.get(engine.launch.instance) == engine.pid
            launch = LaunchRecord.from_json(engine.launch.to_json())
            self._engines[engine.pool_id] = engine
            self._left[engine.pool_id] = LeftEngine(launch, engine.started_at, ready, engine.exit)

    def left(self) -> Mapping[str, LeftEngine]:
        return self._left

    def adopt(self, pool_id: str) -> SimulatedProcess:
        self._left.pop(pool_id, None)
        engine = self._engines.pop(pool_id, None)
        if engine is None:
            raise EngineError(f"cannot adopt an engine of pool {pool_id}: none was left", pool_id=pool_id)
        return SimulatedProcess(self._life, engine)

    def changed(self, launch: LaunchRecord) -> Sequence[str]:
        return ()

    async def clear(self, kept: Collection[str]) -> Sequence[Ended]:
        machine = self._life.machine
        for pool_id in sorted(self._engines.keys() - set(kept)):
            self._others.append(self._engines.pop(pool_id))
            del self._left[pool_id]
        others, self._others = self._others, []
        for engine in others:
            if engine.alive:
                machine.kill(engine)
        while any(engine.alive for engine in others):
            await asyncio.sleep(0.05)
        for engine in others:
            machine.forget(engine)
        spared = {left.launch.instance for left in self._left.values()}
        for files in (machine.pids, machine.handoffs):
            for instance in [instance for instance in files if instance not in spared]:
                del files[instance]
        return [Ended(engine.pool_id, engine.pid) for engine in others]


class SimulatedModels:
    def __init__(self, life: Life) -> None:
        self._life = life

    def id_of(self, ref: str) -> str:
        return ref

    async def ensure_present(
        self, ref: str, expected_digest: str | Sequence[str] | None = None, *, progress: Callable[[int, int], None] | None = None
    ) -> ResolvedModel:
        machine = self._life.machine
        trouble = machine.troubles(ref.removeprefix("file:").removesuffix(".gguf"))
        if trouble.staging_s:
            await asyncio.sleep(trouble.staging_s)
        else:
            await self._life.pass_time(0.0, 0.01)
        if trouble.stagings_fail > 0:
            trouble.stagings_fail -= 1
            if trouble.staging_retriable:
                raise NodeError(f"cannot read {ref}: the disk does not answer", code="NODE_UNAVAILABLE")
            raise SpecError(f"cannot find the model {ref}", hint="check the path")
        return ResolvedModel(ref, "/models/model.gguf", 1, None, verified=True)


class SimulatedEngines:
    """Ports from the bottom up, as the real one gives them."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.ports: dict[InstanceId, int] = {}

    async def prepare(
        self, pool: PoolConfig, model: ResolvedModel | None, allocation: Allocation | None = None
    ) -> PreparedEngine:
        await self._life.pass_time(0.0, 0.005)
        return PreparedEngine(
            pool.id, "/engine", port=self._claim(InstanceId(pool.id)), slots_total=pool.slots, engine_version="simulated-1",
            model_id=model.id if model else None, env=allocation.environment() if allocation else {},
            device_uuids=tuple(d.uuid for d in allocation.devices) if allocation else (),
        )  # fmt: skip

    def _claim(self, instance: InstanceId) -> int:
        machine, had = self._life.machine, self.ports.pop(instance, None)
        taken = set(self.ports.values()) | machine.strangers | {e.launch.port for e in machine.running()}
        candidates = [] if had is None else [had]
        port = next(p for p in (*candidates, *range(FIRST_PORT, FIRST_PORT + 1_000)) if p not in taken)
        self.ports[instance] = port
        return port

    def attach(self, pool: PoolConfig) -> AttachedEngine:
        return AttachedEngine(pool.id, pool.provisioning.url or "", slots_total=pool.slots)

    def claim(self, instance: InstanceId, port: int) -> None:
        self.ports[instance] = port

    def release(self, pool_id: str) -> None:
        self.ports.pop(InstanceId(pool_id), None)


class SimulatedFiles:
    def __init__(self, life: Life) -> None:
        self._life = life

    def write_pid(self, instance: InstanceId, pid: int) -> None:
        trouble = self._life.machine.troubles(instance.pool_id)
        if trouble.pid_unwritable > 0:
            trouble.pid_unwritable -= 1
            raise NodeError("cannot write to runtime directory /run: No space left on device", status=507)
        self._life.machine.pids[instance] = pid

    def remove_pid(self, instance: InstanceId) -> None:
        self._life.machine.pids.pop(instance, None)

    def write_handoff(self, engine: AnyEngine, pid: int, *, written_at_ms: int) -> Path:
        self._life.machine.handoffs[engine.instance_id] = pid
        return Path(f"/run/engines/{engine.pool_id}.json")

    def remove_handoff(self, instance: InstanceId) -> None:
        self._life.machine.handoffs.pop(instance, None)

    def tail_log(self, instance: InstanceId, max_bytes: int = 8192, max_lines: int = 20) -> list[str]:
        return self._log(instance)[-max_lines:]

    def log_mark(self, instance: InstanceId) -> dict[int, int]:
        return {1: len(self._log(instance))}

    def launch_log(self, instance: InstanceId, mark: Mapping[int, int]) -> list[str]:
        return self._log(instance)[mark.get(1, 0) :]

    def log_path(self, instance: InstanceId) -> Path:
        return Path(f"/run/logs/{instance.pool_id}.log")

    def _log(self, instance: InstanceId) -> list[str]:
        return self._life.machine.logs.get(instance, [])


class SimulatedProber:
    """Asks whoever listens on the port. ``fails`` of the next probes could not be sent at all."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.fails = 0

    async def probe(self, url: str, timeout_s: float) -> ProbeResult:
        port, machine = int(url.rpartition(":")[2].partition("/")[0]), self._life.machine
        await asyncio.sleep(machine.soon(0.0005, 0.004))
        if self.fails > 0:
            self.fails -= 1
            return ProbeResult(ProbeOutcome.DISCARDED, "could not be sent: no descriptor is free")
        if port in machine.strangers:
            return GOOD
        engine = machine.listening(port)
        if engine is None:
            return ProbeResult(ProbeOutcome.ERROR, "was refused")
        if engine.hung:
            await asyncio.sleep(timeout_s)
            return ProbeResult(ProbeOutcome.TIMEOUT, f"was not answered within {timeout_s:g} s")
        if machine.timeline.now < engine.ready_at:
            return ProbeResult(ProbeOutcome.ERROR, "answered 503")
        machine.answered[engine.pool_id, engine.launch.epoch] = machine.timeline.now
        return GOOD

    async def warm_up(self, engine: AnyEngine, timeout_s: float) -> tuple[float, float]:
        await self._life.pass_time(0.01, 0.2)
        port = int(engine.url.rpartition(":")[2])
        found = self._life.machine.listening(port)
        if found is None:
            raise OSError("connection refused")
        if found.hung:
            await asyncio.sleep(timeout_s)
            raise TimeoutError
        machine = self._life.machine
        machine.answered[found.pool_id, found.launch.epoch] = machine.timeline.now
        return 20.0, 50.0

    async def close(self) -> None:
        """There is nothing to close."""


class SimulatedListeners:
    def __init__(self, life: Life) -> None:
        self._life = life

    async def __call__(self, pid: int, host: str, port: int) -> Listener:
        machine = self._life.machine
        if port in machine.strangers:
            return Listener("other", "pid 666 (stranger)")
        engine = machine.listening(port)
        if engine is None:
            return NOBODY
        return OURS if engine.pid == pid else Listener("other", f"pid {engine.pid} (engine)")


class SimulatedMonitor:
    """``slow_s``: how long each look takes now."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._released = False
        self.slow_s = 0.0

    async def scan(self) -> DeviceScan:
        await asyncio.sleep(self.slow_s or self._life.machine.soon(0.002, 0.02))
        return self._life.machine.scan()

    async def release(self) -> None:
        self._released = True

    async def resume(self) -> None:
        self._released = False

    async def close(self) -> None:
        """There is nothing to close."""


@dataclass
class SimulatedHandoffs:
    """Watches for handoff files of engines that others run; there are none."""

    never: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        await self.never.wait()
