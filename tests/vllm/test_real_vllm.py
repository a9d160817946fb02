"""A real vLLM under a pool, on the CPU: `make test-vllm VLLM=/path/to/bin/vllm`. Loading takes a minute or two."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pool_managerd import PoolManager
from tests.system.nodes import FAST, alive, config, left_behind, mentioning, until

VLLM = os.environ.get("POOL_MANAGERD_TEST_VLLM")
LOADING_S = 400.0
PTRACE_ATTACH, PTRACE_DETACH, WALL = 16, 17, 0x40000000
pytestmark = [
    pytest.mark.skipif(VLLM is None, reason="no vLLM: make test-vllm VLLM=/path/to/bin/vllm"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="session")
def tiny_llama(session_dir: Path) -> Path:
    """A model that vLLM loads, made by the libraries that it brings."""
    assert VLLM is not None
    folder = session_dir / "tiny-llama"
    python = Path(VLLM).parent / "python"
    script = Path(__file__).with_name("make_model.py")
    subprocess.run([str(python), str(script), str(folder)], check=True, timeout=300, capture_output=True)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


@pytest.fixture
async def node(open_dir: Path, tiny_llama: Path) -> AsyncIterator[PoolManager]:
    pool: dict[str, Any] = {
        "id": "v", "engine": "vllm", "model": f"file:{tiny_llama}", "ctx": 512, "preload": False,
        "startup_timeout_ms": int(LOADING_S * 1000),
        "provisioning": {
            "mode": "binary", "binary": {"path": VLLM}, "flags": ["--dtype", "bfloat16", "--enforce-eager"],
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
        },
    }  # fmt: skip
    daemon = {"engine_user": "root"} if os.geteuid() == 0 else {}  # its Python may lie where only this user may go
    quick: Any = FAST
    health = {**quick["health"], "stall_ms": 10_000}
    # Its own clean-up needs seconds; nobody else can know whose shared memory it is where it runs as root.
    supervision = {**quick["supervision"], "stop_grace_ms": 15_000}
    async with PoolManager(config(open_dir, pool, daemon=daemon, health=health, supervision=supervision)) as made:
        yield made
    assert mentioning(open_dir) == []
    assert [path for path in left_behind(open_dir) if not path.startswith("cache/v/")] == []


async def chat(url: str) -> str:
    body = {"model": "v", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=body) as answer:
        found = await answer.json()
        assert answer.status == 200, found
        return str(found["choices"][0]["finish_reason"])


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def engine_core(pid: int) -> int:
    """The process that computes, a descendant of the API server."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if parent == pid and b"EngineCore" in title:
                return int(entry.name)
    pytest.fail(f"pid {pid} has no EngineCore")


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """Its main thread does not run, as in a deadlock; no signal stopped it."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    if ptrace(PTRACE_ATTACH, pid, None, None) != 0:
        pytest.skip(f"this machine lets nobody trace: {os.strerror(ctypes.get_errno())}")
    os.waitpid(pid, WALL)
    try:
        yield
    finally:
        ptrace(PTRACE_DETACH, pid, None, None)


async def test_a_real_vllm_serves_hangs_loses_its_engine_core_comes_back_and_leaves_nothing(node: PoolManager) -> None:
    before = shared_memory()
    first = await node.ensure_ready("v")
    assert await chat(first["url"]) in ("length", "stop")

    core = engine_core(first["pid"])
    with standing_still(core):
        asked = asyncio.create_task(chat(first["url"]))  # its gauges will not know of it
        await until(lambda: bool(node.events.recent("unhealthy")), "the standstill of its EngineCore to be noticed", 90)
    assert "a prompt of the daemon's own has not been answered" in str(node.events.recent("unhealthy")[0].fields["last_error"])
    assert await asked in ("length", "stop")
    await until(lambda: node.status("v")["ready"], "it to be ready again", 30)

    os.kill(core, signal.SIGKILL)
    await until(lambda: node.status("v")["crash_count"] == 1, "the death of its EngineCore to be a crash", 60)
    crash = node.crashes("v")[0]
    assert not alive(core) and (crash["exit_code"], crash["remediation"]["code"]) == (0, "look_at_worker")
    await until(lambda: node.status("v")["ready"], "the pool to be ready again", LOADING_S)
    again = node.status("v")
    assert again["restart_count"] == 1 and again["pid"] != first["pid"]
    assert await chat(again["url"]) in ("length", "stop")

    await (await node.stop("v")).wait()
    assert shared_memory() <= before, "it leaves shared memory behind"


async def test_a_context_that_the_model_was_not_made_for_is_refused_before_anything_runs(
    open_dir: Path, tiny_llama: Path
) -> None:
    pool = {
        "id": "v", "engine": "vllm", "model": f"file:{tiny_llama}", "ctx": 4096, "preload": False,
        "provisioning": {"mode": "binary", "binary": {"path": VLLM}},
    }  # fmt: skip
    async with PoolManager(config(open_dir, pool)) as node:
        with pytest.raises(Exception, match="512"):
            await node.ensure_ready("v")
        assert node.status("v")["pid"] is None
