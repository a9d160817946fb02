"""From a pool and its model to a PreparedEngine: argv, environment, port. Prepares only; it never starts an engine."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import ENGINE_MODES, PreparedEngine, ResolvedModel
from pool_managerd.core.narration import count
from pool_managerd.core.reservations import Assignment
from pool_managerd.engines import llamacpp_server, vllm
from pool_managerd.engines.attaching import attach_url, attached
from pool_managerd.engines.environment import device_env
from pool_managerd.engines.flags import Option, OptionTable
from pool_managerd.engines.help_parser import ALIASES, BinaryProbe, Run, recorded_options
from pool_managerd.engines.llamacpp import Surroundings, build_env, build_flags
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.errors import EngineError, SpecError

INSTALL = "pip install 'pool-managerd[llamacpp]'"
_LAUNCHER = Path(llamacpp_server.__file__).resolve()
_GPU_NODES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/dev/dxg"), Path("/dev/kfd"))
_ATTACH = "start it yourself and set provisioning: {mode: external, url: http://127.0.0.1:PORT}"
_INSTEAD = {
    "llamacpp": f"use mode package ({INSTALL}), or mode binary with provisioning.binary.path",
    "vllm": f"use mode binary with provisioning.binary.path, or {_ATTACH}", "tgi": _ATTACH, "triton": _ATTACH,
}  # fmt: skip
_BINARIES = {"llamacpp": "llama-server binary", "vllm": "vllm command"}
_HEALTH = {"llamacpp": "/health", "vllm": "/health", "tgi": "/health", "triton": "/v2/health/ready"}


@dataclass(frozen=True, slots=True)
class _Program:
    """What is put before the flags, which flags it knows, and what it calls itself."""

    argv: tuple[str, ...]
    options: OptionTable
    version: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Recipe:
    """A program, its environment, and its flags by the port it is to listen on."""

    program: _Program
    env: dict[str, str]
    flags: Callable[[int], tuple[str, ...]]


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
    """Prepares engines of configured pools. ``check_model`` may refuse a model file (a PoolError) before it is used.

    ``run`` runs a configured binary to ask it for its flags; without it none is run.
    """

    def __init__(
        self,
        config: Config,
        ports: PortAllocator,
        *,
        check_model: Callable[[str], object] | None = None,
        has_gpu: Callable[[], bool] = gpu_present,
        run: Run | None = None,
    ) -> None:
        self._config = config
        self._ports = ports
        self._check_model = check_model
        self._has_gpu = has_gpu
        self._binaries = BinaryProbe(run)
        self._package: tuple[int, _Program] | None = None

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
        port = self._ports.claim(pool.id, pool.provisioning.ports)
        program = recipe.program
        return PreparedEngine(
            pool_id=pool.id,
            binary_path=program.argv[0],
            flags=(*program.argv[1:], *recipe.flags(port)),
            port=port,
            model_path=model.local_path,
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
        )

    def check(self, pool: PoolConfig) -> str:
        """The program that would be run. Runs nothing. Blocks.

        Raises SpecError or EngineError for an engine that this version, or this machine, cannot run.
        """
        mode = mode_of(pool)
        self._refuse_unsupported(pool, mode)
        if mode != "binary":
            return sys.executable
        path = self._binary_path(pool)
        _check_runnable(path, pool.id, _BINARIES[pool.engine])
        return str(path)

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
            path = self._binary_path(pool)
            _check_runnable(path, pool.id, _BINARIES[pool.engine])
            known = _Program((str(path),), vllm.OPTIONS, vllm.version_of(path))
            return _Recipe(known, vllm.build_env(pool), lambda port: vllm.build_flags(pool, model, port, assignment))
        self._check_model_file(model.local_path)
        program = self._program(pool, mode)
        split = assignment.shares if assignment is not None and len(assignment.devices) > 1 else None
        if assignment is None and isinstance(pool.tensor_split, tuple):
            split = pool.tensor_split
        gpu = on_gpu or assignment is not None or self._has_gpu()
        around = Surroundings(self._config.profile, self._config.base_dir, gpu, split)
        env = build_env(pool, self._config.profile)
        return _Recipe(program, env, lambda port: build_flags(pool, model.local_path, port, program.options, around))

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
            run = str(self._binary_path(pool)) if mode == "binary" else f"xllamacpp {_package_version()}"
        except (SpecError, EngineError) as error:
            return _plan(pool, ("refused", str(error)))
        ports = ", ".join(map(str, pool.provisioning.ports)) or self._config.daemon.engine_ports
        gpus = f"GPU{'s' if len(pool.devices) > 1 else ''} {pool.mask}" if pool.mask else "all GPUs"
        return _plan(
            pool,
            ("model", pool.model),
            ("engine", f"{pool.engine} in mode {mode}: {run}"),
            ("port", f"127.0.0.1, the first free of {ports}"),
            ("run", f"{count(pool.slots, 'slot')}, context {pool.ctx or 'of the model'}, {gpus}"),
        )

    def release(self, pool_id: str) -> None:
        """Give the pool's port back."""
        self._ports.release(pool_id)

    def _refuse_unsupported(self, pool: PoolConfig, mode: str) -> None:
        if mode not in ENGINE_MODES[pool.engine]:
            installed = pool.engine != "llamacpp" or pool.provisioning.mode is not None
            default = (
                "" if pool.provisioning.mode else " (the default" + ("" if installed else ", as xllamacpp is not installed") + ")"
            )
            raise SpecError(f"cannot run {pool.engine} in mode {mode}{default} yet", pool_id=pool.id, hint=_INSTEAD[pool.engine])
        if mode == "package" and not _package_installed():
            raise SpecError("cannot run llama.cpp in mode package: xllamacpp is not installed", pool_id=pool.id, hint=INSTALL)

    def _check_model_file(self, path: str) -> None:
        if Path(path).is_dir():
            raise SpecError(f"cannot use {path} as a GGUF model: it is a directory", hint="name the .gguf file inside it")
        if self._check_model is not None:
            self._check_model(path)

    def _program(self, pool: PoolConfig, mode: str) -> _Program:
        if mode == "package":
            return self._packaged()
        path = self._binary_path(pool)
        _check_runnable(path, pool.id, _BINARIES[pool.engine])
        facts = self._binaries.facts(path, pool.provisioning.env.get("LD_LIBRARY_PATH", ""))
        return _Program((str(path),), facts.options, facts.version, facts.warnings)

    def _packaged(self) -> _Program:
        """The embedded engine; its version and options are read again only when the package was changed."""
        spec = importlib.util.find_spec("xllamacpp")
        changed_ns = Path(spec.origin).stat().st_mtime_ns if spec is not None and spec.origin is not None else 0
        if self._package is None or self._package[0] != changed_ns:
            gpu_flag = () if self._config.profile == "dev" else ("--require-gpu",)
            argv = (sys.executable, "-I", str(_LAUNCHER), *gpu_flag)
            self._package = changed_ns, _Program(argv, launcher_options(), f"xllamacpp-{_package_version()}")
        return self._package[1]

    def _binary_path(self, pool: PoolConfig) -> Path:
        binary = pool.provisioning.binary
        if binary is None or binary.path is None:
            url = " downloads are not supported yet;" if binary is not None and binary.url else ""
            raise SpecError(
                f"cannot run {pool.engine} in mode binary:{url} provisioning.binary.path is not set",
                pool_id=pool.id,
                hint=f"set provisioning.binary.path to a {_BINARIES[pool.engine]} on this machine",
            )
        return Path(os.path.normpath(self._config.base_dir.absolute() / binary.path.expanduser()))


