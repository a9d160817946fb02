"""What the runtime's tests share: a runtime directory with a launcher, scripted engines, waits with a deadline."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pool_managerd.core.artifacts import ExitRecord, PreparedEngine
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.runtime import procfs
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.launcher import Launcher, LaunchOptions
from pool_managerd.runtime.process import EngineProcess
from pool_managerd.runtime.spawner import Spawner
from pool_managerd.testing import fake_engine

DEADLINE_SECONDS = 10.0


async def eventually(condition: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until the condition holds; fails with its value when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def within(seconds: float, process: EngineProcess) -> ExitRecord:
    """The exit record, if it comes in time."""
    async with asyncio.timeout(seconds):
        return await process.wait()


def alive(pid: int) -> bool:
    """True while the process runs; a zombie does not."""
    found = procfs.stat(pid)
    return found is not None and found.state not in "ZX"


def sh(script: str, pool_id: str = "p", **more: Any) -> PreparedEngine:
    """An engine that is a shell script."""
    return PreparedEngine(pool_id, "/bin/sh", ("-c", script), **more)


def fake(*flags: str, pool_id: str = "p") -> PreparedEngine:
    """The scripted engine on a free port."""
    return PreparedEngine(pool_id, sys.executable, ("-I", "-S", fake_engine.__file__, *flags))


@dataclass
class Bench:
    """A launcher on a runtime directory of its own; ends every engine that it started."""

    root: Path
    spawner: Spawner
    started: list[EngineProcess] = field(default_factory=list)

    @property
    def files(self) -> RuntimeFiles:
        return RuntimeFiles(self.root)

    async def launch(
        self, engine: PreparedEngine, *, options: LaunchOptions | None = None, grace_ms: int = 2000, epoch: int = 1
    ) -> EngineProcess:
        launcher = Launcher(self.spawner, self.files, options or LaunchOptions(profile="dev"))
        process = await launcher.launch(engine, epoch=epoch, grace_ms=grace_ms)
        self.started.append(process)
        return process

    async def run(self, engine: PreparedEngine, **more: Any) -> ExitRecord:
        return await within(DEADLINE_SECONDS, await self.launch(engine, **more))

    def log(self, pool_id: str = "p") -> bytes:
        path = self.files.log_path(InstanceId(pool_id))
        return path.read_bytes() if path.exists() else b""

    async def says(self, text: str, pool_id: str = "p") -> None:
        await eventually(lambda: text.encode() in self.log(pool_id))

    async def grandchildren(self, count: int, pool_id: str = "p") -> list[int]:
        await eventually(lambda: self.log(pool_id).count(b"grandchild ") == count)
        lines = self.log(pool_id).decode().splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith("grandchild ")]

    async def close(self) -> None:
        for process in self.started:
            process.close()
            if process.identity.shim_runs():
                end(process.identity.shim_pid, signal.SIGUSR1)
                end(process.identity.shim_pid, signal.SIGCONT)
        await self.spawner.close()
        await eventually(lambda: not any(p.identity.shim_runs() or p.identity.engine_runs() for p in self.started))


def end(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process that the test itself started."""
    assert pid > 1
    with suppress(ProcessLookupError):
        os.kill(pid, number)
