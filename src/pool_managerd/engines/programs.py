"""Programs that run engines: where they are, whether they can be run at all, and what they say when they are asked.

Who runs a program to ask it, confined as an engine is, is the caller's to give.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pool_managerd.config import Config, PoolConfig, path_from
from pool_managerd.core.artifacts import ProgramAnswer
from pool_managerd.core.engines import ENGINES
from pool_managerd.errors import EngineError, SpecError

PROBE_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 512 * 1024


class Run(Protocol):
    """Runs a program to its end, within bounds of time and output, so that nothing of it stays."""

    def __call__(self, argv: Sequence[str], env: Mapping[str, str], timeout_s: float, max_bytes: int) -> ProgramAnswer: ...


class ProgramProbe:
    """Asks programs what they are, through ``run``; without it none is run. Blocking."""

    def __init__(self, run: Run | None = None) -> None:
        self._run = run

    @property
    def asks(self) -> bool:
        """False when nobody runs programs for it."""
        return self._run is not None

    def ask(self, *argv: str, library_path: str = "", timeout_s: float | None = None) -> tuple[str, str]:
        """The bounded output of a program and, when that may not be trusted, what went wrong in words.

        ``library_path`` is the LD_LIBRARY_PATH that the engine will have, if any.
        """
        if self._run is None:
            return "", "was not asked"
        env = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""}
        if library_path:
            env["LD_LIBRARY_PATH"] = library_path
        answer = self._run(argv, env, timeout_s or PROBE_TIMEOUT_S, MAX_ANSWER_BYTES)
        return answer.output.decode("utf-8", "replace"), answer.problem


def package_installed(package: str) -> bool:
    """True when the Python package is there; it is not imported."""
    return importlib.util.find_spec(package) is not None


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def package_changed_ns(package: str) -> int:
    """When the Python package was changed last, 0 where that cannot be told."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).stat().st_mtime_ns if spec is not None and spec.origin is not None else 0


def binary_path(config: Config, pool: PoolConfig) -> Path:
    """The engine's own program. Raises SpecError when none is configured."""
    binary = pool.provisioning.binary
    if binary is None or binary.path is None:
        url = " downloads are not supported yet;" if binary is not None and binary.url else ""
        raise SpecError(
            f"cannot run {pool.engine} in mode binary:{url} provisioning.binary.path is not set",
            pool_id=pool.id,
            hint=f"set provisioning.binary.path to a {ENGINES[pool.engine].program} on this machine",
        )
    return Path(os.path.normpath(path_from(config.base_dir, binary.path)))


def runnable(config: Config, pool: PoolConfig) -> Path:
    """``binary_path``. Raises EngineError in the words of SPEC §6.1 when it cannot be executed."""
    path = binary_path(config, pool)

    def refused(reason: str, hint: str) -> EngineError:
        return EngineError(f"preload failed: cannot run {path}: {reason}", pool_id=pool.id, hint=hint)

    try:
        info = path.stat()
    except OSError as error:
        raise refused(error.strerror or str(error), "check provisioning.binary.path") from error
    if not stat.S_ISREG(info.st_mode):
        raise refused("it is not a file", f"name the {ENGINES[pool.engine].program} itself")
    if not os.access(path, os.X_OK):
        raise refused("it is not executable", f"chmod +x {path}")
    return path
