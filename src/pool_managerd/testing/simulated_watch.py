"""How a daemon sees the engines and the GPUs of a simulated machine: probes, sockets, what processes use, scans."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from pool_managerd.core.artifacts import AnyEngine
from pool_managerd.core.bench import TimedAnswer
from pool_managerd.core.engines import CounterNames
from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.health import Counters, ProbeOutcome, ProbeResult
from pool_managerd.core.listeners import NOBODY, OURS, Listener
from pool_managerd.core.question import Question
from pool_managerd.testing.life import Life
from pool_managerd.testing.simulated_machine import SimulatedEngine

GOOD = ProbeResult(ProbeOutcome.SUCCESS)
LATE_S = 0.25
SLOW_ANSWERS = 0.02
TROUBLED_SLEEP = 0.08
NEVER_S = 3_600.0
LOADED_PER_S = 1 << 30


class SimulatedProber:
    """Asks whoever listens on the port. ``fails`` of the next probes could not be sent at all."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.fails = 0

    async def probe(self, url: str, timeout_s: float) -> ProbeResult:
        began = self._life.machine.timeline.now
        result = await self._ask(url, timeout_s)
        if self._life.machine.timeline.now - began > timeout_s + LATE_S:
            return ProbeResult(ProbeOutcome.DISCARDED, "could not be judged: the daemon itself stood")
        return result

    async def _ask(self, url: str, timeout_s: float) -> ProbeResult:
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
        if engine.hung or engine.busy:
            await asyncio.sleep(timeout_s)
            return ProbeResult(ProbeOutcome.TIMEOUT, f"had no answer within {timeout_s:g} s")
        if machine.timeline.now < engine.ready_at:
            return ProbeResult(ProbeOutcome.ERROR, "answered 503")
        machine.answered[engine.pool_id, engine.launch.epoch] = machine.timeline.now
        if machine.chance.random() < SLOW_ANSWERS:  # it may be heard of when its engine is gone
            await asyncio.sleep(machine.soon(0.0, timeout_s * 0.9))
        return GOOD

    async def counters(self, url: str, names: CounterNames, timeout_s: float) -> Counters | None:
        """A simulated engine tells nothing of its work."""
        return None

    async def ask(self, url: str, question: Question) -> Any:
        """About its sleep: slots are not asked for over HTTP here."""
        port, machine = int(url.rpartition(":")[2]), self._life.machine
        await self._life.pass_time(0.001, 0.01)
        engine = machine.listening(port)
        if engine is None:
            raise OSError("connection refused")
        if engine.hung or engine.busy:
            await asyncio.sleep(NEVER_S)
        if question.path == "/is_sleeping":
            return {"is_sleeping": engine.asleep}
        if machine.chance.random() < TROUBLED_SLEEP:
            raise ValueError("the engine answered 500: CUDA error")
        frees = machine.chance.random() >= TROUBLED_SLEEP
        await self._life.pass_time(0.05, 4.0)
        if not engine.alive:
            raise OSError("connection reset")
        machine.wake(engine) if question.path == "/wake_up" else machine.put_to_sleep(engine, frees=frees)
        return None

    async def prime(self, engine: AnyEngine, prompt: str, timeout_s: float) -> float:
        return (await self.warm_up(engine, timeout_s))[0]

    async def complete(self, engine: AnyEngine, prompt: str, timeout_s: float) -> str:
        await self.warm_up(engine, timeout_s)
        return "four"

    async def warm_up(self, engine: AnyEngine, timeout_s: float) -> tuple[float, float]:
        await self._life.pass_time(0.01, 0.2)
        port = int(engine.url.rpartition(":")[2])
        found = self._life.machine.listening(port)
        if found is None:
            raise OSError("connection refused")
        if found.hung or found.busy:
            await asyncio.sleep(timeout_s)
            raise TimeoutError
        machine = self._life.machine
        machine.answered[found.pool_id, found.launch.epoch] = machine.timeline.now
        return 20.0, 50.0

    async def timed(self, engine: AnyEngine, prompt: str, tokens: int) -> TimedAnswer:
        first_ms, rate = await self.warm_up(engine, 60.0)
        return TimedAnswer(tuple(first_ms / 1000 + number / rate for number in range(tokens)), tokens)

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

    async def elsewhere(self, pid: int) -> list[str]:
        return []


@dataclass(frozen=True)
class SimulatedUsage:
    """What one engine uses."""

    cpu_s: float
    memory_bytes: int
    data_bytes: int | None = 0
    stopped: str = ""
    blocked: str = ""


class SimulatedUsages:
    """An engine uses the CPU while it loads or is busy; one that hangs stands still."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def reader(self, pid: int) -> SimulatedReader:
        return SimulatedReader(self._life, pid)

    def stuck(self, pid: int) -> str:
        return ""

    async def silent_clients(self, port: int) -> tuple[float, ...]:
        return ()


class SimulatedReader:
    def __init__(self, life: Life, pid: int) -> None:
        self._life, self._pid = life, pid

    async def read(self, *, full: bool) -> SimulatedUsage | None:
        engine: SimulatedEngine | None = self._life.machine.engines.get(self._pid)
        if engine is None or not engine.alive:
            return None
        now = self._life.machine.timeline.now
        loaded_s = min(now, engine.ready_at) - engine.started_at if engine.ready_at < float("inf") else 0.0
        worked_s = loaded_s + (now - engine.started_at if engine.busy else 0.0)
        return SimulatedUsage(worked_s, round(loaded_s * LOADED_PER_S))


class SimulatedMonitor:
    """The machine's GPUs, as its driver tells of them."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._released = False

    async def scan(self) -> DeviceScan:
        await asyncio.sleep(self._life.machine.slow_scan_s or self._life.machine.soon(0.002, 0.02))
        return self._life.machine.scan()

    async def release(self) -> None:
        self._released = True

    async def resume(self) -> None:
        self._released = False

    async def close(self) -> None:
        """There is nothing to close."""
