"""One request on its way: what its client has been sent so far, and how it ends."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Mapping
from typing import TypeVar

from aiohttp import web

from pool_managerd.errors import PoolError
from pool_managerd.gateway.dialects import STILL_HERE, Dialect, told, told_in_stream
from pool_managerd.gateway.record import Record

_T = TypeVar("_T")
REQUEST_ID = "x-request-id"
_SSE = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Exchange:
    """``stream``: server-sent events were asked for, so that signs of life can be shown every ``heartbeat_s``."""

    def __init__(self, request: web.Request, dialect: Dialect, heartbeat_s: float, path: str = "other") -> None:
        self.request, self.dialect, self.heartbeat_s = request, dialect, heartbeat_s
        self.stream = False
        self.request_id = _sane(request.headers.get(REQUEST_ID)) or f"req_{uuid.uuid4().hex}"
        self.record = Record(self.request_id, path)
        self.response: web.StreamResponse | None = None
        self.sent = False
        """Something of the answer itself: it cannot be asked for again."""
        self._at_boundary = True

    @property
    def begun(self) -> bool:
        """The client has a status, which cannot be taken back."""
        return self.response is not None

    async def begin(self, status: int, headers: Mapping[str, str]) -> web.StreamResponse:
        """Send the head of the answer."""
        response = web.StreamResponse(status=status, headers={**headers, REQUEST_ID: self.request_id})
        self.record.status = status
        await response.prepare(self.request)
        self.response = response
        return response

    async def patiently(self, waiting: Awaitable[_T]) -> _T:
        """``waiting``, with signs of life meanwhile where a stream was asked for."""
        if not self.stream:
            return await waiting
        task = asyncio.ensure_future(waiting)
        try:
            while True:
                await asyncio.wait({task}, timeout=self.heartbeat_s)
                if task.done():
                    return task.result()
                await self.still_here()
        finally:
            task.cancel()

    async def still_here(self) -> None:
        """A sign of life: from now on the answer is a stream."""
        if self.response is None:
            await self.begin(200, _SSE)
        if self.response is not None and self._at_boundary:
            await self.response.write(STILL_HERE)

    async def write(self, chunk: bytes) -> None:
        """A part of the body. Raises ConnectionError when the client has gone."""
        if self.response is not None and chunk:
            self.sent, self._at_boundary = True, chunk.endswith((b"\n\n", b"\r\n\r\n"))
            self.record.passes(chunk)
            await self.response.write(chunk)

    async def end(self) -> web.StreamResponse:
        """The answer is whole."""
        if self.response is None:
            raise RuntimeError("the answer was not begun")
        await self.response.write_eof()
        return self.response

    async def fail(self, problem: PoolError) -> web.StreamResponse:
        """Tell the client, in its own dialect; where its stream has begun as the last event. An answer that has begun and is no
        stream is cut off, so that nobody takes it for whole.
        """
        if self.response is None:
            error = told(problem, self.dialect, self.request_id)
            self.record.status = error.status
            return web.Response(
                body=json.dumps(error.body).encode(), status=error.status, content_type="application/json",
                headers={**error.headers, REQUEST_ID: self.request_id},
            )  # fmt: skip
        if not self.response.headers.get("Content-Type", "").startswith("text/event-stream"):
            if self.request.transport is not None:
                self.request.transport.abort()
            return self.response
        end = b"" if self._at_boundary else b"\n\n"
        await self.response.write(end + told_in_stream(problem, self.dialect, self.request_id))
        return await self.end()


def _sane(given: str | None) -> str | None:
    return given if given is not None and len(given) <= 128 and given.isascii() and given.isprintable() else None
