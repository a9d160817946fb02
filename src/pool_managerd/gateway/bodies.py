"""Bodies of requests, held until their answers are there: each is bounded, and so are all together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web

from pool_managerd.errors import NodeError, RequestError


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """``each_bytes`` of one body, ``all_bytes`` of all that are held at the same time, ``seconds`` until one has come."""

    each_bytes: int = 64 << 20
    all_bytes: int = 512 << 20
    seconds: float = 60.0


class Bodies:
    """Of one gateway; ``held`` bytes now."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits, self.held = limits, 0

    def take(self, more: int) -> None:
        """Raises NodeError when that would be too much."""
        if self.held + more > self.limits.all_bytes:
            raise NodeError("cannot take more request bodies at the moment", code="TOO_MANY_REQUESTS", retry_after_ms=1000)
        self.held += more


class Body:
    """Of one request: what was announced, or has come, counts until it is ``let_go``, in any case."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self._size = bodies, 0

    def let_go(self) -> None:
        """Nobody needs it any more."""
        self._bodies.held -= self._size
        self._size = 0

    async def read(self, request: web.Request) -> bytes:
        """All of it. Raises RequestError 413 or 408, NodeError when too much is held already."""
        limits, announced = self._bodies.limits, request.content_length or 0
        if announced > limits.each_bytes:
            raise self._too_large()
        if request.content.is_eof():  # it has come with its head
            raw = await request.read()
            self._grow(len(raw))
            return raw
        self._grow(announced)
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limits.seconds):
                async for piece in request.content.iter_any():
                    pieces.append(piece)
                    size += len(piece)
                    if size > limits.each_bytes:
                        raise self._too_large()
                    self._grow(size)
        except TimeoutError:
            message = f"cannot wait longer than {limits.seconds:.0f} s for the request body"
            raise RequestError(message, code="REQUEST_TIMEOUT", status=408) from None
        return b"".join(pieces)

    def _grow(self, to: int) -> None:
        if to > self._size:
            self._bodies.take(to - self._size)
            self._size = to

    def _too_large(self) -> RequestError:
        limit = self._bodies.limits.each_bytes >> 20
        return RequestError(f"cannot take a request body of more than {limit} MiB", code="BODY_TOO_LARGE", status=413)
