"""Programs that run engines: where they are, which flags they know, and whether they can be loaded at all."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from pool_managerd.config import Config, PoolConfig
from pool_managerd.engines import llamacpp_server, vllm
from pool_managerd.engines.flags import Option, OptionTable
from pool_managerd.engines.help_parser import ALIASES, MIN_OPTIONS, BinaryProbe, Run, recorded_options
from pool_managerd.engines.vllm_flags import SET_BY_DAEMON, parse_argparse_help, table_of
from pool_managerd.errors import EngineError, SpecError

INSTALL = "pip install 'pool-managerd[llamacpp]'"
VLLM_HELP_TIMEOUT_S = 90.0
_LAUNCHER = Path(llamacpp_server.__file__).resolve()
_BINARIES = {"llamacpp": "llama-server binary", "vllm": "vllm command"}


@dataclass(frozen=True, slots=True)
class Program:
    """What is put before the flags, which flags it knows, and what it calls itself."""

    argv: tuple[str, ...]
    options: OptionTable
    version: str
    warnings: tuple[str, ...] = ()


class EnginePrograms:
    """Finds the programs of configured pools. What was learnt of one is kept as long as it is the same. Blocking."""

    def __init__(self, config: Config, run: Run | None = None) -> None:
        self._config = config
        self._binaries = BinaryProbe(run)
        self._package: tuple[int, Program] | None = None
        self._package_loads: object = None
        self._vllm_helps: dict[tuple[str, str], OptionTable] = {}

    def program(self, pool: PoolConfig, mode: str) -> Program:
        """What runs ``pool``. Raises SpecError and EngineError for a program that cannot be run."""
        if mode == "package":
            return self._packaged()
        path = self.binary_path(pool)
        _check_runnable(path, pool.id, _BINARIES[pool.engine])
        if pool.engine == "vllm":
            version = vllm.version_of(path)
            return Program((str(path),), self._vllm_options(pool, path, version), version)
        facts = self._binaries.facts(path, pool.provisioning.env.get("LD_LIBRARY_PATH", ""))
        if facts.missing is not None:
            raise _lacks_library(path, pool.id, facts.missing)
        return Program((str(path),), facts.options, facts.version, facts.warnings)

    def check(self, pool: PoolConfig, mode: str) -> None:
        """Load it and end it again. Raises SpecError and EngineError for one that cannot be found or loaded."""
        if mode == "package":
            self._check_package(pool.id)
        elif mode == "binary":
            self.program(pool, mode)

    def package_problem(self) -> EngineError | None:
        """Why the embedded engine cannot be loaded; None when it can, or is not installed."""
        try:
            if package_installed():
                self._check_package(None)
        except EngineError as error:
            return error
        return None

    def _check_package(self, pool_id: str | None) -> None:
        """Raises EngineError when the embedded engine cannot be loaded."""
        self._packaged()
        if self._package_loads is self._package:
            return
        text, missing = self._binaries.load_problem(sys.executable, "-I", "-c", "import xllamacpp")
        if missing is not None:
            raise _lacks_library(Path("xllamacpp"), pool_id, missing)
        if text and "Permission denied" not in text and "xllamacpp" not in text.partition("No module named")[2]:
            raise EngineError(f"preload failed: cannot load xllamacpp: {text[:300]}", pool_id=pool_id, hint=f"again: {INSTALL}")
        self._package_loads = self._package

    def _packaged(self) -> Program:
        """The embedded engine; its version and options are read again only when the package was changed."""
        spec = importlib.util.find_spec("xllamacpp")
        changed_ns = Path(spec.origin).stat().st_mtime_ns if spec is not None and spec.origin is not None else 0
        if self._package is None or self._package[0] != changed_ns:
            gpu_flag = () if self._config.profile == "dev" else ("--require-gpu",)
            argv = (sys.executable, "-I", str(_LAUNCHER), *gpu_flag)
            self._package = changed_ns, Program(argv, launcher_options(), f"xllamacpp-{package_version()}")
        return self._package[1]

    def _vllm_options(self, pool: PoolConfig, path: Path, version: str) -> OptionTable:
        """The recorded flags. A pool that uses another one has its engine asked for all of its own: that takes half a minute."""
        if not vllm.OPTIONS.sift(pool.provisioning.flags)[1]:
            return vllm.OPTIONS
        key = (str(path), version)
        if key not in self._vllm_helps:
            text = self._binaries.help_text(path, "serve", "--help=all", timeout_s=VLLM_HELP_TIMEOUT_S)
            options, aliases = parse_argparse_help(text)
            whole = len(options) >= MIN_OPTIONS and all(vllm.OPTIONS.use(n).option.names[0] in text for n in SET_BY_DAEMON)
            self._vllm_helps[key] = table_of(options, aliases) if whole else vllm.OPTIONS
        return self._vllm_helps[key]

    def binary_path(self, pool: PoolConfig) -> Path:
        """Raises SpecError when none is configured."""
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


def package_installed() -> bool:
    """True when the embedded llama.cpp is there."""
    return importlib.util.find_spec("xllamacpp") is not None


def package_version() -> str:
    """Of the embedded llama.cpp."""
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


def _lacks_library(path: Path, pool_id: str | None, missing: tuple[str, str]) -> EngineError:
    name, remedy = missing
    return EngineError(f"preload failed: cannot load {path}: a shared library is missing: {name}", pool_id=pool_id, hint=remedy)


def _not_runnable(path: Path, pool_id: str, reason: str, hint: str) -> EngineError:
    return EngineError(f"preload failed: cannot run {path}: {reason}", pool_id=pool_id, hint=hint)
