"""From a pool and its model to a PreparedEngine: argv, environment, port. Prepares only; it never starts an engine."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pool_managerd.config import Config, PoolConfig, Profile
from pool_managerd.core.artifacts import ENGINE_MODES, PreparedEngine, ResolvedModel, Warmup
from pool_managerd.core.gpu.ledger import Assignment
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.core.narration import count
from pool_managerd.engines import vllm
from pool_managerd.engines.attaching import attach_url, attached
from pool_managerd.engines.environment import device_env
from pool_managerd.engines.help_parser import Run, recorded_options
from pool_managerd.engines.llamacpp import Surroundings, build_env, build_flags, flag_problems, warmup_of
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.engines.programs import INSTALL, EnginePrograms, Program, package_version
from pool_managerd.engines.programs import package_installed as _package_installed
from pool_managerd.errors import EngineError, PoolError, SpecError

_GPU_NODES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/dev/dxg"), Path("/dev/kfd"))
_ATTACH = "start it yourself and set provisioning: {mode: external, url: http://127.0.0.1:PORT}"
_INSTEAD = {
    "llamacpp": f"use mode package ({INSTALL}), or mode binary with provisioning.binary.path",
    "vllm": f"use mode binary with provisioning.binary.path, or {_ATTACH}", "tgi": _ATTACH, "triton": _ATTACH,
}  # fmt: skip
_HEALTH = {"llamacpp": "/health", "vllm": "/health", "tgi": "/health", "triton": "/v2/health/ready"}


@dataclass(frozen=True, slots=True)
class _Recipe:
    """A program, its environment, its flags by the port it is to listen on, and its first request by those flags."""

    program: Program
    env: dict[str, str]
    flags: Callable[[int], tuple[str, ...]]
    warmup: Callable[[Sequence[str]], Warmup]


def gpu_present() -> bool:
    """True when this machine shows a GPU at all. Whether it works is for discovery to say."""
    return any(path.exists() for path in _GPU_NODES)


def mode_of(pool: PoolConfig) -> str:
    """The mode ``pool`` asks for, or its engine's default (ORCH-3800(home)): llama.cpp from its package if installed."""
    if pool.provisioning.mode is not None:
        return pool.provisioning.mode
    if pool.engine != "llamacpp":
        return "container"
    return "package" if _package_installed() else "source"


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
        self._check_model = check_model
        self._has_gpu = has_gpu
        self._programs = EnginePrograms(config, run)

    async def prepare(
        self, pool: PoolConfig, model: ResolvedModel | None, assignment: Assignment | None = None
    ) -> PreparedEngine:
        """How to run ``pool`` on ``model`` and the devices of ``assignment``; the same input gives the same answer
        (EP-PROP-3207). Spawns no engine.

        Claims a port for the pool. Raises SpecError for what the configuration must change, EngineError
        (``preload failed: …``) for a binary that cannot be run, NodeError when no port is free.
        """
        mode = mode_of(pool)
        if mode == "external":
            return attached(pool, pool.health_path or _HEALTH[pool.engine])
        self._refuse_unsupported(pool, mode)
        if model is None:
            raise SpecError(f"cannot prepare {pool.engine} without a model", pool_id=pool.id, hint="set pools[].model")
        recipe = await asyncio.to_thread(self._recipe, pool, mode, model, assignment)
        recipe.flags(1)  # checked with a stand-in first: a pool whose flags are wrong must not hold a port
        port = self._ports.claim(InstanceId(pool.id), pool.provisioning.ports)
        program, flags = recipe.program, recipe.flags(port)
        return PreparedEngine(
            pool_id=pool.id,
            binary_path=program.argv[0],
            flags=(*program.argv[1:], *flags),
            port=port,
            model_path=model.local_path,
            model_files=model.files,
            model_id=model.id,
            engine=pool.engine,
            engine_version=program.version,
            device_mask=_mask_text(pool),
            device_uuids=tuple(d.uuid for d in assignment.devices) if assignment else (),
            provisioning_mode=mode,
            slots_total=pool.slots,
            ctx=pool.ctx,
            env={**recipe.env, **device_env(pool, assignment)},
            health_path=pool.health_path or _HEALTH[pool.engine],
            warnings=program.warnings,
            warmup=recipe.warmup(flags),
        )

    def problems(self, pool: PoolConfig, model_path: str | None) -> tuple[PoolError, ...]:
        """All for which a start would be refused, at once: engine, flags, variables, and the model at ``model_path`` if it is
        known. Starts no engine; a llama.cpp build is loaded to see whether it can be. Blocks.
        """
        mode = mode_of(pool)
        checks: list[Callable[[], object]] = [partial(self._refuse_unsupported, pool, mode)]
        if mode == "binary" or _package_installed():
            checks.append(partial(self._programs.check, pool, mode))
        if model_path is not None:
            checks.append(partial(self._check_model_at, pool, model_path))
        found = [error for check in checks for error in _raised(check)]
        return (*found, *self._flag_problems(pool, mode, model_path or ""), *_env_problems(pool, self._config.profile))

    def program_path(self, pool: PoolConfig) -> str:
        """What would be executed. Runs nothing. Raises SpecError when none is configured."""
        return str(self._programs.binary_path(pool)) if mode_of(pool) == "binary" else sys.executable

    def _check_model_at(self, pool: PoolConfig, path: str) -> None:
        if pool.engine == "vllm":
            vllm.check_model(path)
            vllm.check_ctx(pool, path)
        else:
            self._shape_of(path)

    def _flag_problems(self, pool: PoolConfig, mode: str, model_path: str) -> tuple[SpecError, ...]:
        try:
            found = self._programs.program(pool, mode).options if mode == "binary" or _package_installed() else None
        except PoolError:
            found = None  # which is said elsewhere; the flags are held against the recorded ones
        if pool.engine == "vllm":
            return vllm.flag_problems(pool, found or vllm.OPTIONS)
        around = Surroundings(self._config.profile, self._config.base_dir, gpu_present=True)
        return flag_problems(pool, model_path, found or recorded_options(), around)

    def sizing_flags(self, pool: PoolConfig, model_path: str) -> tuple[str, tuple[str, ...]]:
        """Engine version and flags of a launch on GPUs, before they and the port are known. Blocks. Raises as ``prepare``."""
        mode = mode_of(pool)
        self._refuse_unsupported(pool, mode)
        recipe = self._recipe(pool, mode, ResolvedModel(pool.model, model_path), None, on_gpu=True)
        return recipe.program.version, recipe.flags(1)

    def _recipe(
        self, pool: PoolConfig, mode: str, model: ResolvedModel, assignment: Assignment | None, *, on_gpu: bool = False
    ) -> _Recipe:
        """Blocks. ``on_gpu``: as if there were GPUs, whichever will be assigned."""
        if pool.engine == "vllm":
            vllm.check_model(model.local_path)
            vllm.check_ctx(pool, model.local_path)
            known = self._programs.program(pool, mode)
            grace_ms = self._config.supervision.stop_grace_ms
            around_vllm = vllm.Around(known.options, self._config.base_dir, grace_ms, vllm.numbers_of(known.version))
            return _Recipe(
                known,
                vllm.build_env(pool),
                lambda port: vllm.build_flags(pool, model, port, assignment, around_vllm),
                lambda flags: vllm.warmup_of(flags, model.local_path, known.options),
            )
        shape = self._shape_of(model.local_path)
        program = self._programs.program(pool, mode)
        split = assignment.shares if assignment is not None and len(assignment.devices) > 1 else None
        if assignment is None and isinstance(pool.tensor_split, tuple):
            split = pool.tensor_split
        gpu = on_gpu or assignment is not None or self._has_gpu()
        around = Surroundings(self._config.profile, self._config.base_dir, gpu, split)
        if shape is not None:
            around = replace(around, encoder=shape.encoder, task=shape.task)
        env = build_env(pool, self._config.profile)
        return _Recipe(
            program,
            env,
            lambda port: build_flags(pool, model.local_path, port, program.options, around),
            lambda flags: warmup_of(flags, program.options, around),
        )

    def plan(self, pool: PoolConfig) -> dict[str, Any]:
        """What ``prepare`` and the start after it would do, in order: ``{pool_id, steps: [{kind, detail}]}`` (ORCH-3207).

        Deterministic, and asks nothing of the machine beyond which package is installed. What would be refused is a
        step of kind ``refused``.
        """
        mode = mode_of(pool)
        try:
            if mode == "external":
                return _plan(pool, ("attach", attach_url(pool)))
            self._refuse_unsupported(pool, mode)
            run = str(self._programs.binary_path(pool)) if mode == "binary" else f"xllamacpp {package_version()}"
        except (SpecError, EngineError) as error:
            return _plan(pool, ("refused", str(error)))
        ports = ", ".join(map(str, pool.provisioning.ports)) or self._config.daemon.engine_ports
        gpus = f", GPU{'s' if len(pool.devices) > 1 else ''} {pool.mask}" if pool.mask else ""
        return _plan(
            pool,
            ("model", pool.model),
            ("engine", f"{pool.engine} in mode {mode}: {run}"),
            ("port", f"127.0.0.1, the first free of {ports}"),
            ("run", f"{count(pool.slots, 'slot')}, context {pool.ctx or 'of the model'}{gpus}"),
        )

    def release(self, pool_id: str) -> None:
        """Give the pool's port back."""
        self._ports.forget(pool_id)

    def _refuse_unsupported(self, pool: PoolConfig, mode: str) -> None:
        if mode not in ENGINE_MODES[pool.engine]:
            installed = pool.engine != "llamacpp" or pool.provisioning.mode is not None
            default = (
                "" if pool.provisioning.mode else " (the default" + ("" if installed else ", as xllamacpp is not installed") + ")"
            )
            raise SpecError(f"cannot run {pool.engine} in mode {mode}{default} yet", pool_id=pool.id, hint=_INSTEAD[pool.engine])
        if mode == "package" and not _package_installed():
            raise SpecError("cannot run llama.cpp in mode package: xllamacpp is not installed", pool_id=pool.id, hint=INSTALL)

    def _shape_of(self, path: str) -> ModelShape | None:
        if Path(path).is_dir():
            raise SpecError(f"cannot use {path} as a GGUF model: it is a directory", hint="name the .gguf file inside it")
        return None if self._check_model is None else self._check_model(path)


def _mask_text(pool: PoolConfig) -> str | None:
    """``0,1`` for a pool whose `devices` are the GPUs 0 and 1; None when all are allowed."""
    return None if pool.mask is None else str(pool.mask)


def _plan(pool: PoolConfig, *steps: tuple[str, str]) -> dict[str, Any]:
    return {"pool_id": pool.id, "steps": [{"kind": kind, "detail": detail} for kind, detail in steps]}


def _raised(check: Callable[[], object]) -> tuple[PoolError, ...]:
    try:
        check()
    except PoolError as error:
        return (error,)
    return ()


def _env_problems(pool: PoolConfig, profile: Profile) -> tuple[PoolError, ...]:
    """What is wrong with each of the pool's variables."""
    found: tuple[PoolError, ...] = ()
    for name, value in pool.provisioning.env.items():
        alone = pool.model_copy(update={"provisioning": pool.provisioning.model_copy(update={"env": {name: value}})})
        found += _raised(partial(vllm.build_env, alone) if pool.engine == "vllm" else partial(build_env, alone, profile))
    return found
