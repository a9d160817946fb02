"""The llama.cpp adapter: which program runs a pool, and what is checked before it does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import ResolvedModel
from pool_managerd.core.engines import ENGINES
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.engines.adapter import Host, LaunchMemory, Program, Recipe
from pool_managerd.engines.environment import env_problems
from pool_managerd.engines.flags import OptionTable, attempt, raise_all
from pool_managerd.engines.llamacpp import server
from pool_managerd.engines.llamacpp.command import Surroundings, build_env, build_flags, checked_flags, warmup_of
from pool_managerd.engines.llamacpp.memory import settings_of
from pool_managerd.engines.llamacpp.options import ServerBinaries, launcher_options, recorded_options
from pool_managerd.engines.llamacpp.slots import LlamaSlots, saving_of, with_files
from pool_managerd.engines.programs import package_changed_ns, package_installed, package_version, runnable
from pool_managerd.errors import EngineError, PoolError, SpecError

_PACKAGE = "xllamacpp"
_LAUNCHER = str(Path(server.__file__).resolve())


class LlamaCpp:
    """See `engines.adapter`. What was learnt of a program is kept as long as it is the same."""

    def __init__(self, host: Host) -> None:
        self.dialect = LlamaSlots()
        self._host = host
        self._binaries = ServerBinaries(host.probe)
        self._options: tuple[int, OptionTable] | None = None
        self._loaded_ns = -1

    def recipe(self, pool: PoolConfig, mode: str, model: ResolvedModel) -> Recipe:
        config, path = self._host.config, model.local_path
        shape = self._shape_of(path)
        program, table = self._program(pool, mode)
        env = build_env(pool, config.profile)
        around = Surroundings(config.profile, config.base_dir, gpu_present=True)
        if shape is not None:
            around = replace(around, encoder=shape.encoder, task=shape.task)
        own, wrong = checked_flags(pool, path, table, around)
        raise_all(wrong)

        def flags(allocation: Allocation | None, port: int, *, on_gpu: bool = False) -> tuple[str, ...]:
            split = pool.tensor_split if isinstance(pool.tensor_split, tuple) else None
            if allocation is not None:
                split = allocation.shares if len(allocation.devices) > 1 else None
            gpu = on_gpu or allocation is not None or self._host.has_gpu()
            return build_flags(pool, own, path, port, table, replace(around, gpu_present=gpu, tensor_split=split))

        sized = flags(None, 0, on_gpu=True)  # what it needs on GPUs, whichever they will be
        memory, warmup = settings_of(sized, version=program.version), warmup_of(sized, table, around)
        slots = saving_of(config, pool, model, sized, table, program.version) if warmup == "completion" else None
        if slots is not None and not slots.unable:
            around = replace(around, slot_dir=slots.directory)
        return Recipe(program, env, flags, memory, warmup, with_files(slots, memory))

    def problems(self, pool: PoolConfig, mode: str, model_path: str | None) -> tuple[PoolError, ...]:
        """Loads a build of llama.cpp to see whether it can be."""
        config, found = self._host.config, attempt(partial(self._check_program, pool, mode))
        if model_path is not None:
            found += attempt(partial(self._shape_of, model_path))
        try:
            table = self._program(pool, mode)[1]
        except PoolError:  # which is said already
            table = recorded_options()
        around = Surroundings(config.profile, config.base_dir, gpu_present=True)
        found += checked_flags(pool, model_path or "", table, around)[1]
        return found + env_problems(pool, lambda alone: build_env(alone, config.profile))

    def memory_of(self, flags: Sequence[str], version: str) -> LaunchMemory:
        return settings_of(flags, version=version)

    def _shape_of(self, path: str) -> ModelShape | None:
        if Path(path).is_dir():
            raise SpecError(f"cannot use {path} as a GGUF model: it is a directory", hint="name the .gguf file inside it")
        return self._host.shape_of(path)

    def _program(self, pool: PoolConfig, mode: str) -> tuple[Program, OptionTable]:
        """What runs ``pool``, and the flags it knows. Raises SpecError and EngineError for a program that cannot be run."""
        if mode == "package":
            return self._packaged()
        path = runnable(self._host.config, pool)
        facts = self._binaries.facts(path, pool.provisioning.env.get("LD_LIBRARY_PATH", ""))
        if facts.missing is not None:
            raise _lacks_library(str(path), pool.id, facts.missing)
        return Program((str(path),), facts.version, facts.warnings), facts.options

    def _packaged(self) -> tuple[Program, OptionTable]:
        """The embedded engine; its options are read again only when the package was changed."""
        changed_ns = package_changed_ns(_PACKAGE)
        if self._options is None or self._options[0] != changed_ns:
            self._options = changed_ns, launcher_options()
        gpu_flag = () if self._host.config.profile == "dev" else ("--require-gpu",)
        version = f"{_PACKAGE}-{package_version(_PACKAGE)}"
        return Program((sys.executable, "-I", _LAUNCHER, *gpu_flag), version), self._options[1]

    def _check_program(self, pool: PoolConfig, mode: str) -> None:
        """Raises SpecError and EngineError for a program that cannot be found or loaded."""
        if mode == "binary":
            self._program(pool, mode)
        elif mode == "package" and package_installed(_PACKAGE):
            self._check_package(pool.id)

    def _check_package(self, pool_id: str) -> None:
        """Load the embedded engine and end again. One that loaded is loaded again when it was changed."""
        changed_ns = package_changed_ns(_PACKAGE)
        if self._loaded_ns == changed_ns:
            return
        text, problem = self._host.probe.ask(sys.executable, "-I", "-c", f"import {_PACKAGE}")
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "") or problem
        if problem and self._host.probe.asks:
            if (missing := server.missing_library(text)) is not None:
                raise _lacks_library(_PACKAGE, pool_id, missing)
            if "Permission denied" not in last and _PACKAGE not in last.partition("No module named")[2]:
                hint = f"again: {ENGINES['llamacpp'].install}"
                raise EngineError(f"preload failed: cannot load {_PACKAGE}: {last[:300]}", pool_id=pool_id, hint=hint)
        self._loaded_ns = changed_ns


def _lacks_library(what: str, pool_id: str, missing: tuple[str, str]) -> EngineError:
    name, remedy = missing
    return EngineError(f"preload failed: cannot load {what}: a shared library is missing: {name}", pool_id=pool_id, hint=remedy)
