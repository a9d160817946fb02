"""What one start will need, read from its model's header and its engine's flags. Nothing is downloaded or spawned."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.memory.estimate import DeviceFraction, EngineSettings
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.engines import vllm
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.errors import PoolError
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.models.shapes import read_shape

_BUILD = re.compile(r"(?:^|[-_ ])b(\d{2,6})(?!\w)", re.ASCII)


class StartSizer:
    """Reads the facts of a launch. Engines other than llama.cpp and models other than GGUF are sized by their files."""

    def __init__(self, config: Config, models: ModelProvisioner, engines: EngineProvisioner) -> None:
        self._overhead = config.gpu.overhead_mib << 20
        self._models, self._engines = models, engines

    async def __call__(self, pool: PoolConfig | None, submitted: PreparedEngine | None) -> LaunchInputs:
        """Raises PoolError for a model or flags that cannot be used; a submitted engine's are its own affair."""
        if submitted is not None:
            return await asyncio.to_thread(self._of_submitted, submitted)
        if pool is None:
            raise ValueError("a launch has a configuration or a submitted engine")
        return await asyncio.to_thread(self._of_configured, pool)

    def _of_configured(self, pool: PoolConfig) -> LaunchInputs:
        model = self._models.locate(pool.model)
        path, size = Path(model.local_path), model.size_bytes
        version, flags = self._engines.sizing_flags(pool, str(path))
        settings = vllm.settings_of(pool) if pool.engine == "vllm" else _with_files(flags, build_of(version))
        shape = self._models.shapes.of(path)
        wanted = ",".join(pool.checksums)
        return LaunchInputs(version, wanted or _fingerprint(shape, size), settings, shape, size, self._overhead, pool.vram_bytes)

    def _of_submitted(self, engine: PreparedEngine) -> LaunchInputs:
        shape, size = None, 0
        if engine.model_path is not None:
            try:
                size = Path(engine.model_path).stat().st_size
                shape = self._models.shapes.of(Path(engine.model_path))
            except (OSError, PoolError):
                shape = None  # it runs verbatim: what cannot be read is only known less well
        settings: EngineSettings | DeviceFraction = EngineSettings()
        if engine.engine == "vllm":
            settings = vllm.submitted_settings(engine.flags)
        elif engine.engine == "llamacpp":
            settings = _with_files(engine.flags, build_of(engine.engine_version))
        return LaunchInputs(engine.engine_version, _fingerprint(shape, size), settings, shape, size, self._overhead)


def build_of(version: str) -> int | None:
    """llama.cpp's build number in ``llamacpp-b9272-571d0d5`` or the like; None where it tells none."""
    found = _BUILD.search(version)
    return int(found[1]) if found else None


def _with_files(flags: Sequence[str], build: int | None = None) -> EngineSettings:
    """The settings of a command line, with the sizes of what it loads beside the model. What cannot be read counts nothing."""
    from pool_managerd.engines.llamacpp_memory import settings_of

    found = settings_of(flags, build=build)
    draft = None
    with suppress(PoolError):
        draft = read_shape(Path(found.draft)) if found.draft else None
    return replace(found.settings, file_bytes=sum(map(_size, found.files)), draft=draft)


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _fingerprint(shape: ModelShape | None, size_bytes: int) -> str:
    """Tells models apart that were not hashed: what decides their memory is equal when this is."""
    return "shape:" + hashlib.blake2b(f"{shape!r}:{size_bytes}".encode(), digest_size=12).hexdigest()