def launcher_options() -> OptionTable:
    """The flags that the embedded engine's launcher takes, with llama-server's own other names for them."""
    recorded = recorded_options()
    own = [Option(option.names, option.negated, option.values) for option in llamacpp_server.OPTIONS]
    known = {name for option in own for name in (*option.names, *option.negated)}
    missing = frozenset(name for option in recorded.options for name in (*option.names, *option.negated)) - known
    return OptionTable(own, ALIASES, elsewhere=missing)


def _mask_text(pool: PoolConfig) -> str | None:
    """``0,1`` for a pool whose `devices` are the GPUs 0 and 1; None when all are allowed."""
    return None if pool.mask is None else str(pool.mask)


def _plan(pool: PoolConfig, *steps: tuple[str, str]) -> dict[str, Any]:
    return {"pool_id": pool.id, "steps": [{"kind": kind, "detail": detail} for kind, detail in steps]}


def _package_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def _package_version() -> str:
    try:
        return importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _check_runnable(path: Path, pool_id: str, name: str) -> None:
    """Raises EngineError in the words of SPEC §6.1 when ``path`` cannot be executed."""
    try:
        info = path.stat()
    except OSError as error:
        raise _not_runnable(path, pool_id, error.strerror or str(error), "check provisioning.binary.path") from error
    if not stat.S_ISREG(info.st_mode):
        raise _not_runnable(path, pool_id, "it is not a file", f"name the {name} itself")
    if not os.access(path, os.X_OK):
        raise _not_runnable(path, pool_id, "it is not executable", f"chmod +x {path}")


def _not_runnable(path: Path, pool_id: str, reason: str, hint: str) -> EngineError:
    return EngineError(f"preload failed: cannot run {path}: {reason}", pool_id=pool_id, hint=hint)
