"""Launching engines on a simulated machine, holding them, and taking over those that an earlier daemon has left."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pool_managerd.core.artifacts import AnyEngine, ExitRecord, PreparedEngine
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import LaunchRecord, LeftEngine, record_of
from pool_managerd.core.purge import Freed
from pool_managerd.errors import EngineError
from pool_managerd.testing.life import Life
from pool_managerd.testing.simulated_machine import SimulatedEngine, SimulatedMachine
from pool_managerd.testing.simulated_staging import SimulatedFiles


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

    def given(self) -> tuple[Mapping[str, str], Sequence[str]]:
        """What a simulated engine shows of its environment and command line."""
        return {}, list(self.engine.launch.argv) if self.engine.alive else []

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

    def check(self, engine: AnyEngine | None) -> None:
        """Whether it can be run is seen at its launch."""

    async def forget(self, pool_id: str) -> None:
        """There are no files of a pool that stay behind it."""

    async def forget_others(self, pool_ids: Iterable[str]) -> None:
        """Nor of others."""

    async def measure(self, pool_id: str, places: Collection[str]) -> list[Freed]:
        return []

    async def purge(self, pool_id: str, places: Collection[str]) -> list[Freed]:
        return []


def _carry_out(machine: SimulatedMachine, record: LaunchRecord, ordered: asyncio.Future[SimulatedEngine], life: Life) -> None:
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
        self._left: dict[InstanceId, LeftEngine] = {}
        self._engines: dict[InstanceId, SimulatedEngine] = {}
        self._others: list[SimulatedEngine] = []

    def find(self) -> None:
        machine = self._life.machine
        for engine in sorted(machine.engines.values(), key=lambda e: e.launch.epoch):
            if engine.exit is None and not engine.shim_alive and engine.alive:
                self._others.append(engine)
                continue
            instance = engine.launch.instance
            if (older := self._engines.get(instance)) is not None:
                self._others.append(older)
            ready = machine.handoffs.get(instance) == engine.pid
            launch = LaunchRecord.from_json(engine.launch.to_json())
            self._engines[instance] = engine
            self._left[instance] = LeftEngine(launch, engine.started_at, ready, engine.exit)

    def left(self) -> Mapping[InstanceId, LeftEngine]:
        return self._left

    def adopt(self, instance: InstanceId) -> SimulatedProcess:
        self._left.pop(instance, None)
        engine = self._engines.pop(instance, None)
        if engine is None:
            raise EngineError(f"cannot adopt an engine of {instance}: none was left", pool_id=instance.pool_id)
        return SimulatedProcess(self._life, engine)

    def changed(self, launch: LaunchRecord) -> Sequence[str]:
        return ()

    async def clear(self, kept: Collection[InstanceId]) -> Sequence[Ended]:
        machine = self._life.machine
        for instance in sorted(self._engines.keys() - set(kept)):
            self._others.append(self._engines.pop(instance))
            del self._left[instance]
        others, self._others = self._others, []
        for engine in others:
            if engine.alive:
                machine.kill(engine)
        for engine in others:
            await SimulatedProcess(self._life, engine).wait_dead()
        for engine in others:
            machine.forget(engine)
        spared = {left.launch.instance for left in self._left.values()}
        for files in (machine.pids, machine.handoffs):
            for instance in [instance for instance in files if instance not in spared]:
                del files[instance]
        return [Ended(engine.pool_id, engine.pid) for engine in others]
