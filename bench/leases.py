"""Lease calls over HTTP from sixteen connections, beside a bare aiohttp application with the same client."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.daemon import answers, daemon
from bench.fleet import Settings
from bench.processes import running, wait_until
from bench.result import Row, quantile
from bench.stub import free_ports

CLIENTS = 16
GOAL_RATE, GOAL_P99_MS = 4_000.0, 10.0
_PATH = "/v1/pools/chat/leases"
_ROOT = Path(__file__).parent.parent


def measure(settings: Settings) -> Iterator[Row]:
    seconds, rounds = (2.0, 1) if settings.quick else (8.0, 3)
    directory = settings.directory
    (engine_port,) = free_ports(1)
    bare_port, fixed_port = free_ports(2, 19_400)
    peer = [sys.executable, "-m", "bench.lease_peers"]
    with (
        daemon(directory / "leases") as node,
        running([*peer, "aiohttp", str(bare_port)], directory / "bare.log", cwd=_ROOT),
        running([*peer, "fixed", str(fixed_port)], directory / "fixed.log", cwd=_ROOT),
    ):
        node.submit("chat", [str(settings.engine()), "--port", str(engine_port)], engine_port, slots=1024)
        node.wait_ready(["chat"])
        for port in (bare_port, fixed_port):
            wait_until(functools.partial(answers, port), "a server to compare with", 20.0)
        ports = {"ours": node.port, "bare": bare_port, "fixed": fixed_port}
        for port in ports.values():
            _drive(port, 0.5)  # the first requests are not typical of anyone
        runs = {name: [_drive(port, seconds) for _ in range(1 if name == "fixed" else rounds)] for name, port in ports.items()}
    rate = {name: quantile([run["requests"] / run["seconds"] for run in these], 0.5) for name, these in runs.items()}
    p99 = {name: quantile([run["p99"] for run in these], 0.5) for name, these in runs.items()}
    errors = sum(run["errors"] for run in runs["ours"])
    yield Row(
        f"lease calls, {CLIENTS} connections", "requests/s", rate["ours"], "bare aiohttp", rate["bare"],
        f"≥ {GOAL_RATE:,.0f}/s", rate["ours"] >= GOAL_RATE and not errors,
        f"{errors:g} errors; the client alone reaches {rate['fixed']:,.0f}/s",
    )  # fmt: skip
    yield Row(
        "the same, p99", "ms", p99["ours"], "bare aiohttp", p99["bare"], f"≤ {GOAL_P99_MS:g} ms", p99["ours"] <= GOAL_P99_MS,
        f"p50 {quantile([run['p50'] for run in runs['ours']], 0.5):.2f}, max {max(run['p100'] for run in runs['ours']):.1f} ms",
    )  # fmt: skip


def _drive(port: int, seconds: float) -> dict[str, float]:
    argv = [sys.executable, "-m", "bench.lease_client", str(port), _PATH, str(CLIENTS), str(seconds)]
    said = subprocess.run(argv, capture_output=True, timeout=seconds + 60, check=True, cwd=_ROOT).stdout
    return dict(json.loads(said))
