"""The whole adapter of a made-up engine, as somebody would write it who adds one: it runs the scripted engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import ResolvedModel
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.memory.estimate import EngineSettings
from pool_managerd.engines.adapter import Host, LaunchMemory, Program, Recipe
from pool_managerd.engines.environment import pool_env
from pool_managerd.engines.flags import attempt
from pool_managerd.engines.programs import runnable
from pool_managerd.errors import PoolError
from pool_managerd.testing import fake_engine


class Parrot:
    def __init__(self, host: Host) -> None:
        self._host = host

    def recipe(self, pool: PoolConfig, mode: str, model: ResolvedModel) -> Recipe:
        python = runnable(self._host.config, pool)

        def flags(allocation: Allocation | None, port: int) -> tuple[str, ...]:
            return ("--port", str(port), "--parallel", str(pool.slots), "--model-id", model.id, *pool.provisioning.flags)

        program = Program((str(python), "-I", fake_engine.__file__), "parrot-1")
        return Recipe(program, dict(pool_env(pool, {})), flags, self.memory_of((), program.version))

    def problems(self, pool: PoolConfig, mode: str, model_path: str | None) -> tuple[PoolError, ...]:
        return attempt(partial(runnable, self._host.config, pool))

    def memory_of(self, flags: Sequence[str], version: str) -> LaunchMemory:
        return LaunchMemory(EngineSettings())


ADAPTER = Parrot
