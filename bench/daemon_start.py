"""From the start of the daemon to its first good answer, and how long ``--help`` takes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.daemon import serve_argv, write_config
from bench.fleet import COUNT, Settings
from bench.own_load import healthy
from bench.processes import running
from bench.result import Row, quantile
from bench.stub import free_ports

GOAL_START_MS, GOAL_HELP_MS = 1_000.0, 250.0


def measure(settings: Settings) -> Iterator[Row]:
    starts = [_start(settings.directory / f"start-{number}") for number in range(2 if settings.quick else 5)]
    took = quantile(starts, 0.5)
    yield Row(
        f"daemon started → /health 200, {COUNT} pools configured, p50", "ms", took, "bare aiohttp", _bare(settings),
        f"≤ {GOAL_START_MS:,.0f} ms", took <= GOAL_START_MS, f"worst {max(starts):,.0f} ms of {len(starts)}",
    )  # fmt: skip
    helps = [_help_ms() for _ in range(4 if settings.quick else 10)]
    took = quantile(helps, 0.5)
    yield Row(
        "--help, p50", "ms", took, "python -c pass", _python_ms(), f"≤ {GOAL_HELP_MS:g} ms", took <= GOAL_HELP_MS,
        f"worst {max(helps):,.0f} ms of {len(helps)}",
    )  # fmt: skip


def _start(directory: Path) -> float:
    directory.mkdir()
    directory.chmod(0o755)
    (port,) = free_ports(1, 19_200)
    pools = [
        {"id": f"pool-{number:03}", "engine": "llamacpp", "model": "file:model.gguf", "preload": False} for number in range(COUNT)
    ]
    return _until_healthy(serve_argv(write_config(directory, port, pools)), port, directory)


def _bare(settings: Settings) -> float:
    """What an application costs that does nothing."""
    directory = settings.directory / "start-bare"
    directory.mkdir()
    (port,) = free_ports(1, 19_400)
    peer = [sys.executable, "-m", "bench.lease_peers", "aiohttp", str(port)]
    return quantile([_until_healthy(peer, port, directory, cwd=Path(__file__).parent.parent) for _ in range(3)], 0.5)


def _until_healthy(argv: list[str], port: int, directory: Path, cwd: Path | None = None) -> float:
    began = time.monotonic()
    with running(argv, directory / "log", cwd=cwd or directory) as child:
        while not healthy(port):
            if child.poll() is not None or time.monotonic() - began > 30:
                raise RuntimeError(f"it did not answer: {(directory / 'log').read_text()[-2000:]}")
            time.sleep(0.001)
        return (time.monotonic() - began) * 1000


def _help_ms() -> float:
    script = Path(sys.executable).with_name("pool-managerd")
    return _run_ms([str(script)] if script.exists() else [sys.executable, "-m", "pool_managerd.cli"], "--help")


def _python_ms() -> float:
    return quantile([_run_ms([sys.executable], "-c", "pass") for _ in range(5)], 0.5)


def _run_ms(program: list[str], *flags: str) -> float:
    began = time.monotonic()
    subprocess.run([*program, *flags], check=True, capture_output=True, timeout=30)
    return (time.monotonic() - began) * 1000
