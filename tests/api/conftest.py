"""A real server on loopback in front of a fake node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
import pytest

from pool_managerd.api.auth import Access
from pool_managerd.api.context import StreamLimits
from pool_managerd.api.server import ApiServer, ServerLimits
from pool_managerd.httpd.server import HttpLimits, listen
from pool_managerd.node import PoolManager
from pool_managerd.telemetry.metrics import Metrics
from tests.api.fake_node import FakeNode

LIMITS = ServerLimits(
    http=HttpLimits(head_timeout_s=5, shutdown_s=0.5, write_timeout_s=0.5),
    streams=StreamLimits(max_streams=3, heartbeat_s=0.05, write_timeout_s=0.5, poll_s=0.02),
)


@dataclass
class Served:
    """A running server: ``node`` is the fake behind it, ``call`` one request with its JSON answer."""

    node: FakeNode
    server: ApiServer
    url: str
    port: int
    session: aiohttp.ClientSession
    metrics: Metrics

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        async with self.session.request(method, self.url + path, timeout=aiohttp.ClientTimeout(10), **options) as response:
            return response.status, await response.json()


async def serve(node: FakeNode, access: Access | None = None, limits: ServerLimits = LIMITS, bind: str = "127.0.0.1:0") -> Served:
    listener = listen(bind)
    port = listener.getsockname()[1]
    metrics = Metrics({"node_id": "n1"})
    metrics.attach(node.statuses, node.devices)
    node.events.listen(metrics.on_event)
    server = ApiServer(cast("PoolManager", node), access or Access("127.0.0.1"), metrics, limits)
    await server.start(listener)
    return Served(node, server, f"http://127.0.0.1:{port}", port, aiohttp.ClientSession(), metrics)


async def close(served: Served) -> None:
    await served.session.close()
    await served.server.close()


@pytest.fixture
async def api() -> AsyncIterator[Served]:
    served = await serve(FakeNode())
    yield served
    await close(served)
