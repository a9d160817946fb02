"""The vLLM adapter: which command runs a pool, and what is checked before it does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import ResolvedModel
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.engines.adapter import Host, LaunchMemory, Program, Recipe
from pool_managerd.engines.environment import env_problems
from pool_managerd.engines.flags import OptionTable, attempt, raise_all
from pool_managerd.engines.programs import runnable
from pool_managerd.engines.vllm import command
from pool_managerd.engines.vllm.flags import SET_BY_DAEMON, parse_argparse_help, table_of
from pool_managerd.errors import PoolError

HELP_TIMEOUT_S = 110.0
_MIN_OPTIONS = 20


class Vllm:
    """See `engines.adapter`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._helps: dict[tuple[str, str], OptionTable] = {}

    def recipe(self, pool: PoolConfig, mode: str, model: ResolvedModel) -> Recipe:
        config, folder = self._host.config, self._checked_model(pool, model.local_path)
        program, options = self._program(pool)
        env = command.build_env(pool)
        grace_ms, version = config.supervision.stop_grace_ms, command.numbers_of(program.version)
        around = command.Around(options, config.base_dir, grace_ms, version, self._host.policy().allow_remote_code)
        own, wrong = command.checked_flags(pool, around)
        raise_all(wrong)

        def flags(allocation: Allocation | None, port: int) -> tuple[str, ...]:
            return command.build_flags(pool, own, model, port, allocation, around)

        return Recipe(program, env, flags, LaunchMemory(command.settings_of(pool)), command.warmup_of(own, folder))

    def problems(self, pool: PoolConfig, mode: str, model_path: str | None) -> tuple[PoolError, ...]:
        found: tuple[PoolError, ...] = ()
        options = command.OPTIONS
        try:
            options = self._program(pool)[1]
        except PoolError as error:
            found = (error,) if mode == "binary" else ()
        if model_path is not None:
            found += attempt(partial(self._checked_model, pool, model_path))
        around = command.Around(options, remote_code=self._host.policy().allow_remote_code)
        return found + command.checked_flags(pool, around)[1] + env_problems(pool, command.build_env)

    @property
    def dialect(self) -> None:
        """It saves none."""

    def memory_of(self, flags: Sequence[str], version: str) -> LaunchMemory:
        return LaunchMemory(command.submitted_settings(flags))

    def _checked_model(self, pool: PoolConfig, path: str) -> command.ModelFolder:
        folder = command.read_model(path)
        command.check_ctx(pool, folder)
        return folder

    def _program(self, pool: PoolConfig) -> tuple[Program, OptionTable]:
        """What runs ``pool``, and the flags it knows. Raises SpecError and EngineError for a command that cannot be run."""
        path = runnable(self._host.config, pool)
        version = command.version_of(path)
        return Program((str(path),), version), self._options(pool, path, version)

    def _options(self, pool: PoolConfig, path: Path, version: str) -> OptionTable:
        """The recorded flags. A pool with another one has its engine asked for its own: half a minute, the first time more."""
        if not command.OPTIONS.sift(pool.provisioning.flags)[1]:
            return command.OPTIONS
        key = (str(path), version)
        if key not in self._helps:
            text, problem = self._host.probe.ask(str(path), "serve", "--help=all", timeout_s=HELP_TIMEOUT_S)
            options, aliases = parse_argparse_help("" if problem else text)
            known = command.OPTIONS
            whole = len(options) >= _MIN_OPTIONS and all(known.use(name).option.names[0] in text for name in SET_BY_DAEMON)
            self._helps[key] = table_of(options, aliases) if whole else known
        return self._helps[key]
