"""From a pool and its model to a PreparedEngine: argv, environment, port. Prepares only; it never starts an engine."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import AttachedEngine, PreparedEngine, ResolvedModel
from pool_managerd.core.engines import ENGINES
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.memory.estimate import EngineSettings
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.core.narration import count
from pool_managerd.core.slot_dialect import SlotDialect
from pool_managerd.engines.adapter import Adapter, Host, LaunchMemory, Recipe, adapter_of
from pool_managerd.engines.environment import device_env
from pool_managerd.engines.flags import attempt
from pool_managerd.engines.modes import attach_url, mode_of, require_mode
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.engines.programs import ProgramProbe, Run, binary_path, package_version
from pool_managerd.errors import EngineError, PoolError, SpecError

_GPU_NODES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/dev/dxg"), Path("/dev/kfd"))


def gpu_present() -> bool:
    """True when this machine shows a GPU at all. Whether it works is for discovery to say."""
    return any(path.exists() for path in _GPU_NODES)


class EngineProvisioner:
    """Prepares engines of configured pools. ``check_model`` reads a GGUF model's header, or refuses it (a PoolError).

    ``run`` runs a configured binary to ask it for its flags; without it none is run.
    """

    def __init__(
        self,
        config: Config,
        ports: PortAllocator,
        *,
        check_model: Callable[[str], ModelShape | None] | None = None,
        has_gpu: Callable[[], bool] = gpu_present,
        run: Run | None = None,
    ) -> None:
        self._config = config
        self._ports = ports
        self.policy = config.policy
        self._host = Host(config, ProgramProbe(run), check_model or (lambda path: None), has_gpu, lambda: self.policy)
        self._adapters: dict[str, Adapter] = {}
        self._sized: dict[str, tuple[PoolConfig, str, str, Recipe]] = {}

    async def prepare(
        self, pool: PoolConfig, model: ResolvedModel | None, allocation: Allocation | None = None, replica_id: str = "r0"
    ) -> PreparedEngine:
        """How to run ``pool`` on ``model`` and the devices of ``allocation``; the same input gives the same answer
        (EP-PROP-3207). Spawns no engine.

        Claims a port for this replica of the pool. Raises SpecError for what the configuration must change, EngineError
        (``preload failed: …``) for a binary that cannot be run, NodeError when no port is free.
        """
        mode = require_mode(pool)
        if model is None:
            raise SpecError(f"cannot prepare {pool.engine} without a model", pool_id=pool.id, hint="set pools[].model")
        recipe = self._sized_recipe(pool, model)
        if recipe is None:
            recipe = await asyncio.to_thread(self._adapter(pool.engine).recipe, pool, mode, model)
        instance = InstanceId(pool.id, replica_id)
        port = self._ports.claim(instance, pool.provisioning.ports)
        try:
            flags = recipe.flags(allocation, port)
        except PoolError:
            self._ports.release(instance)
            raise
        program = recipe.program
        return PreparedEngine(
            pool_id=pool.id,
            replica_id=replica_id,
            binary_path=program.argv[0],
            flags=(*program.argv[1:], *flags),
            port=port,
            model_path=model.local_path,
            model_files=model.files,
            model_id=model.id,
            engine=pool.engine,
            engine_version=program.version,
            device_mask=None if pool.mask is None else str(pool.mask),
            device_uuids=tuple(d.uuid for d in allocation.devices) if allocation else (),
            provisioning_mode=mode,
            slots_total=pool.slots,
            ctx=pool.ctx,
            env={**recipe.env, **device_env(pool, allocation)},
            health_path=_health_path(pool),
            warnings=(*program.warnings, *_another_port(pool, port)),
            warmup=recipe.warmup,
            slots=recipe.slots,
        )

    def size(self, pool: PoolConfig, model: ResolvedModel) -> Recipe:
        """How to run ``pool``, before its GPUs and port are known; the next ``prepare`` of this pool and model goes by it.

        Blocks. Raises as ``prepare``.
        """
        recipe = self._adapter(pool.engine).recipe(pool, require_mode(pool), model)
        self._sized[pool.id] = pool, model.id, model.local_path, recipe
        return recipe

    def memory_of(self, engine: PreparedEngine) -> LaunchMemory:
        """What decides the memory of an engine that was submitted."""
        kind = ENGINES.get(engine.engine)
        if kind is None or kind.modes == ("external",):
            return LaunchMemory(EngineSettings())
        return self._adapter(engine.engine).memory_of(engine.flags, engine.engine_version)

    def dialect(self, engine: PreparedEngine) -> SlotDialect | None:
        """How its slots are saved; None for an engine that cannot."""
        return self._adapter(engine.engine).dialect if engine.keeps_slots else None

    def attach(self, pool: PoolConfig) -> AttachedEngine:
        """The running engine of a pool whose mode is external. Raises SpecError for a URL that is none."""
        return AttachedEngine(
            pool_id=pool.id,
            base_url=attach_url(pool),
            model_id=pool.model,
            engine=pool.engine,
            device_mask=None if pool.mask is None else str(pool.mask),
            slots_total=pool.slots,
            ctx=pool.ctx,
            health_path=_health_path(pool),
        )

    def problems(self, pool: PoolConfig, model_path: str | None) -> tuple[PoolError, ...]:
        """All for which a start would be refused, at once: engine, flags, variables, and the model at ``model_path`` if it is
        known. Starts no engine; a llama.cpp build is loaded to see whether it can be. Blocks.
        """
        found = attempt(partial(require_mode, pool))
        if ENGINES[pool.engine].modes == ("external",):  # it can only be attached to
            return found
        return found + self._adapter(pool.engine).problems(pool, mode_of(pool), model_path)

    async def obstacles(self, pool: PoolConfig, model_path: str | None) -> tuple[PoolError, ...]:
        """As ``problems``, without blocking."""
        return await asyncio.to_thread(self.problems, pool, model_path)

    def program_path(self, pool: PoolConfig) -> str:
        """What would be executed. Runs nothing. Raises SpecError when none is configured."""
        return str(binary_path(self._config, pool)) if mode_of(pool) == "binary" else sys.executable

    def plan(self, pool: PoolConfig) -> dict[str, Any]:
        """What ``prepare`` and the start after it would do, in order: ``{pool_id, steps: [{kind, detail}]}`` (ORCH-3207).

        Deterministic, and asks nothing of the machine beyond which package is installed. What would be refused is a
        step of kind ``refused``.
        """
        mode, package = mode_of(pool), ENGINES[pool.engine].package
        try:
            if mode == "external":
                return _plan(pool, ("attach", attach_url(pool)))
            require_mode(pool)
            path = None if mode == "package" else binary_path(self._config, pool)
            run = f"{package} {package_version(package or '')}" if path is None else str(path)
        except (SpecError, EngineError) as error:
            return _plan(pool, ("refused", str(error)))
        ports = ", ".join([*map(str, pool.provisioning.ports), self._config.daemon.engine_ports])
        gpus = f", GPU{'s' if len(pool.devices) > 1 else ''} {pool.mask}" if pool.mask else ""
        return _plan(
            pool,
            ("model", pool.model),
            ("engine", f"{pool.engine} in mode {mode}: {run}"),
            ("port", f"127.0.0.1, the first free of {ports}"),
            ("run", f"{count(pool.slots, 'slot')}, context {pool.ctx or 'of the model'}{gpus}"),
        )

    def claim(self, instance: InstanceId, port: int) -> None:
        """The instance's engine, which an earlier daemon has left, listens there."""
        self._ports.keep(instance, port)

    def release_port(self, instance: InstanceId) -> None:
        """Give the port of one replica back."""
        self._ports.release(instance)

    def release(self, pool_id: str) -> None:
        """Give the pool's ports back."""
        self._ports.forget(pool_id)
        self._sized.pop(pool_id, None)

    def _sized_recipe(self, pool: PoolConfig, model: ResolvedModel) -> Recipe | None:
        """What this very launch was sized by, once."""
        sized_pool, model_id, path, recipe = self._sized.pop(pool.id, (None, "", "", None))
        return recipe if (sized_pool, model_id, path) == (pool, model.id, model.local_path) else None

    def _adapter(self, engine: str) -> Adapter:
        if engine not in self._adapters:
            self._adapters[engine] = adapter_of(engine, self._host)
        return self._adapters[engine]


def _another_port(pool: PoolConfig, port: int) -> tuple[str, ...]:
    """What is said where none of the pool's own ports was free: clients may have been told those."""
    own = pool.provisioning.ports
    if not own or port in own:
        return ()
    listed = ", ".join(map(str, own))
    return (f"Pool '{pool.id}' runs on port {port} of daemon.engine_ports: others hold its own ({listed}; see `ss -ltnp`)",)


def _health_path(pool: PoolConfig) -> str:
    return pool.health_path or ENGINES[pool.engine].health_path


def _plan(pool: PoolConfig, *steps: tuple[str, str]) -> dict[str, Any]:
    return {"pool_id": pool.id, "steps": [{"kind": kind, "detail": detail} for kind, detail in steps]}
