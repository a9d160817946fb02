"""What a launch needs before it: the model, the prepared engine with its port, and the files in the runtime directory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import AnyEngine, AttachedEngine, PreparedEngine, ResolvedModel
from pool_managerd.core.crash_diagnosis import LaunchLog
from pool_managerd.core.engines import DEFAULT_ENGINE
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.model_keeping import Leftover, Limits, Stock, StoredModel
from pool_managerd.core.slot_cache import SlotSaving
from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.testing.life import Life

FIRST_PORT = 8_080
FETCH_PIECE_S = 10.0


def _pool_of(ref: str) -> str:
    return ref.removeprefix("file:").removesuffix(".gguf")


class SimulatedModels:
    def __init__(self, life: Life) -> None:
        self._life = life

    def id_of(self, ref: str) -> str:
        return ref

    async def foresee(self, ref: str, digests: Sequence[str] = (), *, fresh: bool = False) -> None:
        """No model has to be fetched."""

    async def fetch(
        self, ref: str, expected_digest: str | Sequence[str] | None = None, *,
        progress: Callable[[int, int], None] | None = None, checking: Callable[[int, int], None] | None = None,
        unpacking: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """What of it is there stays, however this ends."""
        pool_id, downloads = _pool_of(ref), self._life.machine.downloads
        total_s = downloads.total_s.get(pool_id, 0.0)
        while (left_s := downloads.left_s(pool_id)) > 0:
            piece_s = min(FETCH_PIECE_S, left_s)
            await asyncio.sleep(piece_s)
            whole = downloads.brought(pool_id, piece_s, self._life.machine.timeline.now)
            if progress is not None:
                progress(round(1000 * downloads.done_s[pool_id]), round(1000 * total_s))
            if not whole:
                raise NodeError(f"cannot fetch {ref}: the connection was lost", code="FETCH_FAILED", retriable=True)

    async def ensure_present(
        self, ref: str, expected_digest: str | Sequence[str] | None = None, *, progress: Callable[[int, int], None] | None = None
    ) -> ResolvedModel:
        machine = self._life.machine
        trouble = machine.troubles(_pool_of(ref))
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


class SimulatedShelf:
    """The cache of models of a node that fetches none."""

    def check_ref(self, ref: str) -> None:
        raise SpecError(f"cannot fetch {ref}: nothing is fetched here")

    async def cached(self) -> list[dict[str, Any]]:
        return []

    async def look(self, ref: str) -> dict[str, Any]:
        raise SpecError(f"cannot fetch {ref}: nothing is fetched here")

    async def rehash(self, ref: str, progress: Callable[[int, int], None]) -> dict[str, Any]:
        return {"ref": ref, "ok": True, "wrong": []}

    async def pin(self, ref: str, *, pinned: bool) -> None:
        """Nothing is there to be pinned."""

    async def stock(self, wanted: Collection[str], *, keep: bool) -> Stock:
        return Stock()

    async def remove(self, ref: str, since: float | None = None) -> int | None:
        return None

    async def sweep(self, leftover: Leftover) -> int:
        return 0

    async def need(self, refs: Collection[str]) -> None:
        """Nothing is there to be needed."""

    async def retire(self, models: Collection[StoredModel]) -> None:
        """Nor to be retired."""

    def fetching(self) -> Collection[str]:
        return ()

    def on_shortage(self, make_room: Callable[[Limits], Awaitable[str]]) -> None:
        """There is room enough."""

    async def elsewhere(self) -> list[dict[str, Any]]:
        return []

    async def used(self, ref: str) -> dict[str, Any] | None:
        return None

    def check_import(self, path: str, name: str | None, digests: Sequence[str]) -> str:
        raise SpecError(f"cannot import {path}: nothing is kept here")

    async def bring(
        self, path: str, name: str | None, digests: Sequence[str], progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        raise SpecError(f"cannot import {path}: nothing is kept here")


class SimulatedEngines:
    """Ports from the bottom up, as the real one gives them."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.ports: dict[InstanceId, int] = {}

    async def prepare(
        self, pool: PoolConfig, model: ResolvedModel | None, allocation: Allocation | None = None, replica_id: str = "r0"
    ) -> PreparedEngine:
        await self._life.pass_time(0.0, 0.005)
        sleeps = pool.id in self._life.machine.sleepers
        return PreparedEngine(
            pool.id, "/engine", replica_id=replica_id, port=self._claim(InstanceId(pool.id, replica_id)),
            slots_total=pool.slots, engine_version="simulated-1", model_id=model.id if model else None,
            env=allocation.environment() if allocation else {},
            device_uuids=tuple(d.uuid for d in allocation.devices) if allocation else (),
            slots=SlotSaving("/run/cache", {"model": pool.model}),
            engine="vllm" if sleeps else DEFAULT_ENGINE, flags=("--enable-sleep-mode",) if sleeps else (),
        )  # fmt: skip

    def _claim(self, instance: InstanceId) -> int:
        machine, had = self._life.machine, self.ports.pop(instance, None)
        taken = set(self.ports.values()) | machine.strangers | {e.launch.port for e in machine.running()}
        candidates = [] if had is None else [had]
        port: int = next(p for p in (*candidates, *range(FIRST_PORT, FIRST_PORT + 1_000)) if p not in taken)
        self.ports[instance] = port
        return port

    def attach(self, pool: PoolConfig) -> AttachedEngine:
        return AttachedEngine(pool.id, pool.provisioning.url or "", slots_total=pool.slots)

    def dialect(self, engine: PreparedEngine) -> None:
        """Nobody asks: `SimulatedSlots` does all of it."""

    async def obstacles(self, pool: PoolConfig, model_path: str | None) -> tuple[PoolError, ...]:
        """Nothing is in the way of a simulated engine; that takes a while to know."""
        await self._life.pass_time(0.0, 0.2)
        return ()

    def claim(self, instance: InstanceId, port: int) -> None:
        self.ports[instance] = port

    def release(self, pool_id: str) -> None:
        for instance in [instance for instance in self.ports if instance.pool_id == pool_id]:
            self.release_port(instance)

    def release_port(self, instance: InstanceId) -> None:
        self.ports.pop(instance, None)


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

    def are_there(self, instance: InstanceId) -> bool:
        return instance in self._life.machine.pids and instance in self._life.machine.handoffs

    def write_handoff(self, engine: AnyEngine, pid: int, *, written_at_ms: int) -> Path:
        self._life.machine.handoffs[engine.instance_id] = pid
        return Path(f"/run/engines/{engine.pool_id}.json")

    def remove_handoff(self, instance: InstanceId) -> None:
        self._life.machine.handoffs.pop(instance, None)

    def tail_log(self, instance: InstanceId, max_bytes: int = 8192, max_lines: int = 20) -> list[str]:
        return self._log(instance)[-max_lines:]

    def log_mark(self, instance: InstanceId) -> dict[int, int]:
        return {1: len(self._log(instance))}

    def launch_log(self, instance: InstanceId, mark: Mapping[int, int]) -> LaunchLog:
        lines = self._log(instance)[mark.get(1, 0) :]
        return LaunchLog(tuple(lines), tuple(range(len(lines))))

    def log_path(self, instance: InstanceId) -> Path:
        return Path(f"/run/logs/{instance.pool_id}.log")

    def _log(self, instance: InstanceId) -> list[str]:
        return self._life.machine.logs.get(instance, [])


@dataclass
class SimulatedHandoffs:
    """Watches for handoff files of engines that others run; there are none."""

    never: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        await self.never.wait()
