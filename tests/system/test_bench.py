"""A bench of a real engine, and of a scripted one from outside: what it measures, what it holds, and when it is given up."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pool_managerd import BenchRequest, PoolManager, PreloadOutcome, RequestError
from tests.conftest import interrupts_heard, wait_until
from tests.system.daemons import Daemon
from tests.system.nodes import config


@pytest.fixture
def daemon(open_dir: Path) -> Iterator[Daemon]:
    made = Daemon(open_dir / "d")
    yield made
    made.end()


@pytest.mark.parametrize("mode", ["package", pytest.param("binary", marks=pytest.mark.slow)])
async def test_a_real_engine_is_measured_and_the_next_daemon_knows(
    mode: str, open_dir: Path, smol_model: Path, llama_server: Path
) -> None:
    provisioning: dict[str, Any] = {"mode": mode, "flags": ["--threads", "1"]}
    if mode == "binary":
        provisioning["binary"] = {"path": llama_server}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{smol_model}", "ctx": 512, "slots": 2, "provisioning": provisioning}
    node_config = config(open_dir, {**pool, "preload": False})
    async with PoolManager(node_config) as node:
        await PreloadOutcome.execute("p", node)
        warm = node.status("p")["perf"]
        assert warm["measured_with"] == "warm-up of 16 tokens"
        operation = await node.bench(BenchRequest("p", tokens=24, prompt_tokens=48, runs=1))
        with pytest.raises(RequestError, match="all 2 slots are in use"):
            node.allocate_lease("p")
        found = await operation.wait()
        alone, full = found["alone"], found["full"]
        assert (found["tokens"], found["runs"], full["requests"]) == (24, 1, 2) and 40 <= found["prompt_tokens"] <= 56, found
        assert alone["first_token_ms_p50"] > 0 and alone["tokens_per_s"] > 0 and alone["prompt_tokens_per_s"] > 0
        assert alone["between_tokens_ms_p99"] >= alone["between_tokens_ms_p50"] > 0
        node.release_lease("p", node.allocate_lease("p")["lease_id"])
        status = node.status("p")
        assert status["perf"]["measured_with"] == found["measured_with"] and status["active_leases"] == 0
        assert status["perf"]["tokens_per_s"] == alone["tokens_per_s"] and status["baselines"][1]["samples"] == 1
        with pytest.raises(RequestError):
            node.cancel_bench("p")
    async with PoolManager(node_config) as node:
        await node.ensure_ready("p")
        kinds = {baseline["kind"]: baseline for baseline in node.status("p")["baselines"]}
        assert kinds["bench"]["figures"]["alone"] == alone and kinds["warm-up"]["samples"] == 2


def leases(daemon: Daemon) -> list[str]:
    return [lease["holder"] for lease in daemon.get("/v1/pools/p/leases")[1]]


def test_a_caller_that_waits_and_goes_takes_its_bench_along(daemon: Daemon) -> None:
    daemon.start().preload("p", "--token-ms", "200", slots_total=2)
    caller = http.client.HTTPConnection("127.0.0.1", daemon.port)
    caller.request("POST", "/v1/pools/p/bench?wait=true", "{}", {"Content-Type": "application/json"})
    wait_until(lambda: leases(daemon) == ["pool-managerd bench"] * 2, "the bench to begin", 10)
    caller.close()
    wait_until(lambda: leases(daemon) == [], "the bench to end with its caller", 10)
    ended = daemon.get("/v1/operations")[1][-1]
    assert ended["kind"] == "bench" and ended["error"]["code"] == "OPERATION_CANCELLED"
    assert daemon.status()["ready"]


def test_what_the_command_shows_and_what_an_interrupt_ends(daemon: Daemon) -> None:
    daemon.start().preload("p", "--parallel", "2", slots_total=2)
    argv = [sys.executable, "-m", "pool_managerd.cli", "bench", "p", "--url", f"http://127.0.0.1:{daemon.port}"]
    done = subprocess.run([*argv, "--tokens", "16", "--runs", "1"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "tokens/s in total" in done.stdout and "2 at once" in done.stdout, done
    with interrupts_heard():
        running = subprocess.Popen([*argv, "--tokens", "2048"], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: leases(daemon) == ["pool-managerd bench"] * 2, "the bench to begin", 20)
    os.kill(running.pid, signal.SIGINT)
    _, told = running.communicate(timeout=20)
    assert running.returncode == 130 and "the bench of p was broken off" in told, told
    wait_until(lambda: leases(daemon) == [], "the bench to end", 10)


def test_a_daemon_that_dies_leaves_leases_that_end_by_themselves(daemon: Daemon) -> None:
    daemon.start().preload("p", "--token-ms", "200")
    code, accepted = daemon.post("/v1/pools/p/bench", {})
    assert code == 202 and accepted["status"] == "running", accepted
    daemon.kill()
    daemon.start()
    daemon.until(lambda status: bool(status["ready"]), "the engine to be adopted")
    kept = daemon.get("/v1/pools/p/leases")[1]
    assert all(lease["expires_at_ms"] is not None for lease in kept)
    found = daemon.get(f"/v1/operations/{accepted['operation_id']}")[1]
    assert found["status"] == "failed" and found["error"]["code"] == "NODE_RESTARTED", json.dumps(found)
