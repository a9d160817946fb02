"""Nodes for system tests: real processes, a fresh directory, and a look at what is left behind."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pool_managerd.config import Config
from pool_managerd.core.artifacts import PreparedEngine
from tests.conftest import FAKE_ENGINE

FAST = {
    "health": {"startup_timeout_ms": 20_000, "interval_ms": 100, "probe_interval_ms": 200, "probe_timeout_ms": 500},
    "supervision": {"stop_grace_ms": 1_000, "backoff": {"initial_ms": 50, "max_ms": 1_000, "min_delay_ms": 0, "jitter": 0}},
    "lifecycle": {"drain_deadline_ms": 2_000},
}


def config(directory: Path, *pools: dict[str, Any], **sections: Any) -> Config:
    """Profile dev in ``directory``, everything quick."""
    daemon = {"runtime_dir": directory / "run", "state_dir": directory / "state", **sections.pop("daemon", {})}
    raw = {**FAST, "profile": "dev", "base_dir": directory, "daemon": daemon, "pools": pools, **sections}
    return Config.model_validate(raw)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scripted(pool_id: str, *flags: str, port: int | None = None, **fields: Any) -> PreparedEngine:
    """The scripted engine as a submitted one."""
    port = port or free_port()
    argv = ("-I", str(FAKE_ENGINE), "--port", str(port), *flags)
    return PreparedEngine(pool_id, sys.executable, flags=argv, port=port, engine_version="fake-1", verbatim=True, **fields)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Return once ``condition`` holds; fail with ``what`` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain for {what}"
        await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    """A process that is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def mentioning(directory: Path) -> list[str]:
    """Command lines and environments of live processes that name ``directory``: what a node left behind."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(directory).encode() in text:
                found.append(f"{entry.name} {(entry / 'comm').read_text().strip()}")
    return found


def left_behind(directory: Path) -> list[str]:
    """Pid files, handoff files, temporary files and records under the runtime directory."""
    run = directory / "run"
    kept = {"daemon.lock"}
    return [
        str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and p.name not in kept and not p.name.startswith("engine-")
    ]
