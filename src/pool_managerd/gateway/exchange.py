"""One request on its way: what its client has been sent so far, and how it ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from aiohttp import web

from pool_managerd.errors import PoolError
from pool_managerd.gateway.dialects import STILL_HERE, Dialect, told, told_in_stream
from pool_managerd.gateway.record import Record

if TYPE_CHECKING:
    from pool_managerd.gateway.spans import TracedRequest

REQUEST_ID = "x-request-id"
_PREFIX = f"req_{secrets.token_hex(8)}"
_numbers = itertools.count(0x1000)
_SSE = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class _Streamed(web.StreamResponse):
    """Its head goes out with its first part: one packet and one call of the system less."""

    _send_headers_immediately = False


class Exchange:
    """``stream``: server-sent events were asked for, so that signs of life can be shown every ``heartbeat_s``; for
    ``patience_s`` at most while nothing else happens.
    """

    patience_s = 1800.0

    def __init__(self, request: web.Request, dialect: Dialect, heartbeat_s: float, path: str = "other") -> None:
        self.request, self.dialect, self.heartbeat_s = request, dialect, heartbeat_s
        self.stream = False
        self.request_id = _sane(request.headers.get(REQUEST_ID)) or f"{_PREFIX}{next(_numbers):x}"
        self.record = Record(self.request_id, path)
        self.traced: TracedRequest | None = None
        self.response: web.StreamResponse | None = None
        self.sent = False
        """Something of the answer itself: it cannot be asked for again."""
        self._at_boundary = True
        self._spoke = self._moved = 0.0
        self._beat: asyncio.TimerHandle | None = None
        self._speaking: asyncio.Future[None] | None = None

    @property
    def begun(self) -> bool:
        """The client has a status, which cannot be taken back."""
        return self.response is not None

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of the answer."""
        self.response = _Streamed(status=status, headers={**headers, REQUEST_ID: self.request_id})
        self.record.status = status
        await self.response.prepare(self.request)

    def show_life(self) -> None:
        """From now on, where a stream was asked for: whenever nothing was sent for a while."""
        if self.stream and self._beat is None:
            self._spoke = self._moved = time.monotonic()
            self._beat = asyncio.get_running_loop().call_later(self.heartbeat_s, self._on_beat)

    def show_no_more(self) -> None:
        """The request is over, or its answer is no stream."""
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None
        if self._speaking is not None:
            self._speaking.cancel()

    def _on_beat(self) -> None:
        """An engine that says nothing for very long is not covered for: the client's own patience counts then."""
        silent_s = time.monotonic() - self._spoke
        if time.monotonic() - self._moved > self.patience_s:
            self._beat = None
            return
        if silent_s >= self.heartbeat_s and (self._speaking is None or self._speaking.done()):
            self._speaking, silent_s = asyncio.ensure_future(self.aside(STILL_HERE)), 0.0
        self._beat = asyncio.get_running_loop().call_later(max(0.001, self.heartbeat_s - silent_s), self._on_beat)

    async def aside(self, event: bytes) -> None:
        """A whole event that is not of the answer, such as a sign of life: from now on the answer is a stream."""
        with suppress(ConnectionError):  # a client that has gone is noticed by whoever answers
            if self.response is None:
                await self.begin(200, _SSE)
            if self.response is not None and self._at_boundary:
                self._spoke = time.monotonic()
                await self.response.write(event)

    async def write(self, chunk: bytes) -> None:
        """A part of the body. Raises ConnectionError when the client has gone."""
        if self.response is not None and chunk:
            self._passes(chunk)
            await self.response.write(chunk)

    async def end(self, last: bytes = b"") -> web.StreamResponse:
        """The answer is whole with its ``last`` part."""
        if self.response is None:
            raise RuntimeError("the answer was not begun")
        if last:
            self._passes(last)
        await self.response.write_eof(last)
        return self.response

    def _passes(self, chunk: bytes) -> None:
        self.sent, self._at_boundary = True, chunk.endswith((b"\n\n", b"\r\n\r\n"))
        self.record.passes(chunk)
        self._spoke = self._moved = time.monotonic()

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
