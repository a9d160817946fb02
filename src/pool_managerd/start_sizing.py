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
from pool_managerd.core.fit import DeviceFraction, EngineSettings
from pool_managerd.core.model_shape import ModelShape
from pool_managerd.core.sizing import LaunchFacts
from pool_managerd.engines import vllm
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.errors import PoolError
from pool_managerd.models.provisioner import ModelProvisioner

MAX_SHAPES = 256
_BUILD = re.compile(r"(?:^|[-_ ])b(\d{2,6})(?!\w)", re.ASCII)


class StartSizer:
    """Reads the facts of a launch. Engines other than llama.cpp and models other than GGUF are sized by their files."""

    def __init__(self, config: Config, models: ModelProvisioner, engines: EngineProvisioner) -> None:
        self._overhead = config.gpu.overhead_mib << 20
        self._models, self._engines = models, engines
        self._shapes: dict[tuple[str, int, int], ModelShape | None] = {}

    async def __call__(self, pool: PoolConfig | None, submitted: PreparedEngine | None) -> LaunchFacts:
        """Raises PoolError for a model or flags that cannot be used; a submitted engine's are its own affair."""
        if submitted is not None:
            return await asyncio.to_thread(self._of_submitted, submitted)
        if pool is None:
            raise ValueError("a launch has a configuration or a submitted engine")
        return await asyncio.to_thread(self._of_configured, pool)

    def _of_configured(self, pool: PoolConfig) -> LaunchFacts:
        model = self._models.locate(pool.model)
        path, size = Path(model.local_path), model.size_bytes
        version, flags = self._engines.sizing_flags(pool, str(path))
        settings = vllm.settings_of(pool) if pool.engine == "vllm" else _with_files(flags, build_of(version))
        shape = self._shape_of(path)
        wanted = ",".join(pool.checksums)
        return LaunchFacts(version, wanted or _fingerprint(shape, size), settings, shape, size, self._overhead, pool.vram_bytes)

    def _shape_of(self, path: Path) -> ModelShape | None:
        """From the headers of a GGUF file, or of safetensors; None for any other model. Read once as long as it is unchanged."""
        info = path.stat()
        key = (str(path), info.st_mtime_ns, info.st_size)
        if key in self._shapes and not path.is_dir():
            return self._shapes[key]
        if len(self._shapes) >= MAX_SHAPES:
            self._shapes = {}
        found = self._shapes[key] = _read_shape(path)
        return found

    def _of_submitted(self, engine: PreparedEngine) -> LaunchFacts:
        shape, size = None, 0
        if engine.model_path is not None:
            try:
                size = Path(engine.model_path).stat().st_size
                shape = self._shape_of(Path(engine.model_path))
            except (OSError, PoolError):
                shape = None  # it runs verbatim: what cannot be read is only known less well
        settings: EngineSettings | DeviceFraction = EngineSettings()
        if engine.engine == "vllm":
            settings = vllm.submitted_settings(engine.flags)
        elif engine.engine == "llamacpp":
            settings = _with_files(engine.flags, build_of(engine.engine_version))
        return LaunchFacts(engine.engine_version, _fingerprint(shape, size), settings, shape, size, self._overhead)


# The readers are imported when they are first needed, in a thread: the node answers sooner.


def _read_shape(path: Path) -> ModelShape | None:
    """By what the file is, not by what it is called: blobs of model caches have no suffix."""
    from pool_managerd.models.gguf import is_gguf
    from pool_managerd.models.gguf_shape import read_gguf_shape
    from pool_managerd.models.safetensors_header import is_safetensors, read_safetensors_shape

    if is_gguf(str(path)) or path.suffix.lower() == ".gguf":
        return read_gguf_shape(str(path))
    return read_safetensors_shape(str(path)) if path.is_dir() or is_safetensors(str(path)) else None


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
        draft = _read_shape(Path(found.draft)) if found.draft else None
    return replace(found.settings, file_bytes=sum(map(_size, found.files)), draft=draft)


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _fingerprint(shape: ModelShape | None, size_bytes: int) -> str:
    """Tells models apart that were not hashed: what decides their memory is equal when this is."""
    return "shape:" + hashlib.blake2b(f"{shape!r}:{size_bytes}".encode(), digest_size=12).hexdigest()
