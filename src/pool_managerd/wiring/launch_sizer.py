"""What one start will need, read from its model's header and its engine's flags. Nothing is downloaded or spawned."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import NOT_FETCHED, PreparedEngine, ResolvedModel
from pool_managerd.core.memory.estimate import DeviceFraction, EngineSettings
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.engines.adapter import LaunchMemory
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.errors import PoolError
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.models.usable import size_of


class StartSizer:
    """Reads the facts of a launch: what its engine says of its memory, and what its model's header tells."""

    def __init__(self, config: Config, models: ModelProvisioner, engines: EngineProvisioner) -> None:
        self._overhead = config.gpu.overhead_mib << 20
        self._models, self._engines = models, engines

    async def __call__(self, pool: PoolConfig | None, submitted: PreparedEngine | None) -> LaunchInputs:
        """Raises PoolError for a model or flags that cannot be used; a submitted engine's are its own affair."""
        if submitted is not None:
            if submitted.model_path is None and not _names_files(self._engines.memory_of(submitted)):
                return self._of_submitted(submitted)  # nothing is read: no thread is needed
            return await asyncio.to_thread(self._of_submitted, submitted)
        if pool is None:
            raise ValueError("a launch has a configuration or a submitted engine")
        return await asyncio.to_thread(self._of_configured, pool)

    def _of_configured(self, pool: PoolConfig) -> LaunchInputs:
        model, fetched = self._model_of(pool)
        recipe = self._engines.size(pool, model)
        settings, size = self._with_files(recipe.memory), model.size_bytes
        shape = self._models.shapes.of(Path(model.local_path))
        key = ",".join(pool.checksums) or _fingerprint(shape, size)
        return LaunchInputs(recipe.program.version, key, settings, shape, size, self._overhead, pool.vram_bytes, fetched)

    def _model_of(self, pool: PoolConfig) -> tuple[ResolvedModel, bool]:
        """The pool's model, and whether it is here; where it is not, as its headers say that it will be."""
        try:
            return self._models.check(pool.model, pool.checksums), True
        except PoolError as problem:
            expected = self._models.expected(pool.model) if problem.code == NOT_FETCHED else None
            if expected is None:
                raise
            return expected, False

    def _of_submitted(self, engine: PreparedEngine) -> LaunchInputs:
        shape, size = None, 0
        if engine.model_path is not None:
            size = size_of(engine.model_path)
            with suppress(OSError, PoolError):  # it runs verbatim: what cannot be read is only known less well
                shape = self._models.shapes.of(Path(engine.model_path))
        settings = self._with_files(self._engines.memory_of(engine))
        return LaunchInputs(engine.engine_version, _fingerprint(shape, size), settings, shape, size, self._overhead)

    def _with_files(self, memory: LaunchMemory) -> EngineSettings | DeviceFraction:
        """The settings of a command line, with the sizes of what it loads beside the model. What cannot be read is nothing."""
        if isinstance(memory.settings, DeviceFraction):
            return memory.settings
        draft = None
        with suppress(PoolError, OSError):
            draft = self._models.shapes.of(Path(memory.draft)) if memory.draft else None
        return replace(memory.settings, file_bytes=sum(map(size_of, memory.files)), draft=draft)


def _names_files(memory: LaunchMemory) -> bool:
    return bool(memory.draft) or bool(memory.files)


def _fingerprint(shape: ModelShape | None, size_bytes: int) -> str:
    """Tells models apart that were not hashed: what decides their memory is equal when this is."""
    return "shape:" + hashlib.blake2b(f"{shape!r}:{size_bytes}".encode(), digest_size=12).hexdigest()
