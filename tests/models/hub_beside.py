"""A hub in a thread of its own, for tests whose clients are other processes; and a file that is larger than any disk here."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from aiohttp import web

from tests.models.hub_app import Hub


class HubBeside:
    """A hub beside the test; with a ``head`` it has one file of 40 GiB, of which it has nothing but that header."""

    def __init__(self, head: bytes | None = None, **hub: Any) -> None:
        self.hub = Hub(**hub)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.hub.start(), self._loop).result(20)
        if head is not None:
            large_file(self.hub, head)

    def end(self) -> None:
        asyncio.run_coroutine_threadsafe(self.hub.close(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def large_file(hub: Hub, head: bytes, total: int = 40 << 30) -> None:
    """``m.gguf`` is ``total`` bytes long; behind ``head`` are zeros that nobody should ask for."""
    hub.files = {}

    async def answer(request: web.Request) -> web.StreamResponse:
        first, last = (int(text) for text in request.headers["Range"].removeprefix("bytes=").split("-"))
        part = head[first : last + 1].ljust(last + 1 - first, b"\0")
        hub.served += len(part)
        return web.Response(status=206, body=part, headers={"ETag": hub.etag, "Content-Range": f"bytes {first}-{last}/{total}"})

    hub.always_head = answer
