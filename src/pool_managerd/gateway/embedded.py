"""The gateway in the process of the node, for programs that embed both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from pool_managerd.core.demand.kept_leases import HeldLease
from pool_managerd.core.demand.request import AcquireRequest
from pool_managerd.errors import RequestError
from pool_managerd.gateway.link import held
from pool_managerd.gateway.process import options_of
from pool_managerd.gateway.server import Gateway
from pool_managerd.httpd.server import listen
from pool_managerd.node import PoolManager
from pool_managerd.telemetry.engine_log import EngineLog

_LOG_LOOK_S = 0.25


class EmbeddedLink:
    """To a node of this process: nothing goes over a wire."""

    def __init__(self, node: PoolManager) -> None:
        self._node = node

    async def __aenter__(self) -> EmbeddedLink:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def acquire(self, model: str, holder: str, ttl_ms: int, wait_ms: int | None = None) -> HeldLease:
        given = await self._node.take_slot(AcquireRequest(model, wait_ms, ttl_ms, holder=holder))
        url, epoch = str(given["url"]), int(given["epoch"] or 0)
        return HeldLease(given["lease_id"], given["pool_id"], url, epoch, started=given["started"])

    async def give_back(self, lease: HeldLease) -> None:
        with suppress(RequestError):
            self._node.release_lease(lease.pool_id, lease.lease_id)

    async def renew(self, lease: HeldLease, ttl_ms: int) -> bool:
        try:
            self._node.renew_lease(lease.pool_id, lease.lease_id, ttl_ms)
        except RequestError:
            return False
        return True

    async def held_by(self, holds: Callable[[str], bool]) -> list[HeldLease]:
        return [lease for one in self._node.pool_ids() for lease in held(one, self._node.leases(one), holds)]

    async def evict(self, pool_id: str) -> None:
        await (await self._node.evict(pool_id)).wait()

    async def queue(self) -> list[dict[str, Any]]:
        return self._node.queue()

    async def log(self, pool_id: str, lines: int) -> AsyncIterator[bytes]:
        found = EngineLog(self._node.log_path(pool_id), self._node.events.redactor.text)
        past = found.past(lines)
        try:
            while (piece := await asyncio.to_thread(next, past, None)) is not None:
                yield piece
        finally:
            past.close()
        yield b""
        while True:
            if piece := await asyncio.to_thread(found.appended):
                yield piece
            else:
                await asyncio.sleep(_LOG_LOOK_S)

    def routes(self) -> AsyncIterator[dict[str, Any]]:
        return self._node.watch_routes()


@asynccontextmanager
async def open_gateway(node: PoolManager, bind: str | None = None) -> AsyncIterator[str]:
    """One port for all models of ``node``, for clients of the OpenAI and Anthropic APIs, in the caller's event loop: its URL.

    ``bind`` is HOST:PORT (default ``gateway.bind``, else 127.0.0.1:8088; port 0 is any); everything else is as ``gateway`` of the
    node's configuration says. At the end running requests have a moment. Raises NodeError when it cannot listen there, SpecError
    for an address off loopback without keys.
    """
    where = bind or node.config.gateway.bind or "127.0.0.1:8088"
    options, listener = options_of(node.config, where), listen(where)
    async with Gateway(EmbeddedLink(node), options) as gateway:
        following = asyncio.create_task(gateway.run(), name="gateway")
        try:
            yield await gateway.start(listener)
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
